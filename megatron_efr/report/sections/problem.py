"""A reader: the same problems as each model answered them, thinking folded away."""

from __future__ import annotations

from typing import Any

from megatron_efr.evaluation.records import Record
from megatron_efr.report.records import label
from megatron_efr.report.results import Results
from megatron_efr.report.sentences import Chosen, chosen_problems

_ENDS = "</think>"  # unless the record says what closes a thought
_BOX = "\\boxed{"


def build(results: Results) -> dict[str, Any] | str:
    """The chosen problems, and every model's first response to each."""
    records = {
        m["name"]: record for m in results.models if (record := results.record(m)) is not None
    }
    chosen = chosen_problems(list(records), records)
    if not chosen:
        return "No problem was answered by every model here."
    labels = {model["name"]: label(model) for model in results.models}
    ends = {
        name: (each.get("protocol") or {}).get("model.thinking.closes", _ENDS)
        for name, each in records.items()
    }
    return {"problems": [_problem(each, labels, ends) for each in chosen]}


def _problem(chosen: Chosen, labels: dict[str, str], ends: dict[str, str]) -> dict[str, Any]:
    row = next(iter(chosen.rows.values()))
    longest = max(answer["tokens"][0] for answer in chosen.rows.values())
    return {
        "rule": chosen.rule,
        "question": row["question"],
        "gold": row["gold"],
        "answers": [
            _answer(name, labels[name], ends[name], answer, longest)
            for name, answer in chosen.rows.items()
        ],
    }


def _answer(name: str, text: str, ends: str, answer: Record, longest: int) -> dict[str, Any]:
    thinking, said = split(answer["responses"][0] if answer["responses"] else "", ends)
    return {
        "name": name,
        "label": text,
        "thinking": thinking,
        "text": said,
        "correct": answer["correct"][0],
        "truncated": answer["truncated"][0],
        "tokens": answer["tokens"][0],
        "share": round(100 * answer["tokens"][0] / longest) if longest else 0,
    }


def split(response: str, ends: str = _ENDS) -> tuple[str, str]:
    """The thinking of a response and its answer: what follows `ends`, or else what begins with the
    last box.
    """
    at = response.rfind(ends)
    if at >= 0:
        return response[: at + len(ends)], response[at + len(ends) :].strip("\n")
    at = response.rfind(_BOX)
    return (response[:at], response[at:]) if at > 0 else ("", response)
