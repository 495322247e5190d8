#!/usr/bin/env bash
# Installs into .venv if need be, then runs every check: style, types, tests. Arguments go to pytest: -k world, --lf, ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

started=$SECONDS
bash launch/venv.sh
echo "environment ready after $((SECONDS - started)) s"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
workers=()
command -v nvidia-smi >/dev/null || workers=(-n 2 --dist loadfile)  # two files at a time, where they share no GPU
.venv/bin/python -m pytest "${workers[@]}" --durations=15 "$@"
echo "all checks passed in $((SECONDS - started)) s"
