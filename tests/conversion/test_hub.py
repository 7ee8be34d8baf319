"""A model is taken from the hub by its name: what is needed of it, and one line if it is not."""

import fnmatch
import shutil

import huggingface_hub
import pytest
from httpx2 import Request, Response
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from infini_ds import cli
from infini_ds.runs.export import load_export

NAME = "organisation/Model-3.2_1B"


@pytest.fixture
def hub(make_plain, tmp_path, monkeypatch):
    """A hub with one model; what of it was downloaded, one list of files a call."""
    plain = make_plain("qwen3_tied")
    (plain / "pytorch_model.bin").write_bytes(b"pickled")
    (plain / "consolidated.safetensors").write_bytes(b"the weights again")
    (plain / "original").mkdir()
    (plain / "original" / "params.json").write_text("{}")
    calls = []

    def snapshot_download(name, allow_patterns, ignore_patterns):
        assert name == NAME
        directory = tmp_path / "cache"
        directory.mkdir(exist_ok=True)
        calls.append([])
        for file in sorted(plain.rglob("*")):
            path = str(file.relative_to(plain))
            allowed = any(fnmatch.fnmatch(path, pattern) for pattern in allow_patterns)
            ignored = any(fnmatch.fnmatch(path, pattern) for pattern in ignore_patterns)
            if file.is_file() and allowed and not ignored:
                calls[-1].append(path)
                shutil.copyfile(file, directory / path)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return plain, calls


def from_llama(source, target="export", code=0):
    options = ["--segment-length=32", "--without-tokenizer"]
    assert cli.main(["convert", "from-llama", source, target, *options]) == code


def test_name_gives_the_export_of_its_directory(hub, tmp_path):
    plain, calls = hub
    (plain / "consolidated.safetensors").rename(tmp_path / "aside")
    from_llama(str(plain), "expected")
    (tmp_path / "aside").rename(plain / "consolidated.safetensors")
    from_llama(NAME)
    first, second = calls
    assert {"config.json", "tokenizer.json"} <= set(first)
    assert not any(name.endswith((".safetensors", ".bin")) for name in first)
    weights = {name for name in second if name not in first}
    assert weights == {file.name for file in plain.glob("model-*.safetensors")}
    assert weights
    made, expected = (load_export(tmp_path / name) for name in ("export", "expected"))
    assert made[1] == expected[1]
    state = expected[0].state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in made[0].state_dict().items())
    assert (tmp_path / "export/source_config.json").exists()


def test_weights_of_another_family_are_not_downloaded(hub, capsys):
    plain, calls = hub
    config = plain / "config.json"
    config.write_text(config.read_text().replace('"qwen3"', '"gemma2"'))
    from_llama(NAME, code=2)
    assert len(calls) == 1
    assert capsys.readouterr().err.startswith(f"infini-ds: {NAME}/config.json: model_type (gemma2)")


def test_nothing_is_downloaded_where_the_destination_exists(hub, tmp_path, capsys):
    (tmp_path / "export").mkdir()
    from_llama(NAME, code=2)
    assert hub[1] == []
    assert "export: exists; choose another destination" in capsys.readouterr().err


def answered(kind, code):
    return kind("no", response=Response(code, request=Request("GET", "https://hub")))


REFUSALS = {
    "unknown": (
        answered(RepositoryNotFoundError, 404),
        "no such directory, and no such model on the Hugging Face hub (a private one needs `hf "
        "auth login`)",
    ),
    "gated": (
        answered(GatedRepoError, 403),
        "is given on the Hugging Face hub only to those who accept its terms; do so on its page "
        "there, and log in with `hf auth login`",
    ),
    "no_network": (
        ConnectionError("Name or service not known\nmore"),
        "no such directory, and the Hugging Face hub cannot be asked for it (Name or service not "
        "known)",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_hub_does_not_give_is_one_line(name, tmp_path, monkeypatch, capsys):
    error, message = REFUSALS[name]

    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    from_llama(NAME, code=2)
    assert capsys.readouterr().err == f"infini-ds: {NAME}: {message}\n"


def test_without_network_and_cache_it_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    from_llama(NAME, code=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"infini-ds: {NAME}: no such directory, and the Hugging Face hub cannot be asked for it "
    )


@pytest.mark.parametrize("source", ["nowhere", "../nowhere", "a/b/c", "/nowhere/model"])
def test_what_is_no_name_is_a_directory(source, tmp_path, capsys):
    from_llama(source, str(tmp_path / "export"), code=2)
    assert "name the directory of a Hugging Face checkpoint, or a model" in capsys.readouterr().err
