"""Published decode-time rules: their sources' defaults and worked numbers, and the turns that they
take.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_efr.config import ConfigError, EnginesConfig, ModelConfig, plugins
from megatron_efr.rollout import build as build_module
from megatron_efr.rollout.checks import check_script, longest
from megatron_efr.rollout.driver import TokenPenalty
from megatron_efr.rollout.local.sampling import lowered
from megatron_efr.rollout.sglang.penalty import SwitchPenalty, processor
from megatron_efr.rollout.sglang.server_check import check_server
from megatron_efr.scripts import SCRIPTS, build, decode, encode, search
from megatron_efr.scripts.probed import Concise, Deer, EarlyStop, Subthoughts
from megatron_efr.scripts.published import (
    S1,
    CutOff,
    Elastic,
    NoThinking,
    Sketch,
    ThinkFor,
    Tip,
    Told,
)
from megatron_efr.scripts.search import VgSearch, scorer_of
from megatron_efr.steps import Draw, Force, Fork, Part, Penalty, Score, Step, Take
from megatron_efr.types import Branch, Done, Prompt, Response, Script, UserError
from megatron_efr.weights.architecture import Architecture
from tests.scripts import Letters

pytestmark = pytest.mark.alike

VECTORS = json.loads((Path(__file__).parents[2] / "data" / "decode_vectors.json").read_text())


def trial(probabilities: list[float], *parts: Part, text: str = "") -> Branch:
    logprobs = np.log(np.array(probabilities, dtype=np.float64)).astype(np.float32)
    return Branch(
        "probe",
        5,
        (Response(tuple(range(len(probabilities))), logprobs, "stop", text=text, parts=parts),),
    )


def follow(script: Script, *done: tuple[int, str, str, str]) -> list[Step]:
    """The steps that a script takes, told of each draw: its tokens, how it ended, at what, and its
    text.
    """
    steps, taken, length, told = script.steps(0), [], 0, list(done)
    step = next(steps)
    while True:
        taken.append(step)
        try:
            if isinstance(step, Draw):
                if not told:
                    return taken
                drawn, ending, met, text = told.pop(0)
                part: Any = Part(step.part, length, length + drawn, ending)
                length += drawn
                step = steps.send(Done(part, met, text=text if step.told else ""))
            elif isinstance(step, Force):
                part = Part(step.part, length, length + 1, "forced")
                length += 1
                step = steps.send(Done(part))
            else:
                return taken
        except StopIteration:
            return taken


def test_confidence_of_a_trial_answer_is_the_worked_one() -> None:
    given = VECTORS["deer_confidence"]
    probabilities = given["inputs"]["probabilities_of_trial_answer_tokens"]
    branch = trial(probabilities, Part("probe", 0, 5, "until"), Part("end", 5, 6, "length"))
    arithmetic, geometric = Deer().confidence(branch), Deer(form="qwen3").confidence(branch)
    assert arithmetic == pytest.approx(given["outputs"]["avg1_skips_first"], abs=1e-4)
    assert geometric == pytest.approx(given["outputs"]["avg2_geometric_skips_first"], abs=1e-4)
    assert [arithmetic > 0.95, geometric > 0.95] == given["outputs"]["exits"]
    # nor the last
    assert Deer(form="transformers").confidence(branch) == pytest.approx(0.9999, abs=1e-6)
    # not closed
    assert Deer(form="qwen3").confidence(trial(probabilities, Part("probe", 0, 6, "length"))) == 0.0
    assert Deer().confidence(trial([0.9])) == 0.0


def test_forms_of_deer_have_the_defaults_of_their_files() -> None:
    vllm, transformers, qwen3 = (
        build("deer", {"form": form}, "x") for form in ("vllm", "transformers", "qwen3")
    )
    said = [
        (d.tokens, d.temperature, d.mean, d.tries, d.share, d.sure)
        for d in (vllm, transformers, qwen3)
    ]  # type: ignore[attr-defined]
    assert said == [
        (20, 1.0, "arithmetic", 10, 0.6, 0.95),
        (21, 0.0, "arithmetic", None, 0.9, 0.95),
        (20, 1.0, "geometric", 10, 0.8, 0.95),
    ]
    assert build("deer", {"form": "qwen3", "share": 0.5}, "x").within(1000).most == 500  # type: ignore[attr-defined]
    assert decode(encode(transformers)) == transformers
    with pytest.raises(ConfigError, match=r"x\.form"):
        build("deer", {"form": "vlm"}, "x")


def test_deer_leaves_a_thought_near_its_limit_and_passes_pauses_after_its_tries() -> None:
    script = Deer(most=100, near=50, tries=2)
    assert [type(step) for step in follow(script, (50, "until", "Wait", "."))] == [
        Draw,
        Force,
        Draw,
    ]
    assert isinstance(follow(script, (49, "until", "Wait", "."))[-1], Fork)
    one = Deer(tries=1).steps(0)
    next(one)
    fork = one.send(Done(Part("thought", 0, 4, "until"), "Wait"))
    assert isinstance(fork, Fork)
    again = one.send(Done(Part("probe", 4, 4, "forced"), branches=(trial([0.5, 0.5]),)))
    assert isinstance(again, Draw)
    assert again.until == ("</think>",)
    with pytest.raises(
        ConfigError, match=r"x\.most: a thought of 100 tokens uses up max_new_tokens = 90"
    ):
        script.check(90, "x")


def test_s1_shares_one_budget_and_ends_it_on_a_new_line() -> None:
    script = build("s1", {"waits": 1}, "x").within(1000)
    assert script == S1(waits=1, most=900)
    cut = follow(script, (300, "until", "</think>", "."), (600, "length", "", "x"))
    assert [getattr(step, "text", getattr(step, "limit", None)) for step in cut] == [
        900, "Wait", 600, "\n</think>\n\nFinal Answer:", None,
    ]  # fmt: skip
    on_a_line = follow(S1(most=9, waits=0), (9, "length", "", "\n\n"))
    assert on_a_line[1] == Force("header", "</think>\n\nFinal Answer:")
    by_itself = follow(S1(most=9, waits=0), (4, "until", "</think>", "x"))
    assert by_itself[1] == Force("header", "</think>\n\n")
    assert len(follow(S1(most=9), (4, "stop", "", ""))) == 1
    with pytest.raises(
        ConfigError, match=r"x\.most: a thought of 50 tokens uses up max_new_tokens = 50"
    ):
        S1(most=50).check(50, "x")
    with pytest.raises(
        ConfigError,
        match=r"x\.leave: 100 tokens for the answer leave none of max_new_tokens = 100 ",
    ):
        S1().within(100).check(100, "x")
    S1().within(102).check(102, "x")


def test_early_stop_wants_the_same_answer_in_a_row_without_a_word_of_doubt() -> None:
    script = EarlyStop(agree=2)
    assert script.answer(f"{script.probe}\\frac{{1}}{{2}}}}\n\\]") == "\\frac{1}{2}"
    assert script.answer(f"{script.probe}7}} hmm, wait") == ""
    assert script.answer(f"{script.probe}12") == ""

    def stops(*answers: str) -> int:
        """At which probe the thought is left."""
        steps = script.steps(0)
        next(steps)
        for number, answer in enumerate(answers, start=1):
            fork = steps.send(Done(Part("thought", 64 * number - 64, 64 * number, "length")))
            assert fork == Fork("probe", (64 * number,), 1, script.probe, 20, temperature=0.6)
            step = steps.send(
                Done(Part("probe", 0, 0, "forced"), branches=(trial([0.5], text=answer),))
            )
            if isinstance(step, Force):
                return number
        return 0

    assert stops("7}", "8}", "7}", "7}") == 4
    assert stops("7", "7", "7") == 0
    assert stops("7}", "7} but", "7}", "7}") == 4
    assert follow(script, (0, "until", "</think>", ""))[1:] == [Draw("answer")], (
        "right behind a probe, it ends as ever"
    )
    assert len(follow(script, (0, "length", "", ""))) == 1


def test_subthoughts_go_on_from_where_each_begins() -> None:
    script = Subthoughts(samples=3, tokens=9)
    taken = follow(
        script,
        (5, "until", "Wait", ""),
        (7, "until", "So", ""),
        (4, "until", "</think>", ""),
        (3, "stop", "", ""),
    )
    assert taken[-1] == Fork("subthought", (5, 12), 3, "", 9)
    evenly = follow(Subthoughts(most=2), *[(1, "until", "Wait", "")] * 5, (1, "stop", "", ""))
    assert isinstance(evenly[-1], Fork)
    assert evenly[-1].at == (1, 3)
    check_script(Subthoughts(markers=("AB", "C"), end="D"), Letters(), "x")
    with pytest.raises(ConfigError, match=r"^x\.markers: none of 'AB', 'BC' is a single token"):
        check_script(Subthoughts(markers=("AB", "BC"), end="D"), Letters(), "x")


def test_wishes_stand_behind_the_question() -> None:
    assert ThinkFor(tokens=512).behind == "\n\nThink for 512 tokens."
    assert Told(suffix=" Be brief.").behind == " Be brief."
    assert "equation" in Sketch().behind
    assert CutOff(most=3).behind == ""
    with pytest.raises(ConfigError, match=r"x\.suffix"):
        build("think_for", {"tokens": 5, "suffix": "Think."}, "x")


def test_a_summary_takes_the_place_of_a_thought_that_was_drawn_apart() -> None:
    """The answer sees the prompt and the summary: the thought's tokens are in no step of the
    response.
    """
    script: Any = build(
        "summary_thinking", {"tokens": 5, "wish": "W", "cut": "C", "end": "E"}, "x"
    ).within(20)
    assert script.most == 15

    def branch(name: str, first: int, tokens: Sequence[int], ending: Any) -> Done:
        """A branch whose opening has `first` tokens, each of log-prob 0, and drawn ones of -0.5."""
        logprobs = np.array([0.0] * first + [-0.5] * (len(tokens) - first))
        parts = (Part("opening", 0, first, "forced"), Part(name, first, len(tokens), ending))
        made = Response(tuple(tokens), logprobs, "stop", parts=parts[first == 0 :])
        return Done(Part(name, 0, 0, "forced"), branches=(Branch(name, 0, (made,)),))

    steps = script.steps(0)
    assert next(steps) == Fork("thought", (0,), 1, "", 15, ("E",), after=((),))
    summary = steps.send(branch("thought", 0, [1, 2, 3], "until"))
    assert summary == Fork("summary", (0,), 1, "W", 5, ("E",), after=((1, 2, 3),))
    assert steps.send(branch("summary", 1, [23, 7, 8], "until")) == Take(
        "summary", (7, 8), (-0.5, -0.5), "length"
    )
    assert steps.send(Done(Part("summary", 0, 2, "length"))) == Force("cut", "C")
    assert steps.send(Done(Part("cut", 2, 3, "forced"))) == Draw("answer")
    steps = script.steps(0)
    next(steps)
    steps.send(branch("thought", 0, [1], "length"))
    assert steps.send(branch("summary", 1, [23, 7, 9], "stop")) == Take(
        "summary", (7,), (-0.5,), "length"
    ), "no end"
    steps = script.steps(0)
    next(steps)
    assert steps.send(branch("thought", 0, [1, 9], "stop")) == Take(
        "response", (1, 9), (-0.5, -0.5), "stop"
    )
    assert not script.trainable
    assert longest(script, 20, Letters()) == 22
    for options in ({"tokens": 20}, {"tokens": 5, "most": 16}):
        large: Any = build("summary_thinking", options, "x")
        with pytest.raises(
            ConfigError, match=r"^x\.tokens: a summary of .* does not fit into max_new_tokens = 20"
        ):
            large.within(20).check(20, "x")
    script.check(20, "x")


def test_modes_of_thinking_close_the_thought_before_it_begins() -> None:
    for name in ("zero_thinking", "less_thinking"):
        made: Any = build(name, {}, "x")
        assert made.opening.endswith("\n</think>\n\n")
        assert follow(made)[0] == Force("opening", made.opening)
    assert build("zero_thinking", {}, "x").forced == ("\n</think>\n\n",)


def test_budgets_are_the_sources() -> None:
    elastic = Elastic()
    assert (elastic.most, elastic.answer, elastic.cut) == (1024, 1024, "</think>")
    assert longest(Elastic(cut="AB"), 100, Letters()) == 102
    assert NoThinking().opening.endswith("</think>\n\n")
    assert follow(CutOff(most=7))[0] == Draw("response", 7)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_what_it_is_and_is_written_and_read_again(name: str) -> None:
    kind = SCRIPTS[name]
    assert kind.__doc__
    needed = {field: 3 for field, info in kind.model_fields.items() if info.is_required()}
    texts = {"opening": "A", "suffix": "A", "at": [3]}
    needed |= {"exits": {"shares": 1}}.get(name, {})
    texts["shares"] = [0.5]
    script = build(name, {field: texts.get(field, value) for field, value in needed.items()}, "x")
    assert decode(encode(script)) == script


def test_a_penalty_holds_for_the_first_tokens_of_each_thought() -> None:
    given, said = VECTORS["tip"]["inputs"], VECTORS["tip"]["outputs"]
    tip = Tip(switch=("A",), amount=given["alpha"], window=given["beta"])
    (draw,) = follow(tip)
    assert draw == Draw("response", penalty=Penalty(("A",), 3.0, 600))
    penalty = TokenPenalty((given["switch_token"],), 3.0, 600)
    start, logits = given["thought_start"], torch.tensor([given["logits"]])
    response = [5] * start + [given["switch_token"]] + [5] * 700
    for length, wanted in ((699, said["at_t_699"]), (700, said["at_t_700"])):
        took = [(0, penalty)] if penalty.applies(response[:length]) else []
        assert penalty.applies(response[:length][-600:]) is bool(took)
        assert lowered(logits, took).tolist() == [pytest.approx(wanted)]
        request = SimpleNamespace(
            origin_input_ids=[1, 1, *response[:50]], output_ids=response[50:length]
        )
        told = {"__req__": request, "tokens": [1], "amount": 3.0, "window": 600, "begun": 2}
        assert SwitchPenalty()(logits.clone(), [told]).tolist() == [pytest.approx(wanted)]
    assert [penalty.applies([5] * length) for length in (0, 599, 600)] == [True, True, False]


def test_servers_get_the_penalty_as_source() -> None:
    """They unpickle a class that knows nothing of this package."""
    made = pickle.loads(bytes.fromhex(json.loads(processor())["callable"]))
    assert (made.__name__, made.__module__) == ("SwitchPenalty", "builtins")
    request = SimpleNamespace(origin_input_ids=[7], output_ids=[])
    told = {"__req__": request, "tokens": [1], "amount": 3.0, "window": 5, "begun": 1}
    assert made()(torch.zeros(1, 3), [told]).tolist() == [[0.0, -3.0, 0.0]]


def test_a_penalty_is_of_single_tokens() -> None:
    check_script(Tip(switch=("A",)), Letters(), "x")
    with pytest.raises(
        ConfigError, match=r"^x\.switch: 'Alternatively' is 13 tokens .* only a single one can be"
    ):
        check_script(Tip(), Letters(), "x")


def test_servers_of_an_evaluation_with_a_penalty_must_take_it() -> None:
    info = {
        "tp_size": 1, "dtype": "float32", "enable_custom_logit_processor": True,
        "preferred_sampling_params": None,
        "disable_overlap_schedule": True,
    }  # fmt: skip
    check = partial(check_server, "http://a:1", ranks=1, dtype="float32", routed_experts=False)
    check(info, penalties=True)
    with pytest.raises(UserError, match="runs with --enable-custom-logit-processor"):
        check(info)
    for flag in ("enable_custom_logit_processor", "disable_overlap_schedule"):
        with pytest.raises(
            UserError,
            match=(
                f"evaluation.script: it penalises tokens, .* without --{flag.replace('_', '-')}"
            ),
        ):
            check(info | {flag: False}, penalties=True)


def test_a_router_that_passes_no_penalty_on_is_refused_before_servers_start(
    tied_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "Launcher", None)
    architecture = Architecture.from_folder(tied_model)
    router = EnginesConfig(engine="sglang", router=True)
    for model, penalties in (
        (ModelConfig(path="x"), True),
        (ModelConfig(path="x", routing="replay"), False),
    ):
        with (
            ExitStack() as resources,
            pytest.raises(ConfigError, match=r"^rollout\.router: .* leave router out"),
        ):
            build_module.sglang_engine(
                model, architecture, router, tmp_path, 0, Letters(), resources, penalties
            )


def test_doubts_give_way_to_confidence_and_the_thought_ends_once_it_is_sure() -> None:
    script = Concise(phrases=("A", "B"), sure=0.9, tries=3)
    steps = script.steps(1)
    next(steps)
    assert isinstance(steps.send(Done(Part("thought", 0, 4, "until"), "Wait")), Fork)
    unsure = Done(Part("probe", 4, 4, "forced"), branches=(trial([0.5, 0.5]),))
    assert steps.send(unsure) == Force("phrase", "B")
    steps.send(Done(Part("phrase", 4, 5, "forced")))
    assert isinstance(steps.send(Done(Part("thought", 5, 9, "until"), "Hmm")), Fork)
    sure = Done(Part("probe", 9, 9, "forced"), branches=(trial([0.99, 0.95]),))
    assert steps.send(sure) == Force("exit", "\n</think>\n\n")
    assert steps.send(Done(Part("exit", 9, 10, "forced"))) == Draw("answer")
    assert (
        longest(
            Concise(phrases=("A", "BCD"), exit="E", probe="F", tokens=4, tries=3), 100, Letters()
        )
        == 114
    )
    with pytest.raises(ConfigError, match=r"x\.phrases"):
        build("concise", {"phrases": ["A", ""]}, "x")


def test_a_search_keeps_the_best_beams_and_answers_with_the_best_that_ended() -> None:
    """Three rounds of four beams, two of which go on: every step is one token, and the score is the
    last one drawn.
    """
    script = VgSearch(scorer="letters", beams=4, width=2, iterations=3, ends=(".",), tokens=1)

    def last(prompt: Prompt, texts: Sequence[str]) -> list[float]:
        return [ord(text[-1]) for text in texts]

    def grown(fork: Step, *steps: str) -> Done:
        """Each beam's step; in lower case it ends the response."""
        assert isinstance(fork, Fork)
        made = []
        for step in steps:
            part = Part("step", 0, 1, "stop") if step.islower() else Part("end", 0, 1, "length")
            made.append(
                Branch(
                    "step",
                    0,
                    (Response((ord(step),), np.full(1, -0.5), "stop", text=step, parts=(part,)),),
                )
            )
        return Done(Part("step", 0, 0, "forced"), branches=tuple(made))

    def scored(score: Step) -> Done:
        assert isinstance(score, Score)
        return Done(
            Part("score", 0, 0, "forced"),
            scores=tuple(last(Prompt("p", (1,), "", ""), score.texts)),
        )

    steps = script.steps(0)
    fork = next(steps)
    assert fork == Fork("step", (0,) * 4, 1, "", 1, ends=(".",), after=((),) * 4)
    fork = steps.send(scored(steps.send(grown(fork, "B", "D", "A", "C"))))
    assert isinstance(fork, Fork)
    assert fork.after == ((68,), (67,), (68,), (67,))  # D and C, twice each
    score = steps.send(grown(fork, "E", "f", "G", "H"))
    assert isinstance(score, Score)
    assert score.texts == ("DE", "Cf", "DG", "CH")
    fork = steps.send(scored(score))
    assert isinstance(fork, Fork)
    # the last goes to the end
    assert (fork.after[:2], fork.ends, fork.limit) == (((67, 72), (68, 71)), (), None)
    score = steps.send(grown(fork, "z", "a", "b", "c"))
    assert steps.send(scored(score)) == Take("search", (67, 72, 122), (-0.5,) * 3, "stop")
    assert longest(script, 100, Letters()) == 100, "a beam is no longer than the response may be"


def test_a_scorer_is_loaded_once_for_all_responses_and_before_any_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_scorers.py").write_text(
        "def by_length(prompt, texts):\n    return [float(len(text)) for text in texts]\n"
        "def of_one(text):\n    return 0.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    entries = {
        name: EntryPoint(name, f"own_scorers:{name}", search.GROUP)
        for name in ("by_length", "of_one", "absent")
    }
    for module in (search, plugins):
        monkeypatch.setattr(module, "registered", lambda group: entries)
    scorer_of.cache_clear()
    script = VgSearch(scorer="by_length", beams=2, width=1)
    script.check(100, "evaluation.script")
    for sample in range(3):
        next(script.steps(sample))
    assert scorer_of.cache_info().misses == 1
    assert scorer_of("by_length")(Prompt("p", "", (1,), "2"), ["ab", ""]) == [2.0, 0.0]
    with pytest.raises(ConfigError, match=r"scorer: of_one is not a function of \(prompt, texts\)"):
        VgSearch(scorer="of_one").check(100, "evaluation.script")
    with pytest.raises(ConfigError, match=r"scorer: absent cannot be imported: AttributeError"):
        VgSearch(scorer="absent").check(100, "evaluation.script")
    scorer_of.cache_clear()


def test_scorers_are_known_by_name() -> None:
    prompt = Prompt("p", (1,), "q", "1/2")
    assert scorer_of("verifier")(prompt, [r"so \boxed{0.5}", r"\boxed{2}", "half"]) == [
        1.0,
        0.0,
        0.0,
    ]
    with pytest.raises(ConfigError, match=r"x\.scorer: no scorer 'prm'; there are .*verifier"):
        build("vg_search", {"scorer": "prm"}, "x")
    with pytest.raises(ConfigError, match="beams: 6 is no multiple of width = 4"):
        build("vg_search", {"beams": 6}, "x")
    with pytest.raises(ConfigError, match=r"^x\.ends: none of "):
        check_script(VgSearch(), Letters(), "x")
