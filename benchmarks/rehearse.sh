#!/usr/bin/env bash
# Rehearses the calls of device/calls.txt on a machine without a GPU: a bare copy of the tree with what each call
# carries, the GPU machine's Python packages, no network, and a stand-in for nvidia-smi.
#
#   bash benchmarks/rehearse.sh [CALL...]        all calls, or these; needs the package index and 12 GB of disk once
#
# Every step must come to what device/expected.txt says of a machine without a GPU: building, packing, unpacking,
# exporting and opening really happen, what needs a GPU ends with the sentence that says so. Then the unpacked
# onnxruntime-gpu opens a bundle with our custom ops and takes steps, on stubs of CUDA's libraries (tests/cuda_stubs).
# Nothing here says anything of a GPU. Everything is kept in build/rehearsal (REHEARSAL names another folder), a log of
# each call in out/CALL. Exit codes: 0 as expected, 1 something differs, 3 this machine cannot rehearse.
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

WORK=$(realpath -m "${REHEARSAL:-build/rehearsal}")
DEVICE=benchmarks/device
STASH=$WORK/home/.cache/dmoe-device-run  # as device_run.sh names it
# What the GPU machine has (its image of 2026-11); what it lacks is not here either: pydantic, polygraphy, this project.
PACKAGES=(torch==2.11.0 onnx==1.23.1 onnx-ir==1.0.0 onnxscript==0.7.2 onnxruntime==1.30.0 numpy==2.5.2 cuda-bindings
          tokenizers==0.23.2 safetensors==0.8.0 jinja2 click rich pytest pytest-timeout pytest-xdist hypothesis cmake
          ninja)
# What the runtime alone needs: no torch, and so no libraries of CUDA beside the stubs.
LIGHT=(numpy==2.5.2 tokenizers==0.23.2 safetensors==0.8.0 jinja2 click rich cuda-bindings)
HOST_PYTHON=${HOST_PYTHON:-python3}
[ -x .venv/bin/python ] && HOST_PYTHON=$PWD/.venv/bin/python
rows=()
wrong=0

environment() {  # name, packages: an environment of Python 3.12, made once for this list
    local folder=$WORK/$1; shift
    [ "$(cat "$folder/made_of" 2> /dev/null)" = "$*" ] && return 0
    rm -rf "$folder"
    "${PYTHON312:-python3.12}" -m venv "$folder" && "$folder/bin/python" -m pip install --quiet "$@" &&
        echo "$*" > "$folder/made_of"
}

sync_tree() {  # carried paths: what the tool sends; ignored build outputs of earlier calls stay
    local new=$WORK/tree.new kept path
    rm -rf "$new" && mkdir -p "$new" "$WORK/tree"
    git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -T - -cf - 2> /dev/null |
        tar -C "$new" -xf - || return 1
    for kept in dmoe_export/lib build; do
        [ ! -d "$WORK/tree/$kept" ] || mv "$WORK/tree/$kept" "$new/$kept" || return 1
    done
    rm -rf "$WORK/tree" && mv "$new" "$WORK/tree"
    for path in "$@"; do
        mkdir -p "$WORK/tree/$(dirname "$path")" && cp -r "$path" "$WORK/tree/$path" || return 1
    done
}

alone() {  # seconds, command: in the tree, without a network, and with nothing of this machine's environment
    env -i HOME="$WORK/home" LANG=C.UTF-8 LD_LIBRARY_PATH=/usr/local/nvidia/lib64 TMPDIR="$WORK/tmp" "${CLOSED[@]}" \
        PATH="$WORK/tree/$DEVICE/stand_in:$WORK/venv/bin:$CUDA_BIN:/usr/local/bin:/usr/bin:/bin" \
        timeout --kill-after=10 "$1" "${CUT[@]}" bash -c "cd '$WORK/tree' && $2"
}

row() {  # call, step, state, seconds, words
    rows+=("$(printf '%-8s %-16s %-16s %4d s  %s' "$@")")
    echo "${rows[-1]}"
}

call() {  # name, seconds, carried, command
    local out=$WORK/out/$1 start=$SECONDS code said carried
    read -ra carried <<< "$3"
    echo "=== $1: $4 (carries $3)"
    rm -rf "$out" && mkdir -p "$out"
    sync_tree "${carried[@]}" || { wrong=1; row "$1" copy WRONG 0 "no copy of the tree"; return; }
    alone "$2" "OUT=$out; $4" > "$WORK/out/$1.screen.txt" 2>&1
    code=$?
    if [ -f "$out/steps.json" ]; then
        said=$("$HOST_PYTHON" $DEVICE/compare.py "$1" "$out") || wrong=1
        # What needs a GPU did not run, and the exit code must say so.
        [ "$code" = 1 ] || { wrong=1; said+=$'\n'"$1: WRONG, exit code $code instead of 1"; }
        echo "$said"; rows+=("$said")
    elif ((code == 0)); then
        row "$1" keep "done" $((SECONDS - start)) "as expected"
    else
        wrong=1; row "$1" "whole call" WRONG $((SECONDS - start)) "$(tail -n 1 "$WORK/out/$1.screen.txt")"
    fi
}

check() {  # name, seconds, command: beside the calls
    local start=$SECONDS
    if alone "$2" "$3" > "$WORK/out/$1.txt" 2>&1; then
        row rehearse "$1" "done" $((SECONDS - start)) "$(tail -n 1 "$WORK/out/$1.txt")"
    else
        wrong=1; row rehearse "$1" WRONG $((SECONDS - start)) "$(tail -n 3 "$WORK/out/$1.txt")"
    fi
}

if "$HOST_PYTHON" -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2> /dev/null; then
    echo "This machine has an NVIDIA driver; a rehearsal without a GPU means nothing here, run device_run.sh itself."
    exit 3
fi
mkdir -p "$WORK/out" "$WORK/tmp"
if ! environment venv "${PACKAGES[@]}" || ! environment light "${LIGHT[@]}"; then
    echo "No environment of Python 3.12 (PYTHON312 names it) with the GPU machine's packages can be made here."
    exit 3
fi
PATH=$(dirname "$HOST_PYTHON"):$PATH cmake -S plugins --preset cuda > /dev/null ||
    { echo "There is no compiler of CUDA here."; exit 3; }
CUDA_BIN=$(dirname "$(sed -n 's/^CMAKE_CUDA_COMPILER:[A-Z]*=//p' build/cuda/CMakeCache.txt)")
CUT=(unshare --net --map-root-user) CLOSED=(PIP_NO_INDEX=1)
"${CUT[@]}" true 2> /dev/null ||  # not allowed here: whoever asks for the network finds a closed port
    CUT=() CLOSED=(PIP_NO_INDEX=1 http_proxy=http://127.0.0.1:9 https_proxy=http://127.0.0.1:9)
PYTHON=$HOST_PYTHON bash benchmarks/device_run.sh pack ort rtx ||
    { echo "A call carries too much, or something could not be packed."; exit 1; }

rm -rf "${WORK:?}/home" "${WORK:?}/tree"
mkdir -p "$WORK/home"
while IFS='|' read -r name seconds carried command; do
    name=${name// /}
    (($# == 0)) || [[ " $* " == *" $name "* ]] || continue
    call "$name" "${seconds// /}" "$carried" "${command# }"
done < <(grep -v '^#' $DEVICE/calls.txt)
if (($# == 0)); then
    check machine-code 60 "python3 benchmarks/slim_onnxruntime.py '$STASH/ort' --list | grep -E ' 90 in [0-9]{3}'"
    check links 60 "python3 $DEVICE/links.py '$STASH/ort/onnxruntime/capi/libonnxruntime_providers_cuda.so'"
    check stubs 600 "PYTHONPATH='$STASH/site' TENSORRT_INCLUDE='$STASH/base/tensorrt' \
        python3 tests/cuda_stubs/prepare.py --out '$WORK/stubs' --site '$STASH/ort' > '$WORK/stubs.json'"
    check on-stubs 300 "'$WORK/light/bin/python' $DEVICE/on_stubs.py '$WORK/stubs.json' '$STASH/sample.bundle' \
        '$WORK/out/on-stubs'"
    # TensorRT-RTX needs no GPU to build an engine with our plugins.
    check rtx-build 300 "PYTHONPATH='$STASH/rtx:$STASH/site:.' LD_LIBRARY_PATH='$STASH/rtx/tensorrt_rtx_libs' \
        python3 tests/gpu/rtx_finding.py '$STASH/sample.bundle' sm80 --build-only"
    # The GPU programs' own code and its tests, with the machine's versions of everything.
    check python-side 600 "PYTHONPATH='$STASH/site:.' python3 -m pytest -p no:cacheprovider \
        tests/bench/test_gpu_benchmarks.py tests/bench/test_gpu_checks_on_cpu.py tests/bench/test_gpu_residency_on_cpu.py \
        tests/bench/test_gpu_generate_on_cpu.py tests/bench/test_device_run.py"
    rm -rf "${WORK:?}/home" "${WORK:?}/tree" && mkdir "$WORK/home"
    call bare 300 ".carry/base" "export OUT; bash benchmarks/device_run.sh engines unpack-ort"
fi
echo; echo "=== the rehearsal"; printf '%s\n' "${rows[@]}"
if ((wrong)); then echo "Something differs; each call's log is in $WORK/out."; exit 1; fi
echo "All as expected on a machine without a GPU."
