# shellcheck shell=bash
# How device_run.sh does its steps: each with a time limit, all of a call within $BUDGET seconds; what came of them goes
# to $OUT/steps.json after every step, so that a killed call leaves what it had.
BUDGET=${BUDGET:-540}
records=()
failed=0

# name, seconds, command. Its output goes to the log, the last $SHOWN lines of it to the screen.
# $PROOF: what its output must show. Tests that were all skipped end well, too, and prove nothing.
step() {
    local name=$1 limit=$2 left=$((BUDGET - SECONDS)) start=$SECONDS code=-1 state before; shift 2
    if ((left < 15)); then
        state="no time left"
    else
        ((limit > left)) && limit=$left
        echo "== $name, at most $limit s: $*" | tee -a "$OUT/log.txt"
        before=$(stat -c %s "$OUT/log.txt")
        timeout --kill-after=10 "$limit" "$@" >> "$OUT/log.txt" 2>&1 < /dev/null
        code=$?
        tail -c "+$((before + 1))" "$OUT/log.txt" | tail -n "${SHOWN:-6}" | cut -c -200
        case $code in
            0) state="done"; shows_proof "$before" || state="proved nothing" ;;
            3) state="cannot run here" ;;
            124 | 137) state="ran past $limit s" ;;
            *) state=failed ;;
        esac
    fi
    [ "$state" = "done" ] || failed=$((failed + 1))
    records+=("{\"step\": \"$name\", \"state\": \"$state\", \"exit\": $code, \"seconds\": $((SECONDS - start))}")
    (IFS=,; echo "[${records[*]}]") > "$OUT/steps.json"
    [ "$state" = "done" ]
}

shows_proof() {  # from where in the log
    [ -z "${PROOF:-}" ] || tail -c "+$(($1 + 1))" "$OUT/log.txt" | grep -cE "$PROOF" > /dev/null
}

# The table of steps, what was found against what was predicted, and whether everything may come back.
finish() {
    timeout 10 "$PYTHON" benchmarks/gpu_findings.py "$OUT" >> "$OUT/log.txt" 2>&1
    timeout 10 "$PYTHON" benchmarks/gpu_outcome.py "$OUT" 2>&1 | tee -a "$OUT/log.txt" | cut -c -160 | tail -n 60
    "$PYTHON" - "$OUT" <<'PY'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
print("-- steps")
for entry in json.loads((out / "steps.json").read_text()):
    print(f"{entry['step']:<18} {entry['state']:<16} {entry['seconds']:>4} s")
files = [path for path in out.rglob("*") if path.is_file()]
large = [path.name for path in files if path.stat().st_size > 16 << 20]
if len(files) > 8 or large:
    print(f"Not all results come back: {len(files)} files where 8 may; over 16 MiB: {large or 'none'}.")
PY
    ((failed == 0)) || echo "$failed of ${#records[@]} steps did not do what they are for; the log says why."
    return $((failed > 0))
}
