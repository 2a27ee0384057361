"""How a checkpoint says that its weights are quantised: `quantization_config` of config.json, or a file beside it.

Read are the ways in which published checkpoints are mostly stored; every other is refused by its name. What they mean
is in `dequantise.py`; which tensors belong together in `quantised_reader.py`.

Sources: transformers `utils/quantization_config.py` (FineGrainedFP8Config, GPTQConfig, AwqConfig); compressed-tensors
`quantization/quant_config.py` and `quant_args.py`; AutoGPTQ and GPTQModel `quantize_config.json`; AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .config_fields import MOST_SHOWN, shown
from .json_file import read_json

Block = tuple[int | None, int | None]
"""Rows and columns that share a scale; None: all of them."""

_TENSOR, _CHANNEL = (None, None), (1, None)
_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# Fields of float8 that do not say what a scale means, and those that are read.
_FP8_FIELDS = """quant_method method fmt weight_block_size activation_scheme modules_to_not_convert ignored_layers
    scale_fmt dequantize"""
_COMPRESSED_FIELDS = """quant_method config_groups format quantization_status kv_cache_scheme sparsity_config ignore
    global_compression_ratio version"""
_WEIGHTS_FIELDS = """num_bits type symmetric strategy group_size block_structure dynamic observer observer_kwargs
    scale_dtype zp_dtype"""
_KNOWN = "fp8, compressed-tensors in float8, gptq, awq"


@dataclass(frozen=True)
class Float8:
    """F8_E4M3 weights [N, K] (or [E, N, K]), each with a scale to multiply with."""

    method: str
    blocks: tuple[Block, ...]  # what may share a scale, told apart by the scale's shape
    suffixes: tuple[str, ...]  # of the scale's name, after the weight's


@dataclass(frozen=True)
class PackedIntegers:
    """Unsigned integers of `bits` in int32 words, each group of `group` inputs with a scale and a zero point."""

    method: str
    bits: int
    group: int | None  # None: all inputs
    zero_offset: int  # added to stored zero points
    reordered: bool  # groups may lie in any order (desc_act): g_idx is needed


Storage = Float8 | PackedIntegers


def read_storage(folder: Path, config: dict[str, Any]) -> Storage | None:
    """What the checkpoint says of its storage; None: nothing is quantised. Raises CheckpointError for what is not read.
    """
    stated = config.get("quantization_config")
    found = [] if stated is None else [(f"quantization_config of {folder / 'config.json'}", stated)]
    found += [(str(folder / name), read_json(folder / name)) for name in _FILES if (folder / name).exists()]
    if not found:
        return None
    readings = [(where, _parse(fields, where)) for where, fields in found]
    for where, other in readings[1:]:
        if other != readings[0][1]:
            raise CheckpointError(f"{where} contradicts {readings[0][0]}; remove the one that is not of these weights.")
    return readings[0][1]


def _parse(fields: Any, where: str) -> Storage:
    if not isinstance(fields, dict):
        raise CheckpointError(f"{where} is {shown(fields)}, expected an object; fetch the file again.")
    if "quant_method" not in fields and "w_bit" in fields:  # AutoAWQ's own names
        fields = {"quant_method": "awq", "bits": fields["w_bit"], "group_size": fields.get("q_group_size"), **fields}
    default = "gptq" if "bits" in fields and "group_size" in fields else _foreign(fields)
    method = _agreed(fields, where, ("quant_method", "method"), default)
    parsers: dict[str, Callable[[dict[str, Any], str], Storage]] = {
        "fp8": _fp8, "compressed-tensors": _compressed, "gptq": _gptq, "awq": _awq}
    parse = parsers.get(method)
    if parse is None:
        raise CheckpointError(f"{where} says that weights are quantised by {method[:MOST_SHOWN]}, which is not read "
                              f"(read are {_KNOWN}); take a checkpoint in float, or in one of these.")
    return parse(fields, where)


def _foreign(fields: dict[str, Any]) -> str:
    """A name for a config that has no quant_method."""
    if fields.get("load_in_8bit") or fields.get("load_in_4bit"):
        return "bitsandbytes"
    inner = fields.get("quantization", fields)  # NVIDIA's ModelOpt
    algorithm = inner.get("quant_algo") if isinstance(inner, dict) else None
    return f"ModelOpt's {algorithm}" if algorithm else "a method without a name"


def _refuse(where: str, field: str, value: Any, known: str) -> CheckpointError:
    return CheckpointError(f"{where} has {field} {shown(value)}, which is not read (read is {known}); take a "
                           "checkpoint in float, or one that is stored so.")


def _refuse_unknown(fields: dict[str, Any], where: str, known: str) -> None:
    """A field that is not known might say what a scale means (GPTQModel's fp8 divides by its scales, and says so)."""
    for name, value in fields.items():
        if value not in (None, False, {}, []) and name not in known.split():
            raise CheckpointError(f"{where} has the field {name} {shown(value)}, which is not known, so scales could "
                                  "mean something else; remove it if it does not matter.")


def _agreed(fields: dict[str, Any], where: str, names: tuple[str, ...], default: str) -> str:
    """A value that goes by several names: GPTQModel writes two of each, and newer readers ask for the other one."""
    values = {name: str(fields[name]).lower() for name in names if fields.get(name) is not None}
    if len(set(values.values())) > 1:
        said = " and ".join(f"{name} {value}" for name, value in values.items())
        raise CheckpointError(f"{where} has both {said}; keep the one that is right.")
    return next(iter(values.values()), default)


def _only(fields: dict[str, Any], where: str, name: str, known: tuple[Any, ...]) -> Any:
    """A field's value, which must be one of `known`, the first where it is absent."""
    value = fields.get(name, known[0])
    value = value.lower() if isinstance(value, str) else value
    if not any(value == k and type(value) is type(k) for k in known):  # True and 4.0 are no 1 and 4
        raise _refuse(where, name, value, " or ".join(map(str, known)))
    return value


def _size(value: Any, where: str, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise _refuse(where, name, value, "a positive number")
    return value


def _fp8(fields: dict[str, Any], where: str) -> Float8:
    _refuse_unknown(fields, where, _FP8_FIELDS)
    _only(fields, where, "fmt", ("e4m3", "float8_e4m3fn"))
    size = fields.get("weight_block_size")
    blocks = (_TENSOR, _CHANNEL) if size is None else (_pair(size, where, "weight_block_size"),)
    return Float8("fp8", blocks, ("_scale_inv", "_scale"))


def _pair(size: Any, where: str, name: str) -> Block:
    if not isinstance(size, list) or len(size) != 2:
        raise _refuse(where, name, size, "a list of two numbers")
    return _size(size[0], where, name), _size(size[1], where, name)


def _compressed(fields: dict[str, Any], where: str) -> Float8:
    _refuse_unknown(fields, where, _COMPRESSED_FIELDS)
    groups = fields.get("config_groups")
    _only(fields, where, "quantization_status", ("compressed", "frozen"))
    if fields.get("kv_cache_scheme") is not None:
        raise _refuse(where, "kv_cache_scheme", fields["kv_cache_scheme"], "none")
    sparsity = fields.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense"):
        raise _refuse(where, "sparsity_config", sparsity, "none")
    if not isinstance(groups, dict) or not groups:
        raise _refuse(where, "config_groups", groups, "groups of float8 weights")
    blocks: list[Block] = []
    for group in groups.values():
        layout = group.get("format") or fields.get("format") if isinstance(group, dict) else group
        if layout not in ("float-quantized", "naive-quantized"):
            raise _refuse(where, "format", layout, "float-quantized")
        weights = group.get("weights")
        if not isinstance(weights, dict) or (weights.get("type"), weights.get("num_bits")) != ("float", 8):
            raise _refuse(where, "weights", weights, "float of 8 bits")
        _refuse_unknown(weights, where, _WEIGHTS_FIELDS)
        _only(weights, where, "symmetric", (True,))
        blocks.append(_strategy(weights, where))
    return Float8("compressed-tensors", tuple(dict.fromkeys(blocks)), ("_scale",))


def _strategy(weights: dict[str, Any], where: str) -> Block:
    strategy = weights.get("strategy")
    if strategy == "block":
        return _pair(weights.get("block_structure"), where, "block_structure")
    if strategy == "group":
        return 1, _size(weights.get("group_size"), where, "group_size")
    known: dict[Any, Block] = {"tensor": _TENSOR, "channel": _CHANNEL}
    if strategy not in known:
        raise _refuse(where, "strategy", strategy, "tensor, channel, block or group")
    return known[strategy]


def _group_size(fields: dict[str, Any], where: str) -> int | None:
    value = fields.get("group_size")
    return None if value == -1 and not isinstance(value, bool) else _size(value, where, "group_size")


def _gptq(fields: dict[str, Any], where: str) -> PackedIntegers:
    bits = _only(fields, where, "bits", (4, 8)) if "bits" in fields else _size(None, where, "bits")
    layout = _layout(fields, where, "gptq", ("gptq", "gptq_v2"))
    _only(fields, where, "pack_dtype", ("int32", "torch.int32"))
    exceptions = fields.get("dynamic") or {}
    if not isinstance(exceptions, dict) or not all(name.startswith("-") for name in exceptions):
        raise _refuse(where, "dynamic", exceptions, "one width for all modules")  # left-out ones are stored as floats
    for name in ("rotation", "is_marlin_format"):  # weights for rotated activations, or in another order
        if fields.get(name):
            raise _refuse(where, name, fields[name], "none")
    reordered = _only(fields, where, "desc_act", (False, True))
    # v1 stores zero points less one: GPTQ-for-LLaMa's choice, kept by AutoGPTQ.
    return PackedIntegers("gptq", bits, _group_size(fields, where), int(layout == "gptq"), reordered)


def _layout(fields: dict[str, Any], where: str, default: str, known: tuple[str, ...]) -> str:
    layout = _agreed(fields, where, ("checkpoint_format", "format", "version"), default)
    if layout not in known:
        raise _refuse(where, "checkpoint_format", layout, " or ".join(known))
    return layout


def _awq(fields: dict[str, Any], where: str) -> PackedIntegers:
    if "bits" not in fields:
        raise _refuse(where, "bits", None, "4")
    _only(fields, where, "bits", (4,))
    _layout(fields, where, "gemm", ("gemm",))
    if fields.get("backend") == "llm-awq":  # words along the other axis
        raise _refuse(where, "backend", "llm-awq", "autoawq")
    return PackedIntegers("awq", 4, _group_size(fields, where), 0, False)
