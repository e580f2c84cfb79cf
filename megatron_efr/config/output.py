"""The sections of a run's output: checkpoints and observations."""

from __future__ import annotations

from pydantic import Field, PositiveInt, model_validator

from megatron_efr.config.section import Section


class CheckpointConfig(Section):
    """Checkpoints: how often, and which of them are kept."""

    every: PositiveInt = Field(
        default=10, description="iterations (SFT: updates) from one to the next, and the last"
    )
    keep: PositiveInt = Field(default=2, description="how many of the newest to keep")
    keep_every: PositiveInt | None = Field(
        default=None,
        description="those whose step is a multiple of this are never removed; a multiple of every",
    )
    background: bool = Field(
        default=False,
        description=(
            "copy to host memory and write while training goes on (the copy takes that memory)"
        ),
    )

    @model_validator(mode="after")
    def _kept_ones_are_saved(self) -> CheckpointConfig:
        if self.keep_every is not None and self.keep_every % self.every:
            raise ValueError(
                f"keep_every {self.keep_every} is no multiple of every {self.every}: none would "
                "be saved"
            )
        return self


class ObserveConfig(Section):
    """Metrics and rollouts: where they go, and a limit on silence."""

    tensorboard: bool = Field(
        default=True, description="write the metrics to `tensorboard/` in the run folder too"
    )
    wandb: str | None = Field(default=None, description="project name; needs the wandb extra")
    watchdog_s: float | None = Field(
        default=None,
        gt=0,
        description="end the run when one phase lasts longer than this many seconds",
    )
    rollouts: bool = Field(
        default=True, description="keep every iteration's rollouts in the run folder, replayable"
    )
