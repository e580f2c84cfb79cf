"""The starting model, and how the policy is split over ranks."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, PositiveInt, field_validator

from megatron_efr.config.section import ConfigError, Section


class ThinkingConfig(Section):
    """The texts around a thought in this model's responses."""

    opens: str | None = Field(
        default=None,
        min_length=1,
        description="`<think>` when left out, if the tokenizer has it as a token of text",
    )
    closes: str | None = Field(
        default=None,
        min_length=1,
        description="`</think>` when left out, if the tokenizer has it as a token of text",
    )


Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""A matrix of a layer, by its name in Hugging Face's models."""


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021): beside each target W, which stays, B A of a low rank is
    learnt.

    The weights are W + (alpha / rank) B A. A begins random, B zero, so that training begins with
    the starting model.
    """

    rank: PositiveInt = Field(default=16, description="rows of A and columns of B")
    alpha: float = Field(
        default=32.0, gt=0, description="the product B A is scaled by alpha / rank"
    )
    targets: list[Projection] = Field(
        default=list(get_args(Projection)),
        min_length=1,
        description="projections that get an adapter, in every layer",
    )

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.alpha / self.rank

    @field_validator("targets")
    @classmethod
    def _once_in_order(cls, targets: list[Projection]) -> list[Projection]:
        """Each once, in the layer's order: the order in which they are written down says
        nothing.
        """
        return [name for name in get_args(Projection) if name in targets]


class ModelConfig(Section):
    """The starting model, a Hugging Face folder, and the width it trains in."""

    path: str = Field(
        description="folder with config.json, tokenizer and, unless init is random, safetensors"
    )
    init: Literal["load", "random"] = Field(
        default="load", description="load safetensors, or draw from the seed"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the weights in training; the optimizer's copy is float32"
    )
    layers: Literal["auto", "local", "transformer_engine"] = Field(
        default="auto",
        description=(
            "auto takes Transformer Engine's layers in bfloat16, if they import and CUDA is present"
        ),
    )
    kernels: Literal["auto", "triton", "torch"] = Field(
        default="auto",
        description="the log-prob head's: auto takes Triton's if it imports and CUDA is present",
    )
    routing: Literal["own", "replay"] = Field(
        default="own",
        description=(
            "whose choice of experts a mixture follows: its own, or the engine's at sampling"
        ),
    )
    head_chunk_tokens: PositiveInt | None = Field(
        default=None,
        description=(
            "tokens whose logits the head holds at a time; 2048 x parallel.tensor when left out, "
            "on a CPU 256 MiB of logits at most"
        ),
    )
    lora: LoraConfig | None = Field(
        default=None,
        description=(
            "train low-rank adapters and leave the weights as they are; all weights when left out"
        ),
    )
    thinking: ThinkingConfig = Field(
        default_factory=ThinkingConfig,
        description="the texts around a thought, for methods that tell it from the answer",
    )
    megatron: dict[str, Any] = Field(
        default_factory=dict, description="any field of Megatron's TransformerConfig"
    )


class ParallelConfig(Section):
    """Splits the model over ranks; data parallelism is what remains of the world size."""

    tensor: PositiveInt = Field(default=1, description="ranks that split every layer's matrices")
    pipeline: PositiveInt = Field(default=1, description="stages, each with a share of the layers")
    virtual_pipeline: PositiveInt | None = Field(
        default=None, description="chunks of layers in each stage, interleaved"
    )
    context: PositiveInt = Field(default=1, description="ranks that split a sequence's tokens")
    expert: PositiveInt = Field(default=1, description="ranks that split a mixture's experts")
    sequence: bool = Field(
        default=False, description="split norms and dropout over the tensor ranks too"
    )
    wait_limit_s: float = Field(
        default=21600,
        gt=0,
        description="how long ranks wait on the CPU for rank 0: for rollouts, above all",
    )
    ddp: dict[str, Any] = Field(
        default_factory=dict, description="any field of Megatron's DDP configuration"
    )

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor * self.pipeline * self.context


def check_parallel(parallel: ParallelConfig, world_size: int) -> None:
    """Refuse a split that the number of ranks cannot hold."""
    # tensor x pipeline x context ranks hold one model; data parallelism repeats it
    if world_size % parallel.model_ranks:
        raise ConfigError(
            f"parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline} x context "
            f"{parallel.context} = {parallel.model_ranks} ranks hold one model, and {world_size} "
            "launched ranks are not a multiple of that; launch "
            f"{-(-world_size // parallel.model_ranks) * parallel.model_ranks}, or split the model "
            "less"
        )
    # norms and dropout split along the sequence, among the tensor ranks
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError(
            "parallel.sequence: sequence parallelism splits over tensor ranks; set "
            "parallel.tensor >= 2"
        )
    # interleaved pipeline: each stage holds several chunks of layers
    if parallel.virtual_pipeline is not None and parallel.pipeline == 1:
        raise ConfigError("parallel.virtual_pipeline: needs parallel.pipeline >= 2")
    if parallel.virtual_pipeline == 1:
        raise ConfigError(
            "parallel.virtual_pipeline: 1 chunk per stage is the plain pipeline; leave it out, or "
            "set 2"
        )
    # experts go over data and context ranks
    sharing = world_size // (parallel.tensor * parallel.pipeline)
    if sharing % parallel.expert:
        raise ConfigError(
            f"parallel.expert: experts are shared over data x context = {sharing} ranks (of "
            f"{world_size}, tensor {parallel.tensor}, pipeline {parallel.pipeline}), which "
            f"{parallel.expert} does not divide; "
            f"{' or '.join(str(d) for d in range(1, sharing + 1) if sharing % d == 0)} would fit"
        )
