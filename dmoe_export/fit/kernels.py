"""What our CPU kernels keep per thread that calls them: plugins/cpu/experts.cpp, linear.cpp, attention.cpp."""

from __future__ import annotations

from ..bundle.manifest import Manifest
from ..runtime.cpu.products import Products
from .activations import FLOAT
from .work import Forward

_PANEL, _FEW = 32, 24  # tokens of a panel, and most of a product without one, with AVX-512; others pad less
_ROWS = 21  # unpacked rows beside a panel
_QUERIES = 32  # of a piece of attention


def kernel_bytes(manifest: Manifest, forward: Forward, products: Products, threads: int) -> int:
    """Scratch of the widest experts op, linear layer and attention of a forward."""
    d, moe, n, half = manifest.model, manifest.model.moe, forward.tokens, manifest.precision == "fp16"
    head_dim = max(width for _, width in d.cached_heads)
    dense = len(d.moe_layers) < d.num_layers or (moe is not None and moe.beside_dense)
    columns = max(d.hidden_size, d.num_heads * head_dim, d.dense_width if dense else 0, moe.shared_width if moe else 0)
    formats = manifest.formats
    linear = (-(-n // _PANEL) * _PANEL) * _token(columns, formats.dense, products, formats.group_size)
    if _narrows(formats.dense, products):
        linear += n * _token(columns, formats.dense, products, formats.group_size)
    if half:
        linear += FLOAT * n * columns
    each = FLOAT * (_ROWS * columns + 2 * _QUERIES * (forward.places + head_dim)
                    + (2 * forward.places * head_dim if half else 0))
    return linear + _experts(manifest, n, products, half) + threads * each


def _experts(manifest: Manifest, tokens: int, products: Products, half: bool) -> int:
    """Pairs of token and expert: activated values, results, and both as products want them."""
    d, moe, entry = manifest.model, manifest.model.moe, manifest.experts
    if moe is None or entry is None:
        return 0
    formats, width = manifest.formats, entry.stored_width
    stored, group = formats.experts or manifest.precision, formats.group_size
    hidden, inner = (_token(size, stored, products, group) for size in (d.hidden_size, width))
    pairs = tokens * moe.experts_per_token
    packed = pairs + min(moe.num_experts, pairs // (2 * _FEW)) * _PANEL // 2  # rounded up by half a panel each
    total = FLOAT * pairs * (width + d.hidden_size) + packed * max(hidden, inner)
    if _narrows(stored, products):
        total += pairs * inner + tokens * hidden
    return total + (2 * FLOAT * tokens * d.hidden_size if half else 0)


def _narrows(stored: str, products: Products) -> bool:
    """Whether activations are copied for a product: rounded, or in int4's order."""
    return stored == "int4" or (products == "fast" and stored in ("int8", "bf16"))


def _token(columns: int, stored: str, products: Products, group: int | None) -> int:
    """Bytes of a token as a product wants it."""
    if products == "fast" and stored in ("int8", "int4"):
        return columns + 8 * (columns // (group or 32)) + 64
    return 2 * columns + 64 if products == "fast" and stored == "bf16" else FLOAT * columns
