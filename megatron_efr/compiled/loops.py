"""The loops. Numbers are float32 inside, and rounded once; a row's result depends on no other row.

A loop is compiled when it is first called, and kept beside this file, or in Numba's folder of the
user. Numba does not see that a loop kept in another file has changed: all are in this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

_KEYS = 4  # read at once; room for keys is a multiple of it
_VECTOR = 16  # weights are made in multiples of it, so that a loop over them has less of a rest
_COLUMNS = 2048  # of logits whose gradient is made before it is written over them
_TOKENS = 256  # whose probabilities are summed before a draw looks among them

# it makes a loop's operation of what follows: pyright sees the function alone
_operation: Any = intrinsic

# no promise that numbers are finite: nan has to stay nan
_FAST = {"contract", "reassoc", "arcp", "nsz"}


def _loop(function: Callable[..., Any], fast: set[str] = _FAST) -> Callable[..., Any]:
    options: dict[str, Any] = {"fastmath": fast, "error_model": "numpy", "nogil": True}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder that may be written
        return njit(**options)(function)


# written into the loops that call it, where numbers that these know become constants
_part: Any = njit(inline="always")


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor's memory as NumPy has it; bfloat16, which NumPy lacks, as its bits in int16."""
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return bits.detach().numpy()


# -- numbers
# --------------------------------------------------------------------------------------------------


@_operation
def _wide(_: Any, x: Any) -> Any:
    """float32 of float32, or of the bits of bfloat16."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] == types.float32:
            return arguments[0]
        upper = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.IntType(32)(16))
        return builder.bitcast(upper, ir.FloatType())

    return types.float32(x), generate


@_operation
def _of_bits(_: Any, x: Any) -> Any:
    """float32 of its bits, int32."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@_operation
def _rounded(_: Any, x: Any, like: Any) -> Any:
    """float32 `x` as float32, or as the bits of bfloat16: to nearest, ties to even; `like` is an
    element of the array that takes it.
    """

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[1] == types.float32:
            return arguments[0]
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        nearest = builder.add(bits, builder.add(odd, word(0x7FFF)))
        # adding could make a number, or 0, of nan
        is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        chosen = builder.select(is_nan, word(0x7FC00000), nearest)
        return builder.trunc(builder.lshr(chosen, word(16)), ir.IntType(16))

    return like(types.float32, like), generate


@_operation
def _prefetch(_: Any, vector: Any, line: Any) -> Any:
    """Have cache line number `line` behind a vector's beginning on its way from memory."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        ahead = builder.shl(arguments[1], ir.IntType(64)(6))
        place = builder.gep(builder.bitcast(array.data, byte), [ahead])
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        builder.call(fetch, [place, word(0), word(3), word(1)])  # to read, all caches, data
        return context.get_dummy_value()

    return types.void(vector, types.int64), generate


def _exp_of(x: np.float32) -> Any:
    """exp x in float32, within a unit of its last place: 2^n times a polynomial (Cephes, expf), in
    operations that vectorise. 0 below -87.3, and not beyond exp 88.
    """
    held = np.float32(-87.3) if x < np.float32(-87.3) else x
    held = np.float32(88.0) if held > np.float32(88.0) else held
    n = np.float32(math.floor(held * np.float32(1.44269504) + np.float32(0.5)))
    r = held - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    power = p * _of_bits((np.int32(n) + np.int32(127)) << np.int32(23))
    return np.float32(0.0) if x < np.float32(-87.3) else power


# its remainder must not be simplified away
_exp = _loop(_exp_of, {"contract", "nsz"})


# -- norms
# --------------------------------------------------------------------------------------------------


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, inverse: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., hidden] / rms(x) * weight, contiguous; 1 / rms(x) is left in `inverse` [rows]."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty_like(rows)
    left = torch.empty(len(rows)) if inverse is None else inverse
    _rms_norm(_array(rows), _array(weight), np.float32(eps), _array(out), _array(left))
    return out.view(x.shape)


@_loop
def _rms_norm(rows, weight, eps, out, inverse):
    for i in range(rows.shape[0]):
        total = np.float32(0)
        for j in range(rows.shape[1]):
            value = _wide(rows[i, j])
            total += value * value
        scale = np.float32(1) / np.sqrt(total / np.float32(rows.shape[1]) + eps)
        inverse[i] = scale
        for j in range(rows.shape[1]):
            out[i, j] = _rounded(_wide(rows[i, j]) * scale * _wide(weight[j]), out[i, j])


def rms_norm_gradient(
    rows: torch.Tensor,
    weight: torch.Tensor,
    inverse: torch.Tensor,
    given: torch.Tensor,
    d_weight: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient of `rows` [rows, hidden] by that of their norm; `d_weight`, float32 [hidden],
    gets the weight's added.
    """
    out = torch.empty_like(rows)
    room = torch.empty(rows.shape[1]) if d_weight is None else d_weight
    tensors = rows, weight, inverse, given.contiguous(), room, out
    _rms_norm_gradient(*(_array(tensor) for tensor in tensors))
    return out


@_loop
def _rms_norm_gradient(rows, weight, inverse, given, d_weight, out):
    width = rows.shape[1]
    for i in range(rows.shape[0]):
        scale, along = inverse[i], np.float32(0)
        for j in range(width):
            both = _wide(given[i, j]) * (_wide(rows[i, j]) * scale)
            d_weight[j] += both
            along += both * _wide(weight[j])
        # what of the change is along the row, which its norm takes away
        along = along / np.float32(width) * scale
        for j in range(width):
            change = _wide(given[i, j]) * _wide(weight[j]) - _wide(rows[i, j]) * along
            out[i, j] = _rounded(change * scale, out[i, j])


# -- SwiGLU
# --------------------------------------------------------------------------------------------------


def swiglu(both: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) * up [..., ffn] of [..., 2 * ffn], which holds both."""
    rows = both.reshape(-1, both.shape[-1]).contiguous()
    out = rows.new_empty(len(rows), rows.shape[1] // 2)
    _swiglu(_array(rows), _array(out))
    return out.view(*both.shape[:-1], out.shape[1])


@_loop
def _swiglu(both, out):
    n, ffn = out.shape
    for i in range(n):
        for j in range(ffn):
            gate = _wide(both[i, j])
            value = gate / (np.float32(1) + _exp(-gate)) * _wide(both[i, ffn + j])
            out[i, j] = _rounded(value, out[i, j])


def swiglu_gradient(both: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """The gradient of `both` by that of its SwiGLU."""
    rows = both.reshape(-1, both.shape[-1]).contiguous()
    change, out = given.reshape(-1, given.shape[-1]).contiguous(), torch.empty_like(rows)
    _swiglu_gradient(_array(rows), _array(change), _array(out))
    return out.view(both.shape)


@_loop
def _swiglu_gradient(both, given, out):
    n, ffn = given.shape
    one = np.float32(1)
    for i in range(n):
        for j in range(ffn):
            gate, up = _wide(both[i, j]), _wide(both[i, ffn + j])
            change, sigmoid = _wide(given[i, j]), one / (one + _exp(-gate))
            slope = sigmoid * (one + gate * (one - sigmoid))
            out[i, j] = _rounded(change * up * slope, out[i, j])
            out[i, ffn + j] = _rounded(change * gate * sigmoid, out[i, j])


# -- rotary embedding
# --------------------------------------------------------------------------------------------------


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [tokens, heads, dim] by cos, sin [tokens, 1, dim], whose halves are
    alike; contiguous.
    """
    out = torch.empty(x.shape, dtype=x.dtype)
    # the loop over memory of unknown strides takes six times as long
    _rotate(_array(x.contiguous()), _array(cos), _array(sin), _array(out))
    return out


@_loop
def _rotate(x, cos, sin, out):
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            _turn(x[t, h], cos[t, 0], sin[t, 0], np.float32(1), x.shape[2], out[t, h])


@_part
def _turn(x, cos, sin, scaling, width, out):
    half = width // 2
    for d in range(half):
        a, b, c, s = _wide(x[d]), _wide(x[half + d]), _wide(cos[d]), _wide(sin[d])
        out[d] = _rounded((a * c - b * s) * scaling, out[d])
        out[half + d] = _rounded((b * c + a * s) * scaling, out[d])


# -- attention of a decoding step
# --------------------------------------------------------------------------------------------------


def attention(
    positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Attention of one token a row in `positions` [n] over a cache's first n rows: of (qkv, cache)
    it makes [n, heads * dim].

    `qkv` [n, heads + 2 groups, dim]: queries, keys and values, still to be rotated by cos and sin
    [n, 1, dim], whose halves are alike. `cache` [2, rows, groups, capacity, dim], contiguous, takes
    keys and values first.
    """
    given = _array(positions), _array(cos), _array(sin)

    def attend(qkv: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        n, _, width = qkv.shape
        assert cache.shape[3] % _KEYS == 0, "the loop reads so many keys at once, unchecked"
        out = torch.empty(n, heads, width, dtype=qkv.dtype)
        loop = _attention(width, heads // cache.shape[2], cache.itemsize)
        loop(*given, _array(qkv), _array(cache), _array(out))
        return out.view(n, heads * width)

    return attend


@cache
def _attention(width: int, queries: int, itemsize: int) -> Callable[..., Any]:
    """The loop for heads of this width, so many of which share their keys: inner loops of known
    length keep their sums in registers.
    """
    lines = -(-width * itemsize // 64)  # of the processor's cache, a key
    scaling = np.float32(width**-0.5)

    @_loop
    def attend(positions, cos, sin, qkv, cache, out):
        groups, last = cache.shape[2], qkv.shape[0] - 1
        query = np.empty((queries, width), np.float32)
        sums, peaks = np.empty((queries, width), np.float32), np.empty(queries, np.float32)
        weights = np.empty((queries, cache.shape[3] + _VECTOR), np.float32)
        # of each row, the heads that share their keys
        for i in range(qkv.shape[0]):
            length = positions[i] + 1
            for g in range(groups):
                keys, values = cache[0, i, g], cache[1, i, g]
                after = cache[0, i, g + 1] if g + 1 < groups else cache[0, min(i + 1, last), 0]
                # the new token's query, key and value
                first, at = g * queries, groups * queries + g
                for h in range(queries):
                    _turn(qkv[i, first + h], cos[i, 0], sin[i, 0], scaling, width, query[h])
                _turn(qkv[i, at], cos[i, 0], sin[i, 0], np.float32(1), width, keys[length - 1])
                for d in range(width):
                    value = _wide(qkv[i, at + groups, d])
                    values[length - 1, d] = _rounded(value, values[0, d])
                # attention, each pass with what the next reads on its way from memory
                _score(query, keys, length, queries, width, weights, peaks, values, lines)
                for h in range(queries):
                    _softmax(weights[h], length, peaks[h])
                _weigh(weights, values, length, queries, width, sums, after, lines)
                for h in range(queries):
                    for d in range(width):
                        out[i, first + h, d] = _rounded(sums[h, d], out[i, first, d])

    return attend


@_part
def _score(query, keys, length, queries, width, weights, peaks, after, lines):
    """Products of queries and keys, -inf behind the last key, and each query's largest."""
    none = np.float32(-np.inf)
    peaks[:] = none
    for j in range(0, length, _KEYS):
        for line in range(_KEYS * lines):
            _prefetch(after[j], line)
        left = length - j
        for h in range(queries):
            s0 = s1 = s2 = s3 = np.float32(0)
            for d in range(width):
                x = query[h, d]
                s0 += x * _wide(keys[j, d])
                s1 += x * _wide(keys[j + 1, d])
                s2 += x * _wide(keys[j + 2, d])
                s3 += x * _wide(keys[j + 3, d])
            s1, s2 = s1 if left > 1 else none, s2 if left > 2 else none
            s3 = s3 if left > 3 else none
            weights[h, j], weights[h, j + 1] = s0, s1
            weights[h, j + 2], weights[h, j + 3] = s2, s3
            # here, where it is free: a loop for it would go number by number
            peaks[h] = max(peaks[h], max(max(s0, s1), max(s2, s3)))


@_part
def _softmax(weights, length, peak):
    """In place, of `_score`'s products; exactly 0 for what is behind the last."""
    end, total = -(-length // _VECTOR) * _VECTOR, np.float32(0)
    weights[length:end] = -np.inf
    for j in range(end):
        weight = _exp(weights[j] - peak)
        weights[j] = weight
        total += weight
    for j in range(end):
        weights[j] /= total


@_part
def _weigh(weights, values, length, queries, width, sums, after, lines):
    """Sums of values by their weights, four at a time."""
    sums[:] = 0
    for j in range(0, length, _KEYS):
        for line in range(_KEYS * lines):
            _prefetch(after[j], line)
        for d in range(width):
            v0, v1 = _wide(values[j, d]), _wide(values[j + 1, d])
            v2, v3 = _wide(values[j + 2, d]), _wide(values[j + 3, d])
            for h in range(queries):
                front = weights[h, j] * v0 + weights[h, j + 1] * v1
                sums[h, d] += front + (weights[h, j + 2] * v2 + weights[h, j + 3] * v3)


# -- the head
# --------------------------------------------------------------------------------------------------


def write_logits_gradient(
    values: torch.Tensor,
    out: torch.Tensor,
    columns: int,
    scale: float,
    targets: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """The gradient that `torch_rows.write_gradient` writes, from `values` [rows, V], contiguous, to
    `out` [rows, V], which begins where `values` does or elsewhere, and whose rows may be longer.

    `rows` are float32 [6, rows]: peak and log-sum of the softmax, entropy, gradients of log-prob
    and of entropy, and the target's part (0 if it is another rank's).
    """
    # whole rows of memory, so that the loop knows it without gaps
    whole = out.as_strided((len(out), out.stride(0)), (out.stride(0), 1))
    _write_logits_gradient(
        _array(values), _array(whole), columns, np.float32(scale), _array(targets), _array(rows)
    )


def _write_logits_gradient_of(values, out, columns, scale, targets, rows):
    block = np.empty(_COLUMNS, np.float32)
    for i in range(values.shape[0]):
        peak, log_total, entropy = rows[0, i], rows[1, i], rows[2, i]
        change, change_entropy, owned = rows[3, i], rows[4, i], rows[5, i]
        # a row that nobody trains
        if change == 0 and change_entropy == 0:
            out[i, : values.shape[1]] = 0
            continue
        # a block beside the memory that is written over
        for first in range(0, columns, _COLUMNS):
            n = min(_COLUMNS, columns - first)
            if change_entropy == 0:
                factor = -change * scale
                for j in range(n):
                    logprob = _wide(values[i, first + j]) * scale - peak - log_total
                    block[j] = factor * _exp(logprob)
            else:
                for j in range(n):
                    logprob = _wide(values[i, first + j]) * scale - peak - log_total
                    # -inf times its probability adds nothing
                    held = np.float32(-1e30) if logprob < np.float32(-1e30) else logprob
                    weight = change + change_entropy * (held + entropy)
                    block[j] = -_exp(held) * weight * scale
            # the target's own part, then the block in its place
            if first <= targets[i] < first + n:
                block[targets[i] - first] += owned * scale
            for j in range(n):
                out[i, first + j] = _rounded(block[j], out[i, first + j])
        # padding has none
        for j in range(columns, values.shape[1]):
            out[i, j] = 0


# as written: the scaled logit is rounded as it was for the peak, and differs from it exactly
_write_logits_gradient = _loop(_write_logits_gradient_of, {"nsz"})


# -- draws
# --------------------------------------------------------------------------------------------------


def draw(
    logits: torch.Tensor, uniform: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-probs [n] of `sampling.draw`, from scale * logits [n, vocab], contiguous."""
    tokens, logprobs = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits))
    _draw(_array(logits), _array(uniform), np.float32(scale), _array(tokens), _array(logprobs))
    return tokens, logprobs


@_loop
def _draw(logits, uniform, scale, tokens, logprobs):
    vocab, last = logits.shape[1], (logits.shape[1] - 1) // _TOKENS
    peaks, sums = np.empty(_TOKENS, np.float32), np.empty(last + 1)
    for i in range(logits.shape[0]):
        row, peaks[:] = logits[i], -np.inf
        for first in range(0, vocab, _TOKENS):
            for j in range(min(_TOKENS, vocab - first)):
                peaks[j] = row[first + j] if row[first + j] > peaks[j] else peaks[j]
        peak, total = peaks.max(), 0.0
        # probabilities, not normalised yet, of blocks of tokens
        for b in range(last + 1):
            part = np.float32(0)
            for j in range(b * _TOKENS, min(b * _TOKENS + _TOKENS, vocab)):
                part += _exp((row[j] - peak) * scale)
            sums[b] = part
            total += sums[b]
        # the block in which the uniform's share of the total ends, then the token in it
        share, before, b = uniform[i] * total, 0.0, 0
        while b < last and before + sums[b] <= share:
            before += sums[b]
            b += 1
        token = b * _TOKENS
        for j in range(b * _TOKENS, min(b * _TOKENS + _TOKENS, vocab)):
            weight = _exp((row[j] - peak) * scale)
            before += weight
            # sums rounded otherwise may not lead beyond the last that has any
            token = j if weight > 0 else token
            if before > share:
                break
        tokens[i], logprobs[i] = token, (row[token] - peak) * scale - np.log(total)
