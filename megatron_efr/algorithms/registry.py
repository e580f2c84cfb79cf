"""Algorithms by name: ours from a dictionary, third parties' by entry point."""

from __future__ import annotations

from megatron_efr.algorithms import named
from megatron_efr.algorithms.base import Algorithm
from megatron_efr.config import AlgorithmConfig, ConfigError, RolloutConfig, TrainConfig
from megatron_efr.config.file import validate
from megatron_efr.config.plugins import find_class

ENTRY_POINT = "megatron_efr.algorithms"

ALGORITHMS: dict[str, type[Algorithm]] = {
    "rloo": named.RLOO,
    "grpo": named.GRPO,
    "dr_grpo": named.DrGRPO,
    "reinforce_plus_plus": named.ReinforcePlusPlus,
    "reinforce_plus_plus_baseline": named.ReinforcePlusPlusBaseline,
    "dapo": named.DAPO,
    "gspo": named.GSPO,
    "cispo": named.CISPO,
    "opo": named.OPO,
    "likelihood": named.Likelihood,
    "filtered_sft": named.FilteredSFT,
    "filtered_sft_negatives": named.FilteredSFTNegatives,
}


def find(name: str) -> type[Algorithm]:
    """The algorithm of that name, ours or an installed third party's; ConfigError if there is
    none.
    """
    return find_class(name, ALGORITHMS, ENTRY_POINT, Algorithm, "algorithm")


def build(config: AlgorithmConfig, rollout: RolloutConfig) -> Algorithm:
    """The configured algorithm; ConfigError for an unknown name, a wrong option, or what the
    rollouts cannot give.
    """
    made = validate(find(config.name), {"name": config.name, **config.options}, prefix="algorithm")
    if rollout.samples < made.min_samples:
        raise ConfigError(
            f"rollout.samples: {rollout.samples} response(s) per prompt, and algorithm "
            f"{config.name} compares responses of one prompt: it needs at least "
            f"{made.min_samples}, or algorithm.baseline: none"
        )
    if made.truncated == "soft" and (made.overlong_tokens or 0) > rollout.max_new_tokens:
        raise ConfigError(
            f"algorithm.overlong_tokens: {made.overlong_tokens} is more than a response may have, "
            f"rollout.max_new_tokens = {rollout.max_new_tokens}"
        )
    return made


def resolved(config: TrainConfig, algorithm: Algorithm) -> TrainConfig:
    """The configuration with every choice of its algorithm written out."""
    return config.model_copy(
        update={"algorithm": AlgorithmConfig.model_validate(algorithm.model_dump())}
    )
