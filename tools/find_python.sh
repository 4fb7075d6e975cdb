#!/bin/sh
# Prints a Python of at least 3.12 that runs, newest named first; PYTHON=... names one.
for python in ${PYTHON:-} python3.12 python3.13 "$HOME"/.pyenv/versions/3.12*/bin/python python3 python; do
    if "$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then
        command -v "$python"
        exit 0
    fi
done
echo "cherry-megatron needs Python 3.12 or newer with venv; install it, or name one: make PYTHON=/path/to/python" >&2
exit 1
