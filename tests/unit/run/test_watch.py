"""Warnings of a run that cannot learn, from made figures: when, how often, with what cause, and
after a resume.
"""

from __future__ import annotations

import json
import math

import pytest

from megatron_efr.run.watch import Watch


def figures(**changes: float) -> dict[str, float]:
    healthy = {
        "truncated": 0.0,
        "groups_without_signal": 0.2,
        "groups_all_right": 0.1,
        "groups_all_wrong": 0.1,
    }
    return healthy | {"entropy": 0.5} | changes


def resumed(watch: Watch) -> Watch:
    """A watch of a new process, from what a checkpoint keeps."""
    again = Watch(1000)
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    return again


def test_a_healthy_run_is_told_nothing() -> None:
    watch = Watch(1000)
    assert [
        watch.see(step, figures(truncated=0.1, entropy=0.5 / step**0.5)) for step in range(1, 30)
    ] == [[]] * 29


def test_all_responses_cut_off() -> None:
    watch = Watch(1000)
    for step in (1, 7):
        (said,) = watch.see(step, figures(truncated=1.0))
        assert said.startswith(
            f"iteration {step}: all responses were cut off at rollout.max_new_tokens = 1000"
        )
    assert watch.see(8, figures(truncated=0.99)) == []


def test_a_limit_below_the_starting_models_quantile_is_told_once() -> None:
    (said,) = Watch(1000).see(1, figures(truncated=0.11))
    assert "11% of the starting model's responses were cut off" in said
    assert "rollout.max_new_tokens = 1000 is below their 90% length quantile" in said
    assert Watch(1000).see(1, figures(truncated=0.1)) == []
    assert Watch(1000).see(2, figures(truncated=0.5)) == [], (
        "the policy is not the starting model any more"
    )


@pytest.mark.parametrize(
    ("right", "wrong", "why"),
    [
        (0.0, 1.0, "every answer is wrong: the problems are too hard"),
        (1.0, 0.0, "every answer is right, and the method rewards them alike"),
        (
            0.75,
            0.25,
            "75% of groups are all right, 25% all wrong, and none has rewards that differ",
        ),
    ],
)
def test_no_signal_is_told_every_five_iterations_across_a_resume(
    right: float, wrong: float, why: str
) -> None:
    still = figures(groups_without_signal=1.0, groups_all_right=right, groups_all_wrong=wrong)
    watch, told = Watch(1000), []
    for step in range(1, 13):
        told += [(step, said) for said in watch.see(step, still)]
        watch = resumed(watch)
    assert [step for step, _ in told] == [5, 10]
    assert (
        f"no group has had a signal for 10 iterations, so that the policy learns nothing; {why}"
    ) in told[1][1]
    assert watch.see(13, figures(groups_without_signal=0.99)) == []
    assert [watch.see(step, still) for step in range(14, 18)] == [[]] * 4, "counted anew"


def test_entropy_is_told_when_it_crosses_a_bound_of_its_start() -> None:
    watch, told = Watch(1000), []
    for step, entropy in enumerate(
        [0.5, 0.99, 1.0, 3.0, 0.9, 1.2, 0.06, 0.05, 0.01, 0.3, 0.04], start=1
    ):
        told += [(step, said) for said in watch.see(step, figures(entropy=entropy))]
        watch = resumed(watch)
    assert [step for step, _ in told] == [3, 6, 8, 11]
    assert "the entropy is 1, and was 0.5 at the start: the policy diverges" in told[0][1]
    assert "the entropy is 0.05, and was 0.5 at the start: the policy hardly explores" in told[2][1]


def test_an_update_that_was_skipped_has_no_entropy() -> None:
    watch = Watch(1000)
    assert watch.see(1, figures(entropy=math.nan)) == []
    assert watch.see(2, figures(entropy=0.5)) == []
    assert watch.see(3, figures(entropy=math.inf)) == []
    assert len(watch.see(4, figures(entropy=1.0))) == 1


def test_a_checkpoint_of_before_there_was_a_watch_is_taken_up() -> None:
    watch = Watch(1000)
    watch.load_state_dict({})
    assert watch.state_dict() == Watch(1000).state_dict()
