#!/usr/bin/env bash
# GPU proof on a bare machine with an NVIDIA GPU and no network: builds the plugins for its GPU, runs the GPU tests and
# benchmarks, leaves raw JSON and one log in $OUT (at most eight files). Prints a short table last.
#
#   OUT=folder bash benchmarks/device_run.sh first     build, kernel tests, sanitizer, kernel benchmark, generation tests
#   OUT=folder bash benchmarks/device_run.sh engines   engines through TensorRT-RTX / ONNX Runtime CUDA, step times
#   bash benchmarks/device_run.sh keep                 only put carried parts aside (when two calls cannot carry all)
#   bash benchmarks/device_run.sh pack [rtx] [ort]     beforehand, on a machine with a network: fill .carry/
#
# The machine needs: nvcc 12.8 or newer (cmake and ninja too), and Python 3.12 (PACK_PYTHON changes that) with torch,
# numpy, onnx, onnxscript, onnxruntime, tokenizers, safetensors, jinja2, click, rich, cuda-bindings, pytest,
# pytest-timeout, hypothesis. What `pack` brings, in .carry/ (git ignores it):
#   base/wheels     pydantic and what it needs, in the versions it needs: 3 MB
#   base/tensorrt   TensorRT's Apache-2.0 headers: 1 MB; without them only the kernels are built, not the plugins
#   rtx.N, ort.N    TensorRT-RTX, and onnxruntime-gpu, as one archive each cut into parts of 40 MiB
# Calls, where one may carry 64 MiB, on one machine that stays up in between:
#   1  carry .carry/base .carry/rtx.0   first
#   2  carry .carry/base .carry/rtx.1   engines        (rtx.0 was put aside by call 1; a missing part is named)
# Every further part needs a `keep` call before `engines`; `ort` works in the same way.
# Each step has a time limit, and all steps of a call together $BUDGET seconds (540); what no time was left for is
# listed in steps.json as such. A step's failure does not end the run; the exit code is the number of failed steps.
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON=${PYTHON:-python3}
CARRY=.carry
STASH=${DMOE_STASH:-$HOME/.cache/dmoe-device-run}   # outside the tree: survives what a later call replaces
BUDGET=${BUDGET:-540}
PACK_PYTHON=${PACK_PYTHON:-3.12}
RTX_VERSION=${RTX_VERSION:-1.7.1.116}
ORT_VERSION=${ORT_VERSION:-1.31.1}
failed=0

pack() {
    mkdir -p "$CARRY/base/wheels" "$CARRY/base/tensorrt"
    grep -qsx '/.carry/' .git/info/exclude || echo '/.carry/' >> .git/info/exclude
    wheels "$CARRY/base/wheels" pydantic annotated-types typing-inspection typing-extensions "$(pydantic_core)"
    if [ -d build/tensorrt ]; then
        find build/tensorrt -name '*.h' -exec cp {} "$CARRY/base/tensorrt/" \;
    else
        echo "Run 'make plugins' first: build/tensorrt has no headers to carry."; exit 2
    fi
    local what
    for what in "$@"; do
        local scratch; scratch=$(mktemp -d)
        case $what in
            rtx) wheels "$scratch/w" "tensorrt-rtx-cu13-libs==$RTX_VERSION" "tensorrt-rtx-cu13-bindings==$RTX_VERSION" ;;
            ort) wheels "$scratch/w" "onnxruntime-gpu==$ORT_VERSION" ;;
            *) echo "pack knows rtx and ort, not $what"; exit 2 ;;
        esac
        mkdir "$scratch/site"
        for wheel in "$scratch"/w/*.whl; do "$PYTHON" -m zipfile -e "$wheel" "$scratch/site"; done
        rm -f "$CARRY/$what".*
        tar -C "$scratch/site" -c . | xz --x86 --lzma2=preset=9e,dict=256MiB -T1 > "$scratch/$what.txz" || exit 1
        split -b 40M -d -a 1 "$scratch/$what.txz" "$CARRY/$what."
        # Parts and sum travel with the base, so that a missing part is noticed.
        (cd "$scratch" && sha256sum "$what.txz") > "$CARRY/base/$what.sha256"
        (cd "$CARRY" && ls "$what".[0-9]) > "$CARRY/base/$what.parts"
        rm -rf "$scratch"
    done
    du -sh "$CARRY"/*
}

pydantic_core() {  # the one version the chosen pydantic takes
    local wheel; wheel=$(ls "$CARRY"/base/wheels/pydantic-*.whl 2>/dev/null | tail -1)
    [ -n "$wheel" ] || { wheels "$CARRY/base/wheels" pydantic >&2; wheel=$(ls "$CARRY"/base/wheels/pydantic-*.whl); }
    unzip -p "$wheel" '*/METADATA' | sed -n 's/^Requires-Dist: \(pydantic-core==[0-9.]*\).*/\1/p'
}

wheels() {  # folder, requirements: wheels for the machine, not for this one
    local folder=$1; shift
    local platforms=() n
    for n in 17 24 27 28 31 34 35; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$PACK_PYTHON" --implementation cp \
        "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d "$folder" "$@" || exit 1
}

keep() {
    mkdir -p "$STASH/parts"
    local part
    for part in "$CARRY"/*.[0-9]; do [ -f "$part" ] && cp "$part" "$STASH/parts/"; done
    [ -d "$CARRY/base" ] && cp -r "$CARRY/base" "$STASH/"
    return 0
}

unpack() {  # name: joined, checked, unpacked to a folder of its own
    local what=$1 name
    while read -r name; do
        [ -f "$STASH/parts/$name" ] || { echo "Part $name of $what is not here: carry it with a 'keep' call."; return 3; }
    done < "$STASH/base/$what.parts"
    (cd "$STASH/parts" && xargs cat < "$STASH/base/$what.parts" > "$STASH/$what.txz") || return 1
    (cd "$STASH" && sha256sum --check --quiet "base/$what.sha256") || return 1
    mkdir -p "$STASH/$what" && tar -C "$STASH/$what" -xJf "$STASH/$what.txz" && rm "$STASH/$what.txz"
}

step() {  # name, seconds, command: its output goes to the log and the end of it to the screen
    local name=$1 limit=$2 left=$((BUDGET - SECONDS)) start=$SECONDS code state; shift 2
    if ((left < 15)); then
        code=-1 state="no time left"
    else
        ((limit > left)) && limit=$left
        echo "== $name, at most $limit s: $*" | tee -a "$OUT/log.txt"
        timeout --kill-after=10 "$limit" "$@" > "$OUT/step.txt" 2>&1
        code=$?
        cat "$OUT/step.txt" >> "$OUT/log.txt"; tail -n "${SHOWN:-6}" "$OUT/step.txt"; rm -f "$OUT/step.txt"
        case $code in 0) state=done ;; 124 | 137) state="ran past $limit s" ;; *) state=failed ;; esac
    fi
    [ "$state" = done ] || failed=$((failed + 1))
    records+=("{\"step\": \"$name\", \"state\": \"$state\", \"exit\": $code, \"seconds\": $((SECONDS - start))}")
    (IFS=,; echo "[${records[*]}]") > "$OUT/steps.json"
    [ "$state" = done ]
}

facts() {
    nvidia-smi || return 3
    nvcc --version; compute-sanitizer --version; "$PYTHON" --version; uname -a
    "$PYTHON" -m pip list 2>/dev/null | grep -iE '^(torch|numpy|onnx|cuda|nvidia|tensorrt|pytest|hypothesis|pydantic)'
    return 0
}

install_wheels() {
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$STASH/site" \
        "$STASH"/base/wheels/*.whl
}

build_plugins() {
    local code; code=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .) || return 1
    if [ -f "$STASH/base/tensorrt/NvInfer.h" ]; then
        TENSORRT_INCLUDE="$STASH/base/tensorrt" "$PYTHON" plugins/build.py --code "$code"
    else
        cmake -S plugins -B build/plugins-kernels -G Ninja -DDMOE_CUDA=ON "-DDMOE_CUDA_CODE=$code" &&
            cmake --build build/plugins-kernels && mkdir -p dmoe_export/lib &&
            cp build/plugins-kernels/libdmoe_plugins.so dmoe_export/lib/ && echo "kernels only, no TensorRT headers"
    fi
}

gpu_pytest() { "$PYTHON" -m pytest -m gpu -rs -p no:cacheprovider "$@"; }

prepare() {
    : "${OUT:?set OUT to the folder for results}"
    mkdir -p "$OUT" "$STASH" && OUT=$(cd "$OUT" && pwd)
    records=()
    export OUT STASH PYTHON PYTHONUNBUFFERED=1 DMOE_GPU_RESULTS=$OUT
    export -f facts install_wheels build_plugins gpu_pytest unpack
    export PYTHONPATH="$STASH/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
    keep
    SHOWN=30 step facts 40 bash -c facts || { echo "No NVIDIA GPU answers here."; exit 3; }
    step wheels 60 bash -c install_wheels
    step build 240 bash -c build_plugins
}

first() {
    prepare
    step test-kernels 200 bash -c 'gpu_pytest tests/gpu/test_gpu_kernels.py tests/test_device_gpu.py'
    step bench-kernels 150 "$PYTHON" benchmarks/gpu_kernels.py --out "$OUT"
    step test-sanitizer 180 bash -c 'gpu_pytest tests/gpu/test_gpu_sanitizer.py'
    step test-generation 90 bash -c 'gpu_pytest tests/gpu/test_gpu_generation.py tests/gpu/test_gpu_ort_custom_ops.py'
}

engines() {
    prepare
    local what
    for what in rtx ort; do
        [ -f "$STASH/base/$what.parts" ] || continue  # not packed: the tests say what is missing
        if [ -d "$STASH/$what" ] || step "unpack-$what" 90 bash -c "unpack $what"; then
            PYTHONPATH="$STASH/$what:$PYTHONPATH"
        fi
    done
    # The wheel has its libraries beside the bindings; name them, as their packages do on an ordinary installation.
    local libs; libs=$(find "$STASH/rtx" -name 'libtensorrt_rtx.so*' -printf '%h\n' 2>/dev/null | head -1)
    export LD_LIBRARY_PATH="${libs:+$libs:}${LD_LIBRARY_PATH:-}"
    step test-generation 240 bash -c 'gpu_pytest tests/gpu/test_gpu_generation.py tests/gpu/test_gpu_ort_custom_ops.py'
    SHOWN=12 step bench-generate 280 "$PYTHON" benchmarks/gpu_generate.py --layers "${LAYERS:-2}" --out "$OUT" \
        --work "$STASH/work"
    rm -rf "$STASH/work"
}

case ${1:-} in
    pack) shift; pack "$@"; exit ;;
    keep) keep; ls "$STASH/parts"; exit ;;
    first | engines) "$1" ;;
    *) sed -n '2,21p' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
"$PYTHON" - "$OUT" <<'PY'
import json, pathlib, sys
for entry in json.loads((pathlib.Path(sys.argv[1]) / "steps.json").read_text()):
    print(f"{entry['step']:<18} {entry['state']:<16} {entry['seconds']:>4} s")
PY
table=$(sed -n '/device copy .* TB\/s/,/^==/p;/milliseconds per forward/,/^==/p' "$OUT/log.txt" | grep -v '^==')
[ -n "$table" ] && echo "$table"
exit "$failed"
