"""Memory (counted) and time (measured) of an iteration on this CPU, with the embedded engine."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from megatron_efr import algorithms
from megatron_efr.config import ConfigError, TrainConfig
from megatron_efr.kernels import default_chunk
from megatron_efr.log import duration
from megatron_efr.memory import (
    BYTES,
    activation_bytes,
    gradient_bytes,
    held_count,
    micro_batch_tokens,
    optimizer_bytes,
    parameter_count,
    trained_count,
)
from megatron_efr.planning.embedded import cache_bytes, token_bytes, weight_bytes
from megatron_efr.planning.lengths import geometric, rows_of_steps
from megatron_efr.planning.probe import Seconds, Work, measured
from megatron_efr.planning.shapes import shape_of
from megatron_efr.policy.divisibility import check_fit
from megatron_efr.weights.architecture import Architecture

GIB = 2**30
PROBED = 512  # response tokens of the measured sequences at most
# bytes for each logit while tokens are drawn, at most (with top-p, or of a small vocabulary): fp32
# logits and log-probs, fp64 probabilities and their sums
DRAWING = 28


@dataclass(frozen=True)
class HostPlan:
    """An iteration of `config` in one process, whose prompts and responses have so many tokens in
    the mean.
    """

    config: TrainConfig
    prompt: int
    tokens: int

    def __post_init__(self) -> None:
        if not self.config.rollout.embedded:
            raise ConfigError(
                "rollout.engine: sglang is not planned on a CPU; set rollout.engine=local and "
                "'rollout.server={}', or give --gpus"
            )
        if self.config.parallel.model_ranks > 1:
            raise ConfigError(
                "parallel: on a CPU one process is planned; leave parallel out, or give --gpus"
            )
        check_fit(self.config.model, self.config.parallel, self.architecture)
        limit, positions = self.config.rollout.max_new_tokens, self.architecture.max_positions
        if self.tokens > limit:
            raise ConfigError(
                f"--tokens {self.tokens}: rollout.max_new_tokens cuts a response off at {limit}"
            )
        if self.prompt + limit > positions:
            raise ConfigError(
                f"rollout.max_new_tokens: {limit} behind a prompt of {self.prompt} tokens "
                f"(--prompt) come to {self.prompt + limit}, and the model has {positions} "
                "positions"
            )

    @cached_property
    def raw(self) -> dict[str, Any]:
        return shape_of(self.config.model.path)

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture.from_config(self.raw)

    @property
    def responses(self) -> int:
        return self.config.rollout.prompts * self.config.rollout.samples

    @property
    def rows(self) -> int:
        """Responses that are decoded at once."""
        return min(self.config.rollout.slots, self.responses)

    @property
    def budget(self) -> int:
        """Tokens of a micro-batch."""
        config = self.config
        return config.train.micro_batch_tokens or micro_batch_tokens(
            self.architecture, config.parallel, config.model.dtype, on_gpu=False
        )

    @cached_property
    def needs_reference(self) -> bool:
        algorithm = algorithms.build(self.config.algorithm, self.config.rollout)
        return algorithm.objective(self.config.rollout).needs_reference

    # -- memory
    # ----------------------------------------------------------------------------------------------

    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes of each part, by phase."""
        a, config, dtype = self.architecture, self.config, self.config.model.dtype
        count, lora = parameter_count(a), config.model.lora
        trained = trained_count(a, lora)
        # tensors that are there in every phase
        always = {
            "process": resident_bytes(),
            "weights": held_count(a, lora) * BYTES[dtype],
            "gradients": gradient_bytes(trained),
            "optimizer": optimizer_bytes(trained, dtype),
            "engine": weight_bytes(a, dtype),
        }
        if self.needs_reference and lora is None:
            always["reference"] = count * BYTES[dtype]
        # rollout: the engine's cache, for rows as long as they may become
        longest = self.prompt + config.rollout.max_new_tokens
        cache = cache_bytes(a, dtype, self.rows, longest)
        # a prompt has a cache of its own while samples of it wait: those of one begun, and as many
        # as all rows can take
        waiting = min(config.rollout.prompts, -(-self.rows // config.rollout.samples) + 1)
        cache += waiting * self.prompt * token_bytes(a, dtype)
        # training: activations and logits of one micro-batch
        tokens = self.responses * (self.prompt + self.tokens) // config.train.updates
        own = min(self.budget, tokens)
        chunk = config.model.head_chunk_tokens or default_chunk(a.vocab, 1, torch.device("cpu"))
        recompute = config.model.megatron.get("recompute_granularity") == "full"
        kept = activation_bytes(a, config.parallel, dtype, own, recompute=recompute, local=True)
        head = 4 * min(chunk, own) * a.vocab + 2 * own * a.hidden * BYTES[dtype]
        return {
            "rollout": always
            | {
                "KV cache": cache,
                "drawing": DRAWING * self.rows * a.vocab,
            },
            "train": always | {"activations": kept, "head": head},
        }

    # -- time
    # ----------------------------------------------------------------------------------------------

    def seconds(self) -> dict[str, float]:
        """Of each phase of an iteration, from what is measured now."""
        rollout, updates = self.config.rollout, self.config.train.updates
        probed = min(self.tokens, PROBED)
        groups = -(-self.rows // rollout.samples)
        samples = min(rollout.samples, self.rows)
        beyond = (self.tokens - probed) // 2
        work = Work(groups, samples, self.prompt, probed, beyond, self.budget)
        found: Seconds = measured(self.raw, self.config.model, work)
        # times of sequences as long as the measured ones, by as much longer as these are
        longer = (self.prompt + self.tokens) / (self.prompt + probed)
        scored = self.responses * found.score * longer
        # a step's time grows with its rows; the first token comes of the prompt's own logits
        lengths = geometric(self.tokens, rollout.max_new_tokens, self.responses)
        rows = rows_of_steps(lengths - 1, self.rows)
        steps = np.interp(rows, (samples, groups * samples), (found.few, found.full)).sum()
        return {
            "rollout": rollout.prompts * found.prefill + float(steps),
            "logprobs": scored * (2 if self.needs_reference else 1),
            "train": self.responses * found.train * longer + updates * found.update,
        }


def describe(plan: HostPlan) -> Iterator[str | Table]:
    """The plan's memory as it is printed."""
    config = plan.config
    memory = plan.memory()
    yield (
        f"{parameter_count(plan.architecture) / 1e6:,.3g} million parameters, "
        f"{config.model.dtype}; a CPU, {torch.get_num_threads()} threads, "
        f"{host_bytes() / GIB:.1f} GiB of memory; {plan.responses} responses of {plan.tokens} "
        f"tokens to prompts of {plan.prompt}"
    )
    parts = list(dict.fromkeys(part for each in memory.values() for part in each))
    table = Table("phase", *parts, "total", title="GiB at the phase's peak", title_justify="left")
    for phase, each in memory.items():
        cells = [f"{each[part] / GIB:.2f}" if part in each else "" for part in parts]
        table.add_row(phase, *cells, f"{sum(each.values()) / GIB:.2f}")
    yield table


def told(plan: HostPlan) -> str:
    """The time of an iteration and of the run, in words, after up to a minute of measuring."""
    config = plan.config
    seconds = plan.seconds()
    total = sum(seconds.values())
    each = ", ".join(f"{phase} {value:.3g} s" for phase, value in seconds.items())
    whole = duration(total * config.train.iterations)
    return f"an iteration: about {total:.3g} s ({each}); {config.train.iterations} of them: {whole}"


def fits(plan: HostPlan) -> bool:
    """True if every phase is within the machine's memory."""
    return max(sum(each.values()) for each in plan.memory().values()) <= host_bytes()


def host_bytes() -> int:
    """Memory of this machine, or what its control group may take of it."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        return min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return whole


def resident_bytes() -> int:
    """Bytes of this process with all libraries loaded, as a run has; 0 if the kernel is silent."""
    with contextlib.suppress(OSError):
        if found := re.search(
            r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii")
        ):
            return int(found[1]) * 1024
    return 0
