"""`efr train`: reinforcement learning for efficient reasoning. This file is the algorithm, in its
order.

Every rank runs it. Rank 0 alone owns prompts, engine and graders (`run.main_rank`); the policy is
everybody's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_efr import arguments
from megatron_efr.config import TrainConfig
from megatron_efr.observe import Observer
from megatron_efr.policy import policy_loss
from megatron_efr.policy.deal import deal
from megatron_efr.policy.packing import samples
from megatron_efr.run.interruption import EXIT_REQUEUE, Interruption
from megatron_efr.run.iteration import (
    check_identities,
    check_logprobs,
    check_skipped,
    iteration_metrics,
)
from megatron_efr.run.replay import replay
from megatron_efr.run.run import Run, open_run
from megatron_efr.types import Credited


def train(config: TrainConfig, resume: bool = False, replayed: Path | None = None) -> None:
    """Run the loop to its end, from the start or from the newest checkpoint that verifies; or only
    replay a file.
    """
    with open_run(config, resume=resume, asks=replayed is None) as run:
        if replayed is not None:
            replay(run, replayed, improve)
        else:
            with Interruption() as interruption:
                loop(run, run.restore() if resume else 0, interruption)


def loop(run: Run, done: int, interruption: Interruption) -> None:
    """Iterations `done` + 1 to the last, or to the one in which the run was asked to end."""
    config, policy, total = run.config, run.policy, run.config.train.iterations
    with Observer(
        run.folder, config.observe, total, run.ranks.rank, done, config.name, run.ranks.largest
    ) as observer:
        # publish: the engines begin with the weights that the policy begins with
        run.publish(done, observer.phase)
        # sample: what the method wants to know of the starting model, before anything is learnt
        run.sample(done, observer.phase)
        for step in range(done + 1, total + 1):
            metrics = iterate(run, step, observer)
            # sample: the new weights' answers to a monitor set, if the method follows one
            metrics |= run.sample(step, observer.phase)
            # evaluate: the new weights, on problems that are never trained on
            with observer.phase("evaluate"):
                metrics |= run.evaluate(step)
            observer.log(step, metrics)
            # check: a run that makes no update any more ends, and says how to look into it
            skipped = policy.optimizer.skipped_in_a_row
            kept = run.folder.rollouts_path(step)
            check_skipped(skipped, config.train.max_skipped, f"iteration {step}", kept)
            # save: every so often, at the end, and when the run is asked to end; the writing goes
            # on meanwhile
            ending = not run.ranks.everywhere(interruption.received is None)
            if step % config.checkpoint.every == 0 or step == total or ending:
                with observer.phase("checkpoint"):
                    run.save(step)
            run.checkpoints.settle(wait=step == total or ending)
            if ending and step < total:
                raise SystemExit(EXIT_REQUEUE)
    policy.save_folder(run.folder.model)
    policy.save_adapter(run.folder.adapter)


def iterate(run: Run, step: int, observer: Observer) -> dict[str, float]:
    """One iteration, from prompts to published weights; its metrics."""
    with observer.phase("rollout"):
        # collect: responses to the next prompts, graded and rewarded as they finish, so that
        # graders do not idle
        rewarded = run.collect(step)
        # credit: what each response is trained on, once all are there, since methods may compare
        # whole iterations
        groups = run.credit(step, rewarded)
    # engines that share the policy's devices give it their memory
    run.phases.to_policy(run.policy, observer.phase)
    # improve: deal, score, fill, check, update
    metrics = improve(run, step, groups, observer)
    # learn: what the method and the prompts' history take along to later iterations
    metrics |= run.learn(step, groups)
    metrics |= run.main_rank.engine_figures() if run.main_rank else {}
    # warn: a run that cannot learn says so, and why
    run.warn(step, metrics)
    # keep the responses of a skipped update: only a replay can show what was wrong with it
    if metrics["skipped"]:
        run.ranks.on_main(lambda: run.folder.write_rollouts(step, groups))
    # publish: the next responses are the new weights'
    run.publish(step, observer.phase)
    return metrics


def improve(run: Run, step: int, groups: list[Credited], observer: Observer) -> dict[str, float]:
    """Update the policy from rank 0's credited groups; the iteration's metrics."""
    config, policy, objective = run.config, run.policy, run.objective
    # deal: every response to an update, drawn by the seed; each replica gets its own, in packed
    # micro-batches
    tokens = config.train.micro_batch_tokens
    seed = (config.seed, step)
    updates = deal(policy, samples(groups), config.train.updates, tokens, objective, seed)
    batches = [batch for update in updates for batch in update]
    with observer.phase("logprobs"):
        # score: log-probs before the first update, which ratios refer to, and the initial model's
        # for the KL
        policy.score(batches)
        # fill: importance weights, and advantages less the KL or whitened, both of which need those
        # log-probs
        policy.fill_columns(batches, objective)
        # check: engine and policy agree, or the advantages would be of another distribution's
        # samples
        drift = policy.compare_logprobs(batches, version=step - 1)
        check_logprobs(drift, config.train, run.ranks.is_main)
    with observer.phase("train"):
        # update: a step of the optimizer for each
        made = [policy.update(update, policy_loss(objective)) for update in updates]
    seconds = run.main_rank.ledger.seconds if run.main_rank else observer.seconds("rollout")
    metrics = iteration_metrics(groups, made, drift, step - 1, seconds)
    # check: the first update saw the very policy that was scored, its ratio 1 and its KL 0
    check_identities(metrics, config.model, step)
    return metrics


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `efr train`."""
    parser = arguments.parser(
        "train", "Reinforcement learning for efficient reasoning.", resumes=True
    )
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="FILE",
        help="run the updates of these saved rollouts, no more",
    )
    given = parser.parse_intermixed_args(argv)
    with arguments.configured(TrainConfig, given) as config:
        train(config, given.resume, given.replay)


if __name__ == "__main__":
    arguments.run(main)
