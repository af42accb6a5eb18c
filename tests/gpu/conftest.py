"""The device that these tests run on: a GPU if there is one, else the CPU with fewer members."""

import pytest
import torch
from tiny import CHAT_TEMPLATE, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def device() -> str:
    """ "cuda", or "cpu" if there is no GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    """A two-layer Llama whose heads have 64 dimensions, as FlashAttention wants, and its tokenizer."""
    path = str(tmp_path_factory.mktemp("models") / "llama")
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.06,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
