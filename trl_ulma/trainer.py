"""PointwiseDPOTrainer and ULMATrainer: where point-wise learning meets TRL's `DPOTrainer`."""

# transformers declares the model, the dataset and the processing class of a trainer optional or of many kinds
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_utils import EvalPrediction, IntervalStrategy
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import get_config_model_id, global_then_local_main_first

from trl_ulma.checkpoints import KeepsCheckpoints, refuse_pickle
from trl_ulma.collator import DataCollatorForPointwisePreference
from trl_ulma.config import PointwiseDPOConfig, ULMAConfig
from trl_ulma.dataset_labels import show_report, with_transform
from trl_ulma.estimating import EstimatesLogZ
from trl_ulma.evaluating import EvaluatesRows
from trl_ulma.forward import positions_of
from trl_ulma.judge import Judges
from trl_ulma.labels import LabelRules
from trl_ulma.log_partition import Observed
from trl_ulma.losses import grid_loss, reward_slope
from trl_ulma.metrics import RatioSums, masked, reward_ratios, token_ratios
from trl_ulma.model_card import WritesModelCard
from trl_ulma.preparation import Preparation, own_processing_class, tokenizer_of
from trl_ulma.reference import ROW_KEYS, AsksReference, summed
from trl_ulma.sampler import PromptSampler
from trl_ulma.steps import EvenStream, plan_references, real_rows
from trl_ulma.vision import DataCollatorForVisionPointwisePreference, check_settings, has_images

logger = get_logger(__name__)

# Of `model_init_kwargs`, what says where a model's configuration is
_WHERE = ("revision", "subfolder", "token", "cache_dir", "gguf_file", "trust_remote_code")

_NO_REFERENCE = (
    "The {} dataset has liked rows (label 1, sft_mask False), which are compared with the reference, and there is "
    "none, since no row seen at the start needed it. Pass this data set to the trainer as an eval_dataset."
)

_PAPER = {
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


class PointwiseDPOTrainer(
    KeepsCheckpoints, WritesModelCard, EvaluatesRows, Judges, EstimatesLogZ, AsksReference, DPOTrainer
):
    r"""Trainer for point-wise DPO: learns from absolute feedback, one answer at a time.

    The loss of an optimiser step is Σ wᵢ·vᵢ·ℓᵢ / N over the step's N rows, however they fall into micro-batches and
    processes: ℓ the row loss (`trl_ulma.losses`), w the row's `weight`, v its class weight.

    A drop-in for `trl.DPOTrainer`, with the same arguments, of which differ:

    Args:
        args: a `PointwiseDPOConfig`, or a `trl.DPOConfig`, whose values are taken over.
        train_dataset: rows of `prompt`, `completion` (both text, or both messages) and `label`; optional columns
            `sft_mask` (bool), `label_type`, `log_z` (nats), `weight`, `trials` (for label_transform="votes"), `tools`,
            `chat_template_kwargs`. Or pairs (`chosen`, `rejected`, with or without `prompt`), which become two rows
            each. With a vision-language model also `image` or `images` (PIL images, paths, or bytes), which are
            decoded and processed batch by batch.
        eval_dataset: the same, or a dict of such data sets.
        processing_class: the model's tokenizer, or its processor; rows with images need one.
        compute_metrics: is given the rows' implicit rewards as predictions and their labels as label_ids.

    Raises:
        ValueError: before any training, for rows or settings that can not be learned from.

    Example:
        >>> from datasets import Dataset
        >>> rows = Dataset.from_dict({"prompt": ["Hi"], "completion": [" Hello!"], "label": [True]})
        >>> trainer = PointwiseDPOTrainer(model="Qwen/Qwen3-0.6B", train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    loss_is_scaled_for_ga = True

    _tag_names = ["trl", "trl-ulma", "pointwise-dpo"]
    _name = "Point-wise DPO"
    _paper = _PAPER
    _config_class: type[PointwiseDPOConfig] = PointwiseDPOConfig
    _needs_mask = False

    def __init__(
        self,
        model: Any,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: Any = None,
    ):
        if ref_model is not None and ref_model is model:
            raise ValueError(
                "model and ref_model are the same object, so the reference would be trained along. Leave ref_model "
                "out: the model as it is before training is the reference then."
            )
        args = self._own_config(model, args)
        args.check_machine()
        # All rows are read before a model is loaded, since what is wrong with them should not take minutes to be told
        start = self._start(model, args, train_dataset, eval_dataset, processing_class, peft_config, data_collator)
        args, processing_class, data_collator = start.args, start.processing_class, start.data_collator
        train_dataset, eval_dataset = start.train_dataset, start.eval_dataset
        self._label_report = show_report(train_dataset, args)
        if compute_metrics is None and args.metric_for_best_model is not None:
            args.check_best_metric(list(eval_dataset) if isinstance(eval_dataset, dict) else [])
        if ref_model is not None and not self._has_reference:
            warnings.warn(f"ref_model is not used: with {args.method} no row is compared with it.", stacklevel=2)

        self._layout = "packed" if args.padding_free else "shared" if args.share_prompts else "padded"
        precompute, padding_free = args.precompute_ref_log_probs, args.padding_free
        args.padding_free = False  # DPOTrainer's own is switched off, and it would say so
        if not self._has_reference:
            # What keeps DPOTrainer from loading a reference model; `_precompute_ref_logps` computes nothing then
            args.precompute_ref_log_probs = True
            ref_model = None
        self._probe_rows = [] if self._layout == "padded" else list(islice(train_dataset, 4))
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        args.precompute_ref_log_probs, args.padding_free = precompute, padding_free
        self._make_log_partition(train_dataset, self._compared)
        self.precompute_ref_logps = precompute and self._has_reference
        self._sums = RatioSums(self.accelerator.device)
        self._evaluated: list[torch.Tensor] = []
        self._rows_in_step: torch.Tensor | int | None = None

    # What is checked and made before DPOTrainer's own set-up

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

        Arguments are the constructor's.

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
        self._positions = _positions(model, args, peft_config)
        self._peft_config = (
            peft_config if isinstance(model, str) or not is_peft_model(model) else model.active_peft_config
        )
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
        evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        datasets = [dataset for dataset in (train_dataset, *evaluated) if dataset is not None]
        self._has_reference = any(self._may_compare(dataset) for dataset in datasets)
        has_mask = any(self._may_have_mask(dataset) for dataset in datasets)
        args.check_with_data(needs_reference=self._has_reference, has_mask=has_mask)
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

    # Data

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if isinstance(processing_class, ProcessorMixin) and has_images(dataset):
            check_settings(args, dataset_name, self._peft_config)
        prepare = Preparation(processing_class, self._rules, args.max_length, args.truncation_mode, self._positions)
        with global_then_local_main_first():
            if isinstance(dataset, IterableDataset):
                # Where the rows themselves name the demonstrations, a liked one may come that is compared
                first = next(iter(dataset.with_format(None)), None)
                self._stream_has_mask |= isinstance(first, dict) and "sft_mask" in first
            prepared = prepare(dataset, dataset_name, args.dataset_num_proc)
        if not self._has_reference and isinstance(prepared, Dataset) and self._compared(prepared).any():
            raise ValueError(_NO_REFERENCE.format(dataset_name))
        return prepared

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = [
                *("prompt_ids", "completion_ids", "label", "sft_mask", "label_type"),
                *("log_z", "weight", "ref_logps", "row", "length"),
                *("prompt_text", "prompt_images", "image_key"),
            ]

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self._layout != "shared" or not isinstance(rows, Dataset) or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        prompts = [hash(tuple(ids)) for ids in rows["prompt_ids"]]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return PromptSampler(prompts, [label >= 0.5 for label in rows["label"]], seed)

    def _get_dataloader(self, dataset, description, batch_size, *args, **kwargs):
        processes = self.accelerator.num_processes
        if isinstance(dataset, IterableDataset) and processes > 1:
            dataset = EvenStream(dataset, batch_size * processes)
        return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)

    # The loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an optimiser step, and the number of its real rows over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None  # the stream has ended, for all processes
        rows = 0
        for i, batch in enumerate(batches):
            real = real_rows(batch, self.accelerator, is_last=i == len(batches) - 1)
            rows += int(real.sum())
            batch["real"] = real.to(batch["label"].device)
        if len(batches) < num_batches:
            # Trainer steps only after as many micro-batches as asked: what a stream ends with would be left to the
            # first step of its next epoch
            nothing = {**batches[-1], "real": torch.zeros_like(batches[-1]["real"])}
            batches += [nothing] * (num_batches - len(batches))
        # Where demonstrations have no log-ratio, their rewards are computed for the logs alone
        compares_all = self._cell == ("pointwise_dpo", "pointwise_dpo")
        if self._has_reference and not (self.precompute_ref_logps or compares_all or self._step_is_logged()):
            compared = [self._terms(b["label"], b["sft_mask"], b.get("continuous")).compared for b in batches]
            plan_references(batches, compared, at_least_one=self._is_sharded)
        if self.accelerator.num_processes == 1:
            self.interruption.agreed = self.interruption.noticed
            return batches, rows
        count = torch.tensor([float(rows), float(self.interruption.noticed)], device=self.accelerator.device)
        count = self.accelerator.reduce(count, "sum")
        # A process that was interrupted must not leave the others waiting
        self.interruption.agreed = bool(count[1] > 0)
        return batches, count[0] / self.get_tp_size()

    def _step_is_logged(self) -> bool:
        """Whether the optimiser step that begins will be logged; alike on all processes."""
        if self.args.logging_strategy == IntervalStrategy.EPOCH:
            return self.accelerator.gradient_state.end_of_dataloader
        step = self.state.global_step + 1
        first = self.args.logging_first_step and step == 1
        return first or (self.args.logging_strategy == IntervalStrategy.STEPS and step % self.state.logging_steps == 0)

    def training_step(self, *args, **kwargs):
        """As `Trainer.training_step`; a loss that is not finite ends the run.

        Raises:
            FloatingPointError: naming the rows.
        """
        loss = super().training_step(*args, **kwargs)
        # Reading the loss waits for the device, as Trainer does right after to leave such losses out of its logs
        if not torch.isfinite(loss):
            rows, losses = self._row_losses
            wrong = rows[~losses.isfinite()].tolist() or "unknown"
            raise FloatingPointError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}; rows of the train dataset with a "
                f"loss that is not finite: {wrong}. Look at these rows, lower the learning rate, or train in fp32."
            )
        if self.accelerator.sync_gradients:
            self._update_log_partition()
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._rows_in_step = num_items_in_batch
        return super().compute_loss(model, inputs, return_outputs)

    def _compute_loss(self, model, inputs, return_outputs):
        inputs = dict(inputs)
        asked = inputs.pop("asked", None)
        rows = {name: inputs.pop(name) for name in ROW_KEYS if name in inputs}
        label, sft_mask = rows["label"], rows["sft_mask"]
        continuous = rows.get("continuous", torch.full_like(sft_mask, self._rules.label_type == "continuous"))
        terms = self._terms(label, sft_mask, continuous)
        if not (self._has_reference or self.model.training) and terms.compared.any():  # of a stream, seen only now
            raise ValueError(_NO_REFERENCE.format("evaluated"))
        completion_mask = inputs["completion_mask"]
        tokens = completion_mask[:, 1:].sum(1)

        # MoE models return their auxiliary loss where they are asked for router logits
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        real = rows.get("real", torch.ones_like(sft_mask))
        if self.args.log_z == "batch_kl" and self.model.training:
            self._set_batch_kl(model, inputs, real, rows.get("image_key"))
        outputs = self._scorer(model, inputs, prompt_states=self.log_partition.needs_prompt_states, **router)
        policy_logps = summed(outputs.log_probs)
        ref_logps = self._ref_logps(inputs, rows, asked).to(policy_logps)
        if self.args.length_normalize:
            policy_logps, ref_logps = policy_logps / tokens.clamp(min=1), ref_logps / tokens.clamp(min=1)
        log_z = rows.get("log_z")
        if log_z is None:
            log_z = self.log_partition(continuous, outputs.prompt_states)
        log_z = log_z.to(policy_logps)
        losses = grid_loss(
            policy_logps,
            ref_logps,
            label,
            terms,
            continuous,
            beta=self.beta,
            log_z=log_z,
            sft_weight=getattr(self.args, "sft_weight", 1.0),
        )

        chosen = torch.where(continuous, sft_mask, label >= 0.5)
        weight = torch.where(chosen, self.args.desirable_weight, self.args.undesirable_weight)
        weighted = losses.total * weight * rows.get("weight", 1.0)
        self._row_losses = (rows.get("row", torch.full_like(label, -1)), weighted.detach())
        loss = torch.where(real, weighted, torch.zeros_like(weighted)).sum()
        size = real.sum()
        aux_loss = None
        if self.aux_loss_enabled:
            aux_loss = outputs.aux_loss.expand_as(policy_logps)
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss * size
            weighted = weighted + self.router_aux_loss_coef * aux_loss
        if self._rows_in_step is None:
            loss = loss / size.clamp(min=1)
        else:
            # Gradients are averaged over the processes, and the sum is wanted
            loss = loss * (self.accelerator.num_processes // self.get_tp_size()) / self._rows_in_step

        with torch.no_grad():
            ratios = {
                "loss": (weighted, torch.ones_like(weighted)),
                "loss/sft": masked(losses.sft, terms.imitated),
                "loss/unlearning": masked(losses.unlearning, terms.unlearned),
                "loss/preference": masked(losses.preference, terms.compared),
                "logps/chosen": masked(policy_logps, chosen),
                "logps/rejected": masked(policy_logps, ~chosen),
                **token_ratios(outputs.entropy, outputs.mean_logits, outputs.is_top1, completion_mask[:, 1:], chosen),
                "num_tokens": (inputs["attention_mask"].sum(1).to(policy_logps), torch.ones_like(policy_logps)),
            }
            # Where only some rows are asked for their reference, their rewards would stand for all
            if asked is None:
                log_ratio = policy_logps - ref_logps
                ratios.update(reward_ratios(losses.rewards, log_ratio, log_z, label, chosen, continuous))
            if aux_loss is not None:
                ratios["aux_loss"] = (aux_loss, torch.ones_like(aux_loss))
            if self.model.training:
                slope = reward_slope(losses.rewards, label, continuous) * weight * rows.get("weight", 1.0)
                seen = Observed(terms.compared & real, policy_logps - ref_logps, slope)
                self.log_partition.observe(seen, continuous, outputs.prompt_states)
            else:
                found = torch.stack([losses.rewards.double(), label.double(), continuous.double()], 1)
                self._evaluated.append(found[real].cpu())
            self._sums.add(ratios, real)
        predicted = losses.rewards if self._has_reference else policy_logps
        return (loss, {"predictions": predicted.detach(), "label": label}) if return_outputs else loss


class ULMATrainer(PointwiseDPOTrainer):
    r"""Trainer for ULMA: learns demonstrations (SFT) and noisy feedback (KL-regularised) in one loss.

    Demonstrations are the rows whose `sft_mask` is True; in data without that column, the rows with label 1, or with a
    continuous label of `sft_threshold` and above. `positive_loss` and `negative_loss` of `ULMAConfig` choose any other
    method of the paper's tables. Arguments are those of `PointwiseDPOTrainer`, with a `ULMAConfig`.

    Example:
        >>> from datasets import Dataset
        >>> rows = Dataset.from_dict({"prompt": ["Hi"], "completion": [" Hello!"], "label": [1]})
        >>> trainer = ULMATrainer(model="Qwen/Qwen3-0.6B", train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    _tag_names = ["trl", "trl-ulma", "ulma"]
    _name = "ULMA"
    _config_class = ULMAConfig
    _needs_mask = True


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
