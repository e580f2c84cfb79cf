"""Two evaluations of the same problems compared: what their protocols differ in, paired intervals
and tests.

Both models are resampled by the same draws of problems, so that what makes a problem hard for both
falls out of the difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from megatron_efr.config.leaves import leaves
from megatron_efr.errors import UserError
from megatron_efr.evaluation.figures import Figure, figures_of, resampled, spread, summed
from megatron_efr.evaluation.forgetting import Turned, turned
from megatron_efr.evaluation.lengths import cost_of_pass
from megatron_efr.evaluation.measure import Better, Measure
from megatron_efr.evaluation.measures import named, offered
from megatron_efr.evaluation.records import Record, samples_of
from megatron_efr.evaluation.relative import RELATIVE, Relative
from megatron_efr.evaluation.samples import Samples
from megatron_efr.evaluation.statistics import mcnemar
from megatron_efr.types import FloatArray

FLIPS = 10_000
_CHUNK = 4_000_000  # flips held at once: 32 MB
_ROUNDING = 1e-12  # of a figure


class Paired(NamedTuple):
    """One measure of both, and the other's less the one's: its 95% interval by paired bootstrap
    over problems, and the chance of a difference as large if the models were the same, by `test`.
    None: it cannot be said.
    """

    name: str
    unit: str
    better: Better
    one: Figure
    other: Figure
    difference: Figure
    p: float | None
    test: str


class Comparison(NamedTuple):
    """`other` against `one`: `relative` takes `one` as the base, and so does `turned`, by data set.
    `unlike` says what their protocols differ in.
    """

    problems: int
    unlike: list[str]
    figures: list[Paired]
    relative: dict[str, Figure]
    datasets: dict[str, list[Paired]]
    difficulties: dict[str, list[Paired]]
    turned: dict[str, Turned]


def compare(
    one: Record,
    other: Record,
    measures: Sequence[Measure] = (),
    *,
    prices: tuple[float, float] | None = None,
    seed: int = 0,
    unlike: bool = False,
) -> Comparison:
    """Compare two records on the problems that both have, by these measures, or by all that apply
    to both.

    `prices` are of a token read and of one drawn, for the cost of a right answer. UserError if
    their protocols differ, which names the keys, unless `unlike` ones are to be compared; if they
    have no problem in common; and for one of `measures`, or the cost, that either says nothing of.
    """
    differences = differing(one, other)
    if differences and not unlike:
        said = "".join(f"  {line}\n" for line in differences)
        raise UserError(
            f"the two were not asked or judged alike:\n{said}to compare them all the same, give "
            "--unlike"
        )
    # problems that both have, and the measures that both can give
    a, b = matched(one, other)
    asked = [*measures, *([cost_of_pass(prices, "money")] if prices is not None else [])]
    for measure in asked:
        if measure.terms(a) is None or measure.terms(b) is None:
            raise UserError(
                f"measure {measure.name}: one of the two records does not say what it needs"
            )
    # their differences, on all problems and on parts of them
    shown = {measure.name: measure for measure in [*(measures or _offered(a, b)), *asked]}
    datasets, others = a.by_dataset(), b.by_dataset()
    return Comparison(
        len(a.ids),
        differences,
        paired(a, b, list(shown.values()), seed),
        {name: against_base(b, a, measure, seed) for name, measure in RELATIVE.items()},
        _by_part(datasets, others, seed),
        _by_part(a.by_difficulty(), b.by_difficulty(), seed),
        {name: turned(own, others[name], seed) for name, own in datasets.items()},
    )


def _offered(one: Samples, other: Samples) -> list[Measure]:
    common = {measure.name for measure in offered(other)}
    return [measure for measure in offered(one) if measure.name in common]


def _by_part(
    one: Mapping[str, Samples], other: Mapping[str, Samples], seed: int
) -> dict[str, list[Paired]]:
    """Accuracy and tokens of each data set, or of each difficulty; nothing if there is one
    alone.
    """
    if len(one) < 2:
        return {}
    measures = [named("accuracy"), named("tokens")]
    return {name: paired(own, other[name], measures, seed) for name, own in one.items()}


def differing(one: Record, other: Record) -> list[str]:
    """List the keys that two records' protocols differ in, as `key: one, and other`; one without
    any differs in all.
    """
    protocols = (record.get("protocol") for record in (one, other))
    a, b = (dict(leaves("", protocol)) if protocol else {} for protocol in protocols)
    if not (a and b):
        return [
            "protocol: a record that says none was made by an older version; evaluate again to "
            "have it say so"
        ]
    missing = "not there"
    keys = [key for key in dict.fromkeys([*a, *b]) if a.get(key, missing) != b.get(key, missing)]
    return [f"{key}: {a.get(key, missing)}, and {b.get(key, missing)}" for key in keys]


def matched(one: Record, other: Record) -> tuple[Samples, Samples]:
    """The samples of the problems that both have, in the order of `one`, up to the lower limit of
    the two.

    UserError if there are none, or one name stands for two problems.
    """
    rows, others = (
        {row["id"]: index for index, row in enumerate(record["rows"])} for record in (one, other)
    )
    both = [id for id in rows if id in others]
    if not both:
        raise UserError("the two have no problem in common")
    for id in both:
        mine, theirs = one["rows"][rows[id]], other["rows"][others[id]]
        if (mine["question"], mine["gold"]) != (theirs["question"], theirs["gold"]):
            raise UserError(
                f"problem {id} is not the same in both: {mine['question']!r}, "
                f"{theirs['question']!r}"
            )
    a = samples_of(one).take([rows[id] for id in both])
    b = samples_of(other).take([others[id] for id in both])
    limit = min(a.limit, b.limit)
    return replace(a, limit=limit), replace(
        b, limit=limit, datasets=a.datasets, difficulties=a.difficulties
    )


def paired(
    one: Samples, other: Samples, measures: Sequence[Measure], seed: int = 0
) -> list[Paired]:
    """Each measure of both, which have the same problems; those that either says nothing of are
    left out.

    Of a rate that says nothing of some problems, such as pass@k of those with fewer samples, the
    difference is over the problems that it says something of for both.
    """
    # measures that both can give, as terms of each problem
    shown = [
        (measure, mine, theirs)
        for measure in measures
        if (mine := measure.terms(one)) is not None and (theirs := measure.terms(other)) is not None
    ]
    if not shown:
        return []
    # a figure is of all problems of a model, a difference of those that both speak of
    parts = [(measure, *_of_both(measure, mine, theirs)) for measure, mine, theirs in shown]
    mine = np.concatenate([terms for _, terms, _ in shown], axis=1)
    theirs = np.concatenate([terms for _, _, terms in shown], axis=1)
    a = np.concatenate([terms for _, terms, _ in parts], axis=1)
    b = np.concatenate([terms for _, _, terms in parts], axis=1)
    # the same draws of problems for the figures of each, [mine, theirs], and for their difference,
    # [a, b]
    drawn = np.split(resampled(np.concatenate([mine, theirs, a, b], axis=1), seed), 4, axis=1)
    figures = (
        figures_of([(measure, terms) for measure, terms, _ in shown], drawn[0], len(one.tokens)),
        figures_of([(measure, terms) for measure, _, terms in shown], drawn[1], len(other.tokens)),
    )
    sums = _Sums(summed(a), summed(b))
    differing_by = _Sums(*drawn[2:])
    flipped = _flipped(a, b, seed)
    # each measure's difference, its interval, and its chance under the null hypothesis
    rows = []
    first = 0
    for measure, terms, _ in parts:
        columns = slice(first, first + terms.shape[1])
        first = columns.stop
        found = float(sums.difference(measure, columns))
        head = (
            measure.name,
            measure.unit,
            measure.better,
            figures[0][measure.name],
            figures[1][measure.name],
        )
        if math.isfinite(found):
            # sums of another order differ by rounding, which is no difference
            rounding = sums.rounding(measure, columns)
            found = 0.0 if abs(found) <= rounding else found
            difference = Figure(found, *spread(differing_by.difference(measure, columns)))
            by_chance = flipped.difference(measure, columns)
            rows.append(
                Paired(
                    *head, difference, *_test(measure, one, other, by_chance, abs(found) - rounding)
                )
            )
        else:
            rows.append(Paired(*head, Figure(None), None, ""))
    return rows


def _of_both(measure: Measure, one: FloatArray, other: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The terms of both, without the problems that do not count for one of them."""
    if not measure.rate:
        return one, other
    both = (one[:, 1:] > 0) & (other[:, 1:] > 0)
    return one * both, other * both


class _Sums(NamedTuple):
    """The sums of both models' terms, [..., terms] each."""

    one: FloatArray
    other: FloatArray

    def difference(self, measure: Measure, columns: slice) -> FloatArray:
        """The other's figure less the one's, [...]; its terms are in these columns."""
        with np.errstate(invalid="ignore"):  # infinite less infinite
            return measure.value(self.other[..., columns]) - measure.value(self.one[..., columns])

    def rounding(self, measure: Measure, columns: slice) -> float:
        """The difference that two figures which are equal may have, since their sums are of another
        order.
        """
        return _ROUNDING * max(abs(float(measure.value(sums[..., columns]))) for sums in self)


def _test(
    measure: Measure, one: Samples, other: Samples, by_chance: FloatArray, least: float
) -> tuple[float, str]:
    """The p of a difference, and the name of its test: McNemar's if every problem is right or
    wrong, else sign-flip.

    Of the differences `by_chance` those count that are `least` or larger.
    """
    if measure.name == "accuracy" and np.all(one.sizes == 1) and np.all(other.sizes == 1):
        return mcnemar(
            int((one.correct & ~other.correct).sum()), int((other.correct & ~one.correct).sum())
        ), "McNemar"
    return _chance(by_chance, least), "sign-flip"


def _chance(by_chance: FloatArray, least: float) -> float:
    """The share of differences that are at least so large, the one found among them."""
    known = np.abs(by_chance[np.isfinite(by_chance)])
    return float((1 + (known >= least).sum()) / (1 + len(known)))


def _flipped(a: FloatArray, b: FloatArray, seed: int) -> _Sums:
    """Sums of both, FLIPS times with the models of each problem swapped at random, as if they were
    the same.
    """
    rng = np.random.default_rng([seed, 1])
    chunk = max(1, _CHUNK // len(a))
    starts = range(0, FLIPS, chunk)
    moved = np.concatenate(
        [
            rng.integers(0, 2, (min(chunk, FLIPS - start), len(a))).astype(np.float64) @ (b - a)
            for start in starts
        ]
    )
    return _Sums(a.sum(axis=0) + moved, b.sum(axis=0) - moved)


def against_base(own: Samples, base: Samples, measure: Relative, seed: int = 0) -> Figure:
    """A measure of a model against its base, on the same problems, with its interval by paired
    bootstrap.
    """
    mine, bases = measure.terms(own), measure.terms(base)
    if mine is None or bases is None:
        return Figure(None)
    found = float(measure.value(summed(mine), summed(bases)))
    drawn = np.split(resampled(np.concatenate([mine, bases], axis=1), seed), 2, axis=1)
    return Figure(found, *spread(measure.value(*drawn))) if math.isfinite(found) else Figure(None)
