"""`efr sft`: supervised fine-tuning on (question, response) rows, masked to responses, with the policy's own code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np

from megatron_efr import arguments
from megatron_efr.checkpoint.checkpoints import Checkpoints
from megatron_efr.config import ConfigError, SftConfig
from megatron_efr.config.file import dump, validate
from megatron_efr.data.prompts import load_tokenizer
from megatron_efr.data.sft import load_sft
from megatron_efr.observe import Observer
from megatron_efr.policy import Policy, check_policy, joined_ranks, supervised_loss
from megatron_efr.run.environment import date_prompts
from megatron_efr.run.folder import RunFolder
from megatron_efr.run.interruption import EXIT_REQUEUE, Interruption
from megatron_efr.run.iteration import check_skipped
from megatron_efr.run.owner import claimed
from megatron_efr.samples import Sample
from megatron_efr.types import UserError
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import initial_weights


def sft(config: SftConfig, resume: bool = False) -> None:
    """Train to the end, from the start or from the newest checkpoint, and write the model folder."""
    config.check_world(arguments.world_size())
    check_policy(config.model, config.parallel, config.optimizer)
    with joined_ranks(config.parallel, config.seed, config.model) as ranks, ExitStack() as resources:
        folder = RunFolder(config.folder)
        claim = claimed(folder, dump(config), resume, lambda tree: dump(validate(SftConfig, tree)))
        ranks.on_main(lambda: resources.enter_context(claim))
        ranks.on_main(lambda: date_prompts(config.prompt, folder))
        samples = ranks.share(lambda: load_rows(config))
        rows = checksum(samples)
        policy = Policy(
            config.model, config.parallel, config.optimizer, ranks, updates=config.train.updates, seed=config.seed
        )
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoint, ranks)
        done = restore(policy, checkpoints, rows, config.data.path) if resume else 0
        total = config.train.updates
        if resume:
            ranks.on_main(lambda: folder.go_on_from(done, total, "update", config.train.log_every))
        observing = Observer(folder, config.observe, total, ranks.rank, done, config.name, ranks.largest)
        with Interruption() as interruption, observing as observer:
            for step, update in enumerate(schedule(samples, config), start=1):
                if step <= done:
                    continue
                with observer.phase("train"):
                    batches = policy.pack_update(
                        samples, update, config.train.micro_batch_tokens, config.loss_aggregate
                    )
                    metrics = policy.update(batches, supervised_loss)
                ending = not ranks.everywhere(interruption.received is None)
                skipped = policy.optimizer.skipped_in_a_row
                stops = skipped >= config.train.max_skipped
                if step % config.train.log_every == 0 or step == total or stops:
                    observer.log(step, metrics)
                check_skipped(skipped, config.train.max_skipped, f"update {step}")
                if step % config.checkpoint.every == 0 or step == total or ending:
                    with observer.phase("checkpoint"):
                        state = {"step": step, "initial_model": policy.initial_model, "rows": rows}
                        checkpoints.save(step, policy.sharded_state(), state)
                checkpoints.settle(wait=step == total or ending)
                if ending and step < total:
                    raise SystemExit(EXIT_REQUEUE)
        policy.save_folder(folder.model)


def load_rows(config: SftConfig) -> list[Sample]:
    """The rows as samples to train on; ConfigError where they are fewer than one update takes."""
    architecture = Architecture.from_folder(config.model.path)
    initial_weights(config.model, architecture, config.seed)  # refused here if missing
    rows = load_sft(config.data, load_tokenizer(config.model.path), config.prompt, architecture.max_positions)
    if len(rows.samples) < config.train.batch:
        raise ConfigError(f"{config.data.path}: {len(rows.samples)} rows, and train.batch takes {config.train.batch}")
    print(f"{len(rows.samples)} rows to train on, {rows.overlong} left out: prompt too long", flush=True)
    return rows.samples


def schedule(samples: Sequence[Sample], config: SftConfig) -> Iterator[list[int]]:
    """The indices of each update, a function of the seed: epochs of shuffled rows, `bucket` updates sorted by length.

    The updates of a bucket are shuffled again, so that long and short ones alternate.
    """
    batch, bucket = config.train.batch, min(config.train.bucket, len(samples) // config.train.batch)
    rng = np.random.default_rng(config.seed)
    made = 0
    while True:
        order = rng.permutation(len(samples))
        for start in range(0, len(order) - batch * bucket + 1, batch * bucket):
            drawn = sorted(order[start : start + batch * bucket].tolist(), key=lambda i: samples[i].length)
            parts = [drawn[k : k + batch] for k in range(0, len(drawn), batch)]
            for k in rng.permutation(bucket):
                yield parts[k]
                made += 1
                if made == config.train.updates:
                    return


def checksum(samples: Sequence[Sample]) -> str:
    """SHA-256 over the rows' token ids, and where each one's prompt ends."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(np.array([sample.prompt_length, sample.length, *sample.tokens], dtype="<i8").tobytes())
    return digest.hexdigest()


def restore(policy: Policy, checkpoints: Checkpoints, rows: str, data: str) -> int:
    """Take up the newest checkpoint: the update it was made after, 0 where there is none.

    UserError where it was trained on other rows than those of checksum `rows`, which come from `data`.
    """
    path = checkpoints.newest()
    if path is None:
        return 0
    sharded, state = checkpoints.load(path, policy.sharded_state(loading=True))
    policy.load_sharded_state(sharded)
    policy.check_initial_model(state["initial_model"], str(path))
    if state.get("rows", rows) != rows:
        raise UserError(
            f"data.path: {data}: not the rows that {path} was trained on, or another template or tokenizer reads them "
            f"(checksum there {state['rows'][:16]}, here {rows[:16]}); put them back, or give this run another name"
        )
    return state["step"]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `efr sft`."""
    parser = arguments.parser("sft", "Supervised fine-tuning on question and response rows.", resumes=True)
    given = parser.parse_intermixed_args(argv)
    with arguments.configured(SftConfig, given) as config:
        sft(config, given.resume)


if __name__ == "__main__":
    arguments.run(main)
