"""One page about a run: everything that its files tell, and nothing that they do not."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from infini_ds import cli
from infini_ds.report.figures import Curve, collect, thinned
from infini_ds.training.monitor import Monitor
from tests.tiny_run import tiny_config, write_checkpoint

SAMPLE = "def <memory>(of):\n    return 'all & more'"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that has everything that a page can show."""
    folder = tmp_path_factory.mktemp("report") / "a <run> & more"
    config = tiny_config(folder, memory={"write_gate": True})
    write_checkpoint(config)
    monitor = Monitor(config, 0)
    for step in range(1, 10):
        figures = {
            "train/loss": 4.0 / step, "train/tokens": 100 * step, "train/skipped_steps": 0,
            "train/gradient_norm": 1.0, "speed/tokens_per_second": 1234.5, "seconds/step": 0.5,
            "seconds/pipeline": 0.4, "seconds/waiting_for_stages": 0.1,
            "learning_rate/weights": 1e-3, "memory/write_mass/layer_0": 0.25,
            "train/exact_match": 0.5, "train/curriculum_segments": 2,
        }  # fmt: skip
        monitor.record(step, figures)
    held_out = {
        "held_out/bits_per_byte": 2.5, "held_out_without_memory/bits_per_byte": 2.75,
        "held_out_unigram/bits_per_byte": 4.0, "memory/norm_of_block_000": 12.0,
    }  # fmt: skip
    monitor.record(9, held_out)
    monitor.gates(9, np.array([[0.1, 0.9]]))
    monitor.text(9, "sample", "an older one")
    monitor.text(9, "sample", SAMPLE)
    monitor.close()
    (folder / "config.yaml").write_text(
        (folder / "checkpoints/step_00000009/config.yaml").read_text()
    )
    fault = {
        "time": "2026-11-29",
        "rank": 1,
        "host": "node-2",
        "step": 7,
        "message": "lost <rank 0>",
    }
    (folder / "failures.jsonl").write_text(json.dumps(fault) + "\n{")
    row = {"task": "niah", "metric": "4096", "with_memory": 0.75, "ablated": 0.0}
    (folder / "tasks.json").write_text(json.dumps({"step": 9, "results": [row]}))
    Figure(figsize=(1, 1)).savefig(folder / "passkey.png")
    return folder


def page_of(run: Path, path: Path) -> str:
    assert cli.main(["report", str(run), "-o", str(path)]) == 0
    return path.read_text()


def test_page_shows_all_that_the_files_tell(run, tmp_path):
    page = page_of(run, tmp_path / "page.html")
    for text in (
        "<title>a &lt;run&gt; &amp; more</title>", "2.5000", "2.7500", "1,234", "900",
        "def &lt;memory&gt;(of):", "lost &lt;rank 0&gt;", "node-2", "niah", "0.7500",
        'src="data:image/png;base64,', "hidden_size:", '"name":"with memory"',
        '"name":"memory ablated"', '"name":"of which waiting for stages"',
    ):  # fmt: skip
        assert text in page, text
    assert "an older one" not in page
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "Loss", "Held-out documents", "Speed", "Where a step&#x27;s time goes",
        "What heads read from the memory", "Share of tokens written into the memory",
        "Norm of the memories", "Right answers in training", "Curriculum", "Gradient norm",
        "Learning rates", "Pass keys found, by length of the document and depth of the key",
        "Tasks", "Sample", "Faults", "Config",
    ]  # fmt: skip


def test_page_needs_no_server(run, tmp_path):
    page = page_of(run, tmp_path / "page.html")
    assert not re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=\"(?!data:)", page)


def test_it_is_in_the_run_by_default_and_a_run_that_has_just_begun_has_a_page_too(tmp_path):
    monitor = Monitor(tiny_config(tmp_path), 0)
    monitor.record(1, {"train/loss": 5.0})
    monitor.close()
    from infini_ds.config import dump

    (tmp_path / "config.yaml").write_text(dump(tiny_config(tmp_path)))
    assert cli.main(["report", str(tmp_path)]) == 0
    titles = re.findall(r"<h2>(.*?)</h2>", (tmp_path / "report.html").read_text())
    assert titles == ["Loss", "Config"]


def test_curves_are_those_of_the_run(run):
    found = collect(run)
    assert found.curves["train/loss"] == Curve(
        [*range(1, 10)], [4.0 / step for step in range(1, 10)]
    )
    assert found.curves["held_out/bits_per_byte"] == Curve([9], [2.5])
    assert len(found.gates) == 2
    assert all(0 < gate < 1 for layer in found.gates for gate in layer)
    assert found.sample == SAMPLE
    assert len(found.faults) == 1


def test_long_curves_are_means_of_neighbours():
    curve = Curve([*range(1, 11)], [float(step % 2) for step in range(1, 11)])
    assert thinned(curve, 10) == curve
    assert thinned(curve, 5) == Curve([1.5, 3.5, 5.5, 7.5, 9.5], [0.5] * 5)
    assert thinned(curve, 4) == Curve([2.0, 5.0, 8.0, 10.0], [2 / 3, 1 / 3, 2 / 3, 0.0])


@pytest.mark.parametrize("what", ["nothing", "no run"])
def test_what_is_no_run_is_refused_in_one_line(what, tmp_path, capsys):
    if what == "no run":
        (tmp_path / "x").mkdir()
    assert cli.main(["report", str(tmp_path / "x")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"report {tmp_path / 'x'}: is no run; name the output_dir of a run" in line


FRAME = """<iframe src="page.html" style="width:WIDTHpx;height:3000px;border:0"></iframe>
<script>
const began = Date.now();
const watch = setInterval(() => {
  const page = document.querySelector("iframe").contentDocument;
  const late = Date.now() - began > 60000;  // of the browser's own time, which runs ahead
  const ready = [...page.querySelectorAll(".plot")].filter((plot) =>
    plot.querySelector(".trace, .hm")
    && plot.querySelector(".main-svg").clientWidth <= plot.clientWidth);
  if (ready.length < 11 && !late) return;
  clearInterval(watch);
  const plots = [...page.querySelectorAll(".plot")].map((plot) => ({
    place: plot.clientWidth, drawn: plot.querySelector(".main-svg").clientWidth,
    traces: plot.querySelectorAll(".trace, .hm").length,
  }));
  const beyond = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  const places = [...page.querySelectorAll("section")].map((each) => each.offsetLeft);
  const columns = new Set(places).size;
  document.body.textContent = JSON.stringify({plots, beyond, columns});
}, 500);
</script>"""


@pytest.mark.extras
@pytest.mark.parametrize(("width", "columns"), [(390, 1), (1280, 2)], ids=["phone", "desk"])
def test_a_browser_draws_it_at_every_width(run, tmp_path, width, columns):
    browser = shutil.which("chromium")
    assert browser, "`make test-extras` installs it where it may"
    page_of(run, tmp_path / "page.html")
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-web-security",
        "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width + 200},3000", "--virtual-time-budget=90000", "--dump-dom",
        f"file://{tmp_path / 'frame.html'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    shown = json.loads(re.search(r"\{.*\}", done.stdout)[0])  # type: ignore[index]
    assert shown["beyond"] == 0, "nothing has to be scrolled sideways"
    assert shown["columns"] == columns
    assert len(shown["plots"]) == 11
    for plot in shown["plots"]:
        assert 0 < plot["drawn"] <= plot["place"] < width
        assert plot["traces"] > 0
