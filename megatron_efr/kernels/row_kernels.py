"""Values that the row kernels exchange: statistics of logits, their merge, rows of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from megatron_efr.algorithms.objective import Objective

FIGURES = (
    "loss",
    "clip_fraction",
    "clip_above",
    "clip_below",
    "kl_to_old",
    "kl_to_reference",
    "entropy",
    "ratio_max",
)
"""Rows of what `policy_rows` measures; each a term per token, weighted, but for the last, which is
the plain ratio.

`clip_above`, `clip_below`: the ratio was too large or too small, and the token has no gradient of
its surrogate (or, if ratios only weigh, another weight); `clip_fraction` is either.
"""
_KL_TO_OLD, _RATIO = FIGURES.index("kl_to_old"), FIGURES.index("ratio_max")

ELSEWHERE, OUTSIDE = -1, -2  # a target of another rank; of no rank


@dataclass(frozen=True, slots=True)
class Logits:
    """Rows of logits on this rank, and how a kernel reads them.

    `values` [rows, columns + padding] are fp32 or 16-bit, with any row stride; `scale` is 1 /
    temperature. `targets` int64 [rows] are columns of this rank, ELSEWHERE or OUTSIDE. Columns from
    `columns` on are padding.
    """

    values: torch.Tensor
    targets: torch.Tensor
    columns: int
    scale: float


class Statistics(NamedTuple):
    """Statistics of z = logits / temperature over this rank's true columns; each fp32 [rows].

    `moment` is meaningless if entropy was not asked for. Sums are taken relative to `peak`, and so
    exact for logits of any offset. A rank without a column of the true vocabulary has peak -inf and
    total 0.
    """

    peak: torch.Tensor  # max z
    total: torch.Tensor  # sum exp(z - peak)
    moment: torch.Tensor  # sum (z - peak) exp(z - peak)
    target: torch.Tensor  # z of the target, if this rank has it


class Softmax(NamedTuple):
    """Softmax of rows over the whole vocabulary; each fp32 [rows]."""

    peak: torch.Tensor
    log_total: torch.Tensor  # log sum exp(z - peak): log p = (z - peak) - log_total
    logprob: torch.Tensor  # of the target
    entropy: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PolicyRows:
    """Values that the loss reads beside log-probs, fp32 [rows] each.

    `old` is what ratios refer to. `reference` for a KL in the loss; `importance`, constants to the
    gradient, if tokens are not weighed alike. `before`: the policy's own log-probs before the
    update, if `old` has others too: figures of how far the policy has moved refer to these, and no
    kernel reads them.
    """

    old: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    reference: torch.Tensor | None = None
    importance: torch.Tensor | None = None
    before: torch.Tensor | None = None

    def __getitem__(self, rows: slice) -> PolicyRows:
        return self._each(lambda part: part[rows])

    def plain(self) -> PolicyRows:
        """Contiguous fp32, without history: what a kernel reads."""
        return self._each(lambda part: part.detach().float().contiguous())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PolicyRows:
        return PolicyRows(
            change(self.old),
            change(self.advantages),
            change(self.weights),
            None if self.reference is None else change(self.reference),
            None if self.importance is None else change(self.importance),
            None if self.before is None else change(self.before),
        )


def refer_to_policy(figures: torch.Tensor, moved: torch.Tensor, weights: torch.Tensor) -> None:
    """Make `kl_to_old` and `ratio_max` of FIGURES [8, rows] say how far the policy itself has
    moved, in place.

    `moved` [rows]: its log-probs less those before the update, or their sequence's mean, as the
    ratio has it.
    """
    figures[_KL_TO_OLD] = torch.where(weights != 0.0, -weights * moved, 0.0)
    figures[_RATIO] = moved.exp()


def sum_figures(
    figures: torch.Tensor, weights: torch.Tensor, objective: Objective
) -> dict[str, torch.Tensor]:
    """Sums over rows of FIGURES [8, rows], by name, fp32; those that are on.

    And the largest ratio of the rows that are trained on, 0 if none are.
    """
    sums: dict[str, torch.Tensor] = dict(zip(FIGURES, figures.double().sum(1).float(), strict=True))
    trained = torch.where(weights != 0.0, figures[_RATIO], 0.0)
    # an empty micro-batch has none
    sums["ratio_max"] = torch.cat([trained, figures.new_zeros(1)]).max()
    if objective.loss_kl == "none":
        del sums["kl_to_reference"]
    return sums


class RowKernels(Protocol):
    """One implementation of the row kernels."""

    def statistics(self, logits: Logits, entropy: bool) -> Statistics: ...

    def write_gradient(
        self,
        logits: Logits,
        softmax: Softmax,
        grad_logprob: torch.Tensor,
        grad_entropy: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The gradient of the logits [rows, columns + padding] in `dtype`, written over them.

        Exactly zero in padding columns and in rows whose incoming gradients are zero.
        """
        ...

    def policy_rows(
        self,
        logits: Logits,
        softmax: Softmax,
        rows: PolicyRows,
        objective: Objective,
        factor: float,
        dtype: torch.dtype | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """FIGURES fp32 [8, rows] and, if `dtype` is given, factor * d loss / d logits as
        `write_gradient` has it.
        """
        ...


def merge(
    statistics: Statistics, targets: torch.Tensor, entropy: bool, group: dist.ProcessGroup | None
) -> Softmax:
    """The whole vocabulary's softmax from each tensor-parallel rank's statistics: one MAX and one
    SUM [3, rows].

    `targets` as `Logits` has them; OUTSIDE makes the log-prob nan: an error would have to
    wait for the card.
    """
    peak, total, moment = statistics.peak, statistics.total, statistics.moment
    if group is not None:
        peak = peak.clone()
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    target = torch.where(targets >= 0, statistics.target - peak, 0.0).masked_fill_(
        targets == OUTSIDE, torch.nan
    )
    if group is not None:
        # not -inf on a rank that holds only padding
        shift = torch.where(total > 0, statistics.peak - peak, 0.0)
        shrink = shift.exp()
        sums = torch.stack([total * shrink, (moment + shift * total) * shrink, target])
        dist.all_reduce(sums, group=group)
        total, moment, target = sums.unbind()
    log_total = total.log()
    return Softmax(
        peak, log_total, target - log_total, log_total - moment / total if entropy else None
    )


def chunks(tokens: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `tokens` in order."""
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))
