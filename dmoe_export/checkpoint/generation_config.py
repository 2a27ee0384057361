"""generation_config.json: the ids that end an answer, and how the checkpoint wants to be decoded.

Meanings are those of transformers' `GenerationConfig` (4.57, 5.0) and, for Dream, of its `DreamGenerationConfig`
(generation_utils.py on the hub); models with a canvas have fields of their own (canvas_generation.py). Only what means
the same here is taken over: `max_new_tokens`, and `temperature`, `top_k`, `top_p` where `do_sample` is true (Dream:
where the temperature is above 0; it has no `do_sample`), but not where the file is the trunk's and the authors of the
model decode otherwise (SDAR: Qwen3's file; its published scores are greedy or of temperature 1, evaluation/ of
JetAstra/SDAR). Whatever else would change an answer is named in one warning; what is bookkeeping, or at transformers'
own default, is not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..description import ModelDescription
from .canvas_generation import canvas_defaults
from .config_fields import Fields, shown, token_ids
from .harmless_fields import GENERATION, words
from .json_file import read_json

NAME = "generation_config.json"
# Of no meaning for the tokens of one answer.
_QUIET = words("""_from_model_config transformers_version _commit_hash use_cache cache_implementation cache_config
    return_legacy_cache return_dict_in_generate output_attentions output_hidden_states output_scores output_logits
    output_history bos_token_id pad_token_id decoder_start_token_id disable_compile compile_config low_memory
    prefill_chunk_size num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    assistant_early_exit assistant_lookbehind target_lookbehind prompt_lookup_num_tokens max_matching_ngram_size
    early_stopping length_penalty remove_invalid_values renormalize_logits is_assistant trust_remote_code""")
# Transformers' defaults: written by older versions though nobody chose them.
_NEUTRAL: dict[str, Any] = {
    "max_length": 20, "min_length": 0, "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "typical_p": 1,
    "repetition_penalty": 1, "encoder_repetition_penalty": 1, "guidance_scale": 1}
_TOP_K = 50  # transformers' default while sampling
_OF_THE_TRUNK = {"sdar": "Qwen3", "sdar_moe": "Qwen3"}  # families whose sampling is the trunk's, and its name


@dataclass(frozen=True)
class GenerationConfig:
    """What a checkpoint says about generating; empty where it says nothing."""

    source: Path
    values: dict[str, Any] = field(default_factory=dict)

    def complete(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json with the EOS of this file, where it has none of its own; raises for ids that it cannot have."""
        if config.get("eos_token_id") is not None or not self._eos:
            return config
        vocab = config.get("vocab_size")
        for value in self._eos:
            if value < 0 or (isinstance(vocab, int) and value >= vocab):
                raise self._fields().refuse(f"eos_token_id {value} is outside the vocabulary of {vocab}")
        return config | {"eos_token_id": self._eos}

    def add_eos(self, description: ModelDescription) -> ModelDescription:
        """The description with this file's EOS ids behind its own; raises for ids that the model cannot have."""
        f = self._fields()
        for value in self._eos:
            if not 0 <= value < description.vocab_size:
                raise f.refuse(f"eos_token_id {value} is outside the vocabulary of {description.vocab_size}")
            if value == description.mask_id:
                raise f.refuse(f"eos_token_id {value} is config.json's mask, which cannot end an answer")
        if f.has("mask_token_id") and f.get("mask_token_id", int) != description.mask_id:
            raise f.refuse(f"mask_token_id is {self.values['mask_token_id']}, but config.json's is "
                           f"{description.mask_id}; keep one")
        ids = tuple(dict.fromkeys((*description.eos_ids, *self._eos)))
        return description.model_copy(update={"eos_ids": ids})

    def decode_defaults(self, d: ModelDescription) -> tuple[dict[str, int | float | bool | str], list[str]]:
        """Fields of DecodeSettings it sets, and sentences to warn with. Raises CheckpointError for bad values."""
        f = self._fields()
        found: dict[str, int | float | bool | str] = {}
        if f.has("max_new_tokens"):
            longest = f.positive("max_new_tokens")
            if longest < d.max_positions:
                found["max_new_tokens"] = longest
            else:  # no prompt would fit
                f.asked.remove("max_new_tokens")
        if d.canvas:
            return found | canvas_defaults(f, d), self._left_out(f)
        dream, sampled = d.family == "dream", f.get("do_sample", bool, False)
        temperature = f.get("temperature", float, 0.0 if dream else 1.0)
        top_k = f.get("top_k", int, 0 if dream or "top_k" in self.values else _TOP_K)  # null: off
        top_p = f.get("top_p", float, 1.0)
        for name, value, holds, rule in (("temperature", temperature, temperature >= 0, "0 or more"),
                                         ("top_k", top_k, top_k >= 0, "0 or more"),
                                         ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1")):
            if not holds:
                raise f.refuse(f"{name} is {value}, it must be {rule}")
        if not (temperature > 0 if dream else sampled):
            return found, self._left_out(f)
        if d.family not in _OF_THE_TRUNK:
            return found | {"temperature": temperature, "top_k": top_k, "top_p": top_p}, self._left_out(f)
        return found, [f"{self.source} asks for samples (temperature {temperature:g}, top_k {top_k}, top_p {top_p:g}): "
                       f"{_OF_THE_TRUNK[d.family]}'s settings, not those this model is evaluated with. The bundle "
                       f"decodes greedily; for samples ask for --temperature {temperature:g} --top-k {top_k} --top-p "
                       f"{top_p:g}.", *self._left_out(f)]

    def _left_out(self, f: Fields) -> list[str]:
        """One sentence about the fields that would change an answer and mean nothing here."""
        known = f.asked | _QUIET | {"eos_token_id", "mask_token_id"}
        left = [f"{name} {shown(value)}" for name, value in self.values.items()
                if value and name not in known and value != _NEUTRAL.get(name)]
        if not left:
            return []
        return [f"{self.source} sets {', '.join(left)}, which no request can have here and is not taken over, so "
                "answers can differ from those of transformers' generate."]

    @property
    def says_ends(self) -> bool:
        """Whether a file of its own says what ends an answer."""
        return self.source.name == NAME and bool(self._eos)

    @property
    def _eos(self) -> list[int]:
        return token_ids(self._fields(), "eos_token_id") if self.values.get("eos_token_id") is not None else []

    def _fields(self) -> Fields:
        return Fields(self.values, self.source)


def read_generation_config(folder: Path, config: dict[str, Any]) -> GenerationConfig:
    """The folder's generation_config.json; where it is absent, such fields of config.json count, as in transformers 4.

    Raises CheckpointError for a file that is no JSON object.
    """
    path = folder / NAME
    if path.exists():
        return GenerationConfig(path, read_json(path))
    return GenerationConfig(folder / "config.json", {n: v for n, v in config.items() if n in GENERATION})
