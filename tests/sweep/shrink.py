"""Tiny models from transformers' config classes: every size in a config becomes a small one that goes with the others.

Nothing here knows a model. A config is read as nested dictionaries; each field whose name says what it measures gets the
size that `SIZES` has for the name, in nested configs too, so that widths agree between the towers of a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WIDTH, HEADS, LAYERS, VOCABULARY, IMAGE, PATCH, FRAMES = 32, 4, 2, 128, 32, 8, 128
WORDS = 90
"""Ordinary tokens are below it; special ones (image, audio, …) above."""


def _named(size: float, names: str) -> dict[str, float]:
    return dict.fromkeys(names.split(), size)


SIZES: dict[str, float] = {
    **_named(
        WIDTH,
        "hidden_size d_model n_embd embed_dim embedding_size embedding_dim dim hidden_dim "
        "projection_dim out_hidden_size decoder_hidden_size encoder_hidden_size "
        "encoder_hidden_dim projector_hidden_size fusion_hidden_size emb_dim "
        "reassemble_hidden_size hidden_sizes embed_dims projection_size output_hidden_size "
        "neck_hidden_sizes pooler_output_size iou_head_hidden_dim fpn_hidden_size "
        "output_channels d_latents q_lora_rank kv_lora_rank hidden_size_per_layer_input "
        "pooler_hidden_size classifier_proj_size cross_hidden_size mamba_d_ssm lru_width "
        "codevector_dim proj_codevector_dim conv_dim decoder_in_channels tdnn_dim "
        "xvector_output_dim query_dim backbone_feature_sizes audio_hidden_size",
    ),
    **_named(
        48,
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner "
        "moe_intermediate_size mlp_dim ffn_hidden_size shared_expert_intermediate_size "
        "shared_intermediate_size intermediate_size_mlp decoder_intermediate_size "
        "dense_intermediate_size dim_ff moe_shared_expert_intermediate_size",
    ),
    **_named(
        HEADS,
        "num_attention_heads n_head num_heads encoder_attention_heads decoder_attention_heads "
        "n_heads attention_heads decoder_num_attention_heads encoder_num_attention_heads "
        "decoder_num_heads num_cross_attention_heads num_self_attention_heads index_n_heads",
    ),
    **_named(
        2,
        "num_key_value_heads num_kv_heads encoder_num_key_value_heads decoder_num_key_value_heads",
    ),
    **_named(2, "linear_num_key_heads linear_num_value_heads mamba_n_heads mamba_num_heads"),
    **_named(
        8,
        "head_dim d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim qk_head_dim "
        "linear_key_head_dim linear_value_head_dim index_head_dim attention_head_dim "
        "attention_head_size rotary_dim dim_head kv_channels mamba_head_dim swa_head_dim "
        "index_topk",
    ),
    **_named(
        LAYERS,
        "num_hidden_layers n_layer num_layers encoder_layers decoder_layers depth n_layers "
        "num_blocks num_decoder_layers num_encoder_layers decoder_num_hidden_layers "
        "encoder_num_hidden_layers decoder_depth num_residual_layers num_feat_extract_layers",
    ),
    **_named(1, "depths num_adapter_layers"),
    **_named(
        1,
        "first_k_dense_replace num_nextn_predict_layers n_group topk_group num_dense_layers moe_layer_start_index",
    ),
    **_named(
        VOCABULARY,
        "vocab_size audio_vocab_size decoder_vocab_size vocab_size_per_layer_input",
    ),
    **_named(4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    **_named(2, "num_experts_per_tok moe_k moe_topk top_k_experts"),
    **_named(1, "n_shared_experts num_shared_experts moe_num_shared_experts"),
    **_named(
        64,
        "max_position_embeddings n_positions max_source_positions max_target_positions n_ctx max_seq_len block_size",
    ),
    **_named(IMAGE, "image_size pretrain_image_size input_size"),
    **_named(PATCH, "patch_size"),
    **_named(
        2,
        "spatial_merge_size temporal_patch_size window_size num_frames num_register_tokens scale_factor",
    ),
    **_named(16, "num_mel_bins feature_projection_input_dim"),
    **_named(6, "num_queries"),
    **_named(
        8,
        "mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank chunk_size mamba_chunk_size",
    ),
    **_named(16, "codebook_size codebook_dim num_codevectors_per_group"),
}
"""Field name → its small size; a list becomes as long a list of it."""

LISTS = {
    "mrope_section": [2, 1, 1],
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
}
"""Fields that, where they are lists, become these."""
NEEDED = {"head_dim": 8, "num_key_value_heads": HEADS, "num_experts_per_tok": 2}
"""Fields that are set also where the default is None."""
DROPPED = "_out_features _out_indices out_features out_indices stage_names per_layer_config".split()
"""Fields that name layers that are no longer there; they come back by themselves."""
KINDS_OF_LAYERS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types")


def shrunk(config: Mapping[str, Any], known: dict[str, int] | None = None) -> dict[str, Any]:
    """A config's dictionary with small sizes. Lists of kinds of layers keep one layer of each kind, at least two."""
    known = {} if known is None else known
    small = {key: _field(key, value, known) for key, value in config.items() if key not in DROPPED}
    kinds = {
        key: list(config[key])
        for key in KINDS_OF_LAYERS
        if isinstance(config.get(key), list | tuple) and config[key]
    }
    if kinds:
        seen = list(dict.fromkeys(zip(*kinds.values(), strict=False)))
        seen = seen[:3] if len(seen) > 1 else seen * LAYERS
        small |= {key: [row[n] for row in seen] for n, key in enumerate(kinds)}
        small |= {
            key: len(seen)
            for key in ("num_hidden_layers", "num_layers", "n_layer")
            if key in config
        }
    small |= {key: size for key, size in NEEDED.items() if key in config and config[key] is None}
    heads = [config.get(key) for key in ("num_attention_heads", "num_key_value_heads")]
    if heads[0] is not None and heads[0] == heads[1]:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _field(key: Any, value: Any, known: dict[str, int]) -> Any:
    if isinstance(value, Mapping):
        return shrunk(value, known)
    if value is None or isinstance(value, bool | str):
        return value
    if not isinstance(key, str):
        return value
    if key in LISTS and isinstance(value, list | tuple):
        return LISTS[key]
    if key.endswith(("_token_id", "_token_index")):
        return _token(key, value, known)
    if key not in SIZES:
        return value
    if isinstance(value, list | tuple):
        return [SIZES[key]] * len(value)
    return SIZES[key] if value else value


def _token(key: str, value: Any, known: dict[str, int]) -> Any:
    """A special token's id: pad, begin and end first, every other above the ordinary words, the same in nested configs."""
    first = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    if key in first:
        return first[key]
    if isinstance(value, int) and value >= 0:
        return known.setdefault(key, WORDS + len(known))
    return value
