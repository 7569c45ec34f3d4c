"""Tiny random models of every family whose names on disk are worth a test: seeded, fp32, two layers."""

import copy
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
import transformers as tf
from transformers import PreTrainedModel
from transformers.utils import logging

from tests.builders import shared

logging.disable_progress_bar()

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def llama() -> PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, tie_word_embeddings=False))


def llama_tied() -> PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, tie_word_embeddings=True))


def qwen2() -> PreTrainedModel:
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**TEXT))


def gemma3() -> PreTrainedModel:
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**TEXT, head_dim=8))


def gemma3_vlm() -> PreTrainedModel:
    text, vision = {**TEXT, "head_dim": 8}, VISION
    config = tf.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=9
    )
    return tf.Gemma3ForConditionalGeneration(config)


def phi3() -> PreTrainedModel:
    return tf.Phi3ForCausalLM(tf.Phi3Config(**TEXT))


def gpt2() -> PreTrainedModel:
    config = tf.GPT2Config(
        vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    )
    return tf.GPT2LMHeadModel(config)


def gpt_neox() -> PreTrainedModel:
    text = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**text))


def bert_config() -> tf.BertConfig:
    return tf.BertConfig(**{**TEXT, "num_key_value_heads": None})


def bert() -> PreTrainedModel:
    return tf.BertModel(bert_config())


def bert_mlm() -> PreTrainedModel:
    return tf.BertForMaskedLM(bert_config())


def t5() -> PreTrainedModel:
    config = tf.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return tf.T5ForConditionalGeneration(config)


def whisper() -> PreTrainedModel:
    sides = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8}
    places = {"max_source_positions": 16, "max_target_positions": 16, "vocab_size": 96, "d_model": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = tf.WhisperConfig(
        **sides, **heads, **places, **tokens, suppress_tokens=[], begin_suppress_tokens=[]
    )
    return tf.WhisperForConditionalGeneration(config)


def vit() -> PreTrainedModel:
    return tf.ViTForImageClassification(tf.ViTConfig(**VISION, num_labels=3))


def mixtral() -> PreTrainedModel:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2))


def qwen2_moe() -> PreTrainedModel:
    config = tf.Qwen2MoeConfig(**TEXT, **MOE, shared_expert_intermediate_size=40, mlp_only_layers=[0])
    return tf.Qwen2MoeForCausalLM(config)


def qwen3_moe() -> PreTrainedModel:
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**TEXT, **MOE, head_dim=8))


def deepseek_v3() -> PreTrainedModel:
    text = {**TEXT, "num_key_value_heads": 4, "moe_intermediate_size": 24}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2}
    config = tf.DeepseekV3Config(**text, **experts, **MLA, topk_group=1, first_k_dense_replace=1)
    return tf.DeepseekV3ForCausalLM(config)


def deepseek_v2() -> PreTrainedModel:
    text = {**TEXT, "num_key_value_heads": 4, "moe_intermediate_size": 24}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1}
    config = tf.DeepseekV2Config(**text, **experts, **MLA, topk_group=1, first_k_dense_replace=1)
    return tf.DeepseekV2ForCausalLM(config)


def granite_moe() -> PreTrainedModel:
    return tf.GraniteMoeForCausalLM(tf.GraniteMoeConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2))


def gpt_oss() -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = tf.GptOssConfig(**TEXT, **experts, head_dim=8, sliding_window=8, rope_parameters=rope)
    return tf.GptOssForCausalLM(config)


def llama4_text() -> PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 56, "head_dim": 8}
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**TEXT, **experts))


def olmoe() -> PreTrainedModel:
    return tf.OlmoeForCausalLM(tf.OlmoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2))


def jamba() -> PreTrainedModel:
    layers = {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    }
    mamba = {"mamba_d_state": 8, "mamba_dt_rank": 4}
    return tf.JambaForCausalLM(
        tf.JambaConfig(**TEXT, **layers, **mamba, num_experts=4, num_experts_per_tok=2)
    )


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama-tied": llama_tied,
    "qwen2": qwen2,
    "gemma3": gemma3,
    "gemma3-vlm": gemma3_vlm,
    "phi3": phi3,
    "gpt2": gpt2,
    "gpt-neox": gpt_neox,
    "bert": bert,
    "bert-mlm": bert_mlm,
    "t5": t5,
    "whisper": whisper,
    "vit": vit,
    "mixtral": mixtral,
    "qwen2-moe": qwen2_moe,
    "qwen3-moe": qwen3_moe,
    "deepseek-v2": deepseek_v2,
    "deepseek-v3": deepseek_v3,
    "granite-moe": granite_moe,
    "gpt-oss": gpt_oss,
    "llama4-text": llama4_text,
    "olmoe": olmoe,
    "jamba": jamba,
}


@cache
def build(family: str) -> PreTrainedModel:
    """The model of a family, the same one every time: do not change it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[family]()
        fill(model)
    return model.eval()


@torch.no_grad()
def fill(model: PreTrainedModel) -> None:
    """Make every entry differ, so that no two tensors can be mistaken for each other."""
    for parameter in model.parameters():
        parameter.normal_(std=0.1)


def fresh(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A copy of the model of a family, to change at will."""
    return copy.deepcopy(build(family)).to(dtype)


def save(family: str, directory: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Path:
    """Write a family's checkpoint as transformers does, and return its directory."""
    model = build(family) if dtype == torch.float32 else fresh(family, dtype)
    model.save_pretrained(directory, **kwargs)
    return directory


@cache
def saved(family: str, **kwargs: Any) -> Path:
    """A family's checkpoint that all tests share: read it, copy it, never write into it."""
    return shared.keep(save(family, shared.place("-".join([family, *map(str, kwargs.values())])), **kwargs))
