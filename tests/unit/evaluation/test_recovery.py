"""Patience of an evaluation with lost servers, which `tests/engine/test_evaluate.py` loses for
real; what it does if a record of its name is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_efr.errors import EngineError, LostError, NoEngineError
from megatron_efr.evaluation.journal import EvaluationError, Unfinished, finished, forget
from megatron_efr.evaluation.records import Record, summarise
from megatron_efr.rollout.recovery import ask_with_recovery, take_in_returned
from megatron_efr.run.folder import RunFolder
from tests.groups import graded


class Servers:
    """Fails as often as it is told to, whether it is published to or asked."""

    def __init__(self, *failures: Exception | None) -> None:
        self.failures, self.published = iter(failures), 0

    def publish(self) -> None:
        self.published += 1
        self.next()

    def next(self) -> Record:
        if (failure := next(self.failures, None)) is not None:
            raise failure
        return {}

    def health(self) -> dict[str, float]:
        return {"empty": 1.0}


def test_servers_that_are_lost_are_published_to_three_times_more_and_what_they_refuse_is_not_asked_again() -> (
    None
):
    gone = NoEngineError("none is left: http://a:1")
    lost = Servers(None, gone, LostError("http://a:1"), None, gone)  # asked, published to, asked
    assert ask_with_recovery(lost.publish, lost.next) == {}
    assert lost.published == 4
    never = Servers(*[None, gone] * 5)
    with pytest.raises(NoEngineError, match="http://a:1"):
        ask_with_recovery(never.publish, never.next)
    assert never.published == 4
    refusing = Servers(EngineError("http://a:1 answered 400"))
    with pytest.raises(EngineError, match="answered 400"):
        ask_with_recovery(refusing.publish, refusing.next)
    assert refusing.published == 1


def test_servers_that_are_back_are_published_to_three_times() -> None:
    servers: Any = Servers()
    take_in = take_in_returned(servers, servers.publish)
    for _ in range(5):
        take_in()
    assert servers.published == 3


ASKED = {"model": "ab12", "seed": 3, "grading of test": {"parts": [{"weight": 1.0}]}}


def record_of(folder: Path, **more: Any) -> Path:
    return RunFolder(folder).write_evaluation(
        "model", summarise([graded([True], [2])], "model") | more
    )


def test_a_finished_evaluation_is_not_made_again(tmp_path: Path) -> None:
    assert finished(tmp_path / "eval/model.json", ASKED, False) is None
    path = record_of(tmp_path, asked=ASKED)
    for replace in (False, True):
        kept = finished(path, ASKED, replace)
        assert kept is not None
        assert (kept["name"], kept["asked"]) == ("model", ASKED)


def test_the_record_of_another_evaluation_is_refused_with_what_differs_or_written_over(
    tmp_path: Path,
) -> None:
    path = record_of(tmp_path, asked=ASKED)
    other = ASKED | {"seed": 4, "grading of test": {"parts": [{"weight": 2.0}]}, "top_p": 0.95}
    with pytest.raises(EvaluationError) as refused:
        finished(path, other, False)
    assert str(refused.value) == (
        f"{path}: is the record of another evaluation than this; it differs in\n"
        "  seed: there 3, here 4\n"
        "  grading of test: there {'parts': [{'weight': 1.0}]}, here {'parts': [{'weight': 2.0}]}\n"
        "  top_p: there None, here 0.95\n"
        "give this one another name (--record), or write over that one (--replace)"
    )
    assert finished(path, other, True) is None
    with pytest.raises(
        EvaluationError,
        match=r"model.json: is a record that does not say what was asked\n.*--replace",
    ):
        finished(record_of(tmp_path), ASKED, False)


def test_answers_of_another_evaluation_are_refused_or_replaced_and_forgotten_by_their_own(
    tmp_path: Path,
) -> None:
    path, other = tmp_path / "eval/model.json", ASKED | {"seed": 4}
    group = graded([True], [2]).group
    begun = Unfinished(path, ASKED)
    begun.journal.append(group)
    begun.journal.close()
    with pytest.raises(
        EvaluationError,
        match=r"(?s)answers of another evaluation, .*; it differs in\n  seed: there 3, here 4\n.*--replace",
    ):
        Unfinished(path, other)
    forget(path, other)
    assert len(Unfinished(path, ASKED).journal.read().groups) == 1
    forget(path, ASKED)
    assert not list((path.parent / "unfinished").iterdir())
    begun = Unfinished(path, ASKED)
    begun.journal.append(group)
    begun.journal.close()
    assert Unfinished(path, other, replace=True).journal.read().groups == []
