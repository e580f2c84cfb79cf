"""The report: one self-contained HTML page (no request leaves it) and its pictures as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.colors import to_hex, to_rgb

from megatron_efr.durable import write_atomic
from megatron_efr.evaluation import statistics
from megatron_efr.evaluation.records import Record
from megatron_efr.report import plots, sentences
from megatron_efr.report.records import figure, label, relative, spread_note

Metrics = Mapping[str, Sequence[Mapping[str, Any]]]

_PANEL = (4.4, 3.1)  # inches: small enough that its letters stay readable on a phone
_FAMILY = (5.2, 3.7)


def write_report(
    summary: Record,
    evaluations: Mapping[str, Record],
    metrics: Metrics,
    out: str | Path,
    *,
    title: str = "Efficient reasoning",
    note: str = "",
    configs: Mapping[str, str] | None = None,
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write `out`/index.html, family.png, difficulty.png and curves.png; returns the page's path.

    `summary` is summary.json's tree (of one seed or of several; `{"models": [], "seconds": {}}` for a run that was not
    evaluated), `evaluations` model name -> evaluation record, `metrics` run name -> the lines of metrics.jsonl. `note`
    is said at the top: what the reader must know about these figures. `configs` maps a heading to a configuration's
    text, `versions` a package to its version. A section without data says so; pictures without data are not written.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    models = summary["models"]
    hues = plots.colours(models)
    for name in metrics:  # runs that no model of the summary stands for
        hues.setdefault(name, plots.colours([{"name": name, "alpha": 0.0}])[name])
    page = _environment().get_template("report.html.j2")
    html = page.render(
        title=title,
        note=note,
        headline=sentences.headline(models, metrics),
        colours=[(f"--m{i}", hue, _lighter(hue)) for i, hue in enumerate(hues.values())],
        swatches={name: f"var(--m{i})" for i, name in enumerate(hues)},
        family=_family(models, hues, out),
        table=_table(summary, evaluations),
        spread=spread_note(summary),
        datasets=_datasets(models, evaluations),
        difficulty=_difficulty(models, evaluations, hues, out),
        curves=_curves(models, metrics, hues, out),
        problem=_problem(models, evaluations),
        seconds=[(part, duration(value)) for part, value in summary.get("seconds", {}).items() if value is not None],
        configs=configs or {},
        versions=versions or {},
    )
    path = out / "index.html"
    write_atomic(path, html)
    return path


def duration(seconds: float) -> str:
    """`41 s`, `3 min 5 s`, `2 h 7 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def _environment() -> Environment:
    loader = PackageLoader("megatron_efr.report", ".")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _lighter(hue: str) -> str:
    """The same hue for a dark page: two fifths of the way to white."""
    red, green, blue = (channel + 0.4 * (1 - channel) for channel in to_rgb(hue))
    return to_hex((red, green, blue))


def _family(models: Sequence[Record], hues: Mapping[str, str], out: Path) -> Markup | None:
    if not models:
        return None
    draw = partial(plots.draw_family, models=models)
    plots.save_png([("", draw)], out / "family.png", _FAMILY, 1, [])
    told = "; ".join(f"{label(m)} {m['accuracy']:.1%} at {m['tokens']:.1f} tokens" for m in models)
    return Markup(plots.svg(draw, _FAMILY, "family", hues, f"Accuracy against mean tokens: {told}"))


def _table(summary: Record, evaluations: Mapping[str, Record]) -> list[dict[str, Any]]:
    """A row per model: the family's figures, and under `more` whatever its evaluation record adds."""
    models = summary["models"]
    base = sentences.base_of(models)
    rows: list[dict[str, Any]] = []
    for model in models:
        trained = base is not None and model is not base
        more = _more(evaluations.get(model["name"]))
        if trained and base is not None and base["accuracy"] > 0:
            score = statistics.accuracy_efficiency_score(
                model["accuracy"], model["tokens"], base["accuracy"], base["tokens"]
            )
            more["AES"] = f"{score:+.2f}".replace("-", "−")
        rows.append(
            {
                "name": model["name"],
                "label": label(model),
                "accuracy": _split(figure(model, "accuracy", lambda v: f"{100 * v:.1f}", "%")),
                "tokens": _split(figure(model, "tokens", lambda v: f"{v:.1f}")),
                "against": relative(model["tokens"], base["tokens"]) if trained and base is not None else "",
                "more": more,
            }
        )
    return rows


def _split(text: str) -> tuple[str, str]:
    """The figure and its spread, which takes a line of its own on a phone."""
    value, _, spread = text.partition(" ")
    return value, spread


def _more(record: Record | None) -> dict[str, str]:
    if record is None:
        return {}
    cells = {
        "tokens when right": _number(record["tokens_right"]),
        "when wrong": _number(record["tokens_wrong"]),
        "per right answer": _number(record["tokens_per_right_answer"]),
        "truncated": f"{record['truncated']:.1%}",
    }
    cells |= {f"pass@{k}": f"{value:.1%}" for k, value in record["pass_at_k"].items() if k != "1"}
    for key, name in (("majority", "majority"), ("shortest_majority", "shortest majority")):
        if record.get(key) is not None:
            cells[name] = f"{record[key]:.1%}"
    return cells


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _datasets(models: Sequence[Record], evaluations: Mapping[str, Record]) -> dict[str, Any] | None:
    """Accuracy and tokens of each data set, with the paper's normalised figures; None where there is only one set."""
    records = {model["name"]: evaluations[model["name"]] for model in models if model["name"] in evaluations}
    names = list(dict.fromkeys(name for record in records.values() for name in record["datasets"]))
    if len(names) < 2:
        return None
    base = sentences.base_of(models)
    start = records.get(base["name"]) if base is not None else None
    rows = []
    for model in models:
        if (record := records.get(model["name"])) is None:
            continue
        parts = [record["datasets"].get(name) for name in names]
        try:
            ratio = None if start is None else statistics.normalised(record["datasets"], start["datasets"])
        except ValueError:  # a start that solves nothing has no ratio to it
            ratio = None
        rows.append(
            {
                "name": model["name"],
                "label": label(model),
                "cells": ["–" if part is None else f"{part['accuracy']:.1%} / {part['tokens']:,.0f}" for part in parts],
                "normalised": "–" if ratio is None else f"{ratio['accuracy']:.1%} / {ratio['tokens']:.1%}",
            }
        )
    return {"names": names, "rows": rows}


def _difficulty(
    models: Sequence[Record], evaluations: Mapping[str, Record], hues: Mapping[str, str], out: Path
) -> dict[str, Any] | None:
    levels = statistics.in_order({level for model in models for level in model["tokens_by_difficulty"]})
    if not levels:
        return None
    kinds = [("Mean tokens", False)]
    if sentences.base_of(models) is not None:
        kinds.append((f"Relative to {label(models[0])}", True))
    draws = [(title, partial(plots.draw_difficulty, models=models, levels=levels, relative=r)) for title, r in kinds]
    plots.save_png(draws, out / "difficulty.png", _PANEL, 2, [(label(m), hues[m["name"]]) for m in models])
    rows = [[label(m), *(_number(m["tokens_by_difficulty"].get(level)) for level in levels)] for m in models]
    return {
        "sentences": sentences.difficulty_sentences(models, evaluations),
        "plots": _panels(draws, "difficulty", hues, "Tokens by difficulty, the figures are in the table below"),
        "key": [(label(model), model["name"]) for model in models],
        "levels": levels,
        "rows": rows,
    }


def _curves(models: Sequence[Record], metrics: Metrics, hues: Mapping[str, str], out: Path) -> dict[str, Any] | None:
    labels = {model["name"]: label(model) for model in models}
    shown = [key for key, _ in plots.CURVES]
    order = [n for n in hues if any(line.get(key) is not None for line in metrics.get(n, []) for key in shown)]
    runs = {name: metrics[name] for name in order}
    draws = [
        (title, partial(plots.draw_curve, runs=runs, key=key, hues=hues))
        for key, title in plots.CURVES
        if any(line.get(key) is not None for lines in runs.values() for line in lines)
    ]
    if not draws:
        return None
    draws = [(title[0].upper() + title[1:], draw) for title, draw in draws]
    plots.save_png(draws, out / "curves.png", _PANEL, 2, [(labels.get(name, name), hues[name]) for name in order])
    return {
        "plots": _panels(draws, "curve", hues, "against the iteration, a line for each run"),
        "key": [(labels.get(name, name), name) for name in order],
    }


def _panels(
    draws: Sequence[tuple[str, plots.Draw]], prefix: str, hues: Mapping[str, str], alt: str
) -> list[tuple[str, Markup]]:
    return [
        (title, Markup(plots.svg(draw, _PANEL, f"{prefix}{i}", hues, f"{title}: {alt}")))
        for i, (title, draw) in enumerate(draws)
    ]


def _problem(models: Sequence[Record], evaluations: Mapping[str, Record]) -> dict[str, Any] | None:
    """The chosen problem and every model's first response to it."""
    labels = {model["name"]: label(model) for model in models}
    chosen = sentences.chosen_problem(list(labels), evaluations)
    if chosen is None:
        return None
    row = next(iter(chosen.rows.values()))
    longest = max(answer["tokens"][0] for answer in chosen.rows.values())
    return {
        "rule": chosen.rule,
        "question": row["question"],
        "gold": row["gold"],
        "answers": [
            {
                "name": name,
                "label": labels[name],
                "text": answer["responses"][0] if answer["responses"] else "",
                "correct": answer["correct"][0],
                "truncated": answer["truncated"][0],
                "tokens": answer["tokens"][0],
                "share": round(100 * answer["tokens"][0] / longest) if longest else 0,
            }
            for name, answer in chosen.rows.items()
        ],
    }
