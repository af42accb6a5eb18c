"""The model card: what a model was trained on, against which reference, by which formulas, and how to use it."""

# transformers declares the model of a trainer optional
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false

import dataclasses
import importlib
import importlib.resources
import json
import shlex
import textwrap
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import is_peft_model
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import ProcessorMixin
from transformers.integrations import is_wandb_available
from trl import DPOConfig
from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

from trl_ulma.bootstrap import bootstrap
from trl_ulma.data.origins import names_in_files
from trl_ulma.labels import render_report
from trl_ulma.ranking import RANKING_FIGURES
from trl_ulma.rows.notes import noted
from trl_ulma.rows.rendering import tokenizer_of
from trl_ulma.rows.turns import ends_in_config, ends_of_answers

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
PAPER = {
    "title": "ULMA: Unified Language Model Alignment with Human Demonstration and Point-wise Preference",
    "id": "2312.02554",
    "citation": textwrap.dedent("""\
        @article{cai2023ulma,
            title   = {{ULMA: Unified Language Model Alignment with Human Demonstration and Point-wise Preference}},
            author  = {Tianchi Cai and Xierui Song and Jiyan Jiang and Fei Teng and Jinjie Gu and Guannan Zhang},
            year    = 2023,
            journal = {arXiv preprint arXiv:2312.02554},
        }"""),
}
# What the snippet asks
QUESTION = "How do I boil an egg?"
_SHARED = ("learning_rate", "lr_scheduler_type", "optim", "num_train_epochs", "max_steps", "max_length", "seed")


def write(
    args: Any,
    *,
    model: Any,
    plan: Any,
    processes: int,
    log_history: list[dict[str, Any]],
    label_report: dict[str, Any] | None,
    evaluated: np.ndarray,
    reference: tuple[str, str],
    paper: dict[str, str],
    title: str,
    location: str | None,
    dataset_name: str | None,
    unfinished: tuple[int, int] | None,
) -> None:
    """Write a card into `output_dir`/README.md, whose head DPOTrainer has written: a snippet that uses the model, the
    data and their format, the label report, the reference, formulas, settings, results, and both citations.

    Args:
        label_report: on the training rows, or None.
        evaluated: `(N, 3)` implicit reward, label and whether it is continuous, of the rows of the last evaluation.
        reference: its kind, see `trl_ulma.likelihood.reference.ReferenceIdentity`, and its name.
        paper: title, arXiv number and citation of the method.
        location: the model's name on the hub, or None.
        dataset_name: what the rows are called.
        unfinished: (steps so far, all steps) before the last one; None after it.
    """
    file = Path(args.output_dir) / "README.md"
    head = ModelCard.load(file, ignore_metadata_errors=True).data
    if head.get("licence") == "license":  # TRL's placeholder. The license of the model is for its owner to choose.
        head.pop("licence")
    is_adapter = is_peft_model(model)
    if is_adapter:  # as PEFT names it on the Hub
        head["library_name"] = "peft"
    metrics_of, metrics = _last_figures(log_history)
    intervals = _intervals(evaluated, plan.eval_dataset) if metrics_of.startswith("last evaluation") else {}
    kind, name = reference
    is_chat = trained_on_chat(plan)
    takes_images = isinstance(plan.processing_class, ProcessorMixin)
    columns = {"prompt": "prompt", "completion": "completion", **names_in_files(plan.raw_rows)}
    location = location or (f"{title}/checkpoint-{unfinished[0]}" if unfinished else title)
    began_with = name or head.base_model or "THE-MODEL-THAT-TRAINING-BEGAN-FROM"
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
            as_trained=as_trained(model),
            takes_images=takes_images,
            is_chat=is_chat,
            messages=json.dumps(_messages(args.system_message, takes_images), ensure_ascii=False),
            ends=_ends_in_words(model, tokenizer_of(plan.processing_class)) if is_chat else "",
            location=location,
            location_in_shell=shlex.quote(location),
            unfinished=unfinished,
            has_reference=plan.needs_reference,
            reference=None if is_adapter else shlex.quote(began_with),
            reference_in_words=reference_in_words(kind, name, args),
            columns=columns,
            names=_names_option(columns),
            data=_data_in_words(plan),
            format=_format_in_words(is_chat, args.system_message),
            report=label_report and render_report({**label_report, "raters": {}}),  # people are not named in public
            length_normalize=args.length_normalize,
            formulas=formulas(args.cell, args.binary_loss),
            settings=_settings(args, plan, model, processes),
            metrics=[(name, value, intervals.get(name.removeprefix("eval_"), "")) for name, value in metrics],
            has_intervals=bool(intervals),
            metrics_of=metrics_of,
            versions=[(each, version(each)) for each in ("trl-ulma", "trl", "transformers", "torch", "datasets")],
            citation=paper["citation"],
            wandb_url=_wandb_url(),
            trackio_url=get_trackio_space_url(),
            comet_url=get_comet_experiment_url(),
        )
    card.save(file)


def as_trained(model: Any) -> str:
    """The argument of `from_pretrained` that loads an adapter's base in the number format of the training, from a comma
    on; "" if there is none.

    Without it, the base has the format of its checkpoint, often bfloat16, in which rewards differ. Models without an
    adapter are saved in the format of the training. For a quantized base, the format of the checkpoint is as good.
    """
    if not is_peft_model(model) or getattr(model, "is_quantized", False):
        return ""
    return f', dtype="{str(model.dtype).removeprefix("torch.")}"'


def trained_on_chat(plan: Any) -> bool:
    """Whether the model was trained on conversations, rendered by the chat template, and not on bare text.

    Prepared rows know it; for rows of an older version, a tokenizer with a template decides.
    """
    has_template = getattr(plan.processing_class, "chat_template", None) is not None
    return noted(plan.train_dataset).get("rules", {}).get("is_chat", has_template)


def _ends_in_words(model: Any, tokenizer: Any) -> str:
    """The argument of `generate` that ends answers with the assistant's turn; "" if it does so by itself."""
    ends = ends_of_answers(model, tokenizer)
    return "" if set(ends) == {*ends_in_config(model)} else f", eos_token_id={ends}"


def _names_option(columns: dict[str, str]) -> str:
    """The option of `trl-ulma score` that names the columns of the training data; "" if they have our names.

    Example:
        >>> _names_option({"prompt": "the question", "completion": "reply", "label": "stars"})
        " --columns 'prompt=the question,completion=reply'"
    """
    theirs = {name: columns[name] for name in ("prompt", "completion") if columns[name] != name}
    if not theirs:
        return ""
    return " " + shlex.join(["--columns", ",".join(f"{ours}={name}" for ours, name in theirs.items())])


def _messages(system_message: str | None, takes_images: bool) -> list[dict[str, Any]]:
    texts = [("system", system_message)] if system_message else []
    texts.append(("user", QUESTION))
    return [
        {"role": role, "content": [{"type": "text", "text": text}] if takes_images else text} for role, text in texts
    ]


def _format_in_words(is_chat: bool, system_message: str | None) -> str:
    if not is_chat:
        return (
            "The model was trained on plain text: a prompt is followed by its answer, without a chat template. Prompt "
            "it in the same way."
        )
    said = "The model was trained on conversations, rendered by the tokenizer's chat template."
    if system_message:
        said += f" Conversations without a system message were given this one: “{system_message}”"
    return said


def reference_in_words(kind: str, name: str, args: Any) -> str:
    """What the model was compared with in training.

    Args:
        kind, name: see `trl_ulma.likelihood.reference.ReferenceIdentity`.

    Example:
        >>> from types import SimpleNamespace
        >>> args = SimpleNamespace(precompute_ref_log_probs=True, sync_ref_model=False)
        >>> reference_in_words("copy", "base", args)
        'The reference is the model as it was before training, `base`. It was asked once, before training.'
    """
    named = f", `{name}`" if name else ""
    said = {
        "none": "No row was compared with a reference.",
        "given": f"The reference is a model of its own{named}.",
        "copy": f"The reference is the model as it was before training{named}.",
        "adapter_off": f"The reference is the base model without the adapter{named}.",
        "adapter": "The reference is the adapter that training began with, which is saved in the folder `ref`.",
    }[kind]
    if kind != "none" and args.precompute_ref_log_probs:
        said += " It was asked once, before training."
    if kind != "none" and args.sync_ref_model:
        said += f" It was moved towards the policy every {args.ref_model_sync_steps} steps."
    return said


def _data_in_words(plan: Any) -> str:
    rows, *evaluated = plan.datasets
    said = f"{_count(len(rows), 'row')} of one answer each" if isinstance(rows, Dataset) else "A stream of rows"
    held_out = sum(len(each) for each in evaluated if isinstance(each, Dataset))
    return said + (f"; evaluated on {_count(held_out, 'row')}." if held_out else ".")


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _settings(args: Any, plan: Any, model: Any, processes: int) -> list[tuple[str, Any]]:
    theirs = {f.name for f in dataclasses.fields(DPOConfig)} - {"beta"}
    own = [f.name for f in dataclasses.fields(args) if f.name not in theirs]
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    found = {name: getattr(args, name) for name in (*own, *_SHARED)}
    if plan.rules.transform is not None:
        found["label_transform"] = str(plan.rules.transform)  # with the numbers that were fitted
    found["rows per step"] = batch
    if is_peft_model(model):
        adapter = model.active_peft_config
        found["adapter"] = str(getattr(adapter.peft_type, "value", adapter.peft_type))
        found |= {
            name: getattr(adapter, name) for name in ("r", "lora_alpha", "lora_dropout") if hasattr(adapter, name)
        }
    return [(name, getattr(value, "value", value)) for name, value in found.items()]


def _intervals(evaluated: np.ndarray, rows: Any) -> dict[str, str]:
    """95% intervals of the figures that rank the rows of the last evaluation, from a bootstrap over prompts."""
    if not isinstance(rows, Dataset) or len(rows) != len(evaluated) or not len(rows):
        return {}
    numbers: dict[tuple[int, ...], int] = {}
    group = np.array([numbers.setdefault(tuple(ids), len(numbers)) for ids in rows["prompt_ids"]])
    same_order = np.allclose(evaluated[:, 1], np.asarray(rows["label"][:]), rtol=1e-6)
    if len(numbers) < len(rows) and not same_order:  # several processes gather rows in an order of their own
        return {}
    return bootstrap_intervals(evaluated, group)


def bootstrap_intervals(evaluated: np.ndarray, group: np.ndarray) -> dict[str, str]:
    """95% intervals of `trl_ulma.ranking.RANKING_FIGURES`, from the bootstrap of `trl-ulma evaluate` with its seed.

    A figure that a resample leaves undefined, or that is the same in all of them, has no interval.

    Args:
        evaluated: `(N, 3)` implicit reward, label, and whether it is continuous.
        group: `(N,)` number of each row's prompt.
    """
    said = {}
    for name, (of_kind, figure) in RANKING_FIGURES.items():
        rows = ~np.isnan(evaluated[:, 0]) & of_kind(evaluated[:, 1], evaluated[:, 2].astype(bool))
        of_rows = partial(figure, evaluated[rows, 0], evaluated[rows, 1])
        if rows.any() and np.isfinite(of_rows()):
            found = bootstrap(of_rows, group[rows], seed=0)
            if found.low is not None:
                said[name] = f"{found.low:.3g} to {found.high:.3g}"
    return said


# The loss of compared rows with binary labels, by `binary_loss`
_BINARY = {
    "cross_entropy": "−z·log σ(r) − (1 − z)·log σ(−r)",
    "squared_error": "(σ(r) − z)²",
    "kto": "z·(1 − σ(r)) + (1 − z)·(1 − σ(−r))",
}


def formulas(cell: tuple[str, str], binary_loss: str = "cross_entropy") -> str:
    """What each kind of row adds to the loss, as Markdown.

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
            f"- rows that are compared: {_BINARY[binary_loss]}, or (z − r)² if the label z is continuous",
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
