"""The zoo: encoders, pairs of encoder and decoder, vision, speech, and vision with language. Tiny configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo_entry import GROUPED, IMAGE, NO_DROPOUT, PICTURE, SIDES, SIZES, VOCABULARY, Entry

_ENCODER = {**SIZES, **NO_DROPOUT, "max_position_embeddings": 32}
_T5 = {
    "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 3, "num_heads": 4, "vocab_size": VOCABULARY, "dropout_rate": 0.0,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_BART = {**SIDES, **_SPECIAL}

ENCODERS: Mapping[str, Entry] = {
    "BERT": Entry("BertForMaskedLM", _ENCODER, "padded"),
    "RoBERTa": Entry("RobertaForMaskedLM", {**_ENCODER, "pad_token_id": 0}, "padded"),
    "DistilBERT": Entry(
        "DistilBertForMaskedLM",
        {
            "dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4, "vocab_size": VOCABULARY, "dropout": 0.0,
            "attention_dropout": 0.0, "max_position_embeddings": 32,
        },
        "padded",
    ),
    "ALBERT": Entry("AlbertForMaskedLM", {**_ENCODER, "embedding_size": 16}, "padded"),
    "ELECTRA": Entry("ElectraForMaskedLM", {**_ENCODER, "embedding_size": 16}, "padded"),
    "DeBERTa-v2": Entry(
        "DebertaV2ForMaskedLM",
        {**_ENCODER, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
        "padded",
    ),
    "ModernBERT": Entry(
        "ModernBertForMaskedLM", {**SIZES, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2}, "padded"
    ),
    "MPNet": Entry("MPNetForMaskedLM", _ENCODER, "padded"),
    "Longformer": Entry("LongformerForMaskedLM", {**_ENCODER, "attention_window": [4] * 4}, "padded"),
    "BigBird": Entry("BigBirdForMaskedLM", {**_ENCODER, "attention_type": "original_full"}, "padded"),
    "FNet": Entry("FNetForMaskedLM", {**_ENCODER, "use_tpu_fourier_optimizations": False}),
    "Funnel": Entry(
        "FunnelForMaskedLM",
        {
            "vocab_size": VOCABULARY, "block_sizes": [2, 2], "num_decoder_layers": 1, "d_model": 32, "n_head": 4,
            "d_head": 8, "d_inner": 48, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
        },
        "padded",
    ),
    "ConvBERT": Entry("ConvBertForMaskedLM", {**_ENCODER, "embedding_size": 16, "conv_kernel_size": 3}, "padded"),
}  # fmt: skip

PAIRS: Mapping[str, Entry] = {
    "T5": Entry("T5ForConditionalGeneration", _T5, "pairs"),
    "mT5": Entry("MT5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}, "pairs"),
    "BART": Entry("BartForConditionalGeneration", _BART, "pairs"),
    "mBART": Entry("MBartForConditionalGeneration", _BART, "pairs"),
    "Pegasus": Entry("PegasusForConditionalGeneration", _BART, "pairs"),
    "Marian": Entry("MarianMTModel", _BART, "pairs"),
    "Switch": Entry(
        "SwitchTransformersForConditionalGeneration",
        {
            **_T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
            "num_decoder_layers": 3, "router_jitter_noise": 0.0,
        },
        "pairs",
    ),
    "ProphetNet": Entry(
        "ProphetNetForConditionalGeneration",
        {
            **_SPECIAL, "vocab_size": VOCABULARY, "hidden_size": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
            "num_encoder_layers": 3, "num_decoder_layers": 3, "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4, "max_position_embeddings": 32, "dropout": 0.0, "attention_dropout": 0.0,
            "activation_dropout": 0.0, "disable_ngram_loss": True,
        },
        "pairs",
    ),
    "M2M100": Entry("M2M100ForConditionalGeneration", _BART, "pairs"),
    "Whisper": Entry(
        "WhisperForConditionalGeneration",
        {**SIDES, **_SPECIAL, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 16},
        "spectrum",
    ),
    "BART, classifier": Entry("BartForSequenceClassification", {**_BART, "num_labels": 3}, "sentences"),
    "T5, classifier": Entry("T5ForSequenceClassification", {**_T5, "num_labels": 3}, "sentences"),
}  # fmt: skip

_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": PICTURE,
    "patch_size": 8, "num_labels": 3, **NO_DROPOUT,
}  # fmt: skip
_BACKBONE = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
    "out_features": ["stage2"],
}  # fmt: skip

VISION: Mapping[str, Entry] = {
    "ViT": Entry("ViTForImageClassification", _VISION, "pictures"),
    "BEiT": Entry("BeitForImageClassification", {**_VISION, "drop_path_rate": 0.0}, "pictures"),
    "Swin": Entry(
        "SwinForImageClassification",
        {
            "image_size": PICTURE, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
            "window_size": 4, "num_labels": 3, "drop_path_rate": 0.0, **NO_DROPOUT,
        },
        "pictures",
    ),
    "ConvNeXT": Entry(
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16, 24], "depths": [1, 2, 1], "num_stages": 3, "num_labels": 3},
        "pictures",
    ),
    "ResNet": Entry(
        "ResNetForImageClassification",
        {
            "embedding_size": 8, "hidden_sizes": [8, 16, 24], "depths": [1, 2, 1], "layer_type": "bottleneck",
            "num_labels": 3,
        },
        "pictures",
    ),
    "DETR": Entry(
        "DetrForObjectDetection",
        {
            **{key: SIDES[key] for key in SIDES if key not in ("vocab_size", "max_position_embeddings")},
            "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": _BACKBONE,
            "num_queries": 5, "num_labels": 3,
        },
        "scenes", own_loss=False,
    ),
    "SegFormer": Entry(
        "SegformerForSemanticSegmentation",
        {
            "num_encoder_blocks": 2, "depths": [1, 2], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [7, 3],
            "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16,
            "drop_path_rate": 0.0, "classifier_dropout_prob": 0.0, "num_labels": 3, **NO_DROPOUT,
        },
        "maps",
    ),
    "DINOv2": Entry("Dinov2ForImageClassification", _VISION, "pictures"),
}  # fmt: skip

_SPEECH: dict[str, Any] = {
    **_ENCODER, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0,
    "final_dropout": 0.0, "layerdrop": 0.0, "vocab_size": 20, "apply_spec_augment": False, "conv_dim": [16, 16],
    "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "ctc_zero_infinity": True,
}  # fmt: skip

SPEECH: Mapping[str, Entry] = {
    "Wav2Vec2": Entry("Wav2Vec2ForCTC", _SPEECH, "speech"),
    "HuBERT": Entry("HubertForCTC", _SPEECH, "speech"),
    "WavLM": Entry("WavLMForCTC", {**_SPEECH, "num_buckets": 8, "max_bucket_distance": 16}, "speech"),
}

_TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": PICTURE,
    "patch_size": 16, "projection_dim": 32,
}  # fmt: skip
_TOKEN = {"image_token_id": IMAGE, "tie_word_embeddings": False}
_GEMMA = {**GROUPED, "head_dim": 8, "model_type": "gemma"}

VISION_AND_LANGUAGE: Mapping[str, Entry] = {
    "LLaVA": Entry(
        "LlavaForConditionalGeneration",
        {
            "vision_config": {**_TOWER, "model_type": "clip_vision_model"},
            "text_config": {**GROUPED, "model_type": "llama"},
            "image_token_index": IMAGE, **_TOKEN, "vision_feature_select_strategy": "default", "vision_feature_layer": -1,
        },
        "captions",
    ),
    "PaliGemma": Entry(
        "PaliGemmaForConditionalGeneration",
        {
            "vision_config": {**_TOWER, "model_type": "siglip_vision_model"}, "text_config": _GEMMA,
            "image_token_index": IMAGE, **_TOKEN, "projection_dim": 32, "hidden_size": 32,
        },
        "typed_captions",
    ),
    "Gemma 3, vision": Entry(
        "Gemma3ForConditionalGeneration",
        {
            "vision_config": {**_TOWER, "model_type": "siglip_vision_model", "patch_size": 8},
            "text_config": {**_GEMMA, "model_type": "gemma3_text", "sliding_window": 5},
            "image_token_index": IMAGE, **_TOKEN, "mm_tokens_per_image": 4,
        },
        "typed_captions",
    ),
    "Qwen2.5-VL": Entry(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "vision_config": {
                "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 8,
                "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1],
            },
            "text_config": {
                **GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
            },
            "vision_start_token_id": 91, "vision_end_token_id": 92, "video_token_id": 93, **_TOKEN,
        },
        "patches", batch_dims={"pixel_values": 0},
    ),
    "CLIP": Entry(
        "CLIPModel",
        {
            "vision_config": _TOWER, "text_config": {**SIZES, "max_position_embeddings": 32, "projection_dim": 32},
            "projection_dim": 32,
        },
        "described",
    ),
    "SmolVLM": Entry(
        "SmolVLMForConditionalGeneration",
        {
            "vision_config": {**_TOWER, "patch_size": 8}, "text_config": {**GROUPED, "model_type": "llama"},
            "scale_factor": 2, **_TOKEN,
        },
        "several",
    ),
    "InternVL": Entry(
        "InternVLForConditionalGeneration",
        {
            "vision_config": {**_TOWER, "image_size": [PICTURE] * 2, "patch_size": [8, 8]},
            "text_config": {**GROUPED, "model_type": "qwen2"}, **_TOKEN, "downsample_ratio": 0.5,
        },
        "captions",
    ),
}  # fmt: skip
