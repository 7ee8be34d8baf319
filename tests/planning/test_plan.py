"""A run on paper: consistent with itself, with the layouts, and as a command."""

import json
from itertools import pairwise

import pytest

from infini_ds import cli
from infini_ds.config import load
from infini_ds.planning import report
from infini_ds.planning.plan import alternatives, engines, plan
from infini_ds.planning.report import GIB
from infini_ds.system.compute_type import of_processor
from tests import tiny
from tests.config.test_config import CONFIGS

SETTINGS = [
    "model.vocab_size=300", "model.hidden_size=64", "model.num_layers=4", "model.num_heads=2",
    "model.head_dim=64", "model.segment_length=32", "train.batch_size=8",
    "train.micro_batch_size=1", "train.window_segments=4", "train.dtype=bf16",
]  # fmt: skip
QUICKSTART = next(str(path) for path in CONFIGS if path.stem == "quickstart")
HEADERS = {
    "enwik8": (1, 40), "pg19": (8, 40), "infini_150m": (8, 40), "infini_paper": (8, 80),
    "infini_1b": (16, 80), "llama3_8b_continual": (64, 80), "llama3_8b_zero3": (8, 80),
    "infini_70b": (256, 80),
}  # fmt: skip
"""GPUs that the files say they are for, and GiB of each."""


def config(*overrides):
    return load(QUICKSTART, [*SETTINGS, *overrides])


def test_shares_of_the_time_are_all_of_it():
    chosen = plan(config("parallel.pipeline_stages=2", "train.chunks=2"), 4)
    assert (len(chosen.stages), chosen.data, chosen.micro_batches) == (2, 2, 4)
    whole = chosen.efficiency + chosen.waiting + chosen.again
    assert whole == pytest.approx(1)
    assert sum(stage.waiting for stage in chosen.stages) / 2 == pytest.approx(chosen.waiting)
    assert chosen.tokens == 8 * 4 * 32


def test_one_stage_that_computes_nothing_again_wastes_nothing():
    chosen = plan(config("parallel.pipeline_stages=1", "train.loss_chunk_tokens=128"), 1)
    assert chosen.efficiency == pytest.approx(1)
    assert chosen.stages[0].sent == 0


def test_computing_blocks_again_is_another_forward():
    settings = ["parallel.pipeline_stages=1", "train.activation_checkpointing=block"]
    assert plan(config(*settings), 1).again == pytest.approx(1 / 4, abs=0.01)


def test_more_chunks_wait_less_and_keep_less():
    plans = [
        plan(config("parallel.pipeline_stages=4", f"train.chunks={chunks}"), 4)
        for chunks in (1, 2, 4)
    ]
    waiting = [each.waiting for each in plans]
    kept = [each.stages[0].activations for each in plans]
    assert waiting == sorted(waiting, reverse=True)
    assert kept == sorted(kept, reverse=True)


def test_activations_are_of_each_stage_s_blocks_and_units():
    first, last = plan(config("parallel.pipeline_stages=2"), 2).stages
    assert (first.units, last.units) == (2, 1)
    assert first.activations > last.activations
    assert (first.first_block, last.last_block) == (0, 3)


def test_engines_are_the_longest_pipeline_and_one_stage_with_each_zero():
    """One stage reads whole windows, and computes again what its memory does not hold."""
    settings = config("parallel.pipeline_stages=2", "train.chunks=2")
    compared = engines(settings, 4)
    layouts = [(len(each.plan.stages), each.zero_stage, each.plan.chunks) for each in compared]
    assert layouts == [(4, 1, 2), (1, 1, 1), (1, 2, 1), (1, 3, 1)]
    assert {each.plan.checkpointing for each in compared} == {"none"}
    alone = [each.plan.stages[0] for each in compared[1:]]
    assert alone[0].device > alone[1].device
    assert [stage.sent for stage in alone] == [0, 0, 0]
    # Two micro-batches of one window each, over four ranks: gradients of 4 bytes, weights of 2.
    numbers = alone[0].needs.parameters * 3 / 4
    expected = [(8 + 2) * numbers, (2 * 4 + 2) * numbers, (2 * 4 + 2 * 2 * 2) * numbers]
    assert [stage.reduced for stage in alone] == pytest.approx(expected, rel=1e-6)
    limited = engines(settings, 4, alone[2].device - 1)
    assert limited[3].plan.checkpointing != "none"
    assert [each.zero_stage for each in engines(config("optimizer.name=muon"), 4)] == [1, 1]
    offloaded = ["pipeline_stages=1", "zero_stage=3", "offload_optimizer=true"]
    held = []
    for more in ([], ["offload_weights=true"]):
        changed = config(*(f"parallel.{each}" for each in offloaded + more))
        held.append([each.plan.stages[0].needs.device for each in engines(changed, 4)[1:]])
    assert held[0][:2] == held[1][:2]  # ZeRO-1 and 2 keep weights on the device all the same
    assert held[0][2] > held[1][2]


def test_no_alternative_beats_another_in_both():
    found = alternatives(config(), 4)
    assert len(found) > 3
    assert {len(each.stages) for each in found} <= {1, 2, 4}
    for one, other in pairwise(found):
        assert one.efficiency >= other.efficiency
        assert one.most > other.most


def test_the_chosen_layout_is_not_better_than_all_alternatives():
    chosen = plan(config("parallel.pipeline_stages=2"), 4)
    found = alternatives(config("parallel.pipeline_stages=2"), 4)
    assert any(each.efficiency >= chosen.efficiency and each.most <= chosen.most for each in found)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_fit_what_they_say_they_are_for(path, tmp_path, capsys):
    if path.stem not in HEADERS:
        untold = ("quickstart", "passkey", "passkey_keys", "babilong", "long_windows", "recall")
        assert path.stem in untold
        return
    processes, memory = HEADERS[path.stem]
    text = path.read_text()
    assert f"{memory} GiB" in text or processes == 1
    arguments = ["plan", str(path), "--processes", str(processes), "--memory", str(0.9 * memory)]
    arguments += ["--json", str(tmp_path / "plan.json")]
    assert cli.main(arguments) == 0, capsys.readouterr().err
    assert "this one" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "plan.json").read_text())["alternatives"]) <= 12


@pytest.mark.parametrize("flags", ["avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16"])
def test_type_that_is_open_is_that_of_this_machine(flags, tmp_path, monkeypatch, capsys):
    chosen = of_processor([flags], onednn=True)
    monkeypatch.setattr(report, "fastest_type", lambda device: chosen)
    settings = [*SETTINGS[:-1], "parallel.pipeline_stages=1"]
    path = tmp_path / "plan.json"
    assert cli.main(["plan", QUICKSTART, *settings, "--processes", "1", "--json", str(path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"parameters in {chosen.dtype} on 1" in shown
    assert f"train.dtype is auto: {chosen.dtype} here, since {chosen.why};" in shown
    assert json.loads(path.read_text())["config"]["train"]["dtype"] == chosen.dtype


def test_command_prints_tables_and_writes_figures(tmp_path, capsys):
    path = tmp_path / "plan.json"
    arguments = ["plan", QUICKSTART, *SETTINGS, "parallel.pipeline_stages=2"]
    arguments += ["--processes", "4", "--tflops", "2", "--json", str(path)]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "2 pipeline stages x 2 data-parallel" in shown
    assert "tokens/s" in shown
    figures = json.loads(path.read_text())
    own = figures["plan"]
    assert own["step_seconds"] == pytest.approx(own["flops"] / (4 * 2e12 * own["efficiency"]))
    assert max(stage["device_bytes"] for stage in own["stages"]) == own["device_bytes"]
    assert figures["alternatives"]


def test_ranks_that_share_windows_hold_a_part_of_the_activations():
    tree = {
        "model__vocab_size": 61, "model__num_layers": 4, "train__batch_size": 4,
        "train__window_segments": 8, "train__dtype": "fp32",
    }  # fmt: skip
    alone, shared = (
        plan(tiny.run_config(**tree, parallel={"pipeline_stages": 1, "context_parallel": each}), 2)
        for each in (1, 2)
    )
    assert (alone.data, alone.micro_batches) == (2, 2)
    assert (shared.data, shared.micro_batches) == (2, 4)
    assert shared.stages[0].activations < 0.6 * alone.stages[0].activations
    assert shared.stages[0].needs.memories == 2 * alone.stages[0].needs.memories
    message = 4 * (1 + 2 * 8 * 9)  # of a lane and layer: of two heads, M and z; and a number
    assert (alone.stages[0].sent, shared.stages[0].sent) == (0, 2 * 4 * 4 * message)


def test_useful_tokens_are_those_of_the_store(tmp_path, capsys):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": "x" * 40}) + "\n" for _ in range(90)))
    path = tiny.write_run(
        tmp_path / "run.yaml",
        model__segment_length=128,
        data={
            "source": "files", "files": [str(corpus)], "store": str(tmp_path / "store"),
            "held_out_fraction": 0.0, "tokenizer": {"kind": "bytes"},
        },
    )  # fmt: skip
    plan = ["plan", str(path), "--processes", "1", "--json", str(tmp_path / "plan.json")]
    assert cli.main(plan) == 0
    assert "useful" not in capsys.readouterr().out
    assert cli.main(["prepare", str(path)]) == 0
    assert cli.main(plan) == 0
    line = "useful tokens, which are not padding: 96.1% with data.packing, 32.0% without"
    assert line in " ".join(capsys.readouterr().out.split())
    figures = json.loads((tmp_path / "plan.json").read_text())["useful_tokens"]
    assert figures == {"packed": 3 * 41 / 128, "unpacked": 41 / 128}


def test_too_little_memory_is_one_line_with_code_1(capsys):
    gib = 1e6 / GIB
    arguments = ["plan", QUICKSTART, *SETTINGS, "--processes", "2", "--memory", str(gib)]
    assert cli.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("infini-ds: plan: a device needs ")
    assert "and no layout of 2 processes needs less than" in line
    assert line.endswith("; more processes or parallel.offload_optimizer may fit")


def test_memory_that_is_enough_for_another_layout_is_told(capsys):
    others = alternatives(config(), 2)
    gib = (others[0].most + others[-1].most) / 2 / GIB
    settings = [*SETTINGS, f"parallel.pipeline_stages={len(others[0].stages)}"]
    settings.append(f"train.activation_checkpointing={others[0].checkpointing}")
    settings.append(f"train.chunks={others[0].chunks}")
    assert cli.main(["plan", QUICKSTART, *settings, "--processes", "2", f"--memory={gib}"]) == 1
    assert "; the table shows layouts that need less\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "told"), [(4_260_000, "4.26 M"), (999_000_000, "999 M"), (1_500_000_000, "1.5 B")]
)
def test_parameters_are_in_millions_below_a_billion(count, told):
    assert report._parameters(count) == told


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--processes", "0"], "--processes (0) must be more than 0"),
        (["--processes", "1", "--tflops", "inf"], "--tflops (inf) must be more than 0, and finite"),
        (["--processes", "1000001"], "--processes (1000001) must be at most 1000000"),
        (["--processes", "3"], "train.batch_size (8) must be a multiple of"),
        (["--processes", "3"], "data-parallel size (3); 2 or 4 processes would do"),
        (["--processes", "16"], "share windows (parallel.context_parallel); 8 processes would do"),
        (
            ["--processes", "16"],
            "8 processes would do, and parallel.context_parallel=2 would use all",
        ),
        (["--processes", "1", "--memory", "-1"], "--memory (-1) must be more than 0"),
    ],
)
def test_mistakes_are_one_line_with_code_2(arguments, says, capsys):
    settings = [*SETTINGS, "parallel.pipeline_stages=1"]
    assert cli.main(["plan", QUICKSTART, *settings, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_vocabulary_that_is_not_known_is_asked_for(tmp_path, capsys):
    arguments = ["plan", QUICKSTART, "--processes", "1", f"data.store={tmp_path / 'none'}"]
    arguments += ["data.tokenizer.kind=tokenizers", "data.tokenizer.model=tokenizer.json"]
    assert cli.main(arguments) == 2
    assert "add model.vocab_size=NUMBER" in capsys.readouterr().err
