"""Memory that a run takes on each GPU, phase by phase, before any GPU is asked for.

The formulas and their sources are in megatron_efr/memory.py: they count tensors, and have not been
compared with a card yet. A run says what each phase did take as `time/<phase>_device_gib`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.table import Table

from megatron_efr import algorithms
from megatron_efr.config import ConfigError, TrainConfig
from megatron_efr.config.file import load
from megatron_efr.memory import MICRO_BATCH_TOKENS, MemoryPlan, Shape, parameter_count, plan
from megatron_efr.planning.shapes import shape_of
from megatron_efr.policy.divisibility import check_fit, te_layers_suit
from megatron_efr.weights.architecture import Architecture

# if rollout.server.mem_fraction_static is left out; SGLang then decides for itself
STATIC_FRACTION = 0.6
GIB = 2**30
RECOMPUTE = "{recompute_granularity: full, recompute_method: uniform, recompute_num_layers: 1}"


@dataclass(frozen=True)
class Case:
    """A configuration on a number of GPUs of one size."""

    path: str
    overrides: tuple[str, ...]
    world: int
    gpu_bytes: int
    shape: Architecture | None = None  # of the model, if it has been read

    def and_also(self, overrides: Sequence[str]) -> Case:
        """The same model with more overrides."""
        more = (*self.overrides, *overrides)
        return Case(self.path, more, self.world, self.gpu_bytes, self.architecture)

    @cached_property
    def config(self) -> TrainConfig:
        return load(TrainConfig, self.path, self.overrides)

    @cached_property
    def architecture(self) -> Architecture:
        return self.shape or Architecture.from_config(shape_of(self.config.model.path))

    @cached_property
    def static_fraction(self) -> float:
        return float(self.config.rollout.server.get("mem_fraction_static", STATIC_FRACTION))

    @cached_property
    def plan(self) -> MemoryPlan:
        """The memory of every phase; ConfigError if the split does not divide."""
        config = self.config
        # refuse what a run would refuse
        config.check_world(self.world)
        check_fit(config.model, config.parallel, self.architecture)
        if self.longest > self.architecture.max_positions:
            raise ConfigError(
                f"data.prompt.max_tokens + rollout.max_new_tokens: {self.longest} tokens, and the "
                f"model has {self.architecture.max_positions} positions"
            )
        if self.world % config.rollout.tp:
            raise ConfigError(f"rollout.tp: {config.rollout.tp} does not divide {self.world} GPUs")
        # then the memory, as a function of shapes
        objective = algorithms.build(config.algorithm, config.rollout).objective(config.rollout)
        return plan(
            Shape(
                architecture=self.architecture,
                parallel=config.parallel,
                dtype=config.model.dtype,
                world=self.world,
                micro_batch_tokens=self.micro_batch_tokens,
                recompute=config.model.megatron.get("recompute_granularity") == "full",
                local_layers=not te_layers_suit(config.model),
                sharded_optimizer=bool(config.parallel.ddp.get("use_distributed_optimizer", False)),
                # what the engine takes of the same GPUs
                engine_ranks=config.rollout.tp,
                static_fraction=self.static_fraction,
                bucket_bytes=config.rollout.bucket_mib * 2**20,
                gpu_bytes=self.gpu_bytes,
                keeps_reference=objective.needs_reference,
                lora=config.model.lora,
            )
        )

    @property
    def micro_batch_tokens(self) -> int:
        return self.config.train.micro_batch_tokens or MICRO_BATCH_TOKENS

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that an engine may have to hold."""
        return self.config.data.prompt.max_tokens + self.config.rollout.max_new_tokens

    @property
    def fits(self) -> bool:
        """True if every phase is within the GPU, and the KV cache holds at least one whole
        sequence.
        """
        return (
            all(p.total <= self.gpu_bytes for p in self.plan.phases)
            and self.plan.kv_tokens >= self.longest
        )


def levers(case: Case) -> Iterator[list[list[str]]]:
    """Levers that save memory: for each its settings that save more than today's, as overrides."""
    parallel, rollout = case.config.parallel, case.config.rollout
    if case.config.model.megatron.get("recompute_granularity") != "full":
        yield [[f"model.megatron={RECOMPUTE}"]]
    if not parallel.ddp.get("use_distributed_optimizer"):
        yield [["parallel.ddp.use_distributed_optimizer=true"]]
    sizes = (2, 4, 8)
    yield [[f"parallel.tensor={n}", "parallel.sequence=true"] for n in sizes if n > parallel.tensor]
    yield [[f"parallel.context={n}"] for n in sizes if n > parallel.context]
    yield [[f"rollout.tp={n}"] for n in sizes if n > rollout.tp]
    yield [
        [f"rollout.server.mem_fraction_static={f}"]
        for f in (0.5, 0.4, 0.3)
        if f < case.static_fraction
    ]
    yield (
        [[f"train.micro_batch_tokens={case.longest}"]]
        if case.longest < case.micro_batch_tokens
        else []
    )


def remedies(case: Case, most: int = 3) -> list[list[str]]:
    """The fewest levers that make the run fit, in every such combination; none if `most` together
    do not.
    """
    for count in range(1, most + 1):
        found = []
        for chosen in itertools.combinations([lever for lever in levers(case) if lever], count):
            for settings in itertools.product(*chosen):
                changed = case.and_also([override for setting in settings for override in setting])
                try:
                    if changed.fits:
                        found.append(list(changed.overrides[len(case.overrides) :]))
                        break  # the gentlest setting of these levers
                except ConfigError:  # does not divide
                    continue
        if found:
            return found
    return []


def table(case: Case) -> Table:
    """Phases down, parts across, in GiB."""
    parts = list(dict.fromkeys(part for phase in case.plan.phases for part in phase.parts))
    made = Table("phase", *parts, "total", title="GiB on the fullest GPU", title_justify="left")
    for column in made.columns[1:]:
        column.justify = "right"
    for phase in case.plan.phases:
        cells = [f"{phase.parts[part] / GIB:.1f}" if part in phase.parts else "" for part in parts]
        over = phase.total > case.gpu_bytes
        made.add_row(
            phase.name,
            *cells,
            f"{phase.total / GIB:.1f}{' > GPU' if over else ''}",
            style="red" if over else "",
        )
    return made


def describe(case: Case) -> Iterator[str | Table]:
    """The plan as it is printed."""
    config, made = case.config, case.plan
    parallel, tp = config.parallel, config.rollout.tp
    replicas = case.world // parallel.model_ranks
    yield (
        f"{Path(case.path).name}: {parameter_count(case.architecture) / 1e9:.2f} billion "
        f"parameters, {config.model.dtype}; {case.world} GPUs of {case.gpu_bytes / GIB:.0f} GiB: "
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} x "
        f"{replicas} replicas, {case.world // tp} engines of {tp}"
    )
    yield table(case)
    yield (
        f"KV cache of one engine: {made.kv_tokens:,} tokens, the longest sequence "
        f"{case.longest:,} of the model's {case.architecture.max_positions:,} positions"
    )
    yield (
        f"host memory of one rank: {made.host_bytes / GIB:.1f} GiB (reference, offloaded "
        "gradients and optimizer)"
    )
