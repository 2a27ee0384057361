"""config.json (and generation_config.json) as published, model by model, with what could be seen of each.

No model hub can be reached from where this was written. Files copied whole into public repositories are marked *seen*;
fields marked *derived* come from `../shared/spec/models.md`, from class defaults or from other files of the family.
"""

from __future__ import annotations

from typing import Any

_HUB_LLADA2 = {
    "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig", "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
    "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM"}

# Seen: inclusionAI/dFactory, configs/model_configs/llada2_mini/config.json and llada2_flash/config.json (the authors'
# training code). There model_type is llada2_moe_veomni; derived: llada2_moe, as on the hub (xllm's, SGLang's tests).
# LLaDA2.X files hold neither mask nor EOS: generate has them as defaults.
LLADA2_MINI: dict[str, Any] = {
    "architectures": ["LLaDA2MoeModelLM"], "attention_dropout": 0.0, "auto_map": _HUB_LLADA2, "num_hidden_layers": 20,
    "hidden_size": 2048, "intermediate_size": 5120, "first_k_dense_replace": 1, "hidden_act": "silu",
    "max_position_embeddings": 16384, "model_type": "llada2_moe", "moe_intermediate_size": 512, "norm_topk_prob": True,
    "num_experts_per_tok": 8, "norm_head": False, "num_attention_heads": 16, "num_experts": 256,
    "num_key_value_heads": 4, "rope_theta": 600000, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.52.3", "use_bias": False, "use_rmsnorm": True,
    "rms_norm_eps": 1e-06, "head_dim": 128, "num_shared_experts": 1, "use_cache": False, "use_qkv_bias": False,
    "embedding_dropout": 0.0, "norm_softmax": False, "output_dropout": 0.0, "vocab_size": 157184, "rotary_dim": 64,
    "using_split_qkv_in_self_attention": False, "router_dtype": "fp32", "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "score_function": "sigmoid",
    "initializer_range": 0.02, "max_window_layers": 28, "output_router_logits": False, "pad_token_id": 156892,
    "partial_rotary_factor": 0.5, "use_sliding_window": False}
LLADA2_FLASH = LLADA2_MINI | {
    "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 9216, "moe_intermediate_size": 1024,
    "num_attention_heads": 32}

# Seen: the fields a deployment log of LLaDA2.1-mini lists (layers to rotary, experts, sliding_window 4096 with
# use_sliding_window false, dtype, 32768 positions). Derived: the rest, from LLaDA2.0.
LLADA21_MINI = {name: value for name, value in LLADA2_MINI.items() if name != "torch_dtype"} | {
    "dtype": "bfloat16", "max_position_embeddings": 32768, "sliding_window": 4096, "use_qk_norm": True,
    "transformers_version": "4.57.1"}
# Derived: the same with flash's sizes and the fields of SGLang's `srt/models/llada2.py` for LLaDA2.2 (spec
# llada2_1_2_2.md): no limit by groups, a capacity per block, two control tokens.
LLADA22_FLASH = LLADA21_MINI | {
    "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 9216, "moe_intermediate_size": 1024,
    "num_attention_heads": 32, "n_group": None, "topk_group": None, "expert_capacity": 48, "block_size": 32,
    "delete_token_id": 156930, "split_token_id": 156931}

# Derived: dMoE-16B is LLaDA2.0-mini trained on (arXiv 2605.30876); core_threshold and mode as its code reads them, ids
# as in the recorded small model (tests/golden).
DMOE_16B = LLADA2_MINI | {
    "core_threshold": 0.6, "mode": "aggregate", "eos_token_id": 156892, "mask_token_id": 156895, "use_qk_norm": True}

# Seen: yinj66/support_basis, LLaDA-8B-Instruct-B&S-light/config.json (a copy of the hub's folder).
LLADA_8B: dict[str, Any] = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM",
                 "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 4096,
    "embedding_dropout": 0.0, "embedding_size": 126464, "eos_token_id": 126081, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
    "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "mask_token_id": 126336, "max_sequence_length": 4096, "mlp_hidden_size": 12288,
    "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": 32, "n_kv_heads": 32,
    "n_layers": 32, "pad_token_id": 126081, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05,
    "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False,
    "transformers_version": "4.46.3", "use_cache": False, "vocab_size": 126464, "weight_tying": False}

# Seen: the fields and defaults of DreamConfig (configuration_dream.py, vendored in several repositories), sizes in
# xllm-like loaders' tests, ids in a registry of checkpoints. Derived: transformers_version, full_attn_mask, use_mrope.
DREAM_7B: dict[str, Any] = {
    "architectures": ["DreamModel"], "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 151643, "eos_token_id": 151643, "full_attn_mask": True, "hidden_act": "silu", "hidden_size": 3584,
    "initializer_range": 0.02, "intermediate_size": 18944, "mask_token_id": 151666, "max_position_embeddings": 131072,
    "max_window_layers": 28, "model_type": "Dream", "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "pad_token_id": 151643, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 152064}
# Seen: monash-yann/dllm-research, models/Dream-7B-Instruct/generation_config.json (a copy of the hub's).
DREAM_7B_GENERATION: dict[str, Any] = {
    "_from_model_config": True, "alg": "origin", "alg_temp": None, "bos_token_id": 151643, "eos_token_id": 151643,
    "eps": 0.001, "mask_token_id": None, "output_history": False, "pad_token_id": 151643, "steps": 512,
    "temperature": 0.0, "top_k": None, "top_p": None, "transformers_version": "4.46.2"}

# Seen: fields and values of LLaDAMoEConfig as rewritten with the published values for defaults in a public repository,
# and of the hub's own class (names, placeholders for defaults). Derived: auto_map, versions, moe_layer_freq in full.
LLADA_MOE_7B: dict[str, Any] = {
    "architectures": ["LLaDAMoEModelLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_lladamoe.LLaDAConfig", "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM"},
    "clip_qkv": None, "dense_intermediate_size": 8192, "eos_token_id": 156892, "expert_intermediate_size": 1024,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "max_position_embeddings": 8192,
    "model_type": "llada", "moe_layer_freq": [1] * 16, "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax", "norm_topk_prob": None, "num_attention_heads": 16, "num_experts": 64,
    "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16, "output_router_logits": False,
    "pad_token_id": 156892, "partial_rotary_factor": 1, "qk_layernorm": True, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 50000, "routed_scaling_factor": 1, "router_aux_loss_coef": 0.01,
    "router_num_group": None, "router_topk_group": None, "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.53.2", "use_cache": False,
    "vocab_size": 157184}

# Seen: training/model/SDAR-4B-Chat and SDAR-8B-Chat of JetAstra/SDAR, models/SDAR-1dot7B-Chat of hxhcreate/DARE.
# Derived: auto_map, versions. Of 30B-A3B no file was seen: these are fields of Qwen3-30B-A3B, confirmed for layers,
# widths and experts by users of the checkpoint.
SDAR_1_7B: dict[str, Any] = {
    "architectures": ["SDARForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARModel",
                 "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
    "block_size": 4, "bos_token_id": 151643, "eos_token_id": 151643, "fuse_cross_entropy": True, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
    "mask_token_id": 151669, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "sdar",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "pad_token_id": 151643,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.52.4", "use_cache": False,
    "use_sliding_window": False, "vocab_size": 151936}
SDAR_4B = SDAR_1_7B | {"hidden_size": 2560, "intermediate_size": 9728, "max_window_layers": 36,
                       "num_attention_heads": 32, "num_hidden_layers": 36}
SDAR_8B = SDAR_4B | {"hidden_size": 4096, "intermediate_size": 12288, "block_size": None, "mask_token_id": None}
SDAR_30B_A3B = SDAR_1_7B | {
    "architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe", "auto_map": None, "fuse_cross_entropy": None,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False, "router_aux_loss_coef": 0.001, "block_size": None,
    "mask_token_id": None}
SDAR_GENERATION: dict[str, Any] = {
    "bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643], "pad_token_id": 151643,
    "temperature": 0.6, "top_k": 20, "top_p": 0.95, "transformers_version": "4.52.4"}

# Fields that transformers' own classes write: PretrainedConfig.to_dict of 4.46 and 4.57, PreTrainedConfig of 5.0.
TRANSFORMERS: dict[str, Any] = {
    "_name_or_path": "org/model", "_attn_implementation_autoset": True, "add_cross_attention": False,
    "bad_words_ids": None, "begin_suppress_tokens": None, "bos_token_id": None, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None, "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False,
    "dtype": "bfloat16", "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None, "finetuning_task": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False,
    "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20,
    "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1,
    "output_attentions": False, "output_hidden_states": False, "output_scores": False, "prefix": None,
    "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0,
    "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None, "suppress_tokens": None,
    "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False,
    "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torch_dtype": "bfloat16", "torchscript": False,
    "transformers_version": "4.57.1", "typical_p": 1.0, "use_bfloat16": False, "quantization_config": None,
    "gradient_checkpointing": True, "experts_implementation": "grouped_mm"}
