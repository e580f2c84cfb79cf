"""The report's plots: each drawn on an axis, then kept as SVG for the page (light and dark) and as PNG for people."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from megatron_efr.report.records import label

# Each colour is a CSS variable on the page, so that one drawing serves light and dark; a PNG shows the light values.
INK, MUTED, GRID, BASE = "#1b1f24", "#5b636d", "#dfe3e8", "#6e7781"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", BASE: "--base"}
# alpha is ordered, so its colours are one ramp; each end is dark enough for white and light enough for near-black
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


def colours(models: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Model name -> hex colour: grey for a model without alpha, the others along the ramp in their order."""
    trained = [model["name"] for model in models if model["alpha"] is not None]
    last = len(trained) - 1
    ramp = {name: to_hex(_RAMP(index / last if last else 0.35)) for index, name in enumerate(trained)}
    return {model["name"]: ramp.get(model["name"], BASE) for model in models}


def draw_family(axis: Axes, models: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy (%) against mean tokens, a point a model, bars for the interval (or the deviation over seeds)."""
    hues = colours(models)
    x, y = [model["tokens"] for model in models], [100 * model["accuracy"] for model in models]
    axis.plot(x, y, color=GRID, linewidth=1.6, zorder=1)
    for model, tokens, accuracy in zip(models, x, y, strict=True):
        hue = hues[model["name"]]
        x_bar, y_bar = _bars(model, "tokens", 1.0), _bars(model, "accuracy", 100.0)
        axis.errorbar(tokens, accuracy, xerr=x_bar, yerr=y_bar, color=hue, elinewidth=1.5, capsize=2.5, zorder=2)
        axis.plot([tokens], [accuracy], "o", color=hue, markersize=7.5, zorder=3)
    axis.set_xlabel("mean tokens per response")
    axis.set_ylabel("accuracy (%)")
    axis.margins(x=0.14, y=0.16)
    reach = [_bars(model, "accuracy", 100.0) for model in models]
    _place_labels(axis, x, y, reach, [label(model) for model in models])


def _bars(model: Mapping[str, Any], key: str, scale: float) -> np.ndarray | None:
    """Distances below and above the point, [2, 1]."""
    if model.get(f"{key}_ci"):
        low, high = model[f"{key}_ci"]
        return scale * np.array([[max(model[key] - low, 0.0)], [max(high - model[key], 0.0)]])
    spread = model.get(f"{key}_sd")
    return None if spread is None else scale * np.array([[spread], [spread]])


def _place_labels(
    axis: Axes, x: Sequence[float], y: Sequence[float], reach: Sequence[np.ndarray | None], texts: Sequence[str]
) -> None:
    """Put each text beside its point, at the first place on the axis that no other text, point or bar has."""
    figure = axis.get_figure(root=True)
    assert figure is not None
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # settles the layout, so that pixels mean something
    ends = [(0.0, 0.0) if bars is None else (bars[0, 0], bars[1, 0]) for bars in reach]
    low = axis.transData.transform([(px, py - below) for px, py, (below, _) in zip(x, y, ends, strict=True)]) - 9
    high = axis.transData.transform([(px, py + above) for px, py, (_, above) in zip(x, y, ends, strict=True)]) + 9
    taken = [Bbox(corners) for corners in np.stack([low, high], axis=1)]
    places = [(9, 7, "left", "bottom"), (-9, 7, "right", "bottom"), (9, -7, "left", "top"), (-9, -7, "right", "top")]
    places += [(0, 22, "center", "bottom"), (0, -22, "center", "top")]
    for own, (px, py, text) in enumerate(zip(x, y, texts, strict=True)):
        others = [box for index, box in enumerate(taken) if index != own]
        for last, (dx, dy, ha, va) in enumerate(places, start=1):
            note = axis.annotate(text, (px, py), (dx, dy), textcoords="offset points", ha=ha, va=va, fontweight="bold")
            box = note.get_window_extent(canvas.get_renderer())
            inside = axis.bbox.containsx(box.x0) and axis.bbox.containsx(box.x1)
            if last == len(places) or (inside and not any(box.overlaps(other) for other in others)):
                taken.append(box)
                break
            note.remove()


def draw_difficulty(axis: Axes, models: Sequence[Mapping[str, Any]], levels: Sequence[str], relative: bool) -> None:
    """Mean tokens at each difficulty, a line a model; `relative`: in per cent of the first model's, the base."""
    hues, base = colours(models), models[0]["tokens_by_difficulty"]
    for model in models:
        tokens = model["tokens_by_difficulty"]
        known = [level for level in levels if level in tokens and (not relative or base.get(level))]
        values = [100 * tokens[level] / base[level] if relative else tokens[level] for level in known]
        places = [levels.index(level) for level in known]
        axis.plot(places, values, "o-", color=hues[model["name"]], markersize=4.5, label=label(model))
    axis.set_xticks(range(len(levels)), levels)
    axis.set_xlabel("difficulty")
    axis.set_ylabel(f"tokens (% of {label(models[0])})" if relative else "mean tokens")
    axis.set_ylim(bottom=0)


def draw_curve(axis: Axes, runs: Mapping[str, Sequence[Mapping[str, Any]]], key: str, hues: Mapping[str, str]) -> None:
    """One metric of every run against the step: each step's value faint, their running mean over it."""
    for name, metrics in runs.items():
        known = [line for line in metrics if isinstance(line.get(key), int | float)]
        if not known:
            continue
        steps = np.array([line["step"] for line in known])
        values = np.array([line[key] for line in known], dtype=float) * (100 if key == "accuracy" else 1)
        smooth = running_mean(values, max(1, len(values) // 12))
        axis.plot(steps, values, color=hues[name], linewidth=0.9, alpha=0.3)
        axis.plot(steps, smooth, color=hues[name])
    axis.set_xlabel("iteration")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean over `reach` neighbours on either side, fewer at the ends; [n] -> [n]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    low, high = np.maximum(centre - reach, 0), np.minimum(centre + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def svg(draw: Draw, size: tuple[float, float], prefix: str, hues: Mapping[str, str], alt: str) -> str:
    """Draw on one axis of `size` inches and return inline SVG: colours as CSS variables, ids made unique by `prefix`.

    Nothing in it refers outside: the XML header, metadata and name spaces go, which HTML does not need. `hues` are the
    models' colours; the page defines `--m0`, `--m1` ... in their order. `alt` is what a screen reader says.
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
    for hue, variable in (_VARIABLES | {hue: f"--m{i}" for i, hue in enumerate(hues.values()) if hue != BASE}).items():
        text = text.replace(hue, f"var({variable})")
    text = re.sub(r"font:([^;\"]*)'DejaVu Sans'[^;\"]*", r"font:\1system-ui, sans-serif", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{_attribute(alt)}"', 1)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def save_png(draws: Sequence[tuple[str, Draw]], path: Path, size: tuple[float, float], columns: int, key: Any) -> None:
    """Save titled axes side by side, `size` inches each, as one PNG; `key` [(label, colour)] becomes a legend."""
    rows = -(-len(draws) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), facecolor="white")
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for axis, (title, draw) in zip(axes, draws, strict=False):
            draw(axis)
            axis.set_title(title, loc="left", fontweight="bold", fontsize=11)
        if key:
            handles = [Line2D([], [], color=hue, marker="o", markersize=5) for _, hue in key]
            figure.legend(handles, [text for text, _ in key], loc="outside lower center", ncols=len(key), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=200)
