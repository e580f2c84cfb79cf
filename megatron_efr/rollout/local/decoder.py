"""A lean decoder of every family that the policy trains, over one batched KV cache: prefill and
steps, no training.

Rows never influence one another, bit for bit, if the libraries below allow it. Matrix products get
as many rows as `products.py` asks for. A step's attention is a compiled loop over each row's own
keys; by torch's operations it runs over keys in multiples of `KEYS`, whose masked tail contributes
exact zeros, summed in blocks of `SUMMED`. A prompt's attention is that of its own length, rounded
up. All else is row-wise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from megatron_efr.bfloat16_products import float32_sums
from megatron_efr.compiled import loops_for
from megatron_efr.publication.named_tensors import check_names
from megatron_efr.rollout.local.products import Form, Product
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.frequencies import inverse_frequencies
from megatron_efr.weights.mapping import WeightMapping

KEYS = 32  # two AVX-512 vectors: also keeps element-wise kernels out of their scalar tails
CHUNK = 64  # rows whose attention runs over as many keys as the longest of them has
SUMMED = 256  # keys summed in one product: beyond 384 MKL splits the sum anywhere
ALONE = 4  # queries of one key head that bfloat16's attention takes one by one
PREFILL_TOKENS = 2048  # padded tokens of one prefill: bounds its activations


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


class Cache:
    """Keys and values of sequences, one a row: `layers` each [2, rows, kv heads, capacity, head
    dim], keys first.

    Rows are added, and capacity doubles, as they are needed. Unused entries are zero or left over
    from an earlier sequence; both are finite, so that masked attention gives them exactly nothing.
    """

    def __init__(
        self, architecture: Architecture, device: torch.device, dtype: torch.dtype
    ) -> None:
        a = architecture
        shape = (2, 0, a.kv_heads, 0, a.head_dim)
        self.layers = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(a.layers)]
        self._room = torch.empty(0, a.vocab, device=device)

    @property
    def rows(self) -> int:
        return self.layers[0].shape[1]

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.layers[0].shape[3]

    @torch.inference_mode()
    def reserve(self, rows: int, tokens: int, most: int) -> None:
        """Make room for `rows` of `tokens` each, which will never be more than `most`."""
        if rows <= self.rows and tokens <= self.capacity:
            return
        capacity = self.capacity
        if tokens > capacity:
            capacity = max(round_up(tokens, KEYS), min(2 * capacity, round_up(most, KEYS)))
        for number, old in enumerate(self.layers):  # at most one layer is there twice
            two, held, heads, filled, width = old.shape
            grown = old.new_zeros(two, max(rows, held), heads, capacity, width)
            grown[:, :held, :, :filled] = old
            self.layers[number] = grown
            del old

    def room(self, rows: int) -> torch.Tensor:
        """Memory for a step's logits, float32 [rows, vocab], as the last step left it: the system
        would clear it each time that it is given back and asked for.
        """
        if rows > len(self._room):
            self._room = self._room.new_empty(rows, self._room.shape[1])
        return self._room[:rows]

    def entries(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The places of keys and values of `positions` [n] in `rows` [n] in one layer, seen as
        vectors [.., head dim].

        In the order [n, keys then values, kv heads], flat.
        """
        two, all_rows, heads, capacity, _ = self.layers[0].shape
        parts = torch.arange(two, device=rows.device)[:, None] * all_rows
        head = torch.arange(heads, device=rows.device)
        return (
            ((parts + rows[:, None, None]) * heads + head) * capacity + positions[:, None, None]
        ).flatten()

    @torch.inference_mode()
    def write(self, row: int, tokens: int, kv: torch.Tensor) -> None:
        """Fill the first `tokens` entries of `row` from `kv` [layers, 2, kv heads, >= tokens, head
        dim].
        """
        for layer, given in zip(self.layers, kv, strict=True):
            layer[:, row, :, :tokens] = given[:, :, :tokens]

    @torch.inference_mode()
    def read(self, row: int, tokens: int) -> torch.Tensor:
        """A copy of the first `tokens` entries of `row`, as `write` takes it."""
        return torch.stack([layer[:, row, :, :tokens] for layer in self.layers])

    @torch.inference_mode()
    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` entries of row `source` over row `target`."""
        for layer in self.layers:
            layer[:, target, :, :tokens] = layer[:, source, :, :tokens]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights; q, k, v and gate, up are stacked so that each is one product."""

    input_norm: torch.Tensor
    qkv: Product
    qkv_bias: torch.Tensor | None
    o: Product
    post_norm: torch.Tensor
    gate_up: list[Product]  # a single one, or one per expert
    down: list[Product]
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    router: torch.Tensor | None


class Decoder:
    """The model's weights and its forward pass; float32 on CPU is what the bitwise claims are
    tested for.
    """

    def __init__(
        self, architecture: Architecture, device: torch.device, dtype: torch.dtype
    ) -> None:
        a = self.architecture = architecture
        self.device, self.dtype = device, dtype
        self._form = Form(a.hidden, device, dtype)
        self._products: list[Product] = []
        # Hugging Face name -> what copies its values into our tensors
        self._targets: dict[str, Callable[[torch.Tensor], object]] = {}
        self._shapes = WeightMapping(a).shapes()
        self._embedding = self._tensor("model.embed_tokens.weight")
        self._layers = [self._layer(f"model.layers.{n}.") for n in range(a.layers)]
        self._norm = self._tensor("model.norm.weight")
        # logits are fp32, as the policy's are: bf16 ones move log-probs by several 1e-2
        self._head_form = Form(a.hidden, device, dtype, head=True)
        self._head = Product(self._head_form, [a.vocab], a.hidden)
        self._products.append(self._head)
        if not a.tied:
            self._targets["lm_head.weight"] = partial(self._head.fill, 0)
        assert self._targets.keys() == self._shapes.keys(), (
            "the mapping and the decoder disagree about the model"
        )
        self._inverse_frequencies = inverse_frequencies(a.rotary, a.head_dim).to(device)

    @property
    def rows(self) -> int:
        """The multiple in which `step` takes rows, and `prefill` tokens."""
        return self._form.rows

    @property
    def cached(self) -> torch.dtype:
        """The dtype of keys and values, in which attention works: float32 for bfloat16 on a
        processor that does not multiply it.
        """
        return self._form.held

    def _layer(self, prefix: str) -> _Layer:
        a = self.architecture
        attention = prefix + "self_attn."
        mlp = prefix + "mlp."
        bias = [f"{attention}{x}_proj.bias" for x in "qkv"]
        feed_forward = (
            [f"{mlp}experts.{e}." for e in range(a.experts.count)] if a.experts else [mlp]
        )
        return _Layer(
            input_norm=self._tensor(prefix + "input_layernorm.weight"),
            qkv=self._product(*(f"{attention}{x}_proj.weight" for x in "qkv")),
            qkv_bias=self._tensor(*bias) if a.qkv_bias else None,
            o=self._product(attention + "o_proj.weight"),
            post_norm=self._tensor(prefix + "post_attention_layernorm.weight"),
            gate_up=[
                self._product(f + "gate_proj.weight", f + "up_proj.weight") for f in feed_forward
            ],
            down=[self._product(f + "down_proj.weight") for f in feed_forward],
            q_norm=self._tensor(attention + "q_norm.weight") if a.qk_norm else None,
            k_norm=self._tensor(attention + "k_norm.weight") if a.qk_norm else None,
            router=self._tensor(mlp + "gate.weight") if a.experts else None,
        )

    def _tensor(self, *names: str) -> torch.Tensor:
        """Room for the named tensors, stacked along dim 0."""
        rows = [self._shapes[name][0] for name in names]
        tensor = torch.empty(
            sum(rows), *self._shapes[names[0]][1:], device=self.device, dtype=self.dtype
        )
        parts = (part.copy_ for part in tensor.split(rows))
        self._targets.update(zip(names, parts, strict=True))
        return tensor

    def _product(self, *names: str) -> Product:
        """The product with the named weights, stacked along dim 0."""
        rows = [self._shapes[name][0] for name in names]
        product = Product(self._form, rows, self._shapes[names[0]][1])
        self._products.append(product)
        self._targets.update((name, partial(product.fill, n)) for n, name in enumerate(names))
        return product

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy (Hugging Face name, whole tensor) pairs in; ValueError names what is unknown, twice,
        mis-shaped or missing, after which the weights are a mixture and must not be served.

        Copies, not views: a version stays what it was while the optimizer goes on changing the
        policy's tensors.
        """
        for product in self._products:  # what an earlier publication left half done
            product.clear()
        # The iterator's own code runs outside inference mode: it may keep tensors that autograd
        # sees later.
        for name, tensor in check_names(weights, self._shapes):
            with torch.no_grad():
                self._targets[name](tensor)
        if self.architecture.tied:
            self._head.take(self._embedding)

    def read(
        self, sequences: Sequence[NDArray[np.int64]]
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Prefill sequences, PREFILL_TOKENS padded tokens (or one of them) at a time.

        Yields (index, keys and values [layers, 2, kv heads, >= its length, head dim], logits after
        the last token, float32 [vocab]), batch by batch.
        """
        # those of one width beside one another: their attention is one call
        widths = [round_up(len(sequence), self.rows) for sequence in sequences]
        order = sorted(range(len(sequences)), key=widths.__getitem__)
        while order:
            total = itertools.accumulate(widths[index] for index in order)
            count = max(1, sum(1 for tokens in total if tokens <= PREFILL_TOKENS))
            batch, order = order[:count], order[count:]
            kv, logits = self.prefill([sequences[index] for index in batch])
            yield from zip(batch, kv, logits, strict=True)

    @torch.inference_mode()
    def prefill(
        self, sequences: Sequence[NDArray[np.int64]]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Read whole sequences in one pass; those of one width, which is their length rounded up to
        `rows`, stand together.

        Returns each one's keys and values [layers, 2, kv heads, its width, head dim] (what lies
        beyond its length is finite and meaningless), and the logits after the last tokens, float32
        [sequences, vocab].
        """
        # one after another, each padded to its width: products know no sequences
        a = self.architecture
        n, lengths = len(sequences), np.array([len(sequence) for sequence in sequences])
        widths = np.array([round_up(length, self.rows) for length in lengths.tolist()])
        starts = np.cumsum(widths) - widths
        tokens = np.zeros(int(widths.sum()), dtype=np.int64)
        for start, sequence in zip(starts, sequences, strict=True):
            tokens[start : start + len(sequence)] = sequence
        positions = torch.cat([torch.arange(width, device=self.device) for width in widths])
        cos, sin = self._rotation(positions)
        # Attention runs over those of one width: blocks of it, and with them the rounding, depend
        # on the padded length from about 200 tokens on.
        runs = [(len(list(run)), width) for width, run in itertools.groupby(widths.tolist())]
        shapes = [(a.layers, 2, count, a.kv_heads, width, a.head_dim) for count, width in runs]
        caches = [torch.empty(s, device=self.device, dtype=self.cached) for s in shapes]
        # all of them through each layer: its weights are read once
        x = F.embedding(torch.from_numpy(tokens).to(self.device), self._embedding)
        for number, layer in enumerate(self._layers):
            qkv = self._rotated(self._qkv(layer, x), cos, sin)
            attended = [
                self._causal(part.unflatten(0, run), kv[number])
                for part, run, kv in zip(
                    qkv.split([count * width for count, width in runs]), runs, caches, strict=True
                )
            ]
            x = self._rest(layer, x, torch.cat(attended))
        # what follows the last tokens, and nothing else, through the head
        last = x[torch.from_numpy(starts + lengths - 1).to(self.device)]
        logits = self._logits(F.pad(last, (0, 0, 0, round_up(n, self.rows) - n)))[:n]
        return [kv for cache in caches for kv in cache.unbind(2)], logits

    def _causal(self, qkv: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
        """Attention within n sequences of one width, qkv [n, width, heads + 2 kv heads, head dim],
        as [n * width, heads * head dim]. `cached` [2, n, kv heads, width, head dim] takes keys and
        values.
        """
        a = self.architecture
        qkv = qkv.transpose(1, 2)
        cached.copy_(qkv[:, a.heads :].unflatten(1, (2, a.kv_heads)).transpose(0, 1))
        key, value = cached
        attended = F.scaled_dot_product_attention(
            qkv[:, : a.heads], key, value, is_causal=True, enable_gqa=True
        )
        return attended.transpose(1, 2).reshape(-1, a.heads * a.head_dim)

    @torch.inference_mode()
    def step(
        self, tokens: torch.Tensor, positions: torch.Tensor, cache: Cache, keys: Sequence[int]
    ) -> torch.Tensor:
        """One token for each of the cache's first n rows (n a multiple of `rows`): tokens and
        positions, int64 [n].

        `keys` has, for every CHUNK rows, the number of cache entries that the longest of them uses,
        this token included. Returns the logits after those tokens, float32 [n, vocab], which the
        next step may overwrite.
        """
        attend = self._attention(positions, cache, keys)
        x = F.embedding(tokens, self._embedding)
        for layer, cached in zip(self._layers, cache.layers, strict=True):
            x = self._rest(layer, x, attend(self._qkv(layer, x), cached))
        return self._logits(x, cache.room(len(x)))

    def _attention(
        self, positions: torch.Tensor, cache: Cache, keys: Sequence[int]
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """A step's attention: of (qkv [n, heads + 2 kv heads, head dim], not rotated yet, a layer's
        cache, which takes keys and values) it makes [n, heads * head dim].
        """
        a = self.architecture
        cos, sin = self._rotation(positions)
        if loops := loops_for(cache.layers[0]):
            return loops.attention(positions, cos, sin, a.heads)
        n = len(positions)
        entries = cache.entries(torch.arange(n, device=self.device), positions)
        blocks = [(block, k, self._mask(positions[block], k)) for block, k in _blocks(n, keys)]

        def attend(qkv: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
            qkv = self._rotated(qkv, cos, sin)
            cached.view(-1, a.head_dim).index_copy_(
                0, entries, qkv[:, a.heads :].reshape(-1, a.head_dim)
            )
            q = qkv[:, : a.heads] * a.head_dim**-0.5
            return torch.cat(
                [_attend(q[block], cached[:, block, :, :k], mask) for block, k, mask in blocks]
            )

        return attend

    def _mask(self, positions: torch.Tensor, keys: int) -> torch.Tensor:
        """The mask that attention adds to its scores, [n, 1, keys]: 0 up to each row's position,
        -inf beyond.
        """
        beyond = torch.arange(keys, device=self.device) > positions[:, None]
        mask = torch.zeros(beyond.shape, device=self.device, dtype=self.cached)
        return mask.masked_fill_(beyond, float("-inf"))[:, None]

    def _qkv(self, layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values of x [..., hidden]: [..., heads + 2 kv heads, head dim]."""
        a = self.architecture
        qkv = layer.qkv(self._rms(x, layer.input_norm), layer.qkv_bias)
        qkv = qkv.unflatten(-1, (a.heads + 2 * a.kv_heads, a.head_dim))
        if layer.q_norm is not None and layer.k_norm is not None:
            qk = qkv[..., : a.heads + a.kv_heads, :]
            q, k = qk.split([a.heads, a.kv_heads], -2)
            qk.copy_(torch.cat((self._rms(q, layer.q_norm), self._rms(k, layer.k_norm)), -2))
        return qkv

    def _rotated(self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The same with queries and keys rotated, in the cache's dtype."""
        a = self.architecture
        qk = qkv[..., : a.heads + a.kv_heads, :]
        first, second = qk.chunk(2, -1)
        torch.addcmul(qk * cos, torch.cat((-second, first), -1), sin, out=qk)
        return qkv.to(self.cached)

    def _rest(self, layer: _Layer, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The rest of a layer after attention: output projection, residual, SwiGLU, residual."""
        x = layer.o(attended.to(x.dtype)).add_(x)
        normed = self._rms(x, layer.post_norm)
        if layer.router is None:
            return _swiglu(normed, layer.gate_up[0], layer.down[0]).add_(x)
        return self._experts(layer, normed.flatten(0, -2), layer.router).view_as(x).add_(x)

    def _experts(self, layer: _Layer, x: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
        """The chosen experts' outputs for x [n, hidden], by their probabilities; an expert's rows
        in multiples of `rows`.

        Experts are added in their order, so that a row's sum does not depend on which others chose
        them.
        """
        experts = self.architecture.experts
        assert experts is not None
        probabilities = torch.softmax(F.linear(x.float(), router.float()), -1)
        weights, chosen = probabilities.topk(experts.per_token, -1)
        if experts.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        scale = torch.zeros_like(probabilities).scatter_(-1, chosen, weights).to(x.dtype)
        total = torch.zeros_like(x)
        for expert, (gate_up, down) in enumerate(zip(layer.gate_up, layer.down, strict=True)):
            rows = (chosen == expert).any(-1).nonzero()[:, 0]
            if n := len(rows):
                padded = F.pad(x[rows], (0, 0, 0, round_up(n, self.rows) - n))
                total[rows] += _swiglu(padded, gate_up, down)[:n] * scale[rows, expert, None]
        return total

    def _rms(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        eps = self.architecture.norm_eps
        if loops := loops_for(x, weight):
            return loops.rms_norm(x, weight, eps)
        return F.rms_norm(x, weight.shape, weight, eps)

    def _logits(self, x: torch.Tensor, room: torch.Tensor | None = None) -> torch.Tensor:
        widened = torch.float32 if self._head_form.summed else self.dtype
        with float32_sums(widened):
            return self._head.head(self._rms(x, self._norm), room)

    def _rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [n, 1, head dim] for `positions` [n]."""
        angles = positions[:, None, None] * self._inverse_frequencies
        factor = self.architecture.rotary.attention_factor
        cos, sin = angles.cos() * factor, angles.sin() * factor
        return torch.cat((cos, cos), -1).to(self.dtype), torch.cat((sin, sin), -1).to(self.dtype)


def _swiglu(x: torch.Tensor, gate_up: Product, down: Product) -> torch.Tensor:
    both = gate_up(x)
    if loops := loops_for(both):
        return down(loops.swiglu(both))
    gate, up = both.chunk(2, -1)
    return down(F.silu(gate).mul_(up))


def _blocks(rows: int, keys: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Runs of chunks that need equally many keys, rounded up, as (rows, keys): one product serves
    them all.
    """
    first = 0
    for length, chunks in itertools.groupby(round_up(k, KEYS) for k in keys):
        last = min(first + CHUNK * len(list(chunks)), rows)
        yield slice(first, last), length
        first = last


def _attend(q: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One scaled query a head, q [n, heads, head dim], over kv [2, n, kv heads, keys, head dim]:
    [n, heads * head dim].

    In float32 by two batched products: for single queries they take two thirds of the time of
    scaled_dot_product_attention on CPU (AVX2). In bfloat16 they take two to seven times it (AMX).
    """
    n, heads, width = q.shape
    if q.dtype == torch.bfloat16:
        return _attend_bfloat16(q, kv, mask)
    key, value = kv.flatten(1, 2)  # [n * kv heads, keys, head dim], views of the cache
    # The queries that share a key head stand as its query rows: no repeated keys.
    scores = torch.bmm(q.reshape(len(key), -1, width), key.transpose(1, 2))
    scores.view(n, heads, -1).add_(mask)
    probabilities = torch.softmax(scores, -1)
    attended = torch.bmm(probabilities[..., :SUMMED], value[:, :SUMMED])
    for first in range(SUMMED, value.shape[1], SUMMED):
        attended += torch.bmm(
            probabilities[..., first : first + SUMMED], value[:, first : first + SUMMED]
        )
    return attended.view(n, heads * width)


def _attend_bfloat16(q: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`_attend` in bfloat16, by torch's own attention."""
    n, heads, width = q.shape
    groups = kv.shape[2]
    # many queries that share a key head are its query rows; a few are faster one by one
    together = heads // groups > ALONE
    queries = q.view(n, groups, -1, width) if together else q[:, :, None]
    attended = F.scaled_dot_product_attention(
        queries, kv[0], kv[1], attn_mask=mask[:, :, None], scale=1.0, enable_gqa=not together
    )
    return attended.reshape(n, heads * width)
