"""Samplings of a run for its method: kept one by one, the same after a kill, shared, and refused by
name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from megatron_efr import log, methods
from megatron_efr.config import ConfigError, GradingConfig, ThinkingConfig
from megatron_efr.data.arithmetic import ArithmeticTask, write
from megatron_efr.data.prompts import load_tokenizer
from megatron_efr.data.thinking import thinking_marks
from megatron_efr.grading import Grader
from megatron_efr.grading.judging import Judgings
from megatron_efr.methods import Given, Known, Monitor, Needs, Sampled
from megatron_efr.rollout.build import ENGINES
from megatron_efr.rollout.codec import TokenizerCodec
from megatron_efr.rollout.engine import ABILITIES
from megatron_efr.rollout.local.engine import LocalEngine
from megatron_efr.run.samplings import Sampler, SamplingError, check_there, figures
from megatron_efr.types import Marks, Prompt, Sampling
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import RandomWeights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("task")
    write(made, 0, ArithmeticTask(max_terms=2, train_rows=4, test_rows=2, sft_rows=2))
    return made / "model"


@pytest.fixture(scope="module")
def engine(folder: Path) -> LocalEngine:
    made = LocalEngine(folder, 8, codec=TokenizerCodec(load_tokenizer(str(folder))))
    made.publish(RandomWeights(Architecture.from_folder(folder), 0).items(), 0)
    return made


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader.of(GradingConfig(workers=1), JUDGINGS.verifiers) as made:
        yield made


JUDGINGS = Judgings.of(
    GradingConfig.model_validate(
        {"verifier": "regex", "answer": "whole", "options": {"search": True}}
    ),
    [],
)
PROMPTS = [
    Prompt(f"p{n}", (1, 4, 5 + n % 4, 5), f"q{n}", "[0-4]", {"dataset": "d"}) for n in range(6)
]
SAMPLING = Sampling(1.0, 1.0, 12, (2,))


class KilledError(RuntimeError):
    pass


class Failing(LocalEngine):
    """An engine whose process ends after so many groups."""

    def __init__(self, engine: LocalEngine, groups: int) -> None:
        self._engine, self._groups = engine, groups

    @property
    def version(self) -> int:
        return self._engine.version

    def generate(self, *args: Any) -> Any:
        self.asked = list(args[0])
        return self._some(self._engine.generate(self.asked, *args[1:]))

    def _some(self, stream: Any) -> Iterator[Any]:
        for number, group in enumerate(stream):
            if number == self._groups:
                raise KilledError
            yield group


def sampler(
    grader: Grader, prompts: list[Prompt] = PROMPTS, seed: int = 7, **asked: Any
) -> Sampler:
    return Sampler(
        prompts, SAMPLING, grader, JUDGINGS, seed, {"model": "abc", "max_new_tokens": 12, **asked}
    )


# -- the starting model's responses
# ------------------------------------------------------------------------------------


def test_a_kill_in_the_middle_changes_nothing(
    engine: LocalEngine, grader: Grader, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = sampler(grader).reference(engine, 3, tmp_path / "whole")
    assert set(whole) == {prompt.id for prompt in PROMPTS}
    assert all(
        len(each.lengths) == len(each.right) == 3 and 0 < max(each.lengths) <= 12
        for each in whole.values()
    )
    assert len({each.lengths for each in whole.values()}) > 1
    right = [right for each in whole.values() for right in each.right]
    assert any(right), "and some wrong, or verdicts say nothing"
    assert not all(right)
    cut = tmp_path / "cut"
    assert (
        "reference: samples 6 prompts x 3 responses of the starting model"
    ) in capsys.readouterr().out
    with pytest.raises(KilledError):
        sampler(grader).reference(Failing(engine, 2), 3, cut)
    cut.write_bytes(cut.read_bytes()[:-5])  # and the last line is torn
    assert len(cut.read_bytes().splitlines()) == 3, "the description, and two prompts"
    failing = Failing(engine, 99)
    capsys.readouterr()
    assert sampler(grader).reference(failing, 3, cut) == whole
    assert len(failing.asked) == 5, "the torn one is asked again, the other is not"
    assert "; 1 prompts are finished already" in capsys.readouterr().out
    assert sorted(cut.read_bytes().splitlines()) == sorted(
        (tmp_path / "whole").read_bytes().splitlines()
    )
    # of a finished one no engine is asked: later weights may serve
    later = Failing(engine, 0)
    assert sampler(grader).reference(later, 3, cut) == whole
    assert sampler(grader, seed=8).reference(engine, 3, tmp_path / "other") != whole
    # another order of prompts, and fewer of them, change no prompt's
    few = sampler(grader, [PROMPTS[4], PROMPTS[1]]).reference(engine, 3, tmp_path / "few")
    assert few == {name: whole[name] for name in ("p1", "p4")}


def test_what_is_missing_later_is_not_made_of_later_weights(
    engine: LocalEngine, folder: Path, grader: Grader, tmp_path: Path
) -> None:
    trained = LocalEngine(folder, 8, codec=TokenizerCodec(load_tokenizer(str(folder))))
    trained.publish(RandomWeights(Architecture.from_folder(folder), 0).items(), 5)
    with pytest.raises(
        SamplingError,
        match=r"6 of 6 prompts are missing, and the starting model .* start a new run",
    ):
        sampler(grader).reference(trained, 2, tmp_path / "reference.jsonl")


def test_another_runs_file_serves_where_it_is_of_the_same(
    engine: LocalEngine, grader: Grader, tmp_path: Path
) -> None:
    path = tmp_path / "reference.jsonl"
    sampler(grader, PROMPTS[:5]).reference(engine, 2, path)
    sampler(grader, PROMPTS[1:4]).check(path, 2)
    with pytest.raises(
        SamplingError, match=r"holds no responses to 1 of 6 prompts as this run asks them, .* p5"
    ):
        sampler(grader).check(path, 2)
    told = [replace(PROMPTS[0], tokens=(1, 4))]
    with pytest.raises(
        SamplingError, match=r"holds no responses to 1 of 1 prompts as this run asks them, .* p0"
    ):
        sampler(grader, told).check(path, 2)
    with pytest.raises(
        SamplingError,
        match=r":1: these .* otherwise: model: there 'abc', here 'xyz'; samples: there 2",
    ):
        sampler(grader, model="xyz").check(path, 4)
    with pytest.raises(SamplingError, match="max_new_tokens: there 12, here 9"):
        sampler(grader, PROMPTS[:5], max_new_tokens=9).check(path, 2)
    # a resumed run may have a lower limit than its own responses had
    assert (
        len(sampler(grader, PROMPTS[:5], max_new_tokens=9).reference(Failing(engine, 0), 2, path))
        == 5
    )
    with pytest.raises(
        SamplingError,
        match=r"^data\.reference: .*gone: no such file; it is a run's reference\.jsonl",
    ):
        check_there(str(tmp_path / "gone"), tmp_path / "own.jsonl")
    check_there(str(tmp_path / "gone"), path)  # of a resumed run, which has its own copy


def test_another_runs_file_is_taken_whole_or_said_not_to_be_read(
    engine: LocalEngine, grader: Grader, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, own = tmp_path / "other.jsonl", tmp_path / "own.jsonl"
    whole = sampler(grader).reference(engine, 2, other)
    log.to_terminal()
    for _ in range(2):  # the second time it is a resumed run, which has its copy
        assert sampler(grader).reference(Failing(engine, 0), 2, own, other) == whole
    assert (own.read_bytes(), capsys.readouterr().err) == (other.read_bytes(), "")
    own.write_text("".join(own.read_text().splitlines(keepends=True)[:3]))
    assert sampler(grader).reference(engine, 2, own, other) == whole
    said = capsys.readouterr().err
    assert (
        f"data.reference: {other} is not read, since this run has begun its own: {own} lacks 4 of "
        "6 prompts"
    ) in said


def test_a_damaged_line_is_named(engine: LocalEngine, grader: Grader, tmp_path: Path) -> None:
    path = tmp_path / "reference.jsonl"
    sampler(grader).reference(engine, 2, path)
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 37):
        if data[at] == ord("\n"):
            continue
        damaged = bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        path.write_bytes(damaged)
        with pytest.raises(
            SamplingError, match=r"reference\.jsonl:\d: damaged: no sampled responses"
        ):
            sampler(grader).check(path, 2)


# -- the monitor set
# --------------------------------------------------------------------------------------------------


def test_a_monitor_set_is_fixed_and_its_responses_are_not(
    engine: LocalEngine, grader: Grader, tmp_path: Path
) -> None:
    wanted = Monitor(prompts=4, samples=3, every=5)
    first = sampler(grader).monitor(engine, wanted, 0, tmp_path / "a")
    later = sampler(grader).monitor(engine, wanted, 5, tmp_path / "b")
    assert set(first) == set(later) < {prompt.id for prompt in PROMPTS}
    assert len(first) == 4
    assert first != later
    sets = {
        frozenset(sampler(grader, seed=n).monitor(engine, wanted, 0, tmp_path / f"s{n}"))
        for n in range(4)
    }
    assert len(sets) > 1, "the run's seed draws it"
    with pytest.raises(KilledError):
        sampler(grader).monitor(Failing(engine, 3), wanted, 5, tmp_path / "cut")
    assert sampler(grader).monitor(engine, wanted, 5, tmp_path / "cut") == later
    assert len(sampler(grader).monitor(engine, Monitor(99, 1, 1), 0, tmp_path / "all")) == 6
    with pytest.raises(
        SamplingError,
        match="step: there 5, here 6; set that as it is there, or go without this file",
    ):
        sampler(grader).monitor(engine, wanted, 6, tmp_path / "cut")
    # a resumed run may have a lower limit than those that a kill left
    lower = sampler(grader, max_new_tokens=9)
    assert lower.monitor(Failing(engine, 0), wanted, 5, tmp_path / "cut") == later
    # problems that are held out may be changed on resuming, but not under a method that compares
    # their accuracies
    sampler(grader).check_held_out(wanted, {})
    sampler(grader).check_held_out(wanted, first)
    with pytest.raises(
        SamplingError,
        match=r"^evaluation\.datasets: the method watches 4 of these problems, and now",
    ):
        sampler(grader, [*PROMPTS[:5], replace(PROMPTS[0], id="q")]).check_held_out(
            Monitor(99, 3, 5), first
        )


def test_figures_of_a_monitor_set() -> None:
    sampled = {"a": Sampled((10, 20), (True, False)), "b": Sampled((30, 40), (True, True))}
    assert figures(sampled) == {"monitor/accuracy": 0.75, "monitor/tokens": 25.0}
    assert (sampled["a"].solved, sampled["a"].mean_length) == (0.5, 15.0)


def test_what_was_sampled_is_known_from_the_next_iteration_on_and_survives_a_restart() -> None:
    sampled, marks = {"a": Sampled((10, 20), (True, False))}, Marks("", ";")
    knowledge = methods.Knowledge(methods.EFR(alpha=0.1), 100, marks)
    assert knowledge.monitored is None
    assert "monitor" not in knowledge.state_dict()
    knowledge.reference = sampled
    knowledge.monitor(0, sampled)
    knowledge.begin(1)
    knowledge.monitor(1, {"a": Sampled((7,), (True,))})
    assert knowledge.of(1) == Known(1, 100, {}, {}, sampled, sampled, marks, 0)
    stored = json.loads(json.dumps(knowledge.state_dict()))
    resumed = methods.Knowledge(methods.EFR(alpha=0.1), 100, marks)
    resumed.load_state_dict(stored)
    assert resumed.monitored == 1
    assert resumed.begin(2).monitor == {"a": Sampled((7,), (True,))} == knowledge.begin(2).monitor
    assert resumed.state_dict() == knowledge.state_dict()


# -- what a run has to give
# --------------------------------------------------------------------------------------------


def test_what_a_run_does_not_have_is_refused_by_name() -> None:
    local = Given("local", LocalEngine.abilities, None, 3)
    methods.check_given("m", Needs(engine=frozenset({"forks"})), local)
    with pytest.raises(
        ConfigError,
        match=r"^rollout\.engine: local cannot do what method m needs \(routing\); it can: f",
    ):
        methods.check_given("m", Needs(engine=frozenset({"forks", "routing"})), local)
    with pytest.raises(
        ConfigError,
        match=r"^model\.thinking\.closes: method m has to tell a thought from its answer",
    ):
        methods.check_given("m", Needs(thinking=True), local)
    with pytest.raises(
        ConfigError, match=r"^train\.iterations: 3, and method m learns .* set it to 1"
    ):
        methods.check_given("m", Needs(offline=True), local)
    methods.check_given("m", Needs(offline=True), local._replace(iterations=1))
    methods.check_given("m", Needs(thinking=True), local._replace(marks=Marks("", ";")))
    assert set(ENGINES) == {"local", "sglang"}
    assert all(engine.abilities <= set(ABILITIES) for engine in ENGINES.values())


def test_marks_are_the_tokenizers_unless_they_are_configured(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert thinking_marks(ThinkingConfig(), tokenizer) is None
    assert thinking_marks(ThinkingConfig(closes=";"), tokenizer) == Marks("", ";")
    assert thinking_marks(ThinkingConfig(opens="=", closes=";"), tokenizer) == Marks("=", ";")
    assert thinking_marks(ThinkingConfig(opens="="), tokenizer) is None
    with pytest.raises(
        ConfigError,
        match=r"^model\.thinking\.closes: '</think>' would never be found in a response",
    ):
        thinking_marks(ThinkingConfig(closes="</think>"), tokenizer)
    with pytest.raises(
        ConfigError, match=r"^model\.thinking\.opens: '<eos>' would never be found in a response"
    ):
        thinking_marks(ThinkingConfig(opens="<eos>", closes=";"), tokenizer)
    thinks: PreTrainedTokenizerBase = load_tokenizer(str(folder))
    thinks.add_tokens(["<think>", "</think>"])
    assert thinking_marks(ThinkingConfig(), thinks) == Marks("<think>", "</think>")
    hides: PreTrainedTokenizerBase = load_tokenizer(str(folder))
    hides.add_special_tokens({"additional_special_tokens": ["</think>"]})
    assert thinking_marks(ThinkingConfig(), hides) is None, (
        "a special token is not in a response's text"
    )
