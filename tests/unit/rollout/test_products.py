"""Products with the embedded engine's weights: what they equal, in every form, and what a row does
not depend on.
"""

from __future__ import annotations

import pytest
import torch

from megatron_efr.rollout.local.products import PACKED_WIDTH, Form, Product

CPU = torch.device("cpu")
FORMS = [(64, torch.float32), (PACKED_WIDTH, torch.float32), (64, torch.bfloat16)]
# columns and rows of weights of SmolLM2-135M, Qwen2.5-0.5B and Qwen2.5-1.5B, and odd ones
REAL = [(576, 960), (576, 3072), (1536, 576), (896, 9728), (4864, 896), (1536, 2048), (300, 1001)]


@pytest.mark.parametrize(("hidden", "dtype"), FORMS)
def test_a_product_of_parts_is_that_of_their_stack_and_its_bias(
    hidden: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    product = Product(Form(hidden, CPU, dtype), [48, 16, 7], 40)
    for _ in range(2):  # a second publication replaces the first
        parts = [drawn(rows, 40) for rows in (48, 16, 7)]
        for number in (2, 0, 1):
            product.fill(number, parts[number])
        x, bias = drawn(3, 24, 40), drawn(71)
        exact = x.double() @ torch.cat(parts).double().T
        for found, wanted in ((product(x), exact), (product(x, bias), exact + bias.double())):
            assert found.dtype == dtype
            # float32's sums, by the size of their terms, and the result's own rounding
            limit = 1e-6 * (x.double().abs() @ torch.cat(parts).double().abs().T)
            limit += wanted.abs() * (2**-8 if dtype == torch.bfloat16 else 0)
            assert ((found.double() - wanted).abs() <= limit).all()


@pytest.mark.parametrize(("hidden", "dtype"), FORMS)
def test_what_was_filled_in_may_change_afterwards(hidden: int, dtype: torch.dtype) -> None:
    given = torch.ones(8, 16)
    product = Product(Form(hidden, CPU, dtype), [8], 16)
    product.fill(0, given)
    given.zero_()
    assert product(torch.ones(8, 16, dtype=dtype)).eq(16).all()


@pytest.mark.parametrize(("columns", "rows"), REAL)
def test_a_row_does_not_depend_on_how_many_share_its_product(columns: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    form = Form(columns, CPU, torch.float32)
    product = Product(form, [rows], columns)
    product.fill(0, torch.randn(rows, columns, generator=generator))
    x, bias = torch.randn(2048, columns, generator=generator), torch.randn(rows)
    whole = product(x, bias)
    for count in (1, 2, 3, 5, 9, 17, 32, 64, 125, 192):
        taken = slice(3 * form.rows, (3 + count) * form.rows)
        assert torch.equal(product(x[taken].contiguous(), bias), whole[taken])
    # prompts of one width, side by side
    assert torch.equal(product(x.view(16, 128, columns), bias).view(2048, rows), whole)


def test_only_wide_models_are_packed_in_float32_and_only_on_a_cpu() -> None:
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        pytest.skip("float32 is packed on processors with AVX2 alone")
    assert Form(PACKED_WIDTH, CPU, torch.float32).packed == torch.float32
    assert Form(PACKED_WIDTH - 1, CPU, torch.float32).packed is None
    assert Form(PACKED_WIDTH, torch.device("cuda"), torch.float32).packed is None
    assert Form(PACKED_WIDTH, torch.device("cuda"), torch.bfloat16).packed is None
