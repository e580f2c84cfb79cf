#!/usr/bin/env bash
# Numba's fastmath=True lets LLVM add float32 numbers by whole vectors, and still leaves their maximum to one number at a time.
#
# numba 0.65.1, llvmlite 0.47.0, x86-64 (compiled for Haswell, so that every machine sees the same).
# One would think: a maximum is the easier of the two, since its order matters to no result but nan's and -0's, and fastmath says
# that neither has to be kept.
# Found: of three ways to write it none has a packed maximum, so a softmax's peak is found number by number:
#   sum: packed
#   max by max(): one at a time
#   max by a comparison: one at a time
#   max of NumPy's method: one at a time
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
venv/bin/python -m pip install --quiet numba==0.65.1 llvmlite==0.47.0 numpy==2.4.6
cat > reductions.py <<'PYTHON'
import numpy as np
from numba import float32, njit


def added(x):
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i]
    return total


def by_max(x):
    peak = x[0]
    for i in range(x.shape[0]):
        peak = max(peak, x[i])
    return peak


def by_comparison(x):
    peak = x[0]
    for i in range(x.shape[0]):
        peak = x[i] if x[i] > peak else peak
    return peak


def by_method(x):
    return x.max()


cases = {"sum": added, "max by max()": by_max, "max by a comparison": by_comparison, "max of NumPy's method": by_method}
for name, function in cases.items():
    compiled = njit(float32(float32[::1]), fastmath=True)(function)
    (text,) = compiled.inspect_asm().values()
    operations = {line.split()[0] for line in text.splitlines() if line.strip()}
    packed = operations & ({"vaddps"} if name == "sum" else {"vmaxps", "vcmpps", "vblendvps"})
    alone = operations & {"vaddss", "vmaxss"}
    print(f"{name}: {'packed' if packed else 'one at a time' if alone else 'neither'}")
PYTHON
NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx2,+fma,+avx venv/bin/python reductions.py | tee seen
diff seen - <<'SEEN'
sum: packed
max by max(): one at a time
max by a comparison: one at a time
max of NumPy's method: one at a time
SEEN
