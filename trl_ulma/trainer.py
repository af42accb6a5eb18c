"""PointwiseDPOTrainer and ULMATrainer: where point-wise learning meets TRL's `DPOTrainer`."""

# transformers declares the model, the dataset and the processing class of a trainer optional or of many kinds
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import copy
import textwrap
import warnings
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_utils import EvalPrediction, IntervalStrategy
from trl import DPOConfig, DPOTrainer

from trl_ulma.checkpoints import KeepsCheckpoints
from trl_ulma.config import PointwiseDPOConfig, ULMAConfig
from trl_ulma.estimating import FILE as LOG_Z_FILE
from trl_ulma.estimating import EstimatesLogZ
from trl_ulma.evaluating import EvaluatesRows
from trl_ulma.judge import FILE as JUDGE_FILE
from trl_ulma.judge import Judges
from trl_ulma.likelihood.reference import ROW_KEYS, check_adapter, is_copied, summed
from trl_ulma.log_partition import Observed
from trl_ulma.losses import grid_loss, reward_slope
from trl_ulma.metrics import RatioSums, masked, reward_ratios, token_ratios
from trl_ulma.model_card import WritesModelCard
from trl_ulma.rows.dataset_labels import show_report
from trl_ulma.rows.sampler import PromptSampler
from trl_ulma.starting import NO_REFERENCE, ChecksFirst
from trl_ulma.steps import EvenStream, plan_references, real_rows

logger = get_logger(__name__)

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


class PointwiseDPOTrainer(
    KeepsCheckpoints, WritesModelCard, EvaluatesRows, Judges, EstimatesLogZ, ChecksFirst, DPOTrainer
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
    _beside_weights = (JUDGE_FILE, LOG_Z_FILE)

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
        if ref_model is None:
            check_adapter(model)
        args = self._own_config(model, args)
        args.check_machine()
        # All rows are read before a model is loaded, since what is wrong with them should not take minutes to be told
        start = self._start(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            peft_config,
            data_collator,
            has_own_metrics=compute_metrics is not None,
        )
        args, processing_class, data_collator = start.args, start.processing_class, start.data_collator
        train_dataset, eval_dataset = start.train_dataset, start.eval_dataset
        self._label_report = show_report(train_dataset, args)
        if ref_model is not None and not self._has_reference:
            warnings.warn(f"ref_model is not used: with {args.method} no row is compared with it.", stacklevel=2)

        self._layout = "packed" if args.padding_free else "shared" if args.share_prompts else "padded"
        precompute, padding_free = args.precompute_ref_log_probs, args.padding_free
        args.padding_free = False  # DPOTrainer's own is switched off, and it would say so
        if not self._has_reference:
            # What keeps DPOTrainer from loading a reference model; `_precompute_ref_logps` computes nothing then
            args.precompute_ref_log_probs = True
            ref_model = None
        elif ref_model is None and is_copied(model, peft_config, args):
            ref_model = copy.deepcopy(model)
        self._probe_rows = [] if self._layout == "padded" else list(islice(train_dataset, 4))
        try:
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
        finally:
            args.precompute_ref_log_probs, args.padding_free = precompute, padding_free
        self._make_log_partition(train_dataset, self._compared)
        self.precompute_ref_logps = precompute and self._has_reference
        self._sums = RatioSums(self.accelerator.device)
        self._evaluated: list[torch.Tensor] = []
        self._rows_in_step: torch.Tensor | int | None = None

    # Data

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = [
                *("prompt_ids", "completion_ids", "completion_mask", "label", "sft_mask", "label_type"),
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
            raise ValueError(NO_REFERENCE.format("evaluated"))
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
            if self.args.log_z == "column":
                raise ValueError("log_z='column' needs a column log_z, in nats, in every row; a batch has none.")
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
