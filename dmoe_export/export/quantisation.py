"""What a precision asked for means: the type of everything, and how routed experts are stored."""

from __future__ import annotations

from typing import Any, get_args

from ..description import ExpertQuantisation, ExportPrecision, ModelDescription, Precision, QuantisedPrecision
from ..errors import InputError

_BITS = {"int8": 8, "int4": 4}
_GROUP_SIZES = (32, 64, 128)


def choose_precision(d: ModelDescription, precision: ExportPrecision, dense_precision: Precision | None,
                     group_size: int | None) -> tuple[Precision, ExpertQuantisation | None]:
    """The bundle's precision, and the experts' quantisation for int8 and int4; InputError for what makes no sense."""
    if precision not in get_args(QuantisedPrecision):
        given = [option for option, value in (("dense_precision", dense_precision), ("group_size", group_size))
                 if value is not None]
        if given:
            raise InputError(f"{given[0]} belongs to precision int8 or int4, and the precision is {precision}; leave "
                             "it out.")
        return precision, None  # type: ignore[return-value]
    if d.moe is None:
        raise InputError(f"The model is dense ({d.architecture}) and precision {precision} quantises routed experts "
                         "alone; use --precision fp16 or fp32.")
    if dense_precision not in (None, *get_args(Precision)):
        raise InputError(f"Dense precision {dense_precision!r} is not known; known: {', '.join(get_args(Precision))}.")
    fits = [size for size in _GROUP_SIZES if d.hidden_size % size == 0]
    size: Any = group_size or next((size for size in (64, 32) if size in fits), None)
    if size not in fits:
        known = f"use {' or '.join(map(str, fits))}" if fits else "no group size fits it; use --precision fp16"
        what = f"Group size {size} does" if size else "Groups of 32, 64 and 128 do"
        raise InputError(f"{what} not divide the hidden size {d.hidden_size}, or is not 32, 64 or 128; {known}.")
    return dense_precision or "fp32", ExpertQuantisation(bits=_BITS[precision], group_size=size)
