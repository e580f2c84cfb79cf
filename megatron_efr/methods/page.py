"""The pages of methods, written from their classes: an index and a page for each kind."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from megatron_efr.config.page import default_of, first_sentence, values
from megatron_efr.methods.base import Method
from megatron_efr.methods.plain import Plain
from megatron_efr.methods.registry import METHODS


class Kind(NamedTuple):
    """A heading, and when one takes a method of this kind."""

    title: str
    when: str


KINDS = {
    "efr": Kind(
        "The paper's",
        "Take it first. It has one option that matters, `alpha`: 0 trains for accuracy "
        "alone, 0.4 for brevity. No limit is to be chosen. A length counts only beside "
        "other right responses to the same prompt, so hard prompts may stay long.",
    ),
    "lengths": Kind(
        "Lengths within a group",
        "Take one if you want no limit on tokens, and another price on length than the "
        "paper's. They differ in what a length is compared with: the shortest right "
        "response, the longest, or all of them. More responses per prompt "
        "(`rollout.samples`) give a better comparison.",
    ),
    "limits": Kind(
        "Limits and targets",
        "Take one if you know how many tokens an answer may cost, as with a limit on "
        "latency or on context. All prompts have the same limit, so easy prompts are "
        "shortened little. Begin with a limit that most right responses keep.",
    ),
    "monitored": Kind(
        "Targets by difficulty",
        "Take one if one limit does not fit all prompts and you do not want to choose "
        "several. The targets follow from the model's own right responses, so the run "
        "samples a monitor set every so many iterations.",
    ),
    "iteration": Kind(
        "Decided by the whole iteration",
        "Take it if accuracy falls when every prompt is shortened: only the prompts that "
        "are solved best in an iteration are. It needs many prompts in each iteration "
        "(`rollout.prompts`).",
    ),
    "relative": Kind(
        "Credits of their own",
        "Take one if a reward for brevity gets lost, or takes over, once rewards are "
        "normalised. These methods compute the advantages themselves, in the way of their "
        "source.",
    ),
    "compared": Kind(
        "Compared with the starting model",
        "Take one if accuracy is to be held to that of the starting model. The starting "
        "model is sampled on every training prompt before the first iteration; runs can "
        "share what it said (`data.reference`).",
    ),
    "remembering": Kind(
        "Methods that remember",
        "Take one if the run visits each prompt several times (`hapo`), or if the price "
        "on length is to follow accuracy and length by itself (the others).",
    ),
    "told": Kind(
        "Budgets told in the prompt",
        "Take one if the reader is to choose a length at inference. The question then "
        "says a number of tokens, in training as in use.",
    ),
    "scripted": Kind(
        "Responses made by a script",
        "Take one if the model will be used that way: with a hard budget for its thought "
        "(`elastic`), without a thought (`asrr`), or with a length that is written at its "
        "beginning (`lapo`).",
    ),
    "branching": Kind(
        "Answers before a thought has ended",
        "Take one if the model is to answer well whenever its thought is stopped. Every "
        "response costs further draws, which begin within its thought.",
    ),
    "rounds": Kind(
        "Thoughts in rounds",
        "Take it if thoughts are longer than the context. The model has to know beforehand how to "
        "sum up a round.",
    ),
    "modes": Kind(
        "Modes that the model chooses",
        "Take one if the model is to decide by itself when to think. `adactrl` and "
        "`thinkless` need a model that already knows their marks, from supervised "
        "fine-tuning (`efr sft`).",
    ),
    "experimental": Kind(
        "Experimental",
        "Take one to study it. Their names begin with `experimental.`, and options may change in "
        "the next version.",
    ),
    "prefixes": Kind(
        "Experimental, by prefixes",
        "Take one to study it: `experimental.sgpo` if most prompts get no right response "
        "at all, `experimental.l2t` if parts of a thought are to earn for themselves. "
        "Every response costs further draws, which begin within its thought.",
    ),
}
"""The files of methods, in the order of the index."""

STANDING = {"code": "released code read", "text": "text read", "experimental": "open in part"}

INDEX = """# Methods

A method says what a response earns for being right and brief. An [algorithm](algorithms.md) makes
an update of it. `method: {name: ...}` chooses a method; the other keys of the section are its
options. `examples/kinds.yaml` runs one of every kind on two cores.

Each kind has a page with formulas, sources and options. The pages and this index are written from
the classes in `megatron_efr/methods/`, by `python -m megatron_efr.methods`. [A method of your
own](extending.md#a-method) takes a few lines.

## The kinds
"""

AFTER_KINDS = """
## In every formula

- c is 1 for a right answer and 0 for a wrong one.
- l is the number of generated tokens, without those that a script wrote.
- A response that was cut off counts as wrong.
- Many sources count an answer as wrong without a closing `</think>` or another form.
  Here the verifier alone decides.
- A default is the source's unless the page says that it is this project's.
- `adapt_think` and `experimental.adacot` find the end of a thought by the model's `</think>`, or by
  `model.thinking.closes`. All others find it by their own key `end`.

Plain methods are also functions of who was right and how long each response is:

    from megatron_efr import methods
    methods.rewards("efr", correct=[1, 0, 1], lengths=[300, 900, 500], alpha=0.2)  # [samples]

## What a run keeps for a method

The checkpoints hold what a method remembers and what the run saw of every prompt. A run that is
killed and resumed goes on with both.

Some methods need the starting model's responses to every training prompt. They are drawn before the
first iteration and kept in the run folder as `reference.jsonl`. After a kill only the missing ones
are drawn. `data.reference` names the complete file of another run, so that runs share one.

Some methods need a monitor set. The seed draws it from the training prompts; `experimental.target`
draws it from the held-out problems. It is asked again every so many iterations (`monitor/accuracy`,
`monitor/tokens`). The checkpoints hold the answers.

## All methods

The last column says when a wrong answer can earn more than a right one of its group. With `-` it
never can, whatever the options.
"""


def pages() -> dict[str, str]:
    """The pages, as Markdown, by their paths under docs/."""
    return {"methods.md": _index(), **{f"methods/{kind}.md": _page(kind) for kind in KINDS}}


def _index() -> str:
    return "\n".join([INDEX, *_kinds(), AFTER_KINDS, *_overview(), ""])


def _kinds() -> Iterator[str]:
    yield "| kind | what it is | methods |"
    yield "|---|---|---:|"
    for kind, (title, _) in KINDS.items():
        yield (
            f"| [{title}](methods/{kind}.md) | {first_sentence(_summary(kind))} | "
            f"{len(_methods(kind))} |"
        )


def _overview() -> Iterator[str]:
    yield "| name | kind | source | a wrong answer can earn more than a right one of its group if |"
    yield "|---|---|---|---|"
    for kind, (title, _) in KINDS.items():
        for name, method in _methods(kind):
            link = f"[`{name}`](methods/{kind}.md#{_anchor(name)})"
            plain = ", plain" if issubclass(method, Plain) else ""
            yield (
                f"| {link} | {title.lower()}{plain} | {method.source} | {_wrong_may_win(method)} |"
            )


def _wrong_may_win(method: type[Method]) -> str:
    """Condition under which a wrong answer earns more than a right one; `-` if it never can."""
    chosen = f"(not by default) {method.wrong_may_win_if}" if method.wrong_may_win_if else ""
    return "; or ".join(filter(None, (method.wrong_may_win, chosen))) or "-"


def _page(kind: str) -> str:
    """One kind: what it is, when to take it, and its methods."""
    title, when = KINDS[kind]
    lines = [
        f"# {title}",
        "",
        _summary(kind),
        "",
        textwrap.fill(when, 100),
        "",
        "| name | |",
        "|---|---|",
    ]
    for name, method in _methods(kind):
        lines.append(f"| [`{name}`](#{_anchor(name)}) | {first_sentence(_text(method))} |")
    lines += ["", "[All methods](../methods.md), and what c and l stand for.", ""]
    for name, method in _methods(kind):
        lines += [f"## {name}", "", _text(method), "", *_options(method)]
        lines += [f"Source ({STANDING[method.standing]}): {method.source}.", ""]
    return "\n".join(lines)


def _options(method: type[Method]) -> Iterator[str]:
    if not method.model_fields:
        yield from ("It has no options.", "")
        return
    yield "| key | type | default | |"
    yield "|---|---|---|---|"
    schema = method.model_json_schema()
    for key, field in method.model_fields.items():
        yield (
            f"| `{key}` | {values(schema['properties'][key])} | {default_of(field)} | "
            f"{field.description} |"
        )
    yield ""


def _summary(kind: str) -> str:
    """Description of a kind: its module's docstring, after the colon of its first line."""
    text = (sys.modules[f"{__package__}.{kind}"].__doc__ or "").strip().partition(": ")[2]
    return text[:1].upper() + text[1:]


def _text(method: type[Method]) -> str:
    return inspect.cleandoc(method.__doc__ or "")


def _anchor(name: str) -> str:
    """A method's heading, as links name it."""
    return name.replace(".", "")


def _methods(kind: str) -> list[tuple[str, type[Method]]]:
    return [
        (name, method)
        for name, method in METHODS.items()
        if method.__module__ == f"{__package__}.{kind}"
    ]
