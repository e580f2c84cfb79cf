"""The measures, each against brute force that knows nothing of its sums: loops, subsets, truncation
by hand.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.stats

from megatron_efr.errors import UserError
from megatron_efr.evaluation.figures import measured
from megatron_efr.evaluation.lengths import cost_of_pass
from megatron_efr.evaluation.measure import MEASURES, NUMBERED
from megatron_efr.evaluation.measures import named, offered
from megatron_efr.evaluation.records import Early, samples_of, summarise
from megatron_efr.evaluation.responses import reflections, thinking_tokens
from megatron_efr.evaluation.samples import Samples
from megatron_efr.steps import Part
from megatron_efr.types import Prompt, Response
from tests.groups import graded
from tests.scripts import Letters

pytestmark = pytest.mark.alike
LIMIT = 64
Row = dict[str, Any]


def rows(seed: int, problems: int = 12, uneven: bool = True) -> list[Row]:
    """An evaluation drawn at random: problems with 1 to 5 samples, answers right and wrong, none
    and cut off.
    """
    rng = np.random.default_rng(seed)
    made = []
    for index in range(problems):
        n = int(rng.integers(1, 6)) if uneven else 4
        tokens = rng.integers(1, LIMIT + 1, n)
        cut = tokens == LIMIT
        right = (rng.random(n) < rng.choice([0.0, 0.4, 0.8, 1.0])) & ~cut
        answers = [
            None if c else (0 if r else int(rng.integers(1, 4)))
            for r, c in zip(right, cut, strict=True)
        ]
        made.append(
            {
                "id": f"p{index}",
                "dataset": "AB"[index % 2],
                "difficulty": None if index == 3 else str(index % 5),
                "prompt_tokens": int(rng.integers(5, 30)),
                "correct": right.tolist(),
                "tokens": tokens.tolist(),
                "truncated": cut.tolist(),
                "answered": [a is not None for a in answers],
                "answers": answers,
                "thinking": [int(rng.integers(0, t + 1)) for t in tokens],
                "reflections": rng.integers(0, 9, n).tolist(),
                "repetition": rng.random(n).tolist(),
                "early": {
                    "at": [0, 8, 32],
                    "right": rng.choice([0.0, 0.25, 0.5, 1.0], (n, 3)).tolist(),
                },
                "subthoughts": {
                    "answers": (
                        codes := [
                            [[None, 0, 1, 2][c] for c in rng.integers(0, 4, index % 4)]
                            for _ in tokens
                        ]
                    ),
                    "right": [[code == 0 for code in own] for own in codes],
                },
                "direct": [None if code == 3 else int(code) for code in rng.integers(0, 4, 3)],
            }
        )
    return made


def mean(values: Any) -> float:
    known = list(values)
    return math.nan if not known else float(sum(map(Fraction, known)) / len(known))


def over(made: list[Row], of: Any) -> float:
    """The mean over problems of the mean over each one's samples."""
    return mean(mean(of(row, i) for i in range(len(row["correct"]))) for row in made)


def responses(made: list[Row]) -> list[tuple[Row, int]]:
    return [(row, i) for row in made for i in range(len(row["correct"]))]


def vote(row: Row, weigh: Any) -> float:
    """Enumerate the answers; the winners share."""
    lengths: dict[int, list[int]] = {}
    for answer, tokens in zip(row["answers"], row["tokens"], strict=True):
        if answer is not None:
            lengths.setdefault(answer, []).append(tokens)
    scores = {answer: weigh(own) for answer, own in lengths.items()}
    best = [answer for answer, score in scores.items() if score > max(scores.values()) - 1e-12]
    return mean(answer == 0 for answer in best) if best else 0.0


def subsets(row: Row, k: int) -> float:
    drawn = list(itertools.combinations(row["correct"], k))
    return sum(map(any, drawn)) / len(drawn)


def differs(row: Row, i: int) -> float:
    """The share of direct answers that differ; nan: cannot be told."""
    direct, own = [code for code in row["direct"] if code is not None], row["answers"][i]
    return (
        math.nan if own is None or not direct else sum(code != own for code in direct) / len(direct)
    )


def underthought(row: Row, i: int) -> float:
    first = [
        at
        for at, share in zip(row["early"]["at"], row["early"]["right"][i], strict=True)
        if share >= 0.5
    ]
    return max(0.0, 1 - min(first) / row["tokens"][i]) if first else 0.0


def hard_over_easy(made: list[Row]) -> float:
    spent = {
        level: [mean(row["tokens"]) for row in made if row["difficulty"] in level]
        for level in (("0", "1"), ("3", "4"))
    }
    return mean(spent["3", "4"]) / mean(spent["0", "1"])


def correlation(made: list[Row]) -> float:
    pairs = [(differs(row, i), row["tokens"][i]) for row, i in responses(made)]
    known = [pair for pair in pairs if not math.isnan(pair[0])]
    return float(scipy.stats.pearsonr(*zip(*known, strict=True)).statistic)


def of_correct(made: list[Row], key: str, wanted: bool) -> float:
    return mean(row[key][i] for row, i in responses(made) if row["correct"][i] is wanted)


def first_votes(row: Row, most: int) -> bool:
    """The shortest thoughts vote; of the answers with most votes the one of the shortest
    thought.
    """
    ended = sorted(zip(row["thinking"], row["answers"], strict=True), key=lambda pair: pair[0])[
        :most
    ]
    counts = Counter(answer for _, answer in ended if answer is not None)
    best = [
        answer
        for _, answer in ended
        if answer is not None and counts[answer] == max(counts.values())
    ]
    return best[:1] == [0]


def mode(row: Row, i: int) -> bool:
    """The most frequent answer of the subthoughts, the earliest of equals; without any the
    response's own.
    """
    tried = row["subthoughts"]["answers"][i]
    given = [code for code in tried if code is not None]
    return (bool(given) and max(given, key=given.count) == 0) if tried else row["correct"][i]


BRUTE: dict[str, Any] = {
    "accuracy": lambda made: over(made, lambda row, i: row["correct"][i]),
    "all_right": lambda made: mean(all(row["correct"]) for row in made),
    "answered": lambda made: over(made, lambda row, i: row["answered"][i]),
    "majority": lambda made: mean(vote(row, len) for row in made),
    "shortest_majority": lambda made: mean(
        vote(row, lambda own: len(own) / math.log(max(2, sum(own) / len(own)))) for row in made
    ),
    "accuracy_area": lambda made: mean(
        over(made, lambda row, i, t=t: row["correct"][i] and row["tokens"][i] <= t)
        for t in range(LIMIT)
    ),
    "anytime": lambda made: over(made, lambda row, i: mean(row["early"]["right"][i])),
    "tokens": lambda made: over(made, lambda row, i: row["tokens"][i]),
    "tokens_right": lambda made: of_correct(made, "tokens", True),
    "tokens_wrong": lambda made: of_correct(made, "tokens", False),
    "thinking_tokens": lambda made: over(made, lambda row, i: row["thinking"][i]),
    "answer_tokens": lambda made: over(made, lambda row, i: row["tokens"][i] - row["thinking"][i]),
    "tokens_per_right_answer": lambda made: BRUTE["tokens"](made) / BRUTE["accuracy"](made),
    "hard_easy_ratio": hard_over_easy,
    "truncated": lambda made: over(made, lambda row, i: row["tokens"][i] == LIMIT),
    "repetition": lambda made: over(made, lambda row, i: row["repetition"][i]),
    "reflections": lambda made: over(made, lambda row, i: row["reflections"][i]),
    "reflection_density": lambda made: (
        1000
        * sum(sum(row["reflections"]) for row in made)
        / sum(sum(row["tokens"]) for row in made)
    ),
    "underthinking": lambda made: mean(
        underthought(row, i) for row, i in responses(made) if not row["correct"][i]
    ),
    "internal_bias": lambda made: mean(
        mean(own)
        for row in made
        if (own := [d for i in range(len(row["correct"])) if (d := differs(row, i)) >= 0])
    ),
    "internal_bias_length": correlation,
    "cost_of_pass": lambda made: mean(mean(row["tokens"]) / mean(row["correct"]) for row in made),
    "short@1": lambda made: mean(first_votes(row, 1) for row in made),
    "short@2": lambda made: mean(first_votes(row, 2) for row in made),
    "subthought_mode": lambda made: over(made, mode),
    "pass@1": lambda made: mean(subsets(row, 1) for row in made),
    "pass@2": lambda made: mean(subsets(row, 2) for row in made if len(row["correct"]) >= 2),
    "pass@3": lambda made: mean(subsets(row, 3) for row in made if len(row["correct"]) >= 3),
    "early@8": lambda made: over(made, lambda row, i: row["early"]["right"][i][1]),
    "thinking_area@20": lambda made: mean(
        over(made, lambda row, i, t=t: row["correct"][i] and row["thinking"][i] < t)
        for t in range(1, 21)
    ),
}


@pytest.mark.parametrize("name", BRUTE)
def test_a_measure_is_what_brute_force_finds(name: str) -> None:
    for seed in range(6):
        made = rows(seed)
        if name == "short@2":
            made = [row for row in made if len(row["correct"]) > 1]
        if name == "cost_of_pass":  # infinite if a problem is never solved
            made = [row for row in made if any(row["correct"])]
        figure = measured(Samples.of(made, LIMIT), [named(name)])[name]
        assert figure.value == pytest.approx(BRUTE[name](made), rel=1e-12)
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low <= figure.value <= figure.high


def test_brute_force_knows_every_measure() -> None:
    assert {name.partition("@")[0] for name in BRUTE} | {
        "accuracy_within"
    } == MEASURES.keys() | NUMBERED.keys()
    assert all(measure.about and measure.unit for measure in offered(Samples.of(rows(0), LIMIT)))


@pytest.mark.parametrize("budget", [1, 7, 20, 33, 63, 64])
def test_accuracy_at_a_hard_budget_is_that_of_responses_truncated_by_hand(budget: int) -> None:
    made = rows(1, problems=40)
    cut = []
    for row in made:
        over_it = [tokens > budget for tokens in row["tokens"]]
        right = [r and not o for r, o in zip(row["correct"], over_it, strict=True)]
        cut.append(
            row
            | {
                "correct": right,
                "tokens": [min(t, budget) for t in row["tokens"]],
                "truncated": over_it,
            }
        )
    name = f"accuracy_within@{budget}"
    assert (
        measured(Samples.of(made, LIMIT), [named(name)])[name]
        == measured(Samples.of(cut, budget))["accuracy"]
    )


def test_figures_keep_to_their_bounds_and_order() -> None:
    for seed in range(20):
        found = measured(Samples.of(rows(seed, uneven=False), LIMIT))
        for name, figure in found.items():
            if named(name).unit == "%" and figure.value is not None:
                assert 0 <= figure.value <= 1, name
                assert figure.low is not None, name
                assert figure.high is not None, name
                assert 0 <= figure.low <= figure.high <= 1, name
        for order in (
            ["all_right", "accuracy", "pass@2", "pass@4"],
            [
                "accuracy_within@4",
                "accuracy_within@8",
                "accuracy_within@16",
                "accuracy_within@32",
                "accuracy",
            ],
        ):
            values = [found[name].value or 0.0 for name in order]
            assert values == sorted(values)


def test_at_no_and_at_every_right_answer_the_intervals_say_how_little_that_is() -> None:
    def all_of(right: bool) -> Samples:
        made = [row | {"correct": [right] * len(row["correct"])} for row in rows(0, problems=30)]
        return Samples.of(made, LIMIT)

    none, every = measured(all_of(False)), measured(all_of(True))
    assert none["accuracy"] == pytest.approx((0.0, 0.0, 0.1135), abs=1e-4)  # Wilson's of 0 in 30
    assert every["accuracy"] == pytest.approx((1.0, 0.8865, 1.0), abs=1e-4)
    assert none["accuracy_within@32"] == none["pass@1"] == none["accuracy"]
    assert (
        none["tokens_right"]
        == none["tokens_per_right_answer"]
        == none["cost_of_pass"]
        == (None, None, None)
    )
    assert every["tokens_wrong"].value is None
    assert every["cost_of_pass"].value == pytest.approx(every["tokens"].value)


def test_values_between_0_and_1_are_known_as_their_spread_is() -> None:
    made = [row | {"correct": [True] * len(row["correct"])} for row in rows(3, problems=60)]
    made = [row | {"tokens": [30 + tokens % 5 for tokens in row["tokens"]]} for row in made]
    figure = measured(Samples.of(made, LIMIT))["accuracy_area"]
    values = [1 - mean(row["tokens"]) / LIMIT for row in made]
    reach = 1.96 * np.std(values, ddof=1) / math.sqrt(60)
    assert reach < 0.01
    assert figure[1:] == pytest.approx([np.mean(values) - reach, np.mean(values) + reach], abs=1e-4)
    assert {name for name in BRUTE if named(name).fractional} == {
        *("accuracy_area", "anytime", "early@8", "internal_bias", "repetition", "thinking_area@20")
    }


def test_intervals_are_seeded_and_those_of_a_loop() -> None:
    made = rows(2, problems=60)
    samples = Samples.of(made, LIMIT)
    assert measured(samples, seed=3) == measured(samples, seed=3)
    rng = np.random.default_rng(5)
    drawn = [
        BRUTE["tokens_right"]([made[index] for index in rng.integers(0, len(made), len(made))])
        for _ in range(1500)
    ]
    figure = measured(samples, seed=1)["tokens_right"]
    assert figure[1:] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), rel=0.02)
    assert figure[1:] != measured(samples, seed=2)["tokens_right"][1:]


def test_the_cost_of_a_right_answer_has_the_prices_of_reading_and_writing() -> None:
    kept = {key: rows(0)[0][key] for key in ("id", "dataset", "difficulty")}
    said = {
        "correct": [True, False, False, False],
        "tokens": [10, 20, 30, 40],
        "truncated": [False] * 4,
    }
    made = [{**kept, **said, "prompt_tokens": 100}]
    measure = cost_of_pass((1e-6, 4e-6), "dollars")
    found = measured(Samples.of(made), [measure])["cost_of_pass"]
    assert (found.value, measure.unit) == (pytest.approx((100e-6 + 25 * 4e-6) / 0.25), "dollars")


def test_measures_that_the_samples_say_nothing_of_are_missing() -> None:
    bare = [
        {key: row[key] for key in ("id", "dataset", "difficulty", "correct", "tokens", "truncated")}
        for row in rows(0)
    ]
    found = measured(Samples.of(bare))
    assert "accuracy" in found
    for name in (
        "answered",
        "majority",
        "thinking_tokens",
        "repetition",
        "reflections",
        "anytime",
        "internal_bias",
    ):
        assert name not in found
    assert not any(name.startswith(("early", "thinking_area")) for name in found)


def test_a_measure_of_another_name_is_refused_with_the_nearest() -> None:
    for name, said in [
        ("acuracy", "did you mean accuracy"),
        ("pass@x", "did you mean pass@NUMBER"),
        ("zzz", "there are"),
    ]:
        with pytest.raises(UserError, match=f"measure '{name}': no such measure; {said}"):
            named(name)


def test_a_record_gives_back_the_samples_that_its_figures_are_of() -> None:
    groups = [
        graded(
            [1, 0],
            [3, 9],
            ["stop", "length"],
            text="Wait, but no. Verify",
            prompt=Prompt("p0", (1, 2), "q", "4"),
        ),
        graded([1, 1], [20, 30], prompt=Prompt("p1", (1,), "q", "5")),
    ]
    early = Early(
        (0, 2), [[[0.5, 1.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 1.0]]], [["4", "7"], [None, "5"]]
    )
    thoughts = {3: 2, 20: 11, 30: None, 9: None}

    def thought(response: Response) -> int | None:
        return thoughts[response.length]

    record = summarise(
        groups,
        "m",
        answers=[["4", None], ["5", "5"]],
        early=early,
        thinking=thought,
        protocol={"max_new_tokens": 64},
    )
    again = json.loads(json.dumps(record, allow_nan=False))
    assert {
        name: figure._asdict() for name, figure in measured(samples_of(again)).items()
    } == record["measures"]
    assert [row["thinking"] for row in record["rows"]] == [[2, 9], [11, 30]]
    assert [row["answers"] for row in record["rows"]] == [[0, None], [0, 0]]
    assert [row["direct"] for row in record["rows"]] == [[0, 2], [None, 0]]
    assert record["rows"][0]["reflections"] == [3, 3]
    assert record["measures"]["accuracy_within@4"]["value"] == 0.25
    # half of the first's, none of the second's
    assert record["measures"]["internal_bias"]["value"] == 0.25
    assert "thinking" not in summarise(groups, "m", thinking=lambda _: None)["rows"][0]


def test_a_thought_is_counted_up_to_its_mark_in_tokens_that_were_drawn() -> None:
    def said(text: str, *parts: Part) -> Response:
        return Response(Letters().encode(text), np.zeros(len(text)), "stop", text=text, parts=parts)

    def marked(closes: str, response: Response) -> int | None:
        return thinking_tokens(response, closes, Letters())

    assert marked("E", said("ABEDE")) == 3
    assert marked("DE", said("ABEDEF")) == 5  # of several tokens: the fewest whose text has it
    assert marked("E", said("ABCD")) is None
    forced = said(
        "ABCDEFG",
        Part("thought", 0, 3, "length"),
        Part("cut", 3, 5, "forced"),
        Part("answer", 5, 7, "stop"),
    )
    assert marked("E", forced) == marked("DE", forced) == 3


def test_reflection_words_are_whole_words() -> None:
    assert reflections("Wait! checking buttons is wrong, however... BUT verify.") == 5
    assert Counter(
        [reflections(text) for text in ("awaited error-free", "", "However,wait")]
    ) == Counter([1, 0, 2])
