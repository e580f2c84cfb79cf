"""The paper's method: a correct answer earns 1 - alpha * sigmoid(standardised length), a wrong one
0.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import numpy as np
import torch
from pydantic import Field

from megatron_efr.methods.plain import Outcomes, Plain
from megatron_efr.types import FloatArray

ArrayT = TypeVar("ArrayT", np.ndarray, torch.Tensor)

_EPSILON = 1e-7  # the released code's guard against groups whose correct lengths are all equal


def efr_rewards(correct: ArrayT, lengths: ArrayT, alpha: float, min_std: float = 0.0) -> ArrayT:
    """Rewards of Arora & Zanette 2025 (arXiv 2502.04463), equations 4 and 5.

        r_i = c_i * (1 - alpha * sigmoid((len_i - mean_C) / (std_C + 1e-7)))

    mean and (population) standard deviation run over the prompt's *correct* responses; the
    deviation is at least `min_std` tokens. A response that was cut off must come in as not correct:
    it then earns 0 and enters neither statistic. `correct` and `lengths` are `[samples]` or
    `[prompts, samples]`, arrays or tensors; float64 of the same kind and shape comes back.
    ValueError unless 0 <= alpha < 1, min_std >= 0 and the shapes agree.
    """
    if not 0.0 <= alpha < 1.0:
        raise ValueError(f"alpha must lie in [0, 1), got {alpha}")
    if not min_std >= 0.0:
        raise ValueError(f"min_std must be at least 0, got {min_std}")
    if tuple(correct.shape) != tuple(lengths.shape):
        raise ValueError(
            f"correct {tuple(correct.shape)} and lengths {tuple(lengths.shape)} differ in shape"
        )
    if isinstance(correct, torch.Tensor):
        counts = cast(torch.Tensor, lengths)
        rewards = _rewards(
            correct.detach().cpu().numpy(), counts.detach().cpu().numpy(), alpha, min_std
        )
        return cast(Any, torch.from_numpy(rewards).to(correct.device))
    return cast(Any, _rewards(np.asarray(correct), np.asarray(lengths), alpha, min_std))


def _rewards(correct: np.ndarray, lengths: np.ndarray, alpha: float, min_std: float) -> np.ndarray:
    c = correct.astype(bool).astype(np.float64)
    length = lengths.astype(np.float64)
    # no correct response: every reward is 0 whatever the mean
    count = np.maximum(c.sum(-1, keepdims=True), 1.0)
    mean = (c * length).sum(-1, keepdims=True) / count
    std = np.sqrt((c * (length - mean) ** 2).sum(-1, keepdims=True) / count)
    z = c * (length - mean) / (np.maximum(std, min_std) + _EPSILON)
    return c * (1.0 - alpha / (1.0 + np.exp(-z)))


class EFR(Plain):
    """Training Language Models to Reason Efficiently.

        r = c (1 - alpha sigmoid((l - mean_C) / (std_C + 1e-7)))

    mean_C and std_C (population) are those of the right responses. A wrong or truncated response
    earns 0, and is in neither. Nothing is remembered. `min_std` is this project's: by the paper's
    rule lengths of 1,000 and 1,001 tokens earn what 1,000 and 30,000 do; with `min_std` of 100 they
    earn almost the same.
    """

    source = "Arora & Zanette 2025, arXiv 2502.04463, eq. 4 and 5"
    standing = "code"

    alpha: float = Field(
        ge=0,
        lt=1,
        description="price of length: 0 is plain accuracy RL, larger briefer; the paper: 0 to 0.4",
    )
    min_std: float = Field(
        default=0.0,
        ge=0,
        description="tokens that the deviation counts as at least; 0: the paper's rule",
    )

    def rule(self, group: Outcomes) -> FloatArray:
        return efr_rewards(group.right, group.lengths, self.alpha, self.min_std)
