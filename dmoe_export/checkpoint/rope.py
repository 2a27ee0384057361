"""Rotary settings of config.json in the words of transformers 4 and 5: one reader, the same refusals for both.

4: `rope_theta`, `partial_rotary_factor` and `rope_scaling` (a block with `rope_type`, or `type`, that may be null).
5: all of it in the block `rope_parameters`, which models with several kinds of layers key by kind. Source:
`modeling_rope_utils.py` of transformers 4.57, 5.0 and 5.24. The plain kind, "default", is implemented, and where kinds
of layers differ "proportional": frequencies over the whole head, of which the first share turns.
"""

from __future__ import annotations

from .config_fields import Fields, shown

_BLOCKS = ("rope_scaling", "rope_parameters")


def read_rotary(f: Fields, head_dim: int, share: float | None = 1.0) -> tuple[float, int]:
    """Base θ and the number of rotated dims of a head, from its first on.

    `share`: the part of a head that is rotated where the file does not say it; None: it must say it. Raises
    CheckpointError for a missing θ, any kind of scaling, settings per kind of layer, and two values that differ.
    """
    blocks = [block for name in _BLOCKS if (block := _block(f, name)) is not None]
    theta = _one(f, blocks, "rope_theta", None)
    factor = _one(f, blocks, "partial_rotary_factor", share)
    if theta <= 0:
        raise f.refuse(f"rope_theta is {theta}, it must be positive")
    rotary = int(head_dim * factor)
    if not 0 < rotary <= head_dim or rotary % 2:
        raise f.refuse(f"rotary share of {rotary} dims is odd, empty or exceeds head_dim {head_dim}")
    return theta, rotary


def whole_heads(f: Fields, head_dim: int) -> tuple[float, int]:
    """The same for a family whose reference rotates all of a head, whatever partial_rotary_factor says."""
    theta, rotary = read_rotary(f, head_dim)
    if rotary != head_dim:
        raise f.refuse(f"rotary share of {rotary} dims is not supported (supported: the whole head of {head_dim})")
    return theta, rotary


def read_rotary_by_kind(f: Fields, head_dims: dict[str, int]) -> dict[str, tuple[float, int, bool]]:
    """Kind of layer → θ, rotated dims, and whether frequencies spread over the whole head, from `rope_parameters`.

    `head_dims`: every kind and its head size. Raises CheckpointError for a kind without settings, and for any other.
    """
    if not f.has(name := "rope_parameters"):
        raise f.missing(name)
    found, where = f.config[name], f"{f.prefix}{name}"
    if not isinstance(found, dict) or found.keys() != head_dims.keys():
        raise f.refuse(f"{where} is {shown(found)}, expected an object with {' and '.join(head_dims)}")
    return {kind: _of_kind(f, f"{where}.{kind}", found[kind], head_dim) for kind, head_dim in head_dims.items()}


def _of_kind(f: Fields, where: str, value: object, head_dim: int) -> tuple[float, int, bool]:
    if not isinstance(value, dict):
        raise f.refuse(f"{where} is {shown(value)}, expected an object")
    block = Fields(value, f.source, prefix=f"{where}.")
    kind = block.get("rope_type", str)
    if kind not in ("default", "proportional"):
        raise f.refuse(f"{where} is {shown(value)}: rotary scaling {shown(kind)} is not supported (supported: "
                       "'default', 'proportional')")
    theta, factor = block.get("rope_theta", float), block.get("partial_rotary_factor", float, 1.0)
    block.refuse_unread()
    rotary = 2 * int(head_dim * factor // 2)
    if theta <= 0 or not 0 < rotary <= head_dim or head_dim % 2 or (kind == "default" and rotary != head_dim):
        raise f.refuse(f"{where} is {shown(value)}, which asks for θ {theta} and {rotary} of a head's {head_dim} dims; "
                       "supported: θ above 0, and a share of an even head (all of it where rope_type is 'default')")
    return theta, rotary, kind == "proportional" and rotary != head_dim


def _block(f: Fields, name: str) -> Fields | None:
    """A block that asks for no scaling, or None where there is none; any other is refused by its kind."""
    if not f.has(name) or f.config[name] == {}:
        return None
    value = f.config[name]
    if not isinstance(value, dict):
        raise f.refuse(f"{name} is {shown(value)}, expected an object or null")
    keyed = [kind for kind, item in value.items() if isinstance(item, dict)]
    if keyed:
        raise f.refuse(f"{name} differs by kind of layer ({', '.join(map(str, keyed))}), which is not supported")
    block = Fields(value, f.source, prefix=f"{name}.")
    for kind in ("rope_type", "type"):
        if block.has(kind) and value[kind] != "default":
            raise f.refuse(f"{name} is {shown(value)}: rotary scaling {shown(value[kind])} is not supported "
                           "(supported: 'default')")
    if not block.asked & value.keys() and any(key not in ("rope_theta", "partial_rotary_factor") for key in value):
        raise f.refuse(f"{name} is {shown(value)}, which names no rope_type; write which one it is")
    block.asked |= {"rope_theta", "partial_rotary_factor"}
    block.refuse_unread()
    return block


def _one(f: Fields, blocks: list[Fields], name: str, default: float | None) -> float:
    """A number that may stand at the top and in the blocks; where it stands twice, it must be the same."""
    places = [place for place in (f, *blocks) if place.has(name)]
    if not places:
        return f.get(name, float, default)
    values = [place.get(name, float) for place in places]
    for place, value in zip(places, values, strict=True):
        if value != values[0]:
            raise f.refuse(f"{places[0].prefix}{name} is {values[0]}, but {place.prefix}{name} is {value}; keep one")
    return values[0]
