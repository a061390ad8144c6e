"""The zoo: architectures that generate text. Tiny configurations, without dropout."""

from __future__ import annotations

from collections.abc import Mapping

from zoo_entry import EXPERTS, GROUPED, NO_DROPOUT, SIZES, VOCABULARY, Entry

_ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MAMBA = {"state_size": 8, "time_step_rank": 4, "expand": 2}
_HEADS = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
_LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
_LATENT = {
    **SIZES, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
_NO_PDROP = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
_OLD = {
    "n_layer": 4, "n_embd": 32, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 32, "bos_token_id": 1,
    "eos_token_id": 2, **_NO_PDROP,
}  # fmt: skip
_WINDOW = {"head_dim": 8, "sliding_window": 5}

TEXT: Mapping[str, Entry] = {
    "GPT-2": Entry("GPT2LMHeadModel", _OLD),
    "Llama": Entry("LlamaForCausalLM", GROUPED),
    "Mistral": Entry("MistralForCausalLM", {**GROUPED, "sliding_window": 5}),
    "Mixtral": Entry("MixtralForCausalLM", {**GROUPED, **_ROUTED, "output_router_logits": True}),
    "Qwen2": Entry("Qwen2ForCausalLM", GROUPED),
    "Qwen2-MoE": Entry(
        "Qwen2MoeForCausalLM",
        {**GROUPED, **EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "Qwen3": Entry("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}, "padded"),
    "Qwen3-MoE": Entry(
        "Qwen3MoeForCausalLM",
        {**GROUPED, **EXPERTS, "head_dim": 8, "moe_intermediate_size": 16, "norm_topk_prob": True},
    ),
    "Qwen3-Next": Entry(
        "Qwen3NextForCausalLM",
        {**GROUPED, **_LINEAR, **EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "Qwen3.5": Entry("Qwen3_5ForCausalLM", {**GROUPED, **_LINEAR}),
    "Gemma": Entry("GemmaForCausalLM", {**GROUPED, "head_dim": 8}),
    "Gemma 2": Entry("Gemma2ForCausalLM", {**GROUPED, **_WINDOW}),
    "Gemma 3": Entry("Gemma3ForCausalLM", {**GROUPED, **_WINDOW}),
    "Gemma 3n": Entry(
        "Gemma3nForCausalLM",
        {
            **GROUPED, **_WINDOW, "intermediate_size": [48] * 4, "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        },
        is_eval=True,  # while it trains it writes to its own parameters: altup_coef_clip, which takes no None
    ),
    "Phi": Entry("PhiForCausalLM", {**GROUPED, "max_position_embeddings": 32}),
    "Phi-3": Entry("Phi3ForCausalLM", GROUPED),
    "Phi-MoE": Entry("PhimoeForCausalLM", {**GROUPED, **_ROUTED}, is_eval=True),
    "Falcon": Entry("FalconForCausalLM", {**SIZES, "alibi": True}),
    "BLOOM": Entry("BloomForCausalLM", {**SIZES, "n_layer": 4, "n_head": 4}, "padded"),
    "OPT": Entry(
        "OPTForCausalLM",
        {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 32, "dropout": 0.0},
        "padded",
    ),
    "GPT-NeoX": Entry("GPTNeoXForCausalLM", SIZES, "padded"),
    "GPT-J": Entry("GPTJForCausalLM", {**_OLD, "rotary_dim": 4}),
    "CodeGen": Entry("CodeGenForCausalLM", {**_OLD, "rotary_dim": 4, "n_ctx": 32}),
    "StableLM": Entry("StableLmForCausalLM", GROUPED),
    "StarCoder2": Entry(
        "Starcoder2ForCausalLM", {**GROUPED, "residual_dropout": 0.0, "embedding_dropout": 0.0, "sliding_window": 5}
    ),
    "OLMo": Entry("OlmoForCausalLM", GROUPED),
    "OLMo 2": Entry("Olmo2ForCausalLM", GROUPED),
    "OLMo 3": Entry("Olmo3ForCausalLM", {**GROUPED, "sliding_window": 5}),
    "OLMoE": Entry("OlmoeForCausalLM", {**GROUPED, **EXPERTS, "output_router_logits": True}, "padded"),
    "Cohere": Entry("CohereForCausalLM", GROUPED),
    "Cohere 2": Entry("Cohere2ForCausalLM", {**GROUPED, "sliding_window": 5}),
    "DeepSeek-V2": Entry("DeepseekV2ForCausalLM", {**_LATENT, "topk_method": "greedy"}),
    "DeepSeek-V3": Entry("DeepseekV3ForCausalLM", _LATENT),
    "GLM": Entry("GlmForCausalLM", {**GROUPED, "head_dim": 8}),
    "GLM-4": Entry("Glm4ForCausalLM", {**GROUPED, "head_dim": 8}),
    "Granite": Entry("GraniteForCausalLM", {**GROUPED, "residual_multiplier": 0.5}),
    "Granite-MoE": Entry("GraniteMoeForCausalLM", {**GROUPED, **_ROUTED}),
    "Granite hybrid": Entry(
        "GraniteMoeHybridForCausalLM",
        {**GROUPED, **_ROUTED, **_HEADS, "shared_intermediate_size": 16, "layer_types": ["mamba", "attention"] * 2},
    ),
    "Jamba": Entry(
        "JambaForCausalLM",
        {
            **GROUPED, **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "Mamba": Entry("MambaForCausalLM", {**SIZES, **_MAMBA}),
    "Mamba-2": Entry(
        "Mamba2ForCausalLM",
        {**SIZES, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4, "expand": 2},
    ),
    "FalconMamba": Entry("FalconMambaForCausalLM", {**SIZES, **_MAMBA}),
    "Falcon-H1": Entry("FalconH1ForCausalLM", {**GROUPED, **_HEADS, "mamba_d_ssm": 64}),
    "RecurrentGemma": Entry(
        "RecurrentGemmaForCausalLM", {**SIZES, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 5}
    ),
    "RWKV": Entry("RwkvForCausalLM", {**SIZES, "attention_hidden_size": 32, "context_length": 32}),
    "MPT": Entry(
        "MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 32, "vocab_size": VOCABULARY}
    ),
    "XGLM": Entry(
        "XGLMForCausalLM",
        {
            "vocab_size": VOCABULARY, "max_position_embeddings": 32, "d_model": 32, "ffn_dim": 48, "num_layers": 4,
            "attention_heads": 4, "dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0,
        },
        "padded",
    ),
    "BioGPT": Entry(
        "BioGptForCausalLM",
        {**SIZES, **NO_DROPOUT, "layerdrop": 0.0, "max_position_embeddings": 32},
        "padded",
    ),
    "Persimmon": Entry("PersimmonForCausalLM", SIZES),
    "Nemotron": Entry("NemotronForCausalLM", GROUPED),
    "JetMoE": Entry("JetMoeForCausalLM", {**SIZES, **_ROUTED, "num_key_value_heads": 2, "kv_channels": 8}),
    "DBRX": Entry(
        "DbrxForCausalLM",
        {
            "d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 32, "vocab_size": VOCABULARY,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "SmolLM3": Entry("SmolLM3ForCausalLM", GROUPED),
    "ERNIE 4.5": Entry("Ernie4_5ForCausalLM", {**GROUPED, "head_dim": 8}),
    "gpt-oss": Entry("GptOssForCausalLM", {**GROUPED, **_WINDOW, **_ROUTED}),
    "Llama 4": Entry(
        "Llama4ForCausalLM",
        {**GROUPED, "num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
    ),
    "Bamba": Entry("BambaForCausalLM", {**GROUPED, **_HEADS, "attn_layer_indices": [1, 3]}),
}  # fmt: skip
"""Entries by name."""
