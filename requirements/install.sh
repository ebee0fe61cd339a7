#!/usr/bin/env bash
# Make .venv and put the pinned packages and this project into it: `requirements/install.sh [PYTHON]`.
# uv resolves nothing here (all is pinned); it is used because it honours overrides.txt and takes seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3.11}
command -v "$python" >/dev/null || python=python3
"$python" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || {
    echo "bitdance needs Python 3.11 or newer; found $("$python" --version 2>&1). Try: make PYTHON=/path/to/python3.11" >&2
    exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
# uv doesn't read pip's configuration: pass on the folders of wheels that pip has been told to look into.
links=()
for link in $(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true) ${PIP_FIND_LINKS:-}; do
    links+=(--find-links "$link")
done
export VIRTUAL_ENV=$PWD/.venv UV_NO_PROGRESS=1
# Compiled now, once: some machines never write bytecode, and would compile torch anew in every process.
.venv/bin/uv pip install --quiet --compile-bytecode "${links[@]}" --overrides requirements/overrides.txt -r requirements/cpu.txt
.venv/bin/uv pip install --quiet --no-deps --no-build-isolation --editable .
