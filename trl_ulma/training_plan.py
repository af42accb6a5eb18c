"""The plan of a training before its model is loaded: checked settings, and checked and prepared rows."""

# In transformers' type hints, a trainer's dataset and processing class are optional or have many types
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, ProcessorMixin
from trl import DPOConfig
from trl.trainer.utils import get_config_model_id

from trl_ulma.checkpoints import refuse_pickle
from trl_ulma.config import PointwiseDPOConfig, ULMAConfig
from trl_ulma.config_checks import check_best_metric, check_with_data
from trl_ulma.labels import InvalidRows, LabelRules, contradictions_in_words
from trl_ulma.likelihood.layouts import positions_of
from trl_ulma.likelihood.table import collator_for
from trl_ulma.log_z import check_column, check_groups, check_labels, with_groups
from trl_ulma.main_process import get_logger
from trl_ulma.metrics import EVALUATED
from trl_ulma.rows.dataset_labels import (
    contradictions,
    evaluated_figures,
    label_center,
    labels_before,
    outliers_of,
    repeats_of,
    terms_of,
    with_transform,
)
from trl_ulma.rows.images import check_settings, has_images
from trl_ulma.rows.preparation import Preparation
from trl_ulma.rows.rendering import own_processing_class, tokenizer_of
from trl_ulma.versions import global_then_local_main_first, is_kto_config

logger = get_logger(__name__)

# The entries of `model_init_kwargs` that locate a model's configuration
_WHERE = ("revision", "subfolder", "token", "cache_dir", "gguf_file", "trust_remote_code")

# Types of adapters that are a part of the cache of keys and values
_CACHED = ("PREFIX_TUNING", "CARTRIDGE")
# The ends of names of model classes that give labels to a text
_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")

NO_REFERENCE = (
    "The {} dataset has rows that are compared with the reference, but no reference was loaded, because no row seen at "
    "the start needed one. (With this loss, these are all rows except demonstrations, or only liked rows.) Pass this "
    "dataset to the trainer as an eval_dataset."
)


@dataclass
class TrainingPlan:
    """The settings and rows of a training.

    Attributes:
        args: the trainer's own config.
        processing_class: the tokenizer or processor, with all required tokens.
        data_collator: the collator that was passed, or else the default one.
        train_dataset: prepared rows.
        eval_dataset: prepared rows, a dict of such datasets, or None.
        needs_reference: whether any row is compared with the reference.
        positions: how many tokens the model can read at most; None if that has no end.
        vocab_size: how many tokens the model has embeddings for.
        peft_config: of the adapter that is trained, or None.
        stream_has_mask: whether the rows of a stream name the demonstrations themselves.
        raw_labels: `(N,)` labels of the training rows before the label transform, or None, see `labels_before`.
        raw_rows: the training rows before they were prepared.
    """

    args: PointwiseDPOConfig
    processing_class: Any
    rules: LabelRules
    positions: int | None
    vocab_size: int | None
    peft_config: Any
    data_collator: Any = None
    train_dataset: Any = None
    eval_dataset: Any = None
    needs_reference: bool = True
    stream_has_mask: bool = False
    raw_labels: np.ndarray | None = None
    raw_rows: Any = None

    @property
    def layout(self) -> str:
        """How the rows of a batch are laid out for the model, see `trl_ulma.likelihood.layouts`."""
        return "packed" if self.args.padding_free else "shared" if self.args.share_prompts else "padded"

    @property
    def datasets(self) -> list[Dataset | IterableDataset]:
        """The training dataset and all evaluation datasets."""
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return [dataset for dataset in (self.train_dataset, *evaluated) if dataset is not None]

    @cached_property
    def label_center(self) -> float:
        """The center of the training set's continuous labels, see `trl_ulma.rows.dataset_labels.label_center`."""
        return label_center(self.train_dataset, self.rules.label_type)

    def compared(self, dataset: Dataset) -> np.ndarray:
        """`(N,)` bool: the prepared rows whose loss needs the reference."""
        return terms_of(dataset, self.rules.label_type, self.args.cell).compared.numpy()

    def figures_of(self, dataset: Dataset | IterableDataset | None) -> Sequence[str]:
        """Names of the figures that an evaluation of prepared rows logs; of a stream, or if no rows are known, all."""
        if not isinstance(dataset, Dataset):
            return EVALUATED
        return evaluated_figures(dataset, self.args, self.label_center, has_rewards=self.needs_reference)

    def prepare(self, dataset: Any, name: str) -> Any:
        """Prepare raw rows. Rows that are already prepared are returned unchanged.

        Raises:
            ValueError: if rows are not valid for training.
        """
        if isinstance(self.processing_class, ProcessorMixin) and has_images(dataset):
            check_settings(self.args, name, self.peft_config)
        prepare = Preparation(
            self.processing_class,
            self.rules,
            self.args.max_length,
            self.args.truncation_mode,
            self.positions,
            keeps_prompts=name != "train",
            invalid_rows=self.args.invalid_rows,
            assistant_only_loss=self.args.assistant_only_loss,
            chat=self.args.chat,
            system_message=self.args.system_message,
            vocab_size=self.vocab_size,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
        )
        with global_then_local_main_first():
            if isinstance(dataset, IterableDataset):
                # If rows have their own sft_mask, the stream can contain a liked row, which needs the reference
                first = next(iter(dataset.with_format(None)), None)
                self.stream_has_mask |= isinstance(first, dict) and "sft_mask" in first
            prepared = prepare(dataset, name, self.args.dataset_num_proc)
        if not self.needs_reference and isinstance(prepared, Dataset) and self.compared(prepared).any():
            raise ValueError(NO_REFERENCE.format(name))
        check_column(self.args.log_z, prepared, name, self.train_dataset)
        return with_groups(prepared, self.args, self.compared, name)

    def _may_compare(self, dataset: Dataset | IterableDataset) -> bool:
        """Whether any row needs the reference. For a stream, whether any row might need it."""
        if isinstance(dataset, Dataset):
            return bool(self.compared(dataset).any())
        return "pointwise_dpo" in self.args.cell or self.stream_has_mask

    def _may_have_mask(self, dataset: Dataset | IterableDataset) -> bool:
        """Whether any row is marked as a demonstration. For a stream, whether any row might be."""
        if isinstance(dataset, Dataset):
            return bool(np.any(dataset["sft_mask"][:]))
        return self.stream_has_mask or self.rules.sft_threshold is not None


def make_plan(
    model: Any,
    args: PointwiseDPOConfig,
    train_dataset: Any,
    eval_dataset: Any = None,
    processing_class: Any = None,
    peft_config: Any = None,
    data_collator: Any = None,
    *,
    needs_mask: bool,
    ref_model: Any = None,
    has_own_metrics: bool = False,
) -> TrainingPlan:
    """Check the settings and rows, and prepare the rows, before a model is loaded.

    Args:
        model, train_dataset, eval_dataset, processing_class, peft_config, data_collator: the trainer's arguments.
        args: the trainer's own config, see `own_config`.
        ref_model: the reference's own model, which reads the same rows, or None.
        needs_mask: whether labels determine the demonstrations if rows have no `sft_mask`.
        has_own_metrics: whether evaluation computes metrics that the user defined.

    Raises:
        TypeError, ValueError: if the rows or settings are not valid for training.
    """
    _check_kinds(args, train_dataset, eval_dataset)
    if not isinstance(model, str):
        _check_model(model, "model")
        _check_layers(model, has_peft=peft_config is not None)
    if ref_model is not None and not isinstance(ref_model, str):
        _check_model(ref_model, "ref_model")
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config must be one of PEFT's, such as a LoraConfig; got {type(peft_config).__name__}.")
    if isinstance(model, str):
        loading: Any = args.model_init_kwargs or {}
        if (Path(model) / "adapter_config.json").exists() and not (Path(model) / "config.json").exists():
            raise ValueError(
                f"{model} is the folder of an adapter, not of a model. To train the adapter further, load its base "
                "model, pass both to PeftModel.from_pretrained(base, folder, is_trainable=True), and pass the result "
                "as model."
            )
        if loading.get("subfolder"):
            there = f"{model}/{loading['subfolder']}"
            raise ValueError(
                f"model_init_kwargs={{'subfolder': {loading['subfolder']!r}}} is not supported, because DPOTrainer "
                f"looks for the model's config and tokenizer in {model} itself. Pass the folder {there} as model. If "
                "it is on the Hub, download it first with huggingface_hub.snapshot_download."
            )
        refuse_pickle(model, loading)
        if "gguf_file" not in loading:
            args.model_init_kwargs = {"use_safetensors": True, **loading}
    task = getattr(peft_config, "task_type", None)
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"peft_config has task_type={str(getattr(task, 'value', task))!r}, with which PEFT would load the saved "
            "adapter as another kind of model. Set task_type='CAUSAL_LM'."
        )
    if getattr(peft_config, "inference_mode", False):
        raise ValueError(
            "peft_config has inference_mode=True, as the config of a saved adapter does, so the new adapter would be "
            "frozen. Set peft_config.inference_mode = False. To train a saved adapter further, load it with "
            "PeftModel.from_pretrained(..., is_trainable=True) and pass it as the model."
        )
    has_peft = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
    if args.sync_ref_model and has_peft:
        raise ValueError(
            "sync_ref_model=True needs a separate reference model, but with PEFT the reference is the model without "
            "its adapter. Set it to False, or fine-tune the whole model."
        )
    source = model if isinstance(model, str) else get_config_model_id(model.config)
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
    processing_class = own_processing_class(
        processing_class, source, args.pad_token, revision=revision, trust_remote_code=args.trust_remote_code
    )
    threshold = getattr(args, "sft_threshold", None)
    rules = LabelRules(args.label_type, threshold, needs_mask, args.cell[1] == "unlearning")
    rules = with_transform(rules, args.label_transform, train_dataset)
    if not isinstance(model, str) and is_peft_model(model):
        peft_config = model.active_peft_config
    kind = getattr(getattr(peft_config, "peft_type", None), "value", "")
    if kind in _CACHED and args.gradient_checkpointing:
        raise ValueError(
            f"{kind} adapters put their prefix into the cache of keys and values, which gradient checkpointing "
            "switches off. Set gradient_checkpointing=False, or train another adapter, such as LoRA."
        )
    if getattr(peft_config, "alora_invocation_tokens", None) and args.gradient_checkpointing:
        raise ValueError(
            "With gradient checkpointing, aLoRA adapters (alora_invocation_tokens) allow one forward pass before each "
            "backward pass, but the reference needs another. Set gradient_checkpointing=False, or train another "
            "adapter, such as LoRA."
        )
    positions, vocab_size = _sizes(model, args, peft_config)
    if ref_model is not None:
        other = _sizes(ref_model, args, getattr(ref_model, "active_peft_config", None))
        sizes = zip((positions, vocab_size), other, strict=True)
        positions, vocab_size = (min((s for s in both if s is not None), default=None) for both in sizes)
    plan = TrainingPlan(args, processing_class, rules, positions, vocab_size, peft_config, raw_rows=train_dataset)
    evaluated = {} if eval_dataset is None else {"eval": eval_dataset}
    if isinstance(eval_dataset, dict):
        evaluated = eval_dataset
    prepared, refused = [], []
    for name, dataset in (("train", train_dataset), *evaluated.items()):
        try:
            prepared.append(plan.prepare(dataset, name))
        except InvalidRows as problem:  # list the invalid rows of all datasets at once
            refused.append(problem)
    if refused:
        raise InvalidRows.joined(refused)
    plan.train_dataset = prepared[0]
    plan.raw_labels = labels_before(plan.train_dataset, args, train_dataset)
    for (name, raw), rows in zip(evaluated.items(), prepared[1:], strict=True):
        check_column(args.log_z, rows, name, plan.train_dataset)
        if isinstance(rows, Dataset) and isinstance(plan.train_dataset, Dataset):
            warning = contradictions((plan.train_dataset, train_dataset), (rows, raw), args, name)
            if warning is not None:
                logger.warning(warning)
        if isinstance(rows, Dataset):
            trained = (plan.train_dataset, train_dataset)
            for warning in contradictions_in_words(repeats_of(rows, args, raw)) + outliers_of(
                trained, (rows, raw), args
            ):
                logger.warning(f"The {name} dataset: {warning}")
    if isinstance(eval_dataset, dict):
        plan.eval_dataset = dict(zip(evaluated, prepared[1:], strict=True))
    elif eval_dataset is not None:
        plan.eval_dataset = prepared[1]
    plan.needs_reference = any(map(plan._may_compare, plan.datasets))
    has_mask = any(map(plan._may_have_mask, plan.datasets))
    check_with_data(args, needs_reference=plan.needs_reference, has_mask=has_mask)
    check_labels(args, plan.train_dataset, plan.compared)
    if args.log_z == "group":
        check_groups(args, plan.train_dataset, plan.compared(plan.train_dataset))
    if args.metric_for_best_model is not None and not has_own_metrics:
        evaluated = plan.eval_dataset if isinstance(plan.eval_dataset, dict) else {"": plan.eval_dataset}
        logged = {name: plan.figures_of(rows) for name, rows in evaluated.items()}
        check_best_metric(args.metric_for_best_model, logged, in_groups=args.log_z == "group")
    plan.data_collator = data_collator
    _check_padding(tokenizer_of(processing_class), vocab_size)
    if data_collator is not None:
        check_collator(data_collator, plan.train_dataset)
    else:
        names = ("max_length", "truncation_mode", "pad_to_multiple_of", "label_type")
        settings = {name: getattr(args, name) for name in names}
        plan.data_collator = collator_for(processing_class, sft_threshold=threshold, **settings)
        for rows in filter(has_images, plan.datasets):
            plan.data_collator(list(islice(rows, 2)))  # raises the processor's errors before a model is loaded
    return plan


def own_config(config_class: type[PointwiseDPOConfig], trainer: str, model: Any, args: Any) -> PointwiseDPOConfig:
    """The trainer's own config. The caller's config is not changed.

    Args:
        config_class: the config class of the trainer.
        trainer: the name of the trainer, for messages.
        model: the trainer's `model` argument.
        args: the trainer's `args` argument.

    Raises:
        TypeError: if `args` is not a config of this trainer.
        ValueError: if the trainer does not support a value.
    """
    name = config_class.__name__
    if args is None:
        source = model if isinstance(model, str) else get_config_model_id(model.config)
        return config_class(f"{source.split('/')[-1]}-{name.removesuffix('Config')}")
    if isinstance(args, ULMAConfig) and not issubclass(config_class, ULMAConfig):
        raise TypeError(
            f"{trainer} has only one method and takes a PointwiseDPOConfig; got a ULMAConfig, which selects a method. "
            "Use ULMATrainer."
        )
    if isinstance(args, config_class):
        args.check()  # attributes may have been changed since the config was created
        own = copy.copy(args)
        own.accelerator_config = copy.deepcopy(args.accelerator_config)  # Trainer writes into it for streams
        return own
    if isinstance(args, DPOConfig):
        return config_class.from_dpo_config(args)
    if is_kto_config(args):
        return config_class.from_kto_config(args)
    raise TypeError(f"args must be a {name}, a trl.DPOConfig or a trl.KTOConfig; got {type(args).__name__}.")


def _check_kinds(args: PointwiseDPOConfig, train_dataset: Any, eval_dataset: Any) -> None:
    if train_dataset is None:
        raise TypeError("train_dataset is None. Pass rows with prompt, completion and label, or pairs.")
    if not isinstance(train_dataset, Dataset | IterableDataset):
        raise TypeError(
            f"train_dataset must be a Dataset or an IterableDataset; got {type(train_dataset).__name__}. If it is a "
            "dict of splits, pass one of them, such as dataset['train']."
        )
    if isinstance(train_dataset, IterableDataset) and args.max_steps <= 0:
        raise ValueError("train_dataset is a stream, so its length is unknown. Set max_steps.")
    if eval_dataset == {}:
        raise ValueError("eval_dataset is an empty dict, so nothing would be evaluated. Pass a dataset, or None.")
    evaluated: Iterable[Any] = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    if args.precompute_ref_log_probs and any(isinstance(d, IterableDataset) for d in (train_dataset, *evaluated)):
        raise ValueError(
            "precompute_ref_log_probs=True needs all rows at the start, but a dataset is a stream. Set it to False, or "
            "load the dataset without streaming."
        )


def _check_model(model: Any, argument: str) -> None:
    """Raise TypeError if a model in memory does not generate text token by token."""
    config = getattr(model, "config", None)
    if not hasattr(model, "generation_config") or getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"{argument} is a {type(model).__name__}, which is not a causal language model. Load it with "
            "AutoModelForCausalLM, and pass it without wrappers for several devices."
        )


def _check_architecture(config: Any, name: str) -> None:
    """Raise TypeError if the model of a configuration does not generate text token by token."""
    architecture = (config.architectures or [""])[0]
    is_bare = architecture.endswith("Model") and not architecture.endswith(("HeadModel", "HeadsModel"))
    is_bare &= not getattr(config, "auto_map", None)  # a model with code of its own can have any name
    if config.is_encoder_decoder or is_bare or architecture.endswith(_CLASSIFIERS):
        raise TypeError(
            f"{name} is a {architecture or config.model_type}, which is not a causal language model. Name a model "
            "whose class generates text, such as LlamaForCausalLM."
        )


def _check_layers(model: Any, *, has_peft: bool) -> None:
    """Raise ValueError if a model in memory would be saved without some of its weights, or under other names."""
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "model is compiled (torch.compile), so its weights would be saved under names that do not load. Pass the "
            "model itself, and set torch_compile=True."
        )
    # With a peft_config, the new adapter is what is saved
    if not (has_peft or is_peft_model(model) or getattr(model, "_hf_peft_config_loaded", False)):
        adapted = next((name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)), None)
        if adapted is not None:
            raise ValueError(
                f"model has layers of an adapter ({adapted}), which a PeftModel of it or an earlier training has put "
                "there, so it would be saved without these layers' weights. Pass the PeftModel, call its unload() or "
                "merge_and_unload() and pass the result, or load the model once more."
            )


def _check_padding(tokenizer: Any, vocab_size: int | None) -> None:
    if vocab_size is not None and tokenizer.pad_token_id >= vocab_size:
        raise ValueError(
            f"The padding token {tokenizer.pad_token!r} has the id {tokenizer.pad_token_id}, but the model only has "
            f"embeddings for ids below {vocab_size}. Call model.resize_token_embeddings(len(tokenizer)), or set "
            "pad_token to a token that the model knows."
        )


def check_collator(collator: Any, rows: Any) -> None:
    """Raise ValueError if a collator does not create batches of labeled rows."""
    name = getattr(collator, "__name__", type(collator).__name__)
    remedy = "Leave out data_collator, or pass a DataCollatorForPointwisePreference or a subclass of it."
    examples = [dict(row) for row in islice(rows, 2)]
    if isinstance(rows, Dataset):  # two rows that need padding
        length = np.asarray(rows["length"][:])
        examples = [dict(rows[int(i)]) for i in (length.argmin(), length.argmax())]
    try:
        batch = collator(examples)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"data_collator is {name}, which cannot collate prepared rows ({type(error).__name__}: {error}). {remedy}"
        ) from error
    needed: tuple[str, ...] = ("input_ids", "attention_mask", "completion_mask", "label", "sft_mask")
    # Fillers are told from other rows by `row`
    optional = {"label_type": "continuous"} | {name: name for name in ("weight", "log_z", "row", "group")}
    needed += tuple(key for column, key in optional.items() if examples and column in examples[0])
    missing = [key for key in needed if key not in batch]
    if missing:
        raise ValueError(f"data_collator is {name}, whose batches lack {', '.join(missing)}. {remedy}")
    if (batch["attention_mask"].diff(dim=1) > 0).any():
        raise ValueError(
            f"data_collator is {name}, whose batches have padding before tokens. Pad on the right, because the "
            f"positions of tokens are counted from the left. {remedy}"
        )


def _sizes(model: Any, args: PointwiseDPOConfig, peft_config: Any) -> tuple[int | None, int | None]:
    """The maximum number of tokens that the model can read (None if there is no limit, as with rotary positions), and
    the number of tokens that it has embeddings for."""
    embeddings = None
    if isinstance(model, str):
        loading = {k: v for k, v in (args.model_init_kwargs or {}).items() if k in _WHERE}
        loading.setdefault("trust_remote_code", args.trust_remote_code)
        config = AutoConfig.from_pretrained(model, **loading)
        _check_architecture(config, model)
    else:
        config = model.config
        embeddings = getattr(model.get_input_embeddings(), "num_embeddings", None)
    positions = positions_of(config)
    if positions is not None:
        positions -= getattr(peft_config, "num_virtual_tokens", None) or 0
    return positions, embeddings or getattr(config.get_text_config(), "vocab_size", None)
