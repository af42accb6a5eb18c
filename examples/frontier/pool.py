"""The reference's answers, sampled once and stored: every cell of a seed learns from the same ones."""

import copy
import gzip
import importlib.metadata
import json
import os
import platform
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from answers import Answer, rewards, sample
from filelock import FileLock
from prompts import prompt, questions
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

TEMPERATURE = 0.7
MAX_TOKENS = 32
BATCH, GPU_BATCH = 64, 256  # answers sampled at a time
# What the figures depend on; scikit-learn brings the prose, and vaderSentiment a reward
VERSIONS = ("torch", "transformers", "trl", "trl-ulma", "peft", "vaderSentiment", "scikit-learn")
ANSWERS = {"held-out": 16, "train": 16, "single": 1, "demonstrations": 48}


@dataclass(frozen=True)
class Scored:
    """An answer of the reference.

    Attributes:
        question: the question that it answers.
        text: the answer.
        rewards: its true rewards by name.
        usable: whether it ended by itself and is tokenized to the tokens that were drawn. Others are not learned from:
            a trainer would see other tokens, or an end that the model did not write.
    """

    question: str
    text: str
    rewards: dict[str, float]
    usable: bool


def load_reference(checkpoint: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The reference, in float32 and eval mode, and its tokenizer.

    The reference is the checkpoint at a temperature of 0.7, made its own distribution: the weights of the last norm,
    whose output the LM head reads, are divided by 0.7, and with them every logit.

    Raises:
        ValueError: if the model has no norm that the LM head reads, or the head has a bias.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    norm = getattr(model.base_model, "norm", None)
    if norm is None or getattr(norm, "bias", None) is not None or getattr(model.lm_head, "bias", None) is not None:
        raise ValueError(f"{checkpoint} is no model such as Llama, whose logits are linear in its last norm's weight.")
    with torch.no_grad():
        norm.weight /= TEMPERATURE
    return model, AutoTokenizer.from_pretrained(checkpoint)


class Pool:
    """Groups of answers in a folder; a group that is not there is sampled when it is first asked for.

    Args:
        folder: where `GROUP.json.gz` are.
        model: the reference, or None to read only.
        tokenizer: its tokenizer.
        say: called with lines of progress.
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        say: Callable[[str], None] = print,
    ):
        self.folder, self.model, self.tokenizer, self.say = folder, model, tokenizer, say
        self._read: dict[str, list[list[Scored]]] = {}

    def group(self, name: str) -> list[list[Scored]]:
        """The answers to each question of the group, in the questions' order."""
        if name not in self._read:
            path = self.folder / f"{name}.json.gz"
            if not path.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                # Of several runs one samples, and the others wait for its answers
                with FileLock(self.folder / f"{name}.lock"):
                    if not path.exists():
                        self._sample(name, path)
            with gzip.open(path, "rt", encoding="utf-8") as file:
                stored = json.load(file)
            self._read[name] = [
                [Scored(asked["question"], text, rewards(text), usable) for text, usable in asked["answers"]]
                for asked in stored
            ]
        return self._read[name]

    def _sample(self, name: str, path: Path) -> None:
        """Sample the group, a batch at a time; batches are stored as they come, so that a run that stopped goes on."""
        if self.model is None or self.tokenizer is None:
            raise FileNotFoundError(f"{path} is not there. `run.py` samples and stores it.")
        asked, answers = questions(name), ANSWERS[name.split("-")[0] if name != "held-out" else name]
        size = max(BATCH // answers, 1)
        part = path.with_name(f"{name}.part")
        done = [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()] if part.exists() else []
        for start in range(len(done), len(asked), size):
            batch = asked[start : start + size]
            ids = [self.tokenizer(prompt(each), add_special_tokens=False)["input_ids"] for each in batch]
            eos: Any = self.tokenizer.eos_token_id
            seed = zlib.crc32(f"{name} {start}".encode())
            found = sample(self.model, ids, answers=answers, eos=eos, max_tokens=MAX_TOKENS, seed=seed)
            with open(part, "a", encoding="utf-8") as file:
                for question, drawn in zip(batch, found, strict=True):
                    texts = [read_back(self.tokenizer, prompt(question), answer) for answer in drawn]
                    file.write(json.dumps({"question": question, "answers": texts}) + "\n")
            self.say(f"{name}: {min(start + size, len(asked))} of {len(asked)} prompts sampled")
        done = [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]
        whole = path.with_suffix(".whole")
        # mtime=0: the same answers make the same file
        with open(whole, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as file:
            file.write(json.dumps(done, ensure_ascii=False, indent=0).encode())
        os.replace(whole, path)
        part.unlink()


def read_back(tokenizer: PreTrainedTokenizerBase, asked: str, answer: Answer) -> tuple[str, bool]:
    """(The answer's text; whether a trainer that reads the prompt and the text finds the tokens that were drawn)."""
    text = str(tokenizer.decode(answer.ids, skip_special_tokens=True))
    again: Any = tokenizer(asked + text + str(tokenizer.eos_token), add_special_tokens=False)["input_ids"]
    start: Any = tokenizer(asked, add_special_tokens=False)["input_ids"]
    return text, answer.ended and again == start + answer.ids and bool(text.strip())


def batch_size(model: PreTrainedModel) -> int:
    """How many answers are sampled at a time."""
    return GPU_BATCH if model.device.type == "cuda" else BATCH


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy to train, which leaves the reference as it is."""
    return copy.deepcopy(model)


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def measured_on(device: str) -> dict[str, Any]:
    """The device and the versions, for a record."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, threads: {torch.get_num_threads()}",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in VERSIONS},
        },
    }
