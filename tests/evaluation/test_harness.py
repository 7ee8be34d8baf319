"""Tasks of lm-evaluation-harness on our own model and on its export for transformers."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from infini_ds import cli
from infini_ds.config import LARGEST_GATE, MemoryConfig
from infini_ds.evaluation.harness import HarnessModel
from infini_ds.inspection.weights import is_gate
from infini_ds.model.block import memory_ablated
from infini_ds.runs.export import load_model
from tests.conversion.test_to_hf import N, make_export
from tests.pages import blocks
from tests.tiny_run import tiny_config, write_checkpoint

torch.set_num_threads(1)

TASKS = {
    "choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    },
    "written": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "x",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 40, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip
WORDS = ["memory ", "of ", "all\n", "segments, ", "é", "0x41 ", "return "]


def question(number: int) -> str:
    """Each of another length, from less than a segment to many."""
    drawn = random.Random(number)
    return "".join(drawn.choices(WORDS, k=3 + 4 * number))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with an export for transformers and the files of three tasks."""
    folder = tmp_path_factory.mktemp("harness")
    settings = {
        "memory_rule": "gated_delta", "num_kv_heads": 2, "use_sliding_window": True,
        "memory": MemoryConfig(write_gate=True, short_conv=4), "vocab_size": 258,
    }  # fmt: skip
    make_export(folder / "source", None, **settings)
    assert cli.main(["convert", "to-hf", str(folder / "source"), str(folder / "export")]) == 0
    (folder / "tasks").mkdir()
    rows = [
        {"question": question(number), "choices": ["a bit", " memory", "."], "answer": number % 3}
        for number in range(7)
    ]
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        tree = {
            "task": f"tiny_{name}", "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(data)}}, **task,
        }  # fmt: skip
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(tree))
    return folder


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


PAIRS = requests(
    "loglikelihood",
    [(question(number), f" memory of {number}\n") for number in range(7)] + [("", "segments")],
)
TEXTS = requests("loglikelihood_rolling", [(question(number),) for number in range(7)])
GREEDY = {"until": ["\n\n", "0x"], "max_gen_toks": 40, "do_sample": False}
OPEN = requests("generate_until", [(question(number), GREEDY) for number in range(7)])


def ours(place: Path) -> HarnessModel:
    loaded = load_model(place / "export")
    return HarnessModel(loaded.model, loaded.tokenizer, 3, lambda asked: None)


def theirs(place: Path, batch: int, **options) -> HFLM:
    return HFLM(
        pretrained=str(place / "export"), trust_remote_code=True, dtype="float32", device="cpu",
        batch_size=batch, max_length=100_000, **options,
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 8])
def test_the_export_gives_our_likelihoods_and_texts(place, batch):
    own, exported = ours(place), theirs(place, batch)
    for mine, other in zip(own.loglikelihood(PAIRS), exported.loglikelihood(PAIRS), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-4)
        assert mine[1] == other[1]
    assert own.generate_until(OPEN) == exported.generate_until(OPEN)
    # With the tokenizer's own BOS, they would put a second one before it.
    exported = theirs(place, batch, add_bos_token=False)
    expected = exported.loglikelihood_rolling(TEXTS)
    assert own.loglikelihood_rolling(TEXTS) == pytest.approx(expected, abs=1e-3)


def test_likelihoods_are_those_of_the_logits(place):
    model = ours(place)
    for pair, (likelihood, greedy) in zip(PAIRS, model.loglikelihood(PAIRS), strict=True):
        before, whole = (
            model.tok_encode(pair.args[0].rstrip()),
            model.tok_encode("".join(pair.args)),
        )
        with torch.no_grad():
            scores = model._model(torch.tensor([whole])).logits[0].log_softmax(dim=-1)
        judged = range(len(before), len(whole))
        expected = sum(float(scores[place - 1, whole[place]]) for place in judged)
        assert likelihood == pytest.approx(expected, abs=1e-4)
        assert greedy == all(int(scores[place - 1].argmax()) == whole[place] for place in judged)


def test_ablated_attends_locally_alone(place):
    """The sliding window and the convolution see what they always see."""
    model = ours(place)
    text = TEXTS[-1]
    tokens = model.tok_encode(text.args[0])
    assert len(tokens) > 4 * N
    (on,) = model.loglikelihood_rolling([text])
    with memory_ablated(model._model.blocks):
        (ablated,) = model.loglikelihood_rolling([text])
        (written,) = model.generate_until(OPEN[-1:])
    assert abs(ablated - on) > 0.1
    with torch.no_grad():
        for name, parameter in model._model.named_parameters():
            if is_gate(name):
                parameter.fill_(-LARGEST_GATE)
        scores = model._model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(dim=-1)
    expected = sum(float(row[label]) for row, label in zip(scores, tokens[1:], strict=True))
    assert ablated == pytest.approx(expected, abs=1e-3)
    assert model.generate_until(OPEN[-1:]) == [written]


def evaluate(place: Path, *options: str) -> int:
    command = ["evaluate", str(place / "export"), "--task-folder", str(place / "tasks")]
    return cli.main([*command, *options])


def test_command_reports_tasks_with_the_memory_on_and_ablated(place, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    names = ",".join(f"tiny_{name}" for name in TASKS)
    assert evaluate(place, "--tasks", names, "--limit", "5", "--json", str(figures)) == 0
    shown = capsys.readouterr().out
    tree = json.loads(figures.read_text())
    rows = {(row["task"], row["metric"]): row for row in tree["results"]}
    assert set(rows) == {
        ("tiny_choice", "acc"), ("tiny_choice", "acc_norm"), ("tiny_text", "bits_per_byte"),
        ("tiny_text", "byte_perplexity"), ("tiny_written", "exact_match"),
    }  # fmt: skip
    assert {row["examples"] for row in rows.values()} == {5}
    text = rows["tiny_text", "bits_per_byte"]
    assert text["with_memory"] != text["ablated"]
    assert f"{text['with_memory']:.4f}" in shown
    assert f"{text['ablated']:.4f}" in shown
    assert tree["limit"] == 5


def test_figures_of_a_run_are_kept_with_it(place, tmp_path):
    config = tiny_config(tmp_path / "run")
    write_checkpoint(config)
    command = ["evaluate", str(tmp_path / "run"), "--task-folder", str(place / "tasks")]
    assert cli.main([*command, "--tasks", "tiny_choice"]) == 0
    tree = json.loads((tmp_path / "run" / "tasks.json").read_text())
    assert (tree["step"], len(tree["results"])) == (9, 2)


def test_the_harness_itself_evaluates_an_export_in_batches(place, tmp_path):
    """As shown in docs/conversion.md, and with the figures of our own command."""
    figures = tmp_path / "figures.json"
    names = "tiny_choice,tiny_written"
    assert evaluate(place, "--tasks", names, "--json", str(figures)) == 0
    expected = {
        (row["task"], row["metric"]): row["with_memory"]
        for row in json.loads(figures.read_text())["results"]
    }
    model = f"pretrained={place / 'export'},trust_remote_code=True,dtype=float32,max_length=131072"
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", model,
        "--tasks", names, "--include_path", str(place / "tasks"), "--batch_size", "8",
        "--device", "cpu", "--output_path", str(tmp_path / "theirs"),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "theirs").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]
    for (task, metric), value in expected.items():
        assert found[task][f"{metric},none"] == pytest.approx(value)


def test_documents_of_rulers_needle_are_made_as_shown(tmp_path, monkeypatch):
    (example,) = [code.text for code in blocks("python") if "lm_eval" in code.text]
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    rows = [json.loads(line)["pieces"] for line in (tmp_path / "ruler.jsonl").open()]
    assert len(rows) == 6000
    for (prompt, without), (number, weight) in rows:
        assert (without, weight) == (0, 1)
        assert f"is: {number.strip()}." in prompt
        assert prompt.endswith("mentioned in the provided text is")


def test_rulers_needles_are_asked_at_the_lengths_wanted(place, tmp_path):
    figures = tmp_path / "figures.json"
    options = ("--tasks", "niah_single_1", "--limit", "2", "--lengths", "4096,8192", "--json")
    assert evaluate(place, *options, str(figures)) == 0
    rows = json.loads(figures.read_text())["results"]
    found = [(row["task"], row["metric"], row["examples"]) for row in rows]
    assert found == [("niah_single_1", "4096", 2), ("niah_single_1", "8192", 2)]
    assert all(row["with_memory"] == row["ablated"] == 0 for row in rows)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tasks", "tiny_choise"), "--tasks tiny_choise: lm-evaluation-harness has no such"),
        (("--tasks", "a,,b"), "--tasks (a,,b) must be names with commas"),
        (
            ("--tasks", "niah_single_1", "--lengths", "100"),
            "--tasks niah_single_1: Could not generate any sample",
        ),
        (("--tasks", "tiny_text", "--documents", "x"), "--documents: is for documents; leave out"),
        (
            ("--tasks", "tiny_text", "--task-folder", "nowhere"),
            "--task-folder nowhere: there is no",
        ),
        (("--limit", "3"), "--limit: is for --tasks"),
        (("--tasks", "tiny_text", "--few-shot", "-1"), "--few-shot (-1)"),
    ],
)
def test_mistakes_are_one_line(options, said, place, capsys):
    command = ["evaluate", str(place / "export"), "--task-folder", str(place / "tasks")]
    if "--task-folder" in options or "--limit" in options:
        command = command[:2]
    assert cli.main([*command, *options]) == 2
    *theirs, line = capsys.readouterr().err.splitlines()
    assert said in line
    assert not any("infini-ds" in each or "Traceback" in each for each in theirs)
