"""`efr train`: reinforcement learning for efficient reasoning. This file is the algorithm, in its order.

Every rank runs it. Rank 0 alone owns prompts, engine and graders (`run.environment`); the policy is everybody's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_efr import arguments, methods
from megatron_efr.config import TrainConfig
from megatron_efr.observe import Observer
from megatron_efr.policy import policy_loss, split_into_updates
from megatron_efr.policy.packing import samples
from megatron_efr.policy.scatter import scatter_samples
from megatron_efr.report.iteration import check_identities, check_logprobs, check_skipped, iteration_metrics
from megatron_efr.run.interruption import EXIT_REQUEUE, Interruption
from megatron_efr.run.replay import replay
from megatron_efr.run.run import Run, opened
from megatron_efr.types import Credited


def train(config: TrainConfig, resume: bool = False, replayed: Path | None = None) -> None:
    """Run the loop to its end, from the start or from the newest checkpoint that verifies; or only replay a file."""
    with opened(config, resume=resume, asks=replayed is None) as run:
        if replayed is not None:
            replay(run, replayed, learn)
        else:
            with Interruption() as interruption:
                loop(run, run.restore() if resume else 0, interruption)


def loop(run: Run, done: int, interruption: Interruption) -> None:
    """Iterations `done` + 1 to the last, or to the one in which the run was asked to end."""
    config, policy, total = run.config, run.policy, run.config.train.iterations
    with Observer(run.folder, config.observe, total, run.ranks.rank, done, config.name, run.ranks.largest) as observer:
        run.phases.to_engines(policy, done, observer.phase)
        for step in range(done + 1, total + 1):
            metrics = iterate(run, step, observer)
            run.phases.to_engines(policy, step, observer.phase)
            with observer.phase("evaluate"):
                metrics |= run.from_engines(partial(evaluation, run, step), "an evaluation", version=step) or {}
            observer.log(step, metrics)
            skipped, kept = policy.optimizer.skipped_in_a_row, run.folder.rollouts_path(step)
            check_skipped(skipped, config.train.max_skipped, f"iteration {step}", kept)
            ending = not run.ranks.everywhere(interruption.received is None)
            if step % config.checkpoint.every == 0 or step == total or ending:
                with observer.phase("checkpoint"):
                    run.save(step)
            run.checkpoints.settle(wait=step == total or ending)
            if ending and step < total:
                raise SystemExit(EXIT_REQUEUE)
    policy.save_folder(run.folder.model)


def iterate(run: Run, step: int, observer: Observer) -> dict[str, float]:
    """Rollouts, and what is learnt from them; those of a skipped update are always kept, for a replay."""
    with observer.phase("rollout"):
        groups = run.from_engines(partial(rollouts, run, step), "rollouts", version=step - 1) or []
    run.phases.to_policy(run.policy, observer.phase)
    metrics = learn(run, step, groups, observer)
    run.remember(step, groups)
    metrics |= run.environment.engine_figures() if run.environment else {}
    if metrics["skipped"]:
        run.ranks.on_main(lambda: run.folder.write_rollouts(step, groups))
    return metrics


def rollouts(run: Run, step: int) -> list[Credited]:
    """prompts -> rollouts -> grades -> rewards -> credits, on rank 0."""
    assert run.environment is not None
    rewarded = run.environment.ledger.collect(step, run.folder.journal)
    groups = methods.credit(run.method, run.algorithm, rewarded, run.environment.knowledge.of(step))
    if run.config.observe.rollouts:
        run.folder.write_rollouts(step, groups)
    return groups


def learn(run: Run, step: int, groups: list[Credited], observer: Observer) -> dict[str, float]:
    """Rank 0's credited groups -> packed micro-batches -> log-probs -> updates; the iteration's metrics."""
    config, policy, objective = run.config, run.policy, run.objective
    drawn = samples(groups)
    sizes = run.ranks.share(lambda: [sample.size for sample in drawn])
    plans = [
        policy.plan_update(sizes, update, config.train.micro_batch_tokens, objective.aggregate, objective.divisor)
        for update in split_into_updates(len(sizes), config.train.updates, (config.seed, step))
    ]
    own = scatter_samples(drawn, plans, run.ranks)
    updates = [policy.pack(own, plan) for plan in plans]
    batches = [batch for update in updates for batch in update]
    with observer.phase("logprobs"):
        policy.fill_logprobs(batches)
        policy.fill_columns(batches, objective)
        drift = policy.compare_logprobs(batches, version=step - 1)
        check_logprobs(drift, config.train, run.ranks.is_main)
    with observer.phase("train"):
        made = [policy.update(update, policy_loss(objective)) for update in updates]
    seconds = run.environment.ledger.seconds if run.environment else observer.seconds("rollout")
    metrics = iteration_metrics(groups, made, drift, step - 1, seconds)
    check_identities(metrics, config.model, step)
    return metrics


def evaluation(run: Run, step: int) -> dict[str, float]:
    """The held-out problems, every so many iterations, asked and graded on rank 0."""
    assert run.environment is not None
    return run.environment.evaluate(step, run.folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `efr train`."""
    parser = arguments.parser("train", "Reinforcement learning for efficient reasoning.", resumes=True)
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run the updates of these saved rollouts, no more")
    given = parser.parse_intermixed_args(argv)
    with arguments.configured(TrainConfig, given) as config:
        train(config, given.resume, given.replay)


if __name__ == "__main__":
    arguments.run(main)
