"""`efr train`: reinforcement learning for efficient reasoning. This file is the algorithm, in its order.

Every rank runs it. Rank 0 alone owns prompts, engine and graders (`environment`); the policy is everybody's.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from megatron_efr import arguments, methods
from megatron_efr.checkpoint import Checkpoints
from megatron_efr.config import TrainConfig
from megatron_efr.configfile import dump
from megatron_efr.environment import Environment
from megatron_efr.interruption import EXIT_REQUEUE, Interruption
from megatron_efr.methods.token_advantages import fill_token_advantages
from megatron_efr.observe import Observer
from megatron_efr.policy import Policy, Ranks, clipped_policy_loss, launched, split_into_updates, trainable
from megatron_efr.report.iteration import check_logprobs, iteration_metrics
from megatron_efr.runfolder import RunFolder
from megatron_efr.types import Group
from megatron_efr.weights.publication import build_publisher
from megatron_efr.weights.publish import Embedded, Publisher


def train(config: TrainConfig, resume: bool = False) -> None:
    """Run the loop to its end, from the start or from the newest checkpoint that verifies."""
    method = methods.build(config.method, config.rollout.samples)
    config.check_world(arguments.world_size())
    with launched(config.parallel, config.seed, config.model) as ranks:
        folder = RunFolder(config.folder)
        ranks.on_main(lambda: folder.claim(dump(config), resume))
        environment = ranks.on_main(lambda: Environment(config))
        try:
            policy = Policy.to_train(config, ranks)
            checkpoints = Checkpoints(folder.checkpoints, config.checkpoint, ranks)
            publisher = build_publisher(config, environment and environment.engine, ranks.cpu_world)
            run = Run(config, ranks, folder, checkpoints, environment, policy, publisher, method)
            with Interruption() as interruption:
                run.loop(run.restore() if resume else 0, interruption)
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
                ending = not self.ranks.everywhere(interruption.received is None)
                if step % self.config.checkpoint.every == 0 or step == total or ending:
                    with observer.phase("checkpoint"):
                        self.save(step)
                self.checkpoints.settle(wait=step == total or ending)
                if ending and step < total:
                    raise SystemExit(EXIT_REQUEUE)
        self.policy.save_folder(self.folder.model)

    def iterate(self, step: int, observer: Observer) -> dict[str, float]:
        """prompts -> rollouts -> grades -> rewards -> advantages -> packed micro-batches -> log-probs -> updates."""
        config, policy = self.config, self.policy
        with observer.phase("rollout"):
            groups = self.ranks.share(lambda: self.rollouts(step))
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
        """The iteration's groups with grades, rewards and advantages; rank 0 makes them."""
        assert self.environment is not None
        groups = self.environment.graded_rollouts(self.config.rollout.prompts, self.folder.journal(step))
        methods.score(self.method, groups)
        if self.config.observe.rollouts:
            self.folder.write_rollouts(step, groups)
        return groups

    def evaluate(self, step: int) -> dict[str, float]:
        """The held-out problems, every so many iterations; rank 0 asks and grades them."""
        return self.ranks.share(lambda: self.environment.evaluate(step, self.folder) if self.environment else {})

    def save(self, step: int) -> None:
        """Keep all that a resumed run needs. Random numbers need nothing: each is a function of seed and place."""
        state = {
            "step": step,
            "initial_model": self.policy.initial_model,
            "method": self.method.state_dict(),
            "stream": self.environment.stream.state_dict() if self.environment else None,
        }
        self.checkpoints.save(step, self.policy.sharded_state(), state, lambda: self.folder.clear_journals(step))

    def restore(self) -> int:
        """Take up the newest checkpoint that verifies: the step it was made after, 0 where there is none."""
        step, path = 0, self.checkpoints.newest()
        if path is not None:
            sharded, state = self.checkpoints.load(path, self.policy.sharded_state(loading=True))
            self.policy.load_sharded_state(sharded)
            self.policy.check_initial_model(state["initial_model"], str(path))
            self.method.load_state_dict(state["method"])
            if self.environment is not None:
                self.environment.stream.load_state_dict(state["stream"])
            step = state["step"]
        self.ranks.on_main(lambda: self.folder.go_on_from(step))
        return step


def main(argv: SequenceOf[str] | None = None) -> None:
    """Command line of `efr train`."""
    given = arguments.parser("train", "Reinforcement learning for efficient reasoning.", resumes=True).parse_args(argv)
    train(arguments.read(TrainConfig, given), given.resume)


if __name__ == "__main__":
    arguments.run(main)
