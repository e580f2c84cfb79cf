# Sourced: find_python, search_python.
#
# A machine without a GPU gets Python 3.11 if it has one: its Megatron-Core is the last for it, 0.16.1, and pip finds
# PyTorch's CPU build for it more often. A machine with a GPU gets 3.12 or 3.13, and with it Megatron-Core 0.19.2.

# find_python ENVIRONMENT: sets `python`, the interpreter that the environment is or is to be made with, and `why`.
find_python() {
    local versions=(3.11 3.12 3.13) wish="the smallest installation of 3.11, 3.12, 3.13 that are here"
    if command -v nvidia-smi >/dev/null; then
        versions=(3.12 3.13 3.11) wish="there is a GPU, and 3.12 has the newer Megatron-Core"
    fi
    if [ -n "${PYTHON:-}" ]; then
        python=$PYTHON why="PYTHON names it"
        is_usable "$python" 3.11 3.12 3.13 && return
        echo "setup: PYTHON=$PYTHON: is no Python 3.11, 3.12 or 3.13 that can make environments" >&2
        exit 1
    fi
    python=$1/bin/python why="$1 is made with it"
    is_usable "$python" "${versions[@]}" && return
    why="$wish; PYTHON=/path/to/python chooses another"
    python=$(search_python "${versions[@]}") && return
    echo "setup: no Python 3.11, 3.12 or 3.13 that can make environments, on the path or among pyenv's;" >&2
    echo "setup: name one with PYTHON=/path/to/python, or install one (Debian, Ubuntu: apt install python3-venv)" >&2
    exit 1
}

# search_python VERSION...: prints the first interpreter of the first version that has one.
search_python() {
    local version candidate
    for version in "$@"; do
        for candidate in "python$version" python3 \
            $(printf '%s\n' "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python | sort -rV); do
            if is_usable "$candidate" "$version"; then
                command -v "$candidate"
                return
            fi
        done
    done
    return 1
}

is_usable() { # interpreter, versions
    "$1" -c 'import ensurepip, sys, venv; sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1:])' "${@:2}" 2>/dev/null
}

python_version() { # interpreter
    "$1" -c 'import platform; print(platform.python_version())'
}
