"""Fields of config.json that change no number of the forward here, in groups by the reason why.

Sources: `PretrainedConfig` of transformers 4.46, 4.57 and 5.0 (its own fields), and published config.json files. Fields
that change the forward when they are set (`is_encoder_decoder`, `pruned_heads`, `add_cross_attention`, …) are left out
on purpose: unset they say nothing, set they are refused.
"""

from __future__ import annotations


def words(text: str) -> frozenset[str]:
    """Names that a text lists."""
    return frozenset(text.split())


_GROUPS = {
    "who wrote it": """architectures model_type auto_map transformers_version _name_or_path name_or_path _commit_hash
        _from_model_config custom_pipelines torch_dtype dtype precision transformers_weights
        unsloth_fixed unsloth_version""",
    "how it is computed, not what": """_attn_implementation attn_implementation _attn_implementation_autoset
        _attn_implementation_internal _experts_implementation experts_implementation use_cache use_bfloat16 torchscript
        tf_legacy_loss gradient_checkpointing chunk_size_feed_forward flash_attention use_flash_attn
        low_cpu_mem_usage pretraining_tp base_model_tp_plan fuse_cross_entropy cache_implementation""",
    "what the call returns": """output_attentions output_hidden_states return_dict use_return_dict
        output_router_logits return_dict_in_generate output_scores""",
    "training": """attention_dropout embedding_dropout output_dropout residual_dropout hidden_dropout
        classifier_dropout router_aux_loss_coef aux_loss_alpha router_z_loss_coef train_max_sequence_length""",
    "first values of weights": "initializer_range init_device init_fn init_std init_cutoff_factor",
    "heads of other tasks": """id2label label2id num_labels problem_type finetuning_task task_specific_params""",
    "text, read from the tokenizer's files": """tokenizer_class prefix bos_token_id sep_token_id
        decoder_start_token_id""",
    "storage of weights, read with them": "quantization_config",
}
GENERATION = words("""max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size encoder_repetition_penalty
    bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens renormalize_logits penalty_alpha
    guidance_scale""")
"""How to generate: transformers 4 writes such fields into config.json, too (`generation_config.py` reads them)."""

HARMLESS = GENERATION.union(*map(words, _GROUPS.values()))
