"""A method: what it earns to be right and brief, as one frozen section of options with a few
hooks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from pydantic import ConfigDict

from megatron_efr.config import RolloutConfig, Section
from megatron_efr.methods.history import Seen
from megatron_efr.methods.samplings import NONE, ByPrompt, Samplings
from megatron_efr.types import Credit, FloatArray, Graded, Marks, Prompt, Rewarded, Script

Standing = Literal["code", "text", "experimental"]
State = Mapping[str, Any]
"""A method's memory between iterations: plain values that JSON keeps."""


class Needs(NamedTuple):
    """Demands of a method on a run. A run that cannot meet them is refused at the start.

    samples: responses per prompt, at least. thinking: marks around the thinking part of a response,
    which it finds in `Known.marks`. algorithms: those that it works with; None: all. engine:
    abilities of the engine, by the names of `rollout.engine.ABILITIES`. branches: verdicts on the
    answers of branches too. offline: all its responses are the starting model's, so that there is
    one iteration. aggregate: the mean in the algorithm's loss that its credits are made for; None:
    any. What it wants to have sampled depends on its options: `Method.samplings`.
    """

    samples: int = 2
    thinking: bool = False
    algorithms: frozenset[str] | None = None
    engine: frozenset[str] = frozenset()
    branches: bool = False
    offline: bool = False
    aggregate: str | None = None


class Visit(NamedTuple):
    """One asking of a prompt for `samples` responses; `seed` is that of its request, 63 bits."""

    prompt: Prompt
    samples: int
    seed: int


class Ask(NamedTuple):
    """The way in which a prompt is asked.

    suffix: text behind the question. scripts: how each response is made, one for each sample;
    empty: each is drawn at once. note: what the method wants to find again with the answers,
    JSON-ready.
    """

    suffix: str = ""
    scripts: tuple[Script, ...] = ()
    note: Mapping[str, Any] = MappingProxyType({})


class Known(NamedTuple):
    """Knowledge of a method about iteration `step`: frozen when the iteration begins.

    limit: the most tokens of a response (rollout.max_new_tokens). state: what `learn` returned
    last; empty at first. history: what was seen of each prompt, by its id. A prompt that was never
    visited has no entry. reference: the starting model's responses to every training prompt;
    monitor: the monitor set's, as last sampled; both empty if `samplings` asks for none. marks:
    around a thought, if the model has them. monitored: the iterations that were over when the
    monitor set was last sampled; None: it was not.
    """

    step: int
    limit: int
    state: State
    history: Mapping[str, Seen]
    reference: ByPrompt = NONE
    monitor: ByPrompt = NONE
    marks: Marks | None = None
    monitored: int | None = None


class Choices(Protocol):
    """The choices of an algorithm that a method may contradict."""

    @property
    def name(self) -> str: ...

    @property
    def baseline(self) -> str: ...

    @property
    def normalize(self) -> str: ...

    @property
    def truncated(self) -> str: ...

    @property
    def aggregate(self) -> str: ...

    @property
    def dynamic_sampling(self) -> bool: ...

    filters: ClassVar[bool]

    def changed(self, key: str) -> bool: ...


class Method(Section):
    """Turns the groups of an iteration into rewards, and into credits if they are not to be the
    algorithm's.

    The fields are the method's options. It is frozen: the hooks are functions of their arguments,
    and the only memory is what `learn` returns. The run keeps that in its checkpoints. `rewards`
    runs in a thread, while other groups are being generated.
    """

    model_config = ConfigDict(frozen=True)
    # where the rule stands: paper and equation, or a file of released code
    source: ClassVar[str] = ""
    standing: ClassVar[Standing] = "experimental"  # read in code, in the text, or open in part
    needs: ClassVar[Needs] = Needs()
    # when a wrong answer can earn more than a right one of its group, by default
    wrong_may_win: ClassVar[str] = ""
    # the same, of options that are not the defaults; both "": never
    wrong_may_win_if: ClassVar[str] = ""

    def ask(self, visit: Visit, known: Known) -> Ask:
        """Ask a prompt. The request is journalled, and never made twice for a visit."""
        return Ask()

    def longest_asks(self, visit: Visit, known: Known) -> Sequence[Ask]:
        """The longest ways in which a prompt may ever be asked, as far as `ask` does not give them
        at first.

        They are checked before work starts, with a few of `ask`.
        """
        return ()

    @property
    def samplings(self) -> Samplings:
        """Responses that the run is to sample for it beside its rollouts."""
        return Samplings()

    @property
    def sought(self) -> Mapping[str, str]:
        """The texts that it looks for in a response, by the option that says each."""
        return {}

    @property
    def single(self) -> Mapping[str, str]:
        """The texts that must be one token each, by the option that says each."""
        return {}

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        """Reward of each response, float64 [n]; TypeError if the method defines none."""
        raise TypeError(f"{type(self).__name__} defines no rewards")

    def settle(self, groups: Sequence[Rewarded], known: Known) -> Sequence[Rewarded]:
        """The iteration's groups with the rewards that count, if those depend on the iteration as a
        whole.
        """
        return groups

    def credits(self, groups: Sequence[Rewarded], known: Known) -> Sequence[Credit] | None:
        """Credit of each group, if it is not to be the algorithm's; None: it is."""
        return None

    def weights(self, group: Rewarded, known: Known) -> tuple[FloatArray, ...] | None:
        """Weights of each response's tokens in the loss, if credits are the algorithm's; None: 1
        each.
        """
        return None

    def learn(self, state: State, groups: Sequence[Rewarded], known: Known) -> State:
        """The memory after the iteration, from that before (`state`, which is left as it is)."""
        return state

    def check(self, rollout: RolloutConfig) -> None:
        """Refuse options that make no sense with what is drawn; ConfigError."""
        return

    def check_algorithm(self, algorithm: Choices) -> None:
        """Refuse choices of an algorithm that undo the method, or do again what it does;
        ConfigError.
        """
        return

    @property
    def equal_rewards_teach(self) -> bool:
        """True if `settle` or `credits` may tell apart responses of a prompt that `rewards` pays
        alike.
        """
        return type(self).settle is not Method.settle or type(self).credits is not Method.credits
