"""Numbers beyond a type's range: never infinite in silence, never shown as a result."""

import copy
import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from infini_ds import cli
from infini_ds.config import ModelConfig
from infini_ds.data.encoding import encode
from infini_ds.data.tokenizer_base import ByteTokenizer
from infini_ds.errors import RunError, UserError
from infini_ds.model.memory import Memory
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.runs.export import load_export, load_model
from infini_ds.runs.weights import SafetensorsWeights
from infini_ds.training import start
from tests.tiny_run import tiny_config, write_checkpoint

torch.set_num_threads(1)

N = 64
SMALL, LARGE = 1e3, 3.4e38
"""The latter is the largest that fp32 rounds to something finite, and bf16 does not."""
RULES = {
    "linear": {},
    "delta": {
        "memory_rule": "delta",
        "memory": {"write_gate": True, "write_gate_sees_keys": True, "short_conv": True},
        "num_kv_heads": 1,
    },
}
CONFIG = tiny_config(Path("unused"), segment_length=N).model
QKV = "layers.1.self_attn.qkv_proj.weight"


def heavy(**settings) -> InfiniTransformer:
    """A model whose memories are beyond fp16 after a few segments, and whose logits are not."""
    model = InfiniTransformer(
        tiny_config(Path("unused"), segment_length=N, **settings).model
    ).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.self_attn.qkv_proj.weight.mul_(60)  # type: ignore[union-attr]
            block.self_attn.o_proj.weight.mul_(0.01)  # type: ignore[union-attr]
        model.to(torch.float16).float()  # what fp16 holds of it
    return model


def write_export(directory: Path, state: dict, config: ModelConfig) -> Path:
    from infini_ds.runs.export import config_text

    directory.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        directory / "model.safetensors",
    )
    (directory / "config.yaml").write_text(config_text(config, "bytes"))
    return directory


def in_type(model: InfiniTransformer, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(256, (1, 12 * N + 5), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=RULES)
def half(request, tmp_path_factory) -> tuple[Path, InfiniTransformer]:
    """An export in fp16, and the same weights in fp32."""
    model = heavy(**RULES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    return write_export(folder / "export", in_type(model, torch.float16), model.config), model


@torch.no_grad()
def test_weights_in_fp16_are_computed_with_in_fp32(half, tokens):
    path, model = half
    expected = model(tokens)
    assert expected.memory.kv.abs().max() > 2**16, "or this would show nothing"
    loaded = load_model(path).model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded(tokens).logits, expected.logits)


COMMANDS = {
    "generate": ["generate", "{}", "--prompt-file={text}", "--max-new-tokens=40", "--seed=0"],
    "memorize": ["memorize", "{}", "{text}", "-o", "{out}"],
    "evaluate": ["evaluate", "{}", "--documents", "{text}", "--json={out}", "--plot={plot}"],
    "passkey": [
        "passkey", "{}", "--segments=5", "--samples=1", "--depths=1", "--json={out}",
        "--plot={plot}",
    ],
    "babilong": [
        "babilong", "{}", "--segments=9", "--samples=1", "--tasks=qa1", "--json={out}",
        "--plot={plot}",
    ],
}  # fmt: skip


def command(name: str, model: Path, folder: Path) -> int:
    (folder / "text").write_text("line after line of the book\n" * 20)
    places = {place: folder / place for place in ("text", "out", "plot")}
    return cli.main([part.format(model, **places) for part in COMMANDS[name]])


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_on_weights_in_fp16(name, half, tmp_path):
    assert command(name, half[0], tmp_path) == 0
    if name == "memorize":
        assert Memory.load(tmp_path / "out").kv.isfinite().all()
    if name == "evaluate":
        figures = json.loads((tmp_path / "out").read_text())
        assert figures["with_memory"]["loss"] is not None


@pytest.mark.parametrize("pieces", [[1000], [7, N, 3 * N, 1000]], ids=["at_once", "in_pieces"])
def test_a_model_made_half_reads_its_memory_in_fp32(half, tokens, pieces):
    model = copy.deepcopy(half[1]).half()
    memory = None
    with torch.no_grad():
        for part in tokens.split([*pieces[:-1], tokens.shape[1] - sum(pieces[:-1])], dim=1):
            out = model(part, memory=memory)
            memory = out.memory
            assert out.logits.isfinite().all()
    assert memory is not None
    assert memory.kv.dtype == torch.float32
    assert memory.kv.isfinite().all()


def test_gradients_of_a_model_made_half_are_finite(half, tokens):
    model = copy.deepcopy(half[1]).half()
    model.loss(tokens).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("way", ["half", "autocast"])
def test_the_hugging_face_export_reads_its_memory_in_fp32(half, tokens, way, tmp_path):
    from infini_ds.conversion.hf.configuration_infini import InfiniConfig
    from infini_ds.conversion.hf.modeling_infini import InfiniForCausalLM

    path, model = half
    assert cli.main(["convert", "to-hf", str(path), str(tmp_path / "hf")]) == 0
    tree = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert tree["torch_dtype"] == "float16"
    theirs = InfiniForCausalLM(InfiniConfig(**tree)).eval()
    theirs.load_state_dict(load_file(tmp_path / "hf" / "model.safetensors"))
    if way == "half":
        theirs = theirs.half()
    with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=way == "autocast"):
        out = theirs(tokens)
        expected = model(tokens)
    assert out.logits.isfinite().all()
    assert out.past_key_values.layers[0].kv.dtype == torch.float32
    near = expected.memory.kv[0]
    torch.testing.assert_close(
        out.past_key_values.layers[0].kv, near, rtol=0.1, atol=5e-3 * near.abs().max()
    )


# Casts to a narrower type: of what, the number in it, and what is said.
CASTS = {
    "fp32 to bf16": (torch.float32, LARGE, "bf16", "3.4e+38; in bfloat16 at most 3.38953e+38"),
    "fp64 to bf16": (torch.float64, -1e39, "bf16", "-1e+39; in bfloat16 at most 3.38953e+38"),
    "fp64 to fp32": (torch.float64, 1e39, "fp32", "1e+39; in float32 at most 3.40282e+38"),
    "inf to bf16": (torch.float32, float("inf"), "bf16", "inf; all its numbers must be finite"),
    "nan to fp32": (torch.float16, float("nan"), "fp32", "nan; all its numbers must be finite"),
    "nan as it is": (torch.bfloat16, float("nan"), None, "nan; all its numbers must be finite"),
    "-inf as it is": (torch.float16, float("-inf"), None, "-inf; all its numbers must be finite"),
}


@pytest.mark.parametrize("direction", ["to-safetensors", "to-hf"])
@pytest.mark.parametrize("name", CASTS)
def test_a_cast_looks_at_the_range(name, direction, tmp_path, capsys):
    dtype, number, wanted, message = CASTS[name]
    source = spoilt(tmp_path / "source", dtype, number)
    options = ["--dtype", wanted] if wanted else []
    target = tmp_path / "target"
    assert cli.main(["convert", direction, str(source), str(target), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"infini-ds: {source}: tensor {QKV} holds {message}")
    assert not list(tmp_path.glob("*target*"))


def spoilt(directory: Path, dtype: torch.dtype, number: float) -> Path:
    model = InfiniTransformer(CONFIG)
    state = in_type(model, dtype)
    state[QKV][3, 5] = number
    return write_export(directory, state, model.config)


def llama(folder: Path) -> Path:
    """A plain model of which one weight is not finite."""
    write_checkpoint(tiny_config(folder / "run"))
    assert cli.main(["convert", "to-llama", str(folder / "run"), str(folder / "plain")]) == 0
    file = folder / "plain" / "model.safetensors"
    state = load_file(file)
    state["model.layers.0.self_attn.k_proj.weight"][0, 0] = float("nan")
    save_file(state, file)
    return folder / "plain"


def seed(folder: Path) -> Path:
    config = tiny_config(
        folder / "run", hidden_act="gelu", mlp_bias=True, head_bias=True,
    )  # fmt: skip
    write_checkpoint(config)
    assert cli.main(["convert", "to-seed", str(folder / "run"), str(folder / "s.safetensors")]) == 0
    state = load_file(folder / "s.safetensors")
    next(t for t in state.values() if t.dim() == 2)[0, 0] = float("inf")
    torch.save(state, folder / "seed.pt")
    return folder / "seed.pt"


@pytest.mark.parametrize(
    ("direction", "make", "number", "options"),
    [
        ("from-llama", llama, "nan", ["--without-tokenizer", "--segment-length=32"]),
        ("from-seed", seed, "inf", ["--segment-length=32"]),
        ("from-safetensors", lambda f: spoilt(f / "s", torch.float32, float("inf")), "inf", []),
        ("to-llama", lambda f: spoilt(f / "s", torch.float32, float("nan")), "nan", []),
    ],
    ids=["from-llama", "from-seed", "from-safetensors", "to-llama"],
)
def test_no_conversion_takes_weights_that_are_not_finite(
    direction, make, number, options, tmp_path, capsys
):
    source = make(tmp_path)
    capsys.readouterr()
    assert cli.main(["convert", direction, str(source), str(tmp_path / "target"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"infini-ds: {source}: tensor ")
    assert f" holds {number}; all its numbers must be finite" in line
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int32, torch.uint8])
def test_quantised_weights_are_refused(dtype, tmp_path, capsys):
    model = InfiniTransformer(CONFIG)
    state = dict(model.state_dict())
    state[QKV] = state[QKV].to(dtype)
    source = write_export(tmp_path / "source", state, model.config)
    for given in (["generate", source, "--prompt=a"], ["convert", "to-hf", source, tmp_path / "x"]):
        assert cli.main(list(map(str, given))) == 2
        kind = str(dtype).removeprefix("torch.")
        assert f"tensor {QKV} is {kind}; weights must be float32" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_model_without_finite_results_shows_none(name, number, tmp_path, capsys):
    source = spoilt(tmp_path / "source", torch.float32, number)
    assert command(name, source, tmp_path) == 1
    shown = capsys.readouterr()
    line = shown.err.splitlines()[-1]
    assert f"not finite: weight {QKV} of the model holds {number}" in line
    assert "Traceback" not in shown.err
    assert "nan" not in shown.out
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "plot").exists()


def test_numbers_that_grow_beyond_the_type_are_told(tmp_path, capsys):
    model = InfiniTransformer(CONFIG)
    state = dict(model.state_dict())
    state["layers.2.mlp.down_proj.weight"] *= 1e30
    state["layers.2.mlp.gate_up_proj.weight"] *= 1e20
    source = write_export(tmp_path / "source", state, model.config)
    assert command("evaluate", source, tmp_path) == 1
    assert "not finite: numbers grow beyond float32 in this model" in capsys.readouterr().err


@pytest.mark.parametrize("greedy", [True, False])
def test_generate_from_python_raises(greedy):
    model = InfiniTransformer(CONFIG)
    with torch.no_grad():
        model.head()[0][7] = float("nan")
    with pytest.raises(RunError, match=r"weight layers.4.weight of the model holds nan"):
        model.generate(torch.zeros(1, 3, dtype=torch.int64), 5, temperature=0.0 if greedy else 1.0)


def test_a_memory_of_other_numbers_is_refused(tmp_path, capsys):
    model = InfiniTransformer(CONFIG).eval()
    with torch.no_grad():
        memory = model(torch.zeros(1, N + 3, dtype=torch.int64)).memory
    memory.kv[0, 0, 0, 0, 0] = float("nan")
    memory.save(tmp_path / "memory")
    source = write_export(tmp_path / "source", model.state_dict(), model.config)
    given = ["generate", str(source), f"--memory={tmp_path / 'memory'}", "--prompt=a"]
    assert cli.main(given) == 2
    assert f"memory {tmp_path / 'memory'}: kv holds nan; all its" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_memory_goes_on_in_a_narrower_type_if_that_holds_it(dtype):
    model = InfiniTransformer(CONFIG).eval()
    with torch.no_grad():
        memory = model(torch.zeros(1, N + 3, dtype=torch.int64)).memory
    memory.kv.fill_(LARGE)
    assert memory.to(dtype=dtype).kv.max() == torch.tensor(LARGE), "it stays fp32"
    memory.keys[1, 0, 2, 0, 0] = LARGE
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=rf"memory: keys holds 3.4e\+38; in {name} at most "):
        memory.to(dtype=dtype)


@pytest.mark.parametrize(
    ("stored", "parameter", "number", "message"),
    [
        (torch.float32, torch.bfloat16, LARGE, r"holds 3.4e\+38; in bfloat16 at most"),
        (torch.float64, torch.float32, 1e39, r"holds 1e\+39; in float32 at most"),
        (torch.float64, torch.bfloat16, 3.4e38, r"holds 3.4e\+38; in bfloat16 at most"),
        (torch.float16, torch.bfloat16, float("inf"), "holds inf; all its numbers must be finite"),
        (torch.bfloat16, torch.bfloat16, float("nan"), "holds nan; all its numbers must be finite"),
    ],
)
def test_a_run_starts_from_numbers_that_its_type_holds(
    stored, parameter, number, message, tmp_path
):
    weights = SafetensorsWeights(spoilt(tmp_path / "source", stored, number))
    engine = Mock()
    engine.own_parameters.return_value = [
        (name, torch.nn.Parameter(torch.zeros(meta.shape, dtype=parameter)))
        for name, meta in weights.metas.items()
    ]
    with pytest.raises(UserError, match=f"init_from: tensor {QKV} of .*source {message}"):
        start.load_start(engine, weights)
    for call in engine.set_weight.call_args_list:
        assert call.args[1].isfinite().all()


class TooMany(ByteTokenizer):
    """Gives an id that it does not have, which 16 bits would take for another."""

    def __init__(self, token: int):
        super().__init__()
        self._token = token

    def _encode_piece(self, text, begins):
        return [*text.encode(), self._token]


@pytest.mark.parametrize("token", [258, 65536 + 97, 2**31])
def test_a_token_that_is_not_there_is_not_stored_as_another(token):
    with pytest.raises(UserError, match=f"data.tokenizer: gives token {token}, but has 258 tokens"):
        encode(TooMany(token), "abc")
    stored = encode(TooMany(257), "abc").tokens
    assert stored.tolist() == [256, 97, 98, 99, 257, 257]
    assert stored.dtype == np.dtype("<u2")


@pytest.mark.parametrize("value", ["1e5", "-70000", "nan", "inf"])
def test_gates_are_numbers_of_every_type(value, tmp_path, capsys):
    given = ["convert", "from-llama", str(tmp_path), str(tmp_path / "x"), f"--gate-init={value}"]
    assert cli.main(given) == 2
    assert "--gate-init (" in (line := capsys.readouterr().err)
    assert "must be from -10000 to 10000" in line


def test_mixed_types_that_compute_in_one_are_one(tmp_path):
    model = InfiniTransformer(CONFIG)
    state = in_type(model, torch.float16)
    state |= {name: tensor.float() for name, tensor in state.items() if "norm" in name}
    source = write_export(tmp_path / "source", state, model.config)
    loaded, _ = load_export(source)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
