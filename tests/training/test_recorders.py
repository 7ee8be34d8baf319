"""Figures at Weights & Biases, by its own library in offline mode, and in users' own classes."""

import builtins
import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from infini_ds.errors import UserError
from infini_ds.training.monitor import Monitor
from infini_ds.training.recorders import Recorder, open_recorders
from tests import tiny

GATES = np.array([[0.1, 0.9], [0.5, 0.5]])


def config(folder, **monitor):
    return tiny.run_config(output_dir=str(folder), train__steps=10, seed=17, monitor=monitor)


def wandb_records(path: Path) -> list:
    """Reads the file of an offline run: LevelDB's log format, with a protocol buffer a record."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, found, part = path.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block is too small for a header
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


def whole_records(path: Path, limit: float = 60) -> list:
    """Waits for the record of the exit: wandb's own process may still write when a run is over."""
    ends = time.monotonic() + limit
    while True:
        records = wandb_records(path)
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < ends, f"{path}: no exit after {limit:g} s"
        time.sleep(0.1)


def history(records: list) -> list[dict]:
    rows = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        for row in rows
    ]


def test_wandb_gets_everything_and_is_resumed(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wanted = {"project": "memories", "entity": "us", "mode": "offline"}
    for start in (0, 2):  # the second process goes on from a checkpoint of step 2
        monitor = Monitor(config(tmp_path, wandb=wanted), start)
        for step in range(start + 1, start + 4):
            monitor.record(step, {"train/loss": step / 2, "speed/tokens_per_second": 9.0})
        monitor.gates(start + 3, GATES)
        monitor.text(start + 3, "sample", "def <f>():")
        monitor.close()
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    both = [whole_records(path) for path in files]
    runs = [record.run for records in both for record in records if record.HasField("run")]
    assert len({run.run_id for run in runs}) == 1
    assert {(run.project, run.entity, run.display_name) for run in runs} == {
        ("memories", "us", tmp_path.name)
    }
    settings = {item.key: item.value_json for item in runs[0].config.update}
    assert json.loads(settings["seed"]) == 17
    assert json.loads(settings["model"])["hidden_size"] == 16
    for records, steps in zip(both, ([1, 2, 3], [3, 4, 5]), strict=True):
        rows = history(records)
        losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
        assert losses == [(step, step / 2) for step in steps]
        drawn = {name.split(".")[0] for row in rows for name in row}
        assert {"memory/gate", "memory/gate_by_layer_and_head", "sample"} <= drawn
    (text, *_) = tmp_path.glob("wandb/offline-run-*/files/media/html/sample_*.html")
    assert "def &lt;f&gt;():" in text.read_text()
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/memory/*.png"))


def test_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"monitor\.wandb: .*pip install infini-ds\[wandb\]"):
        open_recorders(config(tmp_path, wandb={}), 0)


def test_wandb_online_without_a_login_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"WANDB_API_KEY": "", "HOME": str(tmp_path), "NETRC": "none"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"monitor\.wandb \(online\): .+") as error:
        open_recorders(config(tmp_path, wandb={}), 0)
    assert "\n" not in str(error.value)


class Kept(Recorder):
    """A user's own recorder."""

    told: list[tuple] = []  # noqa: RUF012

    def __init__(self, config, step):
        self.told.append(("opened", config.seed, step))

    def scalars(self, step, metrics):
        self.told.append(("scalars", step, metrics))

    def go_back_to(self, step):
        self.told.append(("back", step))


class Broken(Recorder):
    def scalars(self, step, metrics):
        raise RuntimeError("the server is down\nfor today")


def test_a_recorder_of_ones_own_is_told(tmp_path):
    Kept.told.clear()
    monitor = Monitor(config(tmp_path, recorders=[f"{__name__}:Kept"]), 4)
    monitor.record(5, {"train/loss": 2.0})
    monitor.gates(5, GATES)  # it need not take everything
    monitor.go_back_to(4)
    monitor.close()
    assert Kept.told == [("opened", 17, 4), ("scalars", 5, {"train/loss": 2.0}), ("back", 4)]


def test_a_recorder_that_fails_is_named_once_and_leaves_the_others(tmp_path, capsys):
    Kept.told.clear()
    names = [f"{__name__}:Broken", f"{__name__}:Kept"]
    monitor = Monitor(config(tmp_path, recorders=names), 0)
    for step in (1, 2):
        monitor.record(step, {"train/loss": 2.0})
    monitor.close()
    shown = capsys.readouterr().out
    assert shown.count("warning: Broken: figures cannot be recorded (the server is down") == 1
    assert [each[0] for each in Kept.told] == ["opened", "scalars", "scalars"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere_at_all:Kept", "No module named 'nowhere_at_all'"),
        ("json", "must be package.module:Class"),
        ("json:Nothing", "has no attribute 'Nothing'"),
        ("json:JSONDecoder", "must name a subclass of infini_ds.training.recorders.Recorder"),
        ("", "must be package.module:Class"),
    ],
)
def test_what_is_no_recorder_is_refused(name, said, tmp_path):
    with pytest.raises(UserError, match=r"^monitor\.recorders \(") as error:
        open_recorders(config(tmp_path, recorders=[name]), 0)
    assert said in str(error.value)
