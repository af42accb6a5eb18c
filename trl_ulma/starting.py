"""What a trainer does before its model is loaded: settings and rows are checked, and rows are prepared."""

# transformers declares the dataset and the processing class of a trainer optional or of many kinds
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, DataCollator, PreTrainedTokenizerBase, ProcessorMixin
from trl import DPOConfig
from trl.trainer.utils import get_config_model_id, global_then_local_main_first

from trl_ulma.checkpoints import refuse_pickle
from trl_ulma.config import PointwiseDPOConfig, ULMAConfig
from trl_ulma.estimating import check_column, check_labels
from trl_ulma.labels import LabelRules
from trl_ulma.likelihood.layouts import positions_of
from trl_ulma.likelihood.reference import AsksReference
from trl_ulma.rows.collator import DataCollatorForPointwisePreference
from trl_ulma.rows.dataset_labels import with_transform
from trl_ulma.rows.images import DataCollatorForVisionPointwisePreference, check_settings, has_images
from trl_ulma.rows.preparation import Preparation
from trl_ulma.rows.rendering import own_processing_class, tokenizer_of

# Of `model_init_kwargs`, what says where a model's configuration is
_WHERE = ("revision", "subfolder", "token", "cache_dir", "gguf_file", "trust_remote_code")

NO_REFERENCE = (
    "The {} dataset has rows that are compared with the reference, and there is none, since no row seen at the start "
    "needed it. (With this loss these are all rows but demonstrations, or liked ones alone.) Pass this data set to the "
    "trainer as an eval_dataset."
)


@dataclass(frozen=True)
class Start:
    """What is known of a training before its model is loaded.

    Attributes:
        args: the trainer's config.
        processing_class: with all tokens that are needed.
        data_collator: the one that is given, or else our own.
        train_dataset: prepared rows.
        eval_dataset: the same, or a dict of such, or None.
        has_reference: whether a row is compared with the reference.
    """

    args: PointwiseDPOConfig
    processing_class: Any
    data_collator: Any
    train_dataset: Dataset | IterableDataset
    eval_dataset: Any
    has_reference: bool


class ChecksFirst(AsksReference):
    """A `DPOTrainer` whose rows and settings are all checked before its model is loaded."""

    _config_class: type[PointwiseDPOConfig]
    _needs_mask: bool

    @classmethod
    def dry_run(
        cls,
        model: Any,
        args: DPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        peft_config: Any = None,
    ) -> "Start":
        """What the constructor does before it loads a model: settings and rows are checked, and rows are prepared.

        Arguments are the constructor's. What the machine lacks for a setting is left to the one that will train.

        Raises:
            ValueError: for rows or settings that can not be learned from.
        """
        return cls.__new__(cls)._start(model, args, train_dataset, eval_dataset, processing_class, peft_config)

    def _start(
        self,
        model: Any,
        args: DPOConfig | None,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: Any,
        peft_config: Any,
        data_collator: Any = None,
        has_own_metrics: bool = False,
    ) -> "Start":
        args = self._own_config(model, args)
        if not isinstance(train_dataset, Dataset | IterableDataset):
            raise TypeError(
                f"train_dataset must be a Dataset or an IterableDataset; got {type(train_dataset).__name__}. Of a "
                "dict of splits, pass one, as dataset['train']."
            )
        self._check_streams(args, train_dataset, eval_dataset)
        if isinstance(model, str):
            loading: Any = args.model_init_kwargs or {}
            refuse_pickle(model, loading)
            if "gguf_file" not in loading:
                args.model_init_kwargs = {"use_safetensors": True, **loading}
        has_peft = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
        if args.sync_ref_model and has_peft:
            raise ValueError(
                "sync_ref_model=True needs a reference model of its own; with PEFT the reference is the model without "
                "its adapter. Leave it at False, or fine-tune the whole model."
            )
        source = model if isinstance(model, str) else get_config_model_id(model.config)
        revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
        processing_class = own_processing_class(
            processing_class, source, args.pad_token, revision=revision, trust_remote_code=args.trust_remote_code
        )

        self._cell = args.cell
        threshold = getattr(args, "sft_threshold", None)
        rules = LabelRules(args.label_type, threshold, self._needs_mask, self._cell[1] == "unlearning")
        self._rules = with_transform(rules, args.label_transform, train_dataset)
        self._peft_config = (
            peft_config if isinstance(model, str) or not is_peft_model(model) else model.active_peft_config
        )
        self._positions = _positions(model, args, self._peft_config)
        self._has_reference = True
        self._stream_has_mask = False
        train_dataset = self._prepare_dataset(train_dataset, processing_class, args, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: self._prepare_dataset(dataset, processing_class, args, name)
                for name, dataset in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = self._prepare_dataset(eval_dataset, processing_class, args, "eval")
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        datasets = [dataset for dataset in (train_dataset, *evaluated) if dataset is not None]
        self._has_reference = any(self._may_compare(dataset) for dataset in datasets)
        has_mask = any(self._may_have_mask(dataset) for dataset in datasets)
        args.check_with_data(needs_reference=self._has_reference, has_mask=has_mask)
        check_labels(args, train_dataset, self._compared)
        if args.metric_for_best_model is not None and not has_own_metrics:
            args.check_best_metric(list(eval_dataset) if isinstance(eval_dataset, dict) else [])
        if data_collator is None:
            data_collator = self._own_collator(processing_class, args)
            for rows in filter(has_images, datasets):
                data_collator(list(islice(rows, 2)))  # what the processor can not take is told before a model is loaded
        return Start(args, processing_class, data_collator, train_dataset, eval_dataset, self._has_reference)

    def _own_collator(self, processing_class: Any, args: PointwiseDPOConfig) -> DataCollator:
        collator_class: Any = DataCollatorForPointwisePreference
        if isinstance(processing_class, ProcessorMixin):
            collator_class = partial(DataCollatorForVisionPointwisePreference, processor=processing_class)
        return collator_class(
            pad_token_id=tokenizer_of(processing_class).pad_token_id,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            pad_to_multiple_of=args.pad_to_multiple_of,
            label_type=args.label_type,
            sft_threshold=self._rules.sft_threshold,
        )

    def _own_config(self, model: Any, args: DPOConfig | None) -> PointwiseDPOConfig:
        own = self._config_class
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            return own(f"{name.split('/')[-1]}-{own.__name__.removesuffix('Config')}")
        if isinstance(args, ULMAConfig) and not issubclass(own, ULMAConfig):
            raise TypeError(
                f"{type(self).__name__} has one method and takes a PointwiseDPOConfig; got a ULMAConfig, which chooses "
                "between methods. Use ULMATrainer."
            )
        if isinstance(args, own):
            args.check()  # attributes may have been set since it was made
            return args
        if isinstance(args, DPOConfig):
            return own.from_dpo_config(args)
        raise TypeError(f"args must be a {own.__name__} or a trl.DPOConfig; got {type(args).__name__}.")

    def _may_have_mask(self, dataset: Dataset | IterableDataset) -> bool:
        """Whether a row is marked as a demonstration. Rows of a stream are not known: whether one could be."""
        if isinstance(dataset, Dataset):
            return bool(np.any(dataset["sft_mask"][:]))
        return self._stream_has_mask or self._rules.sft_threshold is not None

    @staticmethod
    def _check_streams(args: PointwiseDPOConfig, train_dataset: Any, eval_dataset: Any) -> None:
        if isinstance(train_dataset, IterableDataset) and args.max_steps <= 0:
            raise ValueError("train_dataset is a stream, whose length is not known. Set max_steps.")
        evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        if args.precompute_ref_log_probs and any(isinstance(d, IterableDataset) for d in (train_dataset, *evaluated)):
            raise ValueError(
                "precompute_ref_log_probs=True needs all rows at the start, which a stream does not have. Leave it at "
                "False, or load the data set without streaming."
            )

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if self._is_own(dataset):
            return dataset
        if isinstance(processing_class, ProcessorMixin) and has_images(dataset):
            check_settings(args, dataset_name, self._peft_config)
        prepare = Preparation(
            processing_class,
            self._rules,
            args.max_length,
            args.truncation_mode,
            self._positions,
            keeps_prompts=dataset_name != "train",
            invalid_rows=args.invalid_rows,
            assistant_only_loss=args.assistant_only_loss,
            chat=args.chat,
            system_message=args.system_message,
        )
        with global_then_local_main_first():
            if isinstance(dataset, IterableDataset):
                # Where the rows themselves name the demonstrations, a liked one may come that is compared
                first = next(iter(dataset.with_format(None)), None)
                self._stream_has_mask |= isinstance(first, dict) and "sft_mask" in first
            prepared = prepare(dataset, dataset_name, args.dataset_num_proc)
        if not self._has_reference and isinstance(prepared, Dataset) and self._compared(prepared).any():
            raise ValueError(NO_REFERENCE.format(dataset_name))
        check_column(args.log_z, prepared, dataset_name)
        return prepared


def _positions(model: Any, args: PointwiseDPOConfig, peft_config: Any) -> int | None:
    """How many tokens the model can read at most; None where that has no end, as with rotary positions."""
    if isinstance(model, str):
        loading = {k: v for k, v in (args.model_init_kwargs or {}).items() if k in _WHERE}
        loading.setdefault("trust_remote_code", args.trust_remote_code)
        config = AutoConfig.from_pretrained(model, **loading)
    else:
        config = model.config
    positions = positions_of(config)
    return None if positions is None else positions - (getattr(peft_config, "num_virtual_tokens", None) or 0)
