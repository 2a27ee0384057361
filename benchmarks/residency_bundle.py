"""A bundle of a published size with random weights, written without a checkpoint, for benchmarks of expert residency.

    python benchmarks/residency_bundle.py --distinct 8 --out BUNDLE

Weights are random but cheap: pieces of one pool at changing places. With `--distinct N`, layers past the Nth share disk
blocks with an earlier one (FICLONERANGE; the folder must lie on XFS or btrfs), so that 61 GB of experts fit a smaller
disk. Memory and reads are as for a whole file: the page cache knows files and offsets, not disk blocks.
The manifest's sha256 of the expert file is zeros: use the bundle with `--verify sizes`.
"""

from __future__ import annotations

import fcntl
import struct
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir

from dmoe_export import __version__
from dmoe_export.bundle.layout import ExpertLayer, ExpertsEntry
from dmoe_export.bundle.manifest import FileEntry, Manifest
from dmoe_export.bundle.origin import CheckpointEntry
from dmoe_export.bundle.writer import PAGE, BundleWriter
from dmoe_export.checkpoint.family import family_of
from dmoe_export.checkpoint.synthetic import GEOMETRIES
from dmoe_export.description import RoutingDescription
from dmoe_export.export.conversion import padded_width
from dmoe_export.export.exporter import GRAPH_FILE
from dmoe_export.export.graph_file import save_graph
from dmoe_export.export.trace import trace_denoiser
from dmoe_export.export.weights import DENSE_FILE, EXPERTS_FILE
from dmoe_export.weight_formats import WeightFormats

_FICLONERANGE = 0x4020940D
_POOL = np.random.default_rng(0).standard_normal(1 << 25, np.float32)  # 128 MiB


def _random(count: int, scale: float, place: int) -> bytes:
    start = place * 999_983 % (len(_POOL) // 2)
    return (np.resize(_POOL[start:start + min(count, len(_POOL) // 2)], count) * np.float32(scale)).tobytes()


@click.command()
@click.option("--geometry", default="llada2.0-mini", show_default=True)
@click.option("--layers", type=int, help="Of the model [all].")
@click.option("--distinct", type=int, default=10**6, help="MoE layers with disk blocks of their own [all].")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(geometry: str, layers: int | None, distinct: int, out: Path) -> None:
    """Write the bundle."""
    config = dict(GEOMETRIES[geometry])
    if layers:
        config["num_hidden_layers"] = layers
    d = family_of(config, Path("config.json")).describe(config, Path("config.json"))
    routing = RoutingDescription.default(d.moe, "top_p")
    width = padded_width(d.hidden_size, d.experts.expert_width, 4)
    model = trace_denoiser(d, routing, "fp32", WeightFormats.all_as("fp32", True), width)
    with BundleWriter(out) as writer:
        dense = writer.data_file(DENSE_FILE)
        for place, (name, value) in enumerate(model.graph.initializers.items()):
            if value.const_value is not None or (name.endswith((".gate_up", ".down")) and ".ffn." in name \
                    and ".shared" not in name and len(value.shape) == 3):
                continue
            shape = tuple(value.shape)
            count, offset = int(np.prod(shape)), dense.align(PAGE)
            if "norm" in name:
                dense.write(np.ones(count, np.float32).tobytes())
            else:
                dense.write(_random(count, 0.05 if "bias" in name else shape[-1] ** -0.5, place))
            value.const_value = ir.ExternalTensor(DENSE_FILE, offset, dense.offset - offset, ir.DataType.FLOAT,
                                                  shape=value.shape, name=name, base_dir=writer.folder)
        writer.finish_data_file(dense)
        slab = d.hidden_size * width * 4
        entry = _experts(model, writer, d.moe_layers, d.experts.num_experts, slab, d.hidden_size, width, distinct)
        graph = save_graph(model, writer, GRAPH_FILE)
        writer.seal(Manifest(
            created_by=f"dmoe-export {__version__} benchmark", model=d, routing=routing, precision="fp32",
            checkpoint=CheckpointEntry(identity="synthetic", layers_total=d.num_layers, source="synthetic",
                                       parts=["synthetic"]),
            denoiser=graph, salient=None, experts=entry, tokenizer=None, files=writer.entries, engines=[],
            decode_defaults={}, warnings=[]))


def _experts(model: ir.Model, writer: BundleWriter, layers: range, experts: int, slab: int, hidden: int, width: int,
             distinct: int) -> ExpertsEntry:
    path, entries, size = writer.folder / EXPERTS_FILE, [], 3 * slab * experts
    with path.open("w+b") as file:
        for i, layer in enumerate(layers):
            base = i * size
            if i < distinct:
                for e in range(experts):
                    gate_up = _random(slab // 2, hidden ** -0.5, 2 * (i * experts + e))
                    down = _random(slab // 4, width ** -0.5, 2 * (i * experts + e) + 1)
                    file.seek(base + e * 2 * slab)
                    file.write(gate_up)
                    file.seek(base + experts * 2 * slab + e * slab)
                    file.write(down)
                file.flush()
            else:
                fcntl.ioctl(file, _FICLONERANGE,
                            struct.pack("qQQQ", file.fileno(), i % distinct * size, size, base))
            for name, offset, length, shape in (
                    ("gate_up", base, 2 * slab * experts, (experts, 2 * width, hidden)),
                    ("down", base + 2 * slab * experts, slab * experts, (experts, hidden, width))):
                tensor = f"layers.{layer}.ffn.{name}"
                model.graph.initializers[tensor].const_value = ir.ExternalTensor(
                    EXPERTS_FILE, offset, length, ir.DataType.FLOAT, shape=ir.Shape(shape), name=tensor,
                    base_dir=writer.folder)
            entries.append(ExpertLayer(layer=layer, gate_up_offset=base, down_offset=base + 2 * slab * experts))
            click.echo(f"layer {layer}", err=True)
    writer.entries.append(FileEntry(path=EXPERTS_FILE, size=path.stat().st_size, sha256="0" * 64))
    return ExpertsEntry(file=EXPERTS_FILE, stored_width=width, gate_up_slab_bytes=2 * slab, down_slab_bytes=slab,
                        layers=entries)


if __name__ == "__main__":
    main()
