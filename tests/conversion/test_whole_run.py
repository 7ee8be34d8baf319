"""A run has all that reading it needs: from any directory, without its store, on any machine."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from infini_ds import cli
from infini_ds import config as configuration
from infini_ds.data.mixture import Mixture
from infini_ds.data.opening import with_vocabulary
from infini_ds.data.prepare import prepare
from infini_ds.data.sentencepiece_tokenizer import train_sentencepiece
from infini_ds.data.tokenizer import load_tokenizer
from infini_ds.errors import UserError
from infini_ds.runs.export import load_model
from infini_ds.runs.tokenizer import FOLDER, keep_tokenizer
from tests.damage import flip
from tests.data.tokenizer_files import write_byte_level
from tests.tiny_run import tiny_config, write_checkpoint, write_manifest

torch.set_num_threads(1)

TEXT = "def function_123(first, second):\n    return  second ▁ 漢字  é\n"
KINDS = {
    "sentencepiece": {"data": {"tokenizer": {"vocab_size": 320}}},
    "sentencepiece_given": {"data": {"tokenizer": {"model": "given/tokenizer.model"}}},
    "tokenizers": {"data": {"tokenizer": {"kind": "tokenizers", "model": "given/tokenizer.json"}}},
    "bytes": {"data": {"tokenizer": {"kind": "bytes"}}},
    "mixture": {"data": {"tokenizer": {"model": "given/tokenizer.model"}, "mixture": True}},
    "init_from": {"init_from": "given/export"},
}


def make_run(kind: str, keep: bool = True) -> None:
    """Runs what `pretrain` does with a tokenizer, from here, with relative paths: runs/r.

    Args:
        keep: False: as earlier versions did.
    """
    here = Path.cwd()
    for name in ("texts", "given", "runs/r"):
        (here / name).mkdir(parents=True)
    for number in range(40):
        (here / "texts" / f"{number}.txt").write_text(f"{number} {TEXT}")
    train_sentencepiece(iter([TEXT] * 40), 320, here / "given" / "tokenizer.model")
    write_byte_level(here / "given")
    if kind == "init_from":
        other = tiny_config(here / "other", segment_length=128)
        write_checkpoint(other)
        convert("to-safetensors", "other", "given/export")
        shutil.rmtree(here / "other")
    settings = KINDS[kind]
    corpus = {"source": "files", "files": ["texts/*.txt"], "held_out_fraction": 0.3}
    data = settings.get("data", {})
    if data.get("mixture"):
        mixture = {name: {**corpus, "store": f"stores/{name}"} for name in ("one", "two")}
        data = {**data, "mixture": mixture}
    else:
        data = {**corpus, "store": "stores/s", **data}
    tree = yaml.safe_load(
        configuration.dump(tiny_config(here / "x", vocab_size=0, segment_length=128))
    )
    if kind == "init_from":
        del tree["model"]
    tree |= {"output_dir": "runs/r", "init_from": settings.get("init_from", ""), "data": data}
    (here / "run.yaml").write_text(yaml.safe_dump(tree))
    config = configuration.load("run.yaml")
    for each in config.data.corpora.values():
        prepare(each, workers=1)
    opened = Mixture.open(config.data)
    state = {}
    if keep:
        state["stores"] = {name: store.fingerprint for name, store in opened.stores.items()}
        state["directory"] = os.getcwd()
        keep_tokenizer(opened.tokenizer, config.data.tokenizer.kind, Path("runs/r"))
    config = with_vocabulary(config, opened)
    write_checkpoint(config, store=opened.fingerprint, **state)
    (here / "runs" / "r" / "config.yaml").write_text(configuration.dump(config))
    (here / "runs" / "r" / "metrics.jsonl").write_text('{"step": 9, "train/loss": 1.0}\n')


def convert(*arguments, code: int = 0) -> None:
    assert cli.main(["convert", *map(str, arguments)]) == code


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder in which each of KINDS, and `old`, has been run; nobody stands there."""
    folder, here = tmp_path_factory.mktemp("made"), Path.cwd()
    for kind in (*KINDS, "old"):
        (folder / kind).mkdir()
        os.chdir(folder / kind)
        make_run("sentencepiece" if kind == "old" else kind, keep=kind != "old")
    os.chdir(here)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    """Where a test stands: in a directory of a text and a copy of nothing else."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    monkeypatch.chdir(place)
    (place / "book.txt").write_text(TEXT * 3)
    return place


@pytest.fixture
def taken(made, elsewhere):
    """Copies the run of a kind here, without what lies around it."""
    return lambda kind="sentencepiece": shutil.copytree(made / kind / "runs" / "r", "taken")


def tokens_of(made: Path, kind: str) -> list[int]:
    """What the tokenizer of a run makes of TEXT, by its store."""
    if kind in ("bytes", "init_from"):
        return list(TEXT.encode())
    store = made / kind / "stores" / ("one" if kind == "mixture" else "s")
    name = "tokenizers" if kind == "tokenizers" else "sentencepiece"
    file = "tokenizer.json" if kind == "tokenizers" else "tokenizer.model"
    return load_tokenizer(name, store / file).encode(TEXT)


def mistake(capsys, *arguments) -> str:
    """The one line of a command that must end with exit code 2."""
    capsys.readouterr()
    assert cli.main(list(map(str, arguments))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


COMMANDS = {
    "generate": ["generate", "taken", "--prompt=def ", "--max-new-tokens=3", "--seed=0"],
    "memorize": ["memorize", "taken", "book.txt", "-o", "book.memory"],
    "evaluate": ["evaluate", "taken", "--documents", "book.txt"],
    "passkey": ["passkey", "taken", "--segments=3", "--samples=1", "--depths=1"],
    "inspect": ["inspect", "taken"],
    "status": ["status", "taken"],
    "plan": ["plan", "taken/config.yaml", "--processes=1"],
    "to-hf": ["convert", "to-hf", "taken", "export"],
    "to-llama": ["convert", "to-llama", "taken", "export"],
    "to-safetensors": ["convert", "to-safetensors", "taken", "export"],
    "to-one-file": ["convert", "to-safetensors", "taken", "one.safetensors"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_reads_a_run_that_was_copied_without_its_store(name, taken, made):
    taken()
    assert cli.main(COMMANDS[name]) == 0
    if name in ("to-hf", "to-llama", "to-safetensors"):
        kept = made / "sentencepiece" / "stores" / "s" / "tokenizer.model"
        assert Path("export", "tokenizer.model").read_bytes() == kept.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_tokenizer_goes_with_the_run_and_its_exports(kind, taken, made):
    taken(kind)
    expected = tokens_of(made, kind)
    assert load_model("taken").tokenizer.encode(TEXT) == expected
    convert("to-hf", "taken", "export")
    shutil.rmtree("taken")
    assert load_model("export").tokenizer.encode(TEXT) == expected


@pytest.mark.parametrize("name", ["step_00000009", "the_best"])
def test_a_checkpoint_goes_alone(name, made, elsewhere):
    checkpoint = made / "tokenizers" / "runs" / "r" / "checkpoints" / "step_00000009"
    shutil.copytree(checkpoint, elsewhere / "of" / "mine" / name)
    path = f"of/mine/{name}"
    loaded = load_model(path)
    assert loaded.step == 9
    assert loaded.tokenizer.encode(TEXT) == tokens_of(made, "tokenizers")
    convert("to-hf", path, "export")
    assert load_model("export").tokenizer.fingerprint == loaded.tokenizer.fingerprint
    assert cli.main(["evaluate", path, "--documents", "book.txt"]) == 0
    assert (elsewhere / "evaluation.png").exists(), "not in what lies around the checkpoint"
    assert {file.name for file in elsewhere.iterdir()} == {
        "of", "export", "book.txt", "evaluation.png"
    }  # fmt: skip
    assert [file.name for file in (elsewhere / "of").iterdir()] == ["mine"]


@pytest.mark.parametrize("kind", ["sentencepiece", "mixture", "bytes", "old"])
@pytest.mark.parametrize("moved", [False, True], ids=["where_it_was", "moved_as_a_whole"])
def test_held_out_documents_are_found_from_anywhere(kind, moved, made, elsewhere):
    place = elsewhere / "moved" if moved else made / kind
    (made / kind).rename(place)
    try:
        corpus = ["--corpus=two"] if kind == "mixture" else []
        plot = f"--plot={elsewhere / 'plot.png'}"
        assert cli.main(["evaluate", str(place / "runs" / "r"), *corpus, plot]) == 0
    finally:
        place.rename(made / kind)


def test_held_out_documents_that_are_gone_or_others_are_told(taken, made, elsewhere, capsys):
    run = taken()
    state = next(Path(run).glob("checkpoints/*/state.json"))
    tree = json.loads(state.read_text())
    tree["directory"] = str(elsewhere)
    state.write_text(json.dumps(tree))
    write_manifest(state.parent)
    line = mistake(capsys, "evaluate", "taken")
    assert f"data.store {elsewhere}/stores/s: not found; run `infini-ds prepare CONFIG`" in line
    assert line.endswith("`, or name --documents")
    shutil.copytree(made / "sentencepiece_given" / "stores", elsewhere / "stores")
    line = mistake(capsys, "evaluate", "taken")
    assert f"data.store {elsewhere}/stores/s: is not what checkpoint " in line
    assert line.endswith("was trained on; put that there, or name --documents")


def test_texts_that_pass_keys_hide_in_are_found_from_anywhere(tmp_path):
    started = tmp_path / "started"
    (started / "texts").mkdir(parents=True)
    (started / "texts" / "book.txt").write_text("a book of plain words, again and again\n" * 100)
    config = tiny_config(started / "run", segment_length=128)
    texts = {"filler": "text", "text_files": ["texts/*.txt"], "segment_length": 128}
    passkey = config.data.passkey.model_copy(update=texts)
    data = config.data.model_copy(update={"passkey": passkey})
    write_checkpoint(config.model_copy(update={"data": data}), directory=str(started))
    asked = ["--segments=3", "--samples=1", "--depths=1", "--plot=plot.png"]
    assert cli.main(["passkey", str(started / "run"), *asked]) == 0
    shutil.rmtree(started / "texts")
    assert cli.main(["passkey", str(started / "run"), *asked]) == 2
    assert cli.main(["passkey", str(started / "run"), *asked, "--filler=noise"]) == 0


def test_a_run_of_an_earlier_version_is_read_where_its_store_is(made, taken, monkeypatch, capsys):
    """By its own place, from anywhere; and from where it was started, wherever the run is."""
    expected = tokens_of(made, "old")
    assert load_model(made / "old" / "runs" / "r").tokenizer.encode(TEXT) == expected
    run = Path(taken("old")).resolve()
    line = mistake(capsys, "generate", run, "--prompt=a")
    assert "stores/s: not found; run `infini-ds prepare CONFIG`, or put there what the run" in line
    monkeypatch.chdir(made / "old")
    assert load_model(run).tokenizer.encode(TEXT) == expected
    # One that is trained further has it from then on, for the checkpoints of before too.
    tokenizer = load_model(run).tokenizer
    keep_tokenizer(tokenizer, "sentencepiece", run)
    monkeypatch.chdir(run)
    assert load_model(run).tokenizer.encode(TEXT) == expected


def without(name: str):
    """An export that says nothing of a tokenizer, in one of its forms."""
    write_checkpoint(tiny_config(Path("other")))
    convert("to-safetensors", "other", name)
    if name == "export":
        config = Path(name, "config.yaml")
        config.write_text(config.read_text().replace("tokenizer: bytes", ""))
        return
    from safetensors.torch import load_file, save_file

    save_file(load_file(name), name)
    model = yaml.safe_dump({"model": tiny_config(Path("other")).model.model_dump()})
    Path("config.yaml").write_text(model)


def plain(folder: str, tokenizer: str = "") -> None:
    """What is left of a run without its memory, as others have it."""
    write_checkpoint(tiny_config(Path("other")))
    convert("to-llama", "other", folder)
    if tokenizer:
        Path(folder, "tokenizer.json").write_text(tokenizer)


# What is converted, how that is made, and what is said of it.
LACKING = {
    "to-hf": ("taken", "old", "stores/s: not found"),
    "to-llama": ("taken", "old", "stores/s: not found"),
    "to-safetensors": ("taken", "old", "stores/s: not found"),
    "to-hf of an export": ("export", "export", "export: has no tokenizer; put its tokenizer.json"),
    "to-llama of an export": ("export", "export", "export: has no tokenizer; put its tokenizer"),
    "from-safetensors": ("export", "export", "export: has no tokenizer; put its tokenizer.json"),
    "from-safetensors of a file": ("one.safetensors", "file", "a single file carries no tokenizer"),
    "to-hf of a file": ("one.safetensors", "file", "a single file carries no tokenizer; name what"),
    "from-llama": ("plain", "plain", "plain: has neither tokenizer.json nor tokenizer.model; put"),
    "from-llama of another kind": ("plain", "unread", "tokenizer.json: no tokenizer.json ("),
}


@pytest.mark.parametrize("name", LACKING)
def test_an_export_without_a_tokenizer_must_be_asked_for(name, taken, elsewhere, capsys):
    source, made_by, message = LACKING[name]
    if made_by == "old":
        taken("old")
    elif made_by in ("plain", "unread"):
        plain(source, '{"of": "another"}' if made_by == "unread" else "")
    else:
        without(source)
    command = ["convert", name.split(" ")[0], source, "target"]
    line = mistake(capsys, *command)
    assert message in line
    assert line.endswith(", or add --without-tokenizer")
    assert not [file for file in elsewhere.iterdir() if "target" in file.name]
    assert cli.main([*command, "--without-tokenizer"]) == 0
    assert "warning: made without a tokenizer that can be read: " in capsys.readouterr().out
    assert (elsewhere / "target" / "tokenizer.json").exists() == (made_by == "unread")


def test_a_damaged_tokenizer_is_a_damaged_checkpoint(taken):
    config = configuration.load_resolved(Path(taken()) / "config.yaml")
    write_checkpoint(config.model_copy(update={"output_dir": "taken"}), 12)
    newest = Path("taken/checkpoints/step_00000012/tokenizer/tokenizer.model")
    flip(newest)
    loaded = load_model("taken")
    assert loaded.step == 9
    assert "passed over, tokenizer/tokenizer.model does not have its checksum" in loaded.skipped[0]


def test_what_a_config_names_is_not_looked_at(taken):
    run = Path(taken("init_from"))
    for folder in (Path("given/export"), run / "given" / "export"):
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("no mapping")
    assert load_model(run).step == 9


def test_the_tokenizer_of_a_run_is_written_once_and_whole(tmp_path, made, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    tokenizer = load_tokenizer("tokenizers", made / "tokenizers" / "given" / "tokenizer.json")
    save = type(tokenizer).save

    def interrupted(self, directory):
        save(self, directory)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save", interrupted)
    with pytest.raises(UserError, match=r"output_dir .*run: cannot be written \(No space left"):
        keep_tokenizer(tokenizer, "tokenizers", run)
    assert not list(run.iterdir())
    monkeypatch.setattr(type(tokenizer), "save", save)
    keep_tokenizer(tokenizer, "tokenizers", run)
    place = run / FOLDER
    assert {file.name for file in place.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    before = place.stat()
    keep_tokenizer(tokenizer, "tokenizers", run)
    assert place.stat().st_ino == before.st_ino, "it was not written again"
    (place / "tokenizer.json").write_text("{")
    keep_tokenizer(tokenizer, "tokenizers", run)
    kept = load_tokenizer("tokenizers", place / "tokenizer.json")
    assert kept.fingerprint == tokenizer.fingerprint
    assert [file.name for file in run.iterdir()] == [FOLDER]
