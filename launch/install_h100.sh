#!/usr/bin/env bash
# A CUDA machine's two interpreters: .venv for the trainer, .venv-sglang for the engines (they need different torches).
#
#   bash launch/install_h100.sh                 all of it; an hour or more of compiling if no wheel fits
#   bash launch/install_h100.sh --dry-run       print every command, run none
#   --no-te --no-flash-attn --no-apex --no-sglang      leave a part out; training runs without the first three
#
# If a compiled part fails the rest is installed all the same; it is named at the end, with exit code 1.
# Needs Python 3.12 or 3.13 (3.11: older Megatron-Core and Transformer Engine) with headers, git, and for what is
# compiled nvcc of the CUDA that torch was built with (13.0).
# Every version stands in launch/constraints.txt. `apex` comes from GitHub: on the package index that name belongs
# to another project.
set -euo pipefail
cd "$(dirname "$0")/.."

dry='' te=yes flash_attn=yes apex=yes sglang=yes
for argument in "$@"; do
    case "$argument" in
        --dry-run) dry=yes ;;
        --no-te) te='' ;;
        --no-flash-attn) flash_attn='' ;;
        --no-apex) apex='' ;;
        --no-sglang) sglang='' ;;
        *) sed -n '2,12p' "$0"; exit 2 ;;
    esac
done

run() {
    local word line='+'
    for word in "$@"; do
        case "$word" in *[!A-Za-z0-9_./:=-]*) line+=" ${word@Q}" ;; *) line+=" $word" ;; esac
    done
    echo "$line"
    [ -n "$dry" ] || "$@"
}
pip=(.venv/bin/python -m pip install --constraint launch/constraints.txt)
build=("${pip[@]}" --no-build-isolation --no-cache-dir) # extensions are compiled against the torch that is installed
jobs=${MAX_JOBS:-$(($(nproc) < 16 ? $(nproc) : 16))}  # a compiler takes several GB
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}

failed=()
optional() { # what stands in for it where it fails, then the command
    local otherwise=$1
    shift
    run "$@" || failed+=("$otherwise")
}

run bash launch/setup.sh
run .venv/bin/python -c 'import sys, torch; sys.exit(not torch.version.cuda and "install: torch without CUDA: unset PIP_EXTRA_INDEX_URL, remove .venv, start again")'
if [ -n "$te$flash_attn$apex" ]; then
    run .venv/bin/python -c 'import os, sys; from torch.utils.cpp_extension import CUDA_HOME; sys.exit(not (CUDA_HOME and os.path.exists(CUDA_HOME + "/bin/nvcc")) and "install: no nvcc: install the CUDA toolkit and set CUDA_HOME, or leave out what is compiled (--no-te --no-flash-attn --no-apex)")'
    run "${pip[@]}" ninja packaging wheel setuptools pybind11
fi
if [ -n "$sglang" ]; then
    mapfile -t engine < <(grep '^sglang' launch/constraints.txt)
    run .venv/bin/python -m venv .venv-sglang
    run .venv-sglang/bin/python -m pip install --upgrade pip
    run .venv-sglang/bin/python -m pip install "${engine[@]}" # its own pins: torch 2.14 and transformers 5.19 among them
fi
if [ -n "$te" ]; then
    optional "Transformer Engine (Megatron's local layers stand in, slower; no mixture of experts on a GPU)" \
        env MAX_JOBS="$jobs" NVTE_FRAMEWORK=pytorch "${build[@]}" 'transformer-engine[core_cu13,pytorch]'
fi
if [ -n "$flash_attn" ]; then
    optional "flash attention (cuDNN's stands in)" env MAX_JOBS="$jobs" FLASH_ATTN_CUDA_ARCHS=90 "${build[@]}" flash-attn
fi
if [ -n "$apex" ]; then
    optional "apex (Transformer Engine's or torch's Adam and norms stand in)" \
        env MAX_JOBS="$jobs" APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "${build[@]}" apex
fi
if [ -n "$sglang" ]; then
    # NCCL lets no two versions into one group, and the trainer's torch would bring an older one than the engine's: as
    # would pip with anything installed after this
    run bash -c '.venv/bin/python -m pip install --no-deps nvidia-nccl-cu13==$(.venv-sglang/bin/python -c "from importlib.metadata import version; print(version(\"nvidia-nccl-cu13\"))")'
fi
run .venv/bin/efr doctor || found=$?
if [ ${#failed[@]} -gt 0 ]; then
    printf 'install: failed, as said above: %s\n' "${failed[@]}" >&2
    exit 1
fi
exit "${found:-0}"
