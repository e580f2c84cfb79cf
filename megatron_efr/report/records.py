"""Evaluation records and summary.json: graded groups in, JSON-ready figures out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_efr.errors import UserError
from megatron_efr.report import statistics
from megatron_efr.types import Graded

FIGURES = ("accuracy", "tokens")
_SHOWN_CHARACTERS = 6000  # of a sample response: enough to read, and a record of 32k-token answers stays small

Record = dict[str, Any]
Answers = Sequence[Sequence[Hashable | None]]
"""For each problem the key of each response's answer."""


class FamilyError(UserError, ValueError):
    """Families that cannot be put together; the message says how they differ."""


def summarise(
    groups: Sequence[Graded],
    name: str,
    *,
    answers: Answers | None = None,
    left_out: Mapping[str, int] | None = None,
    seed: int = 0,
    shown: int = 2,
) -> Record:
    """The evaluation record of one model: figures of all problems, of each dataset, and a row per problem.

    `groups` are one per problem; dataset and difficulty come from `prompt.meta`, the question
    as people read it from `prompt.meta["question"]` or else `prompt.text`. `answers` [problems][samples] are keys under
    which equal answers are equal (None: no answer); without them there is no majority vote. `left_out` counts problems
    of each data set that were not asked, since their prompts are too long. `seed` draws the bootstrap; the text of the
    first `shown` responses of each problem is kept. ValueError where nothing was evaluated.
    """
    if not groups:
        raise ValueError(f"evaluation {name}: no problems to summarise")
    if answers is not None and len(answers) != len(groups):
        raise ValueError(f"evaluation {name}: answers to {len(answers)} problems, and {len(groups)} problems")
    parts: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        parts.setdefault(str(group.group.prompt.meta.get("dataset", "held-out")), []).append(index)
    return {
        "name": name,
        "left_out": dict(left_out or {}),
        **_figures(groups, answers, seed),
        "datasets": {
            dataset: _figures([groups[i] for i in rows], None if answers is None else [answers[i] for i in rows], seed)
            for dataset, rows in parts.items()
        },
        "rows": [_row(group, shown) for group in groups],
    }


def _figures(groups: Sequence[Graded], answers: Answers | None, seed: int) -> Record:
    rates, lengths = statistics.pass_rates(groups), statistics.mean_lengths(groups)
    accuracy, tokens = float(np.mean(rates)), float(np.mean(lengths))
    right, wrong = statistics.tokens_by_correctness(groups)
    fewest = min(len(group.grades) for group in groups)
    ks = [2**power for power in range(fewest.bit_length())]
    cost = statistics.cost_of_pass(tokens, accuracy)
    samples = sum(len(group.grades) for group in groups)
    return {
        "problems": len(groups),
        "samples": samples,
        "accuracy": accuracy,
        "accuracy_ci": list(statistics.rate_interval(rates, samples)),
        "tokens": tokens,
        "tokens_ci": list(statistics.interval(lengths, seed)),
        "tokens_right": right,
        "tokens_wrong": wrong,
        "tokens_by_difficulty": statistics.by_difficulty(groups, statistics.mean_lengths),
        "accuracy_by_difficulty": statistics.by_difficulty(groups, statistics.pass_rates),
        "truncated": statistics.truncation_rate(groups),
        "pass_at_k": {
            str(k): float(np.mean([statistics.pass_at_k(len(g.grades), int(g.correct.sum()), k) for g in groups]))
            for k in ks
        },
        **_votes(groups, answers),
        "tokens_per_right_answer": cost if np.isfinite(cost) else None,
    }


def _votes(groups: Sequence[Graded], answers: Answers | None) -> Record:
    """Accuracy of the votes over each problem's responses; None where nobody said which answers are equal."""
    if answers is None:
        return {"majority": None, "shortest_majority": None}
    cast = [(own, graded.correct, graded.group.lengths) for own, graded in zip(answers, groups, strict=True)]
    return {
        "majority": float(np.mean([statistics.majority(own, right) for own, right, _ in cast])),
        "shortest_majority": float(np.mean([statistics.shortest_majority(*each) for each in cast])),
    }


def _row(graded: Graded, shown: int) -> Record:
    group, meta = graded.group, graded.group.prompt.meta
    difficulty = meta.get("difficulty")
    return {
        "id": group.prompt.id,
        "dataset": str(meta.get("dataset", "held-out")),
        "difficulty": None if difficulty is None else str(difficulty),
        "question": str(meta.get("question", group.prompt.text)),
        "gold": group.prompt.gold,
        "correct": [bool(value) for value in graded.correct],
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


def describe(record: Record) -> str:
    """The figures of every data set, a line each."""
    lines = [f"{record['name']}:"]
    for dataset, figures in record["datasets"].items():
        low, high = figures["accuracy_ci"]
        lines.append(
            f"  {dataset}: accuracy {figures['accuracy']:.1%} [{low:.1%}, {high:.1%}], "
            f"{figures['tokens']:.1f} tokens, {figures['truncated']:.1%} cut off, "
            f"{figures['samples']} responses to {figures['problems']} problems"
        )
    return "\n".join([*lines, *filter(None, [left_out_note(record["left_out"])])])


def left_out_note(left_out: Mapping[str, int]) -> str:
    """A sentence on the problems that were not asked; empty where all were."""
    if not left_out:
        return ""
    total = sum(left_out.values())
    where = ", ".join(f"{count:,} of {name}" for name, count in left_out.items())
    return (
        f"Left out, since the prompt is longer than prompt.max_tokens: {total:,} problem{'s' * (total > 1)}, {where}."
    )


def _spread(summary: Mapping[str, Any]) -> str:
    if summary.get("seeds"):
        return f"Mean ± standard deviation over {summary['seeds']} seeds."
    problems = {model["problems"] for model in summary["models"] if "problems" in model}
    count = f" on {problems.pop():,} held-out problems" if len(problems) == 1 else ""
    return (
        f"In brackets: 95% intervals{count}, for accuracy Wilson's, for tokens by bootstrap; both know problems apart."
    )
