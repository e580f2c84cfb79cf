#!/usr/bin/env bash
# From nothing to a family of models that think less, on the CPU: 5 to 9 minutes on 2 cores after installation.
#
#   bash launch/quickstart.sh             one seed; results in runs/quickstart
#   bash launch/quickstart.sh --seeds 3   three seeds, one after the other; figures of all in runs/quickstart
#   bash launch/quickstart.sh --engine sglang     rollouts and evaluations from real SGLang servers, one for each run;
#                                         results in runs/quickstart-sglang, one seed's compared with runs/quickstart
# Results of an earlier run in that folder are removed first.
#
# 1. write an arithmetic task and a tiny model with random weights    2. teach it wordy chains of thought (efr sft)
# 3. train one model per alpha, side by side (efr sweep)              4. evaluate all on held-out problems, and report
set -euo pipefail
cd "$(dirname "$0")/.."

seeds=1
engine=local
while [ $# -gt 0 ]; do
    case "$1" in
        --seeds) seeds=${2:?--seeds takes a number}; shift 2 ;;
        --engine) engine=${2:?--engine takes local or sglang}; shift 2 ;;
        *) sed -n '2,11p' "$0"; exit 2 ;;
    esac
done

bash launch/setup.sh
[ "$engine" = local ] || bash tools/setup_sglang_cpu.sh
cores=$(env -u OMP_NUM_THREADS nproc) # nproc would answer with OMP_NUM_THREADS where that is set
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
ranks=$((cores < 2 ? 1 : 2))
# three trainings keep two cores busy to the end; with a server of SGLang for each there are two at a time
jobs=$ranks
[ "$engine" != local ] || [ "$cores" -lt 2 ] || jobs=3
efr=.venv/bin/efr
torchrun() { .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node="$ranks" "$@"; }
note="A model of 0.15 million parameters on a toy task (sums of one-digit numbers), trained on CPU in minutes: it shows \
the method at work, and says nothing about the size of the effect on a real reasoning model."

one_seed() { # folder under runs/, seed
    local name=$1 seed=$2 task="runs/$1/task" began=$SECONDS
    .venv/bin/python -m megatron_efr.data.arithmetic --out "$task" --seed "$seed"
    echo "== supervised warm start (seed $seed)"
    torchrun -m megatron_efr.sft examples/quickstart/sft.yaml name="$name/sft" seed="$seed" \
        model.path="$task/model" data.path="$task/sft.jsonl"
    local sft_seconds=$((SECONDS - began))
    echo "== reinforcement learning: one model per alpha (seed $seed)"
    "$efr" sweep examples/quickstart/rl.yaml name="$name" seed="$seed" model.path="runs/$name/sft/model" \
        rollout.engine="$engine" \
        "data.datasets=[{path: $task/train.jsonl, difficulty: difficulty}]" \
        "evaluation.datasets=[{path: $task/test.jsonl, difficulty: difficulty}]" \
        --alphas 0,0.1,0.4 --jobs "$jobs" --seconds "sft=$sft_seconds" --note "$note"
}

family=quickstart
[ "$engine" = local ] || family="quickstart-$engine"
rm -rf "runs/$family"
if [ "$seeds" -eq 1 ]; then
    one_seed "$family" 1
    "$efr" report "runs/$family"
    if [ "$engine" != local ] && [ -e runs/quickstart/summary.json ]; then
        "$efr" report "runs/$family" --against runs/quickstart
    fi
else
    for seed in $(seq "$seeds"); do one_seed "$family/seed-$seed" "$seed"; done
    "$efr" report --seeds "runs/$family"
fi
