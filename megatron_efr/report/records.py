"""Evaluation records and summary.json: graded groups in, JSON-ready figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_efr.report import statistics
from megatron_efr.types import Group

FIGURES = ("accuracy", "tokens")
_SHOWN_CHARACTERS = 6000  # of a sample response: enough to read, and a record of 32k-token answers stays small

Record = dict[str, Any]


def summarise(
    groups: Sequence[Group],
    name: str,
    *,
    answers: Sequence[Sequence[str | None]] | None = None,
    seed: int = 0,
    shown: int = 2,
) -> Record:
    """The evaluation record of one model: figures of all problems, of each dataset, and a row per problem.

    `groups` are graded (`correct` set), one per problem; dataset and difficulty come from `prompt.meta`, the question
    as people read it from `prompt.meta["question"]` or else `prompt.text`. `answers` [problems][samples] are keys under
    which equal answers are equal (None: no answer); without them there is no majority vote. `seed` draws the bootstrap;
    the text of the first `shown` responses of each problem is kept. ValueError where nothing was evaluated or graded.
    """
    if not groups:
        raise ValueError(f"evaluation {name}: no problems to summarise")
    if answers is not None and len(answers) != len(groups):
        raise ValueError(f"evaluation {name}: answers to {len(answers)} problems, and {len(groups)} problems")
    parts: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        parts.setdefault(str(group.prompt.meta.get("dataset", "held-out")), []).append(index)
    return {
        "name": name,
        **_figures(groups, answers, seed),
        "datasets": {
            dataset: _figures([groups[i] for i in rows], None if answers is None else [answers[i] for i in rows], seed)
            for dataset, rows in parts.items()
        },
        "rows": [_row(group, shown) for group in groups],
    }


def _figures(groups: Sequence[Group], answers: Sequence[Sequence[str | None]] | None, seed: int) -> Record:
    rates, lengths = statistics.pass_rates(groups), statistics.mean_lengths(groups)
    accuracy, tokens = float(np.mean(rates)), float(np.mean(lengths))
    right, wrong = statistics.tokens_by_correctness(groups)
    fewest = min(len(group.responses) for group in groups)
    ks = [2**power for power in range(fewest.bit_length())]
    cost = statistics.cost_of_pass(tokens, accuracy)
    return {
        "problems": len(groups),
        "samples": sum(len(group.responses) for group in groups),
        "accuracy": accuracy,
        "accuracy_ci": list(statistics.interval(rates, seed)),
        "tokens": tokens,
        "tokens_ci": list(statistics.interval(lengths, seed)),
        "tokens_right": right,
        "tokens_wrong": wrong,
        "tokens_by_difficulty": statistics.by_difficulty(groups, statistics.mean_lengths),
        "accuracy_by_difficulty": statistics.by_difficulty(groups, statistics.pass_rates),
        "truncated": statistics.truncation_rate(groups),
        "pass_at_k": {
            str(k): float(
                np.mean([statistics.pass_at_k(len(g.responses), int(statistics.graded(g).sum()), k) for g in groups])
            )
            for k in ks
        },
        "majority": None
        if answers is None
        else float(
            np.mean([statistics.majority(a, statistics.graded(g)) for a, g in zip(answers, groups, strict=True)])
        ),
        "tokens_per_right_answer": cost if np.isfinite(cost) else None,
    }


def _row(group: Group, shown: int) -> Record:
    meta, correct = group.prompt.meta, statistics.graded(group)
    difficulty = meta.get("difficulty")
    return {
        "id": group.prompt.id,
        "dataset": str(meta.get("dataset", "held-out")),
        "difficulty": None if difficulty is None else str(difficulty),
        "question": str(meta.get("question", group.prompt.text)),
        "gold": group.prompt.gold,
        "correct": [bool(value) for value in correct],
        "tokens": [response.length for response in group.responses],
        "truncated": [response.truncated for response in group.responses],
        "responses": [_clip(response.text) for response in group.responses[:shown]],
    }


def _clip(text: str) -> str:
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


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
    models = [{"name": name, "alpha": alphas[name], **{key: evaluations[name][key] for key in keys}} for name in names]
    return {"models": models, "seconds": dict(seconds)}


def _base_first(alpha: float | None) -> float:
    return -1.0 if alpha is None else alpha


def over_seeds(summaries: Sequence[Record]) -> Record:
    """One summary of several seeds' summaries of the same family: each figure's mean and spread over the seeds.

    `accuracy` and `tokens` become means over seeds, `accuracy_sd` and `tokens_sd` the standard deviation (ddof 1, None
    for one seed), `accuracy_by_seed` and `tokens_by_seed` the values; intervals within a seed are dropped, since they
    measure something else. ValueError where the families differ.
    """
    families = [[(model["name"], model["alpha"]) for model in summary["models"]] for summary in summaries]
    if not families or any(family != families[0] for family in families):
        raise ValueError(f"seeds can be put together only for one family of models, not {families}")
    models = [_over_seeds([summary["models"][i] for summary in summaries]) for i in range(len(families[0]))]
    parts = list(summaries[0]["seconds"])
    seconds = {part: float(np.mean([summary["seconds"].get(part, 0.0) for summary in summaries])) for part in parts}
    return {"seeds": len(summaries), "models": models, "seconds": seconds}


def _over_seeds(models: Sequence[Record]) -> Record:
    first = models[0]
    merged: Record = {"name": first["name"], "alpha": first["alpha"]}
    for key in ("problems", "samples"):
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
    """What the brackets, or the ±, in a table of this summary mean."""
    if summary.get("seeds"):
        return f"Mean ± standard deviation over {summary['seeds']} seeds."
    problems = {model["problems"] for model in summary["models"] if "problems" in model}
    count = f" on {problems.pop():,} held-out problems" if len(problems) == 1 else ""
    return f"In brackets: 95% bootstrap intervals, resampled by problem{count}."
