"""The view of a run that `efr watch` shows: curves, engines, seconds, time left, the newest lines
of the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypeGuard

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_efr.log import Line, duration
from megatron_efr.observe.curves import Curve, draw, extent

Metrics = Sequence[Mapping[str, Any]]

RECENT = 10
"""Steps whose mean seconds give the time left."""


class Series(NamedTuple):
    """One metric of a chart: its key, its name if a chart has several, its style."""

    key: str
    label: str
    style: str


class Chart(NamedTuple):
    """A chart: its title, its metrics, and how a figure is written."""

    title: str
    series: tuple[Series, ...]
    write: str


CHARTS = (
    Chart("reward", (Series("reward_mean", "", "cyan"),), "{:.3f}"),
    Chart(
        "accuracy",
        (Series("accuracy", "", "green"), Series("eval/accuracy", "held out", "yellow")),
        "{:.1%}",
    ),
    Chart(
        "tokens",
        (Series("tokens_mean", "", "cyan"), Series("eval/tokens", "held out", "yellow")),
        "{:.1f}",
    ),
    Chart(
        "tokens",
        (Series("tokens_correct", "right", "green"), Series("tokens_wrong", "wrong", "red")),
        "{:.1f}",
    ),
    Chart("entropy", (Series("entropy", "", "magenta"),), "{:.3f}"),
    Chart("KL to the initial model", (Series("kl", "", "magenta"),), "{:.4f}"),
    Chart("loss", (Series("loss", "", "cyan"),), "{:.4f}"),
    Chart("gradient norm", (Series("grad_norm", "", "magenta"),), "{:.3f}"),
)
"""All charts, the most telling first; a view shows the first ones that have figures."""

PHASES = ("rollout", "logprobs", "train", "publish", "evaluate", "checkpoint")
SHOWN_CHARTS, CHART_HEIGHT, LOG_LINES, NARROWEST = 6, 6, 6, 36
_STYLES = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold red"}


class Watched(NamedTuple):
    """A run as it stands: its name, its last step (0: unknown), its metrics and log, and if a
    process has it.
    """

    name: str
    total: int
    metrics: Metrics
    log: Sequence[Line]
    running: bool


def view(run: Watched, width: int, now: datetime) -> RenderableType:
    """The whole view, for a terminal of `width` columns."""
    columns = max(1, min(3, width // NARROWEST))
    charts = [chart for chart in CHARTS if _curves(chart, run.metrics)][:SHOWN_CHARTS]
    grid = Table.grid(expand=True)
    for _ in range(columns):
        grid.add_column(ratio=1)
    panels = [_panel(chart, run.metrics, width // columns) for chart in charts]
    for start in range(0, len(panels), columns):
        grid.add_row(*panels[start : start + columns])
    return Group(_head(run, now), grid, *_figures(run.metrics), *_log(run.log))


def state(run: Watched) -> str:
    """State of the run: `running`, or how it ended. A killed one wrote no end."""
    if run.running:
        return "running"
    ends = [line for line in run.log if line.event in ("start", "resume", "end")]
    ends = [line for line in ends if not line.text.startswith("evaluation ")] or ends
    if not ends:
        return "no process works on it"
    return (
        _first(ends[-1].text)
        if ends[-1].event == "end"
        else "ended without a log line: killed, or its machine failed"
    )


def seconds_left(run: Watched) -> float | None:
    """Seconds to the last step, by the mean of the newest ones; None if no step or no total is
    known.
    """
    recent = [line["time/total"] for line in run.metrics[-RECENT:] if "time/total" in line]
    steps = run.metrics[-1]["step"] if run.metrics else 0
    if not recent or not run.total:
        return None
    gap = steps - run.metrics[-len(recent) - 1]["step"] if len(run.metrics) > len(recent) else steps
    return sum(recent) / max(gap, len(recent)) * max(run.total - steps, 0)


def _head(run: Watched, now: datetime) -> RenderableType:
    step = run.metrics[-1]["step"] if run.metrics else 0
    said = [f"step {step} of {run.total}" if run.total else f"step {step}"]
    if run.running and (left := seconds_left(run)) is not None:
        said.append(f"left {duration(left)}")
    if run.log:
        said.append(
            f"last line of the log {duration(max((now - run.log[-1].time).total_seconds(), 0))} ago"
        )
    title = Text.assemble((run.name, "bold"), "  ", (state(run), "green" if run.running else ""))
    # on a line of their own: a folder's name may be as wide as the terminal
    figures = Text("  ".join(said))
    if not run.total:
        return Group(title, figures)
    bar = Table.grid(expand=True)
    bar.add_row(ProgressBar(total=run.total, completed=step))
    return Group(title, figures, bar)


def _curves(chart: Chart, metrics: Metrics) -> list[tuple[Series, Curve]]:
    """The chart's series that have figures."""
    found = []
    for series in chart.series:
        points = [
            (float(line["step"]), float(line[series.key]))
            for line in metrics
            if _is_number(line.get(series.key))
        ]
        if points:
            found.append((series, Curve(points, series.style)))
    return found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _panel(chart: Chart, metrics: Metrics, width: int) -> Panel:
    found = _curves(chart, metrics)
    curves = [curve for _, curve in found]
    title = Text(chart.title, "bold")
    for series, curve in found:
        title.append(f" {series.label}".rstrip())
        title.append(f" {chart.write.format(curve.points[-1][1])}", series.style)
    within = extent(curves)
    ends = [chart.write.format(within.high), chart.write.format(within.low)]
    margin = max(map(len, ends))
    lines = draw(curves, max(8, width - margin - 5), CHART_HEIGHT)
    labels = [ends[0], *[""] * (CHART_HEIGHT - 2), ends[1]]
    rows = [
        Text.assemble((f"{label:>{margin}} ", "dim"), line)
        for label, line in zip(labels, lines, strict=True)
    ]
    return Panel(Group(*rows), title=title, title_align="left", border_style="dim")


def _figures(metrics: Metrics) -> list[RenderableType]:
    """Engines and seconds of the newest step, and what befell engines in all."""
    if not metrics:
        return []
    newest = metrics[-1]
    said = []
    if "engine/serving" in newest:
        counts = [f"{newest['engine/serving']:.0f} serving"]
        counts += [
            f"{sum(line.get(f'engine/{name}', 0) for line in metrics):.0f} {name}"
            for name in ("lost", "back")
        ]
        said.append("engines: " + ", ".join(counts))
    if "time/tokens_per_s" in newest:
        said.append(f"{newest['time/tokens_per_s']:,.0f} tokens/s")
    phases = [(name, newest.get(f"time/{name}")) for name in PHASES]
    spent = [
        f"{name} {seconds:.1f}"
        for name, seconds in phases
        if _is_number(seconds) and seconds >= 0.05
    ]
    if spent:
        said.append("seconds: " + ", ".join(spent))
    if "time/memory_gib" in newest:
        said.append(f"{newest['time/memory_gib']:.1f} GiB")
    return [Text("  ·  ".join(said))]


def _log(lines: Sequence[Line]) -> list[RenderableType]:
    """The newest lines, the routine of publications and checkpoints left out."""
    told = [line for line in lines if line.level != "DEBUG"][-LOG_LINES:]
    shown: list[RenderableType] = []
    for line in told:
        event = f"[{line.event}] " if line.event else ""
        text = f"{line.time:%H:%M:%S} {event}{_first(line.text)}"
        style = _STYLES.get(line.level, "dim")
        shown.append(Text(text, style, no_wrap=True, overflow="ellipsis"))
    return shown


def _first(text: str) -> str:
    """The first line of a record, without the colours that a server's own log may bring into it."""
    return Text.from_ansi(text).plain.partition("\n")[0]
