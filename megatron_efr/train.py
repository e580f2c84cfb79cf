"""`efr train`: reinforcement learning for efficient reasoning. This file is the algorithm, in its order.

Every rank runs it. Rank 0 alone owns prompts, engine and graders (`environment`); the policy is everybody's.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

from megatron_efr import arguments, methods
from megatron_efr.checkpoint import Checkpoints
from megatron_efr.config import TrainConfig
from megatron_efr.configfile import dump
from megatron_efr.environment import Environment
from megatron_efr.interruption import EXIT_REQUEUE, Interruption
from megatron_efr.methods.token_advantages import fill_token_advantages
from megatron_efr.observe import Observer
from megatron_efr.policy import Policy, Ranks, clipped_policy_loss, launched, split_into_updates, trainable
from megatron_efr.replay import replay
from megatron_efr.report.iteration import check_logprobs, check_skipped, iteration_metrics
from megatron_efr.resume import restore, save
from megatron_efr.runfolder import RunFolder
from megatron_efr.types import Group
from megatron_efr.weights.publication import build_publisher
from megatron_efr.weights.publish import Embedded, Publisher


def train(config: TrainConfig, resume: bool = False, replayed: Path | None = None) -> None:
    """Run the loop to its end, from the start or from the newest checkpoint that verifies; or only replay a file."""
    method = methods.build(config.method, config.rollout.samples)
    config.check_world(arguments.world_size())
    with launched(config.parallel, config.seed, config.model) as ranks:
        folder, environment = RunFolder(config.folder), None
        if replayed is None:
            ranks.on_main(lambda: folder.claim(dump(config), resume))
            environment = ranks.on_main(lambda: Environment(config))
        try:
            policy = Policy.to_train(config, ranks)
            checkpoints = Checkpoints(folder.checkpoints, config.checkpoint, ranks)
            publisher = build_publisher(config, environment and environment.engine, ranks.cpu_world)
            run = Run(config, ranks, folder, checkpoints, environment, policy, publisher, method)
            if replayed is not None:
                return replay(run, replayed)
            with Interruption() as interruption:
                run.loop(restore(run) if resume else 0, interruption)
        finally:
            if environment is not None:
                environment.close()


@dataclass(frozen=True)
class Run:
    """One training run, as one rank sees it."""

    config: TrainConfig
    ranks: Ranks
    folder: RunFolder
    checkpoints: Checkpoints
    environment: Environment | None  # rank 0's
    policy: Policy
    publisher: Publisher | Embedded
    method: methods.Method

    def loop(self, done: int, interruption: Interruption) -> None:
        """Iterations `done` + 1 to the last, or to the one in which the run was asked to end."""
        total = self.config.train.iterations
        with Observer(self.folder, self.config.observe, total, self.ranks.rank, done, self.config.name) as observer:
            self.publisher.publish(self.policy, done)
            for step in range(done + 1, total + 1):
                metrics = self.iterate(step, observer)
                with observer.phase("publish"):
                    self.publisher.publish(self.policy, step)
                with observer.phase("evaluate"):
                    metrics |= self.evaluate(step)
                observer.log(step, metrics)
                kept = self.folder.rollouts_path(step)
                check_skipped(self.policy.optimizer.skipped_in_a_row, self.config.train.max_skipped, step, kept)
                ending = not self.ranks.everywhere(interruption.received is None)
                if step % self.config.checkpoint.every == 0 or step == total or ending:
                    with observer.phase("checkpoint"):
                        save(self, step)
                self.checkpoints.settle(wait=step == total or ending)
                if ending and step < total:
                    raise SystemExit(EXIT_REQUEUE)
        self.policy.save_folder(self.folder.model)

    def iterate(self, step: int, observer: Observer) -> dict[str, float]:
        """Rollouts, and what is learnt from them; those of a skipped update are always kept, for a replay."""
        with observer.phase("rollout"):
            groups = self.ranks.share(lambda: self.rollouts(step))
        metrics = self.learn(step, groups, observer)
        if metrics["skipped"]:
            self.ranks.on_main(lambda: self.folder.write_rollouts(step, groups))
        return metrics

    def learn(self, step: int, groups: list[Group], observer: Observer) -> dict[str, float]:
        """Scored groups -> packed micro-batches -> log-probs -> updates; the iteration's metrics."""
        config, policy = self.config, self.policy
        sequences = [sequence for group in groups for sequence in trainable(group)]
        updates = [
            policy.pack_update(sequences, update, config.train.micro_batch_tokens, config.loss.aggregate)
            for update in split_into_updates(len(sequences), config.train.updates, (config.seed, step))
        ]
        batches = [batch for update in updates for batch in update]
        with observer.phase("logprobs"):
            policy.fill_logprobs(batches)
            drift = policy.compare_logprobs(batches, sequences)
            check_logprobs(drift, config.train.max_logprob_diff)
        fill_token_advantages(batches, [s.advantage for s in sequences], config.loss, self.ranks.sum_over_replicas)
        with observer.phase("train"):
            loss = clipped_policy_loss(config.loss.clip)
            made = [policy.update(update, loss) for update in updates]
        return iteration_metrics(groups, made, drift, observer.seconds("rollout"))

    def rollouts(self, step: int) -> list[Group]:
        """prompts -> rollouts -> grades -> rewards -> advantages, on rank 0."""
        assert self.environment is not None
        groups = self.environment.graded_rollouts(self.config.rollout.prompts, self.folder.journal(step))
        methods.score(self.method, groups)
        if self.config.observe.rollouts:
            self.folder.write_rollouts(step, groups)
        return groups

    def evaluate(self, step: int) -> dict[str, float]:
        """The held-out problems, every so many iterations; rank 0 asks and grades them."""
        return self.ranks.share(lambda: self.environment.evaluate(step, self.folder) if self.environment else {})


def main(argv: SequenceOf[str] | None = None) -> None:
    """Command line of `efr train`."""
    parser = arguments.parser("train", "Reinforcement learning for efficient reasoning.", resumes=True)
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run the updates of these saved rollouts, no more")
    given = parser.parse_args(argv)
    train(arguments.read(TrainConfig, given), given.resume, given.replay)


if __name__ == "__main__":
    arguments.run(main)
