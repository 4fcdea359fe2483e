"""Tiny random models, built from configs: nothing is downloaded."""

from typing import Any, cast

import torch
from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

from lorry.actors.model.loading import auto_class

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 96,
    "pad_token_id": None,
}
MOE: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast("PreTrainedModel", auto_class(config).from_config(config, attn_implementation="eager").eval())


def tiny_qwen3(seed: int = 0, **changes: Any) -> PreTrainedModel:
    return build(Qwen3Config(**(SHAPE | changes)), seed)


def tiny_llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    return build(LlamaConfig(**(SHAPE | changes)), seed)


def with_eyes(config: type[PreTrainedConfig], seed: int, text: dict[str, Any], patch_size: int = 4) -> PreTrainedModel:
    """Of the Qwen3-VL family: four patches, which are squares of that many pixels, make a token."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": patch_size,
        "out_hidden_size": SHAPE["hidden_size"],
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    return build(config(text_config=text | {"rope_parameters": rope}, vision_config=vision, **tokens), seed)


def tiny_qwen3_vl(seed: int = 0, patch_size: int = 4, **changes: Any) -> PreTrainedModel:
    return with_eyes(Qwen3VLConfig, seed, SHAPE | changes, patch_size)


def tiny_qwen3_vl_moe(seed: int = 0, **changes: Any) -> PreTrainedModel:
    return with_eyes(Qwen3VLMoeConfig, seed, SHAPE | MOE | {"num_experts": 4} | changes)


def tiny_qwen3_moe(seed: int = 0, **changes: Any) -> PreTrainedModel:
    return build(Qwen3MoeConfig(**(SHAPE | MOE | {"num_experts": 4} | changes)), seed)


def tiny_gpt_oss(seed: int = 0, **changes: Any) -> PreTrainedModel:
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
    return build(GptOssConfig(**(SHAPE | moe | changes)), seed)


def tiny_deepseek_v3(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Keys of 16 dimensions and values of 8, as multi-head latent attention has them apart."""
    latent = {
        "num_key_value_heads": 4,
        "head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    return build(DeepseekV3Config(**(SHAPE | MOE | latent | changes)), seed)
