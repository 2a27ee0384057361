"""What TensorRT's objects say about a network or an engine, in the words of manifest and plan."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..bundle.engine_entries import NetworkEntry
from ..bundle.graph_entries import TensorEntry
from .plan import Plan, PlanTensor, Range

_NAMES = {"FLOAT": "float", "HALF": "float16", "BF16": "bfloat16"}  # TensorRT's own words, where not only in case


def network_entry(network: Any, profiles: list[Any]) -> NetworkEntry:
    """A parsed network and the optimization profiles of its build, read back."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    open_ = [tensor.name for tensor in inputs if -1 in tuple(tensor.shape)]
    return NetworkEntry(
        inputs=[_entry(tensor) for tensor in inputs], outputs=[_entry(tensor) for tensor in outputs],
        profiles=[{name: [list(shape) for shape in profile.get_shape(name)] for name in open_} for profile in profiles],
        layers=dict(sorted(Counter(network.get_layer(i).type.name for i in range(network.num_layers)).items())))


def of_network(entry: NetworkEntry) -> Plan:
    """A network's entry as a plan; plugins, version, targets and library are not in it."""
    tensors = [PlanTensor(tensor.name, tensor.dtype, tuple(int(dim) for dim in tensor.shape), tensor in entry.inputs)
               for tensor in (*entry.inputs, *entry.outputs)]
    profiles = [{name: _range(shapes) for name, shapes in profile.items()} for profile in entry.profiles]
    return Plan([tensors] * len(profiles), profiles)


def of_engine(engine: Any) -> Plan:
    """A deserialised engine as a plan: inputs, outputs and profiles."""
    tensors = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        tensors.append(PlanTensor(name, _dtype(engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name)),
                                  engine.get_tensor_mode(name).name == "INPUT"))
    profiles = [{tensor.name: _range(engine.get_tensor_profile_shape(tensor.name, index)) for tensor in tensors
                 if tensor.is_input} for index in range(engine.num_optimization_profiles)]
    return Plan([tensors] * len(profiles), profiles)


def _entry(tensor: Any) -> TensorEntry:
    return TensorEntry(name=tensor.name, dtype=_dtype(tensor.dtype), shape=list(tensor.shape))


def _dtype(kind: Any) -> str:
    return _NAMES.get(kind.name, kind.name.lower())


def _range(shapes: Any) -> Range:
    least, usual, largest = (tuple(shape) for shape in shapes)
    return least, usual, largest
