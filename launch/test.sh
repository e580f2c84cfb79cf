#!/usr/bin/env bash
# The tests, after making .venv if it is missing.
#
#   bash launch/test.sh            lint, types, unit, loop, parallel, engine and browser tests, and the quickstart's figures
#   bash launch/test.sh --quick    lint, types and the fast unit tests: about six minutes once .venv is there
#   bash launch/test.sh --full     also the tests marked slow, and the quickstart on SGLang's servers beside it
#   bash launch/test.sh --other    unit and parallel tests on the other Megatron-Core: under Python 3.12 or 3.13, if .venv
#                                  has 3.11, and the other way round; made in .venv-other
set -euo pipefail
cd "$(dirname "$0")/.."

mode=${1:-default}
case "$mode" in default | --quick | --full | --other) ;; *) sed -n '2,8p' "$0"; exit 2 ;; esac

bash launch/setup.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
python=.venv/bin/python
[ -z "${EFR_DATA:-}" ] && [ -d ../shared/data ] && EFR_DATA=$(cd ../shared/data && pwd)
export EFR_DATA=${EFR_DATA:-}

stage() { echo; echo "== $*"; began=$SECONDS; }
took() { echo "   ($((SECONDS - began)) s)"; }

if [ "$mode" = --other ]; then
    . launch/python.sh
    case "$(python_version "$python")" in 3.11.*) others=(3.12 3.13) ;; *) others=(3.11) ;; esac
    if ! other=$(search_python "${others[@]}"); then
        echo "no Python ${others[*]} is here: nothing is tested on the Megatron-Core that goes with it"
        exit 0
    fi
    PYTHON=$other bash launch/setup.sh .venv-other
    python=.venv-other/bin/python
    core=$("$python" -c 'from importlib.metadata import version; print(version("megatron-core"))')
    stage "Python $(python_version "$python") and Megatron-Core $core: unit tests"
    $python -m pytest tests/unit -m "not slow and not gpu and not alike" -n 2 --dist loadfile --no-loadscope-reorder
    took
    stage "Megatron-Core $core: several processes over gloo"
    $python -m pytest tests/parallel -m "not slow and not gpu"
    took
    exit 0
fi

stage "style and types"
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
.venv/bin/pyright --pythonpath "$python"
$python tools/words.py --total
took

if [ "$mode" = --quick ]; then
    stage "unit tests, the fast ones"
    $python -m pytest tests/unit -m "not slow and not gpu and not heavy" -n 2 --dist loadfile --no-loadscope-reorder
    took
    exit 0
fi

slow=$([ "$mode" = --full ] && echo "not gpu" || echo "not slow and not gpu")
stage "unit tests"
$python -m pytest tests/unit tests/gpu -m "$slow" -n 2 --dist loadfile --no-loadscope-reorder
took
stage "whole runs: killed, resumed, real input"
$python -m pytest tests/loop -m "$slow" -n 2 --dist loadfile # its two long files first, which have most tests
took
stage "several processes over gloo"
$python -m pytest tests/parallel -m "$slow"
took
stage "real SGLang servers"
bash tools/setup_sglang_cpu.sh
$python -m pytest tests/engine -m "$slow" -n 2 --dist loadfile --no-loadscope-reorder -rs
took
stage "the report in a browser"
$python -m pytest tests/browser -m "$slow" -rs
took
stage "quickstart"
bash launch/quickstart.sh
took
if [ "$mode" = --full ]; then
    stage "quickstart on real SGLang servers"
    bash launch/quickstart.sh --engine sglang
    took
fi
$python -m pytest tests/quickstart -rs
