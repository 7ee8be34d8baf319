"""A document's memory as a file goes on as the document itself, and only with its model."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from infini_ds import cli
from infini_ds.data.tokenizer_base import ByteTokenizer
from infini_ds.errors import UserError
from infini_ds.generation import generate, memorize
from infini_ds.model.fingerprint import fingerprint
from infini_ds.model.memory import Memory
from infini_ds.model.reading import WINDOW_SEGMENTS, call_width, read_text, read_to_last_call
from infini_ds.system import compute_type
from infini_ds.system.compute_type import of_processor
from infini_ds.system.progress import ReadingProgress
from tests.tiny_run import tiny_config, write_checkpoint

torch.set_num_threads(1)

TEXT = "".join(f"line {number} of the böök\n" for number in range(400))
N = 32
BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`run`, its model as run.model, `other` of the same shape, book.txt and its memory."""
    folder = tmp_path_factory.mktemp("generation")
    write_checkpoint(tiny_config(folder / "run"))
    write_checkpoint(tiny_config(folder / "other"), seed=1)
    (folder / "book.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return write_checkpoint(tiny_config(folder / "model"))


@pytest.fixture(scope="module")
def book(folder):
    path = folder / "book.safetensors"
    arguments = ["memorize", folder / "run", folder / "book.txt", "-o", path]
    assert cli.main(list(map(str, arguments))) == 0
    return path


@pytest.mark.parametrize("sizes", [[5000], [1, N, 3 * N, 4000], [100] * 30])
@pytest.mark.parametrize("begun", [0, 7])
def test_reading_in_pieces_is_reading_at_once(model, sizes, begun):
    drawn = np.random.default_rng(0)
    pieces = [drawn.integers(256, size=size, dtype=np.uint32) for size in sizes]
    before = torch.zeros(1, begun, dtype=torch.int64)
    memory = model.read(before)[1] if begun else None
    told = []
    rows = [torch.from_numpy(piece)[None] for piece in pieces]
    begin = memory
    memory, rest = read_to_last_call(model, iter(rows), begin, call_width(N), told.append)
    assert 0 < rest.shape[1] <= WINDOW_SEGMENTS * N
    assert sum(told) + rest.shape[1] == sum(sizes)
    with torch.no_grad():
        _, memory = model.read(rest, memory)
        whole = torch.from_numpy(np.concatenate(pieces).astype(np.int64))[None]
        _, expected = model.read(torch.cat((before, whole), dim=1))
    assert memory.lengths == expected.lengths
    torch.testing.assert_close(memory.kv, expected.kv, rtol=1e-4, atol=1e-4)
    _, same = read_text(model, iter(rows), begin, call_width(N), told.append)
    assert torch.equal(same.kv, memory.kv)
    assert sum(told) == 2 * sum(sizes) - rest.shape[1]


def written(capsys, *arguments) -> str:
    capsys.readouterr()
    assert cli.main(["generate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_memory_file_goes_on_as_the_document_read_at_once(folder, model, book, capsys):
    prompt = "What is it? " * 60
    out = written(
        capsys, folder / "run", "--memory", book, "--prompt", prompt, "--greedy",
        "--max-new-tokens", 50,
    )  # fmt: skip
    tokens = torch.tensor([[BYTES.bos_id, *BYTES.encode(TEXT + prompt)]])
    ids = model.generate(tokens, 50, temperature=0, stop_token=BYTES.eos_id)[0].tolist()
    assert out == BYTES.decode(ids) + "\n"
    without = written(
        capsys, folder / "run", "--prompt", prompt, "--greedy", "--max-new-tokens", 50
    )
    assert without != out
    (folder / "prompt.txt").write_text(TEXT + prompt)
    arguments = ["--prompt-file", folder / "prompt.txt", "--greedy", "--max-new-tokens", 50]
    assert written(capsys, folder / "run", *arguments) == out


def test_memory_by_a_rule_without_norm_goes_on_as_the_document(folder, capsys):
    path = folder / "gated.safetensors"
    write_checkpoint(tiny_config(folder / "gated", memory_rule="gated_delta"))
    model = write_checkpoint(tiny_config(folder / "gated_model", memory_rule="gated_delta"))
    text = TEXT[:700]
    (folder / "short.txt").write_text(text)
    arguments = ["memorize", folder / "gated", folder / "short.txt", "-o", path]
    assert cli.main(list(map(str, arguments))) == 0
    given = ["--prompt=What?", "--greedy", "--max-new-tokens=40"]
    out = written(capsys, folder / "gated", "--memory", path, *given)
    tokens = torch.tensor([[BYTES.bos_id, *BYTES.encode(text + "What?")]])
    ids = model.generate(tokens, 40, temperature=0, stop_token=BYTES.eos_id)[0].tolist()
    assert out == BYTES.decode(ids) + "\n"

    tensors = Memory.load(path)
    assert tensors.norm.numel() == 0
    tensors.save(path)  # without the model's fingerprint
    assert cli.main(["generate", str(folder / "run"), f"--memory={path}", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        f"memory {path}: memory of rule gated_delta does not fit this model, whose memory_rule is "
        "linear"
    )


def test_seed_decides_what_is_sampled(folder, capsys):
    arguments = [folder / "run", "--prompt=a", "--top-k=50", "--max-new-tokens=20"]
    first, again, other = (written(capsys, *arguments, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other


def test_file_has_the_models_fingerprint_and_the_size_of_any_memory(folder, model, book):
    memory = Memory.load(book, fingerprint=fingerprint(model))
    used = (1 + len(TEXT.encode())) % N
    assert memory.lengths == (used,)
    assert book.stat().st_size < 4 * (memory.kv.numel() + memory.norm.numel()) + 20_000
    assert not list(folder.glob("*.partial"))


@pytest.fixture(scope="module")
def rounded(folder):
    """The model of `run` in bf16."""
    arguments = ["convert", "to-safetensors", folder / "run", folder / "rounded", "--dtype=bf16"]
    assert cli.main(list(map(str, arguments))) == 0
    return folder / "rounded"


@pytest.mark.parametrize("reads", ["avx2", "amx_bf16"])
@pytest.mark.parametrize("memorizes", ["avx2", "amx_bf16"])
def test_memory_of_a_bf16_model_is_its_own_on_every_processor(
    memorizes, reads, folder, rounded, tmp_path, monkeypatch, capsys
):
    def on(flag):
        chosen = of_processor([flag], onednn=True)
        monkeypatch.setattr(compute_type, "fastest_type", lambda device: chosen)
        monkeypatch.setattr(compute_type, "device_at_hand", lambda: torch.device("cpu"))

    on(memorizes)
    file = tmp_path / "book.safetensors"
    arguments = ["memorize", rounded, folder / "book.txt", "-o", file]
    assert cli.main(list(map(str, arguments))) == 0
    computed = {"avx2": torch.float32, "amx_bf16": torch.bfloat16}
    assert Memory.load(file).keys.dtype == computed[memorizes]
    on(reads)
    capsys.readouterr()
    arguments = ["generate", rounded, "--memory", file, "--prompt=a", "--max-new-tokens=4"]
    assert cli.main(list(map(str, arguments))) == 0
    assert ("computes in fp32" in capsys.readouterr().err) == (reads == "avx2")


def mistake(capsys, *arguments) -> str:
    capsys.readouterr()
    assert cli.main(list(map(str, arguments))) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    return line


def test_memory_of_another_model_is_refused(folder, model, book, capsys):
    line = mistake(capsys, "generate", folder / "other", "--memory", book, "--prompt=a")
    assert line.startswith(f"infini-ds: memory {book}: is of another model (fingerprint ")
    assert fingerprint(model)[:12] in line


def test_memory_of_another_shape_without_a_fingerprint_is_refused(folder, model, capsys):
    path = folder / "two.safetensors"
    model(torch.zeros(2, 3, dtype=torch.int64)).memory.save(path)
    line = mistake(capsys, "generate", folder / "run", "--memory", path, "--prompt=a")
    assert f"memory {path}: memory of shape (2, 2, 2, 8, 8)" in line


def test_existing_file_is_replaced_only_when_asked(folder, book, capsys):
    before = book.read_bytes()
    arguments = ["memorize", folder / "run", folder / "short.txt", "-o", book]
    (folder / "short.txt").write_text("short")
    assert mistake(capsys, *arguments).endswith(f"{book}: exists already; --force replaces a file")
    assert book.read_bytes() == before
    assert cli.main([*map(str, arguments), "--force"]) == 0
    assert "memory of 6 tokens" in capsys.readouterr().out
    book.write_bytes(before)


def test_progress_is_of_what_the_model_has_read(folder, monkeypatch):
    told = []
    monkeypatch.setattr(ReadingProgress, "update", lambda _, done, tokens: told.append(done))
    arguments = ["memorize", folder / "run", folder / "book.txt", "-o", folder / "told"]
    assert cli.main(list(map(str, arguments))) == 0
    size, width = len(TEXT.encode()), WINDOW_SEGMENTS * N
    assert told == pytest.approx([*range(width, size, width), size], abs=2)


def test_document_is_not_replaced_by_its_memory(folder, capsys):
    path = folder / "precious.txt"
    path.write_text(TEXT)
    arguments = ["memorize", folder / "run", path, "-o", path, "--force"]
    assert mistake(capsys, *arguments).endswith("precious.txt: is the document itself")
    assert path.read_text() == TEXT


def test_place_that_cannot_be_written_is_told_before_reading(folder, capsys, monkeypatch):
    monkeypatch.setattr(memorize, "read_text", lambda *_: pytest.fail("has read"))
    (folder / "lost").symlink_to(folder / "none" / "a")
    line = mistake(capsys, "memorize", folder / "run", folder / "book.txt", "-o", folder / "lost")
    assert line.endswith("lost: cannot be written (No such file or directory)")


def test_a_chat_begins_as_in_training_and_goes_on_after_a_memory():
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    asked = [*tokenizer.encode("user: é?"), eos, *tokenizer.encode("assistant: ")]
    options = generate.GenerateOptions("é?", None, True, None, 1, 0.0, 1.0, 0, None, "")
    for begins, expected in ((True, [bos, *asked]), (False, asked)):
        tokens, lost = generate._tokens(tokenizer, options, begins)
        assert tokens.tolist() == expected
        assert not lost


def test_a_chat_that_the_template_refuses_is_one_line():
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    options = generate.GenerateOptions("a", None, True, None, 1, 0.0, 1.0, 0, None, "")
    with pytest.raises(UserError, match=r"^--chat: the chat template refuses it \(no users here"):
        generate._tokens(tokenizer, options, True)


def test_prompt_of_any_bytes_is_one_line(folder, capsys):
    line = mistake(capsys, "generate", folder / "run", "--prompt", os.fsdecode(b"caf\xe9"))
    assert line == "infini-ds: --prompt: is not UTF-8"


def test_failed_reading_leaves_the_old_file(folder, book, capsys):
    before = book.read_bytes()
    (folder / "broken.txt").write_bytes(b"x" * 5000 + b"\xff")
    arguments = ["memorize", folder / "run", folder / "broken.txt", "-o", book, "--force"]
    assert "broken.txt: cannot be read (line 1, byte 5,000: 0xff" in mistake(capsys, *arguments)
    assert book.read_bytes() == before


@pytest.fixture(params=["-", "/dev/stdin", "/dev/fd/{}", "named"])
def piped(request, tmp_path):
    """Puts text into a pipe, and the name of its other end."""
    before, ends = os.dup(0), []

    def made(text):
        if request.param == "named":
            path = tmp_path / "pipe"
            os.mkfifo(path)
            # Opening it to write waits until somebody reads.
            threading.Thread(target=path.write_text, args=(text,), daemon=True).start()
            return path
        reading, writing = os.pipe()
        ends.append(reading)
        os.dup2(reading, 0)
        os.write(writing, text.encode())
        os.close(writing)
        return request.param.format(reading)

    yield made
    os.dup2(before, 0)
    for end in (before, *ends):
        os.close(end)


def test_a_document_may_come_through_a_pipe(folder, book, piped, capsys):
    arguments = ["memorize", folder / "run", piped(TEXT), "-o", folder / "piped", "--force"]
    assert cli.main(list(map(str, arguments))) == 0
    memory, expected = Memory.load(folder / "piped"), Memory.load(book)
    assert memory.lengths == expected.lengths
    assert torch.equal(memory.kv, expected.kv)


def test_a_prompt_may_come_through_a_pipe(folder, piped, capsys):
    arguments = [folder / "run", "--greedy", "--max-new-tokens", 20]
    expected = written(capsys, *arguments, "--prompt", "line 1")
    assert written(capsys, *arguments, "--prompt-file", piped("line 1")) == expected


GENERATE = {
    "no_memory_file": (["--memory=none"], "--memory none: no such file"),
    "directory": (["--memory={folder}"], ": must be a regular file"),
    "not_a_memory": (["--memory={folder}/book.txt"], "book.txt: cannot be read"),
    "max_new_tokens": (["--max-new-tokens=0"], "--max-new-tokens (0) is out of range"),
    "temperature": (["--temperature=-1"], "--temperature (-1.0) is out of range"),
    "not_a_temperature": (["--temperature=nan"], "--temperature (nan) is out of range"),
    "top_p": (["--top-p=0"], "--top-p (0.0) is out of range"),
    "top_k": (["--top-k=-1"], "--top-k (-1) is out of range"),
    "seed": (["--seed=-1"], "--seed (-1) is out of range"),
    "step": (["--step=7"], "has no checkpoint of step 7; there are: 9"),
    "nothing": (["--memory={book}", "--prompt="], "prompt: is empty"),
    "chat": (["--chat"], "--chat: the model's tokenizer has no chat template"),
}


@pytest.mark.parametrize("name", GENERATE)
def test_mistake_in_generate_is_one_line_with_code_2(folder, book, capsys, name):
    given, message = GENERATE[name]
    given = [each.format(folder=folder, book=book) for each in given]
    assert message in mistake(capsys, "generate", folder / "run", "--prompt=a", *given)


MEMORIZE = {
    "no_document": (["{folder}/none.txt"], "none.txt: no such file"),
    "no_directory": (["{folder}/book.txt", "-o{folder}/none/a"], "its directory does not exist"),
    "empty": (["{folder}/empty.txt"], "empty.txt: is empty"),
    "directory": (["{folder}"], ": is a directory; name a file"),
    "utf16_without_mark": (["{folder}/utf16.txt"], "looks like UTF-16LE without a byte order mark"),
}


@pytest.mark.parametrize("name", MEMORIZE)
def test_mistake_in_memorize_is_one_line_with_code_2(folder, capsys, name):
    (folder / "empty.txt").touch()
    (folder / "utf16.txt").write_bytes(TEXT.encode("utf-16-le"))
    given, message = MEMORIZE[name]
    given = [each.format(folder=folder) for each in given]
    line = mistake(capsys, "memorize", folder / "run", f"-o{folder}/new.safetensors", *given)
    assert message in line
    assert not (folder / "new.safetensors").exists()


PEAK = """
import sys
from infini_ds.cli import main
assert main(sys.argv[1:]) == 0
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""


def peak_bytes(*arguments) -> int:
    """The most memory that a command has taken."""
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.splitlines()[-1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_times_the_text_takes_no_more_memory(folder):
    peaks = {}
    for size in (50_000, 500_000):
        text = folder / f"{size}.txt"
        text.write_text((TEXT * (size // len(TEXT) + 1))[:size])
        memory = folder / f"{size}.safetensors"
        peaks[size] = peak_bytes("memorize", folder / "run", text, "-o", memory)
    assert peaks[500_000] < peaks[50_000] + 4e6, peaks
