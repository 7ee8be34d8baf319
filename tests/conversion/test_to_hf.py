"""What transformers makes of an export, without this package, is what the model itself makes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infini_ds import cli
from infini_ds.config import MemoryConfig, RopeScaling
from infini_ds.conversion.convert import config_text
from infini_ds.data.sentencepiece_tokenizer import train_sentencepiece
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.runs.export import load_export, load_model
from tests import tiny
from tests.conversion.hf_worker import NEW_TOKENS
from tests.tiny_run import tiny_config, write_checkpoint

torch.set_num_threads(1)

WORKER = Path(__file__).with_name("hf_worker.py")
N = 16
LENGTH = 5 * N + 3
TEXT = "The  memory\tof <s> all ▁ segments,\n  épsilon 漢 <0x41> </s>\n\n"
LLAMA3 = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=64)
# Each with what the others lack.
MODELS: dict[str, dict] = {
    "linear": {"rope_scaling": LLAMA3, "head_bias": True},
    "delta": {
        "memory_rule": "delta", "num_kv_heads": 2,
        "memory": MemoryConfig(write_gate=True, write_gate_sees_keys=True, short_conv=6),
        "qk_norm": True,
    },
    "biased": {
        "attention_bias": True, "attention_out_bias": True, "mlp_bias": True, "num_kv_heads": 1,
        "hidden_act": "gelu", "memory": MemoryConfig(write_gate=True),
        "rope_scaling": RopeScaling(factor=4.0),
    },
    "tied": {"tie_embeddings": True, "rope_theta": 5e5, "memory_rule": "delta"},
    "gated_delta": {
        "memory_rule": "gated_delta", "num_kv_heads": 2,
        "memory": MemoryConfig(write_gate=True, write_gate_sees_keys=True, short_conv=True),
        "use_sliding_window": True,
    },
    "dpfp": {
        "memory_rule": "gated_delta_dpfp", "num_kv_heads": 2,
        "memory": MemoryConfig(write_gate=True, short_conv=True, layers=(1,)),
    },
}  # fmt: skip
SHARDED = ("biased", "tied")
BY_TOKEN = ("keys", "values", "weights")


def make_export(
    directory: Path, sentencepiece: Path | None, vocab_size: int = 330, **settings
) -> None:
    """Weights all of which matter: the write gates are spread from closed to open."""
    config = tiny.model_config(
        vocab_size=vocab_size, hidden_size=32, num_heads=4, segment_length=N, intermediate_size=48,
        initializer_range=0.3, **settings,
    )  # fmt: skip
    model = InfiniTransformer(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    directory.mkdir(parents=True)
    save_file(model.state_dict(), directory / "model.safetensors")
    kind = "sentencepiece" if sentencepiece else "bytes"
    (directory / "config.yaml").write_text(config_text(config, kind))
    if sentencepiece:
        (directory / "tokenizer.model").write_bytes(sentencepiece.read_bytes())


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> Path:
    """A folder with an export of each of MODELS, and what transformers made of it."""
    folder = tmp_path_factory.mktemp("huggingface")
    model = folder / "tokenizer.model"
    train_sentencepiece(iter([TEXT, "a segment of all memory"] * 20), 320, model)
    for name, settings in MODELS.items():
        source, target = folder / "source" / name, folder / "made" / name
        make_export(source, model if name == "tied" else None, **settings)
        shards = ["--shard-size", "20KB"] if name in SHARDED else []
        assert cli.main(["convert", "to-hf", str(source), str(target), *shards]) == 0
        assert (target / "model.safetensors.index.json").exists() == bool(shards)
        tokens = torch.randint(250, (2, LENGTH), generator=torch.Generator().manual_seed(1))
        save_file({"tokens": tokens}, target / "question.safetensors")
        (target / "text.txt").write_text(TEXT)
    done = subprocess.run(
        [sys.executable, "-I", str(WORKER), str(folder / "made")],
        capture_output=True, text=True, check=False, cwd=folder, timeout=300,
        env={**os.environ, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "made"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens_are_ours(name, answered):
    folder = answered / name
    tokens, answer = (load_file(folder / f"{file}.safetensors") for file in ("question", "answer"))
    tokens = tokens["tokens"]
    model, _ = load_export(folder)  # what transformers loads is an export as well
    eos = load_model(folder).tokenizer.eos_id
    with torch.no_grad():
        out = model(tokens)
    expected = out.logits
    for part in ("kv", "norm", "keys", "values", "weights"):
        ours = getattr(out.memory, part)[:, :, : LENGTH % N if part in BY_TOKEN else None]
        assert (part in answer) == (ours.numel() > 0), part
        if part in answer:
            torch.testing.assert_close(answer[part], ours, rtol=1e-4, atol=1e-4)
    for logits in (answer["logits"], answer["in_pieces"], answer["from_hidden"]):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        alone = model(tokens[:1, 3:]).logits[0]
    torch.testing.assert_close(answer["padded"], alone, rtol=1e-4, atol=1e-4)
    written = model.generate(tokens, NEW_TOKENS, temperature=0, stop_token=eos)
    assert NEW_TOKENS > 2 * N, "ends of segments are crossed"
    assert torch.equal(answer["greedy"], written)
    assert torch.equal(answer["greedy_from_cache"], written)
    told = json.loads((folder / "answer.json").read_text())
    assert told["loss"] == pytest.approx(float(model.loss(tokens).detach()), rel=1e-4)
    assert told["eos"] == eos
    assert told["hidden_states"] == 3, "the embedding, after one block, after the other and norm"
    torch.testing.assert_close(answer["embedded"], model.layers[0](tokens))
    assert told["no_attentions"].startswith("output_attentions must be false")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_bf16_is_as_near_to_ours_as_ours_to_fp32(name, answered):
    folder = answered / name
    tokens, answer = (load_file(folder / f"{file}.safetensors") for file in ("question", "answer"))
    tokens = tokens["tokens"]
    exact = load_export(folder)[0](tokens).logits
    rounded = load_export(folder)[0].bfloat16()(tokens).logits.float()
    rounding = (rounded - exact).norm()
    assert 0 < rounding < 0.1 * exact.norm()
    assert (answer["bf16"].float() - rounded).norm() < 1.5 * rounding
    assert (answer["bf16"].float() - exact).norm() < 1.5 * rounding


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_cache_is_of_one_size_and_all_ways_of_writing_work(name, answered):
    told = json.loads((answered / name / "answer.json").read_text())
    assert told["open_tokens"] < N
    one, four = told["numbers_at_ends"]
    assert one == four > 0
    assert told["kept_logits"] == [2, 1, 330]
    assert told["sampled"] == told["beams"] == [2, LENGTH + NEW_TOKENS]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_tokenizer_is_ours(name, answered):
    told = json.loads((answered / name / "answer.json").read_text())
    kind = ("sentencepiece", answered / name / "tokenizer.model") if name == "tied" else ("bytes",)
    ours = load_tokenizer(*kind)
    assert told["ids"] == [ours.bos_id, *ours.encode(TEXT)]
    assert told["text"] == TEXT
    assert told["unknown"] == f"<s>{TEXT}", "the model has more ids than the tokenizer"


def test_an_export_without_a_tokenizer_goes_into_the_directory_one_is_in(tmp_path, monkeypatch):
    make_export(tmp_path / "source", None)
    config = tmp_path / "source" / "config.yaml"
    config.write_text(config.read_text().replace("tokenizer: bytes", ""))
    (tmp_path / "source" / "source_config.json").write_text('{"eos_token_id": []}')
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path / "made")
    assert cli.main(["convert", "to-hf", "../source", ".", "--force", "--without-tokenizer"]) == 0
    made = tmp_path / "made"
    assert json.loads((made / "generation_config.json").read_text())["pad_token_id"] is None
    assert "# made\n" in (made / "README.md").read_text()


def test_the_card_tells_of_the_run(tmp_path, capsys):
    config = tiny_config(tmp_path / "run", tie_embeddings=True)
    write_checkpoint(config)
    figures = {
        "step": 9, "held_out/bits_per_byte": 2.5, "held_out_without_memory/bits_per_byte": 2.75,
        "held_out_unigram/bits_per_byte": 4.0,
    }  # fmt: skip
    report = tmp_path / "run" / "report.json"
    report.write_text(json.dumps(figures))
    row = {"task": "niah", "metric": "4096", "with_memory": 0.75, "ablated": 0.0}
    tasks = {"step": 9, "harness": "0.4.13", "limit": 50, "results": [row]}
    (tmp_path / "run" / "tasks.json").write_text(json.dumps(tasks))
    target = tmp_path / "made"
    convert = ["convert", "to-hf", str(tmp_path / "run"), str(target)]
    assert cli.main(convert) == 0
    card = (target / "README.md").read_text()
    for line in (
        "# made", "| steps | 9 |", "| tokens | 900 |", "| data | python-stdlib |",
        "| with memory | 2.5000 bits per byte |", "| without memory | 2.7500 bits per byte |",
        "| segment | 32 tokens |", "| tied embeddings | yes |", "| niah | 4096 | 0.7500 | 0.0000 |",
    ):  # fmt: skip
        assert f"{line}\n" in card
    assert "AutoModelForCausalLM.from_pretrained" in capsys.readouterr().out

    report.write_text(json.dumps({**figures, "step": 8}))  # of another checkpoint
    assert cli.main([*convert, "--force", "--dtype", "bf16"]) == 0
    assert "Held-out" not in (target / "README.md").read_text()
    tree = json.loads((target / "config.json").read_text())
    assert (tree["torch_dtype"], tree["eos_token_id"]) == ("bfloat16", 257)
    assert load_export(target)[0].layers[0].weight.dtype == torch.bfloat16
    for text in ("{", "[]"):  # nothing of it is needed
        report.write_text(text)
        assert cli.main([*convert, "--force"]) == 0
    assert cli.main(["convert", "to-hf", str(target), str(tmp_path / "x.safetensors")]) == 2
    assert "x.safetensors: must be a directory" in capsys.readouterr().err
