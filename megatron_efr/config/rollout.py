"""The section `rollout`: engines, what they are asked, and how far they may run ahead of the
policy.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, StringConstraints, model_validator

from megatron_efr.config.section import Section


class TimeoutsConfig(Section):
    """Limits of waiting for SGLang servers, in seconds, each by the name that its error message
    gives.
    """

    start_s: float = Field(
        default=900,
        gt=0,
        description="a launched server, until it is ready; after all are lost, until one is back",
    )
    connect_s: float = Field(default=10, gt=0, description="a connection to a server")
    health_s: float = Field(default=30, gt=0, description="an answer to a health check")
    check_s: float = Field(
        default=5, gt=0, description="between health checks; three that fail, and a server is lost"
    )
    control_s: float = Field(
        default=120, gt=0, description="pausing, flushing, opening and closing an update"
    )
    update_s: float = Field(
        default=600, gt=0, description="one bucket of weights, or a folder that a server reads"
    )
    response_s: float = Field(
        default=14400, gt=0, description="one response, its wait for a place included"
    )
    hang_s: float = Field(
        default=120,
        gt=0,
        description="an answer of a server's scheduler, before the server is started again",
    )
    stop_s: float = Field(
        default=10, gt=0, description="a server asked to end, before it is killed"
    )


class EnginesConfig(Section):
    """The engine; of SGLang, how its servers are started and reached."""

    engine: Literal["local", "sglang"] = Field(
        default="local",
        description="local: embedded in rank 0, for small models; sglang: servers of their own",
    )
    slots: PositiveInt = Field(default=256, description="responses that one engine decodes at once")
    python: str = Field(
        default=".venv-sglang/bin/python", description="interpreter that has SGLang"
    )
    engines: PositiveInt | None = Field(
        default=None,
        description=(
            "how many servers to start, over all hosts; 1 when left out, or colocated one for "
            "every `tp` ranks"
        ),
    )
    tp: PositiveInt = Field(default=1, description="tensor-parallel ranks (GPUs) of one server")
    urls: list[Annotated[str, StringConstraints(pattern="^https?://")]] = Field(
        default_factory=list,
        description="servers that run already, their key in SGLANG_API_KEY; none is started",
    )
    server: dict[str, Any] = Field(
        default_factory=dict, description="any argument of SGLang's server, underscores for dashes"
    )
    router: bool = Field(
        default=False,
        description=(
            "sglang-router, if `python` has it, chooses each prompt's server by cached prefixes"
        ),
    )
    restarts: int = Field(
        default=3, ge=0, description="how many times a server that ended or hangs is started again"
    )
    bucket_mib: PositiveInt = Field(default=512, description="weights sent to the servers at once")
    timeouts: TimeoutsConfig = Field(default_factory=TimeoutsConfig)

    @property
    def embedded(self) -> bool:
        """True if the engine is an object in rank 0, False if it is servers with processes of their
        own.
        """
        return self.engine == "local"

    @model_validator(mode="after")
    def _keys_belong_together(self) -> Self:
        if self.embedded and (self.urls or self.server):
            raise ValueError(
                "rollout.urls and rollout.server are for SGLang servers; set rollout.engine: sglang"
            )
        if self.urls and self.server:
            raise ValueError(
                "rollout.server: with rollout.urls no server is started that could take it"
            )
        if self.router and self.embedded:
            raise ValueError(
                "rollout.router: the embedded engine has no servers to choose from; set "
                "rollout.engine: sglang"
            )
        return self


class EvaluationEnginesConfig(EnginesConfig):
    """The engine that answers an evaluation."""

    transport: Literal["disk", "tensor"] = Field(
        default="disk",
        description=(
            "how weights reach the servers. disk: they read model.path themselves, or, if that is "
            "no model folder, one that is written for them; tensor: within the requests, for "
            "servers that share no file system"
        ),
    )


PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias")
"""Ways of sampling, by SGLang's names, that make other tokens likely than the model does."""


class RolloutConfig(EnginesConfig):
    """Draws responses for training, by the engine named."""

    prompts: PositiveInt = Field(default=32, description="prompts per iteration")
    samples: PositiveInt = Field(default=8, description="responses per prompt")
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="sampling temperature; the policy's log-probs are taken at it too",
    )
    top_p: float = Field(
        default=1.0, ge=1, le=1, description="training needs the sampler's own distribution"
    )
    max_new_tokens: PositiveInt = Field(
        default=32000, description="the longest response; a longer one is cut off"
    )
    placement: Literal["apart", "colocated"] = Field(
        default="apart",
        description=(
            "servers on the GPUs after the trainer's, or on the trainer's own: there they release "
            "their memory while the policy trains, and it offloads gradients and optimizer while "
            "they generate"
        ),
    )
    transport: Literal["auto", "tensor", "direct", "distributed", "disk"] = Field(
        default="auto",
        description=(
            "how weights reach the servers. tensor: GPU memory by handle, or on a CPU within the "
            "request; direct: each rank of a server gets its own slices alone, within the "
            "request; distributed: a process group; disk: a shared file system. auto: tensor to "
            "the trainer's own GPUs, else distributed"
        ),
    )
    verify_every: PositiveInt = Field(
        default=50,
        description=(
            "publications between comparisons of the servers' checksums; the first is compared"
        ),
    )
    partial: bool = Field(
        default=False,
        description=(
            "an iteration ends when enough groups are complete; unfinished responses go on in the "
            "next one"
        ),
    )
    ahead: PositiveInt | None = Field(
        default=None,
        description="partial: prompts in flight beyond `prompts`; half as many when left out",
    )
    overlap: bool = Field(
        default=False,
        alias="async",
        description="the next rollouts are generated while the policy trains",
    )
    max_staleness: PositiveInt = Field(
        default=1,
        description=(
            "how many publications a trained token may be behind; what would be older is waited for"
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _draws_from_the_models_own_distribution(cls, tree: Any) -> Any:
        for key in PENALTIES:
            if isinstance(tree, dict) and key in tree:
                raise ValueError(
                    f"rollout.{key}: tokens that were drawn with a penalty are not the policy's "
                    "own, and their ratio and KL would be wrong; leave it out"
                )
        return tree

    @model_validator(mode="after")
    def _what_is_in_flight_can_be_waited_for(self) -> RolloutConfig:
        # all that is in flight may reach max_staleness at once, and one iteration must take it
        if self.ahead is not None and not self.partial:
            raise ValueError(
                "rollout.ahead: only partial rollouts have prompts in flight; set "
                "rollout.partial: true"
            )
        if self.in_flight_beyond > self.prompts:
            raise ValueError(
                f"rollout.ahead: {self.ahead} prompts in flight beyond those of an iteration are "
                f"more than one iteration takes; at most rollout.prompts = {self.prompts}"
            )
        # one left asleep would die when it is put to sleep again
        if self.urls and self.placement == "colocated":
            raise ValueError(
                "rollout.urls with rollout.placement: colocated: colocated engines are on the "
                "trainer's own GPUs, and its ranks start them; leave urls out, or set "
                "rollout.placement: apart"
            )
        # generation beside training needs GPUs of its own
        if self.overlap and self.placement == "colocated":
            raise ValueError(
                "rollout.async: colocated engines sleep while the policy trains, and cannot "
                "generate meanwhile; set rollout.placement: apart, or leave async out"
            )
        # each of async and partial costs a publication
        if self.partial and self.overlap and self.max_staleness < 2:
            raise ValueError(
                "rollout.max_staleness: 1 lets no response go on in a later iteration, since async "
                "rollouts are one publication behind already; set 2 or more with partial, or leave "
                "partial out"
            )
        return self

    def for_evaluation(self, ranks: int) -> EvaluationEnginesConfig:
        """The engines of a run of `ranks` ranks, or for servers that it starts as many of their
        kind.
        """
        same: dict[str, Any] = {key: getattr(self, key) for key in EnginesConfig.model_fields}
        if self.placement == "colocated":
            same["engines"] = max(1, ranks // self.tp)
        # perhaps without this machine's file system
        elsewhere = self.urls and self.transport != "disk"
        return EvaluationEnginesConfig(**same, transport="tensor" if elsewhere else "disk")

    @property
    def in_flight_beyond(self) -> int:
        """Prompts in flight beyond those that an iteration takes."""
        return (self.ahead or -(-self.prompts // 2)) if self.partial else 0

    @property
    def off_policy(self) -> bool:
        """True if tokens may be older than the weights of the iteration that trains on them."""
        return self.partial or self.overlap
