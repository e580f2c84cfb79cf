"""The configurations of whole programs, and the conditions between their sections."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_efr.config.data import DataConfig, PairsDataConfig, PromptConfig, SftDataConfig
from megatron_efr.config.evaluation import EvaluationConfig
from megatron_efr.config.grading import GradingConfig
from megatron_efr.config.learning import (
    MOVED,
    AlgorithmConfig,
    MethodConfig,
    OptimizerConfig,
    PreferenceConfig,
    SftTrainingConfig,
    TrainingConfig,
)
from megatron_efr.config.model import ModelConfig, ParallelConfig, check_parallel
from megatron_efr.config.output import CheckpointConfig, ObserveConfig
from megatron_efr.config.rollout import EvaluationEnginesConfig, RolloutConfig
from megatron_efr.config.section import ConfigError, Section


class RunConfig(Section):
    """The keys that every program's configuration begins with."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$",
        description="the run's, and its folder's; `/` puts it into a family",
    )
    runs: str = Field(default="runs", description="the folder of all runs; this one is runs/name")
    seed: int = Field(
        default=42,
        ge=0,
        le=2**63 - 1,
        description="every random number is a function of it and a place",
    )
    model: ModelConfig

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name


class TrainConfig(RunConfig):
    """The configuration of `efr train`."""

    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    grading: GradingConfig = Field(default_factory=GradingConfig)
    method: MethodConfig = Field(default_factory=MethodConfig)
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig
    train: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    observe: ObserveConfig = Field(default_factory=ObserveConfig)

    @model_validator(mode="before")
    @classmethod
    def _the_loss_is_the_algorithms(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and "loss" in tree:
            given = tree["loss"]
            keys = [key for key in MOVED if key in given] if isinstance(given, dict) else []
            moved = [f"loss.{key} is {MOVED[key]} now" for key in keys]
            raise ValueError("; ".join(moved) or "loss: this section is called algorithm now")
        return tree

    @model_validator(mode="after")
    def _both_heads_are_fp32(self) -> TrainConfig:
        if (
            self.model.dtype != "float32"
            and self.rollout.server.get("enable_fp32_lm_head", True) is False
        ):
            raise ValueError(
                "rollout.server.enable_fp32_lm_head: false, and the policy computes logits in "
                "fp32 whatever its model.dtype; log-probs would differ by several 1e-2. Leave it "
                "out, or set it true"
            )
        return self

    @model_validator(mode="after")
    def _responses_split_over_updates(self) -> TrainConfig:
        responses = self.rollout.prompts * self.rollout.samples
        if responses % self.train.updates:
            raise ValueError(
                f"rollout.prompts x rollout.samples = {self.rollout.prompts} x "
                f"{self.rollout.samples} = {responses} responses do not split over train.updates "
                f"= {self.train.updates}"
            )
        return self

    def check_world(self, world_size: int) -> None:
        """Refuse sizes that do not divide over `world_size` ranks; call once the number of ranks is
        known.
        """
        check_parallel(self.parallel, world_size)
        per_update = self.rollout.prompts * self.rollout.samples // self.train.updates
        said = (
            f"train.updates: {per_update} responses per update (rollout.prompts "
            f"{self.rollout.prompts} x rollout.samples {self.rollout.samples} / train.updates "
            f"{self.train.updates})"
        )
        _check_divides(per_update, said, self.parallel, world_size)


class SftConfig(RunConfig):
    """The configuration of `efr sft`."""

    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: SftDataConfig
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    optimizer: OptimizerConfig
    train: SftTrainingConfig
    loss_aggregate: Literal["sequence", "token"] = Field(
        default="token",
        description="the mean over all tokens, or over each sequence's and then over sequences",
    )
    checkpoint: CheckpointConfig = Field(
        default_factory=lambda: CheckpointConfig(every=500, keep=1)
    )
    observe: ObserveConfig = Field(default_factory=ObserveConfig)

    def check_world(self, world_size: int) -> None:
        """Refuse sizes that do not divide over `world_size` ranks."""
        check_parallel(self.parallel, world_size)
        _check_divides(
            self.train.batch,
            f"train.batch: {self.train.batch} sequences",
            self.parallel,
            world_size,
        )


class DpoConfig(RunConfig):
    """`efr dpo`."""

    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: PairsDataConfig
    preference: PreferenceConfig = Field(default_factory=PreferenceConfig)
    optimizer: OptimizerConfig
    train: SftTrainingConfig
    checkpoint: CheckpointConfig = Field(
        default_factory=lambda: CheckpointConfig(every=500, keep=1)
    )
    observe: ObserveConfig = Field(default_factory=ObserveConfig)

    def check_world(self, world_size: int) -> None:
        """Refuse sizes that do not divide over `world_size` ranks."""
        check_parallel(self.parallel, world_size)
        said = f"train.batch: the 2 x {self.train.batch} sequences of its pairs"
        _check_divides(2 * self.train.batch, said, self.parallel, world_size)


class EvaluateConfig(RunConfig):
    """The configuration of `efr evaluate`.

    `model.path` may be a Megatron checkpoint, or a run's folder, whose newest is taken.
    """

    template: str | None = Field(
        default=None,
        description=(
            "folder with config.json and tokenizer, for a checkpoint; by default the model that "
            "it began with"
        ),
    )
    rollout: EvaluationEnginesConfig = Field(default_factory=EvaluationEnginesConfig)
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    evaluation: EvaluationConfig
    grading: GradingConfig = Field(default_factory=GradingConfig)

    @model_validator(mode="after")
    def _adapters_are_merged(self) -> EvaluateConfig:
        if self.model.lora is not None:
            raise ValueError(
                "model.lora: an evaluation trains none, and asks the weights at model.path, a "
                "checkpoint's with its adapters merged; leave it out"
            )
        return self


def _check_divides(sequences: int, said: str, parallel: ParallelConfig, world_size: int) -> None:
    """Refuse the sequences of an update, as they are `said`, that do not divide over the replicas
    of the model.
    """
    replicas = world_size // parallel.model_ranks
    if sequences % replicas:
        raise ConfigError(
            f"{said} do not divide over {replicas} data-parallel ranks; make them a multiple of "
            f"{replicas}"
        )
