#!/usr/bin/env bash
# math-verify holds R and r for one variable, in golds and answers alike.
#
# math-verify 0.9.0, latex2sympy2-extended 1.11.0, Python 3.11.
# One would think: mathematics tells capitals from small letters; \pi R^2 and \pi r^2 speak of two circles.
# Found: latex2sympy's ConversionConfig has lowercase_symbols=True by default, and math-verify does not set it.
#   $\pi R^2$ parses to pi*r**2; $R - r$ parses to 0 after doit()
#   verify($\pi R^2$, $\pi r^2$): True; verify($R - r$, $0$): True
# So a formula in R and r is graded as one in r alone.
set -euo pipefail
python=${PYTHON:-python3.11}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
venv/bin/python -m pip install --quiet math-verify==0.9.0 latex2sympy2-extended==1.11.0 antlr4-python3-runtime==4.13.2 sympy==1.14.0
venv/bin/python - <<'PYTHON'
from math_verify import parse, verify

radius, difference = parse(r"$\pi R^2$"), parse(r"$R - r$")
print(radius[0], difference[0], "| doit:", difference[0].doit())
same, zero = verify(radius, parse(r"$\pi r^2$")), verify(difference, parse("$0$"))
print(r"verify(\pi R^2, \pi r^2):", same, "| verify(R - r, 0):", zero)
assert same and zero and not verify(parse("$R$"), parse("$s$"))
PYTHON
