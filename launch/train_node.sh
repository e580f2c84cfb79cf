#!/usr/bin/env bash
# One run on this machine's GPUs, engines on the same GPUs or (rollout.placement: apart) on the last of them.
#
#   bash launch/train_node.sh examples/paper_7b.yaml model.path=/models/R1-7B [section.key=value ...]
#   bash launch/train_node.sh examples/paper_7b.yaml --dry-run      placement, commands, environment; starts nothing
#   GPUS=4 bash launch/train_node.sh ...                            another number of GPUs than 8
#
# Resumes what is in the run folder. SIGTERM or SIGUSR1 to this process ends the run after its iteration, saved, with
# exit code 75.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { sed -n '2,9p' "$0"; exit 2; }
exec "${PYTHON:-.venv/bin/python}" -m megatron_efr.cluster "$@" --hosts 127.0.0.1 --host 127.0.0.1 --gpus "${GPUS:-8}"
