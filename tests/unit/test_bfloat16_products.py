"""Float32 products of bfloat16 values: as exact as float32's own, and the process's setting put
back.
"""

from __future__ import annotations

import threading

import pytest
import torch

from megatron_efr.bfloat16_products import (
    float32_sums,
    multiplied,
    product_into,
    summed_in_float32,
)

sums = pytest.mark.skipif(
    not summed_in_float32(), reason="no AMX, or a torch without MKL, which has that product"
)


def setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()


@pytest.mark.parametrize(("rows", "columns", "inner"), [(64, 2048, 576), (2048, 576, 1102)])
def test_products_of_bfloat16_values_are_off_by_float32s_sums_alone(
    rows: int, columns: int, inner: int
) -> None:
    a, b = drawn(rows, inner).float(), drawn(inner, columns).float()
    exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    with float32_sums(torch.bfloat16):
        found = a @ b
        added = torch.ones(rows, columns).addmm_(a, b)
    assert ((found - exact).abs() <= 1e-6 * terms).all()
    assert ((added - exact - 1).abs() <= 1e-6 * (terms + 1)).all()


def test_other_values_lose_a_bfloat16s_rounding_at_most_and_none_if_they_are_float32s() -> None:
    a, b = drawn(64, 576).float() * (1 + 2**-12), drawn(576, 256).float()
    exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    with float32_sums(torch.bfloat16):
        off = ((a @ b - exact).abs() / terms).max()
    assert off <= (2**-7 if multiplied() else 1e-6)
    with float32_sums(torch.float32):
        assert ((a @ b - exact).abs() <= 1e-6 * terms).all()


@pytest.mark.skipif(not multiplied(), reason="this processor does not multiply bfloat16")
def test_the_setting_lasts_while_any_thread_is_inside_and_is_put_back() -> None:
    before, entered, leave = setting(), threading.Event(), threading.Event()

    def other() -> None:
        with float32_sums(torch.bfloat16):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with float32_sums(torch.bfloat16):
        thread.start()
        entered.wait()
        with float32_sums(torch.bfloat16):
            assert setting() == "bf16"
    assert setting() == "bf16"
    leave.set()
    thread.join()
    assert setting() == before
    with pytest.raises(ZeroDivisionError), float32_sums(torch.bfloat16):
        raise ZeroDivisionError
    assert setting() == before


@sums
@pytest.mark.parametrize("a_turned", [False, True])
@pytest.mark.parametrize("b_turned", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "inner"),
    [(64, 2000, 576), (2000, 576, 65), (1, 7, 3), (8, 1, 1), (3, 5, 0)],
)
def test_a_product_into_float32_is_off_by_its_sums_alone_however_its_operands_lie(
    rows: int, columns: int, inner: int, a_turned: bool, b_turned: bool
) -> None:
    # each a part of a longer one, with gaps
    a = drawn(inner, rows + 3)[:, :rows].t() if a_turned else drawn(rows, inner + 3)[:, :inner]
    b = drawn(columns, inner + 5)[:, :inner].t() if b_turned else drawn(inner, columns)
    exact, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    whole = torch.full((rows, columns + 9), 7.0)
    out = whole[:, 4 : 4 + columns]
    product_into(out, a, b)
    assert ((out - exact).abs() <= 1e-6 * terms).all()
    product_into(out, a, b, beta=1.0)
    assert ((out - 2 * exact).abs() <= 2e-6 * terms).all()
    out.fill_(7.0)
    assert whole.eq(7).all(), "nothing beside it is written"


@sums
def test_a_product_of_what_mkl_would_misread_is_refused() -> None:
    a, b, out = drawn(4, 6), drawn(6, 5), torch.zeros(4, 5)
    for wrong in (
        (out, a, drawn(5, 6)),
        (out.bfloat16(), a, b),
        (out, a.float(), b),
        (out[:3], a, b),
        (torch.zeros(5, 4).t(), a, b),
        (out, a[:1].expand(4, 6), b),
        (out, drawn(4, 12)[:, ::2], b),
        (torch.zeros(4, 10)[:, ::2], a, b),
        (torch.zeros(1, 10)[:, ::2], a[:1], b),
        (torch.zeros(5).expand(4, 5), a, b),
    ):
        with pytest.raises(ValueError, match=r"@|gaps"):
            product_into(*wrong)


@sums
def test_strides_of_dimensions_of_one_element_or_none_mean_nothing() -> None:
    row, column = drawn(1, 5), drawn(5, 1)
    for a in (row, row.as_strided((1, 5), (0, 1)), row.as_strided((1, 5), (99, 1))):
        for b in (column, column.as_strided((5, 1), (1, 0)), column.as_strided((5, 1), (1, 77))):
            out = torch.zeros(9)
            product_into(out.as_strided((1, 1), (3, 4)), a, b)
            assert out[0] == pytest.approx(float(row.float() @ column.float()), rel=1e-6)
            assert out[1:].eq(0).all()
    column_out = torch.zeros(4, 3)
    product_into(column_out[:, 1:2], drawn(4, 5), column)
    exact = drawn(4, 5).double() @ column.double()
    assert ((column_out[:, 1:2] - exact).abs() <= 1e-5).all()
    assert column_out[:, 0::2].eq(0).all()
    # nothing is summed: what was there goes, or stays
    out = torch.full((4, 6), 7.0)
    product_into(out, drawn(4, 1).as_strided((4, 0), (0, 1)), drawn(1, 6)[:0], beta=1.0)
    assert out.eq(7).all()
    product_into(out, drawn(4, 1).as_strided((4, 0), (0, 1)), drawn(1, 6)[:0])
    assert out.eq(0).all()
    product_into(torch.empty(0, 6), drawn(0, 5), drawn(5, 6))
