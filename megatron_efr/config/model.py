"""The starting model, and how the policy is split over ranks."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt

from megatron_efr.config.section import ConfigError, Section


class ThinkingConfig(Section):
    """The texts around a thought in this model's responses."""

    opens: str | None = Field(
        default=None, min_length=1, description="`<think>` when left out, if the tokenizer has it as a token of text"
    )
    closes: str | None = Field(
        default=None, min_length=1, description="`</think>` when left out, if the tokenizer has it as a token of text"
    )


class ModelConfig(Section):
    """The starting model, a Hugging Face folder, and the width it trains in."""

    path: str = Field(description="folder with config.json, tokenizer and, unless init is random, safetensors")
    init: Literal["load", "random"] = Field(default="load", description="load safetensors, or draw from the seed")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the weights in training; the optimizer's copy is float32"
    )
    layers: Literal["auto", "local", "transformer_engine"] = Field(
        default="auto",
        description="auto takes Transformer Engine's layers in bfloat16, where they import and CUDA is present",
    )
    kernels: Literal["auto", "triton", "torch"] = Field(
        default="auto", description="the log-prob head's: auto takes Triton's where it imports and CUDA is present"
    )
    routing: Literal["own", "replay"] = Field(
        default="own", description="whose choice of experts a mixture follows: its own, or the engine's at sampling"
    )
    head_chunk_tokens: PositiveInt | None = Field(
        default=None,
        description="tokens whose logits the head holds at a time; 2048 x parallel.tensor when left out, on a CPU 256 "
        "MiB of logits at most",
    )
    thinking: ThinkingConfig = Field(
        default_factory=ThinkingConfig,
        description="the texts around a thought, for methods that tell it from the answer",
    )
    megatron: dict[str, Any] = Field(default_factory=dict, description="any field of Megatron's TransformerConfig")


class ParallelConfig(Section):
    """Splits the model over ranks; data parallelism is what remains of the world size."""

    tensor: PositiveInt = Field(default=1, description="ranks that split every layer's matrices")
    pipeline: PositiveInt = Field(default=1, description="stages, each with a share of the layers")
    virtual_pipeline: PositiveInt | None = Field(
        default=None, description="chunks of layers in each stage, interleaved"
    )
    context: PositiveInt = Field(default=1, description="ranks that split a sequence's tokens")
    expert: PositiveInt = Field(default=1, description="ranks that split a mixture's experts")
    sequence: bool = Field(default=False, description="split norms and dropout over the tensor ranks too")
    wait_limit_s: float = Field(
        default=21600, gt=0, description="how long ranks wait on the CPU for rank 0: for rollouts, above all"
    )
    ddp: dict[str, Any] = Field(default_factory=dict, description="any field of Megatron's DDP configuration")

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor * self.pipeline * self.context


def check_parallel(parallel: ParallelConfig, world_size: int) -> None:
    """Refuse a split that the number of ranks cannot hold."""
    if world_size % parallel.model_ranks:
        raise ConfigError(
            f"parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} = "
            f"{parallel.model_ranks} ranks hold one model, and {world_size} launched ranks are not a multiple of that; "
            f"launch {-(-world_size // parallel.model_ranks) * parallel.model_ranks}, or split the model less"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError("parallel.sequence: sequence parallelism splits over tensor ranks; set parallel.tensor >= 2")
    if parallel.virtual_pipeline is not None and parallel.pipeline == 1:
        raise ConfigError("parallel.virtual_pipeline: needs parallel.pipeline >= 2")
    if parallel.virtual_pipeline == 1:
        raise ConfigError("parallel.virtual_pipeline: 1 chunk per stage is the plain pipeline; leave it out, or set 2")
    sharing = world_size // (parallel.tensor * parallel.pipeline)  # experts go over data and context ranks
    if sharing % parallel.expert:
        raise ConfigError(
            f"parallel.expert: experts are shared over data x context = {sharing} ranks (of {world_size}, tensor "
            f"{parallel.tensor}, pipeline {parallel.pipeline}), which {parallel.expert} does not divide; "
            f"{' or '.join(str(d) for d in range(1, sharing + 1) if sharing % d == 0)} would fit"
        )
