#!/usr/bin/env bash
# math-verify reads y' and y'' as y: derivatives are the function itself.
#
# math-verify 0.9.0, latex2sympy2-extended 1.11.0, Python 3.11.
# One would think: a prime is part of the symbol, or the text does not parse.
# Found: the quotation marks are taken out of the text before it is parsed.
#   $y'' + y = 0$ parses to Eq(y + y, 0)
#   verify($y'' + y = 0$, $y' + y = 0$): True; verify($A'$, $A$): True
set -euo pipefail
python=${PYTHON:-python3.11}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
venv/bin/python -m pip install --quiet math-verify==0.9.0 latex2sympy2-extended==1.11.0 antlr4-python3-runtime==4.13.2 sympy==1.14.0
venv/bin/python - <<'PYTHON'
from math_verify import parse, verify

equation, point = parse("$y'' + y = 0$"), parse("$A'$")
print(equation[0], point[0])
orders, points = verify(equation, parse("$y' + y = 0$")), verify(point, parse("$A$"))
print("verify(y'' + y = 0, y' + y = 0):", orders, "| verify(A', A):", points)
assert orders and points
PYTHON
