#!/usr/bin/env bash
# The CPU kernels' tests with the kernels compiled for the address and undefined-behaviour sanitizers (`make sanitize`).
# A read of a mapped file that was cut short is ours to handle (SIGBUS). What exports models or builds other libraries stays out: other tests have it, and it takes minutes here.
#     plugins/sanitize.sh PYTHON
set -euo pipefail
cd "$(dirname "$0")/.."
asan=$("${CXX:-c++}" -print-file-name=libasan.so 2> /dev/null || true)
ubsan=$("${CXX:-c++}" -print-file-name=libubsan.so 2> /dev/null || true)
if [ ! -e "$asan" ] || [ ! -e "$ubsan" ]; then
    echo "SKIPPED: the sanitizers, as this machine's C++ compiler (${CXX:-c++}) has no libasan; apt-get install g++ brings it." >&2
    exit 0
fi
PATH="$(cd "$(dirname "$1")" && pwd):$PATH"  # CMake and Ninja
(cd plugins && cmake --preset cpu-sanitized > /dev/null && cmake --build --preset cpu-sanitized)
log=$PWD/build/cpu-sanitized/found
rm -f "$log".*
# pytest keeps what is printed, so a finding goes to a file.
LD_PRELOAD="$asan:$ubsan" ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0:log_path="$log" \
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:log_path="$log" DMOE_CPU_PRESET=cpu-sanitized OMP_NUM_THREADS=1 \
    "$1" -m pytest -q -p no:cacheprovider tests/plugins/test_cpu_ops.py tests/plugins/test_linear_op.py tests/plugins/test_fast_products.py \
    tests/plugins/test_attention_op.py tests/plugins/test_library_session.py tests/runtime/cpu/test_residency_groups.py \
    -k 'not tiny and not golden and not bundle and not counted and not sessions_may_end and not expert_file_cut' "${@:2}" \
    || { cat "$log".* 2> /dev/null; exit 1; }
