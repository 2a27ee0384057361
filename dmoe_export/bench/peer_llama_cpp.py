"""A peer from a package registry: llama.cpp on the CPU, through llama-cpp-python's C interface.

Its diffusion models (LLaDA, LLaDA-MoE, Dream) see all tokens and keep no cache: a forward is the whole text. Settings
are its defaults (memory-mapped file, weights repacked where it has better kernels, flash attention as it chooses), but
for threads and sizes.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.reader import Bundle
from ..errors import CheckError, MissingRequirementError, RequestError
from ..extras import pip_install
from ..runtime.backend import Bools, ForwardInputs, ForwardOutputs, Limits
from ..runtime.candidates import best_of

try:
    import gguf
    import llama_cpp
except (ImportError, OSError, RuntimeError) as _error:
    raise MissingRequirementError(f"The peer llama-cpp needs the packages llama-cpp-python and gguf ({_error}); "
                                  f"install them with: {pip_install('peer')}, or leave the peer out.") from None

TYPES = {"f32": llama_cpp.LLAMA_FTYPE_ALL_F32, "f16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
         "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
         "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "q4_k_s": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S}
"""File types by the name that people know them by."""

_log: list[str] = []


@llama_cpp.llama_log_callback
def _keep(level: int, text: bytes, data: Any) -> None:
    """Its messages, of which an error quotes the last."""
    _log.append(text.decode(errors="replace").strip())
    del _log[:-20]


llama_cpp.llama_log_set(_keep, ctypes.c_void_p(0))


def said() -> str:
    """The last thing that llama.cpp said."""
    return next((line for line in reversed(_log) if len(line) > 1), "nothing")


def version() -> str:
    """Of the package, with the instructions that its library was built for and finds here."""
    return f"llama-cpp-python {llama_cpp.__version__}; {llama_cpp.llama_print_system_info().decode().strip()}"


def quantise(source: Path, target: Path, kind: str, threads: int) -> None:
    """Make a file of another type from a float32 one, as llama.cpp's own program does, with its own mix of types."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = TYPES[kind], threads
    temporary = target.with_name(f".{target.name}.tmp")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(temporary).encode(), ctypes.byref(params)):
        raise CheckError(f"llama.cpp could not write {target.name} as {kind} ({said()}).")
    temporary.replace(target)


def bytes_by_type(path: Path) -> dict[str, int]:
    """Bytes of a file's tensors, by the name of their type."""
    found: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        name = tensor.tensor_type.name.lower()
        found[name] = found.get(name, 0) + int(tensor.n_bytes)
    return found


class LlamaCpp:
    """One model, with a context for every width that is asked for."""

    def __init__(self, path: Path, threads: int) -> None:
        """Raises CheckError for a file that llama.cpp does not take."""
        llama_cpp.llama_backend_init()
        self._threads = threads
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise CheckError(f"llama.cpp does not take {path.name} ({said()}).")
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._contexts: dict[tuple[int, bool], tuple[Any, Any]] = {}

    def logits(self, ids: Sequence[int], flash: bool = True) -> Any:
        """Logits [T, V] of all tokens (of fewer it computes none); valid until the next call of this width.

        `flash` False: attention in float32, where its flash attention rounds keys and values to float16.
        """
        tokens = len(ids)
        context, batch = self._contexts.get((tokens, flash)) or self._open(tokens, flash)
        batch.n_tokens = tokens
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, True
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        if llama_cpp.llama_decode(context, batch):
            raise CheckError(f"llama.cpp failed on {tokens} tokens ({said()}).")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (tokens, self._vocab))

    def _open(self, tokens: int, flash: bool) -> tuple[Any, Any]:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = tokens  # without causality a forward is never cut
        params.n_threads = params.n_threads_batch = self._threads
        if not flash:
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise CheckError(f"llama.cpp opens no context of {tokens} tokens ({said()}).")
        llama_cpp.llama_set_causal_attn(context, False)
        return self._contexts.setdefault((tokens, flash), (context, llama_cpp.llama_batch_init(tokens, 0, 1)))

    def close(self) -> None:
        """Give its memory back; may be called twice."""
        for context, batch in self._contexts.values():
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)
        self._contexts = {}
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._model = None


class _NoCache:
    """Nothing is kept: every forward sees all tokens."""

    def clear(self, rows: Sequence[int]) -> None:
        """There is nothing."""

    def part(self, rows: Sequence[int]) -> _NoCache:
        """The one row."""
        return self

    def leave(self, row: int, last: int) -> None:
        """There is one row."""

    def commit(self, inputs: ForwardInputs, outputs: ForwardOutputs, take: Bools,
               rows: Sequence[int] | None = None) -> None:
        """Never asked for, as decoding without a cache commits nothing."""
        raise RequestError("llama.cpp keeps no keys and values of diffusion models; use --cache none with it.")


class LlamaCppBackend:
    """llama.cpp behind the backend protocol, for one sequence and decoding without a cache."""

    name = "llama-cpp"
    opens_blocks = False
    limits: Limits | None = Limits(max_batch=1)

    def __init__(self, bundle: Bundle, path: Path, threads: int) -> None:
        """`path`: a GGUF file of the same weights."""
        self.description, self.routing = bundle.manifest.model, bundle.manifest.routing
        self.model = LlamaCpp(path, threads)
        self.seconds, self.forwards = 0.0, 0  # of its forwards alone, without choosing tokens

    def new_cache(self, rows: int) -> _NoCache:
        """Of one row."""
        return _NoCache()

    def close(self) -> None:
        """See `Backend`."""
        self.model.close()

    def forward(self, inputs: ForwardInputs, cache: _NoCache) -> ForwardOutputs:
        """One forward over the whole text, and the best token of every row but the mask."""
        import torch  # as fast here as llama.cpp's own sampling, or faster

        ids, d = inputs.input_ids[0], self.description
        if not np.array_equal(inputs.position_ids[0], np.arange(len(ids))):
            raise RequestError("llama.cpp keeps no keys and values of diffusion models; use --cache none with it.")
        start = time.perf_counter()
        logits = self.model.logits(ids.tolist())
        self.seconds += time.perf_counter() - start
        self.forwards += 1
        chosen = logits[inputs.logit_rows[0].clip(min=0)]  # a copy
        allowed = torch.from_numpy(chosen.copy() if inputs.want_logits or inputs.candidates else chosen)
        allowed[:, d.barred_id] = float("-inf")
        confidence, tokens = torch.softmax(allowed, dim=-1).max(dim=-1)
        experts = np.full((len(d.moe_layers), 1, len(ids), d.moe.experts_per_token if d.moe else 1), -1, np.int32)
        return ForwardOutputs(tokens.numpy()[None], confidence.numpy()[None], experts,
                              chosen[None] if inputs.want_logits else None, None,
                              best_of(chosen[None], d.barred_id, inputs.candidates) if inputs.candidates else None)
