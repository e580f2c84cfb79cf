"""summary.json, of one family or over seeds, and its table: evaluation records in, JSON-ready
figures out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megatron_efr.errors import UserError
from megatron_efr.evaluation import statistics
from megatron_efr.evaluation.figures import with_interval
from megatron_efr.evaluation.records import Record, left_out_note

FIGURES = ("accuracy", "tokens")


class FamilyError(UserError, ValueError):
    """Families that cannot be put together; the message says how they differ."""


class Listed(NamedTuple):
    """One model of a family as its tables list it; runs that differ in their seed alone are one
    model.
    """

    name: str
    label: str
    runs: tuple[str, ...]  # names of its runs, which are those of their evaluation records
    base: str  # name of the model that it begins with; a base's is its own
    alpha: float | None = None


def build_summary(
    evaluations: Mapping[str, Record],
    alphas: Mapping[str, float | None],
    seconds: Mapping[str, float],
) -> Record:
    """summary.json of models that differ in alpha alone: base (alpha None) first and then by alpha.

    `evaluations` and `alphas` are keyed by the model's name. ValueError if a model has no
    evaluation.
    """
    names = sorted(alphas, key=lambda name: -1.0 if (alpha := alphas[name]) is None else alpha)
    base = next((name for name in names if alphas[name] is None), "")
    listed = [
        Listed(name, _label(name, alphas[name]), (name,), base, alphas[name]) for name in names
    ]
    return family_summary(evaluations, listed, seconds)


def family_summary(
    evaluations: Mapping[str, Record], models: Sequence[Listed], seconds: Mapping[str, float]
) -> Record:
    """summary.json: each model's figures, over its seeds if it has several, and the seconds each
    part took.

    ValueError if a run has no evaluation.
    """
    missing = sorted({run for model in models for run in model.runs} - set(evaluations))
    if missing:
        raise ValueError(
            f"no evaluation of {', '.join(missing)}; there are: "
            f"{', '.join(sorted(evaluations)) or 'none'}"
        )
    return {"models": [_model(model, evaluations) for model in models], "seconds": dict(seconds)}


def _model(model: Listed, evaluations: Mapping[str, Record]) -> Record:
    keys = (
        "problems",
        "samples",
        "accuracy",
        "accuracy_ci",
        "tokens",
        "tokens_ci",
        "tokens_by_difficulty",
    )
    named = {**model._asdict(), "runs": list(model.runs)}
    figures = [
        {
            **named,
            **{key: evaluations[run][key] for key in keys},
            "left_out": evaluations[run].get("left_out", {}),
        }
        for run in model.runs
    ]
    return figures[0] if len(figures) == 1 else named | _over_seeds(figures)


def over_seeds(summaries: Sequence[Record]) -> Record:
    """One summary of several seeds' summaries of the same family: each figure's mean and spread
    over the seeds.

    `accuracy` and `tokens` become means over seeds, `accuracy_sd` and `tokens_sd` the standard
    deviation (ddof 1, None for one seed), `accuracy_by_seed` and `tokens_by_seed` the values;
    intervals within a seed are dropped, since they measure something else. FamilyError if the
    families differ.
    """
    families = [
        [(model["name"], model["alpha"]) for model in summary["models"]] for summary in summaries
    ]
    if not families or any(family != families[0] for family in families):
        raise FamilyError(
            f"seeds can be put together only for one family of models, not {families}"
        )
    models = [
        _over_seeds([summary["models"][i] for summary in summaries])
        for i in range(len(families[0]))
    ]
    parts = list(summaries[0]["seconds"])
    seconds = {
        part: float(np.mean([summary["seconds"].get(part, 0.0) for summary in summaries]))
        for part in parts
    }
    return {"seeds": len(summaries), "models": models, "seconds": seconds}


def _over_seeds(models: Sequence[Record]) -> Record:
    first = models[0]
    merged: Record = {"name": first["name"], "alpha": first["alpha"]}
    for key in ("label", "base", "problems", "samples", "left_out"):
        if key in first:
            merged[key] = first[key]
    for key in FIGURES:
        values = [float(model[key]) for model in models]
        merged[key] = float(np.mean(values))
        merged[f"{key}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        merged[f"{key}_by_seed"] = values
    levels = statistics.in_order(
        {level for model in models for level in model["tokens_by_difficulty"]}
    )
    at = {
        level: [
            m["tokens_by_difficulty"][level] for m in models if level in m["tokens_by_difficulty"]
        ]
        for level in levels
    }
    merged["tokens_by_difficulty"] = {level: float(np.mean(values)) for level, values in at.items()}
    return merged


def summary_markdown(summary: Record) -> str:
    """The family as a markdown table for the README, and a line saying what the brackets or ±
    are.
    """
    by_name = {model["name"]: model for model in summary["models"]}
    lines = ["| model | accuracy | mean tokens | tokens against base |", "|---|---:|---:|---:|"]
    for model in summary["models"]:
        base = by_name.get(base_name(model, summary["models"]))
        accuracy = figure(model, "accuracy", lambda v: f"{100 * v:.1f}", "%")
        tokens = figure(model, "tokens", lambda v: f"{v:.1f}")
        against = (
            "" if base is None or model is base else f"{relative(model['tokens'], base['tokens'])}"
        )
        lines.append(f"| {label(model)} | {accuracy} | {tokens} | {against} |")
    return "\n".join(lines) + f"\n\n{spread_note(summary)}\n"


def figure(model: Mapping[str, Any], key: str, write: Any, unit: str = "") -> str:
    """`92.0% [90.1, 93.6]` with an interval, `92.0% ± 0.8` over seeds, `92.0%` with neither."""
    text = write(model[key]) + unit
    if model.get(f"{key}_ci"):
        low, high = model[f"{key}_ci"]
        return with_interval(text, low, high, write)
    if model.get(f"{key}_sd") is not None:
        return f"{text} ± {write(model[f'{key}_sd'])}"
    return text


def relative(value: float, base: float) -> str:
    """`-45%`, `+3%`: the change from `base`, with a true minus sign."""
    return f"{100 * (value / base - 1):+.0f}%".replace("-", "−") if base else "n/a"


def label(model: Mapping[str, Any]) -> str:
    """The model's name for people: `base`, `alpha 0.1`, `laser`."""
    # a summary of before has no labels
    return model.get("label") or _label(model["name"], model["alpha"])


def _label(name: str, alpha: float | None) -> str:
    return name if alpha is None else f"alpha {alpha:g}"


def base_name(model: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> str:
    """The name of the model that this one begins with; a base's is its own."""
    if "base" in model:
        return model["base"]
    # of a summary of before
    return next((one["name"] for one in models if one["alpha"] is None), "")


def spread_note(summary: Mapping[str, Any]) -> str:
    """Legend of a summary's table: its brackets or ±, and how many problems are not in it."""
    left_out = next((model["left_out"] for model in summary["models"] if model.get("left_out")), {})
    return " ".join(filter(None, [_spread(summary), left_out_note(left_out)]))


def _spread(summary: Mapping[str, Any]) -> str:
    seeds = {
        len(model["accuracy_by_seed"]) for model in summary["models"] if "accuracy_by_seed" in model
    }
    problems = {model["problems"] for model in summary["models"] if "problems" in model}
    count = f" on {problems.pop():,} held-out problems" if len(problems) == 1 else ""
    brackets = (
        f"95% intervals{count}, for accuracy Wilson's, for tokens by bootstrap; both know "
        "problems apart."
    )
    if not seeds:
        return f"In brackets: {brackets}"
    over = f"Mean ± standard deviation over {' or '.join(map(str, sorted(seeds)))} seeds."
    single = any(model.get("accuracy_ci") for model in summary["models"])
    return f"{over} In brackets, of one run: {brackets}" if single else over
