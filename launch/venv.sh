#!/usr/bin/env bash
# Makes .venv in the repository and installs what is needed to run and to test; a second run takes no time.
#
# PYTHON     the interpreter to build on (default python3; 3.11 or newer)
# TORCH      the version of PyTorch (default 2.13.0, the one tested most; 2.11 and later work)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-2.13.0}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "launch/venv.sh: $("$PYTHON" --version) is too old, 3.11 or newer is needed: PYTHON=python3.12 bash ..." >&2
    exit 2
}
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv || {
    echo "launch/venv.sh: no virtual environment could be made (on Debian and Ubuntu: apt install python3-venv)" >&2
    exit 2
}

# What was installed last time, from what: the same again needs nothing.
wanted="torch $TORCH $(cat pyproject.toml launch/venv.sh | cksum)"
installed=.venv/installed-from
if [ "$(cat $installed 2>/dev/null)" != "$wanted" ]; then
    rm -f $installed
    packages=("torch==$TORCH" "setuptools>=77")
    # The Triton that this PyTorch is built with: a newer one would be taken where PyTorch itself does not ask for any.
    case "$(uname -s) $TORCH" in
        Linux\ 2.11.*) packages+=("triton==3.6.0") ;;
        Linux\ 2.13.*) packages+=("triton==3.7.1") ;;
    esac
    # torch is named, with its version, so that pip cannot trade it for a newer build and its gigabytes of CUDA packages.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${packages[@]}" --editable '.[dev]'
    echo "$wanted" >$installed
fi
