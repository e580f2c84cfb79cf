#!/usr/bin/env bash
# SGLang engines on this machine alone, for a trainer elsewhere, which takes them as rollout.urls=[http://HOST:30000,...].
#
#   SGLANG_API_KEY_FILE=~/key HOST=10.0.0.7 bash launch/serve_engines.sh examples/paper_7b.yaml rollout.tp=4 [--dry-run]
#
# The trainer of that configuration:
#   SGLANG_API_KEY=... bash launch/train_node.sh examples/paper_7b.yaml rollout.tp=4 rollout.placement=apart \
#       'rollout.server={}' 'rollout.urls=[http://10.0.0.7:30000,http://10.0.0.7:30001]'
#
# HOST is this machine's address on the private network; a public one is refused. The key comes from the file, or from
# SGLANG_API_KEY; the trainer needs it as SGLANG_API_KEY. It runs until SIGTERM, and leaves no server behind.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { sed -n '2,11p' "$0"; exit 2; }
host=${HOST:?set HOST to this machine\'s address on the private network}
if [ -n "${SGLANG_API_KEY_FILE:-}" ]; then
    SGLANG_API_KEY=$(cat "$SGLANG_API_KEY_FILE")
fi
export SGLANG_API_KEY=${SGLANG_API_KEY:?set it, or SGLANG_API_KEY_FILE: the engines execute what their updates hold}
exec "${PYTHON:-.venv/bin/python}" -m megatron_efr.cluster "$@" \
    rollout.engine=sglang 'rollout.urls=[]' \
    --only-engines --hosts "$host" --host "$host" --gpus "${GPUS:-8}"
