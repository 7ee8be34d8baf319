"""Windows that do harm: what train.on_bad_step makes of them, in every layout."""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file

from infini_ds import config as configuration
from infini_ds.data.opening import open_data
from infini_ds.data.store import Store, mapped, token_dtype
from tests.faults.runs import END, START, FaultyRun

STEPS, SAVED, BAD = 9, 4, 6
SETTINGS = {"train__steps": STEPS, "train__save_every": SAVED}
LAYOUTS = [
    pytest.param((2, 1, 1), id="pipeline2"),
    pytest.param((1, 1, 1), id="data2"),
    pytest.param((1, 2, 1), id="context2"),
    pytest.param((1, 1, 2), id="zero2"),
    pytest.param((1, 1, 3), id="zero3"),
]
"""The number of stages, and of ranks that share windows, and the ZeRO stage."""
WORLD = 2
LANE = 1
"""The lane that reads corrupt tokens in step BAD."""


def settings_of(layout: tuple[int, int, int]) -> dict:
    stages, context, zero = layout
    parallel = {"pipeline_stages": stages, "context_parallel": context, "zero_stage": zero}
    return {**SETTINGS, "parallel": parallel}


@pytest.fixture(scope="module")
def corrupt(tmp_path_factory, data):
    """A copy of the store with one token that is not in the vocabulary, and its document."""
    folder = tmp_path_factory.mktemp("corrupt")
    config = data.model_copy(update={"store": str(folder / "store")})
    shutil.copytree(data.store, config.store)
    run = FaultyRun(folder, config, **SETTINGS)
    mixture, lanes = open_data(configuration.load(run.config))
    store = mixture.stores[""]
    for _ in range(BAD + 1):
        plan = lanes.next_plan()
    document, offset = plan.documents[LANE, -1], plan.offsets[LANE, -1]
    corrupt_token(store, "train", document, offset + 1)
    return config, document


def corrupt_token(store: Store, name: str, document: int, offset: int) -> None:
    """Puts one that is not in the vocabulary into a document of a split."""
    path, split = store.path / f"{name}.tokens", store.split(name)
    tokens = np.memmap(path, token_dtype(store.tokenizer.vocab_size), mode="r+")
    tokens[split.offsets[document] + offset] = 60000
    tokens.flush()
    assert mapped(path, tokens.dtype).max() == 60000


@pytest.fixture(scope="module")
def skipping(tmp_path_factory, data):
    """By layout: runs to step SAVED, and from there on without window BAD."""
    made = {}

    def of(layout: tuple[int, int, int]) -> FaultyRun:
        if layout not in made:
            folder = tmp_path_factory.mktemp("skipping")
            faults = json.dumps({"skip": [BAD]})
            run = FaultyRun(folder, data, faults, **settings_of(layout))
            run.finish(WORLD)
            for step in (8, STEPS):
                shutil.rmtree(run.checkpoint(step), ignore_errors=True)
            output = run.finish(WORLD)
            assert f"at step {SAVED}\n" in output
            made[layout] = run
        return made[layout]

    return of


@pytest.mark.parametrize("fault", ["nan", "corrupt"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rollback_is_as_if_the_window_had_never_been_read(
    tmp_path, data, corrupt, skipping, trial, layout, fault
):
    expected = skipping(layout)
    settings = {**settings_of(layout), "train__on_bad_step": "rollback"}
    faults = {"nan": [BAD]} if fault == "nan" else {"unchecked": True}
    source, document = corrupt if fault == "corrupt" else (data, None)
    with trial("window with a NaN or a corrupt token: rollback"):
        run = FaultyRun(tmp_path, source, json.dumps(faults), **settings)
        output = run.finish(WORLD)
        assert f"back to {run.checkpoint(SAVED)}, from where step {BAD + 1} will be" in output
        if document is not None:
            assert f"in train documents {document})" in output
        assert run.checksums(STEPS) == expected.checksums(STEPS)
        assert run.losses == expected.losses
        assert sorted(run.losses) == [step for step in range(1, STEPS + 1) if step != BAD + 1]
        records = (run.output / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in records if "train/skipped_steps" in line]
        assert steps == list(range(1, STEPS + 1))
        report = json.loads((run.output / "report.json").read_text())
        assert (report["skipped_steps"], report["rollbacks"]) == (1, 1)


def test_rollback_goes_the_same_way_in_every_layout(skipping):
    losses = skipping((1, 1, 1)).losses
    for layout in ((2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 3)):
        assert skipping(layout).losses == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_skip_counts_and_empties_the_memories_of_corrupt_lanes(tmp_path, corrupt, trial, layout):
    settings = {**settings_of(layout), "train__steps": BAD + 1}
    with trial("window with a NaN or a corrupt token: skip"):
        run = FaultyRun(tmp_path, corrupt[0], '{"unchecked": true}', **settings)
        run.finish(WORLD)
        assert run.metrics[BAD + 1]["train/skipped_steps"] == 1
        norms = {}
        for path in (run.checkpoint(BAD + 1) / "memory").iterdir():
            first = int(path.stem.rpartition("_")[2])
            for lane, norm in enumerate(load_file(path)["norm"], start=first):
                norms.setdefault(lane, []).append(float(norm.abs().sum()))
        assert norms.pop(LANE) == [0, 0]
        assert all(min(values) > 0 for values in norms.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stop_ends_all_ranks_with_the_reason(tmp_path, data, trial, layout):
    settings = {**settings_of(layout), "train__on_bad_step": "stop"}
    with trial("window with a NaN or a corrupt token: stop"):
        run = FaultyRun(tmp_path, data, json.dumps({"nan": [BAD]}), **settings)
        with run.start(WORLD) as ranks:
            assert ranks.wait(START) == [1, 1], ranks.outputs()
        for process in ranks.all:
            assert f"not finite at step {BAD + 1}, and train.on_bad_step is stop" in process.output
        assert [failure["step"] for failure in run.recorded] == [BAD, BAD]
        assert max(run.output.glob("checkpoints/step_*")) == run.checkpoint(SAVED)


def test_rollback_gives_up_where_every_window_is_bad(tmp_path, data, trial):
    settings = {**SETTINGS, "train__on_bad_step": "rollback", "train__max_skipped_steps": 3}
    with trial("window with a NaN or a corrupt token: rollback"):
        faults = json.dumps({"nan": list(range(SAVED, STEPS))})
        run = FaultyRun(tmp_path, data, faults, **settings)
        with run.start(1) as ranks:
            assert ranks.wait(START + END) == [1], ranks.outputs()
        output = ranks.all[0].output
        assert "in 3 steps since the last checkpoint (train.max_skipped_steps)" in output
        assert output.count(f"back to {run.checkpoint(SAVED)}") == 2


def test_corrupt_held_out_document_ends_the_start_of_all_ranks(tmp_path, data, trial):
    config = data.model_copy(update={"store": str(tmp_path / "store")})
    shutil.copytree(data.store, config.store)
    corrupt_token(Store.open(config.store), "held_out", 0, 1)
    with trial("corrupt held-out document"):
        run = FaultyRun(tmp_path, config, '{"unchecked": true}', **SETTINGS)
        with run.start(WORLD) as ranks:
            assert ranks.wait(START) == [2, 2], ranks.outputs()
        line = "held_out.tokens: document 0 holds tokens that its tokenizer does not have; run `inf"
        assert line in ranks.all[0].output
        assert not run.losses


def test_rollback_to_a_checkpoint_of_another_layout(tmp_path, data, trial):
    def resumed(name: str, faults: dict, **settings) -> tuple[FaultyRun, str]:
        """Made by one process until step SAVED, and then gone on with by two, to the end."""
        run = FaultyRun(tmp_path / name, data, json.dumps(faults), **{**SETTINGS, **settings})
        run.finish(1, f"train.steps={SAVED}")
        return run, run.finish(WORLD)

    with trial("window with a NaN or a corrupt token: rollback"):
        expected, _ = resumed("expected", {"skip": [BAD]})
        run, output = resumed("run", {"nan": [BAD]}, train__on_bad_step="rollback")
        assert f"back to {run.checkpoint(SAVED)}, from where step {BAD + 1} will be" in output
        assert run.losses == expected.losses
        assert run.checksums(STEPS) == expected.checksums(STEPS)
