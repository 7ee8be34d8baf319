"""Plain models of the Llama family come in and go out again, the same to the bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from infini_ds import cli
from infini_ds.conversion.llama import from_config
from infini_ds.errors import UserError
from infini_ds.memory import RULES
from infini_ds.runs.export import load_export
from tests.conversion.conftest import LLAMA3, MODELS

N = 32


def tensors_of(directory) -> dict[str, torch.Tensor]:
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def convert(direction, source, target, *options, code: int = 0) -> None:
    """Of the tokenizer there is but a file that nobody reads."""
    given = ["convert", direction, str(source), str(target), "--without-tokenizer", *options]
    assert cli.main(given) == code


@pytest.mark.parametrize("name", MODELS)
def test_imported_model_has_the_logits_of_transformers_in_its_first_segment(
    name, make_plain, tmp_path
):
    from transformers import AutoModelForCausalLM

    source = make_plain(name)
    convert("from-llama", source, tmp_path / "export", "--segment-length", str(N))
    model, config = load_export(tmp_path / "export")
    assert (config.segment_length, config.gate_init) == (N, -4.0)
    tokens = torch.randint(96, (3, N), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source)(tokens).logits
        actual = model(tokens).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(model(torch.cat((tokens, tokens), dim=1)).logits).all()


@pytest.mark.parametrize("rule", RULES)
def test_first_segment_of_an_imported_model_does_not_depend_on_the_rule(rule, make_plain, tmp_path):
    source, options = make_plain("llama"), ["--segment-length", str(N)]
    tokens = torch.randint(96, (3, 3 * N), generator=torch.Generator().manual_seed(1))
    found = {}
    for name in ("linear", rule):
        target = tmp_path / f"export_{name}_{len(found)}"
        convert("from-llama", source, target, *options, "--memory-rule", name)
        model, config = load_export(target)
        assert config.memory_rule == name
        with torch.no_grad():
            found[name] = model(tokens).logits
    assert torch.equal(found[rule][:, :N], found["linear"][:, :N])
    assert torch.isfinite(found[rule]).all()
    assert torch.equal(found[rule], found["linear"]) == (rule == "linear")


@pytest.mark.parametrize("shard", ["20KB", "5GB"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_keeps_every_bit(name, dtype, shard, make_plain, tmp_path):
    from transformers import AutoModelForCausalLM

    source = make_plain(name, dtype, shard)
    options = ("--shard-size", shard)
    convert("from-llama", source, tmp_path / "export", "--segment-length", str(N), *options)
    convert("to-llama", tmp_path / "export", tmp_path / "back", *options)
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for tensor, expected in before.items():
        assert after[tensor].dtype == dtype
        assert torch.equal(after[tensor], expected), tensor
    sharded = (tmp_path / "back" / "model.safetensors.index.json").exists()
    assert sharded == (shard == "20KB")
    for directory in ("export", "back"):
        tokenizer = (tmp_path / directory / "tokenizer.json").read_bytes()
        assert tokenizer == (source / "tokenizer.json").read_bytes()
    if dtype == torch.float32 and sharded:
        first, again = (
            AutoModelForCausalLM.from_pretrained(d) for d in (source, tmp_path / "back")
        )
        assert first.config.to_diff_dict() == again.config.to_diff_dict()
        tokens = torch.arange(90)[None]  # past the window of one that slides
        with torch.no_grad():
            assert torch.equal(first(tokens).logits, again(tokens).logits)


def test_old_words_for_rotary_settings_are_read(make_plain, tmp_path):
    source = make_plain("llama")
    path = source / "config.json"
    tree = json.loads(path.read_text())
    convert("from-llama", source, tmp_path / "new", "--segment-length", "32")
    settings = tree.pop("rope_parameters")
    tree |= {"rope_theta": settings.pop("rope_theta"), "rope_scaling": settings}
    settings["type"] = settings.pop("rope_type")
    path.write_text(json.dumps(tree))
    convert("from-llama", source, tmp_path / "old", "--segment-length", "32")
    assert load_export(tmp_path / "old")[1] == load_export(tmp_path / "new")[1]


def test_a_head_saved_beside_a_tied_embedding_is_left_out(make_plain, tmp_path):
    from safetensors.torch import save_file

    source = make_plain("qwen2_tied", shard="5GB")
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, {"format": "pt"})
    convert("from-llama", source, tmp_path / "export")
    assert load_export(tmp_path / "export")[1].tie_embeddings


def test_what_is_lost_is_said(make_plain, tmp_path, capsys):
    source = make_plain("qwen2")
    convert("from-llama", source, tmp_path / "export", "--gate-init", "0", "--shard-size", "1MB")
    convert("to-llama", tmp_path / "export", tmp_path / "back")
    out = capsys.readouterr().out
    assert "warning: --segment-length (2048) is above max_position_embeddings (256)" in out
    assert "its share of the heads' outputs was 50.0% on average, 50.0% at most" in out
    assert "parameters, 0.1 MB in 1 file\n" in out


CONFIG_MISTAKES = {
    "family": (
        {"model_type": "qwen3_moe"},
        "model_type (qwen3_moe) must be one of llama, mistral, qwen2, qwen3; our layers lack what "
        "others have (experts, other norms, ...)",
    ),
    "task": (
        {"architectures": ["LlamaForSequenceClassification"]},
        "architectures (['LlamaForSequenceClassification']) must be [LlamaForCausalLM]",
    ),
    "rope": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        "rope_parameters.rope_type (yarn) must be default, linear or llama3",
    ),
    "partial": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor is not supported with rope_type default",
    ),
    "activation": ({"hidden_act": "relu"}, "hidden_act: input should be 'silu' or 'gelu', got"),
    "quantized": ({"quantization_config": {}}, "quantization_config is not supported"),
    "window": (
        {"model_type": "mistral", "architectures": None, "sliding_window": 1024},
        "sliding_window (1024) is below --segment-length (2048)",
    ),
    "type": ({"hidden_size": "32"}, "hidden_size: input should be a valid integer, got '32'"),
    "heads": ({"num_key_value_heads": 3}, "num_heads (4) must be a multiple of num_kv_heads (3)"),
    "families": ({"model_type": ["llama"]}, "model_type (['llama']) must be one of"),
    "missing": ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is missing"),
    "llama3": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
        "rope_parameters.low_freq_factor is missing",
    ),
    "frequencies": (
        {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}},
        "rope_parameters.low_freq_factor (1.0) must be below high_freq_factor (1.0)",
    ),
    "scaling": ({"rope_parameters": "linear"}, "rope_parameters: input should be a valid dict"),
    "old_scaling": ({"rope_scaling": True}, "rope_scaling: input should be a valid dictionary"),
    "factor": (
        {"rope_parameters": {"rope_type": "linear", "factor": 0}},
        "rope_parameters.factor: input should be greater than 0, got 0",
    ),
    "theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}},
        "rope_parameters.rope_theta: input should be",
    ),
    "old_theta": ({"rope_theta": -1}, "rope_theta: input should be greater than 0, got -1"),
}
WRONG = {
    "hidden_size": [None, [], {}, 0, 10**12, 2.5],
    "num_attention_heads": ["4", None, [4], 0, -1],
    "vocab_size": [0, True],
    "max_position_embeddings": ["256", [], 0],
    "sliding_window": ["64", 0],
    "initializer_range": [-0.1, float("nan"), "0.1"],
    "rms_norm_eps": [-1, 0, float("nan"), float("inf")],
    "head_dim": [0, "16"],
    "tie_word_embeddings": [None, 1],
}


@pytest.mark.parametrize("name", CONFIG_MISTAKES)
def test_what_ours_lacks_is_named(name, make_plain, tmp_path, capsys):
    changes, message = CONFIG_MISTAKES[name]
    source = make_plain("llama")
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    capsys.readouterr()
    convert("from-llama", source, tmp_path / "export", code=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"infini-ds: {path}: ")
    assert message in line
    assert not list(tmp_path.glob("export*"))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_types_and_ranges_are_named(name, make_plain):
    path = make_plain("llama") / "config.json"
    tree = json.loads(path.read_text())
    for value in WRONG[name]:
        with pytest.raises(UserError, match=f"config.json: {name}: input should be .*, got"):
            from_config({**tree, name: value}, path, N, -4.0, "linear")
    del tree["num_attention_heads"]
    with pytest.raises(UserError, match=r"config.json: num_attention_heads is missing"):
        from_config(tree, path, N, -4.0, "linear")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_gates_must_be_numbers(value, make_plain, tmp_path, capsys):
    given = ["convert", "from-llama", str(make_plain("llama")), str(tmp_path / "export")]
    assert cli.main([*given, "--gate-init", value]) == 2
    assert f"--gate-init ({value}) must be from -10000 to 10000" in capsys.readouterr().err
    assert cli.main([*given[:3], str(tmp_path / "a.safetensors")]) == 2
    assert "a.safetensors: must be a directory" in capsys.readouterr().err


OF_GEMMA = "norms that scale by 1 + weight, embeddings scaled by sqrt(hidden_size), GELU-tanh"
OF_LATER = f"{OF_GEMMA}, norms after attention and feed-forward, layers that slide"
LACKED = {
    "Gemma": OF_GEMMA,
    "Gemma2": f"{OF_LATER}, soft caps on attention scores and logits",
    "Gemma3Text": f"{OF_LATER} and have a rotary base of their own",
}


@pytest.mark.parametrize("family", LACKED)
def test_gemma_is_refused_with_what_our_layers_lack(family, tmp_path, capsys):
    import transformers

    config = getattr(transformers, f"{family}Config")()
    source = tmp_path / "gemma"
    config.save_pretrained(source)
    convert("from-llama", source, tmp_path / "export", code=2)
    assert capsys.readouterr().err == (
        f"infini-ds: {source}/config.json: model_type ({config.model_type}) must be one of "
        f"llama, mistral, qwen2, qwen3; our layers lack {LACKED[family]}\n"
    )


def test_head_dim_of_qwen3_is_128_where_its_config_has_none(make_plain):
    path = make_plain("qwen3") / "config.json"
    tree = json.loads(path.read_text())
    del tree["head_dim"]
    assert from_config(tree, path, N, -4.0, "linear").head_dim == 128


def pickled(source) -> None:
    for file in source.glob("*.safetensors*"):
        file.rename(file.with_name("pytorch_model.bin"))


def cut(source) -> None:
    file = max(source.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])


def renamed(source) -> None:
    from safetensors.torch import save_file

    file = max(source.glob("*.safetensors"))
    save_file({name + "_norm": t for name, t in load_file(file).items()}, file)


FILE_MISTAKES = {
    "pickled": (pickled, "its weights are pickled (.bin), which is not safe to read"),
    "cut": (cut, "not a whole safetensors file"),
    "lost": (lambda source: max(source.glob("*.safetensors")).unlink(), "is missing, which model"),
    "renamed": (renamed, ", which model.safetensors.index.json lists"),
    "no_config": (lambda source: (source / "config.json").unlink(), "or a model on its hub"),
}


@pytest.mark.parametrize("name", FILE_MISTAKES)
def test_broken_checkpoint_is_named(name, make_plain, tmp_path, capsys):
    spoil, message = FILE_MISTAKES[name]
    source = make_plain("llama")
    spoil(source)
    capsys.readouterr()
    convert("from-llama", source, tmp_path / "export", code=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"infini-ds: {source}")
    assert message in line


def test_a_tensor_of_another_architecture_is_named(make_plain, tmp_path, capsys):
    from safetensors.torch import save_file

    source = make_plain("llama", shard="5GB")
    file = source / "model.safetensors"
    extra = {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}
    save_file(load_file(file) | extra, file)
    capsys.readouterr()
    convert("from-llama", source, tmp_path / "export", code=2)
    line = capsys.readouterr().err
    assert "tensor model.layers.0.self_attn.q_norm.weight has no counterpart" in line
