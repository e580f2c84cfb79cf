"""One training run as one rank holds it: its parts, opened and closed, kept in checkpoints and
taken up again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from megatron_efr import algorithms, arguments, log, methods
from megatron_efr.checkpoint.checkpoints import Checkpoints
from megatron_efr.config import TrainConfig
from megatron_efr.config.file import dump, validate
from megatron_efr.errors import EngineError, NoEngineError
from megatron_efr.memory import BYTES, parameter_count
from megatron_efr.policy import Policy, Ranks, join_ranks
from megatron_efr.publication.build import build_publisher
from megatron_efr.publication.publisher import Embedded, Publisher
from megatron_efr.rollout.recovery import recovering
from megatron_efr.rollout.servers.run_servers import Servers, start_servers
from megatron_efr.run.checks import check_configuration
from megatron_efr.run.folder import RunFolder
from megatron_efr.run.main_rank import MainRank, date_prompts
from megatron_efr.run.owner import claimed
from megatron_efr.run.phases import Phases, Timer
from megatron_efr.run.watch import Watch
from megatron_efr.types import Credited, Rewarded
from megatron_efr.weights.architecture import Architecture

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A run's parts. All ranks call its methods alike."""

    config: TrainConfig
    ranks: Ranks
    folder: RunFolder
    checkpoints: Checkpoints
    main_rank: MainRank | None  # rank 0's
    policy: Policy
    publisher: Publisher | Embedded
    phases: Phases
    method: methods.Method
    algorithm: algorithms.Algorithm
    watch: Watch

    @property
    def objective(self) -> algorithms.Objective:
        """The objective that loss and kernels execute."""
        return self.algorithm.objective(self.config.rollout)

    def collect(self, step: int) -> list[Rewarded]:
        """Iteration `step`'s groups, graded and rewarded as they finish: on rank 0, and none
        elsewhere.
        """

        def ask() -> list[Rewarded]:
            assert self.main_rank is not None
            return self.main_rank.ledger.collect(step, self.folder.journal)

        return self.from_engines(ask, "rollouts", version=step - 1) or []

    def credit(self, step: int, groups: Sequence[Rewarded]) -> list[Credited]:
        """The iteration's groups with what they are trained on, by method or algorithm: on rank 0,
        none elsewhere.

        They are written down if the configuration asks for it.
        """

        def give() -> list[Credited]:
            assert self.main_rank is not None
            credited = methods.credit(
                self.method, self.algorithm, groups, self.main_rank.knowledge.of(step)
            )
            if self.config.observe.rollouts:
                self.folder.write_rollouts(step, credited)
            return credited

        return self.ranks.on_main(give, "credits") or []

    def warn(self, step: int, metrics: Mapping[str, float]) -> None:
        """Let rank 0, which has all figures, say what makes iteration `step` pointless."""
        for warning in self.watch.see(step, metrics) if self.ranks.is_main else []:
            log.warning(warning)

    def publish(self, step: int, timer: Timer) -> None:
        """Give the engines the policy's weights as version `step`, and the devices that they share
        with it.
        """
        self.phases.to_engines(self.policy, step, timer)

    def sample(self, step: int, timer: Timer) -> dict[str, float]:
        """Sample what the method wants beside rollouts after `step`; figures on rank 0, else {}."""
        if self.method.samplings == methods.Samplings():
            return {}

        def ask() -> dict[str, float]:
            assert self.main_rank is not None
            return self.main_rank.sample(step, self.folder, self.policy.initial_model["sha256"])

        with timer("sample"):
            return self.from_engines(ask, "a sampling", version=step) or {}

    def evaluate(self, step: int) -> dict[str, float]:
        """The held-out problems' figures, if step `step` is one to ask them: on rank 0, none
        elsewhere.
        """

        def ask() -> dict[str, float]:
            assert self.main_rank is not None
            return self.main_rank.evaluate(step, self.folder)

        return self.from_engines(ask, "an evaluation", version=step) or {}

    def save(self, step: int) -> None:
        """Keep all that a resumed run needs. Random numbers need nothing: each is a function of
        seed and place.
        """
        state = {
            "step": step,
            "initial_model": self.policy.initial_model,
            "method": self.main_rank.knowledge.state_dict() if self.main_rank else None,
            "watch": self.watch.state_dict(),
            "stream": self.main_rank.ledger.state_dict() if self.main_rank else None,
        }
        self.checkpoints.save(
            step, self.policy.sharded_state(), state, lambda: self.folder.clear_journals(step)
        )

    def learn(self, step: int, groups: Sequence[Credited]) -> dict[str, float]:
        """Let rank 0 keep what iteration `step` taught about its prompts, and to its method;
        figures of the latter.
        """
        if self.main_rank is None:
            return {}
        self.main_rank.knowledge.learn(step, [group.rewarded for group in groups])
        return self.main_rank.knowledge.figures()

    def restore(self) -> int:
        """Take up the newest checkpoint that verifies: the step it was made after, 0 if there is
        none.
        """
        step = self.load()
        self.ranks.on_main(lambda: self.folder.go_on_from(step, self.config.train.iterations))
        return step

    def load(self, last: int | None = None) -> int:
        """Like `restore`, of a checkpoint no later than step `last`; the run folder stays as it
        is.
        """
        path = self.checkpoints.newest(last)
        if path is None:
            return 0
        sharded, state = self.checkpoints.load(path, self.policy.sharded_state(loading=True))
        self.policy.load_sharded_state(sharded)
        self.policy.check_initial_model(state["initial_model"], str(path))
        self.watch.load_state_dict(state.get("watch", {}))
        if self.main_rank is not None:
            self.main_rank.knowledge.load_state_dict(state["method"])
            self.main_rank.ledger.load_state_dict(state["stream"])
        return state["step"]

    def from_engines(self, ask: Callable[[], T], what: str, *, version: int) -> T | None:
        """On rank 0 the result of `ask`, in which engines answer; None on the others, which wait
        for `what`.

        When no engine is left that serves, the weights, of `version`, are published to those that
        come back, and it goes on: `ask` is called again, at most so many times.
        """

        def recover(error: EngineError) -> None:
            if self.ranks.is_main:
                log.warning(f"{error}; publishing to those that come back")
            self.publisher.publish(self.policy, version)

        return recovering(lambda: self.ranks.on_main(ask, what), NoEngineError, recover)


@contextmanager
def open_run(config: TrainConfig, *, resume: bool = False, asks: bool = True) -> Iterator[Run]:
    """Join the ranks and put the run together; what it started is ended with the block.

    If it `asks` no engine, it claims no folder and has no main rank: its rollouts come from
    elsewhere.
    """
    # refused before ranks join: an error then has one voice
    method, algorithm, architecture = check_configuration(config, arguments.world_size(), asks)
    keep_reference = algorithm.objective(config.rollout).needs_reference
    with join_ranks(config.parallel, config.seed) as ranks, ExitStack() as resources:
        folder = RunFolder(config.folder)
        main_rank = None
        servers = Servers()
        if asks:
            # the folder first, so that a second run of this name starts no engine
            claim = claimed(
                folder,
                written_out(config),
                resume,
                lambda tree: written_out(validate(TrainConfig, tree)),
            )
            ranks.on_main(lambda: resources.enter_context(claim))
            ranks.on_main(lambda: date_prompts(config.data.prompt, folder))
            main_rank, servers = _start_main_rank(
                config, method, algorithm, architecture, ranks, resources
            )
        # ways from the policy to the engines, and whose turn it is on shared GPUs
        publisher = build_publisher(
            config, architecture, main_rank and main_rank.engine, ranks.cpu_world, servers.restart
        )
        phases = build_phases(config, architecture, publisher, main_rank, servers, ranks, asks)
        # the model last: what is cheap to refuse is refused by now
        policy = Policy.to_train(config, architecture, ranks, keep_reference=keep_reference)
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoint, ranks)
        watch = Watch(config.rollout.max_new_tokens)
        yield Run(
            config,
            ranks,
            folder,
            checkpoints,
            main_rank,
            policy,
            publisher,
            phases,
            method,
            algorithm,
            watch,
        )


def written_out(config: TrainConfig) -> str:
    """The configuration as its folder keeps it: every default, and every choice of its method and
    algorithm.
    """
    method = methods.build(config.method, config.rollout, config.algorithm)
    algorithm = algorithms.build(config.algorithm, config.rollout)
    return dump(methods.resolved(algorithms.resolved(config, algorithm), method))


def _start_main_rank(
    config: TrainConfig,
    method: methods.Method,
    algorithm: algorithms.Algorithm,
    architecture: Architecture,
    ranks: Ranks,
    resources: ExitStack,
) -> tuple[MainRank | None, Servers]:
    """Rank 0's part, over the servers that the hosts have started; `resources` end both, in the
    right order.

    Prompts and graders come first: what is wrong with them is said before any server starts.
    """
    main_rank = ranks.on_main(lambda: MainRank(config, method, algorithm, architecture))
    if main_rank is not None:
        resources.callback(main_rank.close)
    started = start_servers(
        config.model,
        architecture,
        config.rollout,
        config.folder / "engines",
        config.seed,
        ranks.cpu_world,
    )
    servers = resources.enter_context(started)

    def connect() -> None:
        assert main_rank is not None
        main_rank.connect(servers, resources)

    ranks.on_main(connect)
    return main_rank, servers


def build_phases(
    config: TrainConfig,
    architecture: Architecture,
    publisher: Publisher | Embedded,
    main_rank: MainRank | None,
    servers: Servers,
    ranks: Ranks,
    asks: bool,
) -> Phases:
    """Phases of engine and policy. Servers on shared GPUs give up theirs before a policy is
    built.
    """
    weights = parameter_count(architecture) * BYTES[config.model.dtype]
    return Phases(
        publisher,
        main_rank and main_rank.engine,
        servers,
        ranks,
        shared=asks and config.rollout.placement == "colocated",
        engine_bytes=weights if torch.cuda.is_available() else 0,
    )
