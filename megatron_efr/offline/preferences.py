"""Direct preference optimization: of two responses to a prompt the first is made likelier than the
second.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_efr.policy import Policy, weighted_likelihood
from megatron_efr.samples import PackedBatch, Sample


class PreferenceUpdate:
    """One update on pairs, whose samples stand one behind the other: the preferred one first.

        loss = mean over pairs of -log sigmoid(m),   m = beta ((w - w_ref) - (l - l_ref))

    with w and l the summed log-probs of the preferred and the other response, w_ref and l_ref those
    under the initial model (Rafailov et al. 2023, arXiv 2305.18290, eq. 7). Its gradient is that of
    log-probs times constants, beta sigmoid(-m) of each token: log-probs are computed first, of all
    pairs, and a second pass has the gradient. So the samples of a pair may lie in different
    micro-batches, and on different replicas.
    """

    def __init__(self, beta: float, micro_batch_tokens: int | None) -> None:
        self._beta, self._micro_batch_tokens = beta, micro_batch_tokens

    def __call__(
        self, policy: Policy, samples: Sequence[Sample], update: list[int]
    ) -> dict[str, float]:
        """The figures of the loss before the update, and of the update: `update` are the pairs'
        samples in turn.
        """
        sizes = {i: samples[i].size for i in update}
        plan = policy.plan_update(sizes, update, self._micro_batch_tokens, "constant", divisor=1)
        batches = policy.pack(samples, plan)
        policy.score(batches)
        places = {sample: place for place, sample in enumerate(update)}
        gains = policy.ranks.sum_over_replicas(_gains(batches, places, policy.ranks.device))
        margins = self._beta * (gains[0::2] - gains[1::2])
        # each pair's two samples weigh 1 / (2 pairs) in the plan
        slopes = 2.0 * self._beta * torch.sigmoid(-margins)
        each = torch.stack([slopes, -slopes], 1).flatten().float()
        for batch in batches:
            values = [
                each[places[i]].expand(n)
                for i, n in zip(batch.indices, batch.row_lengths, strict=True)
            ]
            batch.columns["advantage"] = torch.cat(values) if values else batch.columns["weight"]
        metrics = policy.update(batches, weighted_likelihood)
        return metrics | {
            "loss": float(torch.nn.functional.softplus(-margins).mean()),
            "margin": float(margins.mean()),
            "preferred": float((margins > 0).double().mean()),
            "gain": float(gains[0::2].mean()),
            "gain_of_other": float(gains[1::2].mean()),
        }


def _gains(
    batches: Sequence[PackedBatch], places: dict[int, int], device: torch.device
) -> torch.Tensor:
    """Each sample's summed log-prob under the policy less that under the initial model, float64, by
    its place; 0 for those of other replicas.
    """
    gains = torch.zeros(len(places), dtype=torch.float64, device=device)
    for batch in batches:
        difference = (
            batch.columns["old_logprob"].double() - batch.columns["reference_logprob"].double()
        )
        for i, rows in zip(batch.indices, difference.split(batch.row_lengths), strict=True):
            gains[places[i]] = rows.sum()
    return gains
