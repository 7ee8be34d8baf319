"""A path is what was typed, but for `~` at its beginning, or it is refused in one line."""

import glob
import json
import os
from pathlib import Path

import pytest

from infini_ds import cli
from infini_ds.config import DataConfig, TokenizerConfig, dump, load, load_resolved
from infini_ds.data import train_tokenizer
from infini_ds.data.documents import Corpus
from infini_ds.data.prepare import prepare
from infini_ds.data.store import Store
from infini_ds.errors import UserError
from infini_ds.parallel.deepspeed.universal import plain_path
from infini_ds.system.paths import as_path
from tests.config.test_config import TREE
from tests.tiny_run import tiny_config, write_checkpoint

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
ODD = {
    "brackets": "layers=[1,2]",
    "bracket": "a[b",
    "star": "a*b",
    "question_mark": "what?",
    "braces": "{a,b}",
    "spaces": " a  b ",
    "quotes": "it's",
    "double_quotes": 'a "b"',
    "backslash": r"C:\data\new",
    "dollar": "costs $5",
    "dash": "-rf",
    "tilde": "a~b",
    "percent": "100%h %n %% %t",
    "shell": "a;b&c|d>e<f`g`!h",
    "hash": "#1",
    "comma_equals": "a=b,c:d@e",
    "other_letters": "Länge_长度_🙂",
    "decomposed": "e\u0301",
    "dots": "...",
}
odd_names = pytest.mark.parametrize("name", ODD.values(), ids=ODD)
REFUSED = {
    "variable": ("$RUNS/a", "variables are not filled in ($RUNS)"),
    "braced_variable": ("a/${RUN}", "variables are not filled in (${RUN})"),
    "command": ("a/$(date)", "variables are not filled in ($(date))"),
    "user": ("~nobody-of-that-name/a", "there is no such home directory"),
    "line_break": ("a\nb", r"'a\nb' has a line break"),
    "carriage_return": ("a\r", r"'a\r' has a line break"),
    "tab": ("a\tb", r"'a\tb' has a line break or another control character"),
    "escape": ("a\x1b[1m", r"has a line break or another control character"),
    "delete": ("a\x7f", r"has a line break or another control character"),
    "not_utf8": (os.fsdecode(b"caf\xe9"), "is not UTF-8"),
    "long": ("a" * 300, "is too long a name"),
    "long_within": ("a/" + "b" * 300 + "/c", "is too long a name"),
}
refused = pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The home directory, and another one to stand in."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


class TestAsPath:
    @odd_names
    @pytest.mark.parametrize("form", ["{}", "a/{}/b", "./{}/", "../{}", "/{}", "{}/.."])
    def test_it_is_what_was_typed(self, name, form):
        assert as_path(form.format(name)) == form.format(name)

    @refused
    def test_what_is_no_path_is_refused(self, text, message):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            as_path(text)
        assert message in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1

    @pytest.mark.parametrize(
        ("text", "expected"),
        [("~", "{}"), ("~/", "{}/"), ("~/a b/[1]", "{}/a b/[1]"), ("~/$5", "{}/$5"),
         ("./~", "./~"), ("a/~/b", "a/~/b")],
    )  # fmt: skip
    def test_tilde_is_the_home_directory_at_the_beginning(self, home, text, expected):
        assert as_path(text) == expected.format(home)

    @pytest.mark.parametrize("name", ["$RUNS", "a${b}", "~nobody-of-that-name"])
    def test_what_is_there_by_just_that_name_is_meant(self, home, name):
        Path(name).mkdir()
        assert as_path(name) == name


class TestSettings:
    PATHS = ("output_dir", "init_from", "data.store", "data.tokenizer.model")

    @pytest.fixture
    def config(self, home) -> Path:
        path = home.parent / "run.yaml"
        path.write_text(json.dumps(TREE))
        return path

    @pytest.mark.parametrize("setting", PATHS)
    def test_tilde_is_the_home_directory(self, home, config, setting):
        found = load(config, [f"{setting}=~/a [1]"])
        for name in setting.split("."):
            found = getattr(found, name)
        assert found == f"{home}/a [1]"

    @odd_names
    def test_names_stay_as_they_are(self, config, name):
        found = load(config, [f"output_dir={json.dumps(name)}"])
        assert found.output_dir == name

    @refused
    def test_what_is_no_path_is_refused(self, config, text, message):
        config.write_text(json.dumps({**TREE, "output_dir": text}))
        with pytest.raises(UserError) as caught:
            load(config)
        # Half a character is in no YAML, before it is in no path.
        assert (message if "\udce9" not in text else "half a character") in str(caught.value)

    @pytest.mark.parametrize("setting", PATHS)
    def test_the_setting_is_named(self, config, setting):
        with pytest.raises(UserError, match=rf"{setting}: \$RUNS/a: variables are not"):
            load(config, [f"{setting}=$RUNS/a"])

    def test_stores_of_a_mixture_are_paths(self, home, config):
        mixture = "data={tokenizer: {kind: bytes}, mixture: {a: {store: %s}}}"
        assert load(config, [mixture % "~/a"]).data.corpora["a"].store == f"{home}/a"
        with pytest.raises(UserError, match=r"data\.mixture\.a\.store: \$A/b: variables"):
            load(config, [mixture % "$A/b"])


def matched(*patterns: str) -> list[str]:
    corpus = Corpus(DataConfig(source="files", files=list(patterns), store=""))
    return [document.name for document in corpus]


class TestPatterns:
    @odd_names
    def test_file_of_just_that_name_is_meant(self, home, name):
        for path in (name, "a.txt", "layers=1", "layers=2"):
            Path(path).mkdir()
            (Path(path) / "b").write_text("text")
        assert matched(f"{name}/b") == [f"{name}/b"]
        assert matched(f"{name}/*") == [f"{name}/b"]

    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [("*.txt", ["a.txt", "b.txt"]), ("[a].txt", ["a.txt"]), ("?.txt", ["a.txt", "b.txt"]),
         ("~/*.txt", ["~/c.txt"]), ("~/c.txt", ["~/c.txt"]), ("**/c.txt", ["d/c.txt"]),
         ("d/../a.txt", ["d/../a.txt"]), ("link", ["link"]), ("[$]A.txt", ["$A.txt"]),
         ("$A.txt", ["$A.txt"])],
    )  # fmt: skip
    def test_patterns_find_what_they_did(self, home, pattern, expected):
        Path("d").mkdir()
        for path in ("a.txt", "b.txt", "d/c.txt", "$A.txt", home / "c.txt"):
            Path(path).write_text("text")
        Path("link").symlink_to("a.txt")
        if pattern in ("*.txt", "?.txt"):
            Path("$A.txt").unlink()
        assert matched(pattern) == [os.path.expanduser(name) for name in expected]

    @refused
    def test_what_is_no_path_is_refused(self, home, text, message):
        with pytest.raises(UserError) as caught:
            matched(text)
        assert str(caught.value).startswith("data.files ")
        assert message in str(caught.value)

    @pytest.mark.parametrize("name", [b"caf\xe9.txt", b"a\nb.txt"])
    def test_found_name_that_cannot_be_told_is_refused(self, home, name):
        Path(os.fsdecode(name)).write_text("text")
        with pytest.raises(UserError, match=r"has a line break .* or is not UTF-8"):
            matched("*.txt")

    def test_empty_name_is_no_file(self, home):
        with pytest.raises(UserError, match=r"^data\.files '': no such file$"):
            matched("")


class TestDatasets:
    @pytest.mark.parametrize("name", [*ODD.values(), "~"], ids=[*ODD, "home"])
    def test_directory_is_read_or_refused(self, home, name):
        place = home if name == "~" else Path.cwd() / name
        place.mkdir(exist_ok=True)
        (place / "train.jsonl").write_text('{"text": "of a dataset"}\n')
        corpus = Corpus(DataConfig(source="huggingface", dataset=str(name), store=""))
        if glob.escape(name) == name:
            assert [document.text for document in corpus] == ["of a dataset"]
        else:
            with pytest.raises(UserError, match=r"has one of \[, \* and \?"):
                list(corpus)


@odd_names
def test_store_may_have_any_name(home, name):
    Path(name).mkdir()
    (Path(name) / "a.txt").write_text("some text")
    data = DataConfig(
        source="files", files=[f"{name}/a.txt"], store=f"{name}/store", held_out_fraction=0.0,
        tokenizer=TokenizerConfig(kind="bytes"),
    )  # fmt: skip
    prepare(data, workers=1)
    assert Store.open(data.store, data).manifest["splits"]["train"]["documents"] == 1
    assert sorted(path.name for path in Path(name).iterdir()) == ["a.txt", "store"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("paths") / "run"
    write_checkpoint(tiny_config(folder))
    return folder


@odd_names
def test_run_may_have_any_name(home, run, name, capsys):
    """Its own directory is a link here, so that it need not be written each time."""
    Path(name).symlink_to(run)
    place = f"./{name}"
    assert cli.main(["inspect", place, f"--json={name}.json"]) == 0
    assert Path(f"{name}.json").is_file()
    assert cli.main(["convert", "to-safetensors", place, f"export{name}"]) == 0
    assert cli.main(["memorize", f"export{name}", f"./{name}.json", f"-o{name}.memory"]) == 0
    assert sorted(os.listdir()) == sorted([name, f"{name}.json", f"export{name}", f"{name}.memory"])


@odd_names
def test_checkpoint_is_found_by_patterns_and_by_its_path(home, name):
    """As DeepSpeed looks for its files."""
    Path(name, "step_1").mkdir(parents=True)
    Path(name, "step_1", "layer_00-model_states.pt").touch()
    with plain_path(Path(name)) as folder:
        (found,) = glob.glob(f"{folder}/step_1/layer_00*")
        assert os.path.samefile(found, Path(name, "step_1", "layer_00-model_states.pt"))
        assert os.path.exists(f"{folder}/step_1/layer_00-model_states.pt")


ARGUMENTS = {
    "prepare": (["prepare", "{}"], "config"),
    "pretrain": (["pretrain", "{}", "train.steps=1"], "config"),
    "config": (["config", "{}"], "config"),
    "plan": (["plan", "{}", "--processes", "2"], "config"),
    "plan_json": (["plan", "run.yaml", "--processes", "2", "--json", "{}"], "--json"),
    "preflight": (["preflight", "run.yaml", "--hostfile", "{}"], "--hostfile"),
    "status": (["status", "{}"], "directory"),
    "passkey": (["passkey", "{}"], "directory"),
    "passkey_plot": (["passkey", "run", "--plot", "{}"], "--plot"),
    "babilong": (["babilong", "{}"], "directory"),
    "babilong_plot": (["babilong", "run", "--plot", "{}"], "--plot"),
    "generate": (["generate", "{}", "--prompt", "a"], "directory"),
    "generate_file": (["generate", "run", "--prompt-file", "{}"], "--prompt-file"),
    "generate_memory": (["generate", "run", "--prompt", "a", "--memory", "{}"], "--memory"),
    "memorize": (["memorize", "run", "{}", "-o", "memory"], "document"),
    "memorize_output": (["memorize", "run", "document", "-o", "{}"], "--output"),
    "evaluate": (["evaluate", "run", "--documents", "a.txt", "{}"], "--documents"),
    "inspect": (["inspect", "{}"], "path"),
    "inspect_diff": (["inspect", "run", "--diff", "{}"], "--diff"),
    "convert_source": (["convert", "to-hf", "{}", "hf"], "source"),
    "convert_destination": (["convert", "from-llama", "llama", "{}"], "destination"),
    "reshard": (["convert", "reshard", "{}"], "directory"),
    "bench": (["bench", "peer", "--json", "{}"], "--json"),
    "quality": (["bench", "quality", "run.yaml", "--plot", "{}"], "--plot"),
}


@pytest.mark.parametrize(("arguments", "name"), ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty, and must name a file or directory"), REFUSED["variable"], REFUSED["tab"],
     REFUSED["not_utf8"], REFUSED["user"]],
    ids=["empty", "variable", "tab", "not_utf8", "user"],
)  # fmt: skip
def test_argument_that_is_no_path_is_refused(home, capsys, arguments, name, text, message):
    assert cli.main([argument.replace("{}", text) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"infini-ds: {name}: ")
    assert message in line
    assert os.listdir() == []


def test_argument_may_begin_with_the_home_directory(home, run, capsys):
    assert cli.main(["inspect", str(run), "--json=~/told [1].json"]) == 0
    assert (home / "told [1].json").is_file()
    assert os.listdir() == []


def test_tokenizer_may_begin_with_the_home_directory(home, capsys):
    Path("a.txt").write_text("".join(f"some text of number {n}\n" for n in range(2000)))
    assert train_tokenizer.main(["~/models/a.model", "320", "a.txt"]) == 0
    assert (home / "models" / "a.model").is_file()
    assert train_tokenizer.main(["$MODELS/a.model", "320", "a.txt"]) == 2
    assert "variables are not filled in" in capsys.readouterr().err
    assert os.listdir() == ["a.txt"]


def test_paths_of_a_run_s_own_config_are_not_looked_for_again(tmp_path, monkeypatch):
    made = tmp_path / "made"
    (made / "$stores").mkdir(parents=True)
    monkeypatch.chdir(made)
    text = dump(load(QUICKSTART, ["data.store=$stores"]))
    own = tmp_path / "config.yaml"
    own.write_text(text)
    monkeypatch.chdir(tmp_path)
    assert load_resolved(own).data.store == "$stores"
    with pytest.raises(UserError, match="variables are not filled in"):
        load(own)
