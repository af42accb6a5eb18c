"""Small rows, small trainers, and plain log-probabilities to hold them to."""

from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ulma import PointwiseDPOConfig, PointwiseDPOTrainer, ULMAConfig, ULMATrainer

# These versions compute the LM head of their own trainers with Triton, which CPUs do not have
NEEDS_TRITON = Version("1.14") <= Version(trl.__version__) < Version("1.16")
NEEDS_PEFT = transformers.integrations.peft.MIN_PEFT_VERSION
has_own_adapters = pytest.mark.skipif(
    Version(peft.__version__) < Version(NEEDS_PEFT),
    reason=f"adapters of transformers {transformers.__version__} itself need peft {NEEDS_PEFT}",
)
trains_with_trl = pytest.mark.skipif(NEEDS_TRITON, reason=f"the trainers of TRL {trl.__version__} need Triton")
PROMPTS = ("How are you?", "What is the capital of France?", "Please write a short letter.", "The cat sat", "Why?")
ANSWERS = (" I am fine, thank you!", " Paris.", " No. Go away.", " on the mat.", " Of course, here it is: Dear Sir,")


def make_rows(n: int, **columns: list) -> Dataset:
    """`n` rows of text of differing lengths, labels 1 and 0 in turn; `columns` come on top or in their place."""
    rows: dict[str, list] = {
        "prompt": [PROMPTS[i % 5] + " x" * (i % 3) for i in range(n)],
        "completion": [ANSWERS[(i * 2 + i // 5) % 5] * (1 + i % 2) for i in range(n)],
        "label": [float(i % 2 == 0) for i in range(n)],
    }
    return Dataset.from_dict(rows | columns)


def mixed_rows(n: int = 12) -> Dataset:
    """Rows of every kind: demonstrations, likes, soft labels, dislikes, ratings; with weights and log Z."""
    kinds = [
        (1.0, True, "binary"),
        (1.0, False, "binary"),
        (0.0, False, "binary"),
        (0.3, False, "binary"),
        (0.7, True, "continuous"),
        (-1.2, False, "continuous"),
    ]
    label, sft_mask, label_type = (list(column) for column in zip(*(kinds[i % 6] for i in range(n)), strict=True))
    weight = [0.5 + (i % 4) / 2 for i in range(n)]
    log_z = [0.3 * (i % 5) - 0.5 for i in range(n)]
    return make_rows(n, label=label, sft_mask=sft_mask, label_type=label_type, weight=weight, log_z=log_z)


def several_answers(prompts: int = 5, answers: int = 3) -> Dataset:
    """Rows of every kind, `answers` for each prompt."""
    n = prompts * answers
    rows = mixed_rows(n)
    asked = make_rows(prompts)["prompt"][:]
    return rows.remove_columns("prompt").add_column("prompt", [asked[i // answers] for i in range(n)])


def binary_rows(n: int = 12) -> Dataset:
    """The binary kinds of `mixed_rows` only, so that unlearning is possible."""
    rows = mixed_rows(2 * n)
    return rows.filter(lambda row: row["label_type"] == "binary").select(range(n)).remove_columns("label_type")


def make_trainer(model: Any, rows: Any, folder: Any, *, pointwise: bool = False, **kwargs: Any) -> PointwiseDPOTrainer:
    """A quiet trainer in fp32; keywords that the trainer takes go there, all others into its config."""
    own = {"eval_dataset", "ref_model", "peft_config", "processing_class", "callbacks", "compute_metrics"}
    own |= {"quantization_config", "data_collator", "optimizers"}
    to_trainer = {name: kwargs.pop(name) for name in own & set(kwargs)}
    settings = {
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }
    config, trainer = (PointwiseDPOConfig, PointwiseDPOTrainer) if pointwise else (ULMAConfig, ULMATrainer)
    return trainer(model=model, args=config(str(folder), **settings | kwargs), train_dataset=rows, **to_trainer)


def plain_logps(folder: str, rows: Dataset, model: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """(log π(completion|prompt), number of completion tokens) of each row, `(N,)`: one row at a time, full logits."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    logps, counts = [], []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].double()
        start = len(prompt)
        scored = torch.log_softmax(logits[start - 1 : -1], -1)
        logps.append(scored.gather(1, torch.tensor(whole[start:])[:, None]).sum().item())
        counts.append(len(whole) - start)
    return np.array(logps), np.array(counts)


def weights(model: torch.nn.Module) -> torch.Tensor:
    """All trainable weights in one float64 vector."""
    return torch.cat([p.detach().double().flatten() for _, p in model.named_parameters() if p.requires_grad])


def first_step_loss(trainer) -> torch.Tensor:
    """The loss of an optimizer step over all rows, one micro-batch after the other, with its gradients."""
    trainer.model.train()
    batches = list(trainer.get_train_dataloader())
    batches, rows = trainer.get_batch_samples(iter(batches), len(batches), trainer.accelerator.device)
    losses = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=rows) for batch in batches]
    return torch.stack(losses).sum()
