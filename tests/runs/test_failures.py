import json
import multiprocessing

from infini_ds.runs import failures


def test_record_names_rank_host_step_and_message(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    failures.record(tmp_path / "new", 7, "the disk is full")
    (line,) = failures.read(tmp_path / "new")
    assert (line["rank"], line["step"], line["message"]) == (3, 7, "the disk is full")
    assert line["host"]
    assert line["time"].endswith("+00:00")


def write(folder, rank):
    for step in range(50):
        failures.record(folder, step, f"{rank} " + "x" * 3000)


def test_lines_of_ranks_that_write_together_stay_whole(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(tmp_path, rank)) for rank in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = (tmp_path / failures.NAME).read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 4 * 50


def test_read_leaves_out_what_was_cut_off_or_is_not_there(tmp_path):
    assert failures.read(tmp_path) == []
    failures.record(tmp_path, 1, "first")
    with (tmp_path / failures.NAME).open("ab") as file:
        file.write(b'\xff\xfe\n{"time": "2026')
    assert [line["message"] for line in failures.read(tmp_path)] == ["first"]


def test_record_that_cannot_be_written_is_left_out(tmp_path):
    (tmp_path / "file").write_text("")
    failures.record(tmp_path / "file", 1, "in the way")
    assert failures.read(tmp_path / "file") == []
