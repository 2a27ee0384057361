"""How a bundle routes: what the checkpoint was trained with, unless another mode is asked for."""

from __future__ import annotations

from ..checkpoint.config_fields import Fields
from ..checkpoint.family import Checkpoint
from ..description import RoutingDescription, RoutingMode
from ..errors import CheckpointError, InputError


def choose_routing(source: Checkpoint, mode: RoutingMode | None, block_length: int,
                   settings: dict[str, float | None]) -> tuple[RoutingDescription, list[str]]:
    """The routing of a bundle, and sentences to warn with. Raises CheckpointError, InputError."""
    moe = source.description.moe
    if block_length < 1:
        raise CheckpointError(f"Block length {block_length} is not positive; LLaDA2 models use 32.")
    if block_length > source.description.max_positions:
        raise CheckpointError(f"Block length {block_length} is more than the model's "
                              f"{source.description.max_positions} positions; LLaDA2 models use 32.")
    if moe is None:
        given = next((name for name, value in settings.items() if value is not None), None)
        if mode not in (None, "token") or given:
            what = f"routing {mode}" if mode not in (None, "token") else given
            raise InputError(f"{source.folder} is a dense model ({source.description.architecture}): it has no experts "
                             f"to route, so leave {what} out.")
        return RoutingDescription.default(None, block_length=block_length), []
    mode = mode or ("token" if source.description.attention == "full" else "top_p")
    threshold = Fields(source.config, source.folder / "config.json").get("core_threshold", float, 0.6)
    if not 0 <= threshold <= 1:
        raise CheckpointError(f"core_threshold {threshold} in {source.folder / 'config.json'} is outside 0 … 1.")
    base = RoutingDescription.default(moe, mode, block_length, threshold)
    chosen = {name: value for name, value in settings.items() if value is not None}
    for name, value in chosen.items():
        low, high = (0, 1) if name == "top_p" else (1, moe.num_experts)
        if not low <= value <= high:
            raise CheckpointError(f"{name} {value} is outside {low} … {high}.")
    return base.model_copy(update=chosen), []
