"""summary.json, of one family or over seeds, and its table: evaluation records in, JSON-ready figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_efr.errors import UserError
from megatron_efr.evaluation import statistics
from megatron_efr.evaluation.records import Record, left_out_note

FIGURES = ("accuracy", "tokens")


class FamilyError(UserError, ValueError):
    """Families that cannot be put together; the message says how they differ."""


def build_summary(
    evaluations: Mapping[str, Record], alphas: Mapping[str, float | None], seconds: Mapping[str, float]
) -> Record:
    """summary.json: the family, base (alpha None) first and then by alpha, and the seconds each part took.

    `evaluations` and `alphas` are keyed by the model's name. ValueError where a model has no evaluation.
    """
    missing = sorted(set(alphas) - set(evaluations))
    if missing:
        raise ValueError(
            f"no evaluation of {', '.join(missing)}; there are: {', '.join(sorted(evaluations)) or 'none'}"
        )
    keys = ("problems", "samples", "accuracy", "accuracy_ci", "tokens", "tokens_ci", "tokens_by_difficulty")
    names = sorted(alphas, key=lambda name: _base_first(alphas[name]))
    models = [
        {
            "name": name,
            "alpha": alphas[name],
            **{key: evaluations[name][key] for key in keys},
            "left_out": evaluations[name].get("left_out", {}),
        }
        for name in names
    ]
    return {"models": models, "seconds": dict(seconds)}


def _base_first(alpha: float | None) -> float:
    return -1.0 if alpha is None else alpha


def over_seeds(summaries: Sequence[Record]) -> Record:
    """One summary of several seeds' summaries of the same family: each figure's mean and spread over the seeds.

    `accuracy` and `tokens` become means over seeds, `accuracy_sd` and `tokens_sd` the standard deviation (ddof 1, None
    for one seed), `accuracy_by_seed` and `tokens_by_seed` the values; intervals within a seed are dropped, since they
    measure something else. FamilyError where the families differ.
    """
    families = [[(model["name"], model["alpha"]) for model in summary["models"]] for summary in summaries]
    if not families or any(family != families[0] for family in families):
        raise FamilyError(f"seeds can be put together only for one family of models, not {families}")
    models = [_over_seeds([summary["models"][i] for summary in summaries]) for i in range(len(families[0]))]
    parts = list(summaries[0]["seconds"])
    seconds = {part: float(np.mean([summary["seconds"].get(part, 0.0) for summary in summaries])) for part in parts}
    return {"seeds": len(summaries), "models": models, "seconds": seconds}


def _over_seeds(models: Sequence[Record]) -> Record:
    first = models[0]
    merged: Record = {"name": first["name"], "alpha": first["alpha"]}
    for key in ("problems", "samples", "left_out"):
        if key in first:
            merged[key] = first[key]
    for key in FIGURES:
        values = [float(model[key]) for model in models]
        merged[key] = float(np.mean(values))
        merged[f"{key}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        merged[f"{key}_by_seed"] = values
    levels = statistics.in_order({level for model in models for level in model["tokens_by_difficulty"]})
    at = {
        level: [m["tokens_by_difficulty"][level] for m in models if level in m["tokens_by_difficulty"]]
        for level in levels
    }
    merged["tokens_by_difficulty"] = {level: float(np.mean(values)) for level, values in at.items()}
    return merged


def summary_markdown(summary: Record) -> str:
    """The family as a markdown table for the README, and a line saying what the brackets or ± are."""
    base = next((model for model in summary["models"] if model["alpha"] is None), None)
    lines = ["| model | accuracy | mean tokens | tokens against base |", "|---|---:|---:|---:|"]
    for model in summary["models"]:
        accuracy = figure(model, "accuracy", lambda v: f"{100 * v:.1f}", "%")
        tokens = figure(model, "tokens", lambda v: f"{v:.1f}")
        against = "" if base is None or model is base else f"{relative(model['tokens'], base['tokens'])}"
        lines.append(f"| {label(model)} | {accuracy} | {tokens} | {against} |")
    return "\n".join(lines) + f"\n\n{spread_note(summary)}\n"


def figure(model: Mapping[str, Any], key: str, write: Any, unit: str = "") -> str:
    """`92.0% [90.1, 93.6]` with an interval, `92.0% ± 0.8` over seeds, `92.0%` with neither."""
    text = write(model[key]) + unit
    if model.get(f"{key}_ci"):
        low, high = model[f"{key}_ci"]
        return f"{text} [{write(low)}, {write(high)}]"
    if model.get(f"{key}_sd") is not None:
        return f"{text} ± {write(model[f'{key}_sd'])}"
    return text


def relative(value: float, base: float) -> str:
    """`-45%`, `+3%`: the change from `base`, with a true minus sign."""
    return f"{100 * (value / base - 1):+.0f}%".replace("-", "−") if base else "n/a"


def label(model: Mapping[str, Any]) -> str:
    """`base`, or `alpha 0.1`, or the model's own name where it has neither."""
    if model["alpha"] is None:
        return str(model["name"])
    return f"alpha {model['alpha']:g}"


def spread_note(summary: Mapping[str, Any]) -> str:
    """What the brackets, or the ±, in a table of this summary mean, and how many problems are not in it."""
    left_out = next((model["left_out"] for model in summary["models"] if model.get("left_out")), {})
    return " ".join(filter(None, [_spread(summary), left_out_note(left_out)]))


def _spread(summary: Mapping[str, Any]) -> str:
    if summary.get("seeds"):
        return f"Mean ± standard deviation over {summary['seeds']} seeds."
    problems = {model["problems"] for model in summary["models"] if "problems" in model}
    count = f" on {problems.pop():,} held-out problems" if len(problems) == 1 else ""
    return (
        f"In brackets: 95% intervals{count}, for accuracy Wilson's, for tokens by bootstrap; both know problems apart."
    )
