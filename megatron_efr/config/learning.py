"""Rewards, algorithm, optimizer and updates."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from megatron_efr.config.section import Section


class MethodConfig(BaseModel):
    """The rule that turns groups into rewards; the other keys are the method's own, checked by
    it.
    """

    model_config = ConfigDict(extra="allow", strict=True)
    name: str = Field(default="efr", description="name of the method")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class AlgorithmConfig(BaseModel):
    """The way from rewards to updates; the other keys are the algorithm's own, checked by it."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: str = Field(default="rloo", description="name of the algorithm")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


MOVED = {
    "clip": "algorithm.clip_low and algorithm.clip_high",
    "normalize": "algorithm.normalize, and its value batch is called tokens",
    **{
        key: f"algorithm.{key}"
        for key in (
            "beta",
            "aggregate",
            "importance",
            "importance_cap",
            "importance_low",
            "importance_high",
        )
    },
}
"""The keys that took the place of those of the section `loss`."""


class OptimizerConfig(Section):
    """Adam and its learning-rate schedule."""

    lr: float = Field(gt=0, description="learning rate after the warm-up")
    min_lr: float = Field(default=0.0, ge=0, description="the rate at which a cosine schedule ends")
    schedule: Literal["constant", "cosine"] = Field(
        default="constant", description="course of the learning rate over all updates of the run"
    )
    warmup_updates: int = Field(
        default=0, ge=0, description="first updates, over which the rate rises evenly"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of Adam's mean of gradients")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="decay of Adam's mean of squares")
    eps: float = Field(
        default=1e-8, gt=0, description="added to the root of Adam's mean of squares"
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="decoupled from the gradient, as in AdamW"
    )
    clip_grad: float = Field(
        default=1.0, ge=0, description="largest norm of the gradient; 0 turns clipping off"
    )
    megatron: dict[str, Any] = Field(
        default_factory=dict, description="any field of Megatron's OptimizerConfig"
    )

    @model_validator(mode="after")
    def _decays_downwards(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(
                f"optimizer.min_lr: {self.min_lr:g} is above optimizer.lr = {self.lr:g}, where "
                "the schedule begins; set it lower, or leave it out"
            )
        return self


class TrainingConfig(Section):
    """The loop: how many iterations, how many updates in each, how work is packed."""

    iterations: PositiveInt = Field(
        default=100, description="iterations in all, those before a resume included"
    )
    updates: PositiveInt = Field(
        default=2, description="optimizer updates per iteration, over equal shares of it"
    )
    micro_batch_tokens: PositiveInt | None = Field(
        default=None,
        description=(
            "token budget of one packed micro-batch; 16384 when left out, on a CPU as many as "
            "leave 768 MiB behind for the backward pass"
        ),
    )
    max_logprob_diff: float = Field(
        default=0.5,
        gt=0,
        description=(
            "stop when |engine - policy| log-prob, averaged over an iteration's tokens of the "
            "policy's own version, exceeds this"
        ),
    )
    warn_logprob_diff: float | None = Field(
        default=None,
        gt=0,
        description="warn when it exceeds this; a fifth of max_logprob_diff when left out",
    )
    max_skipped: PositiveInt = Field(
        default=3, description="stop when so many updates in a row had to be skipped"
    )

    @property
    def warns_above(self) -> float:
        return self.warn_logprob_diff or self.max_logprob_diff / 5

    @model_validator(mode="after")
    def _warns_before_it_stops(self) -> TrainingConfig:
        if self.warns_above > self.max_logprob_diff:
            raise ValueError(
                f"train.warn_logprob_diff: {self.warn_logprob_diff} would warn after "
                f"train.max_logprob_diff = {self.max_logprob_diff} has stopped the run; set it "
                "lower"
            )
        return self


class SftTrainingConfig(Section):
    """The loop of training on rows: how many updates, of how many sequences, or pairs of them."""

    updates: PositiveInt = Field(description="updates in all, those before a resume included")
    batch: PositiveInt = Field(default=64, description="sequences, or pairs, per optimizer update")
    micro_batch_tokens: PositiveInt | None = Field(
        default=None,
        description=(
            "token budget of one packed micro-batch; 16384 when left out, on a CPU as many as "
            "leave 768 MiB behind for the backward pass"
        ),
    )
    bucket: PositiveInt = Field(
        default=1,
        description=(
            "updates drawn together and sorted by length before they are split, so that batches "
            "waste little"
        ),
    )
    log_every: PositiveInt = Field(
        default=10, description="updates from one line of metrics to the next"
    )
    max_skipped: PositiveInt = Field(
        default=3, description="stop when so many updates in a row had to be skipped"
    )


class PreferenceConfig(Section):
    """Preference of one response of a pair to the other (DPO, arXiv 2305.18290)."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="DPO's beta: a larger one keeps the policy closer to the starting model",
    )
