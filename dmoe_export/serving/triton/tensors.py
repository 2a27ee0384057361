"""What goes through the Python backend: inputs of a request, outputs of an answer, whether they arrive whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from ...errors import MissingRequirementError
from ..errors import ApiError

MOST_BYTES = 2 << 20  # of an input, as of a body of `serve`
_SENT = [1, 2, 3]


def check_tensors() -> None:
    """Raise MissingRequirementError where tensors of the server arrive changed.

    The Python backend of Triton 2.51 was compiled for NumPy 1 and reads the strides of an array where NumPy 2 has
    others. Arrays over memory of the server go through it, and so does this one over a capsule.
    """
    sent = pb_utils.Tensor("sent", np.array(_SENT))
    arrived = pb_utils.Tensor.from_dlpack("arrived", sent.to_dlpack()).as_numpy().tolist()
    if arrived != _SENT:
        raise MissingRequirementError(
            f"NumPy {np.__version__} does not fit this server's Python backend: {_SENT} arrives as {arrived}; in the "
            "Python of the server, run: pip install 'numpy>=1.26,<2'.")


def inputs_of(request: Any) -> dict[str, Any]:
    """Of one request by name, as plain values: the server takes its memory back."""
    return {tensor.name(): _plain(tensor.name(), tensor.as_numpy()) for tensor in request.inputs()}


def _plain(name: str, array: Any) -> Any:
    if array.dtype == np.bool_:
        return bool(_one(name, array))
    if array.dtype != np.object_:
        return array
    content: bytes = _one(name, array)
    if len(content) > MOST_BYTES:
        raise ApiError(400, f"{name} has {len(content)} bytes, more than {MOST_BYTES}.", param=name)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ApiError(400, f"{name} is no text in UTF-8.", param=name) from None


def _one(name: str, array: Any) -> Any:
    if array.size != 1:
        raise ApiError(400, f"{name} has {array.size} values, it takes one.", param=name)
    return array.reshape(-1)[0]


def response(text: str, token_ids: list[int], finish_reason: str, prompt_tokens: int, new_tokens: int) -> Any:
    """An answer's part, or all of it."""
    return pb_utils.InferenceResponse([
        _texts("text_output", [text]), pb_utils.Tensor("output_ids", np.array(token_ids, np.int64)),
        _texts("finish_reason", [finish_reason]),
        pb_utils.Tensor("num_input_tokens", np.array([prompt_tokens], np.uint32)),
        pb_utils.Tensor("num_output_tokens", np.array([new_tokens], np.uint32))])


def _texts(name: str, texts: Iterable[str]) -> Any:
    return pb_utils.Tensor(name, np.array([text.encode() for text in texts], np.object_))


def failed(error: ApiError) -> Any:
    """An error as a response."""
    codes = pb_utils.TritonError
    code = {404: codes.NOT_FOUND, 429: codes.UNAVAILABLE, 499: codes.CANCELLED, 503: codes.UNAVAILABLE}.get(
        error.status_code, codes.INVALID_ARG if error.status_code < 500 else codes.INTERNAL)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(error.detail, code))
