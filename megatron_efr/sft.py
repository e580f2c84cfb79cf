"""`efr sft`: supervised fine-tuning on (question, response) rows, masked to responses, with the
policy's own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megatron_efr import arguments
from megatron_efr.config import ConfigError, SftConfig
from megatron_efr.data.prompts import load_tokenizer
from megatron_efr.data.sft import holds_answers, load_sft
from megatron_efr.offline import answers
from megatron_efr.offline.loop import train_on_rows
from megatron_efr.policy import Policy, supervised_loss
from megatron_efr.samples import Sample
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import initial_weights


def sft(config: SftConfig, resume: bool = False) -> None:
    """Train to the end, from the start or from the newest checkpoint, and write the model
    folder.
    """

    def update(policy: Policy, samples: Sequence[Sample], rows: list[int]) -> dict[str, float]:
        batches = policy.pack_update(
            samples, rows, config.train.micro_batch_tokens, config.loss_aggregate
        )
        return policy.update(batches, supervised_loss)

    train_on_rows(config, resume, partial(load_rows, config), update)


def load_rows(config: SftConfig, architecture: Architecture) -> list[Sample]:
    """The rows as samples to train on; ConfigError if they are fewer than one update takes."""
    initial_weights(config.model, architecture, config.seed)  # refused here if missing
    data, positions = config.data, architecture.max_positions
    if holds_answers(data.path):
        pick = answers.shortest if data.pick == "shortest" else answers.every_right
        samples = pick(data.path, positions, data.limit)
        said = "right answers to train on"
    else:
        tokenizer = load_tokenizer(config.model.path, architecture.raw)
        rows = load_sft(data, tokenizer, config.prompt, positions)
        samples = rows.samples
        said = f"rows to train on, {rows.overlong} left out: prompt too long"
    if len(samples) < config.train.batch:
        raise ConfigError(
            f"{data.path}: {len(samples)} rows, and train.batch takes {config.train.batch}"
        )
    print(f"{len(samples)} {said}", flush=True)
    return samples


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `efr sft`."""
    parser = arguments.parser(
        "sft", "Supervised fine-tuning on question and response rows.", resumes=True
    )
    given = parser.parse_intermixed_args(argv)
    with arguments.configured(SftConfig, given) as config:
        sft(config, given.resume)


if __name__ == "__main__":
    arguments.run(main)
