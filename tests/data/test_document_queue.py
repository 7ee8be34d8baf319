import pytest

from infini_ds.data.document_queue import DocumentQueue


def test_take_gives_every_index_once_an_epoch_in_a_new_order():
    taken = DocumentQueue(7, 3).take(21).tolist()
    epochs = [taken[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("parts", [[1] * 20, [7, 7, 6], [20], [3, 0, 17]], ids=str)
def test_take_does_not_depend_on_how_many_are_taken_at_once(parts):
    queue = DocumentQueue(7, 3)
    taken = [index for part in parts if part for index in queue.take(part).tolist()]
    assert taken == DocumentQueue(7, 3).take(20).tolist()
    assert (queue.epoch, queue.next) == (2, 6)


def test_load_state_goes_on_from_there():
    queue, other = DocumentQueue(7, 3), DocumentQueue(7, 3)
    queue.take(7)  # the epoch has ended and the next one has not begun
    other.load_state(queue.state())
    assert other.take(9).tolist() == queue.take(9).tolist()


def test_order_is_that_of_the_key():
    orders = [DocumentQueue(20, *key).take(20).tolist() for key in ((0,), (1,), (-1,), (0, 1))]
    assert len({tuple(order) for order in orders}) == 4
