"""Predictions (predictions.json: estimates made without a GPU) beside what was measured.

    python benchmarks/gpu_outcome.py FOLDER

prints Markdown tables from the result files of a run in FOLDER, for docs/gpu.md and benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from gpu_findings import read_findings

PREDICTIONS = Path(__file__).with_name("predictions.json")
Range = tuple[float, float]


@cache
def predictions() -> dict[str, Any]:
    """The data file."""
    return json.loads(PREDICTIONS.read_text())


def _rows(part: str, device: str) -> list[dict[str, Any]]:
    """What is predicted for this GPU; `device` is its name as the driver gives it."""
    return [row for row in predictions()[part]["rows"] if row["gpu"] in device.split()]


def predicted_experts(device: str, result: dict[str, Any]) -> Range | None:
    """us of a result of gpu_kernels.measure_experts or measure_quantised."""
    about = predictions()["experts"]
    if any(result[name] != about[name] for name in ("hidden", "width", "tokens")):
        return None
    return next(((row["low"], row["high"]) for row in _rows("experts", device)
                 if result["type"] in row["types"] and result["active"] == row["active"]), None)


def predicted_route(device: str, experts: int, tokens: int) -> Range | None:
    """us of a routing call."""
    about = predictions()["route"]
    if (experts, tokens) != (about["experts"], about["tokens"]):
        return None
    return next(((row["low"], row["high"]) for row in _rows("route", device)), None)


def predicted_head(device: str, vocabulary: int, hidden: int, tokens: int) -> Range | None:
    """us of a call of the vocabulary head."""
    about = predictions()["head"]
    if (vocabulary, hidden, tokens) != (about["vocabulary"], about["hidden"], about["tokens"]):
        return None
    return next(((row["low"], row["high"]) for row in _rows("head", device)), None)


def predicted_step(device: str, run: dict[str, Any]) -> Range | None:
    """ms of a denoise step of gpu_generate with the smaller coreset; scaled to its layers, as predictions.json says."""
    about = predictions()["step"]
    if any(run[name] != about[name] for name in ("geometry", "precision")) or run["coreset"] != str(about["active"]):
        return None

    def scaled(row: dict[str, Any], bound: str) -> float:
        head = about["head"][row["gpu"]]
        return head + (row[bound] - head) * run["layers"] / about["layers"]

    return next(((scaled(row, "low"), scaled(row, "high")) for row in _rows("step", device)
                 if row["backend"] == run["backend"]), None)


def counted_placement(run: dict[str, Any]) -> dict[str, int] | None:
    """Nodes by provider of a gpu_generate run, as the real provider placed them on stubs of CUDA."""
    about = predictions()["counted"]
    ops = {"onnxruntime-cuda ops": "on", "onnxruntime-cuda bodies": "off"}.get(run["backend"].split(",")[0])
    if any(run[name] != about[name] for name in ("geometry", "precision")):
        return None
    wanted = ops, run["layers"]
    return next((row["placement"] for row in about["rows"] if (row["ops"], row["layers"]) == wanted), None)


def against(measured: float, predicted: Range | None) -> dict[str, Any]:
    """For a result: the range that was predicted, and the measured value over its middle; empty without one."""
    return {"predicted": list(predicted), "over_predicted": measured / (sum(predicted) / 2)} if predicted else {}


def said(measured: float, predicted: Range | None, unit: str) -> str:
    """The same in words, for a line of a table."""
    if not predicted:
        return ""
    low, high = predicted
    return (f"predicted {low:.3g} … {high:.3g}, measured {measured:.3g} {unit}, "
            f"ratio {measured / ((low + high) / 2):.2f}")


def _row(what: str, limit: str, measured: float, predicted: Range | None) -> str:
    expected = f"{predicted[0]:.3g} … {predicted[1]:.3g}" if predicted else "–"
    ratio = f"{measured / (sum(predicted) / 2):.2f}" if predicted else "–"
    return f"| {what} | {limit} | {expected} | {measured:.4g} | {ratio} |"


def kernels_table(result: dict[str, Any]) -> list[str]:
    """Of a gpu_kernels result: the experts op and routing, us."""
    device, copy = result["device"]["name"], result["copy"]["bytes_per_second"]
    lines = [f"{device}, {result['date'][:10]}: copy {copy / 1e12:.2f} TB/s; limit = bytes at that rate; µs", "",
             "| case | limit | predicted | measured | ratio |", "|---|---|---|---|---|"]
    for r in result["experts"]:
        expected = predicted_experts(device, r)
        if expected or (r["tokens"], r["hidden"]) == (32, 2048):
            lines.append(_row(f"experts {r['type']}, {r['active']} active", f"{r['expert_bytes'] / copy * 1e6:.1f}",
                              1e3 * r["ms"], expected))
    for r in result["route"]:
        if r["tokens"] == 32 and r["experts"] == 256:
            lines.append(_row(f"route {r['mode']}, 256 experts, 32 tokens", "–", 1e3 * r["ms"],
                              predicted_route(device, r["experts"], r["tokens"])))
    return lines


def generate_table(result: dict[str, Any]) -> list[str]:
    """Of a gpu_generate result: denoise steps, ms, and where the graph's nodes were."""
    device = result["device"]["name"]
    lines = [f"{device}, {result['date'][:10]}: ms of a denoise step", "",
             "| model, backend | nodes | predicted | measured | ratio |", "|---|---|---|---|---|"]
    for r in result["runs"]:
        what = f"{r['geometry']} {r['layers']} layers {r['precision']}, coreset {r['coreset']}, {r['backend']}"
        if "denoise_ms" not in r:  # no backend, a failure, or the profile, which has a table of its own
            why = r.get("missing") or r.get("broke") or f"{r['profile']['nodes_us']:.0f} us of nodes, each waited for"
            lines.append(f"| {what} | – | – | {why} | – |")
        else:
            nodes = " / ".join(str(count) for count in r.get("placement", {}).values()) or "–"
            lines.append(_row(what, nodes, r["denoise_ms"], predicted_step(device, r)))
    return lines


def smoke_table(findings: dict[str, Any]) -> list[str]:
    """Of gpu_smoke's lines, where a run got no further."""
    device = findings.get("device", {}).get("name", "unknown")
    lines = [f"{device}: the smoke run, µs", "", "| case | right | predicted | measured | ratio |",
             "|---|---|---|---|---|"]
    for name, value in findings.items():
        if name.startswith("smoke ") and isinstance(value, dict) and "ms" in value:
            expected = tuple(value["predicted"]) if "predicted" in value else None
            lines.append(_row(name.removeprefix("smoke "), str(value.get("right", "–")), 1e3 * value["ms"], expected))
    return lines if len(lines) > 4 else []


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    tables = [smoke_table(read_findings(folder))]
    tables += [kernels_table(json.loads(path.read_text())) for path in sorted(folder.glob("gpu_kernels_*.json"))]
    tables += [generate_table(json.loads(path.read_text())) for path in sorted(folder.glob("gpu_generate_*.json"))]
    if not any(tables):
        print(f"{folder} has no result of gpu_smoke, gpu_kernels or gpu_generate.", file=sys.stderr)
        raise SystemExit(1)
    print(f"Predictions of {predictions()['date']}, estimates made without a GPU, against the outcome.\n")
    print("\n\n".join("\n".join(lines) for lines in tables if lines))


if __name__ == "__main__":
    main()
