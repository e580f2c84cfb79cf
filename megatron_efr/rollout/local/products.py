"""Products with the embedded engine's weights, in the fastest form that the processor has: packed
for oneDNN once per publication, or as they are.

A row's result must not depend on how many rows share its product. That was found to hold, bit for
bit in float32, of MKL's products (AVX2, AVX-512) in multiples of 32 rows, and of oneDNN's packed
ones (AVX2) in any number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megatron_efr.bfloat16_products import multiplied, product_into, summed_in_float32

MKL_ROWS = 32  # MKL rounds differently for fewer
PACKED_ROWS = 8  # no vector of a column is left half empty
PACKED_WIDTH = 256  # for fewer columns oneDNN's calls take longer than packing spares


class Form:
    """The form of the weights of a model with `hidden` columns: packed as `packed`, or as they are
    if that is None.

    bfloat16 is packed as such if the processor multiplies it (AVX-512). If not, it is packed
    as float32 and results are rounded: torch's own bfloat16 products took six times as
    long as these (AVX2).

    The `head` has float32 results. Its weights are float32 too, unless the processor sums products
    of bfloat16 in float32 (AMX): then they are the model's own, half the memory to read.
    """

    def __init__(
        self, hidden: int, device: torch.device, dtype: torch.dtype, head: bool = False
    ) -> None:
        cpu = device.type == "cpu"
        self.summed = head and cpu and dtype == torch.bfloat16 and summed_in_float32()
        self.device, self.dtype = device, torch.float32 if head and not self.summed else dtype
        self.packed: torch.dtype | None = None
        vectors = torch.backends.cpu.get_cpu_capability()
        if self.summed or not cpu or not vectors.startswith("AVX"):
            return
        dtype = self.dtype
        if dtype == torch.bfloat16:
            self.packed = torch.bfloat16 if multiplied() else torch.float32
        elif vectors == "AVX2" and hidden >= PACKED_WIDTH:
            self.packed = torch.float32

    @property
    def held(self) -> torch.dtype:
        """The dtype of weights, and, of layers, of keys and values: attention works in it too."""
        return self.packed or self.dtype

    @property
    def rows(self) -> int:
        """The multiple in which rows are multiplied; a head takes those of its layers."""
        return PACKED_ROWS if self.packed else MKL_ROWS


class Product:
    """x [..., inputs] @ weight.T, of a weight [sum of `outputs`, inputs] that is filled by parts,
    one for each of `outputs`.
    """

    def __init__(self, form: Form, outputs: Sequence[int], inputs: int) -> None:
        self._form, self._outputs, self._inputs = form, list(outputs), inputs
        self._weight: torch.Tensor | None = None  # packed, if that is the form
        self._missing: set[int] = set()  # parts still to be filled in

    def clear(self) -> None:
        """Have every part filled in anew, before the next product."""
        self._missing = set(range(len(self._outputs)))
        if self._form.packed:
            self._weight = None

    @torch.no_grad()
    def fill(self, part: int, values: torch.Tensor) -> None:
        """Copy a part in. The first since `clear` makes room for all, the last packs them."""
        if self._weight is None:
            size = sum(self._outputs), self._inputs
            self._weight = torch.empty(size, device=self._form.device, dtype=self._form.dtype)
        self._weight.split(self._outputs)[part].copy_(values)
        self._missing.discard(part)
        if not self._missing:
            self.take(self._weight)

    @torch.no_grad()
    def take(self, weight: torch.Tensor) -> None:
        """Use a whole weight: itself, or what packing makes of it."""
        weight, packed = weight.to(self._form.dtype), self._form.packed
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.to(packed)) if packed else weight
        )

    def head(self, x: torch.Tensor, room: torch.Tensor | None = None) -> torch.Tensor:
        """The product of a head: float32 [n, outputs] of x [n, inputs], in `room` unless its weight
        is packed.
        """
        assert self._weight is not None
        form, x = self._form, x.to(self._form.dtype)
        if form.packed:
            return self(x)
        out = x.new_empty(len(x), len(self._weight), dtype=torch.float32) if room is None else room
        if form.summed:
            product_into(out, x, self._weight.t())
        else:
            torch.mm(x, self._weight.t(), out=out)
        return out

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The product, plus `bias` [sum of `outputs`], in x's dtype."""
        assert self._weight is not None
        packed = self._form.packed
        if packed is None:
            return F.linear(x, self._weight, bias)
        wide = None if bias is None else bias.to(packed)
        # the call that torch's compiler puts in place of a linear layer with frozen weights
        product = torch.ops.mkldnn._linear_pointwise(
            x.to(packed), self._weight, wide, "none", [], ""
        )
        return product.to(x.dtype)
