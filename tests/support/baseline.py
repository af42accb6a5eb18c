"""Records what trainings give, and compares a changed package with the record.

    python tests/support/baseline.py record FOLDER [NAME ...]
    python tests/support/baseline.py compare FOLDER [NAME ...]

`record` builds tiny models in FOLDER, trains each run of `runs()` and stores its logs, evaluations, predictions, scores
and final trainable weights. `compare` trains the same runs on the same models, prints the largest difference of each
run, and fails if one is above the run's tolerance. A NAME selects the runs whose names contain it. `--redefined
rewards/accuracies` leaves out a figure that a later version defines otherwise on purpose.

Runs compute in float64, so that a difference above 1e-6 is a different result and not another order of summation. A
difference is relative for values above 1 and absolute for the others. The script uses the public interface only.
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TQDM_DISABLE", "1")

import datasets
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import CHAT_TEMPLATE, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.logging import disable_progress_bar
from trl import DPOConfig
from world import PROMPTS, binary_rows, make_rows, make_trainer, mixed_rows

from trl_ulma import PointwiseDPOTrainer, ULMATrainer

TOLERANCE = 1e-6
# Reference log-probabilities pass through a float32 column when they are precomputed
STORED = 1e-5
# Of runs in float32, which hold the computation as users run it
FLOAT32 = 1e-3
SMALL = {"learning_rate": 1e-4}

GRID = {
    "ulma": {"positive_loss": "sft", "negative_loss": "pointwise_dpo"},
    "pointwise": {"positive_loss": "pointwise_dpo", "negative_loss": "pointwise_dpo"},
    "sft": {"positive_loss": "sft", "negative_loss": "none"},
    "unlikelihood": {"positive_loss": "sft", "negative_loss": "unlearning"},
    "unlearning": {"positive_loss": "none", "negative_loss": "unlearning"},
    "positive-dpo": {"positive_loss": "pointwise_dpo", "negative_loss": "none"},
    "negative-dpo": {"positive_loss": "none", "negative_loss": "pointwise_dpo"},
}
LAYOUTS = {"padded": {}, "padding_free": {"padding_free": True}, "share_prompts": {"share_prompts": True}}
LOG_Z = ("column", "prior", "running_mean", "batch_kl", "learned", "learned_constant", 0.4)
NOT_COMPARED = ("runtime", "per_second", "total_flos")


@dataclass
class Run:
    """One training run.

    Attributes:
        name: names the run's files.
        settings: of the trainer's config; keywords of the trainer are taken out by `make_trainer`.
        model: name of the model in the folder.
        rows: makes the training rows.
        eval_rows: makes the rows to evaluate, predict and score.
        pointwise: train with `PointwiseDPOTrainer`.
        in_memory: pass the model as an object: "model", or "adapter" for a `PeftModel` with a trained adapter.
        given_reference: pass a `ref_model` with other weights.
        peft: makes the `peft_config`.
        fp32: train in float32.
        asks_later: predict and score after the training.
        tolerance: largest difference allowed.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = "llama"
    rows: Callable[[], Any] = mixed_rows
    eval_rows: Callable[[], Dataset] = lambda: mixed_rows(7)
    pointwise: bool = False
    in_memory: str = ""
    given_reference: bool = False
    peft: Callable[[], Any] | None = None
    fp32: bool = False
    asks_later: bool = True
    tolerance: float = TOLERANCE


def branched(rows: Dataset) -> Dataset:
    """The rows with three prompts in all, so that a batch holds several rows of one prompt."""
    names = rows.column_names
    made = [{**row, "prompt": PROMPTS[i % 3]} for i, row in enumerate(rows)]
    return Dataset.from_list(made).select_columns(names)


def without(rows: Dataset, *columns: str) -> Dataset:
    """The rows without columns."""
    return rows.remove_columns(list(columns))


def pairs(n: int = 8) -> Dataset:
    """`n` pairs of completions."""
    rows = make_rows(n)
    rejected = [f" Nothing of the sort, number {i}." for i in range(n)]
    return Dataset.from_dict(
        {"prompt": rows["prompt"][:], "chosen": rows["completion"][:], "rejected": rejected},
    )


def chats(n: int = 12) -> Dataset:
    """`n` rows of messages."""
    rows = make_rows(n)
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in rows["prompt"]],
            "completion": [[{"role": "assistant", "content": text}] for text in rows["completion"]],
            "label": rows["label"][:],
        }
    )


def continuous(n: int = 12) -> Dataset:
    """`n` rows with ratings for labels."""
    return make_rows(n, label=[(i * 7 % 5) / 2 - 0.8 for i in range(n)], sft_mask=[i % 4 == 1 for i in range(n)])


def lora(model: str) -> LoraConfig:
    """An adapter whose first step moves it."""
    targets = ["c_attn", "c_proj"] if model == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    return LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights="gaussian", task_type="CAUSAL_LM")


def runs() -> Iterator[Run]:
    """All runs."""
    for method, cell in GRID.items():
        rows = binary_rows if cell["negative_loss"] == "unlearning" else mixed_rows
        for layout, option in LAYOUTS.items():
            yield Run(
                f"{method}-{layout}",
                cell | option,
                rows=lambda rows=rows: branched(rows(16)),
                eval_rows=lambda rows=rows: branched(rows(7)),
            )
    for model in ("gpt2", "llama"):
        for reference, option in {"live": {}, "precomputed": {"precompute_ref_log_probs": True}}.items():
            tolerance = STORED if option else TOLERANCE
            common = {"model": model, "tolerance": tolerance}
            yield Run(f"{model}-full-{reference}", option, asks_later=not option, **common)
            yield Run(f"{model}-lora-{reference}", option, peft=lambda model=model: lora(model), **common)
            yield Run(f"{model}-adapter-{reference}", option, in_memory="adapter", **common)
            yield Run(f"{model}-given-{reference}", option, given_reference=True, **common)
        yield Run(f"{model}-memory", in_memory="model", model=model)
        yield Run(f"{model}-given-lora", peft=lambda model=model: lora(model), given_reference=True, model=model)
    for layout in ("padding_free", "share_prompts"):
        common = {"rows": lambda: branched(mixed_rows(16)), "eval_rows": lambda: branched(mixed_rows(7))}
        yield Run(f"lora-{layout}", LAYOUTS[layout], peft=lambda: lora("llama"), **common)
        yield Run(f"adapter-{layout}", LAYOUTS[layout], in_memory="adapter", **common)
        yield Run(f"gpt2-{layout}", LAYOUTS[layout], model="gpt2", **common)
        yield Run(f"length-normalize-{layout}", LAYOUTS[layout] | {"length_normalize": True}, **common)
        yield Run(
            f"precomputed-{layout}",
            LAYOUTS[layout] | {"precompute_ref_log_probs": True},
            asks_later=False,
            tolerance=STORED,
            **common,
        )
        yield Run(f"learned-{layout}", LAYOUTS[layout] | {"log_z": "learned"}, rows=lambda: without(branched(
            mixed_rows(16)), "log_z"), eval_rows=lambda: without(branched(mixed_rows(7)), "log_z"))  # fmt: skip
    for choice in LOG_Z:
        own = choice == "column"
        rows = mixed_rows if own else lambda n=12: without(mixed_rows(n), "log_z")
        common = {"rows": rows, "eval_rows": lambda rows=rows: rows(7)}
        yield Run(f"log_z-{choice}", {"log_z": choice, "log_z_learning_rate": 0.05}, **common)
        yield Run(f"log_z-{choice}-lora", {"log_z": choice}, peft=lambda: lora("llama"), **common)
        yield Run(f"log_z-{choice}-2x2", {"log_z": choice} | split(2, 2), **common)
    yield Run("split-4x1", split(4, 1))
    yield Run("split-2x2", split(2, 2))
    yield Run("split-1x4", split(1, 4))
    yield Run("split-5x1-rest", split(5, 1) | {"max_steps": -1, "num_train_epochs": 2}, rows=lambda: mixed_rows(13))
    yield Run("plain-rows", rows=lambda: make_rows(12), eval_rows=lambda: make_rows(5))
    yield Run("plain-rows-pointwise", rows=lambda: make_rows(12), eval_rows=lambda: make_rows(5), pointwise=True)
    yield Run("pairs", rows=pairs, eval_rows=lambda: pairs(4), pointwise=True)
    yield Run("pairs-ulma", rows=pairs, eval_rows=lambda: pairs(4))
    yield Run("chats", rows=chats, eval_rows=lambda: chats(5))
    yield Run("chats-gpt2-pointwise", rows=chats, eval_rows=lambda: chats(5), pointwise=True)
    for pointwise in (False, True):
        name = "pointwise" if pointwise else "ulma"
        common = {"rows": continuous, "eval_rows": lambda: continuous(7), "pointwise": pointwise}
        yield Run(f"continuous-{name}", {"label_type": "continuous"}, **common)
        yield Run(f"continuous-{name}-mean", {"label_type": "continuous", "length_normalize": True}, **common)
        yield Run(f"standardise-{name}", {"label_type": "continuous", "label_transform": "standardise"}, **common)
    yield Run(
        "threshold",
        {"label_type": "continuous", "sft_threshold": 0.5},
        rows=lambda: without(continuous(), "sft_mask"),
        eval_rows=lambda: without(continuous(7), "sft_mask"),
    )
    yield Run("weights", {"desirable_weight": 1.4, "undesirable_weight": 0.6, "sft_weight": 0.3})
    yield Run("length-normalize", {"length_normalize": True})
    yield Run("keep-start", {"max_length": 14})
    yield Run("keep-end", {"max_length": 14, "truncation_mode": "keep_end"})
    yield Run("checkpointing", {"gradient_checkpointing": True})
    yield Run("checkpointing-lora", {"gradient_checkpointing": True}, peft=lambda: lora("llama"))
    yield Run("sync", {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5})
    yield Run("sgd", {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0})
    yield Run("log-every-second", {"logging_steps": 2})
    yield Run("stream", rows=lambda: mixed_rows().to_iterable_dataset())
    yield Run("eager", {"attn_implementation": "eager"})
    yield Run("softcap", model="gemma2")
    yield Run("softcap-lora", model="gemma2", peft=lambda: lora("gemma2"))
    # Mixtures of experts do not run in float64
    common = {"model": "qwen3-moe", "fp32": True, "tolerance": FLOAT32}
    yield Run("experts", SMALL, **common)
    yield Run("experts-2x2", SMALL | split(2, 2) | {"router_aux_loss_coef": 0.3}, **common)
    yield Run("experts-without", SMALL | {"router_aux_loss_coef": 0.0}, **common)
    yield Run("virtual-tokens", peft=lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    yield Run("float32", SMALL, fp32=True, tolerance=FLOAT32)
    yield Run("float32-lora", peft=lambda: lora("gpt2"), model="gpt2", fp32=True, tolerance=FLOAT32)
    yield Run("dpo-config", rows=lambda: make_rows(12), eval_rows=lambda: make_rows(5), pointwise=True)


def split(micro: int, accumulation: int) -> dict[str, int]:
    """Settings that split a step's rows into micro-batches."""
    return {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}


def make_models(folder: Path) -> None:
    """Tiny models with their tokenizer."""
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    special = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    special["pad_token_id"] = tokenizer.pad_token_id
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "output_router_logits": True}
    gpt2 = {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
    torch.manual_seed(0)
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **gpt2, **special)),
        "llama": LlamaForCausalLM(LlamaConfig(**shape, **special)),
        "gemma2": Gemma2ForCausalLM(Gemma2Config(**shape, **special, final_logit_softcapping=3.0, sliding_window=256)),
        "qwen3-moe": Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **special, **experts, router_aux_loss_coef=0.1)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def load(folder: Path, run: Run) -> torch.nn.Module:
    """The run's model in memory."""
    return AutoModelForCausalLM.from_pretrained(folder / run.model, dtype=torch.float32 if run.fp32 else torch.float64)


def other(model: torch.nn.Module) -> torch.nn.Module:
    """The model with other weights, so that it differs from the policy."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


class ExactHead:
    """TRL's fused LM head in the dtype of the weights, since its own computes in float32 whatever they are."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, *_settings):
        """Of each target: log-probability, entropy, nothing, mean logit, whether it is the likeliest token."""
        logits = torch.nn.functional.linear(hidden, weight, bias) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        log_probs = logits.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1).detach()
        of_targets = log_probs.gather(-1, targets[:, None])[:, 0]
        return of_targets, entropy, None, logits.mean(-1).detach(), logits.argmax(-1) == targets


def train(folder: Path, run: Run, out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(figures, final trainable weights) of a run; in the figures are all logs, evaluations, predictions and scores."""
    import trl.trainer.utils as trl_utils

    if hasattr(trl_utils, "_ChunkedLogProbFunction"):
        original, trl_utils._ChunkedLogProbFunction = trl_utils._ChunkedLogProbFunction, ExactHead
        if run.fp32:
            trl_utils._ChunkedLogProbFunction = original
    try:
        trainer, eval_rows = start(folder, run, out)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        found = {"logs": [cleaned(log) for log in trainer.state.log_history], "evaluated": cleaned(trainer.evaluate())}
        found["label_rows"] = trainer.evaluated.tolist()
        if run.asks_later:
            predicted = trainer.predict(eval_rows)
            found["predictions"] = torch.as_tensor(predicted.predictions).double().tolist()
            found["label_ids"] = torch.as_tensor(predicted.label_ids).double().tolist()
            if trainer.has_rewards:
                found["scored"] = [
                    {name: value for name, value in row.items() if not isinstance(value, str | list)}
                    for row in trainer.score(eval_rows)
                ]
    finally:
        if hasattr(trl_utils, "_ChunkedLogProbFunction"):
            trl_utils._ChunkedLogProbFunction = original
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {name: p.detach().clone().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    return found, weights


def start(folder: Path, run: Run, out: Path) -> tuple[PointwiseDPOTrainer | ULMATrainer, Dataset]:
    """(trainer, rows to evaluate) of a run."""
    eval_rows = run.eval_rows()
    settings = {
        "beta": 0.5,
        "learning_rate": 5e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "seed": 3,
        "use_cpu": True,
        "label_report": False,
        "log_level": "error",
        "eval_dataset": eval_rows,
    } | run.settings
    loading = {"dtype": torch.float32 if run.fp32 else torch.float64}
    if "attn_implementation" in settings:
        loading["attn_implementation"] = settings.pop("attn_implementation")
    model: Any = str(folder / run.model)
    if run.in_memory:
        model = load(folder, run)
    else:
        settings["model_init_kwargs"] = loading
    if run.in_memory == "adapter":
        torch.manual_seed(1)
        config = lora(run.model)
        config.init_lora_weights = False  # neither factor is 0: the adapter has been trained before
        model = get_peft_model(model, config)
        model.base_model.model.config._name_or_path = str(folder / run.model)
    if run.given_reference:
        settings["ref_model"] = other(load(folder, run))
    if run.peft is not None:
        settings["peft_config"] = run.peft()
    if run.name == "dpo-config":
        args = DPOConfig(
            str(out), bf16=False, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, beta=0.5,
            gradient_checkpointing=False, dataloader_pin_memory=False, max_steps=4, per_device_train_batch_size=4,
            seed=3, use_cpu=True, learning_rate=5e-3, model_init_kwargs=loading, log_level="error",
        )  # fmt: skip
        return PointwiseDPOTrainer(model, args=args, train_dataset=run.rows(), eval_dataset=eval_rows), eval_rows
    return make_trainer(model, run.rows(), out, pointwise=run.pointwise, **settings), eval_rows


def cleaned(log: dict[str, Any], left_out: tuple[str, ...] = NOT_COMPARED) -> dict[str, Any]:
    """The figures that a run of the same code repeats."""
    return {name: value for name, value in log.items() if not name.endswith(left_out)}


def difference(one: Any, other: Any, where: str = "") -> tuple[float, str]:
    """(largest difference, where it is) of two results; what one of them lacks differs infinitely."""
    if isinstance(one, dict) and isinstance(other, dict):
        extra = sorted(set(other) - set(one))
        if extra:
            print(f"    new at {where or 'top'}: {', '.join(extra)}")
        missing = sorted(set(one) - set(other))
        if missing:
            return math.inf, f"{where}: {', '.join(missing)} missing"
        return max((difference(one[name], other[name], f"{where}/{name}") for name in one), default=(0.0, where))
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return math.inf, f"{where}: {len(other)} values, {len(one)} before"
        return max((difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True))),
                   default=(0.0, where))  # fmt: skip
    if isinstance(one, float | int) and isinstance(other, float | int):
        if math.isnan(one) and math.isnan(other):
            return 0.0, where
        found = abs(one - other) / max(1.0, abs(one))
        return (math.inf if math.isnan(found) else found), where
    return (0.0 if one == other else math.inf), where


def weight_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> tuple[float, str]:
    """(largest difference, its parameter) of weights."""
    if set(one) != set(other):
        return math.inf, f"other parameters are trained: {sorted(set(one) ^ set(other))[:4]}"
    return max(
        (((one[name] - other[name]).abs() / one[name].abs().clamp(min=1)).max().item(), f"weights/{name}")
        for name in one
    )


def main() -> int:
    """Record or compare; 1 if a run differs or fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--redefined", nargs="*", default=[], help="figures that mean something else since the record")
    options = parser.parse_args()
    folder = options.folder.resolve()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    transformers_logging.set_verbosity_error()
    disable_progress_bar()
    torch.set_num_threads(1)
    if options.action == "record":
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "gemma2").exists():
            make_models(folder)
    failed = []
    chosen = [run for run in runs() if not options.names or any(name in run.name for name in options.names)]
    for run in chosen:
        began = time.monotonic()
        out = Path(tempfile.mkdtemp(prefix="baseline-"))
        try:
            found, weights = train(folder, run, out)
        except Exception:  # the other runs are worth having
            print(f"{run.name}: FAILED\n{traceback.format_exc()}", flush=True)
            failed.append(run.name)
            continue
        finally:
            shutil.rmtree(out, ignore_errors=True)
        seconds = time.monotonic() - began
        if options.action == "record":
            (folder / f"{run.name}.json").write_text(json.dumps(found))
            save_file(weights, folder / f"{run.name}.safetensors")
            print(f"{run.name}: {len(found['logs'])} logs, {len(weights)} weights, {seconds:.1f} s", flush=True)
            continue
        before = json.loads((folder / f"{run.name}.json").read_text())
        for result in (before, found):
            result["logs"] = [cleaned(log, tuple(options.redefined)) for log in result["logs"]]
            if "evaluated" in result:
                result["evaluated"] = cleaned(result["evaluated"], tuple(options.redefined))
        # A first comparison as JSON, so that both sides have passed through it
        size, where = max(
            difference(before, json.loads(json.dumps(found))),
            weight_difference(load_file(folder / f"{run.name}.safetensors"), weights),
        )
        verdict = "ok" if size <= run.tolerance else "DIFFERS"
        print(f"{run.name}: {verdict}, {size:.2e} at {where} (allowed {run.tolerance:g}), {seconds:.1f} s", flush=True)
        if verdict != "ok":
            failed.append(run.name)
    print(f"{len(chosen) - len(failed)} of {len(chosen)} runs {'recorded' if options.action == 'record' else 'agree'}")
    if failed:
        print("not: " + ", ".join(failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
