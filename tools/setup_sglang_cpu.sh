#!/usr/bin/env bash
# Makes .venv-sglang: SGLang with the versions of launch/sglang-cpu.txt, for machines without a GPU (about 75 s, 2 GB).
# Does nothing when it is there and up to date.
#   PYTHON=python3.12 bash tools/setup_sglang_cpu.sh        choose the interpreter (3.11, 3.12 or 3.13)
#
# Nothing is compiled. SGLang's own requirements name CUDA packages only, so the list is complete and is installed as it
# stands; tools/sglang_cpu/ has what remains: three files beside the packages, which let SGLang import and start.
# As for .venv, pip's default PyTorch brings CUDA libraries; PIP_EXTRA_INDEX_URL at PyTorch's CPU index does without.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/python.sh

find_python .venv-sglang
wanted=$({ "$python" --version; cat launch/sglang-cpu.txt tools/sglang_cpu/*.py; } | sha256sum | cut -d' ' -f1)
if [ "$(cat .venv-sglang/.complete 2>/dev/null || true)" = "$wanted" ]; then
    exit 0
fi

echo "setup: $("$python" --version), $python ($why)"
echo "setup: installing SGLang into .venv-sglang (about 75 s; later runs skip this)"
[ -x .venv-sglang/bin/python ] || "$python" -m venv .venv-sglang
rm -f .venv-sglang/.complete
pip() { .venv-sglang/bin/python -m pip --quiet --disable-pip-version-check "$@"; }
pip install --constraint launch/sglang-cpu.txt torch # with what its build needs, be it CUDA's libraries
pip install --no-deps --requirement launch/sglang-cpu.txt
packages=$(.venv-sglang/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp tools/sglang_cpu/*.py "$packages"
echo "import torchvision_schemas, host_memory" > "$packages/sglang_cpu.pth" # run by every start of this interpreter
echo "$wanted" > .venv-sglang/.complete
