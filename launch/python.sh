# Sourced: find_python prints the interpreter to set up with, $PYTHON or the first of the supported versions on the path.
find_python() {
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: Python 3.11 or 3.12 is needed and none was found; name one with PYTHON=/path/to/python" >&2
    exit 1
}
