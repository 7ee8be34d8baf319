"""Draws one HTML page about a run, which needs no server and no internet."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from infini_ds.report.figures import Curve, RunFigures
from infini_ds.system.whole_file import whole_file

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  :root { color-scheme: light; }
  body { font: 16px/1.45 system-ui, sans-serif; color: #1c2430; background: #f5f6f8; margin: 0; }
  main { max-width: 1200px; margin: 0 auto; padding: 16px; }
  h1 { font-size: 1.5rem; margin: .2em 0; overflow-wrap: anywhere; }
  h2 { font-size: 1.05rem; margin: 0 0 .4em; }
  .note { color: #5a6675; margin: .2em 0 1em; font-size: .9rem; }
  .cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; }
  .grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr));
    gap: 14px; margin-top: 14px; }
  .card, section { background: white; border-radius: 8px; padding: 12px 14px; min-width: 0;
    box-shadow: 0 1px 2px rgb(0 0 0 / 12%); }
  .card b { display: block; font-size: 1.35rem; }
  .card span { color: #5a6675; font-size: .85rem; }
  .wide { grid-column: 1 / -1; }
  .plot { height: 340px; overflow: hidden; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; margin: 0; }
  table { border-collapse: collapse; font-size: .9rem; }
  td, th { text-align: left; padding: 3px 14px 3px 0; vertical-align: top; }
  .scroll { overflow-x: auto; }
  img { max-width: 100%; height: auto; }
</style>
<script>$script</script>
</head>
<body>
<main>
<h1>$title</h1>
<p class="note">$note</p>
<div class="cards">$cards</div>
<div class="grid">$sections</div>
</main>
<script>
  // They are drawn before the page has its columns, and a phone may be turned.
  const fit = new ResizeObserver((entries) => entries.forEach(
    (entry) => Plotly.Plots.resize(entry.target.querySelector(".plotly-graph-div"))));
  document.querySelectorAll(".plot").forEach((place) => fit.observe(place));
</script>
</body>
</html>
""")
_COLOURS = ("#2563a8", "#c2571a", "#2e8b57", "#8a4fa3", "#777777", "#b8860b", "#008b8b", "#b03060")
_PHASES = {
    "pipeline": "forward and backward",
    "reduce": "sum of gradients",
    "optimizer": "optimizer",
    "waiting_for_stages": "of which waiting for stages",
    "waiting_for_context": "of which waiting for ranks that share windows",
    "saving": "saving",
}
_WITH, _WITHOUT = "held_out/bits_per_byte", "held_out_without_memory/bits_per_byte"
_UNIGRAM = "held_out_unigram/bits_per_byte"


def write(found: RunFigures, name: str, path: Path) -> None:
    """Writes the page.

    Args:
        name: of the run.

    Raises:
        UserError: the file cannot be written.
    """
    page = _PAGE.substitute(
        title=html.escape(name),
        note=html.escape(_note(found)),
        script=get_plotlyjs(),
        cards="".join(_cards(found)),
        sections="".join(filter(None, _sections(found))),
    )
    with whole_file(path, "--output") as file:
        file.write_text(page, encoding="utf-8")


def _note(found: RunFigures) -> str:
    known = found.status
    error = known["last_error"]
    text = f"{known['state']}, step {known['step']:,} of {known['steps']:,}"
    return text + (f"; last error: {error['message']}" if error else "")


def _cards(found: RunFigures) -> Iterable[str]:
    known, curves = found.status, found.curves
    last = {name: curve.values[-1] for name, curve in curves.items()}
    shown = {
        f"of {known['steps']:,} steps": f"{known['step']:,}",
        "training loss": _text(known["loss"], "{:.4f}"),
        "held-out bits per byte": _text(last.get(_WITH), "{:.4f}"),
        "with the memory ablated": _text(last.get(_WITHOUT), "{:.4f}"),
        "tokens": _text(known["tokens"], "{:,}"),
        "tokens a second": _text(known["tokens_per_second"], "{:,.0f}"),
        "steps skipped": _text(known["skipped_steps"], "{:,}"),
    }
    for title, value in shown.items():
        yield f'<div class="card"><b>{html.escape(value)}</b><span>{title}</span></div>'


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _sections(found: RunFigures) -> Iterable[str]:
    curves = found.curves
    yield _lines("Loss", "nats per token", curves, {"train/loss": "training"})
    held_out = {_WITH: "with memory", _WITHOUT: "memory ablated", _UNIGRAM: "frequencies of tokens"}
    yield _lines("Held-out documents", "bits per byte", curves, held_out, "lines+markers")
    yield _lines("Speed", "tokens a second", curves, {"speed/tokens_per_second": "tokens a second"})
    phases = {f"seconds/{phase}": title for phase, title in _PHASES.items()}
    yield _lines("Where a step's time goes", "seconds", curves, phases)
    if found.gates:
        yield _gates(found.gates)
    yield _layers("Share of tokens written into the memory", curves, "memory/write_mass/layer_")
    yield _layers("Norm of the memories", curves, "memory/norm_of_block_")
    yield _lines("Right answers in training", "share", curves, {"train/exact_match": "right"})
    lengths = {"train/curriculum_segments": "documents asked about"}
    yield _lines("Curriculum", "segments", curves, lengths)
    yield _lines("Gradient norm", "norm", curves, {"train/gradient_norm": "gradient"})
    rates = [name for name in curves if name.startswith("learning_rate/")]
    names = {name: name.partition("/")[2] for name in rates}
    yield _lines("Learning rates", "learning rate", curves, names)
    for caption, picture in found.pictures.items():
        alt = html.escape(caption)
        yield _section(caption, f'<img src="{picture}" alt="{alt}">')
    if found.tasks:
        yield _section("Tasks", _tasks(found))
    if found.sample:
        yield _section("Sample", f"<pre>{html.escape(found.sample)}</pre>", wide=True)
    if found.faults:
        rows = [
            (fault.get(key, "") for key in ("time", "step", "rank", "host", "message"))
            for fault in found.faults
        ]
        table = _table(("time", "step", "rank", "host", "what ended it"), rows)
        yield _section("Faults", table, wide=True)
    config = f"<details><summary>all settings</summary><pre>{html.escape(found.config)}</pre>"
    yield _section("Config", f"{config}</details>", wide=True)


def _section(title: str, content: str, wide: bool = False) -> str:
    kind = ' class="wide"' if wide else ""
    return f"<section{kind}><h2>{html.escape(title)}</h2>{content}</section>"


def _table(headings: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _tasks(found: RunFigures) -> str:
    rows = [
        (row["task"], row["metric"], f"{row['with_memory']:.4f}", _text(row["ablated"], "{:.4f}"))
        for row in found.tasks["results"]
    ]
    return _table(("task", "measure", "with memory", "ablated"), rows)


def _lines(
    title: str, unit: str, curves: dict[str, Curve], names: dict[str, str], mode: str = "lines"
) -> str:
    """Draws the named curves that there are; empty if there is none."""
    figure = go.Figure()
    there = [name for name in names if name in curves]
    for name, colour in zip(there, _COLOURS * len(there), strict=False):
        steps, values = curves[name]
        shown = "markers" if len(steps) == 1 else mode
        trace = go.Scatter(
            x=steps, y=values, mode=shown, name=names[name], line={"color": colour, "width": 1.6}
        )
        figure.add_trace(trace)
    return _section(title, _drawn(figure, "step", unit)) if there else ""


def _layers(title: str, curves: dict[str, Curve], prefix: str) -> str:
    names = [name for name in curves if name.startswith(prefix)]
    return _lines(
        title, "mean", curves, {name: f"layer {int(name.removeprefix(prefix))}" for name in names}
    )


def _gates(gates: list[list[float]]) -> str:
    trace = go.Heatmap(
        z=[[100 * gate for gate in layer] for layer in gates],
        x=[f"{head}" for head in range(len(gates[0]))],
        y=[f"{layer}" for layer in range(len(gates))],
        zmin=0, zmax=100, colorscale="Viridis", colorbar={"title": "percent"},
        hovertemplate="layer %{y}, head %{x}: %{z:.1f}%<extra></extra>",
        texttemplate="%{z:.0f}" if len(gates) * len(gates[0]) <= 256 else None,
    )  # fmt: skip
    figure = go.Figure(trace)
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed")
    return _section("What heads read from the memory", _drawn(figure, "head", "layer"))


def _drawn(figure: go.Figure, across: str, up: str) -> str:
    figure.update_layout(
        margin={"l": 60, "r": 12, "t": 8, "b": 44}, autosize=True, template="plotly_white",
        xaxis_title=across, yaxis_title=up, legend={"orientation": "h", "y": -0.2},
        hovermode="closest" if up == "layer" else "x unified",
    )  # fmt: skip
    if up != "layer":
        figure.update_xaxes(rangemode="tozero")
    drawn = figure.to_html(
        full_html=False, include_plotlyjs=False, default_height="340px",
        config={"displayModeBar": False},
    )  # fmt: skip
    return f'<div class="plot">{drawn}</div>'
