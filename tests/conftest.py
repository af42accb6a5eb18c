"""Tiny checkpoints made in the session, and the real samples where they are at hand."""

import gc
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Read when torch is imported: tiny models have no work for more threads, and pytest has a process for each core
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read once, when trackio is imported, which any trainer may do
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")

import hypothesis
import pytest
import torch
from tiny import CHAT_TEMPLATE, make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from trl_ulma.scripts.command_line import VERBOSE

# A busy machine is no fault of a test
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")


@pytest.fixture(autouse=True, scope="module")
def imports_are_not_searched_for_garbage():
    """Each training collects garbage at its end (accelerate's `free_memory`), and would go through all imports."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def each_command_is_quiet_by_itself():
    """`--verbose` is handed on to processes through the environment, and must not stay there for the next test."""
    # TRL before 1.0 sets a public Space when one of its scripts is imported, which another test may have done
    os.environ.pop("TRACKIO_SPACE_ID", None)
    yield
    os.environ.pop(VERBOSE, None)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory) -> str:
    """A folder with a two-layer GPT-2 and its tokenizer, without a chat template."""
    folder = str(tmp_path_factory.mktemp("checkpoints") / "tiny-gpt2")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=512,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> str:
    """A folder with a two-layer Llama and its tokenizer, with a chat template."""
    folder = str(tmp_path_factory.mktemp("checkpoints") / "tiny-llama")
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real samples beside the checkout; tests that use it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real samples are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory) -> str:
    """A folder with a two-layer Llava, whose images are 4 tokens each, and its processor."""
    from vlm import make_llava

    return make_llava(str(tmp_path_factory.mktemp("checkpoints") / "tiny-llava"))
