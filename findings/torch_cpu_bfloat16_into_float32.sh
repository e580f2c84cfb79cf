#!/usr/bin/env bash
# torch has no product of bfloat16 matrices with a float32 result on a CPU; the MKL inside its wheel has one, for all to call.
#
# torch 2.13.0, x86-64, CPU.
# One would think: mm(out_dtype=torch.float32), which CUDA has, works on a CPU too, or else nothing in the wheel does it, and what
# is linked into it cannot be seen from outside.
# Found: mm raises, and ctypes finds CBLAS's function in the libraries behind torch._C, with float32 sums:
#   torch.mm: NotImplementedError
#   torch, rounded to bfloat16: off by more than 1e-4 of the terms' size: True
#   cblas_gemm_bf16bf16f32: off by less than 1e-6 of the terms' size: True
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 numpy==2.4.6
cat > product.py <<'PYTHON'
import ctypes

import torch

a, b = (torch.randn(s, generator=torch.Generator().manual_seed(0)).bfloat16() for s in ((64, 576), (576, 2000)))
exact = a.double() @ b.double()
terms = (a.double().abs() @ b.double().abs()).mean()
try:
    torch.mm(a, b, out_dtype=torch.float32)
    print("torch.mm: works")
except Exception as error:
    print(f"torch.mm: {type(error).__name__}")
rounded = ((a @ b).double() - exact).abs().max() / terms
print("torch, rounded to bfloat16: off by more than 1e-4 of the terms' size:", bool(rounded > 1e-4))
product = ctypes.CDLL(torch._C.__file__).cblas_gemm_bf16bf16f32
number, real, address = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
product.argtypes = [*[number] * 6, real, address, number, address, number, real, address, number]
out = torch.empty(64, 2000)
# row-major, neither transposed
product(101, 111, 111, 64, 2000, 576, 1.0, a.data_ptr(), 576, b.data_ptr(), 2000, 0.0, out.data_ptr(), 2000)
off = (out.double() - exact).abs().max() / terms
print("cblas_gemm_bf16bf16f32: off by less than 1e-6 of the terms' size:", bool(off < 1e-6))
PYTHON
OMP_NUM_THREADS=1 venv/bin/python product.py 2>/dev/null | tee seen
diff seen - <<'SEEN'
torch.mm: NotImplementedError
torch, rounded to bfloat16: off by more than 1e-4 of the terms' size: True
cblas_gemm_bf16bf16f32: off by less than 1e-6 of the terms' size: True
SEEN
