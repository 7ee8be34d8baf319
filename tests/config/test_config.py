import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from infini_ds import config as configuration
from infini_ds.config import ModelConfig, dump, load, parse
from infini_ds.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

TREE = {
    "output_dir": "runs/test",
    "model": {"hidden_size": 64, "num_layers": 4, "num_heads": 2},
    "data": {"store": "stores/test"},
    "train": {"steps": 10, "batch_size": 8},
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def message_of(file, *overrides) -> str:
    with pytest.raises(UserError) as caught:
        load(file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


BOOKS = {"source": "files", "files": ["books/*.txt"], "store": "stores/books", "weight": 3}
CODE = {"store": "stores/code"}


def mixture_tree(**data):
    mixture = {"books": BOOKS, "code": CODE}
    return TREE | {"data": {"tokenizer": {"kind": "bytes"}, "mixture": mixture} | data}


class TestMixture:
    def test_corpora_are_those_of_the_mixture_with_one_tokenizer(self):
        data = parse(mixture_tree(), "of a test").data
        assert [*data.corpora] == ["books", "code"]
        assert data.corpora["books"].files == ["books/*.txt"]
        assert data.corpora["code"].source == "python-stdlib"
        assert {corpus.tokenizer.kind for corpus in data.corpora.values()} == {"bytes"}
        assert [data.mixture[name].weight for name in data.corpora] == [3, 1]

    def test_without_one_the_data_is_one_corpus_without_a_name(self):
        data = parse(TREE, "of a test").data
        assert data.corpora == {"": data}

    def test_weights_are_in_the_order_of_the_corpora(self):
        data = parse(mixture_tree(mixture={"b": CODE, "a": BOOKS}), "of a test").data
        assert [corpus.source for corpus in data.corpora.values()] == ["files", "python-stdlib"]
        assert [*data.weights.items()] == [("a", 3), ("b", 1)]
        assert parse(TREE, "of a test").data.weights == {}

    @pytest.mark.parametrize("tree", [TREE, mixture_tree()], ids=["one", "mixture"])
    def test_settings_of_each_corpus_can_be_replaced(self, tree):
        data = parse(tree, "of a test").data
        moved = data.with_corpora(lambda corpus: {"store": f"moved/{corpus.store}"})
        for name, corpus in data.corpora.items():
            assert moved.corpora[name].store == f"moved/{corpus.store}"
        assert moved.weights == data.weights

    def test_only_the_config_knows_how_corpora_are_written(self):
        """Everything else reads `data.corpora`, whether there is one or a mixture."""
        package = Path(configuration.__file__).parents[1]
        files = (file for file in package.rglob("*.py") if file.parent.name != "config")
        for file in files:
            nodes = ast.walk(ast.parse(file.read_text()))
            assert "mixture" not in (node.attr for node in nodes if isinstance(node, ast.Attribute))

    def test_weights_are_overridden_by_their_path(self, tmp_path):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(mixture_tree()))
        config = load(path, ["data.mixture.code.weight=0.5"])
        assert config.data.mixture["code"].weight == 0.5
        path.write_text(dump(config))
        assert load(path) == config

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({"store": "stores/all"}, "data: store must be given to each corpus of mixture"),
            ({"files": ["a.txt"]}, "data: files must be given to each corpus of mixture"),
            ({"tokenizer": {}}, "data: tokenizer.model must name a model for the corpora"),
            ({"mixture": {"a b": CODE}}, "data: mixture: name 'a b' must be of letters"),
            ({"mixture": {"a": {}}}, "data: mixture.a.store must name a directory of its own"),
            (
                {"mixture": {"a": CODE, "b": CODE}},
                "data: mixture.b.store must name a directory of its own",
            ),
            ({"mixture": {"a": CODE | {"weight": 0.0}}}, "data.mixture.a: weight (0.0) must be"),
            ({"mixture": {"a": CODE | {"wait": 2}}}, "unknown setting data.mixture.a.wait; did"),
            (
                {"mixture": {"passkey": CODE | {"wait": 2}}},
                "unknown setting data.mixture.passkey.wait; did you mean weight?",
            ),
            (
                {"mixture": {"a": CODE | {"passkey": {"digits": 0}}}},
                "data.mixture.a.passkey: digits (0) must be at least 1",
            ),
            ({"mixture": {"a": CODE | {"source": "files"}}}, "data.mixture.a: files must name"),
            (
                {
                    "mixture": {"a": CODE | {"source": "passkey"}},
                    "tokenizer": {"kind": "tokenizers", "model": "a.json"},
                },
                "data: mixture.a: tokenizer.kind must be bytes when source is passkey",
            ),
            (
                {"mixture": {"a": CODE | {"source": "passkey", "passkey": {"segment_length": 9}}}},
                "data.passkey.segment_length (9) must be model.segment_length (2048)",
            ),
        ],
    )
    def test_refuses(self, data, message):
        with pytest.raises(UserError, match=re.escape(message)):
            parse(mixture_tree(**data), "of a test")

    def test_refuses_a_curriculum(self):
        tree = mixture_tree()
        tree["train"] = tree["train"] | {"window_segments": 16, "curriculum": {}}
        with pytest.raises(UserError, match=r"train\.curriculum must be left out"):
            parse(tree, "of a test")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
class TestShippedConfig:
    def test_loads(self, path):
        assert load(path).train.steps > 0

    def test_can_run_on_as_few_processes_as_it_says(self, path):
        config = load(path)
        stages = config.parallel.pipeline_stages
        context = config.parallel.context_parallel
        world = context * (1 if stages == "auto" else stages)
        assert config.data_parallel_size(world) == context

    def test_says_what_it_is_for(self, path):
        assert path.read_text().startswith("# ")


def test_the_required_configs_are_shipped():
    names = {path.stem for path in CONFIGS}
    large = {"infini_150m", "infini_paper", "infini_1b", "infini_70b"}
    large |= {"llama3_8b_continual", "llama3_8b_zero3"}
    assert {"quickstart", "enwik8", "pg19", *large} <= names


def test_infini_paper_has_the_paper_s_sizes():
    (path,) = (path for path in CONFIGS if path.stem == "infini_paper")
    config = load(path)
    model = config.model
    sizes = (model.num_layers, model.num_heads, model.head_dim, model.hidden_size)
    assert sizes == (12, 8, 128, 1024)
    assert (model.mlp_size, model.segment_length) == (4096, 2048)
    assert config.train.window_segments == 16


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "unknown setting train.stepz; did you mean steps?"),
        ("modle.hidden_size=3", "unknown setting modle; did you mean model?"),
        ("model.rope_scaling.factr=2.0", "unknown setting model.rope_scaling.factr; did you mean"),
        ("train.qqqqqq=3", "unknown setting train.qqqqqq; known: steps, batch_size"),
        ("train.steps=many", "train.steps: input should be a valid integer, got 'many'"),
        ("train.steps=1.5", "train.steps: input should be a valid integer, got 1.5"),
        ("train.steps=true", "train.steps: input should be a valid integer, got True"),
        ("train.steps=", "train.steps: input should be a valid integer, got None"),
        ("train.dtype=fp16", "train.dtype: input should be 'auto', 'bf16' or 'fp32', got 'fp16'"),
        ("train=3", "train: input should be a valid dictionary"),
        ("train.steps=0", "train: steps (0) must be at least 1"),
        ("train.batch_size=-1", "train: batch_size (-1) must be at least 1"),
        ("train.chunks=2", "train: window_segments (1) must be a multiple of chunks (2)"),
        ("train.micro_batch_size=3", "train: batch_size (8) must be a multiple of micro_batch"),
        ("train.timeout=0", "train: timeout (0.0) must be above 0 seconds"),
        ("train.hang_timeout=0", "hang_timeout (0.0) must be above 0 and below timeout (600.0)"),
        ("train.hang_timeout=600", "hang_timeout (600.0) must be above 0 and below timeout"),
        ("train.on_bad_step=ask", "input should be 'skip', 'stop' or 'rollback', got 'ask'"),
        ("model.num_kv_heads=3", "num_heads (2) must be a multiple of num_kv_heads (3)"),
        ("model.head_dim=7", "model: head_dim (7) must be even"),
        ("model.memory.write_gat=true", "unknown setting model.memory.write_gat; did you mean"),
        ("model.memory.write_penalty=-1", "model.memory: write_penalty (-1.0) must be at least 0"),
        (
            "model.memory.write_gate_sees_keys=true",
            "model.memory: write_gate_sees_keys (true) must be false when write_gate is false",
        ),
        (
            "model.memory.write_penalty=0.1",
            "model.memory: write_penalty (0.1) must be 0 when write_gate is false",
        ),
        ("model.memory_rule=deltas", "model.memory_rule: input should be 'linear', 'delta'"),
        ("optimizer.learning_rate=0", "optimizer: learning_rate (0.0) must be above 0"),
        ("parallel.zero_stage=4", "parallel.zero_stage: input should be 0, 1, 2 or 3, got 4"),
        ("parallel.pipeline_stages=0", "pipeline_stages (0) must be at least 1"),
        ("parallel.pipeline_stages=a", "parallel.pipeline_stages: input should be a valid integer"),
        ("data.source=files", "data: files must name at least one path"),
        ("data.held_out_fraction=1", "data: held_out_fraction (1.0) must be in [0, 1)"),
        ("data.weighted_field=x", "data: weighted_field must be empty unless source is files or"),
        ("data.messages_field=x", "data: messages_field must be empty unless source is files or"),
        (
            "data.tokenizer.chat_template=x",
            "data.tokenizer: model must name a tokenizer.model when chat_template is given",
        ),
        ("data.source=passkey", "data: tokenizer.kind must be bytes when source is passkey"),
        ("data.babilong.tasks=[]", "data.babilong: tasks ([]) must be at least one, each of them"),
        ("data.babilong.tasks=[qa1, qa1]", "tasks (['qa1', 'qa1']) must be at least one, each of"),
        ("data.babilong.tasks=[qa4]", "tasks.0: input should be 'qa1', 'qa2', 'qa3' or 'qa8'"),
        ("data.babilong.max_facts=2", "max_facts (2) must be at least min_facts (1), and 3 for"),
        ("data.babilong.min_facts=9", "max_facts (8) must be at least min_facts (9), and 3 for"),
        ("data.babilong.min_facts=0", "data.babilong: min_facts (0) must be at least 1"),
        ("data.babilong.segments=[4, 2]", "segments ([4, 2]) must be growing numbers of at least"),
        ("data.passkey.filler=real", "passkey.filler: input should be 'standard', 'noise' or"),
        ("data.passkey.digits=0", "data.passkey: digits (0) must be at least 1"),
        ("data.passkey.segments=[]", "data.passkey: segments ([]) must be growing numbers of at"),
        ("data.passkey.segments=[1, 2]", "segments ([1, 2]) must be growing numbers of at least 2"),
        ("data.passkey.segments=[4, 2]", "segments ([4, 2]) must be growing numbers of at least 2"),
        ("data.passkey.segments=[2, 2]", "segments ([2, 2]) must be growing numbers of at least 2"),
        ("data.passkey.keys=0", "data.passkey: keys (0) must be at least 1"),
        ("data.passkey.keys=[]", "data.passkey: keys ([]) must be growing numbers of at least 1"),
        ("data.passkey.keys=[2, 2]", "keys ([2, 2]) must be growing numbers of at least 1"),
        ("data.passkey.keys=[0, 2]", "keys ([0, 2]) must be growing numbers of at least 1"),
        (
            "data.passkey.keys=some",
            "data.passkey.keys: input should be a valid integer, got 'some'",
        ),
        ("data.passkey.queries=0", "data.passkey: queries (0) must be at least 1"),
        ("data.passkey.queries=2", "queries (2) must be at most the fewest keys of a document (1)"),
        ("data.passkey.queries=one", "data.passkey.queries: input should be a valid integer"),
        ("data.passkey.values=0", "data.passkey: values (0) must be at least 1"),
        ("data.passkey.form=list", "data.passkey.form: input should be 'sentence', 'adjacent' or"),
        ("train.curriculum.keys=[4, 2]", "keys ([4, 2]) must be growing numbers of at least 1"),
        ("train.curriculum.segments=[0]", "segments ([0]) must be growing numbers of at least 1"),
        ("train.curriculum.segments=[1, 3]", "of curriculum.segments, is not of 3"),
        ("train.curriculum.advance_at=0", "advance_at (0.0) must be above 0 and at most 1"),
        ("train.curriculum.advance_at=1.1", "advance_at (1.1) must be above 0 and at most 1"),
        ("train.curriculum.window=0", "train.curriculum: window (0) must be at least 1"),
        ("train.curriculum.review=1", "train.curriculum: review (1.0) must be in [0, 1)"),
        (
            "model.segment_length=10000000000",
            "model: segment_length (10000000000) must be from -21",
        ),
        ("data.passkey.segments=[2, 4000000000]", "must be from -2147483647 to 2147483647"),
        ("optimizer.learning_rate=.inf", "learning_rate: input should be a finite number, got inf"),
        ("model.hidden_size=0", "model: hidden_size (0) must be from 1 to 1048576"),
        ("model.head_dim=2000000000", "model: head_dim (2000000000) must be from 1 to 1048576"),
        ("model.gate_init=.nan", "model.gate_init: input should be a finite number, got nan"),
        ("model.rope_theta=0", "model: rope_theta (0.0) must be at least 1"),
        ("model.norm_eps=0", "model: norm_eps (0.0) must be from 1e-30 to 1"),
        ("model.initializer_range=-1", "model: initializer_range (-1.0) must be from 0 to 100"),
        ("model.rope_scaling.factor=0", "model.rope_scaling: factor (0.0) must be above 0"),
        ("model.rope_scaling.low_freq_factor=-1", "low_freq_factor (-1.0) must be above 0"),
        ("model.rope_scaling.high_freq_factor=1", "must be above low_freq_factor (1.0)"),
        ("model.rope_scaling.original_max_position_embeddings=0", "embeddings (0) must be above 0"),
        ("optimizer.eps=0", "optimizer: eps (0.0) must be from 1e-30 to 1"),
        ("optimizer.eps=1e-60", "optimizer: eps (1e-60) must be from 1e-30 to 1"),
        ("optimizer.weight_decay=-1", "optimizer: weight_decay (-1.0) must be at least 0"),
        ("optimizer.gate_learning_rate_multiplier=-1", "multiplier (-1.0) must be at least 0"),
        ("optimizer.gradient_clipping=-1", "gradient_clipping (-1.0) must be at least 0"),
        ("optimizer.beta1=1", "optimizer: beta1 (1.0) must be in [0, 1)"),
        ("optimizer.beta2=-0.1", "optimizer: beta2 (-0.1) must be in [0, 1)"),
        ("train.timeout=1e6", "timeout (1000000.0) must be above 0 seconds and at most 604800"),
        ("train.threads=100000", "train: threads (100000) must be from 0 to 1024"),
        ("data.passkey.digits=2048", "digits (2048) must be below segment_length (2048)"),
        ("data.tokenizer.vocab_size=2000000", "vocab_size (2000000) must be from 320 (256 are"),
        ("train.steps=1e300", "train.steps: input should be a valid integer, got 1e+300"),
        ("train.steps=1e15", "train: steps (1000000000000000) must be from -2147483647 to"),
        ("data.files=", "data.files: input should be a valid list, got None"),
        ("data.text_field=3", "data.text_field: input should be a valid string, got 3"),
        ("output_dir=", "output_dir must name a directory"),
        ("data.store=", "data.store must name the directory of the token store"),
        ("a\nb=1", "unknown setting a b; known: "),
        ("train.steps", "override 'train.steps': must look like key.path=value"),
        ("=3", "override '=3': must look like key.path=value"),
        ("output_dir.x=3", "override 'output_dir.x=3': output_dir is a value, not a section"),
        ("train.steps=[", "override 'train.steps=[': "),
        ("seed=2020-13-45", "seed: input should be a valid integer, got '2020-13-45'"),
        ("seed=0b_", "override 'seed=0b_': '0b_' is not of type int"),
        (r'init_from="a\0b"', r"'a\x00b' has a NUL"),
    ],
    ids=lambda value: value if "=" in value else "",
)
def test_load_names_what_is_wrong_with(file, override, message):
    assert message in message_of(file, override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("a: [", "not valid YAML", id="broken_yaml"),
        pytest.param("- 1", "must be a mapping of settings, is list", id="a_list"),
        pytest.param("", "must be a mapping of settings, is NoneType", id="empty"),
        pytest.param(
            "output_dir: x\noutput_dir: y\n", "'output_dir' is given twice", id="repeated"
        ),
        pytest.param("output_dir: x\n", "model is required", id="missing_section"),
    ],
)
def test_load_names_what_is_wrong_with_a_file(file, content, message):
    file.write_text(content)
    found = message_of(file)
    assert message in found
    assert str(file) in found


def test_load_names_a_file_that_is_missing(tmp_path):
    path = tmp_path / "none.yaml"
    assert message_of(path) == f"config {path}: cannot be read (No such file or directory)"


def test_load_names_a_file_that_is_not_text(file):
    file.write_bytes(b"\xff\xfe\x00")
    assert f"config {file}: not valid YAML" in message_of(file)


def test_overrides_replace_values_and_make_sections(file):
    config = load(file, ["train.steps=20", "optimizer.learning_rate=3e-4", "seed=7"])
    assert (config.train.steps, config.optimizer.learning_rate, config.seed) == (20, 3e-4, 7)
    assert config.train.batch_size == 8


def test_overrides_are_yaml(file):
    config = load(
        file, ["data.source=files", "data.files=[a.txt, b.txt]", "model.rope_scaling=null"]
    )
    assert config.data.files == ["a.txt", "b.txt"]
    assert config.model.rope_scaling is None


@pytest.mark.parametrize(
    ("override", "value"),
    [("weighted_field=", ""), ("files=a b.txt", ["a b.txt"]), ("max_documents=1e6", 1000000)],
)
def test_values_are_taken_as_they_are_plainly_meant(file, override, value):
    data = load(file, [f"data.{override}"]).data
    found = getattr(data, override.partition("=")[0])
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["yes", "on", "Yes", "ON", "true"])
def test_switches_may_be_spoken(file, text):
    assert load(file, [f"parallel.offload_optimizer={text}"]).parallel.offload_optimizer is True


@pytest.mark.parametrize("text", ["no", "off", "No", "OFF", "False"])
def test_switches_may_be_spoken_the_other_way(file, text):
    assert load(file, [f"resume={text}"]).resume is False


@pytest.mark.parametrize(("text", "taps"), [("true", 4), ("false", 0), ("8", 8), ("0", 0)])
def test_earlier_configs_say_whether_there_is_a_convolution(file, text, taps):
    found = load(file, [f"model.memory.short_conv={text}"]).model.memory.short_conv
    assert (found, type(found)) == (taps, int)


@pytest.mark.parametrize("text", ["no", "on", "yes", "1:30", "'1e6'", "'~'", "'010'"])
def test_text_that_looks_like_something_else_stays_text(file, tmp_path, text):
    """Such as the Norwegian part of a dataset; also when it is written and read again."""
    config = load(file, [f"data.dataset_config={text}"])
    assert config.data.dataset_config == text.strip("'")
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    "section", ["optimizer", "evaluation", "model.memory", "data.passkey", "data.babilong"]
)
def test_section_without_settings_has_the_defaults(file, section):
    key = section.split(".")[0]
    assert load(file, [f"{section}="]) == load(file, [f"{section}={{}}"])
    assert load(file, [f"{section}=~"]) == load(file)
    assert getattr(load(file, [f"{section}="]), key)


def test_override_of_a_section_that_is_empty_in_the_file(file):
    file.write_text(file.read_text() + "optimizer:\n  # learning_rate: 1e-3\n")
    assert load(file, ["optimizer.warmup_steps=5"]).optimizer.warmup_steps == 5


def test_override_changes_only_one_of_two_corpora_that_are_written_once(file):
    file.write_text(
        yaml.safe_dump({k: v for k, v in TREE.items() if k != "data"})
        + "data:\n  tokenizer: {kind: bytes}\n  mixture:\n"
        "    a: &a {store: stores/a, passkey: {digits: 4}}\n    b: *a\n    c: {<<: *a, store: c}\n"
    )
    changed = ["data.mixture.b.store=stores/b", "data.mixture.c.passkey.digits=6"]
    corpora = load(file, changed).data.corpora
    assert [corpora[name].store for name in "abc"] == ["stores/a", "stores/b", "c"]
    assert [corpora[name].passkey.digits for name in "abc"] == [4, 4, 6]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_file_may_say_its_encoding(file, encoding):
    text = file.read_text().replace("runs/test", "runs/Länge")
    file.write_bytes(text.replace("\n", "\r\n").encode(encoding))
    assert load(file).output_dir == "runs/Länge"


def test_messages_need_a_tokenizer_and_are_no_weighted_pieces(file):
    messages = ["data.source=files", "data.files=[a.jsonl]", "data.messages_field=messages"]
    bytes_ = "data.tokenizer.kind=bytes"
    message = "data: messages_field must be empty when weighted_field is given"
    assert message in message_of(file, *messages, bytes_, "data.weighted_field=turns")
    message = "data: tokenizer.model must name a model when messages_field is given"
    assert message in message_of(file, *messages, "data.tokenizer.kind=sentencepiece")
    assert load(file, [*messages, bytes_]).data.weighted


def test_passkey_documents_have_the_segments_of_the_model(file):
    passkey = ["data.source=passkey", "data.tokenizer.kind=bytes", "model.segment_length=128"]
    message = "data.passkey.segment_length (2048) must be model.segment_length (128)"
    assert message in message_of(file, *passkey)
    config = load(file, [*passkey, "data.passkey.segment_length=128"])
    assert config.data.weighted


def test_curriculum_of_keys_is_of_those_that_documents_have(file):
    passkey = [
        "data.source=passkey", "data.tokenizer.kind=bytes", "model.segment_length=128",
        "data.passkey.segment_length=128", "train.window_segments=16",
        "train.curriculum.keys=[2, 4]",
    ]  # fmt: skip
    message = "train.curriculum.keys ([2, 4]) must be left out unless data.source is passkey and"
    for keys in ("4", "[2]", "[2, 3]"):
        assert message in message_of(file, *passkey, f"data.passkey.keys={keys}")
    assert message in message_of(file, *passkey[-2:])
    config = load(file, [*passkey, "data.passkey.keys=[1, 2, 4]"])
    assert config.train.curriculum
    assert config.train.curriculum.keys == [2, 4]
    assert config.data.passkey.key_counts == [1, 2, 4]


def test_documents_of_facts_have_the_segments_of_the_model(file):
    babilong = ["data.source=babilong", "data.tokenizer.kind=bytes", "model.segment_length=128"]
    message = "data.babilong.segment_length (2048) must be model.segment_length (128)"
    assert message in message_of(file, *babilong)
    config = load(file, [*babilong, "data.babilong.segment_length=128"])
    assert config.data.weighted
    assert config.data.made == config.data.babilong


def test_triton_kernels_compute_some_rules_alone(file):
    rule = "model.memory_rule=gated_delta_dpfp"
    assert load(file, [rule]).model.memory_rule == "gated_delta_dpfp"
    message = "kernels.backend (triton) must be auto or torch with model.memory_rule gated_delta_d"
    assert message in message_of(file, rule, "kernels.backend=triton")
    sliding = ["model.use_sliding_window=true", "kernels.backend=triton"]
    assert load(file, sliding).model.use_sliding_window


def test_blocks_of_which_a_part_is_trained_are_not_compiled(file):
    compiled = "train.compile=true"
    assert load(file, [compiled]).train.compile
    message = "train.compile (true) must be false with optimizer.train"
    assert message in message_of(file, compiled, "optimizer.train=['*.beta']")


def test_muon_is_not_offloaded(file):
    muon = "optimizer.name=muon"
    assert load(file, [muon]).optimizer.name == "muon"
    message = "optimizer.name (muon) must be adamw with parallel.offload_optimizer"
    assert message in message_of(file, muon, "parallel.offload_optimizer=true")


def test_zero_2_and_3_have_one_stage_and_adamw(file):
    config = load(file, ["parallel.zero_stage=3", "parallel.pipeline_stages=auto"])
    assert config.parallel.resolve_stages(4, num_layers=4) == 1
    assert config.data_parallel_size(4) == 4
    zero = "parallel.zero_stage=2"
    for change, message in (
        ("parallel.pipeline_stages=2", "zero_stage (2) must be 0 or 1 with pipeline_stages (2)"),
        ("optimizer.name=muon", "optimizer.name (muon) must be adamw with parallel.zero_stage 2"),
    ):
        assert message in message_of(file, zero, change)
    offloaded = "parallel.offload_optimizer=true"
    assert load(file, [zero, offloaded]).parallel.offload_optimizer
    assert "zero_stage (0) must be at least 1" in message_of(
        file, "parallel.zero_stage=0", offloaded
    )
    weights = "parallel.offload_weights=true"
    assert load(file, ["parallel.zero_stage=3", offloaded, weights]).parallel.offload_weights
    assert "zero_stage (2) must be 3 with offload_w" in message_of(file, zero, offloaded, weights)
    message = message_of(file, "parallel.zero_stage=3", weights)
    assert "offload_optimizer must be true with offload_weights" in message
    message = message_of(file, "parallel.nvme_path=/scratch")
    assert "offload_weights must be true with nvme_path" in message


def test_curriculum_is_off_until_a_setting_of_it_is_given(file, tmp_path):
    assert load(file).train.curriculum is None
    config = load(file, ["train.window_segments=16", "train.curriculum={}"])
    assert config.train.curriculum
    assert config.train.curriculum.segments == [2, 4, 8, 16]
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load(tmp_path / "again.yaml") == config


def test_overrides_later_ones_win(file):
    assert load(file, ["train.steps=20", "train.steps=30"]).train.steps == 30


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "3.0e-4", "0.0003", "+3e-04"])
def test_numbers_are_read_as_people_write_them(file, text):
    assert load(file, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == 3e-4


def test_dump_reads_back_as_the_same_config(file, tmp_path):
    config = load(file, ["model.rope_scaling.factor=8.0"])
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load(again) == config


def test_values_out_of_range_are_told_in_python_too():
    with pytest.raises(ValidationError, match=r"hidden_size \(0\) must be from 1 to 1048576"):
        ModelConfig(hidden_size=0, num_layers=1, num_heads=1)


def test_settings_cannot_be_changed_later(file):
    with pytest.raises(Exception, match="frozen"):
        load(file).train.steps = 3


@pytest.mark.parametrize(
    ("stages", "world", "expected"),
    [("auto", 1, 1), ("auto", 2, 2), ("auto", 3, 3), ("auto", 4, 4), ("auto", 8, 4), ("auto", 6, 3),
     ("auto", 5, 1), (2, 2, 2), (2, 8, 2), (1, 3, 1)],
)  # fmt: skip
def test_resolve_stages(stages, world, expected):
    config = parse({**TREE, "parallel": {"pipeline_stages": stages}}, "of a test")
    assert config.parallel.resolve_stages(world, num_layers=4) == expected


@pytest.mark.parametrize(
    ("stages", "world", "message"),
    [
        (2, 3, "parallel.pipeline_stages (2) must divide the number of processes (3)"),
        (5, 5, "parallel.pipeline_stages (5) must not exceed model.num_layers (4)"),
        (1, 3, "train.batch_size (8) must be a multiple of train.micro_batch_size (1) x"),
    ],
)
def test_processes_that_do_not_fit_are_told(stages, world, message):
    config = parse({**TREE, "parallel": {"pipeline_stages": stages}}, "of a test")
    with pytest.raises(UserError) as caught:
        config.data_parallel_size(world)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("context", "stages", "world", "expected"),
    [(2, "auto", 2, 1), (2, "auto", 4, 2), (4, "auto", 16, 4), (4, "auto", 12, 3), (2, 2, 8, 2)],
)
def test_stages_leave_room_for_ranks_that_share_windows(context, stages, world, expected):
    parallel = {"pipeline_stages": stages, "context_parallel": context}
    train = {**TREE["train"], "window_segments": 4}
    config = parse({**TREE, "train": train, "parallel": parallel}, "of a test")
    assert config.parallel.resolve_stages(world, num_layers=4) == expected
    assert config.data_parallel_size(world) == world // expected


@pytest.mark.parametrize(
    ("context", "stages", "world", "message"),
    [
        (2, "auto", 3, "parallel.context_parallel (2) must divide the number of processes (3); "
         "start 2 or 4, or lower it"),
        (4, "auto", 2, "parallel.context_parallel (4) must divide the number of processes (2); "
         "start 4, or lower it"),
        (2, 4, 6, "parallel.pipeline_stages (4) must divide the number of processes (6)"),
        (2, 4, 4, "parallel.pipeline_stages (4) x parallel.context_parallel (2) must divide the "
         "number of processes (4); start 8, or lower one of them"),
        (2, 1, 6, "train.batch_size (8) must be a multiple of train.micro_batch_size (1) x "
         "data-parallel size (6) / parallel.context_parallel (2)"),
        (2, 1, 32, "train.batch_size (8) must be a multiple of train.micro_batch_size (1) x "
         "data-parallel size (32) / parallel.context_parallel (2); there are too many ranks for "
         "its lanes: raise it to 16, or let more ranks share windows (parallel.context_parallel)"),
    ],
)  # fmt: skip
def test_processes_that_cannot_share_windows_are_told(context, stages, world, message):
    parallel = {"pipeline_stages": stages, "context_parallel": context}
    train = {**TREE["train"], "window_segments": 4}
    config = parse({**TREE, "train": train, "parallel": parallel}, "of a test")
    with pytest.raises(UserError) as caught:
        config.data_parallel_size(world)
    assert str(caught.value) == message


def test_segments_of_a_chunk_are_divided_evenly():
    train = {**TREE["train"], "window_segments": 6, "chunks": 2}
    tree = {**TREE, "train": train, "parallel": {"context_parallel": 2}}
    with pytest.raises(UserError) as caught:
        parse(tree, "of a test")
    assert str(caught.value).endswith(
        "parallel.context_parallel (2) must divide the segments of a chunk (3 = "
        "train.window_segments 6 / train.chunks 2); lower it or train.chunks, or raise "
        "train.window_segments"
    )


def test_config_module_needs_neither_torch_nor_deepspeed():
    code = f"import sys, {configuration.__name__}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert configuration.__name__ in modules
    assert not modules & {"torch", "deepspeed", "numpy"}
