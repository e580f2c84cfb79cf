"""The page of methods, written from their classes: `python -m megatron_efr.methods > docs/methods.md`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator

from megatron_efr.config.page import default_of, values
from megatron_efr.methods.base import Method
from megatron_efr.methods.plain import Plain
from megatron_efr.methods.registry import METHODS

KINDS = {
    "efr": "The paper's",
    "lengths": "Lengths within a group",
    "limits": "Limits and targets",
    "monitored": "Targets by difficulty",
    "iteration": "Decided by the whole iteration",
    "relative": "Credits of their own",
    "compared": "Compared with the starting model",
    "remembering": "Methods that remember",
    "told": "Budgets told in the prompt",
    "scripted": "Responses made by a script",
    "branching": "Answers before a thought has ended",
    "rounds": "Thoughts in rounds",
    "modes": "Modes that the model chooses",
    "experimental": "Experimental",
    "prefixes": "Experimental, on the way",
}
"""The files of methods, in the page's order, and the heading of each."""

STANDING = {"code": "released code read", "text": "text read", "experimental": "open in part"}

INTRODUCTION = """# Methods

A method says what it earns to be right and brief; an [algorithm](algorithms.md) makes an update of it.
`method: {name: ...}` picks one by its name, and the other keys of the section are its options. This page is written
from the classes in `megatron_efr/methods/`, by `python -m megatron_efr.methods > docs/methods.md`.

In the formulas c is 1 for a right answer and 0 for a wrong one, and l is the number of generated tokens. A response
that was cut off counts as wrong. Many a source also counts an answer as wrong without a closing `</think>`, or without
another form; here the verifier alone decides. A default is the source's, if nothing else is said.

The table's last column says when a wrong answer can earn more than a right one; with a `-` it never can, whatever the
options.

Plain methods are also functions of who was right and how long each response is:

    from megatron_efr import methods
    methods.rewards("efr", correct=[1, 0, 1], lengths=[300, 900, 500], alpha=0.2)  # float64 [samples]

What the others remember is in the run's checkpoints, with what was seen of every prompt: a run that is killed and
resumed goes on with it.

Some have the run sample more than its rollouts. The starting model's responses to every training prompt are drawn
before the first iteration, which the run says with their number, and kept in its folder as `reference.jsonl`, prompt by
prompt: after a kill it goes on where it was. `data.reference` names another run's file, so that runs share one; it has
to be there and complete when a run, or a sweep, begins. A monitor set is drawn by the seed from the training prompts
(by one method from the held-out problems), and asked anew every so many iterations (`monitor/accuracy`,
`monitor/tokens`); the checkpoints have what it answered.
`adapt_think` and `experimental.adacot` tell a thought from its answer by the model's `</think>`, or by
`model.thinking.closes`; all others by their own key `end`.

`examples/kinds.yaml` has one of every kind, to be run on two cores. A method of your own:
[CONTRIBUTING](../CONTRIBUTING.md#a-new-method).
"""


def page() -> str:
    """The page, as Markdown."""
    return "\n".join([INTRODUCTION, *_overview(), *(line for kind in KINDS for line in _section(kind))])


def _overview() -> Iterator[str]:
    yield "| name | kind | source | a wrong answer can earn more than a right one of its group if |"
    yield "|---|---|---|---|"
    for kind, title in KINDS.items():
        for name, method in _methods(kind):
            link = f"[`{name}`](#{name.replace('.', '')})"
            plain = ", plain" if issubclass(method, Plain) else ""
            yield f"| {link} | {title.lower()}{plain} | {method.source} | {_wrong_may_win(method)} |"
    yield ""


def _wrong_may_win(method: type[Method]) -> str:
    """When a wrong answer can earn more than a right one; `-` if it never can."""
    chosen = f"(not by default) {method.wrong_may_win_if}" if method.wrong_may_win_if else ""
    return "; or ".join(filter(None, (method.wrong_may_win, chosen))) or "-"


def _section(kind: str) -> Iterator[str]:
    yield f"## {KINDS[kind]}"
    yield ""
    summary = (sys.modules[f"{__package__}.{kind}"].__doc__ or "").strip().partition(": ")[2]
    yield summary[:1].upper() + summary[1:]
    yield ""
    for name, method in _methods(kind):
        yield f"### {name}"
        yield ""
        yield inspect.cleandoc(method.__doc__ or "")
        yield ""
        yield f"Source ({STANDING[method.standing]}): {method.source}."
        yield ""
        yield from _options(method)


def _options(method: type[Method]) -> Iterator[str]:
    yield "| key | type | default | |"
    yield "|---|---|---|---|"
    schema = method.model_json_schema()
    for key, field in method.model_fields.items():
        yield f"| `{key}` | {values(schema['properties'][key])} | {default_of(field)} | {field.description} |"
    yield ""


def _methods(kind: str) -> list[tuple[str, type[Method]]]:
    return [(name, method) for name, method in METHODS.items() if method.__module__ == f"{__package__}.{kind}"]
