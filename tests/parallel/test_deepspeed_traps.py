"""What DeepSpeed gets wrong where nobody looks, each of it seen from inside a two-stage engine."""

import json
from pathlib import Path

import pytest

from tests.distributed.processes import run_ranks
from tests.parallel.traps_worker import KINDS

WORKER = Path(__file__).with_name("traps_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traps")
    extensions = folder / "extensions"
    extensions.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
        run_ranks([str(WORKER), str(folder)], 2, folder, limit=120)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(params=KINDS)
def seen(ranks, request):
    return [rank[request.param] for rank in ranks]


def test_every_unit_goes_backward_once(seen):
    for rank in seen:
        assert rank["backward_passes"] == rank["units"]


def test_gradients_are_summed_in_fp32(seen):
    for rank in seen:
        assert rank["sum_dtype"] == "torch.float32"


def test_optimizer_groups_keep_their_names_and_learning_rates(seen):
    for rank in seen:
        assert rank["groups"] == ["weights", "no_decay", "gates"]
        assert rank["moved"]
        assert not rank["gate_moved"], "the gates' learning rate is 0"


def test_step_with_a_gradient_not_finite_on_one_rank_is_skipped_and_counted_on_all(seen):
    for rank in seen:
        assert not rank["moved_when_not_finite"]
        assert rank["skipped"] == [1, 1]
        assert rank["norm_when_not_finite"] in ("inf", "nan")


def test_training_goes_on_after_a_skipped_step(seen):
    for rank in seen:
        assert rank["moved_afterwards"]
        assert rank["skipped_afterwards"] == [1, 0]


def test_no_operator_is_compiled(ranks):
    for rank in ranks:
        assert rank["compiled"] == []
        assert not rank["compiles_communication"]
