"""A Triton kernel that does next to nothing: whether it compiles tells whether Triton's compiler
works here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_one(x, n):
    """x += 1 in the first 64 places of `x` [n]."""
    at = tl.arange(0, 64)
    tl.store(x + at, tl.load(x + at, at < n) + 1, at < n)
