"""What the test workers share: made by the first that needs it, while the others wait."""

from __future__ import annotations

import fcntl
import inspect
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dmoe_export import export_checkpoint
from dmoe_export.bundle.reader import Bundle, open_bundle
from dmoe_export.checkpoint.synthetic import GEOMETRIES, write_synthetic
from dmoe_export.description import ModelDescription, RoutingDescription
from dmoe_export.weight_formats import WeightFormats


@contextmanager
def one_at_a_time(target: Path) -> Iterator[None]:
    """Keeps other processes that make `target` out."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def once(target: Path, make: Callable[[Path], Any]) -> Path:
    """`target`; `make` gets the path of a folder that takes its place when complete."""
    with one_at_a_time(target):
        if not target.exists():
            unfinished = target.with_name(f"{target.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(target)
    return target


def shared_checkpoint(folder: Path, name: str, seed: int = 0) -> Path:
    """A synthetic checkpoint of a named geometry; not to be changed."""
    return once(folder / f"{name}-{seed}", lambda target: write_synthetic(target, GEOMETRIES[name], seed=seed))


def shared_export(folder: Path, checkpoint: Path, **options: Any) -> Bundle:
    """`export_checkpoint` of a checkpoint that stays as it is, to a bundle that nobody changes: copy it first."""
    call = inspect.signature(export_checkpoint).bind(Path(checkpoint).resolve(), None, **options)
    call.apply_defaults()
    name = _name(sorted(call.arguments.items()))
    return open_bundle(once(folder / name, lambda target: export_checkpoint(checkpoint, target, **options)),
                       verify="sizes")


def shared_trace(folder: Path, trace: Callable[..., ir.Model], *arguments: Any) -> ir.Model:
    """`trace(*arguments)`, a graph whose weights carry no data; equal arguments are traced once.

    What no graph depends on does not count: why a routing was chosen, the settings that are inputs, what ends answers.
    """
    arguments = tuple(_inside(a) for a in arguments)
    return _shared_graph(folder / _name(arguments), lambda: trace(*arguments))


def shared_torch_graph(folder: Path, trace: Callable[..., ir.Model], graph: nn.Module, inputs: Any,
                       axes: Any) -> ir.Model:
    """`trace(graph, inputs, axes)`; modules of equal attributes, parameters and inputs are traced once."""
    usual = vars(nn.Module())
    modules = [(name, type(module).__qualname__, {key: _inside(value) for key, value in vars(module).items()
                                                  if key not in usual}) for name, module in graph.named_modules()]
    what = (type(graph).__qualname__, modules, _shapes(dict(graph.named_parameters())),
            _shapes(dict(graph.named_buffers())), _shapes(inputs), axes)
    assert " at 0x" not in repr(what)
    return _shared_graph(folder / _name(what), lambda: trace(graph, inputs, axes))


def _shapes(tensors: Any) -> Any:
    return tree_map(lambda x: (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x, tensors)


def _shared_graph(target: Path, trace: Callable[[], ir.Model]) -> ir.Model:
    def make(folder: Path) -> None:
        model = trace()
        for value in _weights(model):
            value.const_value = ir.ExternalTensor("none", 0, 0, value.dtype, shape=value.shape, name=value.name)
        folder.mkdir()
        ir.save(model, folder / "graph.onnx")

    model = ir.load(once(target, make) / "graph.onnx")
    for value in _weights(model):
        value.const_value = None
    return model


def _inside(value: Any) -> Any:
    """Without what no graph depends on."""
    return value.model_copy(update=_OUTSIDE[type(value)]) if type(value) in _OUTSIDE else value


_OUTSIDE: dict[type, dict[str, Any]] = {
    WeightFormats: {"reason": ""},
    RoutingDescription: {"reason": "", "top_p": 0.5, "min_experts": 1, "coreset_size": 1},
    ModelDescription: {"eos_ids": (0,), "pad_id": 0}}


def _weights(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.initializers.values()
            if value.const_value is None or isinstance(value.const_value, ir.ExternalTensor)]


def _name(what: Any) -> str:
    return sha256(repr(what).encode()).hexdigest()[:16]
