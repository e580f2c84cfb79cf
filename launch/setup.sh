#!/usr/bin/env bash
# Makes .venv with the versions of launch/constraints.txt; does nothing when it is there and up to date.
#   PYTHON=python3.12 bash launch/setup.sh        choose the interpreter (3.11 or 3.12)
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/python.sh

python=$(find_python)
wanted=$({ "$python" --version; cat pyproject.toml launch/constraints.txt; } | sha256sum | cut -d' ' -f1)
if [ "$(cat .venv/.complete 2>/dev/null || true)" = "$wanted" ]; then
    exit 0
fi

echo "setup: installing into .venv (about two minutes; later runs skip this)"
"$python" -c 'import venv' 2>/dev/null || { echo "setup: $python has no venv module; on Debian: apt install python3-venv" >&2; exit 1; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
rm -f .venv/.complete
export PYTHONWARNINGS=ignore # setuptools explains editable installs at length
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --quiet --constraint launch/constraints.txt --editable '.[dev]'
echo "$wanted" > .venv/.complete
