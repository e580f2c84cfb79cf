"""`efr dpo`: direct preference optimization of the shortest right answers against the longest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megatron_efr import arguments
from megatron_efr.config import ConfigError, DpoConfig
from megatron_efr.offline import answers
from megatron_efr.offline.loop import train_on_rows
from megatron_efr.offline.preferences import PreferenceUpdate
from megatron_efr.samples import Sample
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import initial_weights


def dpo(config: DpoConfig, resume: bool = False) -> None:
    """Train to the end, from the start or from the newest checkpoint, and write the model
    folder.
    """
    update = PreferenceUpdate(config.preference.beta, config.train.micro_batch_tokens)
    train_on_rows(
        config, resume, partial(load_pairs, config), update, samples_each=2, keep_reference=True
    )


def load_pairs(config: DpoConfig, architecture: Architecture) -> list[Sample]:
    """The pairs' samples, the preferred one first; ConfigError if they are fewer than an update
    takes.
    """
    initial_weights(config.model, architecture, config.seed)  # refused here if missing
    samples = answers.pairs(config.data.path, architecture.max_positions, config.data.limit)
    if len(samples) < 2 * config.train.batch:
        raise ConfigError(
            f"{config.data.path}: {len(samples) // 2} prompts with two right answers of different "
            f"lengths, and train.batch takes {config.train.batch} pairs"
        )
    print(f"{len(samples) // 2} pairs to train on", flush=True)
    return samples


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `efr dpo`."""
    parser = arguments.parser(
        "dpo", "Direct preference optimization of a run's own judged answers.", resumes=True
    )
    given = parser.parse_intermixed_args(argv)
    with arguments.configured(DpoConfig, given) as config:
        dpo(config, given.resume)


if __name__ == "__main__":
    arguments.run(main)
