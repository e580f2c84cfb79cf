"""Drawing tokens: counter-based random numbers (Philox) and inverse-CDF sampling, a row at a time.

A token is a function of its logits and of (request seed, sample, branch, position) alone: no
generator carries state from one draw to the next, so a response does not depend on what else is in
the batch or on what was drawn before a restart.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from megatron_efr.compiled import loops_for
from megatron_efr.rollout.driver import TokenPenalty

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)
_LARGE = 4096  # tokens: from a vocabulary of more, draws take two steps
_BLOCK = 256  # tokens of the first step's blocks
_ROWS = 8  # drawn together, so that a processor's cache holds what is computed of them


def philox4x32(
    counter: NDArray[np.uint64], key: NDArray[np.uint64], rounds: int = 10
) -> NDArray[np.uint64]:
    """Philox-4x32: counters [4, n] and keys [2, n] of 32-bit words, held in uint64, to random words
    [4, n].

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; word order as in
    Random123.
    """
    even, odd = counter[0::2], counter[1::2]
    for _ in range(rounds):
        product = _MULTIPLIERS * even
        even, odd = (product[::-1] >> _WORD) ^ odd ^ key, product[::-1] & _LOW
        key = (key + _WEYL) & _LOW
    return np.stack([even[0], odd[0], even[1], odd[1]])


def uniforms(
    seeds: NDArray[np.uint64],
    samples: NDArray[np.int64],
    positions: NDArray[np.int64],
    branches: NDArray[np.int64] | int = 0,
) -> NDArray[np.float64]:
    """One 53-bit uniform in [0, 1) for each (request seed, sample, branch, position in the
    response), all [n].

    The seed is Philox's key; the counter is (position, sample, branch, 0), so draws of one request
    never share a counter. Branch 0 is the response itself.
    """
    counter = np.zeros((4, len(seeds)), dtype=np.uint64)
    counter[0] = positions
    counter[1] = samples
    counter[2] = branches
    words = philox4x32(counter, np.stack([seeds & _LOW, seeds >> _WORD]))
    return (
        (words[0] >> np.uint64(5)) * 67108864.0 + (words[1] >> np.uint64(6))
    ) / 9007199254740992.0


@torch.inference_mode()
def draw(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row: logits [n, vocab] and float64 uniforms [n] to tokens [n] and float32
    log-probs [n].

    The token is the first whose cumulative probability, summed in float64 in the order of token
    ids, exceeds the uniform times the total; of large vocabularies that is looked for in two steps,
    blocks of tokens first, whose probabilities, and sums if a loop makes them, are float32.
    Log-probs are of the distribution after temperature and before top-p, as SGLang reports them.
    Temperature 0 takes the most probable token (the lowest id of equals), with its log-prob at
    temperature 1.

    Every operation works row by row, so a row's result does not depend on the others.
    """
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        loops = loops_for(logits) if top_p == 1 and logits.shape[-1] > _LARGE else None
        if loops:
            return loops.draw(logits.contiguous(), uniform, 1 / temperature)
        if temperature != 1:
            logits = logits / temperature
        if top_p == 1 and logits.shape[-1] > _LARGE:
            parts = zip(logits.split(_ROWS), uniform.split(_ROWS), strict=True)
            tokens, logprobs = zip(*(_draw_of_many(*part) for part in parts), strict=True)
            return torch.cat(tokens), torch.cat(logprobs)
        probabilities = torch.softmax(logits.double(), -1)
        if top_p < 1:
            probabilities = _nucleus(probabilities, top_p)
        cumulative = probabilities.cumsum(-1)
        # u * total < total for every u <= 1 - 2^-53, so the token found always has probability > 0.
        tokens = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[
            :, 0
        ]
    logprobs = torch.log_softmax(logits, -1).gather(
        -1, tokens[:, None].clamp(max=logits.shape[-1] - 1)
    )[:, 0]
    return tokens, logprobs


@torch.inference_mode()
def draw_rows(
    logits: torch.Tensor, uniform: torch.Tensor, temperatures: NDArray[np.float64], top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`draw` for rows that have a temperature each, [n]."""
    found = np.unique(temperatures)
    if len(found) == 1:
        return draw(logits, uniform, float(found[0]), top_p)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for temperature in found.tolist():
        rows = torch.from_numpy(np.flatnonzero(temperatures == temperature)).to(logits.device)
        tokens[rows], logprobs[rows] = draw(logits[rows], uniform[rows], temperature, top_p)
    return tokens, logprobs


@torch.inference_mode()
def lowered(logits: torch.Tensor, penalties: Iterable[tuple[int, TokenPenalty]]) -> torch.Tensor:
    """Logits [n, vocab] less what these rows' penalties take; the same tensor if there are none."""
    for number, (row, penalty) in enumerate(penalties):
        # the caller's logits stay the model's own
        logits = logits if number else logits.clone()
        logits[row, list(penalty.tokens)] -= penalty.amount
    return logits


def _draw_of_many(logits: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`draw` from a large vocabulary: the block of token ids first, and then the token in it.

    A quarter of the time of exponentials and cumulative sums in float64: exponentials are float32,
    which moves a probability by 1e-7 of itself, and only sums are float64.
    """
    n, vocab = logits.shape
    # unnormalised probabilities, and their sums over blocks
    peak = logits.amax(-1, keepdim=True)
    weights = (logits - peak).exp_()
    blocks = F.pad(weights, (0, -vocab % _BLOCK)).view(n, -1, _BLOCK)
    cumulative = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    total = cumulative[:, -1:]
    # the block in which the uniform's share of the total ends; of what is not finite, any
    share = uniform[:, None] * total
    block = torch.searchsorted(cumulative, share, right=True).clamp_(max=blocks.shape[1] - 1)
    before = cumulative.gather(-1, (block - 1).clamp_(min=0)).masked_fill_(block == 0, 0.0)
    # the token in it, as over the whole; sums rounded otherwise may not lead beyond its last one
    inside = blocks.gather(1, block[..., None].expand(n, 1, _BLOCK))[:, 0].double()
    inside = inside.cumsum(-1).add_(before)
    found = torch.searchsorted(inside, share, right=True)
    tokens = block * _BLOCK + torch.minimum(found, inside.argmax(-1, keepdim=True))
    tokens.clamp_(max=vocab - 1)
    logprobs = (logits.gather(-1, tokens) - peak).double() - total.log()
    return tokens[:, 0], logprobs[:, 0].float()


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all but the smallest set of most probable tokens that holds `top_p` of the mass; the
    lower id wins ties.
    """
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return probabilities.masked_fill(
        torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before >= top_p), 0.0
    )
