"""What a training run keeps in its checkpoints, and how it takes that up again."""

from __future__ import annotations

from typing import Protocol

from megatron_efr.checkpoint import Checkpoints
from megatron_efr.environment import Environment
from megatron_efr.methods import Method
from megatron_efr.policy import Policy, Ranks
from megatron_efr.runfolder import RunFolder


class Run(Protocol):
    """The state of a run as one rank holds it, and where it is kept. All ranks call these functions alike."""

    @property
    def ranks(self) -> Ranks: ...
    @property
    def folder(self) -> RunFolder: ...
    @property
    def checkpoints(self) -> Checkpoints: ...
    @property
    def environment(self) -> Environment | None: ...
    @property
    def policy(self) -> Policy: ...
    @property
    def method(self) -> Method: ...


def save(run: Run, step: int) -> None:
    """Keep all that a resumed run needs. Random numbers need nothing: each is a function of seed and place."""
    state = {
        "step": step,
        "initial_model": run.policy.initial_model,
        "method": run.method.state_dict(),
        "stream": run.environment.stream.state_dict() if run.environment else None,
    }
    run.checkpoints.save(step, run.policy.sharded_state(), state, lambda: run.folder.clear_journals(step))


def restore(run: Run) -> int:
    """Take up the newest checkpoint that verifies: the step it was made after, 0 where there is none."""
    step = load(run, None)
    run.ranks.on_main(lambda: run.folder.go_on_from(step))
    return step


def load(run: Run, last: int | None) -> int:
    """Like `restore`, of a checkpoint no later than step `last`, and the run folder stays as it is."""
    path = run.checkpoints.newest(last)
    if path is None:
        return 0
    sharded, state = run.checkpoints.load(path, run.policy.sharded_state(loading=True))
    run.policy.load_sharded_state(sharded)
    run.policy.check_initial_model(state["initial_model"], str(path))
    run.method.load_state_dict(state["method"])
    if run.environment is not None:
        run.environment.stream.load_state_dict(state["stream"])
    return state["step"]
