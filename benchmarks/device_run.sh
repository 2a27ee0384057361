#!/usr/bin/env bash
# GPU proof on a bare machine with an NVIDIA GPU and no network: puts our libraries in place, runs the GPU tests and
# benchmarks, leaves raw JSON and one log in $OUT (at most eight files). Prints a short table last.
#
#   OUT=folder bash benchmarks/device_run.sh first [STEP...]     kernels: smoke, tests, rates, sanitizer, profiler
#   OUT=folder bash benchmarks/device_run.sh engines [STEP...]   ONNX Runtime CUDA: custom ops, generation, step times
#   OUT=folder bash benchmarks/device_run.sh rtx                 does a TensorRT-RTX engine run here? (also at the end
#                                                                of `engines`, where its parts are there)
#   bash benchmarks/device_run.sh keep                           only put carried parts aside
#   bash benchmarks/device_run.sh pack [ort|ort-whole] [rtx]     beforehand, on a machine with a network: fill .carry/
#
# STEP...: only these, in this order. gpu_runbook.md has the calls, device/calls.txt what each carries; rehearse.sh runs
# them all without a GPU. The machine needs nvcc 12.8 or newer, cmake, ninja, and Python 3.12 (PACK_PYTHON changes that)
# with torch, numpy, onnx, onnxscript, onnxruntime, tokenizers, safetensors, jinja2, click, rich, cuda-bindings, pytest,
# pytest-timeout, pytest-xdist, hypothesis; pydantic and the rest is carried.
#
# A failed step does not end the run. Exit codes: 0 all steps did what they are for, 1 some did not, 3 no GPU here.
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON=${PYTHON:-python3}
CARRY=.carry
STASH=${DMOE_STASH:-$HOME/.cache/dmoe-device-run}   # outside the tree: survives what a later call replaces
LAYERS=${LAYERS:-6}
DRIVER_PATH=${LD_LIBRARY_PATH:-}  # where this machine may have its driver
# By worth: what does not fit into $BUDGET is left out.
FIRST=(smoke bench-quick test-kernels ncu memcheck test-residency bench-residency racecheck bench-kernels initcheck
       synccheck)
ENGINES=(unpack-ort test-custom-ops generate-fp16 test-generation cli-export cli-generate generate-int8 generate-int4)
RTX=(unpack-rtx rtx-finding)
# shellcheck source=benchmarks/device/steps.sh
. benchmarks/device/steps.sh

keep() {
    mkdir -p "$STASH/parts"
    local part
    for part in "$CARRY"/*.[0-9]; do [ -f "$part" ] && cp "$part" "$STASH/parts/"; done
    [ -d "$CARRY/base" ] && cp -r "$CARRY/base" "$STASH/"
    return 0
}

all_parts() {  # name: were put aside
    [ -f "$STASH/base/$1.parts" ] && (cd "$STASH/parts" && xargs ls < "../base/$1.parts" > /dev/null 2>&1)
}

unpack() {  # name, Python that imports `module`: joined, checked, unpacked to a folder of its own, imported from there
    local what=$1 name
    [ -f "$STASH/base/$what.parts" ] || { echo "$what was not packed: device_run.sh pack $what."; return 3; }
    [ -d "$STASH/$what" ] || {
        while read -r name; do
            [ -f "$STASH/parts/$name" ] || { echo "Part $name is not here: carry it with a 'keep' call."; return 3; }
        done < "$STASH/base/$what.parts"
        (cd "$STASH/parts" && xargs cat < "$STASH/base/$what.parts" > "$STASH/$what.txz") || return 1
        (cd "$STASH" && sha256sum --check --quiet "base/$what.sha256") || return 1
        rm -rf "$STASH/$what.partial" && mkdir "$STASH/$what.partial" &&
            "$PYTHON" -m tarfile -e "$STASH/$what.txz" "$STASH/$what.partial" && rm "$STASH/$what.txz" &&
            mv "$STASH/$what.partial" "$STASH/$what" || return 1
    }
    PYTHONPATH="$STASH/$what:$PYTHONPATH" LD_LIBRARY_PATH="$(library_folders)" "$PYTHON" -c "$2
assert module.__file__.startswith('$STASH'), f'{module.__file__} is not what was carried'
print(module.__name__, module.__version__, *getattr(module, 'get_available_providers', list)())"
}

library_folders() {  # of CUDA and cuDNN in NVIDIA's Python packages, and of TensorRT-RTX: what wheels link by name
    "$PYTHON" -c "
import importlib.util, pathlib
spec = importlib.util.find_spec('nvidia')
roots = spec.submodule_search_locations if spec else ()
print(':'.join(str(folder) for root in roots for folder in sorted(pathlib.Path(root).glob('*/lib'))), end='')"
    find "$STASH/rtx" -name 'libtensorrt_rtx.so*' -printf ':%h' -quit 2> /dev/null
    echo "${DRIVER_PATH:+:$DRIVER_PATH}"
}

facts() {
    nvidia-smi || return 3
    nvidia-smi --query-gpu=name,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit --format=csv
    echo "LD_LIBRARY_PATH=$DRIVER_PATH"
    nvcc --version; compute-sanitizer --version; ncu --version; "$PYTHON" --version; uname -a; df -h "$STASH"; free -g
    "$PYTHON" -m pip list 2>/dev/null | grep -iE '^(torch|numpy|onnx|cuda|nvidia|tensorrt|pytest|hypothesis|pydantic)'
    return 0
}

install_wheels() {
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$STASH/site" \
        "$STASH"/base/wheels/*.whl
}

libraries() {  # those that are there, else those that were carried, else built here: whichever these sources make
    local code folder
    code=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .) || return 1
    for folder in dmoe_export/lib "$CARRY/lib"; do
        "$PYTHON" benchmarks/device/libraries.py check "$folder" --code "$code" || continue
        [ "$folder" = dmoe_export/lib ] || { mkdir -p dmoe_export/lib && cp "$folder"/* dmoe_export/lib/; } || return 1
        return 0
    done
    TENSORRT_INCLUDE="$STASH/base/tensorrt" "$PYTHON" benchmarks/device/libraries.py build dmoe_export/lib --code "$code"
}

custom_ops() {  # both libraries are there, and ONNX Runtime takes ours; without them the product has no kernels here
    "$PYTHON" -c "
import onnxruntime as ort
from dmoe_export.ops.plugin_library import find_library as plugins
from dmoe_export.runtime.gpu.custom_ops import find_library
ort.SessionOptions().register_custom_ops_library(str(find_library()))
print(f'ONNX Runtime {ort.__version__} takes {find_library()}; plugins build {plugins().build}')"
}

profile() {  # four product launches, each read in full; the table is in the log, the report beside it
    command -v ncu || { echo "ncu is not on the PATH."; return 3; }
    ncu --set full --clock-control none --kernel-name regex:product_kernel --launch-count 4 --force-overwrite \
        --export "$STASH/ncu" "$PYTHON" benchmarks/device/ncu_target.py || return $?
    ncu --import "$STASH/ncu.ncu-rep" --page details &&
        find "$STASH/ncu.ncu-rep" -size -16M -exec cp {} "$OUT/" \;
}

tests() { "$PYTHON" -m pytest -m gpu -rs -p no:cacheprovider "$@"; }

generate() {  # step, precision, options; 28 GB of models at 6 layers, in memory where there is room: exports wait for disks
    local work=$STASH/work free
    free=$(df --output=avail --block-size=1G /dev/shm 2> /dev/null | tail -n 1)
    if [ -d /dev/shm/dmoe-work ] || ((${free:-0} >= 34)); then work=/dev/shm/dmoe-work; fi
    PROOF='denoise +[0-9.]+ ms' SHOWN=16 step "$1" 200 "$PYTHON" benchmarks/gpu_generate.py \
        --layers "$LAYERS" --precision "$2" --out "$OUT" --work "$work" "${@:3}"
}

run() {  # the steps of these names
    local name gpu=tests/gpu
    for name in "$@"; do case $name in
        smoke) SHOWN=20 PROOF='TB/s' step smoke 60 "$PYTHON" benchmarks/gpu_smoke.py --out "$OUT" ;;
        bench-quick) SHOWN=24 PROOF='TB/s' step "$name" 90 "$PYTHON" benchmarks/gpu_kernels.py --quick --out "$OUT" ;;
        bench-kernels) SHOWN=24 PROOF='TB/s' step "$name" 180 "$PYTHON" benchmarks/gpu_kernels.py --out "$OUT" ;;
        bench-residency) PROOF='a miss:' step "$name" 70 "$PYTHON" benchmarks/gpu_residency.py --out "$OUT" ;;
        test-kernels) PROOF='[0-9]+ passed' step "$name" 180 bash -c "OMP_NUM_THREADS=2 tests -n 6 -v --durations=10 \
            --dist worksteal $gpu/test_gpu_kernels.py $gpu/test_gpu_fused.py \
            $gpu/test_gpu_self_attention.py tests/runtime/gpu/test_device_gpu.py" ;;
        test-residency) PROOF='[0-9]+ passed' step "$name" 60 bash -c "tests -vv $gpu/test_gpu_residency.py" ;;
        memcheck | racecheck | initcheck | synccheck)
            PROOF='[0-9]+ passed' step "$name" 90 bash -c "tests -vv $gpu/test_gpu_sanitizer.py -k $name" ;;
        ncu) SHOWN=12 PROOF='product_kernel' step "$name" 120 bash -c profile ;;
        unpack-ort) PROOF=CUDAExecutionProvider step "$name" 90 bash -c "unpack ort 'import onnxruntime as module'" &&
            use ort ;;
        test-custom-ops) PROOF='[0-9]+ passed' step "$name" 100 bash -c "OMP_NUM_THREADS=2 tests -n 4 -v \
            $gpu/test_gpu_ort_custom_ops.py tests/runtime/gpu/test_device_gpu.py" ;;
        test-generation) PROOF='[0-9]+ passed' step "$name" 180 bash -c "OMP_NUM_THREADS=2 tests -n 4 -v \
            --dist worksteal $gpu/test_gpu_generation.py -k onnxruntime" ;;
        generate-fp16) generate "$name" fp16 --profile 3 ;;
        generate-int8 | generate-int4) generate "$name" "${name#generate-}" ;;
        generate-salient) generate "$name" fp16 --salient 16 ;;
        cli-export) step "$name" 60 "$PYTHON" -m dmoe_export export samples/tiny-dmoe --precision fp16 --compute fp16 --force \
            --out "$STASH/sample.bundle" ;;
        # As a user would: nothing names CUDA's libraries but the package itself.
        cli-generate) PROOF='[a-z]' step "$name" 60 env LD_LIBRARY_PATH="$DRIVER_PATH" "$PYTHON" -m dmoe_export \
            generate "$STASH/sample.bundle" --backend onnxruntime-cuda --max-new-tokens 32 \
            --prompt "tom has 12 apples and buys 7 more. how many apples does tom have?" ;;
        unpack-rtx) PROOF=tensorrt step "$name" 90 bash -c "unpack rtx 'import tensorrt_rtx_bindings as module'" &&
            use rtx ;;
        rtx-finding) SHOWN=30 PROOF='[0-9]+ passed' step "$name" 220 bash -c "tests -vv $gpu/test_gpu_generation.py \
            -k 'rtx_engines and fp16'" ;;
        *) echo "There is no step $name."; exit 2 ;;
    esac; done
}

use() {  # name: steps from here on import it, and find what it links
    export PYTHONPATH="$STASH/$1:$PYTHONPATH" LD_LIBRARY_PATH
    LD_LIBRARY_PATH=$(library_folders)
}

prepare() {
    : "${OUT:?set OUT to the folder for results}"
    mkdir -p "$OUT" "$STASH" && OUT=$(cd "$OUT" && pwd)
    export OUT STASH CARRY PYTHON DRIVER_PATH PYTHONUNBUFFERED=1 DMOE_GPU_RESULTS=$OUT DMOE_REQUIRE_CUSTOM_OPS=1
    export -f facts install_wheels libraries custom_ops profile tests unpack library_folders
    export PYTHONPATH="$STASH/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
    keep
    SHOWN=30 step facts 40 bash -c facts || { echo "No NVIDIA GPU answers here."; exit 3; }
    step wheels 60 bash -c install_wheels
    step libraries 240 bash -c libraries
    step custom-ops 60 bash -c custom_ops || echo "WITHOUT OUR CUSTOM OPS the product does not reach its kernels here."
}

pack_here() {
    # shellcheck source=benchmarks/device/pack.sh
    . benchmarks/device/pack.sh
    pack "$@"
}

verb=${1:-}; shift || true
case $verb in
    pack) pack_here "$@"; exit ;;
    keep) keep; ls -l "$STASH/parts"; exit ;;
    first) prepare; if (($#)); then run "$@"; else run "${FIRST[@]}"; fi ;;
    engines) prepare; if (($#)); then run "$@"; else run "${ENGINES[@]}"; fi
        # Where all of its parts are here, no other call is to come for it.
        (($#)) || ! all_parts rtx || run "${RTX[@]}" ;;
    rtx) prepare; run "${RTX[@]}" ;;
    *) sed -n '2,21p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
finish
