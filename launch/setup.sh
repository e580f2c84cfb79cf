#!/usr/bin/env bash
# Makes .venv with the versions of launch/constraints.txt; does nothing when it is there and up to date.
#   PYTHON=python3.12 bash launch/setup.sh        choose the interpreter (3.11, 3.12 or 3.13)
#   bash launch/setup.sh .venv-other              another environment; launch/test.sh --other has one
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/python.sh

venv=${1:-.venv}
find_python "$venv"
version=$(python_version "$python")
wanted=$({ echo "Python $version"; cat pyproject.toml launch/constraints.txt; } | sha256sum | cut -d' ' -f1)
if [ "$(cat "$venv/.complete" 2>/dev/null || true)" = "$wanted" ]; then
    exit 0
fi

echo "setup: Python $version, $python ($why)"
case "$version" in
    3.11.*) cost="about 100 s and 2.6 GB with PyTorch's CPU build, 5.7 GB where pip finds none" ;;
    *) cost="about 135 s and 5.7 GB; 2.6 GB with PyTorch's CPU build, if PIP_EXTRA_INDEX_URL is its CPU index" ;;
esac
echo "setup: installing into $venv: $cost (2 cores, packages near; later runs skip this)"
if [ -e "$venv" ] && [ "$(python_version "$venv/bin/python" 2>/dev/null)" != "$version" ]; then
    echo "setup: $venv was made with another Python, and is made anew"
    "$python" -m venv --clear "$venv"
elif [ ! -e "$venv" ]; then
    "$python" -m venv "$venv"
fi
rm -f "$venv/.complete"
export PYTHONWARNINGS=ignore # setuptools explains editable installs at length
pip=("$venv/bin/python" -m pip)
"${pip[@]}" install --quiet --upgrade pip
"${pip[@]}" install --quiet --constraint launch/constraints.txt --editable '.[dev]'
echo "$wanted" > "$venv/.complete"
