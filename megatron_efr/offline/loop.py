"""The loop of training on rows that do not change: updates in a fixed order, checkpoints, and going
on from one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np

from megatron_efr import arguments
from megatron_efr.checkpoint.checkpoints import Checkpoints
from megatron_efr.config import DpoConfig, SftConfig
from megatron_efr.config.file import dump, validate
from megatron_efr.observe import Observer
from megatron_efr.policy import Policy, check_policy, join_ranks
from megatron_efr.run.folder import RunFolder
from megatron_efr.run.interruption import EXIT_REQUEUE, Interruption
from megatron_efr.run.iteration import check_skipped
from megatron_efr.run.main_rank import date_prompts
from megatron_efr.run.owner import claimed
from megatron_efr.samples import Sample
from megatron_efr.types import UserError
from megatron_efr.weights.architecture import Architecture

Update = Callable[[Policy, Sequence[Sample], list[int]], dict[str, float]]
"""Makes one update of the policy from the samples of these items; its figures. Every rank calls it
alike.
"""


def train_on_rows(
    config: SftConfig | DpoConfig,
    resume: bool,
    load: Callable[[Architecture], list[Sample]],
    update: Update,
    *,
    samples_each: int = 1,
    keep_reference: bool = False,
) -> None:
    """Train to the end, from the start or from the newest checkpoint, and write the model folder.

    `load` reads and checks the samples, on rank 0, for the model's architecture; `samples_each` in
    a row are an item, of which `train.batch` make an update. With `keep_reference` the policy keeps
    the initial model beside it.
    """
    config.check_world(arguments.world_size())
    architecture = Architecture.from_folder(config.model.path)
    check_policy(config.model, config.parallel, config.optimizer, architecture)
    with join_ranks(config.parallel, config.seed) as ranks, ExitStack() as resources:
        folder = RunFolder(config.folder)
        ranks.on_main(lambda: _claim(config, folder, resume, resources))
        # rows from rank 0; the policy; the newest checkpoint if it resumes
        samples = ranks.share(lambda: load(architecture))
        rows = checksum(samples)
        policy = Policy(
            config.model, config.parallel, config.optimizer, ranks, updates=config.train.updates,
            seed=config.seed,
            keep_reference=keep_reference,
            architecture=architecture,
        )  # fmt: skip
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoint, ranks)
        done = restore(policy, checkpoints, rows, config.data.path) if resume else 0
        # records of updates that the checkpoint has not are cut off, and made again
        total = config.train.updates
        if resume:
            ranks.on_main(lambda: folder.go_on_from(done, total, "update", config.train.log_every))
        observing = Observer(
            folder, config.observe, total, ranks.rank, done, config.name, ranks.largest
        )
        with Interruption() as interruption, observing as observer:
            for step, items in enumerate(schedule(samples, config, samples_each), start=1):
                # the order of rows is the seed's alone, so a resumed run takes up its place in it
                if step <= done:
                    continue
                with observer.phase("train"):
                    metrics = update(policy, samples, items)
                # any rank's signal ends all, after this update
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
                # a background save must be whole before the process ends
                checkpoints.settle(wait=step == total or ending)
                if ending and step < total:
                    raise SystemExit(EXIT_REQUEUE)
        policy.save_folder(folder.model)
        policy.save_adapter(folder.adapter)


def _claim(
    config: SftConfig | DpoConfig, folder: RunFolder, resume: bool, resources: ExitStack
) -> None:
    """Take the run folder until `resources` are closed; prompts tell the day on which it began."""
    claim = claimed(folder, dump(config), resume, lambda tree: dump(validate(type(config), tree)))
    resources.enter_context(claim)
    if isinstance(config, SftConfig):
        date_prompts(config.prompt, folder)


def schedule(
    samples: Sequence[Sample], config: SftConfig | DpoConfig, samples_each: int = 1
) -> Iterator[list[int]]:
    """The indices of each update's samples, a function of the seed: epochs of shuffled items,
    `bucket` updates sorted by length.

    The updates of a bucket are shuffled again, so that long and short ones alternate.
    """
    lengths = [
        sum(each.length for each in samples[i : i + samples_each])
        for i in range(0, len(samples), samples_each)
    ]
    batch = config.train.batch
    bucket = min(config.train.bucket, len(lengths) // config.train.batch)
    rng = np.random.default_rng(config.seed)
    made = 0
    while True:
        order = rng.permutation(len(lengths))
        for start in range(0, len(order) - batch * bucket + 1, batch * bucket):
            drawn = sorted(order[start : start + batch * bucket].tolist(), key=lambda i: lengths[i])
            parts = [drawn[k : k + batch] for k in range(0, len(drawn), batch)]
            for k in rng.permutation(bucket):
                yield [
                    item * samples_each + place
                    for item in parts[k]
                    for place in range(samples_each)
                ]
                made += 1
                if made == config.train.updates:
                    return


def checksum(samples: Sequence[Sample]) -> str:
    """SHA-256 over the rows' token ids and prompt lengths."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(
            np.array([sample.prompt_length, sample.length, *sample.tokens], dtype="<i8").tobytes()
        )
    return digest.hexdigest()


def restore(policy: Policy, checkpoints: Checkpoints, rows: str, data: str) -> int:
    """Take up the newest checkpoint: the update it was made after, 0 if there is none.

    UserError if it was trained on other rows than those of checksum `rows`, which come from `data`.
    """
    path = checkpoints.newest()
    if path is None:
        return 0
    sharded, state = checkpoints.load(path, policy.sharded_state(loading=True))
    policy.load_sharded_state(sharded)
    policy.check_initial_model(state["initial_model"], str(path))
    if state.get("rows", rows) != rows:
        raise UserError(
            f"data.path: {data}: not the rows that {path} was trained on, or another template or "
            f"tokenizer reads them (checksum there {state['rows'][:16]}, here {rows[:16]}); put "
            "them back, or give this run another name"
        )
    return state["step"]
