"""What our CPU kernels multiply weights with: `exact` in float32, `fast` in integers or bfloat16 where there are any.

`fast` rounds activations to what the instructions take (docs/quantisation.md says what that costs), so it is used where
it was asked for and nowhere else, and what ran is told: in an answer's statistics, by `inspect`, in benchmarks.
"""

from __future__ import annotations

import ctypes
from typing import Literal, get_args

from ...bundle.manifest import Manifest
from ...errors import MissingRequirementError, RequestError
from ..library import load
from . import library

Products = Literal["exact", "fast"]
PRODUCTS: tuple[Products, ...] = get_args(Products)
_NUMBERS = {"fp32": 0, "fp16": 1, "int8": 2, "int4": 3, "bf16": 4}  # dmoe::cpu::Format in plugins/cpu/experts.h
_PARTS = ("dense", "head", "experts")  # whose weights meet activations in products


def check_products(products: str) -> Products:
    """`products` itself; raises RequestError for what is none."""
    if not isinstance(products, str) or products not in PRODUCTS:
        raise RequestError(f"cpu_products is {products!r}, it must be one of {', '.join(PRODUCTS)}.")
    return products


def on_cpus_only(products: Products, backend: str) -> None:
    """Raise RequestError where fast products are asked of a backend that has none."""
    if products == "fast" and backend not in ("auto", "onnxruntime"):
        raise RequestError(f"Fast products are the CPU's and backend {backend} has none; choose --backend onnxruntime, "
                           "or leave --cpu-products out.")


def products_of(manifest: Manifest, products: Products) -> str:
    """What runs here, such as "float32" or "avx512-vnni int8 for int4, float32 for fp32".

    Where fast products were asked for and none are to be had, it says so.
    Raises MissingRequirementError where our kernels are not installed.
    """
    name_of = load(library.INSTALLED, "dmoe_cpu_products").dmoe_cpu_products
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.c_int32, ctypes.c_int32]
    stored = list(dict.fromkeys(part for name in _PARTS if (part := getattr(manifest.formats, name))))
    names = {part: name_of(_NUMBERS[part], products == "fast").decode() for part in stored}
    if len(set(names.values())) > 1:
        return ", ".join(f"{name} for {part}" for part, name in names.items())
    (name,) = set(names.values())
    if products == "fast" and name == "float32":
        return f"{name}: there are no faster ones for {' and '.join(stored)} here"
    return name


def told_products(manifest: Manifest) -> dict[str, str]:
    """For `inspect`: what each of `PRODUCTS` would run on here, or why nothing is known."""
    if not library.INSTALLED.is_file():
        return dict.fromkeys(PRODUCTS, "our CPU kernels are not installed")
    try:
        return {products: products_of(manifest, products) for products in PRODUCTS}
    except MissingRequirementError as error:
        return dict.fromkeys(PRODUCTS, str(error))
