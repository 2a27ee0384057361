# shellcheck shell=bash
# The part of device_run.sh that runs beforehand, on a machine with a network: fills .carry/.
#
#   base/wheels       pydantic and what it needs, in the versions it needs
#   base/tensorrt     TensorRT's Apache-2.0 headers, so that both our libraries can be built where they are missing or do
#                     not fit
#   lib               both our libraries, for one compute capability (PACK_CODE)
#   ort.N, rtx.N      onnxruntime-gpu (slimmed by slim_onnxruntime.py, or `ort-whole`) and TensorRT-RTX, as one archive
#                     each, cut into parts of one size
PACK_PYTHON=${PACK_PYTHON:-3.12}
PACK_CODE=${PACK_CODE:-90}
PART=$((31 << 20))  # bytes, the most that a part may have
pinned() { sed -n "s/^$1==\([0-9.]*\).*/\1/p" constraints.txt; }
RTX_VERSION=${RTX_VERSION:-$(pinned tensorrt-rtx-cu13-libs)}
ORT_VERSION=${ORT_VERSION:-$(pinned onnxruntime-gpu)}

pack() {
    mkdir -p "$CARRY/base/wheels"
    compgen -G "$CARRY/base/wheels/pydantic_core-*" > /dev/null || {
        wheels "$CARRY/base/wheels" pydantic annotated-types typing-inspection typing-extensions
        wheels "$CARRY/base/wheels" "$(pydantic_core)"; } || exit 3
    "$PYTHON" benchmarks/device/libraries.py headers "$CARRY/base" || exit 3
    "$PYTHON" benchmarks/device/libraries.py check "$CARRY/lib" --code "$PACK_CODE" 2> /dev/null ||
        "$PYTHON" benchmarks/device/libraries.py build "$CARRY/lib" --code "$PACK_CODE" || exit 3
    local what
    for what in "$@"; do archive "$what" || exit 3; done
    "$PYTHON" benchmarks/device/load.py
}

archive() {  # rtx, ort or ort-whole: fetched, made smaller, packed, cut; what is there already is not made again
    local name=${1%-whole} made scratch wheel
    case $1 in
        rtx) made="tensorrt-rtx-cu13 $RTX_VERSION" ;;
        ort) made="onnxruntime-gpu $ORT_VERSION $PACK_CODE $(sha256sum < benchmarks/slim_onnxruntime.py)" ;;
        ort-whole) made="onnxruntime-gpu $ORT_VERSION" ;;
        *) echo "pack knows ort, ort-whole and rtx, not $1."; exit 2 ;;
    esac
    made="$made for Python $PACK_PYTHON"
    [ "$(cat "$CARRY/base/$name.made" 2> /dev/null)" = "$made" ] && { echo "$name: packed already"; return 0; }
    scratch=$(mktemp -d)
    case $name in
        rtx) wheels "$scratch/w" "tensorrt-rtx-cu13-libs==$RTX_VERSION" "tensorrt-rtx-cu13-bindings==$RTX_VERSION" ;;
        ort) wheels "$scratch/w" "onnxruntime-gpu==$ORT_VERSION" ;;
    esac || return 1
    mkdir "$scratch/site"
    for wheel in "$scratch"/w/*.whl; do "$PYTHON" -m zipfile -e "$wheel" "$scratch/site" || return 1; done
    rm -rf "$scratch/w"
    [ "$1" != ort ] || slim "$scratch" || return 1
    rm -f "$CARRY/$name".* "$CARRY/base/$name".*
    echo "$name: packing, some minutes"
    tar -C "$scratch/site" -c . | xz --x86 --lzma2=preset=9e,dict=256MiB -T1 > "$scratch/$name.txz" || return 1
    split -n "$(($(stat -c %s "$scratch/$name.txz") / PART + 1))" -d -a 1 "$scratch/$name.txz" "$CARRY/$name."
    # Parts and sum travel with the base, so that a missing part is noticed.
    (cd "$scratch" && sha256sum "$name.txz") > "$CARRY/base/$name.sha256"
    (cd "$CARRY" && ls "$name".[0-9]) > "$CARRY/base/$name.parts"
    echo "$made" > "$CARRY/base/$name.made"
    rm -rf "$scratch"
}

slim() {  # a folder with site/ in it; zstandard is for this machine, and not in the product's environment
    "$PYTHON" -m pip install --quiet --target "$1/zstandard" zstandard &&
        PYTHONPATH="$1/zstandard" "$PYTHON" benchmarks/slim_onnxruntime.py "$1/site" --code "$PACK_CODE"
}

pydantic_core() {  # the one version the chosen pydantic takes
    unzip -p "$CARRY"/base/wheels/pydantic-*.whl '*/METADATA' |
        sed -n 's/^Requires-Dist: \(pydantic-core==[0-9.]*\).*/\1/p'
}

wheels() {  # folder, requirements: wheels for the machine, not for this one
    local folder=$1; shift
    local platforms=() n
    for n in _2_17 _2_24 _2_27 _2_28 _2_31 _2_34 _2_35 2014 1; do platforms+=(--platform "manylinux${n}_x86_64"); done
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
        --python-version "$PACK_PYTHON" "${platforms[@]}" -d "$folder" "$@"
}
