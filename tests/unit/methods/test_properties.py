"""Properties of every method: bounds, signs, what is said of it, and what is refused."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_efr import algorithms, methods
from megatron_efr.algorithms import rloo
from megatron_efr.config import AlgorithmConfig, ConfigError, RolloutConfig
from megatron_efr.methods import METHODS, Known, Outcomes, Sampled, Seen
from megatron_efr.methods.__main__ import write
from megatron_efr.methods.page import pages
from megatron_efr.types import Credit, Finish, Rewarded
from tests.groups import KNOWN, graded
from tests.judged import C, L, asked, build, close, drawn_groups, outputs, rewarded, trained_on

pytestmark = pytest.mark.alike


# -- properties --------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[list[int], list[int]]] = {
    "mixed": (C, L),
    "all right": ([1, 1, 1, 1], L),
    "all wrong": ([0, 0, 0, 0], L),
    "one right": ([0, 1, 0, 0], L),
    "equal lengths": (C, [300, 300, 300, 300]),
}
BOUNDS = {
    "efr": (0.8, 1, 0, 0), "shorterbetter": (-38, 2, -40, 0), "kimi": (0.5, 1.5, -0.5, 0), "lapo": (1, 1.7, 0, 0),
    "prime_rl": (0.55, 1, -0.45, 0), "overlong": (0, 1, -2, -1), "thinkprune": (0, 1, 0, 0), "cosine": (-10, 2, -10, 0),
    "laser": (1, 1.5, -0.5, -0.5), "dler": (0, 1, 0, 0), "da_dler": (0, 1, 0, 0), "stop_properly": (1, 1, 0, 0),
    "experimental.alp": (0.996, 1, -0.004, 0), "experimental.gr3": (0, 1, 0, 0), "grpo_lambda": (0.8, 1, 0, 0),
    "hapo": (0.3, 2, -1, 0), "short_rl": (2.5, 3.5, -0.5, -0.5), "leash": (-1, 1, -1, -1), "a_dlp": (-39, 1, -40, 0),
    "acoer": (1, 1.02, 0, 0), "twyn": (-0.1, 4, -4, 0), "gfpo": (0, 4, -4, 0), "gdpo": (-4, 4, -4, 4),
    "qglas": (0, 2, -1, 0), "l1_exact": (-11, 1, -12, 0), "l1_max": (-11, 1, -12, 0), "asrr": (0.5, 1, 0, 0),
    "elastic": (1, 1, 0, 0), "autothink": (0, 2, -2, 0), "adactrl": (0.5, 2, -0.5, 0.5),
    "grlc": (0, 3, -1, 2), "experimental.effort": (0.6, 1, 0, 0), "experimental.target": (1, 1, 0, 0),
    "laser_d": (1, 1.5, -0.5, -0.5),
    "laser_de": (1, 1.5, -0.5, 0),
    "anytime": (-1, 1, -1, 1), "mrt": (0, 1, -1, 0), "s_grpo": (-0.35, 1, -0.5, 0), "jet": (-3, 7, -7, 0),
    "drpo": (0, 12, -12, 0), "o1_pruner": (-1, 1, -1, 1),
    "adapt_think": (-0.5, 0.55, -0.5, -0.45), "thinkless": (-0.5, 2, -2, 0),
    "experimental.o1_pruner_online": (-2, 4, -2, 4), "experimental.self_budgeter": (-1, 1, -1, 0),
    "experimental.adacot": (0.7, 1, -0.3, 0), "experimental.memory_r": (1, 3, 0, 2),
    "infty_think": (0, 1, -1, 0), "experimental.sgpo": (1, 1, 0, 1), "experimental.l2t": (0, 1, -1, 0),
}  # fmt: skip
"""Least and most that a right answer may earn, and a wrong one: rewards, or advantages if the method gives them."""
PRICED = {
    "laser_de",
    "o1_pruner",
    "experimental.o1_pruner_online",
    "adapt_think",
    "shorterbetter",
    "kimi",
    "overlong",
    "cosine",
    "gdpo",
    "experimental.alp",
    "a_dlp",
    "l1_exact",
    "l1_max",
}
"""Methods that tell wrong answers apart by their lengths, whatever else is in the group."""
BRANCHING = {"anytime", "mrt", "s_grpo", "experimental.sgpo"}
"""Methods to which what a thought would have answered before tells responses apart, whatever their own answer."""
NOT_MONOTONE = {
    "lapo": "a middle length earns most",
    "adapt_think": "one that does not think earns more, however long",
    "experimental.memory_r": "what is nearer to earlier answers earns more",
    "l1_exact": "the budget earns most",
    "l1_max": "an exact budget earns most",
    **dict.fromkeys(BRANCHING, "what it would have answered before decides"),
}
SAID = ["...\nFirst, 2", "...\n</think>\n4", "[Easy] 4", "[Hard] 4"]
"""Texts of responses by which modes are told."""
TEXTS = {
    "adapt_think": ["</think>4", "</think>4", "Alright</think>4", "Alright 4"],
    "thinkless": ["<short>4", "<think>2</think>4"],
    "experimental.adacot": ["</think>4", "So 2</think>4"],
    "experimental.self_budgeter": ["<budget>300</budget>4", "4", "<budget>9</budget>4"],
}
"""The same, of methods that look for others."""


def knowns(name: str) -> list[Known]:
    """Knowledge that a method may meet: none, and a history of which it makes use."""
    if name == "experimental.memory_r":
        before = build(name).learn({}, rewarded(build(name), [(C, L), ([0, 0], [7, 80])]), KNOWN)
        near = KNOWN._replace(step=60, state={**before, "near": [-110.0, 0.0], "unlike": [0.0, 0.001]})
        return [KNOWN, near]
    if name in ("laser_d", "laser_de"):
        monitored = {
            "hard": Sampled((700, 900, 2000, 9000), (True, False, False, False)),
            "easy": Sampled((90,), (True,)),
        }
        return [KNOWN, KNOWN._replace(monitor=monitored)]
    seen = Seen(visits=1, responses=4, right=2, right_tokens=1200, shortest_right=250, last_step=1)
    return [KNOWN, KNOWN._replace(history={"p": seen})] if name == "hapo" else [KNOWN]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_bounds_and_signs(name: str) -> None:
    method, (low, high, wrong_low, wrong_high) = build(name), BOUNDS[name]
    for right, lengths in [*KINDS.values(), *drawn_groups(1, 80)]:
        for known in knowns(name):
            said = TEXTS.get(name, SAID)
            got, hit = trained_on(method, right, lengths, known, texts=said), np.array(right, dtype=bool)
            if name == "o1_pruner":  # the others are not trained on
                got, hit = got[: method.trained], hit[: method.trained]
            assert got.dtype == np.float64
            assert np.all(np.isfinite(got))
            assert np.all((got[hit] >= low - 1e-9) & (got[hit] <= high + 1e-9)), (right, lengths, got)
            assert np.all((got[~hit] >= wrong_low - 1e-9) & (got[~hit] <= wrong_high + 1e-9)), (right, lengths, got)


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(NOT_MONOTONE)))
def test_a_longer_right_answer_never_earns_more(name: str) -> None:
    method = build(name)
    for right, lengths in [*KINDS.values(), *drawn_groups(2, 80)]:
        for known in knowns(name):
            got, hit = trained_on(method, right, lengths, known), np.array(right, dtype=bool)
            earned = got[hit][np.argsort(np.array(lengths)[hit], kind="stable")]
            if name == "gfpo":  # what is not kept gets 0, and what is kept gets more or nothing
                earned = earned[earned > 0]
            assert np.all(np.diff(earned) <= 1e-9), (right, lengths, got)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_wrong_answer_earns_more_than_a_right_one_only_where_that_is_said(name: str) -> None:
    method = build(name, beta=1e-4) if name == "experimental.alp" else build(name)
    found = []
    few = ([1] + [0] * 11, [5] * 12, [f"{'t' * 90}</think>{'a' * 90}", *["t</think>a"] * 11])
    drawn = [(right, lengths, TEXTS.get(name, SAID)) for right, lengths in [*KINDS.values(), *drawn_groups(3, 100)]]
    for right, lengths, texts in [few, *drawn]:
        for known in knowns(name):
            got, hit = trained_on(method, right, lengths, known, texts=texts), np.array(right, dtype=bool)
            if hit.any() and not hit.all() and got[~hit].max() > got[hit].min() + 1e-9:
                found.append((right, lengths, got))
    assert bool(found) == bool(method.wrong_may_win), (method.wrong_may_win, found[:1])


CHOSEN: dict[str, list[dict[str, Any]]] = {
    "hapo": [{"weight": 2.0}], "adactrl": [{"tag": 1.0}], "overlong": [{"floor": False, "max_tokens": 100}],
    "short_rl": [{"right": -2.0}, {"wrong": 1.9}], "autothink": [{"stage": 3, "decay": 3.0}],
    "grlc": [{"thinking": 3.0, "answer": 3.0, "thinking_bonus": 0.0, "answer_bonus": 0.0}],
    "cosine": [{"wrong_long": 3.0, "exceeded": None}], "gdpo": [{"short": 3.0}],
    "efr": [{"alpha": 0.99}], "kimi": [{}], "prime_rl": [{"length": 1.0, "prompt": 1.0, "turns": 1.0}],
    "laser": [{"wrong": 0.99, "unanswered": 0.99}], "laser_d": [{"wrong": 0.99, "unanswered": 0.99, "bonus": 9.0}],
    "infty_think": [{}], "experimental.sgpo": [{"slope": 99.0}], "experimental.l2t": [{"alpha": 9.0}],
    "drpo": [{"spread": 0.001}, {"tau": 0.001}], "adapt_think": [{"delta": 2.0}], "thinkless": [{"thinking": -3.0}],
    "experimental.adacot": [{"missed": 1.5}, {"needless": 1.5}],
    "laser_de": [{"wrong": 0.6, "lowest": 60}, {"unanswered": 0.6, "lowest": 60}],
    "dler": [{"limit": 50}], "da_dler": [{"easy": 5, "hard": 50}],
    "thinkprune": [{"limit": 50}], "stop_properly": [{"cut_off": -9.0}], "grpo_lambda": [{"share": 1.0, "alpha": 0.99}],
    "twyn": [{"margin": 1.0}], "gfpo": [{"keep": 1}, {"keep": 3, "by": "reward_per_token"}],
    "qglas": [{"low": 5.0, "high": 9.0}, {"low": 0.0, "high": 0.0}], "leash": [{"target": 1, "start": 1.0}],
    "acoer": [{"start": 9.0, "budget": 512}], "asrr": [{"beta": 1.0, "tau": 0.0, "window": 1.0}],
    "elastic": [{}], "lapo": [{"weight": 9.0}], "experimental.gr3": [{"alpha": 99.0}],
    "experimental.effort": [{"low": 0.99}], "mrt": [{"answers": 3}], "jet": [{"form": 1.0, "least": 0.0, "alpha": 9.0}],
}  # fmt: skip
"""Options away from the defaults, of every method that does not let a wrong answer win by its nature."""


@pytest.mark.parametrize("name", sorted(CHOSEN))
def test_other_options_let_a_wrong_answer_win_only_where_that_is_said(name: str) -> None:
    for options in CHOSEN[name]:
        method, found = build(name, **options), False
        for number, (right, lengths) in enumerate([*KINDS.values(), *drawn_groups(5, 100)]):
            ends: list[Finish] = ["stop" if good or number % 2 else "length" for good in right]  # wrong ones may be cut
            for known in knowns(name):
                texts = [f"{'t' * n}</think>{'a' * n}" for n in lengths] if name == "grlc" else TEXTS.get(name, SAID)
                got = trained_on(method, right, lengths, known, finish=ends, texts=texts)
                hit = np.array(right, dtype=bool)
                found |= bool(hit.any() and not hit.all() and got[~hit].max() > got[hit].min() + 1e-9)
        assert found == bool(method.wrong_may_win_if), (options, method.wrong_may_win_if)


def test_the_added_form_pays_a_wrong_answer_at_most_as_much() -> None:
    for right, lengths in drawn_groups(6, 100):
        got = trained_on(build("l1_max", form="added"), right, lengths, note={"budget": 400, "exact": False})
        assert got[np.array(right) == 1].min(initial=1.0) >= 1.0 >= got[np.array(right) == 0].max(initial=0.0)


def test_an_over_long_right_answer_of_the_cosine_loses_to_any_wrong_one() -> None:
    late, early = methods.rewards("cosine", [1, 0], [990, 100], max_tokens=1000)
    assert (late, early) == (-10.0, pytest.approx(-9.7553, abs=1e-4))


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_groups_of_each_kind(name: str, kind: str) -> None:
    """Equal outcomes are paid alike, and a group that is all wrong teaches nothing but length."""
    right, lengths = KINDS[kind]
    got = trained_on(build(name), right, lengths)
    if kind == "equal lengths":
        assert np.ptp(got[[0, 2, 3]]) == pytest.approx(0, abs=1e-9) or name in ("gfpo", "adapt_think")
    if kind == "all wrong" and name not in PRICED | BRANCHING | {"jet"}:
        assert np.ptp(got) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_what_was_cut_off_is_wrong_whatever_it_says(name: str) -> None:
    method, finish = build(name), ["stop", "stop", "length", "stop"]
    said = [methods.reward(method, asked(c, L, finish), KNOWN).rewards for c in ([1, 0, 1, 1], [1, 0, 0, 1])]  # type: ignore[arg-type]
    assert np.array_equal(said[0], said[1])


# -- what is written of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_says_what_it_is(name: str) -> None:
    kind = METHODS[name]
    assert kind.source
    assert (kind.standing == "experimental") == name.startswith("experimental.")
    text = " ".join((kind.__doc__ or "").split())
    assert text
    assert "wrong" in text.lower()
    assert "truncated" in text.lower()
    assert "remembered" in text
    assert " = " in text
    for key, field in kind.model_fields.items():
        assert field.description, f"{name}.{key}"
        assert field.annotation is not Any
    if kind.standing == "experimental":
        assert "Open:" in text
        assert "Chosen:" in text


def sections() -> dict[str, str]:
    """Sections on each method in the pages of kinds, by its name."""
    kinds = [text for path, text in pages().items() if path.startswith("methods/")]
    parts = [part.partition("\n") for text in kinds for part in text.split("\n## ")[1:]]
    return {name: text for name, _, text in parts}


def test_the_pages_of_methods_are_what_the_classes_say() -> None:
    """If not: `python -m megatron_efr.methods`."""
    docs = Path(__file__).parents[3] / "docs"
    stored = [docs / "methods.md", *(docs / "methods").iterdir()]
    assert {str(path.relative_to(docs)): path.read_text(encoding="utf-8") for path in stored} == pages()
    assert set(sections()) == set(METHODS)
    rows = re.findall(r"^\| \[`([\w.]+)`\]", pages()["methods.md"], re.MULTILINE)
    assert sorted(rows) == sorted(METHODS)


def test_a_folder_of_pages_is_written_whole_and_has_no_page_of_a_kind_that_went(tmp_path: Path) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods/gone.md").write_text("# Gone\n")
    write(tmp_path)
    found = {str(path.relative_to(tmp_path)): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.md")}
    assert found == pages()


def test_the_pages_name_every_option_with_a_default_that_reads_back() -> None:
    texts = sections()
    for name, kind in METHODS.items():
        rows = [line for line in texts[name].splitlines() if line.startswith("| `")]
        cells = [[cell.strip() for cell in row.split("|")] for row in rows]
        assert [row[1] for row in cells] == [f"`{key}`" for key in kind.model_fields]
        for row, field in zip(cells, kind.model_fields.values(), strict=True):
            assert len(row) == 6
            if row[3] == "required":
                assert field.is_required(), (name, row)
            else:
                assert ("null" if row[3] == "left out" else row[3].strip("`")) == json.dumps(field.default), (name, row)


def test_dlers_recipe_is_an_algorithm() -> None:
    recipe = algorithm(
        name="dr_grpo", normalize="batch", aggregate="token", clip_high=0.28, dual_clip=10.0, kl="k3", beta=0.0005,
        dynamic_sampling=True,
    )  # fmt: skip
    methods.check_together("dler", build("dler", limit=4000), recipe)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "overlong",
            {"max_tokens": 2000},
            r"^method\.max_tokens: 2000 tokens, and no response has more than .* = 1000",
        ),
        ("overlong", {"cache": 2000}, r"^method\.cache: 2000 tokens are more than the limit, 1000"),
        ("cosine", {"max_tokens": 2000}, r"^method\.max_tokens: 2000 tokens"),
        ("thinkprune", {"limit": 1001}, r"^method\.limit: 1001 tokens.* set it to at most that"),
        ("dler", {"limit": 1001}, r"^method\.limit: 1001 tokens"),
        ("da_dler", {"easy": 10}, r"^method\.hard: 4000 tokens"),
        ("laser_d", {}, r"^method\.lowest: 1024 tokens, .* set it to less than that"),
        ("laser", {"target": 1000}, r"^method\.target: 1000 tokens.* set it to less than that"),
        ("leash", {}, r"^method\.target: 4096 tokens"),
        ("gdpo", {}, r"^method\.limit: 4000 tokens"),
        ("l1_exact", {"suffix": " Be brief."}, r"^method\.suffix: the text tells nothing without \{budget\}"),
        ("l1_max", {"exact_suffix": ""}, r"^method\.exact_suffix: the text tells nothing without \{budget\}"),
        ("lapo", {"opening": "Briefly. "}, r"^method\.opening: the text tells nothing without \{budget\}"),
        ("experimental.o1_pruner_online", {"least": 5.0}, r"^method\.least: 5 is not below method\.most = 4"),
        ("experimental.effort", {"suffix": "!"}, r"^method\.suffix: the text tells nothing without \{level\}"),
        ("experimental.effort", {"words": ["a", "b", "a"]}, r"^method\.words: a, b, a: each level needs a word of its"),
        ("lapo", {"low": 70.0, "high": 30.0}, r"^method\.low: 70 is not below method\.high = 30"),
        ("cosine", {"max_tokens": 16}, r"^method\.margin: 16 tokens before the limit, 16, are all of it"),
        ("experimental.target", {"alpha": 0.95}, r"^method\.alpha: 0\.95 is above method\.most = 0\.9"),
        ("leash", {"target": 400, "least": 0.5}, r"^method\.start: 0\.1 is not between method\.least = 0\.5"),
        ("leash", {"target": 400, "start": 2.0}, r"^method\.start: 2 is not between .* method\.most = 1"),
        ("da_dler", {"easy": 300, "hard": 200}, r"^method\.easy: 300 tokens for easy prompts are more than .* = 200"),
        ("qglas", {"low": 0.9}, r"^method\.low: 0\.9 is above method\.high = 0\.6"),
        ("acoer", {"budget": 100}, r"^method\.budget: 100 is below method\.least_budget = 512"),
        ("adactrl", {"easy": "[H"}, r"^method\.hard: '\[Hard\]' cannot be told from method\.easy = '\[H'"),
        ("elastic", {"thought": 700, "answer": 301}, r"^method\.thought: 700 .* set max_new_tokens to 1001 or more"),
        ("grpo_lambda", {"share": 0.2, "prompts": 4}, r"^method\.share: 0\.2 of rollout\.prompts = 4 .* 1/4 or more"),
        ("dler", {"over_limit": 0.1}, r"^method\.over_limit: 0\.1 .* set method\.limit below that"),
        ("dler", {"over_limit": 0.1, "limit": 1000}, r"^method\.over_limit: 0\.1"),
        ("gfpo", {"keep": 4}, r"^method\.keep: 4 of rollout\.samples = 4 responses leaves none out"),
        ("kimi", {"weight": 2}, r"^method\.weight: .*less than or equal to 1 \(got 2\)"),
        ("twyn", {"margins": 2}, r"^method\.margins: unknown key; did you mean margin"),
        ("acoer", {"budget": 0}, r"^method\.budget: .*greater than 0"),
        ("l1_exact", {}, r"^method\.longest: 4000 tokens"),
        ("l1_exact", {"shortest": 20, "longest": 10}, r"^method\.shortest: 20 is above method\.longest = 10"),
        ("hapo", {"history": "longest"}, r"^method\.history: .*'shortest' or 'mean'"),
    ],
)
def test_options_without_sense_are_refused_by_key(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, tokens=1000, **options)


@pytest.mark.parametrize(
    ("name", "options", "choices", "message"),
    [
        (
            "grpo_lambda",
            {},
            {"name": "dapo"},
            r"^algorithm\.dynamic_sampling: .*set .*: false",
        ),
        ("short_rl", {}, {"dynamic_sampling": True}, r"^algorithm\.dynamic_sampling: "),
        ("autothink", {"stage": 3}, {"dynamic_sampling": True}, r"^algorithm\.dynamic_sampling: "),
        ("twyn", {}, {"dynamic_sampling": True}, r"^algorithm\.dynamic_sampling: "),
        ("gdpo", {}, {"name": "dapo"}, r"^algorithm\.dynamic_sampling: .*\nalgorithm\.truncated: soft"),
        ("gfpo", {}, {"name": "dapo"}, r"^algorithm\.truncated: soft .*set algorithm\.truncated: wrong"),
        ("qglas", {}, {"baseline": "mean"}, r"^algorithm\.baseline: .*gives credits of its own.*leave it out"),
        ("twyn", {}, {"normalize": "batch"}, r"^algorithm\.normalize: batch .*it has no effect; leave it out"),
        ("gdpo", {}, {"normalize": "tokens"}, r"^algorithm\.normalize: tokens .*set method\.over: nothing"),
        ("overlong", {}, {"name": "dapo"}, r"^algorithm\.truncated: soft .*overlong does so already"),
        ("stop_properly", {}, {"truncated": "soft"}, r"^algorithm\.truncated: soft .*stop_properly does so already"),
        ("anytime", {}, {"truncated": "masked"}, r"^algorithm\.truncated: masked leaves out thoughts .* set .*: wrong"),
        ("stop_properly", {}, {"truncated": "masked"}, r"^algorithm\.truncated: masked .*is to teach by them"),
        (
            "thinkless",
            {},
            {},
            r"^algorithm\.aggregate: sequence, and .* thinkless .*; set algorithm\.aggregate: token$",
        ),
        ("thinkless", {}, {"aggregate": "constant"}, r"^algorithm\.aggregate: constant, and"),
        (
            "drpo",
            {},
            {"name": "cispo"},
            r"^algorithm\.aggregate: token, and .* drpo .*set algorithm\.aggregate: sequence$",
        ),
        ("drpo", {}, {"name": "filtered_sft"}, r"^algorithm\.name: filtered_sft filters .* drpo .*take likelihood$"),
        ("drpo", {}, {"name": "dr_grpo"}, r"^algorithm\.aggregate: constant, and"),
    ],
)
def test_choices_of_an_algorithm_that_undo_a_method_are_refused(
    name: str, options: dict[str, Any], choices: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        methods.check_together(name, build(name, **options), algorithm(**choices))


@pytest.mark.parametrize("name", ["s_grpo", "mrt"])
def test_one_response_of_a_prompt_goes_with_an_algorithm_without_baseline(name: str) -> None:
    rollout = RolloutConfig(samples=1)
    for choices in ({"name": "grpo", "normalize": "none"}, {"name": "rloo"}, {"name": "dr_grpo"}):
        with pytest.raises(ConfigError, match=r"^rollout\.samples: 1 .*, or algorithm\.baseline: none$"):
            algorithms.build(AlgorithmConfig.model_validate(choices), rollout)
        one = algorithms.build(AlgorithmConfig.model_validate(choices | {"baseline": "none"}), rollout)
        methods.check_together(name, build(name, samples=1), one)


def algorithm(**choices: Any) -> algorithms.Algorithm:
    return algorithms.build(AlgorithmConfig.model_validate(choices), RolloutConfig())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_goes_with_every_algorithm_that_leaves_prompts_and_penalties_to_it(name: str) -> None:
    """As their sources have them: nobody need set what is not refused by name."""
    mean = METHODS[name].needs.aggregate
    for other in algorithms.ALGORITHMS:
        if mean is not None and mean != "sequence" and other == "gspo":
            continue  # which knows one mean alone
        if algorithms.ALGORITHMS[other].filters and METHODS[name].credits is not methods.Method.credits:
            continue  # credits of its own pass no filter
        choices = {"dapo": {"dynamic_sampling": False, "truncated": "wrong"}}.get(other, {})
        options = {"over": "nothing"} if name == "gdpo" else {}
        asked_for = {} if mean is None else {"aggregate": mean}
        methods.check_together(name, build(name, **options), algorithm(name=other, **choices, **asked_for))
    if mean in (None, "sequence"):
        methods.check_together(name, build(name), algorithm())
    if not build(name).equal_rewards_teach and name not in OWN:
        methods.check_together(name, build(name), algorithm(name="dapo"))


OWN = {"gfpo", "qglas", "overlong", "stop_properly", "drpo", "thinkless", "experimental.l2t", "infty_think"}
"""Methods that DAPO's soft penalty does not go with."""


def test_prompts_are_replaced_where_equal_rewards_teach_nothing() -> None:
    """The property against the credits: of groups that are all right, of different lengths."""
    for name in sorted(METHODS):
        method = build(name, **({"stage": 3, "decay": 0.5} if name == "autothink" else {}))
        (group,) = (methods.reward(method, asked([1] * 4, L), KNOWN),)
        if np.ptp(group.rewards) == 0 and not method.equal_rewards_teach:
            assert np.ptp(trained_on(method, [1] * 4, L)) == 0, name


def test_what_a_method_leaves_out_of_the_loss_stays_out() -> None:
    class Masking(methods.Plain):
        def rule(self, group: Outcomes) -> np.ndarray:
            return group.right.astype(np.float64)

        def credits(self, groups: Sequence[Rewarded], known: Known) -> list[Credit]:
            return [Credit(group.rewards, masked=np.array([True, False, False])) for group in groups]

    (group,) = rewarded(Masking(), [([1, 0, 1], [5, 6, 7])], finish=["stop", "stop", "length"])
    for choices, masked in (({}, [True, False, False]), ({"truncated": "masked"}, [True, False, True])):
        (made,) = methods.credit(Masking(), algorithm(**choices), [group], KNOWN)
        assert made.credit.masked is not None
        assert made.credit.masked.tolist() == masked


def test_methods_that_need_more_are_no_plain_functions() -> None:
    with pytest.raises(
        ConfigError, match=r"^hapo: its rewards need more than .* plain methods are asrr, cosine, da_dler"
    ):
        methods.rewards("hapo", C, L)


def test_the_function_takes_every_option_and_refuses_what_a_run_does() -> None:
    taken = set(inspect.signature(methods.rewards).parameters)
    for name, kind in METHODS.items():
        assert not issubclass(kind, methods.Plain) or not taken & set(kind.model_fields), name
    cut = methods.rewards("stop_properly", C, L, truncated=[0, 0, 1, 0], cut_off=-0.5)
    assert cut.tolist() == [1.0, 0.0, -0.5, 1.0]
    with pytest.raises(ConfigError, match=r"^method\.cache: 2000 tokens are more than the limit, 1000"):
        methods.rewards("overlong", C, L, max_tokens=1000, cache=2000)
    with pytest.raises(ConfigError, match=r"^method\.target: 4096 tokens, and no response has more"):
        methods.rewards("laser", C, L, max_new_tokens=1000)


GROUP_FREE = {
    "overlong", "thinkprune", "cosine", "laser", "dler", "stop_properly", "hapo", "leash", "a_dlp", "acoer", "l1_exact",
    "l1_max", "elastic", "mrt", "s_grpo",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_single_response_is_enough_where_nothing_is_compared(name: str) -> None:
    """And there a response earns what it would without the others."""
    if name not in GROUP_FREE:
        with pytest.raises(ConfigError, match=r"^rollout\.samples: 1 response\(s\) per prompt, and .* compares"):
            build(name, samples=1)
        return
    method = build(name, samples=1)
    together = trained_on(method, C, L)
    assert [trained_on(method, [c], [n])[0] for c, n in zip(C, L, strict=True)] == together.tolist()


def test_the_papers_numbers_under_its_own_algorithm() -> None:
    got = rloo(methods.rewards("efr", C, L, alpha=0.2))
    assert got == close(outputs("efr")["paper_advantage_rloo"])
    assert isinstance(Outcomes.of(graded(C, L), 10).limit, int)
