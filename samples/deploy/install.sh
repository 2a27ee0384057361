#!/usr/bin/env bash
# Installs dmoe-export with its plugins into a virtual environment: what the Dockerfile runs, and what a machine without
# Docker can run. Run from a checkout of the repository; needs no GPU and no root.
#
#   samples/deploy/install.sh [--venv DIR] [--extras LIST] [--system-packages] [--code LIST] [--dry-run]
#
#   --venv DIR          the virtual environment, made if missing [.venv-deploy]
#   --extras LIST       of pyproject.toml [rtx,cpu]; tensorrt for the datacenter flavour, export to read checkpoints (torch)
#   --system-packages   the environment sees the system's Python packages: the TensorRT of NVIDIA's image
#   --code LIST         compile the kernels for these compute capabilities only, such as 80,90 [all]
#   --dry-run           print the steps, do nothing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

venv=.venv-deploy extras=rtx,cpu code='' dry=false venv_options=()

fail() { echo "install.sh: $2" >&2; exit "$1"; }

while [ $# -gt 0 ]; do
    case $1 in
        --venv | --extras | --code)
            [ $# -ge 2 ] || fail 2 "$1 needs a value; see the head of this file."
            declare "${1#--}=$2"; shift 2 ;;
        --system-packages) venv_options=(--system-site-packages); shift ;;
        --dry-run) dry=true; shift ;;
        *) fail 2 "Option $1 is not known; see the head of this file." ;;
    esac
done
python=$venv/bin/python

step() {  # step TEXT COMMAND...
    echo "[install] $1"
    shift
    printf '    %s\n' "$*"
    $dry || "$@"
}

check_machine() {
    python3 -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
        || fail 3 "Python $(python3 -c 'import platform; print(platform.python_version())') is not 3.10 … 3.13."
    python3 -c 'import ensurepip, venv' 2>/dev/null || fail 3 "Python has no venv module: apt-get install python3-venv"
    command -v c++ >/dev/null || fail 3 "There is no C++ compiler: apt-get install g++"
}

verify() {  # the library loads, and the installed package (not the checkout) finds it and its recipes
    cd "$(dirname "$1")"
    "$1" - <<'PYTHON'
from dmoe_export.engine.plugins import find_library
from dmoe_export.engine.recipe import recipe_names
library = find_library()
print(f"    {library.path}: build {library.build[:16]}…; recipes: {', '.join(recipe_names())}")
PYTHON
}

step "is the machine fit?" check_machine
step "virtual environment" python3 -m venv ${venv_options[@]+"${venv_options[@]}"} "$venv"
step "a pip that takes settings" "$python" -m pip install --quiet --upgrade pip
step "the package, with kernels for CPU and GPU; fetches nvcc and TensorRT's headers where the machine has none" \
    "$python" -m pip install --no-cache-dir --constraint constraints.txt -C cmake.define.DMOE_CUDA=ON \
    -C cmake.define.DMOE_FETCH=ON ${code:+-C "cmake.define.DMOE_CUDA_CODE=${code//,/;}"} ".[$extras]"
step "does it work?" verify "$(realpath -m "$python" --no-symlinks)"
$dry || echo "[install] done: $venv/bin/dmoe-export"
