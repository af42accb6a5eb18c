"""The model card: on which labels a model was trained, by which formulas, and how to use it, as a judge too."""

# transformers declares the model of a trainer optional
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false

import dataclasses
import importlib
import importlib.resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import ProcessorMixin
from transformers.integrations import is_wandb_available
from trl import DPOConfig
from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

from trl_ulma.labels import render_report

# (positive_loss, negative_loss): the method's name in the paper
METHODS = {
    ("sft", "pointwise_dpo"): "ULMA",
    ("pointwise_dpo", "pointwise_dpo"): "pointwise DPO",
    ("sft", "unlearning"): "unlikelihood training",
    ("sft", "none"): "SFT",
    ("pointwise_dpo", "none"): "positive DPO",
    ("none", "pointwise_dpo"): "negative DPO",
    ("none", "unlearning"): "unlearning",
}
_SHARED = ("learning_rate", "lr_scheduler_type", "optim", "num_train_epochs", "max_steps", "max_length", "seed")


def write(
    args: Any,
    *,
    model: Any,
    plan: Any,
    processes: int,
    log_history: list[dict[str, Any]],
    label_report: dict[str, Any] | None,
    paper: dict[str, str],
    title: str,
    location: str | None,
    dataset_name: str | None,
) -> None:
    """Write a card into `output_dir`/README.md, whose head DPOTrainer has written: data, label report, formulas,
    settings, figures, both citations.

    Args:
        args: the trainer's config.
        model: the policy without wrappers.
        plan: the `TrainingPlan`.
        processes: that train.
        log_history: what was logged.
        label_report: on the training rows, or None.
        paper: title, arXiv number and citation of the method.
        title: the card's.
        location: the model's name on the hub, or None.
        dataset_name: what the rows are called.
    """
    file = Path(args.output_dir) / "README.md"
    head = ModelCard.load(file, ignore_metadata_errors=True).data
    is_adapter = is_peft_model(model)
    metrics_of, metrics = _last_figures(log_history)
    template = importlib.resources.files("trl_ulma") / "templates" / "model_card.md.jinja"
    with importlib.resources.as_file(template) as path:
        card = ModelCard.from_template(
            head,
            template_path=str(path),
            model_name=title,
            base_model=head.base_model,
            dataset_name=dataset_name,
            method=METHODS[args.cell],
            paper_title=paper["title"],
            paper_id=paper["id"],
            is_adapter=is_adapter,
            takes_images=isinstance(plan.processing_class, ProcessorMixin),
            is_chat=getattr(plan.processing_class, "chat_template", None) is not None,
            location=location or title,
            has_reference=plan.needs_reference,
            reference=None if is_adapter else head.base_model or "THE-MODEL-THAT-TRAINING-BEGAN-FROM",
            data=_data_in_words(plan),
            report=label_report and render_report(label_report),
            length_normalize=args.length_normalize,
            formulas=formulas(args.cell),
            settings=_settings(args, model, processes),
            metrics=metrics,
            metrics_of=metrics_of,
            versions=[(each, version(each)) for each in ("trl-ulma", "trl", "transformers", "torch", "datasets")],
            citation=paper["citation"],
            wandb_url=_wandb_url(),
            trackio_url=get_trackio_space_url(),
            comet_url=get_comet_experiment_url(),
        )
    card.save(file)


def _data_in_words(plan: Any) -> str:
    rows, *evaluated = plan.datasets
    said = f"{len(rows):,} rows of one answer each" if isinstance(rows, Dataset) else "A stream of rows"
    held_out = sum(len(each) for each in evaluated if isinstance(each, Dataset))
    return said + (f"; evaluated on {held_out:,} others." if held_out else ".")


def _settings(args: Any, model: Any, processes: int) -> list[tuple[str, Any]]:
    theirs = {f.name for f in dataclasses.fields(DPOConfig)} - {"beta"}
    own = [f.name for f in dataclasses.fields(args) if f.name not in theirs]
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    found = [(name, getattr(args, name)) for name in (*own, *_SHARED)]
    found.append(("rows per step", batch))
    if is_peft_model(model):
        adapter = model.active_peft_config
        found.append(("adapter", str(getattr(adapter.peft_type, "value", adapter.peft_type))))
        found += [
            (name, getattr(adapter, name)) for name in ("r", "lora_alpha", "lora_dropout") if hasattr(adapter, name)
        ]
    return [(name, getattr(value, "value", value)) for name, value in found]


def formulas(cell: tuple[str, str]) -> str:
    """What each kind of row adds to the loss, as Markdown.

    Args:
        cell: (positive_loss, negative_loss).

    Example:
        >>> print(formulas(("sft", "none")))
        - demonstrations: −sft_weight · log π_θ(y|x)
        - bad answers: nothing
    """
    positive, negative = cell
    lines = []
    if "pointwise_dpo" in cell:
        lines += [
            "- r = β · (log π_θ(y|x) − log π_ref(y|x) + log Z(x)), the implicit reward",
            "- rows that are compared: −z·log σ(r) − (1 − z)·log σ(−r), or (z − r)² where the label z is continuous",
        ]
    if positive == "sft":
        both = ", added to (z − r)² where the label is continuous" if negative == "pointwise_dpo" else ""
        lines.append(f"- demonstrations: −sft_weight · log π_θ(y|x){both}")
    if negative == "unlearning":
        lines.append("- bad answers: +log π_θ(y|x)")
    if positive == "none":
        lines.append("- good answers: nothing")
    if negative == "none":
        lines.append("- bad answers: nothing")
    return "\n".join(lines)


def _last_figures(history: list[dict[str, Any]]) -> tuple[str, list[tuple[str, str]]]:
    """(of what, name and value of each figure) of the last evaluation, or else of the last steps that were logged."""
    for words, prefix in (("last evaluation, step {}", "eval_"), ("last logged steps, to step {}", "")):
        for logs in reversed(history):
            if f"{prefix}loss" in logs:
                found = {name: value for name, value in logs.items() if name.startswith(prefix)}
                return words.format(logs.get("step", "?")), [
                    (name, f"{float(value):.4g}")
                    for name, value in found.items()
                    if name != "step" and not name.endswith(("_runtime", "_per_second"))
                ]
    return "", []


def _wandb_url() -> str | None:
    if not is_wandb_available():
        return None
    run = importlib.import_module("wandb").run
    return None if run is None else run.url
