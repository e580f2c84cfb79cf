"""The report's plots: each drawn on an axis, then kept as SVG for the page (light and dark) and as
PNG for people.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_efr.report import labels

_REACH = 4.0  # of a mark and of a bar's cap, in points

# Each colour is a CSS variable on the page, so that one drawing serves light and dark; a PNG shows
# the light values.
INK, MUTED, GRID, BASE = "#1b1f24", "#5b636d", "#dfe3e8", "#6e7781"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", BASE: "--base"}
# alpha is ordered, so its colours are one ramp; each end is dark enough for white and light enough
# for near-black
_RAMP = LinearSegmentedColormap.from_list("alpha", ["#0d9488", "#2f6fdb", "#8b45c8", "#c8327a"])

_STYLE: Any = {
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron_efr",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
}

Draw = Callable[[Axes], None]
CURVES = (
    ("accuracy", "accuracy (%)"),
    ("tokens_mean", "mean tokens"),
    ("reward_mean", "reward"),
    ("kl", "KL to start"),
)


def colours(models: Sequence[tuple[str, bool]]) -> dict[str, str]:
    """Model name -> hex colour, from (name, whether it is a base): bases grey, the others along a
    ramp in order.
    """
    trained = [name for name, is_base in models if not is_base]
    last = len(trained) - 1
    ramp = {
        name: to_hex(_RAMP(index / last if last else 0.35)) for index, name in enumerate(trained)
    }
    return {name: ramp.get(name, BASE) for name, _ in models}


def draw_family(axis: Axes, points: Sequence[Point], front: Sequence[Point]) -> None:
    """Accuracy (%) against mean tokens, a point a model with bars; a line through the `front`."""
    axis.plot(
        [p.tokens for p in front],
        [p.accuracy for p in front],
        color=MUTED,
        linewidth=1.2,
        alpha=0.6,
        zorder=1,
    )
    for p in points:
        axis.errorbar(
            p.tokens,
            p.accuracy,
            p.accuracy_bars,
            p.token_bars,
            color=p.hue,
            elinewidth=1.5,
            capsize=2.5,
            zorder=2,
        )
        axis.plot([p.tokens], [p.accuracy], "o", color=p.hue, markersize=7.5, zorder=3)
    axis.set_xlabel("mean tokens per response")
    axis.set_ylabel("accuracy (%)")
    axis.margins(x=0.14, y=0.16)
    _place_labels(axis, points)


class Point(NamedTuple):
    """A model on the plane of tokens and accuracy (%); `bars` are distances below and above, [2,
    1].
    """

    text: str
    hue: str
    tokens: float
    accuracy: float
    token_bars: np.ndarray | None
    accuracy_bars: np.ndarray | None

    @classmethod
    def of(cls, model: Mapping[str, Any], text: str, hue: str) -> Point:
        """The point of a model of a summary."""
        bars = _bars(model, "tokens", 1.0), _bars(model, "accuracy", 100.0)
        return cls(text, hue, model["tokens"], 100 * model["accuracy"], *bars)


def _bars(model: Mapping[str, Any], key: str, scale: float) -> np.ndarray | None:
    """Distances below and above the point, [2, 1]."""
    if model.get(f"{key}_ci"):
        low, high = model[f"{key}_ci"]
        return scale * np.array([[max(model[key] - low, 0.0)], [max(high - model[key], 0.0)]])
    spread = model.get(f"{key}_sd")
    return None if spread is None else scale * np.array([[spread], [spread]])


def _place_labels(axis: Axes, points: Sequence[Point]) -> None:
    """Put each text beside its point, off other texts, points and bars; a line leads to one that is
    not next to it.
    """
    figure = axis.get_figure(root=True)
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # settles the layout, so that pixels mean something
    pixels = figure.dpi / 72  # of a point
    style: Any = {"textcoords": "offset points", "fontweight": "bold", "ha": "center"}
    style |= {"va": "center", "xytext": (0, 0)}
    middles, sizes = np.empty((2, len(points), 2))
    for own, p in enumerate(points):
        note = axis.annotate(p.text, (p.tokens, p.accuracy), **style)
        middles[own] = axis.transData.transform(note.xy) / pixels
        sizes[own] = np.array(note.get_window_extent(renderer).size) / pixels
        note.remove()
    frame = np.array(axis.bbox.extents) / pixels
    placed = labels.place(middles, sizes, _taken(axis, points) / pixels, frame)
    axis.autoscale(False)
    ends = axis.transData.inverted().transform(placed.ends * pixels)
    for p, offset, lined, end in zip(
        points, placed.middles - middles, placed.lined, ends, strict=True
    ):
        axis.annotate(p.text, (p.tokens, p.accuracy), **style | {"xytext": offset})
        if lined:
            line = (p.tokens, end[0]), (p.accuracy, end[1])
            axis.plot(*line, color=MUTED, linewidth=0.7, zorder=4)


def _taken(axis: Axes, points: Sequence[Point]) -> np.ndarray:
    """The boxes of marks and bars, [boxes, 4], in pixels."""
    ends: list[np.ndarray] = []  # low and high, [2, 2] each
    for p in points:
        middle = np.array([[p.tokens, p.accuracy]])
        ends.append(middle.repeat(2, axis=0))
        for way, bar in zip(np.eye(2), (p.token_bars, p.accuracy_bars), strict=True):
            if bar is not None:
                ends.append(middle + np.array([[-1.0], [1.0]]) * bar * way)
    pixels = axis.transData.transform(np.reshape(ends, (-1, 2))).reshape(-1, 2, 2)
    reach = _REACH * axis.figure.dpi / 72
    return (pixels + np.array([[-reach], [reach]])).reshape(-1, 4)


class Line(NamedTuple):
    """A line of a plot: its colour, its points, and the ends of their intervals if they have
    them.
    """

    hue: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def draw_lines(
    axis: Axes,
    lines: Sequence[Line],
    x: str,
    y: str,
    ticks: Sequence[str] = (),
    from_zero: bool = False,
) -> None:
    """Marked lines with bands for their intervals; `x` and `y` name the axes, `ticks` the places 0,
    1, ... of x.
    """
    for line in lines:
        if line.low:
            axis.fill_between(line.x, line.low, line.high, color=line.hue, alpha=0.15, linewidth=0)
        axis.plot(line.x, line.y, "o-", color=line.hue, markersize=4.5)
    if ticks:
        axis.set_xticks(range(len(ticks)), ticks)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if from_zero:
        axis.set_ylim(bottom=0)


class Range(NamedTuple):
    """Percentiles of lengths: the 10th, 25th, 50th, 75th and 90th percentile; empty if there are
    none.
    """

    text: str
    hue: str
    percentiles: Sequence[float]


def draw_ranges(axis: Axes, ranges: Sequence[Range], x: str, most: float) -> None:
    """A row for each range, the first on top: thin from the 10th percentile to the 90th, thick
    between quartiles.
    """
    for row, each in enumerate(ranges):
        if len(each.percentiles):
            p10, p25, p50, p75, p90 = each.percentiles
            axis.plot([p10, p90], [row, row], color=each.hue, linewidth=1.4, solid_capstyle="round")
            axis.plot(
                [p25, p75],
                [row, row],
                color=each.hue,
                linewidth=5,
                solid_capstyle="butt",
                alpha=0.55,
            )
            axis.plot([p50], [row], "o", color=each.hue, markersize=6)
    axis.set_yticks(range(len(ranges)), [each.text for each in ranges])
    axis.set_ylim(len(ranges) - 0.5, -0.5)
    axis.set_xlim(0, 1.04 * most)
    axis.set_xlabel(x)


def draw_curve(
    axis: Axes, runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], key: str
) -> None:
    """One metric of (colour, metrics) runs against the step: each value faint, their running mean
    over it.
    """
    for hue, metrics in runs:
        known = [line for line in metrics if isinstance(line.get(key), int | float)]
        if not known:
            continue
        steps = np.array([line["step"] for line in known])
        values = np.array([line[key] for line in known], dtype=float) * (
            100 if key == "accuracy" else 1
        )
        smooth = running_mean(values, max(1, len(values) // 12))
        axis.plot(steps, values, color=hue, linewidth=0.9, alpha=0.3)
        axis.plot(steps, smooth, color=hue)
    axis.set_xlabel("iteration")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean over `reach` neighbours on either side, fewer at the ends; [n] -> [n]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    low = np.maximum(centre - reach, 0)
    high = np.minimum(centre + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def svg(
    draw: Draw, size: tuple[float, float], prefix: str, hues: Mapping[str, str], alt: str
) -> str:
    """Draw on one axis of `size` inches and return inline SVG: colours as CSS variables, ids made
    unique by `prefix`.

    Nothing in it refers outside: the XML header, metadata and name spaces go, which HTML does not
    need. `hues` are the models' colours; the page defines `--m0`, `--m1` ... in their order. `alt`
    is what a screen reader says.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size)
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :]
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for hue, variable in (
        _VARIABLES | {hue: f"--m{i}" for i, hue in enumerate(hues.values()) if hue != BASE}
    ).items():
        text = text.replace(hue, f"var({variable})")
    text = re.sub(r"font:([^;\"]*)'DejaVu Sans'[^;\"]*", r"font:\1system-ui, sans-serif", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{_attribute(alt)}"', 1)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def save(
    draws: Sequence[tuple[str, Draw]],
    path: Path,
    size: tuple[float, float],
    columns: int = 1,
    key: Sequence[tuple[str, str]] = (),
) -> None:
    """Save titled axes side by side, `size` inches each, as path.png and path.svg; `key` is a
    legend: label, colour.
    """
    rows = -(-len(draws) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), facecolor="white")
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for axis, (title, draw) in zip(axes, draws, strict=False):
            draw(axis)
            axis.set_title(title, loc="left", fontweight="bold", fontsize=11)
        for axis in list(axes):  # what is left over has nothing to show
            axis.set_axis_off()
        if key:
            handles = [Line2D([], [], color=hue, marker="o", markersize=5) for _, hue in key]
            texts = [text for text, _ in key]
            wide = min(len(key), 4 * columns)
            figure.legend(handles, texts, loc="outside lower center", ncols=wide, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path.with_suffix(".png"), format="png", dpi=200)
        figure.set_layout_engine("none")  # as it was laid out just now
        figure.savefig(path.with_suffix(".svg"), format="svg", metadata={"Date": None})
