"""Training data: samples, the columns that their response tokens have, packed micro-batches."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_efr.types import IntArray

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

NOT_DRAWN = -1
"""The `version` of a token that no weights drew: a script wrote it."""


class Column(NamedTuple):
    """A quantity of every response token.

    A sample without it has `default` in each token. If there is no default, a micro-batch goes
    without the column until the loop fills it in.
    """

    name: str
    dtype: type[np.generic]
    default: float | None = None


COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (
        Column("advantage", np.float32),
        Column("weight", np.float32, 1.0),
        Column("engine_logprob", np.float32),
        Column("old_logprob", np.float32),
        Column("behaviour_logprob", np.float32),
        Column("reference_logprob", np.float32),
        Column("version", np.int32),
        Column("importance", np.float32),
    )
}
"""All that a response token may have, by name. What scatters, packs and splits samples loops over
these.

`advantage`: the response's and the token's own. `weight` of the token in the loss, at least 0; 0
leaves it out. `engine_logprob` as sampled. `old_logprob` under the policy before its first update
of the iteration, `reference_logprob` under the initial model. `behaviour_logprob` is what ratios
refer to in a micro-batch with a token that a script chose with a known chance: the log of that
chance for such a token, `old_logprob` for the others. `version` of the weights that drew the token,
or NOT_DRAWN. `importance` weighs a token that other weights drew.
"""


class SequenceSize(NamedTuple):
    """A sample's tokens: all that a rank has to know of the samples that others train on.

    `trained` are the response's tokens of a weight above 0. A sample without any is left out of the
    loss. `prompt_id` is the same for samples of the same prompt, and hardly ever for others.
    """

    prompt: int
    response: int
    trained: int
    prompt_id: int

    @property
    def length(self) -> int:
        return self.prompt + self.response


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Prompt and response as one trainable row.

    `tokens` are the prompt's `prompt_length` and the response's. `columns` are those of COLUMNS
    that it has, one number for each response token. `routed_experts` as in `Response`. ValueError
    for a column that is not declared, or not of the response's length.
    """

    tokens: IntArray
    prompt_length: int
    columns: Mapping[str, Array] = field(default_factory=dict)
    routed_experts: IntArray | None = None

    def __post_init__(self) -> None:
        for name, values in self.columns.items():
            if name not in COLUMNS:
                raise ValueError(f"no column {name!r} is declared; there are {', '.join(COLUMNS)}")
            if values.shape != (self.response_length,):
                raise ValueError(
                    f"column {name} is {list(values.shape)}, of {self.response_length} response "
                    "tokens"
                )

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def response_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def size(self) -> SequenceSize:
        weight = self.columns.get("weight")
        trained = self.response_length if weight is None else np.count_nonzero(weight)
        # a checksum, which is the same in every process
        prompt = np.asarray(self.tokens[: self.prompt_length], np.int32).tobytes()
        return SequenceSize(
            self.prompt_length, self.response_length, int(trained), zlib.crc32(prompt)
        )

    def column(self, name: str) -> Array:
        """Column `name` in its declared type, [response tokens]. KeyError if it is not there and
        has no default.
        """
        column = COLUMNS[name]
        if column.default is not None and name not in self.columns:
            return np.full(self.response_length, column.default, column.dtype)
        return np.asarray(self.columns[name], column.dtype)


@dataclass(slots=True)
class PackedBatch:
    """Several sequences laid end to end (THD): one micro-batch.

    `tokens`, `positions` are int64 [T]; sequence s stands at `cu_seqlens[s]:cu_seqlens[s + 1]`
    (int32) and is `lengths[s]` long, padding at its end included; a last sequence may be padding.
    With `layout` [sum of lengths], on the host, a prompt that several begin with stands once in
    `tokens`: the token at place p of the sequences end to end is `tokens[layout[p]]`.

    Row r of `rows` [R] predicts response token `targets[r]`. Everything per token that the loss
    reads is a column [R] (COLUMNS), sequence by sequence, `row_lengths` each. `indices` says which
    samples these are, padding left out. The loss is the sum of its terms times column `weight`,
    which carries the mean over the whole update. `live` is how many of the leading sequences hold
    every advantage that is not 0 (None: all may). `chosen`: it trains on a token that a script
    chose, which packing knows: to ask the device would be to wait for it. `routed_experts` [T,
    layers, experts per token], on the host, are those that the routers are to choose; without them
    they choose for themselves.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    lengths: list[int]
    cu_seqlens: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    row_lengths: list[int]
    indices: list[int]
    columns: dict[str, torch.Tensor]
    routed_experts: torch.Tensor | None = None
    live: int | None = None
    chosen: bool = False
    layout: torch.Tensor | None = None

    @property
    def live_rows(self) -> int:
        """Number of leading rows; those behind them have advantage 0."""
        return sum(self.row_lengths[: self.live])
