"""The run's configuration: one typed section per room, read from YAML and checked before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from megatron_efr.rolloutconfig import EnginesConfig as EnginesConfig
from megatron_efr.rolloutconfig import EvaluationEnginesConfig as EvaluationEnginesConfig
from megatron_efr.rolloutconfig import RolloutConfig as RolloutConfig
from megatron_efr.rolloutconfig import TimeoutsConfig as TimeoutsConfig
from megatron_efr.section import ConfigError as ConfigError
from megatron_efr.section import Section as Section


class ModelConfig(Section):
    """The starting model, a Hugging Face folder, and the width it trains in."""

    path: str = Field(description="folder with config.json, tokenizer and, unless init is random, safetensors")
    init: Literal["load", "random"] = Field(default="load", description="load safetensors, or draw from the seed")
    dtype: Literal["float32", "bfloat16"] = "float32"
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
        default=None, description="tokens whose logits the head holds at a time; 2048 x parallel.tensor when left out"
    )
    megatron: dict[str, Any] = Field(default_factory=dict, description="any field of Megatron's TransformerConfig")


class ParallelConfig(Section):
    """How the model is split; data parallelism is what remains of the world size."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt | None = None
    context: PositiveInt = 1
    expert: PositiveInt = 1
    sequence: bool = False
    wait_limit_s: float = Field(
        default=21600, gt=0, description="how long ranks wait on the CPU for rank 0: for rollouts, above all"
    )
    ddp: dict[str, Any] = Field(default_factory=dict, description="any field of Megatron's DDP configuration")

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor * self.pipeline * self.context


class DatasetConfig(Section):
    """Where questions come from and how a row is read."""

    path: str = Field(description="a .jsonl / .json / .parquet file, a folder saved by datasets, or a hub name")
    format: Literal["auto", "gsm8k", "math", "columns"] = Field(
        default="auto",
        description="auto: gsm8k where the answer holds '####', else question/answer columns found by name",
    )
    split: str = Field(default="train", description="split of a hub data set")
    question: str | None = Field(default=None, description="column of the question; found by name when left out")
    answer: str | None = Field(default=None, description="column of the gold answer; found by name when left out")
    difficulty: str | None = Field(default=None, description="column to report tokens and accuracy by")
    name: str | None = Field(default=None, description="name in reports; the file's stem when left out")
    limit: PositiveInt | None = Field(default=None, description="first rows only")


class PromptConfig(Section):
    """How a question becomes token ids."""

    template: str = Field(
        default="Please reason step by step, and put your final answer within \\boxed{{}}. Question: {question}",
        description="the user turn; a str.format template with {question}",
    )
    system: str | None = None
    prefill: str = Field(
        default="template",
        description="what stands after the assistant tag: 'template' (as the chat template has it), 'none' (refuse a "
        "template that adds more), or a text to append",
    )
    max_tokens: PositiveInt = 512
    overlong: Literal["skip", "error"] = "skip"


class DataConfig(Section):
    """The stream of training prompts."""

    datasets: list[DatasetConfig] = Field(min_length=1)
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    shuffle: bool = True


class GradingConfig(Section):
    """math-verify in processes that can be killed."""

    workers: PositiveInt = 1
    timeout_s: float = Field(default=5.0, gt=0, description="CPU seconds for one response")


class MethodConfig(BaseModel):
    """Which rule turns groups into rewards and advantages; the other keys are the method's own, checked by it."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: str = "efr"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class LossConfig(Section):
    """The policy-gradient loss (PPO clip) and the KL to the initial model."""

    clip: float = Field(default=0.2, gt=0, lt=1)
    beta: float = Field(default=1e-3, ge=0, description="weight of the KL to the initial model, inside the reward (k1)")
    normalize: Literal["none", "batch"] = Field(
        default="none",
        description="advantages as they are (the paper's text) or whitened over the batch (its released code)",
    )
    aggregate: Literal["sequence", "token"] = Field(
        default="sequence", description="mean over each sequence's tokens, then over sequences; or over all tokens"
    )
    importance: Literal["auto", "none", "truncate", "mask"] = Field(
        default="auto",
        description="weight of a token by exp(policy before the update - engine), cut at importance_cap, or 0 outside "
        "importance_low to importance_high; auto: truncate where rollouts are partial or async, else none",
    )
    importance_cap: float = Field(default=2.0, gt=0)
    importance_low: float = Field(default=0.5, ge=0, le=1)
    importance_high: float = Field(default=5.0, ge=1)


class OptimizerConfig(Section):
    """Adam and its learning-rate schedule."""

    lr: float = Field(gt=0)
    min_lr: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_updates: int = Field(default=0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_grad: float = Field(default=1.0, ge=0, description="0 turns clipping off")
    megatron: dict[str, Any] = Field(default_factory=dict, description="any field of Megatron's OptimizerConfig")


class TrainingConfig(Section):
    """The loop: how many iterations, how many updates in each, how work is packed."""

    iterations: PositiveInt = 100
    updates: PositiveInt = Field(default=2, description="optimizer updates per iteration, over equal shares of it")
    micro_batch_tokens: PositiveInt = Field(default=16384, description="token budget of one packed micro-batch")
    max_logprob_diff: float = Field(
        default=0.5,
        gt=0,
        description="stop when |engine - policy| log-prob, averaged over an iteration's tokens of the policy's own "
        "version, exceeds this",
    )
    warn_logprob_diff: float | None = Field(
        default=None, gt=0, description="say so when it exceeds this; a fifth of max_logprob_diff when left out"
    )
    max_skipped: PositiveInt = Field(default=3, description="stop when so many updates in a row had to be skipped")

    @property
    def warns_above(self) -> float:
        return self.warn_logprob_diff or self.max_logprob_diff / 5

    @model_validator(mode="after")
    def _warns_before_it_stops(self) -> TrainingConfig:
        if self.warns_above > self.max_logprob_diff:
            raise ValueError(
                f"train.warn_logprob_diff: {self.warn_logprob_diff} would warn after train.max_logprob_diff = "
                f"{self.max_logprob_diff} has stopped the run; set it lower"
            )
        return self


class CheckpointConfig(Section):
    every: PositiveInt = Field(default=10, description="iterations (SFT: updates) from one to the next, and the last")
    keep: PositiveInt = Field(default=2, description="how many of the newest to keep")
    keep_every: PositiveInt | None = Field(
        default=None, description="those whose step is a multiple of this are never removed; a multiple of every"
    )
    background: bool = Field(
        default=False, description="copy to host memory and write while training goes on (the copy takes that memory)"
    )

    @model_validator(mode="after")
    def _kept_ones_are_saved(self) -> CheckpointConfig:
        if self.keep_every is not None and self.keep_every % self.every:
            raise ValueError(f"keep_every {self.keep_every} is no multiple of every {self.every}: none would be saved")
        return self


class EvaluationConfig(Section):
    """Held-out problems, graded during training (`every`) or by `efr evaluate`."""

    datasets: list[DatasetConfig] = Field(default_factory=list)
    every: PositiveInt | None = Field(default=None, description="iterations between evaluations inside a training run")
    preset: Literal["paper", "r1", "custom"] = Field(
        default="paper",
        description="paper: temperature 0.6, top-p 1; r1: temperature 0.6, top-p 0.95; custom: as given here",
    )
    temperature: float | None = Field(default=None, ge=0, description="custom preset only; 0 is greedy")
    top_p: float | None = Field(default=None, gt=0, le=1)
    samples: PositiveInt = Field(default=1, description="responses per problem")
    samples_by_dataset: dict[str, PositiveInt] = Field(default_factory=dict)
    max_new_tokens: PositiveInt = 32768

    @model_validator(mode="after")
    def _sampling_belongs_to_custom(self) -> EvaluationConfig:
        if self.preset == "custom" and self.temperature is None:
            raise ValueError("preset custom needs a temperature")
        if self.preset != "custom" and (self.temperature is not None or self.top_p is not None):
            raise ValueError(f"preset {self.preset} fixes temperature and top_p; set preset: custom to choose them")
        return self

    @property
    def sampling(self) -> tuple[float, float]:
        """(temperature, top_p)."""
        if self.preset == "custom":
            assert self.temperature is not None
            return self.temperature, 1.0 if self.top_p is None else self.top_p
        return 0.6, 1.0 if self.preset == "paper" else 0.95


class ObserveConfig(Section):
    tensorboard: bool = True
    wandb: str | None = Field(default=None, description="project name; needs the wandb extra")
    watchdog_s: float | None = Field(
        default=None, gt=0, description="end the run when one phase lasts longer than this many seconds"
    )
    rollouts: bool = Field(default=True, description="keep every iteration's rollouts in the run folder, replayable")


class RunConfig(Section):
    """What every program's configuration begins with."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")
    runs: str = Field(default="runs", description="the folder of all runs; this one is runs/name")
    seed: int = Field(default=42, ge=0)
    model: ModelConfig

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name


class TrainConfig(RunConfig):
    """`efr train`."""

    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    grading: GradingConfig = Field(default_factory=GradingConfig)
    method: MethodConfig = Field(default_factory=MethodConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    optimizer: OptimizerConfig
    train: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    observe: ObserveConfig = Field(default_factory=ObserveConfig)

    @model_validator(mode="after")
    def _both_heads_are_fp32(self) -> TrainConfig:
        if self.model.dtype != "float32" and self.rollout.server.get("enable_fp32_lm_head", True) is False:
            raise ValueError(
                "rollout.server.enable_fp32_lm_head: false, and the policy computes logits in fp32 whatever its "
                "model.dtype; log-probs would differ by several 1e-2. Leave it out, or set it true"
            )
        return self

    @model_validator(mode="after")
    def _responses_split_over_updates(self) -> TrainConfig:
        responses = self.rollout.prompts * self.rollout.samples
        if responses % self.train.updates:
            raise ValueError(
                f"rollout.prompts x rollout.samples = {self.rollout.prompts} x {self.rollout.samples} = {responses} "
                f"responses do not split over train.updates = {self.train.updates}"
            )
        return self

    @property
    def importance(self) -> Literal["none", "truncate", "mask"]:
        """What `loss.importance` comes to."""
        if self.loss.importance != "auto":
            return self.loss.importance
        return "truncate" if self.rollout.off_policy else "none"

    def check_world(self, world_size: int) -> None:
        """Refuse sizes that do not divide over `world_size` ranks; call once the number of ranks is known."""
        check_parallel(self.parallel, world_size)
        replicas = world_size // self.parallel.model_ranks
        per_update = self.rollout.prompts * self.rollout.samples // self.train.updates
        if per_update % replicas:
            raise ConfigError(
                f"train.updates: {per_update} responses per update (rollout.prompts {self.rollout.prompts} x "
                f"rollout.samples {self.rollout.samples} / train.updates {self.train.updates}) do not divide over "
                f"{replicas} data-parallel ranks; make them a multiple of {replicas}"
            )


class SftDataConfig(Section):
    """Rows of question and response text: `{"question", "response"}` by default."""

    path: str
    question: str = "question"
    response: str = "response"
    limit: PositiveInt | None = None


class SftTrainingConfig(Section):
    updates: PositiveInt
    batch: PositiveInt = Field(default=64, description="sequences per optimizer update")
    micro_batch_tokens: PositiveInt = 16384
    bucket: PositiveInt = Field(
        default=1,
        description="updates drawn together and sorted by length before they are split, so that batches waste little",
    )
    log_every: PositiveInt = 10


class SftConfig(RunConfig):
    """`efr sft`."""

    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: SftDataConfig
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    optimizer: OptimizerConfig
    train: SftTrainingConfig
    loss_aggregate: Literal["sequence", "token"] = "token"
    checkpoint: CheckpointConfig = Field(default_factory=lambda: CheckpointConfig(every=500, keep=1))
    observe: ObserveConfig = Field(default_factory=ObserveConfig)

    def check_world(self, world_size: int) -> None:
        """Refuse sizes that do not divide over `world_size` ranks."""
        check_parallel(self.parallel, world_size)
        replicas = world_size // self.parallel.model_ranks
        if self.train.batch % replicas:
            raise ConfigError(
                f"train.batch: {self.train.batch} sequences do not divide over {replicas} data-parallel ranks; "
                f"make it a multiple of {replicas}"
            )


class EvaluateConfig(RunConfig):
    """`efr evaluate`; `model.path` may be a Megatron checkpoint, or a run's folder, whose newest is taken."""

    template: str | None = Field(
        default=None,
        description="folder with config.json and tokenizer, for a checkpoint; by default the model that it began with",
    )
    rollout: EvaluationEnginesConfig = Field(default_factory=EvaluationEnginesConfig)
    prompt: PromptConfig = Field(default_factory=PromptConfig)
    evaluation: EvaluationConfig
    grading: GradingConfig = Field(default_factory=GradingConfig)


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
