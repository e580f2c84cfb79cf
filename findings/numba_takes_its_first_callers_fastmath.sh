#!/usr/bin/env bash
# A Numba function without `fastmath` takes that of the function that calls it first, and keeps it when it is called directly.
#
# numba 0.65.1, llvmlite 0.47.0, numpy 2.4.6, Python 3.11.
# One would think: `fastmath` is an option of the function that it decorates, and False if not given: `@njit` alone keeps the order of operations.
# Found, of the rounding error of 1e16 + 1, which is 1 (each line a process of its own):
#   called directly: 1.0
#   called directly, then by a fast function: 1.0 1.0
#   called by a fast function, then directly: 0.0 0.0
#   the same, with fastmath=False on it: 1.0 1.0
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
venv/bin/python -m pip install --quiet numba==0.65.1 llvmlite==0.47.0 numpy==2.4.6
cat > calls.py <<'PYTHON'
import sys
from typing import Any

from numba import njit


def error(a: float, b: float) -> float:
    """What a + b loses by rounding."""
    total = a + b
    return (a - (total - b)) + (b - (total - (total - b)))


own: dict[str, Any] = {"fastmath": False} if sys.argv[2] == "False" else {}
strict = njit(**own)(error)


@njit(fastmath=True)
def fast(a: float, b: float) -> float:
    return strict(a, b)


calls = {"d": strict, "f": fast}
print(*(calls[each](1e16, 1.0) for each in sys.argv[1]))
PYTHON
{
    echo "called directly: $(venv/bin/python calls.py d none)"
    echo "called directly, then by a fast function: $(venv/bin/python calls.py df none)"
    echo "called by a fast function, then directly: $(venv/bin/python calls.py fd none)"
    echo "the same, with fastmath=False on it: $(venv/bin/python calls.py fd False)"
} | tee seen
diff seen - <<'SEEN'
called directly: 1.0
called directly, then by a fast function: 1.0 1.0
called by a fast function, then directly: 0.0 0.0
the same, with fastmath=False on it: 1.0 1.0
SEEN
