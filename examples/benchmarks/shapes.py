"""Models of a given shape with random weights: how fast a model trains does not depend on what it has learned."""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

# Of Llama 3.2 1B and Llama 3.1 8B
SHAPES = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
VOCABULARY = 128256


def random_checkpoint(shape: str, tokenizer: Path, cache_dir: Path) -> Path:
    """The folder in `cache_dir` of a Llama with random weights in bfloat16, made if it is missing.

    Args:
        shape: one of `SHAPES`.
        tokenizer: a checkpoint whose tokenizer it gets; the vocabulary is Llama 3's size all the same.
        cache_dir: where it goes. Of llama-8b, it takes 16 GB.
    """
    folder = cache_dir / f"random-{shape}"
    if folder.is_dir():
        return folder
    reader = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        **SHAPES[shape],
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=reader.eos_token_id,
        pad_token_id=reader.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    cache_dir.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=cache_dir))
    try:
        model.save_pretrained(part)
        reader.save_pretrained(part)
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return folder
