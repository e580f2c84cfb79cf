"""Products with the embedded engine's weights: what they equal, in every form, and what a row does
not depend on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_efr.bfloat16_products import summed_in_float32
from megatron_efr.planning.embedded import weight_bytes
from megatron_efr.rollout.local import products
from megatron_efr.rollout.local.products import PACKED_WIDTH, Form, Product
from megatron_efr.weights.architecture import Architecture
from tests.families import make_family_folder

pytestmark = pytest.mark.alike
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
        product.clear()
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
    product.clear()
    product.fill(0, given)
    given.zero_()
    assert product(torch.ones(8, 16, dtype=dtype)).eq(16).all()


@pytest.mark.parametrize(("hidden", "dtype"), FORMS)
def test_what_a_broken_publication_filled_in_is_not_used(hidden: int, dtype: torch.dtype) -> None:
    product = Product(Form(hidden, CPU, dtype), [8, 8, 8], 16)
    old, new = torch.zeros(8, 16), torch.ones(8, 16)
    for values, parts in ((old, (0, 1)), (new, (2, 1, 0))):  # the second comes in another order
        product.clear()
        for part in parts:
            product.fill(part, values)
    assert product(torch.ones(8, 16, dtype=dtype)).eq(16).all()


@pytest.mark.parametrize("processor", ["this", "one without AMX", "one without AVX-512 either"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_heads_results_are_float32_and_rounded_by_their_sums_alone(
    dtype: torch.dtype, processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if processor != "this":
        monkeypatch.setattr(products, "summed_in_float32", lambda: False)
    if processor == "one without AVX-512 either":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1001, 300, generator=generator).to(dtype)
    x = torch.randn(16, 300, generator=generator).to(dtype)
    exact, terms = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    for filled in (False, True):  # a head of its own, and an embedding
        form = Form(300, CPU, dtype, head=True)
        head = Product(form, [1001], 300)
        head.clear()
        if filled:
            head.fill(0, weight)
        else:
            head.take(weight)
        for room in (None, torch.empty(16, 1001)):
            found = head.head(x, room)
            assert found.dtype == torch.float32
            assert ((found - exact).abs() <= 1e-6 * terms).all()
            if room is not None and form.packed is None:
                assert found.data_ptr() == room.data_ptr()


@pytest.mark.skipif(not summed_in_float32(), reason="a processor without AMX widens the head")
def test_a_bfloat16_head_that_is_the_embedding_takes_no_memory_of_its_own() -> None:
    embedding = torch.randn(64, 16).bfloat16()
    head = Product(Form(16, CPU, torch.bfloat16, head=True), [64], 16)
    head.take(embedding)
    embedding.zero_()  # nobody does; what the head reads is this very memory
    assert head.head(torch.ones(8, 16).bfloat16()).eq(0).all()


@pytest.mark.skipif(
    not summed_in_float32(), reason="promised of float32 models alone, and found to hold with AMX"
)
@pytest.mark.parametrize(("columns", "rows"), [(576, 49152), (896, 20000), (64, 61), (300, 1001)])
def test_a_row_of_a_bfloat16_models_logits_does_not_depend_on_how_many_share_the_head(
    columns: int, rows: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    head = Product(Form(columns, CPU, torch.bfloat16, head=True), [rows], columns)
    head.take(torch.randn(rows, columns, generator=generator).bfloat16())
    x = torch.randn(128, columns, generator=generator).bfloat16()
    whole = head.head(x)
    for count in (8, 16, 24, 64, 96):
        assert torch.equal(head.head(x[8 : 8 + count]), whole[8 : 8 + count])


@pytest.mark.parametrize(("columns", "rows"), REAL)
def test_a_row_does_not_depend_on_how_many_share_its_product(columns: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    form = Form(columns, CPU, torch.float32)
    product = Product(form, [rows], columns)
    product.clear()
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


_PUBLISHED = """
import sys
from megatron_efr.rollout.local.engine import LocalEngine
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import FolderWeights

def peak():  # of this program alone: ru_maxrss has what its parent held when it was started
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before, folder = peak(), sys.argv[1]
architecture = Architecture.from_folder(folder)
LocalEngine(architecture, 8).publish(FolderWeights(folder, architecture).items(), 0)
print((peak() - before) * 2**10)
"""


@pytest.mark.heavy
def test_publication_holds_little_more_than_the_engines_weights(tmp_path: Path) -> None:
    """Of a model of 0.4 GB, a third of it its tied embedding, which packing doubles."""
    folder = make_family_folder(
        tmp_path, "qwen2", vocab_size=40_000, hidden_size=896, intermediate_size=4864,
        num_hidden_layers=4, num_attention_heads=14, initializer_range=0.02,
    )  # fmt: skip
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", _PUBLISHED, str(folder)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, held = float(done.stdout), weight_bytes(Architecture.from_folder(folder), "float32")
    print(f"{peak / weights:.2f} times the weights at its peak, {held / weights:.2f} held")
    assert held <= 1.5 * weights
    assert peak <= 1.6 * weights
