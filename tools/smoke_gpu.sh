#!/usr/bin/env bash
# On one card, in under 8 minutes, everything that a card can prove: a policy step's speed, buckets by CUDA handle, the
# tests that need a card, the kernels beside other heads. Ends with an error where one of these fails.
#   bash tools/smoke_gpu.sh             an NVIDIA card that nothing else uses
#   bash tools/smoke_gpu.sh --cpu       all of it that starts without one, tiny: the figures mean nothing
#   PYTHON=/path/to/python              another interpreter than .venv's
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
mode=${1:-}
case "$mode" in
    "") kernels=(--seconds 120) ;;
    --cpu) kernels=(--device cpu --quick) ;;
    *) echo "smoke_gpu: unknown option $mode (--cpu)" >&2; exit 2 ;;
esac

unset PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF # memory in expandable segments cannot be shared by CUDA IPC

part() { printf '\n-- %s\n' "$1"; }

part "versions"
if [ -z "$mode" ]; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
fi
"$python" -m pip list 2>/dev/null | grep -iE '^(torch|triton|megatron-core|transformer[-_]engine|flash[-_]attn|apex|transformers) ' || true

part "a policy step, and buckets by CUDA handle"
"$python" tools/smoke_gpu.py $mode

part "the tests that need a card"
"$python" -m pytest tests/gpu -q -rs

part "the head's kernels"
"$python" tools/bench/heads.py "${kernels[@]}"
