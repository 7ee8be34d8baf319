"""Files of the seed library come in and go out again, the same to the bit."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from infini_ds import cli
from infini_ds.conversion.seed import check_config, to_seed
from infini_ds.errors import UserError
from infini_ds.runs.export import load_export
from tests import tiny
from tests.tiny_run import tiny_config, write_checkpoint

seed_library = pytest.importorskip("infini_transformer_pytorch")


def run(direction, source, target, *options) -> int:
    return cli.main(["convert", direction, str(source), str(target), *options])


def build(**settings) -> torch.nn.Module:
    torch.manual_seed(0)
    model = seed_library.InfiniTransformer(
        num_tokens=64, dim=48, depth=2, dim_head=16, heads=4, **settings
    )
    for attention, _ in model.layers:
        torch.nn.init.normal_(attention.fastweight_mem.head_gates)
    return model


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("settings", [{"use_mem_delta_rule": True}, {"ff_mult": 3}])
@torch.no_grad()
def test_round_trip_keeps_every_bit(settings, suffix, wrapped, tmp_path, capsys):
    model = build(**settings)
    whole = seed_library.InfiniTransformerWrapper(model, segment_length=16) if wrapped else model
    source = tmp_path / f"seed{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(whole.state_dict(), source)
    rule = "delta" if "use_mem_delta_rule" in settings else "linear"
    options = ("--segment-length", "16", "--memory-rule", rule)
    assert run("from-seed", source, tmp_path / "export", *options) == 0
    ours, config = load_export(tmp_path / "export")
    tokens = torch.randint(64, (2, 16))
    torch.testing.assert_close(ours(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    assert config.memory_rule == rule
    assert run("to-seed", tmp_path / "export", tmp_path / "back.safetensors") == 0
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back[name], tensor), name
    again = to_seed(ours.state_dict(), config)
    assert all(torch.equal(again[name], tensor) for name, tensor in back.items())
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "load it into" in line)
    rebuilt = eval("seed_library." + line.split("load it into ")[1])  # as the user would type it
    rebuilt.load_state_dict(back)
    assert rebuilt.layers[0][0].fastweight_mem.use_mem_delta_rule == (rule == "delta")


def test_norms_of_queries_and_keys_are_refused():
    config = tiny.model_config(hidden_act="gelu", mlp_bias=True, head_bias=True, qk_norm=True)
    with pytest.raises(UserError, match=r"here: model.qk_norm \(True\) must be False for the seed"):
        check_config(config, "here")


def test_a_rule_that_the_library_lacks_is_refused(tmp_path, capsys):
    settings = {"hidden_act": "gelu", "mlp_bias": True, "head_bias": True}
    write_checkpoint(tiny_config(tmp_path / "run", memory_rule="gated_delta", **settings))
    target = tmp_path / "back.safetensors"
    assert run("to-seed", tmp_path / "run", target) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "model.memory_rule (gated_delta) must be linear or delta for the seed library"
    )
    assert not target.exists()
    options = ("--memory-rule", "gated_delta")
    with pytest.raises(SystemExit, match="2"):
        run("from-seed", tmp_path / "seed.pt", tmp_path / "export", *options)
    assert "--memory-rule: invalid choice: 'gated_delta'" in capsys.readouterr().err


def test_mistakes_name_the_file_or_setting(saved, tmp_path, capsys):
    code = tmp_path / "code.pt"
    torch.save({"model": build()}, code)
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(2)}, other)
    nested = tmp_path / "nested.pt"
    torch.save({"model": build().state_dict()}, nested)
    mistakes = [
        ("from-seed", code, "export", f"{code}: cannot be read as a state_dict"),
        ("from-seed", nested, "export", f"{nested}: must be a state_dict"),
        ("from-seed", other, "export", f"{other}: has no token_emb.weight"),
        ("from-seed", tmp_path / "none.pt", "export", "no such file"),
        ("to-seed", saved["fp32"] / "output", "back.safetensors", "model.hidden_act (silu) must"),
        ("to-seed", saved["fp32"] / "output", "back.pt", "must be a file named .safetensors"),
    ]
    for direction, source, target, message in mistakes:
        assert run(direction, source, tmp_path / target) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert not (tmp_path / target).exists()
