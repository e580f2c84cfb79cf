#!/usr/bin/env bash
# math-verify drops the last variable of a formula where its letter is also a unit of measurement.
#
# math-verify 0.9.0, latex2sympy2-extended 1.11.0, Python 3.11.
# One would think: 1 + 2t in math mode is a formula in t.
# Found: its list of units holds t, h, s, m, g, l, c, d and o; one of them after a digit at the end of the text goes.
#   $1 + 2t$ parses to 3, $2m$ to 2, but $2t + 1$ to 2*t + 1
#   verify($1 + 2t$, $3$): True; verify($1 + 2t$, $2t + 1$): False
# So a wrong answer equals the gold 1 + 2t, and the right one in another order does not.
set -euo pipefail
python=${PYTHON:-python3.11}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
venv/bin/python -m pip install --quiet math-verify==0.9.0 latex2sympy2-extended==1.11.0 antlr4-python3-runtime==4.13.2 sympy==1.14.0
venv/bin/python - <<'PYTHON'
from math_verify import parse, verify

read = {text: parse(f"${text}$")[0] for text in ("1 + 2t", "2t + 1", "2m")}
print({text: str(value) for text, value in read.items()})
wrong, right = verify(read["1 + 2t"], parse("$3$")), verify(read["1 + 2t"], read["2t + 1"])
print("verify(1 + 2t, 3):", wrong, "| verify(1 + 2t, 2t + 1):", right)
assert wrong and not right and not read["1 + 2t"].free_symbols and read["2t + 1"].free_symbols
PYTHON
