"""Methods by name: ours from a dictionary, third parties' by entry point."""

from __future__ import annotations

from megatron_efr.config import (
    AlgorithmConfig,
    ConfigError,
    MethodConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_efr.config.file import validate
from megatron_efr.config.plugins import find_class
from megatron_efr.methods import (
    branching,
    compared,
    efr,
    experimental,
    iteration,
    lengths,
    limits,
    modes,
    monitored,
    prefixes,
    relative,
    remembering,
    rounds,
    scripted,
    told,
)
from megatron_efr.methods.base import Method, Needs

ENTRY_POINT = "megatron_efr.methods"

METHODS: dict[str, type[Method]] = {
    "efr": efr.EFR,
    "shorterbetter": lengths.ShorterBetter,
    "kimi": lengths.Kimi,
    "prime_rl": lengths.PrimeRL,
    "grlc": lengths.GRLC,
    "overlong": limits.Overlong,
    "thinkprune": limits.ThinkPrune,
    "cosine": limits.Cosine,
    "laser": limits.Laser,
    "laser_d": monitored.LaserD,
    "laser_de": monitored.LaserDE,
    "dler": limits.DLER,
    "da_dler": limits.DADLER,
    "stop_properly": limits.StopProperly,
    "grpo_lambda": iteration.GRPOLambda,
    "twyn": relative.TWYN,
    "gfpo": relative.GFPO,
    "gdpo": relative.GDPO,
    "qglas": relative.QGLAS,
    "drpo": relative.DRPO,
    "o1_pruner": compared.O1Pruner,
    "adapt_think": compared.AdaptThink,
    "hapo": remembering.HAPO,
    "short_rl": remembering.ShortRL,
    "leash": remembering.LEASH,
    "a_dlp": remembering.ADLP,
    "acoer": remembering.Acoer,
    "l1_exact": told.L1Exact,
    "l1_max": told.L1Max,
    "asrr": scripted.ASRR,
    "elastic": scripted.Elastic,
    "lapo": scripted.LAPO,
    "anytime": branching.Anytime,
    "mrt": branching.MRT,
    "s_grpo": branching.SGRPO,
    "jet": branching.JET,
    "infty_think": rounds.InftyThink,
    "autothink": modes.AutoThink,
    "adactrl": modes.AdaCtrl,
    "thinkless": modes.Thinkless,
    "experimental.alp": experimental.ALP,
    "experimental.gr3": experimental.GR3,
    "experimental.o1_pruner_online": experimental.O1PrunerOnline,
    "experimental.self_budgeter": experimental.SelfBudgeter,
    "experimental.adacot": experimental.AdaCoT,
    "experimental.memory_r": experimental.MemoryR,
    "experimental.sgpo": prefixes.SGPO,
    "experimental.l2t": prefixes.L2T,
    "experimental.effort": experimental.Effort,
    "experimental.target": experimental.Target,
}


def find(name: str) -> type[Method]:
    """The method of that name; ConfigError if there is none."""
    return find_class(name, METHODS, ENTRY_POINT, Method, "method")


def build(config: MethodConfig, rollout: RolloutConfig, algorithm: AlgorithmConfig) -> Method:
    """The configured method; ConfigError for an unknown name, a wrong option, or what the run
    cannot give it.
    """
    kind = find(config.name)
    made = validate(kind, config.options, prefix="method")
    _check_needs(config.name, made.needs, rollout, algorithm)
    made.check(rollout)
    return made


def resolved(config: TrainConfig, method: Method) -> TrainConfig:
    """The configuration with every option of its method written out."""
    options = {"name": config.method.name, **method.model_dump()}
    return config.model_copy(update={"method": MethodConfig.model_validate(options)})


def _check_needs(
    name: str, needs: Needs, rollout: RolloutConfig, algorithm: AlgorithmConfig
) -> None:
    """Refuse a method that asks for what the run cannot give."""
    if rollout.samples < needs.samples:
        raise ConfigError(
            f"rollout.samples: {rollout.samples} response(s) per prompt, and {name} compares "
            f"responses of one prompt: it needs at least {needs.samples}"
        )
    if needs.algorithms is not None and algorithm.name not in needs.algorithms:
        raise ConfigError(
            f"algorithm.name: {algorithm.name}, and method {name} works with "
            f"{', '.join(sorted(needs.algorithms))}"
        )
