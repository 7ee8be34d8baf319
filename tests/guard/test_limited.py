import threading
import time

from infini_ds.guard.limited import within


def test_within_gives_the_result():
    assert within(5, lambda: "here", "otherwise") == "here"


def test_within_gives_the_other_where_the_call_fails_or_does_not_return():
    assert within(5, lambda: 1 // 0, "otherwise") == "otherwise"
    forever = threading.Event()
    began = time.monotonic()
    assert within(0.1, forever.wait, "otherwise") == "otherwise"
    assert time.monotonic() - began < 5
    forever.set()
