"""Methods that compare with the starting model, that weigh tokens, and experimental ones: against
worked numbers.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_efr import algorithms, methods
from megatron_efr.config import AlgorithmConfig, ConfigError, RolloutConfig
from megatron_efr.methods import Known, Method, Sampled, Samplings, Visit
from megatron_efr.methods.judges import judge_of
from megatron_efr.scripts import Opened, Rounds
from megatron_efr.types import Branch, Finish, Grade, Part, Prompt, Rewarded
from tests.groups import KNOWN, response
from tests.judged import VECTORS, C, L, asked, branched, build, close, outputs, rewarded, trained_on

pytestmark = pytest.mark.alike


def solved(*right: int, lengths: tuple[int, ...] = ()) -> Known:
    """Knowledge of a prompt that the starting model got so right."""
    before = Sampled(lengths or (100,) * len(right), tuple(map(bool, right)))
    return KNOWN._replace(reference={"p": before})


def test_each_response_gains_over_the_starting_models_accuracy() -> None:
    vector, method = VECTORS["adapt_think"], build("adapt_think")
    texts = ["</think>4", "</think>5", "Alright</think>4", "Alright</think>4"]
    known = solved(1, 1, 1, 0, 0)
    assert vector["inputs"]["ref_acc"] == 0.6
    assert trained_on(method, C, L, known, texts=texts) == close(vector["outputs"]["advantage"])
    assert method.samplings == Samplings(reference=16)
    # not closed, closed twice, and opened as well: all wrong, whatever the verifier says
    malformed = ["</think>4", "</think>a</think>4", "Alright, 4", "<think>Alright</think>4"]
    assert trained_on(method, [1] * 4, L, known, texts=malformed) == close(
        [0.45, -0.55, -0.6, -0.6]
    )
    cut = trained_on(
        method, [1] * 4, L, known, texts=texts, finish=["length", "stop", "stop", "stop"]
    )
    assert cut == close([-0.55, 0.45, 0.4, 0.4])
    without = known._replace(marks=KNOWN.marks._replace(opens="") if KNOWN.marks else None)
    assert trained_on(method, [1] * 4, L, without, texts=malformed) == close(
        [0.45, -0.55, -0.6, 0.4]
    )


def test_half_of_a_prompts_responses_are_told_not_to_think() -> None:
    ask = build("adapt_think", samples=8).ask(Visit(Prompt("p", (1,), "q", "1"), 8, 0), KNOWN)
    closed, thinks = (
        Opened(opening="</think>", chance=0.5, limit=4096),
        Opened(opening="Alright", chance=0.5),
    )
    assert ask.scripts == (closed,) * 4 + (thinks,) * 4
    few = build("adapt_think", samples=8, share=0.25, word="So", brief=9)
    closed, thinks = (
        Opened(opening="</think>", chance=0.25, limit=9),
        Opened(opening="So", chance=0.75),
    )
    assert (
        few.ask(Visit(Prompt("p", (1,), "q", "1"), 8, 0), KNOWN).scripts
        == (closed,) * 2 + (thinks,) * 6
    )
    with pytest.raises(
        ConfigError, match=r"^method\.share: 0\.1 of rollout\.samples = 4 .* leaves none"
    ):
        build("adapt_think", share=0.1)


def test_worked_weights_of_the_starting_models_own_responses() -> None:
    vector = outputs("o1_pruner")
    (group,) = rewarded(build("o1_pruner"), [(C, L)])
    assert group.rewards == close(vector["weight"])
    assert trained_on(build("o1_pruner", trained=4), C, L) == close(
        vector["standardised_population"]
    )
    method = build("o1_pruner")
    groups = rewarded(method, [(C, L), ([0, 1, 1, 1], [40, 80, 60, 20])])
    first, second = method.credits(groups, KNOWN) or ()
    trained = np.concatenate([group.rewards[:2] for group in groups])
    standard = (trained - trained.mean()) / trained.std()
    assert np.concatenate([first.advantage[:2], second.advantage[:2]]) == close(standard)
    assert [each.masked.tolist() for each in (first, second) if each.masked is not None] == [
        [False, False, True, True]
    ] * 2
    assert trained_on(method, [1] * 4, [7] * 4).tolist() == [0.0] * 4
    # the spread of five equal weights is 4e-16 in floating point, and not a spread
    one = build("o1_pruner", samples=3, trained=1)
    alike = one.credits(rewarded(one, [([1, 0, 0], [7, 7, 7])] * 5), KNOWN) or ()
    assert [each.advantage[0] for each in alike] == close([0.0] * 5)
    online = build("experimental.o1_pruner_online")
    known = solved(1, 1, 1, 0, lengths=(455, 400, 510, 455))
    assert trained_on(online, C, L, known) == close(vector["weight"])
    assert online.samplings == Samplings(reference=12)
    # 610 / 300 + 5, bounded
    assert trained_on(online, C, L, solved(0, lengths=(910,)))[0] == close(4.0)
    with pytest.raises(
        ConfigError, match=r"^method\.trained: 5 responses of a prompt, and rollout\.samples = 4"
    ):
        build("o1_pruner", trained=5)
    with pytest.raises(ConfigError, match=r"^method\.least: 5 is not below method\.most = 4"):
        build("o1_pruner", least=5.0)


def drawn(method: Method, right: list[int], logprobs: list[float]) -> Rewarded:
    """A group whose responses' tokens have these log-probs, and one that a script forced has
    another.
    """
    (group,) = rewarded(method, [(right, L)])
    responses = []
    for made, logprob in zip(group.group.responses, logprobs, strict=True):
        values = np.full(made.length, logprob, dtype=np.float32)
        values[0] = -50.0
        ends = made.length
        parts = (Part("opening", 0, 1, "forced"), Part("response", 1, ends, "stop"))
        responses.append(replace(made, logprobs=values, parts=parts))
    return replace(
        group, graded=replace(group.graded, group=replace(group.group, responses=tuple(responses)))
    )


def test_worked_coefficients_of_likelihood() -> None:
    """Lengths count drawn tokens: the limit gives way by as much, so that the worked shares
    hold.
    """
    vector, method = VECTORS["drpo"], build("drpo", max_tokens=1000)
    given, expected = vector["inputs"], vector["outputs"]
    for right, key in (
        (given["c"], "gradient_coefficients"),
        (given["second_c"], "second_gradient_coefficients"),
    ):
        (credit,) = method.credits([drawn(method, right, given["s_mean_logp"])], KNOWN) or ()
        assert credit.advantage / 4 == close(expected[key])
    for right in ([1] * 4, [0] * 4):
        assert trained_on(method, right, L).tolist() == [0.0] * 4
    whole = build("drpo", tokens=1000)
    assert np.array_equal(
        trained_on(whole, C, L, KNOWN._replace(limit=1000)), trained_on(method, C, L)
    ), "the limit is the rollouts' where it is left out"
    # a wrong answer that is far shorter does not overflow
    with np.errstate(all="raise", under="ignore"):
        assert trained_on(build("drpo", spread=1e-4), C, L) == close([0.0, -4.0, 0.0, 4.0])
        assert trained_on(build("drpo", spread=1e-4), [1, 0], [39_000, 5]) == close([2.0, -2.0])


def test_the_first_token_is_weighed_apart() -> None:
    method, vector = build("thinkless"), VECTORS["thinkless"]
    texts = ["<short>4" if short else "<think>4" for short in vector["inputs"]["short_mode"]]
    groups = rewarded(method, [(C, L)], texts=texts) + rewarded(
        method, [([1, 1, 0, 0], [5, 6, 7, 8])], texts=["4"]
    )
    assert groups[0].rewards == close(vector["outputs"]["rewards"])
    assert groups[1].rewards == close([-1.0] * 4), "neither token"
    credits = method.credits(groups, KNOWN) or ()
    assert credits[0].advantage == close(vector["outputs"]["advantage"])
    # a mean over all tokens of these weights is control times the mean over first tokens + the mean
    # over the others
    rng = np.random.default_rng(0)
    weights = [each for credit in credits for each in credit.weight or ()]
    losses = [rng.random(len(each)) for each in weights]
    made = sum(float(weight @ loss) for weight, loss in zip(weights, losses, strict=True)) / sum(
        map(len, losses)
    )
    apart = (
        0.001 * np.mean([each[0] for each in losses])
        + np.concatenate([each[1:] for each in losses]).mean()
    )
    assert made == pytest.approx(apart, rel=1e-12)
    with pytest.raises(
        ConfigError,
        match=r"^method\.think: '<short>er' cannot be told from method\.short = '<short>'",
    ):
        build("thinkless", think="<short>er")


def test_a_response_is_held_to_the_budget_that_it_says() -> None:
    texts = [
        "<budget>300</budget>4",
        "<budget>600</budget>4",
        " <budget> 400 </budget>4",
        "<budget></budget>4",
    ]
    # as it says; half of the budget away; a quarter away; no budget
    half, quarter = (1 + math.cos(math.pi / 2)) / 4, (1 + math.cos(math.pi / 4)) / 4
    got = trained_on(build("experimental.self_budgeter"), C, L, texts=texts)
    assert got == close([1.0, -0.5 + half, 0.5 + quarter, -1.0])
    strict = trained_on(build("experimental.self_budgeter", slack=0.2, most=350), C, L, texts=texts)
    assert strict == close([1.0, -0.5 - 0.4, 0.5 - 0.4, -1.0])
    none = trained_on(build("experimental.self_budgeter"), C, L, texts=["<budget>0</budget>4", "4"])
    assert none.tolist() == [-1.0] * 4


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        # both right
        (["</think>4", "So</think>4", "So</think>4", "<think>\n</think>4"], [1.0, -0.1, 0.9, 1.0]),
        # half of them
        (["So</think>4", "</think>4", "So</think>4", "</think>4"], [0.9, 0.0, 0.9, 1.0]),
        # none of one
        (["So</think>4", "</think>4", "So</think>4", "So</think>4"], [1.0, -0.3, 1.0, 1.0]),
        (["So</think>4"], [1.0, 0.0, 1.0, 1.0]),  # nobody tried
    ],
)
def test_a_thought_costs_where_the_group_does_without(
    texts: list[str], expected: list[float]
) -> None:
    assert trained_on(build("experimental.adacot"), C, L, texts=texts) == close(expected)


def test_the_token_that_decides_is_left_out_of_a_later_stage() -> None:
    """Its weight is 0 from that iteration on; the rewards, and the algorithm's advantages of them,
    stay as they are.
    """
    texts = ["</think>4", "So</think>4", "So</think>4", "</think>4"]
    plain = build("experimental.adacot")
    later = build("experimental.adacot", masked_from=5, decides=1)
    rewards = trained_on(plain, C, [3, 1, 2, 4], texts=texts)
    for step, expected in ((4, None), (5, [[1, 0, 1], [1], [1, 0], [1, 0, 1, 1]])):
        known = KNOWN._replace(step=step)
        groups = rewarded(later, [(C, [3, 1, 2, 4])], known, texts=texts)
        (made,) = methods.credit(
            later, algorithms.build(AlgorithmConfig(), RolloutConfig(samples=4)), groups, known
        )
        assert made.credit.advantage == pytest.approx((rewards - rewards.mean()) * 4 / 3)
        weights = made.credit.weight
        assert (weights and [each.tolist() for each in weights]) == expected
    first = build("experimental.adacot", masked_from=1)
    (group,) = rewarded(first, [([1], [2])], texts=texts)
    assert [each.tolist() for each in first.weights(group, KNOWN) or ()] == [[0, 1]]
    with pytest.raises(
        ConfigError, match=r"^method\.decides: 1 has no effect without method\.masked_from"
    ):
        build("experimental.adacot", decides=1)


def left(method: Method, right: list[int], verdicts: list[list[int]]) -> Rewarded:
    """A group of which the answers at exits are as `verdicts` say, two of each exit one after the
    other.
    """
    group = branched(asked(right, [100] * len(right)), method, verdicts)
    return methods.reward(method, group, KNOWN)


def test_a_wrong_response_earns_by_how_far_it_was_right() -> None:
    """Thoughts of 99 tokens, left after 24, 49 and 74 of them."""
    method = build("experimental.sgpo", exits=3)
    none, late, early = [0] * 6, [0, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 0]
    got = left(method, [0, 0, 0], [none, late, early]).rewards
    assert got == close([1 / (1 + math.exp(-10 * (x / 99 - 0.5))) for x in (0, 74, 24)])
    assert left(method, [0, 1, 0], [none, late, early]).rewards.tolist() == [0.0, 1.0, 0.0]
    assert left(method, [0], [late]).group.responses[0].branches[0].at == 24
    flat = left(build("experimental.sgpo", exits=3, slope=1.0, middle=0.0), [0], [early]).rewards
    assert flat == close([1 / (1 + math.exp(-24 / 99))])


JUDGES = """
def sound(prompt, steps):
    return [0.0 if "wrong" in step else 1.0 if prompt.gold in step else 0.5 for step in steps]
def one(prompt):
    return [1.0]
def short(prompt, steps):
    return [1.0]
def large(prompt, steps):
    return [1.5 for _ in steps]
def nothing(prompt, steps):
    return [float("nan") for _ in steps]
def word(prompt, steps):
    return ["good" for _ in steps]
def raises(prompt, steps):
    raise OSError("no answer")
table = {}
"""


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of judges, one of them registered as `registered`."""
    (tmp_path / "judges_of_steps.py").write_text(JUDGES)
    registration = tmp_path / "judges_of_steps-1.0.dist-info"
    registration.mkdir()
    (registration / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: judges_of_steps\nVersion: 1.0\n"
    )
    (registration / "entry_points.txt").write_text(
        "[megatron_efr.judges]\nregistered = judges_of_steps:sound\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    judge_of.cache_clear()


WRONG_STEPS = ["so 1\n\nthen\n\nwrong\n\n1</think>4", "wrong</think>4", "so\n\n \n\n1", "</think>4"]
"""Of four steps the third is wrong; the only one is; none of two; there is none."""


@pytest.mark.parametrize("name", ["judges_of_steps:sound", "registered"])
def test_a_judge_finds_the_first_wrong_step(judges: None, name: str) -> None:
    method = build("experimental.sgpo", judge=name)
    assert method.ask(Visit(Prompt("p", (1,), "q", "1"), 4, 0), KNOWN).scripts == (), (
        "nothing is answered early"
    )
    (group,) = rewarded_plainly(method, [0] * 4)
    assert group.rewards == close([1 / (1 + math.exp(-10 * (x - 0.5))) for x in (2 / 4, 0, 1, 0)])
    strict = build("experimental.sgpo", judge=name, sound=0.6)
    (group,) = rewarded_plainly(strict, [0] * 4)
    assert group.rewards == close([1 / (1 + math.exp(-10 * (x - 0.5))) for x in (1 / 4, 0, 0, 0)])
    (group,) = rewarded_plainly(method, [0, 1, 0, 0])
    assert group.rewards.tolist() == [0, 1, 0, 0], "nobody asks the judge where a response is right"
    assert method.learn({}, [group], KNOWN) == {}
    assert build(**{"name": "experimental.sgpo", **method.model_dump()}) == method, (
        "as the run's folder keeps it"
    )


def rewarded_plainly(method: Method, right: list[int]) -> list[Rewarded]:
    """A group that nobody left early, with the texts of wrong steps."""
    return [methods.reward(method, asked(right, [9] * 4, texts=WRONG_STEPS), KNOWN)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nobody",
            r"no 'nobody'; registered under megatron_efr\.judges: registered; or give module:function",
        ),
        (
            "no_such_module:judge",
            r"no_such_module:judge cannot be imported: ModuleNotFoundError: .* on PYTHONPATH",
        ),
        ("judges_of_steps:gone", r"judges_of_steps:gone cannot be imported: AttributeError"),
        (
            "judges_of_steps:table",
            r".*:table is of type dict; a function of \(prompt, steps\) is required",
        ),
        (
            "judges_of_steps:one",
            r"judges_of_steps:one is not a function of \(prompt, steps\): too many positional",
        ),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_before_work_starts(
    judges: None, name: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^method\.judge: {message}"):
        build("experimental.sgpo", judge=name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", r"returned 1 scores for the 4 steps of a response to prompt p"),
        (
            "large",
            r"returned 1\.5 for step 1 of a response to prompt p, and a score is a number from 0 to 1",
        ),
        ("nothing", r"returned nan for step 1"),
        (
            "word",
            r"failed on prompt p: ValueError: could not convert .*'good'; it has to return a number",
        ),
        ("raises", r"failed on prompt p: OSError: no answer"),
    ],
)
def test_a_judge_that_gives_no_score_is_named(judges: None, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^method\.judge: judges_of_steps:{name} {message}"):
        rewarded_plainly(build("experimental.sgpo", judge=f"judges_of_steps:{name}"), [0] * 4)


def test_options_that_do_not_speak_beside_a_judge_are_refused(judges: None) -> None:
    with pytest.raises(ConfigError, match=r"^method\.exits: \d+ has no effect with method\.judge"):
        build("experimental.sgpo", judge="registered", exits=3)
    with pytest.raises(
        ConfigError, match=r"^method\.sound: 0\.\d has no effect without method\.judge"
    ):
        build("experimental.sgpo", sound=0.9)


def test_a_stretch_earns_what_it_adds_to_the_chance_of_a_right_answer() -> None:
    method = build("experimental.l2t", exits=3, alpha=0.5)
    groups = [left(method, [1, 0], [[0, 0, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0]])]
    (credit,) = method.credits(groups, KNOWN) or ()
    assert credit.advantage.tolist() == [0.5, -0.5]
    first, second = credit.per_token or ()
    expected = np.zeros(100)
    expected[24:49], expected[49:74] = 0.25, 0.25
    assert np.array_equal(first, expected)
    assert np.array_equal(second, -expected)


def test_the_last_round_decides_for_all_of_them() -> None:
    method = build("infty_think", round_tokens=64, rounds=3)
    (script, *_) = method.ask(Visit(Prompt("p", (1,), "q", "1"), 4, 0), KNOWN).scripts
    assert script == Rounds(tokens=64, most=3)
    group = asked([1, 0, 1, 0], [10, 20, 30, 40])
    rounds: list[list[Finish]] = [[], ["stop", "stop"], ["stop"], ["stop", "length"]]
    responses = tuple(
        replace(each, branches=tuple(Branch("round", 0, (response(5, finish),)) for finish in ends))
        for each, ends in zip(group.group.responses, rounds, strict=True)
    )
    right, wrong = Grade("correct"), Grade("wrong")
    verdicts = ((), (wrong, right), (wrong,), (right, right))
    judged = replace(group, group=replace(group.group, responses=responses), branches=verdicts)
    rewarded = methods.reward(method, judged, KNOWN)
    assert rewarded.rewards.tolist() == [1.0, 1.0, 0.0, 0.0], "the last of the fourth was cut"
    (credit,) = method.credits([rewarded], KNOWN) or ()
    assert credit.advantage.tolist() == [0.5, 0.5, -0.5, -0.5]
    assert [each.tolist() for each in credit.branches or ()] == [
        [],
        [0.5, 0.5],
        [-0.5],
        [-0.5, -0.5],
    ]


def test_answers_near_to_right_ones_and_unlike_wrong_ones_earn_more() -> None:
    method: Any = build("experimental.memory_r", size=8)
    first = KNOWN._replace(step=49)
    (group,) = rewarded(method, [([1, 0], [30, 200])], first)
    assert group.rewards.tolist() == [1.0, 0.0], "nothing is known"
    state = method.learn({}, [group], first)
    made = method._embedded(group.graded)
    assert np.linalg.norm(made, axis=1) == pytest.approx(1000, rel=2e-3)
    assert (state["right"], state["wrong"]) == (
        {"p": [1, made[0].tolist()]},
        {"p": [made[1].tolist()]},
    )
    assert (state["near"], state["unlike"]) == ([], [])
    # the very answers again: no way to the right one, and none of the wrong one's novelty
    (again,) = rewarded(method, [([1, 0], [30, 200])], first)
    after = method.learn(state, [again], first)
    far = float(np.linalg.norm(made[1] - made[0]))
    cosine = float(made[0] @ made[1] / np.linalg.norm(made[0]) / np.linalg.norm(made[1]))
    assert after["near"] == pytest.approx([0.0, -far])
    assert after["unlike"] == pytest.approx([1 - cosine, 0.0], abs=1e-9)
    assert after["right"] == {"p": [2, (2 * made[0]).tolist()]}
    later = KNOWN._replace(step=50, state=after)
    assert trained_on(method, [1, 0], [30, 200], later) == close([3.0, 0.0])
    assert trained_on(method, [0, 0], [30, 200], later._replace(step=49)) == close([1.0, 0.0])
    few: Any = build("experimental.memory_r", kept=2, window=3)
    state = {}
    for _ in range(4):
        state = few.learn(state, rewarded(few, [([1, 0, 0], [5, 6, 7])]), KNOWN)
    assert (len(state["wrong"]["p"]), len(state["near"]), len(state["unlike"])) == (2, 3, 3)


def test_a_memory_of_prompts_is_bounded_and_keeps_those_that_came_first() -> None:
    method: Any = build("experimental.memory_r", size=8, remembered=2)
    state: Any = {}
    groups = []
    for name, right in (("a", [1, 1]), ("b", [0, 0]), ("c", [1, 0]), ("d", [1, 0])):
        (group,) = rewarded(method, [(right, [5, 6])])
        prompt = replace(group.group.prompt, id=name)
        groups.append(
            replace(group, graded=replace(group.graded, group=replace(group.group, prompt=prompt)))
        )
    for _ in range(2):
        state = method.learn(state, groups, KNOWN)
    assert (set(state["right"]), set(state["wrong"])) == ({"a", "c"}, {"b", "c"})
    assert [state["right"][name][0] for name in "ac"] == [4, 2], "what is remembered goes on"
    later = KNOWN._replace(state=state, step=50)
    assert method.rewards(groups[3].graded, later).tolist() == [1.0, 0.0], (
        "of the others both parts stay 0"
    )
    whole: Any = build("experimental.memory_r")
    (group,) = rewarded(whole, [([1] * 4 + [0] * 8, range(900, 912))])
    kept = whole.learn({}, [group], KNOWN)
    size = len(json.dumps({"right": kept["right"], "wrong": kept["wrong"]}))
    assert 4000 * size < 12e6, "as the docstring says"


def test_what_a_method_samples_follows_its_options() -> None:
    wanted: Any = {name: build(name, tokens=40_000).samplings for name in methods.METHODS}
    assert {name for name, each in wanted.items() if each.reference} == {
        "adapt_think",
        "experimental.o1_pruner_online",
    }
    assert {name for name, each in wanted.items() if each.monitor} >= {"laser_d", "laser_de"}
    assert build("adapt_think", reference=3).samplings.reference == 3
