"""Tiny causal language models of many architectures, built from their configurations."""

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 97

# Sizes by all the names that configurations have for them; a configuration is given those that it knows
_SIZES: dict[str, Any] = (
    dict.fromkeys(("hidden_size", "d_model", "n_embd", "n_embed", "dim", "attention_hidden_size", "lru_width"), 32)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff", "n_inner", "dff"), 48)
    | dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 48)
    | dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4)
    | dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4)
    | dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "moe_k", "moe_topk"), 2)
    | dict.fromkeys(("head_dim", "d_kv", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 128)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16)
    | dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_n_heads", "mamba_d_head"), 8)
    | dict.fromkeys(("mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8)
    | dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups", "n_groups"), 1)
    | dict.fromkeys(("encoder_layers",), 1)
    | dict.fromkeys(("linear_num_key_heads", "expand", "top_k_experts"), 2)
    | dict.fromkeys(("linear_num_value_heads", "conv_kernel", "rotary_dim"), 4)
    | dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4)
    | dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16)
    # Weights this large make logits that are far from uniform, so that a scale that is left out shows
    | dict.fromkeys(("initializer_range", "init_std", "initializer_std"), 0.3)
    | {"vocab_size": VOCABULARY, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
    | {"partial_rotary_factor": 0.5, "sliding_window": 4, "is_decoder": True, "attention_dropout": 0.0}
    | {"embedding_size": 16}
)
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHARED_KEYS = {"num_key_value_heads": 4}
_HYBRID = {"attention_hidden_size": 64, "attention_head_dim": 16}
_ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}

# Name → (model type, settings besides the sizes)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {})
    for name in (
        "afmoe", "apertus", "arcee", "bailing_hybrid", "bamba", "bart", "bert", "bert-generation", "big_bird",
        "biogpt", "bitnet", "blenderbot", "bloom", "codegen", "ctrl", "cwm", "diffllama", "doge", "electra",
        "ernie4_5", "ernie4_5_moe", "exaone4", "falcon_mamba", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm",
        "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granitemoe", "granitemoeshared",
        "helium", "jamba", "jetmoe", "lfm2", "llama", "llama4_text", "mamba", "mbart", "mimo_v2_flash", "minimax",
        "minimax_m2", "ministral3", "mistral", "mixtral", "modernbert-decoder", "moshi", "mpt", "nanochat",
        "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "openai-gpt", "opt", "pegasus", "persimmon",
        "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_text", "qwen3_moe", "qwen3_next",
        "rembert", "roberta", "roformer", "rwkv", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma",
        "whisper", "xglm",
    )
} | {
    # Scales
    "cohere": ("cohere", {"logit_scale": 0.4}),
    "cohere2": ("cohere2", {"logit_scale": 0.4}),
    "cohere2_moe": ("cohere2_moe", {"logit_scale": 0.4}),
    "cohere-untied-scale": ("cohere", {"logit_scale": 3.0, "tie_word_embeddings": False}),
    "granite-scaling": ("granite", {"logits_scaling": 2.0}),
    "granitemoe-scaling": ("granitemoe", {"logits_scaling": 3.0}),
    "granitemoehybrid-scaling": ("granitemoehybrid", {"logits_scaling": 3.0}),
    "hyperclovax-scaling": ("hyperclovax", {"logits_scaling": 3.0}),
    "falcon_h1": ("falcon_h1", {"lm_head_multiplier": 0.4, "mamba_d_ssm": 64}),
    "minicpm3": ("minicpm3", _SHARED_KEYS),
    "mpt-scale": ("mpt", {"logit_scale": 0.3}),
    "nanochat-softcap": ("nanochat", {"final_logit_softcapping": 3.0}),
    # Soft caps
    "gemma2-softcap": ("gemma2", {"final_logit_softcapping": 2.0}),
    "gemma2-without-softcap": ("gemma2", {"final_logit_softcapping": None}),
    "gemma3-softcap": ("gemma3_text", {"final_logit_softcapping": 2.0}),
    "recurrent_gemma": ("recurrent_gemma", {"w_init_variance_scale": 4.0}),
    "recurrent_gemma-softcap": ("recurrent_gemma", {"logits_soft_cap": 2.0, "w_init_variance_scale": 4.0}),
    "vaultgemma-softcap": ("vaultgemma", {"final_logit_softcapping": 2.0}),
    # Tied and untied embeddings
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "gemma-untied": ("gemma", {"tie_word_embeddings": False}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    # Between the last layer and the output embeddings, and before the first
    "opt-projected": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "electra-projected": ("electra", {"embedding_size": 8}),
    # Mixtures of experts that give their router's logits
    "mixtral-router": ("mixtral", _ROUTED),
    "qwen2_moe-router": ("qwen2_moe", _ROUTED),
    "qwen3_moe-router": ("qwen3_moe", _ROUTED),
    "olmoe-router": ("olmoe", _ROUTED),
    "phimoe-router": ("phimoe", _ROUTED),
    "granitemoe-router": ("granitemoe", _ROUTED),
    "granitemoeshared-router": ("granitemoeshared", _ROUTED),
    "gpt_oss-router": ("gpt_oss", _ROUTED),
    "jamba-router": ("jamba", _ROUTED),
    "flex_olmo-router": ("flex_olmo", _ROUTED),
    # Shapes of their own
    "dbrx": (
        "dbrx",
        {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        },
    ),
    "deepseek_v2": ("deepseek_v2", _SHARED_KEYS | {"num_experts_per_tok": 2}),
    "deepseek_v3": ("deepseek_v3", _SHARED_KEYS),
    "dots1": ("dots1", {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2}),
    "falcon": ("falcon", {"head_dim": None}),
    "falcon-alibi": ("falcon", {"head_dim": None, "alibi": True}),
    "gemma3n": (
        "gemma3n_text",
        {
            "activation_sparsity_pattern": [0.0, 0.0],
            "intermediate_size": [48, 48],
            "laurel_rank": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
        },
    ),
    "glm4_moe_lite": ("glm4_moe_lite", _SHARED_KEYS),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 8}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"head_dim": 8}),
    "lfm2_moe": ("lfm2_moe", {"layer_types": ["conv", "full_attention"]}),
    "longcat_flash": ("longcat_flash", _SHARED_KEYS),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8}),
    "ministral": ("ministral", {"head_dim": 8}),
    "nemotron": ("nemotron", {"head_dim": 8, "num_key_value_heads": 2}),
    "xlstm": ("xlstm", {"v_head_dim": None}),
    "xmod": ("xmod", {"languages": ["en_XX"], "default_language": "en_XX"}),
    "youtu": ("youtu", _SHARED_KEYS),
    "zamba": ("zamba", _HYBRID | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2}),
    "zamba2": ("zamba2", _HYBRID | {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 8, "mamba_headdim": 8}),
}  # fmt: skip

# Causal language models by name, whose tokens see those that come later
NOT_CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-encoder": ("bert", {"is_decoder": False}),
    "xlm": ("xlm", {}),
}


def is_known(model_type: str) -> bool:
    """Whether the installed transformers has an architecture."""
    return model_type in CONFIG_MAPPING


# What an architecture's own forward does wrong in versions of transformers before the one that is named
BROKEN = {
    "dbrx": ("5.15", "its router has another size than its hidden states"),
    "doge": ("5.19", "its log-probabilities depend on padding"),
    "granitemoehybrid-scaling": ("5.15", "a config without layer types cannot be built"),
    "zamba": ("5.15", "it needs kernels for GPUs"),
    "zamba2": ("5.15", "it has no rotary embeddings"),
    "modernbert-decoder": ("5.19", "its configuration cannot be without a BOS token"),
    "roformer": ("5.19", "its log-probabilities depend on later tokens"),
}


def skip_unless_it_works(name: str) -> None:
    """Skip a test if the installed transformers lacks an architecture, or if its own forward fails there."""
    if not is_known(ARCHITECTURES[name][0]):
        pytest.skip(f"transformers {transformers.__version__} has no {ARCHITECTURES[name][0]}")
    before, fault = BROKEN.get(name, ("0", ""))
    if Version(transformers.__version__) < Version(before):
        pytest.skip(f"{name} of transformers {transformers.__version__} is broken: {fault}")


def tiny_config(model_type: str, settings: dict[str, Any], dropout: float | None = None) -> PretrainedConfig:
    """The configuration of a small model.

    Args:
        model_type: of the architecture.
        settings: besides the sizes; None leaves the architecture's default.
        dropout: every rate of dropout and of skipped layers, whatever its name; None leaves the defaults.
    """
    made: Any = CONFIG_MAPPING[model_type]
    default = made()
    sizes = {name: value for name, value in _SIZES.items() if getattr(default, name, None) is not None}
    if dropout is not None:
        rates = (name for name, value in default.to_dict().items() if isinstance(value, float | int) and "drop" in name)
        sizes |= {name: dropout for name in rates if not isinstance(getattr(default, name), bool)}
    sizes = sizes | _SPECIAL | settings
    left_out = [name for name, value in settings.items() if value is None and name in _SIZES]
    return made(**{name: value for name, value in sizes.items() if name not in left_out})


def tiny_model(model_type: str, settings: dict[str, Any], dropout: float | None = None, seed: int = 0) -> Any:
    """A small model with random weights, in float32 and evaluation mode; arguments as for `tiny_config`."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, settings, dropout)).float().eval()
