"""PointwiseDPOTrainer and ULMATrainer: pointwise learning on top of TRL's `DPOTrainer`."""

# In transformers' type hints, a trainer's model, dataset and processing class are optional or have many types
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch.utils.data import SequentialSampler
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer, LengthGroupedSampler
from transformers.trainer_utils import EvalPrediction, has_length
from trl import DPOConfig, DPOTrainer
from trl.models.utils import prepare_deepspeed

from trl_ulma import model_card
from trl_ulma.callbacks import Calls, Interruption, LooksForGradients
from trl_ulma.checkpoints import (
    WHOLE,
    check_optimizer_state,
    check_same_parameters,
    checkpoint_to_resume,
    conditions_of,
    copy_files,
    load_adapter_without_peft_model,
    mark_whole,
    optimized_parameters,
    other_shapes_explained,
    stream_position,
    warn_of_other_conditions,
    warn_of_other_place,
    write_conditions,
    written_whole,
)
from trl_ulma.config import PointwiseDPOConfig, ULMAConfig
from trl_ulma.config_checks import check_batches, check_machine, check_optimizer_arguments, check_parallelism
from trl_ulma.data import seen_prompts
from trl_ulma.data.origins import with_origins
from trl_ulma.held_rows import HeldRows
from trl_ulma.judge import Judge
from trl_ulma.late_changes import LateChanges, check_schedule, without_accelerate
from trl_ulma.likelihood import number_formats
from trl_ulma.likelihood.checks import TrainingChecks, probe_tokens
from trl_ulma.likelihood.noise import switch_off_noise
from trl_ulma.likelihood.precomputed import cache_key, has_ref_logps, with_ref_logps
from trl_ulma.likelihood.proof import StartupProof, check_optimizer, check_trainable, check_weights_stay
from trl_ulma.likelihood.reference import (
    ADAPTER,
    COARSE_TOLERANCE,
    TOLERANCE,
    NoReferenceModel,
    Reference,
    ReferenceIdentity,
    plan_references,
)
from trl_ulma.likelihood.scorer import Scorer, bare_model, is_exact
from trl_ulma.likelihood.table import ROW_KEYS
from trl_ulma.log_partition import BatchKL, LogPartition
from trl_ulma.log_z import FILE as LOG_Z_FILE
from trl_ulma.log_z import check_labels, load_log_partition, make_log_partition, save_log_partition, schedule_rate
from trl_ulma.logged import LoggedFigures, is_logged, with_own_names
from trl_ulma.main_process import get_logger
from trl_ulma.objective import Objective, mismatched_sums, refuse_not_finite
from trl_ulma.rows.dataset_labels import labels_before, show_report
from trl_ulma.rows.filler import FilledRows, filled, is_real, mark_real
from trl_ulma.rows.images import has_images
from trl_ulma.rows.rendering import tokenizer_of
from trl_ulma.rows.sampler import GroupSampler, LengthSampler, PromptSampler, warn_of_repeats
from trl_ulma.saved import SETTINGS_FILE, SavedSettings, identity_in, policy_logps_in
from trl_ulma.saved_names import (
    refuse_lost_weights,
    warn_of_other_settings,
    warn_of_unsaved_parameters,
    warn_of_unsaved_weights,
)
from trl_ulma.training_plan import NO_REFERENCE, TrainingPlan, check_collator, make_plan, own_config
from trl_ulma.training_reference import (
    check_models,
    make_reference,
    model_for_dpo_trainer,
    ref_keeps_base_weights,
    reference_kind,
    widen_adapters,
)
from trl_ulma.versions import (
    divide_loss_once,
    for_dpo_trainer,
    go_without_auxiliary_loss,
    instance_forward,
    load_adapter_of,
    loads_on_all_processes,
    loads_remote_code,
    mend_copied_forward,
    note_best_checkpoint,
    refuse_data_parallel,
    reopen_trackio,
    restore_forward,
    send_weights,
    set_auxiliary_loss,
    step_itself,
    takes_adapted_head,
)

logger = get_logger(__name__)

_COMPLETE = "The checkpoint has made all {} steps of this training, so none is left to make."


class PointwiseDPOTrainer(DPOTrainer):
    r"""Trainer for pointwise DPO, which learns from absolute feedback on single answers.

    The loss of an optimizer step is Σ wᵢ·vᵢ·ℓᵢ / N over the N rows of the step. ℓ is the row loss
    (`trl_ulma.losses`), w the row's `weight`, and v its class weight. The loss does not depend on how the rows are
    split into micro-batches and processes, except with `log_z="batch_kl"` and `log_z="group"`.

    The trainer is a drop-in replacement for `trl.DPOTrainer` with the same arguments, except for:

    Args:
        args: a `PointwiseDPOConfig`, or a `trl.DPOConfig`, whose values are copied. The trainer works on a copy.
        train_dataset: rows with `prompt`, `completion` (both text, or both messages) and `label`. Optional columns are
            `sft_mask` (bool), `label_type`, `log_z` (nats), `weight`, `trials` (for label_transform="votes"), `rater`
            (text or a whole number, for label_transform="center_raters"), `eos` (bool, whether text ends with the EOS
            token), `tools` and `chat_template_kwargs`. Pairs (`chosen`,
            `rejected`, with or without `prompt`) are also accepted, and become two rows each. Rows for a
            vision-language model can have `image` or `images` (PIL images, paths, or bytes), which are decoded and
            processed batch by batch.
        eval_dataset: rows in the same format, or a dict of such datasets.
        processing_class: the model's tokenizer or processor. Rows with images need a processor.
        compute_metrics: receives the implicit rewards of the rows as predictions and their labels as label_ids.

    Raises:
        ValueError: before training starts, if the rows or settings are not valid for training, or if the model's
            log-probabilities or its reference fail the `startup_checks`.

    Example:
        >>> from datasets import Dataset
        >>> rows = Dataset.from_dict({"prompt": ["Hi"], "completion": [" Hello!"], "label": [True]})
        >>> trainer = PointwiseDPOTrainer(model="Qwen/Qwen3-0.6B", train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    # Trainer divides what `compute_loss` returns by the number of micro-batches, also what a subclass adds to it
    loss_is_scaled_for_ga = False

    _tag_names = ["trl", "trl-ulma", "pointwise-dpo"]
    _name = "Pointwise DPO"
    _paper = model_card.PAPER
    _config_class: type[PointwiseDPOConfig] = PointwiseDPOConfig
    _needs_mask = False

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
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
        optimizer, scheduler = optimizers
        check_schedule(optimizer, scheduler)
        peft_config = copy.deepcopy(peft_config)  # PEFT writes the model's name and modules into it
        check_models(model, ref_model, peft_config)
        for given in (model, ref_model):
            if given is not None:
                mend_copied_forward(given)
        args = own_config(self._config_class, type(self).__name__, model, args)
        check_machine(args)
        if optimizer is None:
            check_optimizer_arguments(args, type(self))
        # Read all rows before loading a model, so that errors in them appear within seconds
        self._plan = plan = make_plan(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            peft_config,
            data_collator,
            needs_mask=self._needs_mask,
            ref_model=ref_model,
            has_own_metrics=compute_metrics is not None,
        )
        if isinstance(model, str) and peft_config is not None and peft_config.revision is None:
            peft_config.revision = (args.model_init_kwargs or {}).get("revision")  # the base is loaded with it
        self._rows = HeldRows(plan)
        self._evaluated_rows: dict[str, Any] = {}
        self._label_report = show_report(plan.train_dataset, args, plan.raw_labels, plan.rules.transform, plan.raw_rows)
        if ref_model is not None and not plan.needs_reference:
            warnings.warn(f"ref_model is not used: with {args.method} no row is compared with it.", stacklevel=2)
        kind = reference_kind(model, ref_model, args, peft_config, is_needed=plan.needs_reference)
        # What training saves refers to the base of an adapter and to the reference by their names
        is_named = plan.peft_config is not None or kind not in ("none", "given")
        warn_of_unsaved_weights(model if is_named else None, is_base=plan.peft_config is not None)
        warn_of_unsaved_weights(ref_model if kind == "given" else None, is_reference=True)
        self._reference_kind = kind
        send_weights(model if kind == "copy" else None, ref_model)
        ref_model = model_for_dpo_trainer(kind, model, ref_model, args)
        if not isinstance(model, str) and peft_config is None:
            check_trainable(model, "none" if args.precompute_ref_log_probs else kind)

        forward = instance_forward(model)
        ref_forward = None if ref_model is None else instance_forward(ref_model)
        if kind == "adapter" and getattr(model, "has_trl_ulma_reference", False):
            model.delete_adapter(ADAPTER)  # an earlier trainer's copy of what the adapter was
        self._precomputed_identity: ReferenceIdentity | None = None
        theirs, further = for_dpo_trainer(args, model, quantization_config)
        copying = ref_keeps_base_weights(model) if kind == "adapter" else contextlib.nullcontext()
        try:
            with copying, loads_remote_code(), takes_adapted_head(), loads_on_all_processes():
                super().__init__(
                    model=model,
                    ref_model=ref_model,
                    args=theirs,
                    data_collator=plan.data_collator,
                    train_dataset=plan.train_dataset,
                    eval_dataset=plan.eval_dataset,
                    processing_class=plan.processing_class,
                    compute_metrics=compute_metrics,
                    callbacks=callbacks,
                    optimizers=optimizers,
                    peft_config=peft_config,
                    **further,
                )
        except BaseException:  # also Ctrl-C while log π_ref is precomputed
            restore_forward(model, forward)
            if kind == "adapter" and ADAPTER in model.peft_config:
                model.delete_adapter(ADAPTER)
                model.has_trl_ulma_reference = False
            raise
        self.use_liger_kernel = False  # older versions would compute their own loss of pairs with it
        refuse_data_parallel(self)
        divide_loss_once(self)
        set_auxiliary_loss(self)
        restore_forward(self.model, forward)
        if self.ref_model is not None:
            restore_forward(self.ref_model, ref_forward)
        if args.fp16 and is_peft_model(self.model):
            widen_adapters(self.model)
        has_own_weights = self.is_deepspeed_enabled or self.is_fsdp_enabled or optimizers[0] is not None
        given = self.ref_model if self._reference.kind == "given" else None
        for warning in number_formats.notes(self.model, given, args, keeps_float32=has_own_weights):
            logger.warning(warning)
        check_parallelism(getattr(self.accelerator, "parallelism_config", None))  # of the environment
        self.args.padding_free = args.padding_free
        self.args.model_init_kwargs = args.model_init_kwargs
        plan.args = self.args
        # TRL before 1.3 keeps a reference that it has loaded to precompute all rows, under FSDP
        if isinstance(self.ref_model, NoReferenceModel) or (kind == "copy" and args.precompute_ref_log_probs):
            self.ref_model = None
        if self.ref_model is None:
            self._reference.model = None
        warn_of_other_settings(self.model if is_named else None)
        warn_of_other_settings(given)
        self._refuse_lost_weights(args.output_dir)
        if args.disable_dropout:
            switch_off_noise(self.model)
        check_weights_stay(self.model)
        self._check_trainable()
        if optimizers[0] is not None:
            check_optimizer(self.model, optimizers[0])
        # Stop DPOTrainer from precomputing the datasets that it evaluates, because `evaluate` does that here
        self.precompute_ref_logps = False
        self._is_precomputed = args.precompute_ref_log_probs and plan.needs_reference
        self._rows.hold(self._datasets_now())
        self._mixed_precision = self.accelerator.mixed_precision

        self._objective = Objective(self.args, plan.rules, self.router_aux_loss_coef, plan.label_center)
        self._log_partition = self._new_log_partition()
        self._figures = LoggedFigures(self.accelerator, self.args)
        self._rows_in_step: torch.Tensor | int | None = None
        self._rows_of_this_step: torch.Tensor | int | None = None
        self._divided_by = 1
        self._policy_logps: list[float] = []
        self._resumed_identity: ReferenceIdentity | None = None
        self._resumed_logps: Sequence[float] = ()
        self._late_changes = LateChanges(self)
        self._stream_position: tuple[int, int] | None = None
        self._is_evaluation_checked = False
        self._train_sampler: Any = None
        self.interruption = Interruption(self.accelerator)
        self.add_callback(self.interruption)
        self.add_callback(LooksForGradients())
        self.add_callback(
            Calls(
                on_train_begin=self._on_train_begin,
                on_train_end=self._on_train_end,
                on_epoch_begin=self._on_epoch_begin,
                on_optimizer_step=self._on_optimizer_step,
                on_step_end=self._on_step_end,
            )
        )

    @classmethod
    def dry_run(
        cls,
        model: Any,
        args: DPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        peft_config: Any = None,
    ) -> TrainingPlan:
        """Check the settings and rows and prepare the rows, as the constructor does before it loads a model.

        The arguments are those of the constructor. The dry run does not check whether this machine supports the
        settings, because training may run on another one.

        Raises:
            ValueError: if the rows or settings are not valid for training.
        """
        own = own_config(cls._config_class, cls.__name__, model, args)
        return make_plan(
            model, own, train_dataset, eval_dataset, processing_class, peft_config, needs_mask=cls._needs_mask
        )

    # The collaborators

    @functools.cached_property
    def _scorer(self) -> Scorer:
        """Created on first use. If log π_ref is precomputed, that is during DPOTrainer's setup."""
        scorer = Scorer(self._plan.layout)
        scorer.choose_layout(self.model)
        return scorer

    @functools.cached_property
    def _reference(self) -> Reference:
        return make_reference(
            self._reference_kind,
            self.model,
            self.ref_model,
            self._scorer,
            args=self.args,
            autocast=self.accelerator.autocast,
            before=lambda: self._precomputing_policy,
        )

    def _new_log_partition(self) -> LogPartition:
        return make_log_partition(
            self.args, self.train_dataset, self._plan.compared, self.model, self.accelerator.device
        )

    @property
    def beta(self) -> float:
        """β of the loss. Callbacks may change it, as with `DPOTrainer`."""
        return self._plan.args.beta

    @beta.setter
    def beta(self, value: float) -> None:
        self._plan.args.beta = value

    @property
    def log_partition(self) -> LogPartition:
        """log Z, for β as it is now."""
        self._log_partition.set_beta(self.args.beta)
        return self._log_partition

    @property
    def has_rewards(self) -> bool:
        """Whether any row is compared with a reference. Without a reference there are no rewards."""
        return self._plan.needs_reference

    @property
    def raw_labels(self) -> np.ndarray | None:
        """`(N,)` labels of the training rows before the label transform; None without one."""
        return self._plan.raw_labels

    @property
    def evaluated(self) -> np.ndarray:
        """`(N, 3)` implicit reward, label and whether it is continuous, of the rows of the last evaluation."""
        return self._figures.evaluated

    # Before the first step, and after the last

    @functools.cached_property
    def _checks(self) -> TrainingChecks:
        exact = is_exact(bare_model(self.model), self.accelerator.mixed_precision)
        is_quiet = self.args.disable_dropout and self.args.neftune_noise_alpha is None
        return TrainingChecks(
            StartupProof(self._scorer, self._reference, exact=exact, is_quiet=is_quiet),
            lambda rows: self._prepare_inputs(self.data_collator(rows)),
            self.compute_loss_context_manager,
            self._probe_tokens,
            is_on=self.args.startup_checks,
            before=self._precomputed_identity,
            positions=self._plan.positions,
        )

    @functools.cached_property
    def _probe_tokens(self) -> torch.Tensor:
        embeddings = self.model.get_input_embeddings()
        size = getattr(embeddings, "num_embeddings", len(tokenizer_of(self.processing_class)))
        size = min(size, self._plan.vocab_size or size)  # a ref_model can have fewer embeddings
        tokens = probe_tokens(tokenizer_of(self.processing_class), size, self._plan.positions)
        return tokens.to(self.accelerator.device)

    def _check_start(self, policy: Any, *, is_training: bool = False) -> None:
        self._checks.start(
            policy,
            self.train_dataset,
            at_start=self.state.global_step == 0,
            is_training=is_training,
            is_moving=self.args.sync_ref_model or self._is_precomputed,
            resumed=self._resumed_identity,
            resumed_logps=self._resumed_logps,
        )

    def _check_trainable(self) -> None:
        check_trainable(self.model, "none" if self.args.precompute_ref_log_probs else self._reference.kind)

    def _on_train_begin(self, state: Any) -> None:
        if not self._is_sharded:  # sharding can change the names of parameters
            self._check_trainable()  # other code may have changed what is trained
            warn_of_unsaved_parameters(self.model)
            self._late_changes.check_optimized()
            is_dummy = isinstance(without_accelerate(self.optimizer), LayerWiseDummyOptimizer)
            if not (self.is_deepspeed_enabled or is_dummy):
                check_optimizer(self.model, self.optimizer)
                check_schedule(self.optimizer, self.lr_scheduler)
        if 0 < state.max_steps <= state.global_step and not hasattr(Trainer, "_init_training_state"):
            raise ValueError(_COMPLETE.format(state.max_steps))  # transformers 5.2 would make another step
        loader = self.callback_handler.train_dataloader
        if state.global_step > 0 and not self.args.ignore_data_skip and has_length(loader):
            warn_of_other_place(state, len(loader), self.args.gradient_accumulation_steps)
        self._late_changes.training_begins()
        divide_loss_once(self)  # another trainer's accelerator may have changed the state that all share
        self._figures.reset()  # discard sums of an attempt that ran out of memory
        self.log_partition.take_sums()
        if state.global_step > 0:  # of the training that wrote the checkpoint
            self._total_train_tokens = max((log.get("num_tokens", 0) for log in state.log_history), default=0)
        self._check_start(self.model_wrapped, is_training=True)

    def _on_step_end(self, state: Any) -> None:
        self._checks.after_step(self.model_wrapped, state.global_step)
        kl = self._log_partition
        if isinstance(kl, BatchKL) and not kl.is_estimated and state.global_step == min(3, state.max_steps):
            logger.warning(
                "log_z='batch_kl' pairs each prompt with the completion of another prompt in its micro-batch, but so "
                "far every micro-batch had one prompt only, so log Z is still 0. Set a larger "
                "per_device_train_batch_size, or another log_z."
            )

    def _on_train_end(self, state: Any) -> None:
        reopen_trackio(self)
        self._checks.end(self.model_wrapped)

    def _on_epoch_begin(self, state: Any) -> None:
        # accelerate does not set the epoch of a sampler while it skips batches
        if hasattr(self._train_sampler, "set_epoch"):
            self._train_sampler.set_epoch(int(state.epoch or 0))

    # Data

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return self._rows.prepare(dataset, dataset_name)

    def _datasets_now(self) -> list[Any]:
        held = self.eval_dataset
        return [self.train_dataset, *(held.values() if isinstance(held, dict) else [held])]

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = [
                *("prompt_ids", "completion_ids", "completion_mask", "label", "sft_mask", "label_type"),
                *("log_z", "weight", "ref_logps", "row", "group", "length"),
                *("prompt_text", "prompt_images", "image_key"),
            ]

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if self._plan.layout == "shared" and isinstance(rows, Dataset) and strategy == "random":
            prompts = [hash(tuple(ids)) for ids in rows["prompt_ids"]]
            return PromptSampler(prompts, [label >= 0.5 for label in rows["label"]], self._order_seed)
        sampler = super()._get_train_sampler(train_dataset)
        if strategy == "group_by_length" and isinstance(sampler, LengthGroupedSampler):
            return LengthSampler(sampler, self._order_seed)
        return sampler

    def _get_eval_sampler(self, eval_dataset):
        # With train_sampling_strategy="group_by_length", Trainer returns predictions in another order than the rows'
        is_alone = has_length(eval_dataset) and self.accelerator.num_processes == 1
        return SequentialSampler(eval_dataset) if is_alone else None

    @property
    def _order_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def get_eval_dataloader(self, eval_dataset=None):
        """Like `Trainer.get_eval_dataloader`, but workers are only kept for the rows that they were started for."""
        # With dataloader_persistent_workers=True, Trainer keeps one loader for all datasets that have no name
        key = eval_dataset if isinstance(eval_dataset, str) else "eval"
        rows = eval_dataset
        if rows is None or isinstance(rows, str):
            rows = self.eval_dataset if rows is None else self.eval_dataset[rows]
        if self._evaluated_rows.get(key) is not rows:
            kept = getattr(self, "_eval_dataloaders", {}).pop(key, None)
            if kept in self.accelerator._dataloaders:  # otherwise its workers would stay
                self.accelerator._dataloaders.remove(kept)
            self._evaluated_rows[key] = rows
        return super().get_eval_dataloader(eval_dataset)

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        if not is_training and self.args.dataloader_drop_last:  # an evaluation counts all rows
            with self._with_args(dataloader_drop_last=False):
                return self._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        is_stream = isinstance(dataset, IterableDataset)
        if is_training and self.args.log_z == "group":
            if type(self)._get_train_sampler is not PointwiseDPOTrainer._get_train_sampler:
                raise ValueError(
                    "log_z='group' has its own order of rows, which keeps prompts together, so _get_train_sampler of "
                    f"{type(self).__name__} would not be used. Leave it out, or override get_train_dataloader to "
                    "decide which rows make a batch. Or set another log_z."
                )
            size = batch_size if not self.accelerator.split_batches else batch_size // self.accelerator.num_processes
            self._train_sampler = GroupSampler(
                np.where(self._plan.compared(dataset), np.asarray(dataset["group"][:]), -1).tolist(),
                dataset["label"][:],
                size=size,
                multiple=self.accelerator.num_processes,
                seed=self._order_seed,
            )
            rows = FilledRows(self._remove_unused_columns(dataset, description=description))
            return super()._get_dataloader(
                rows, description, batch_size, self._made_train_sampler, is_training, dataloader_key
            )
        rebalances = is_training and self.args.train_sampling_strategy == "batch_rebalance"
        if rebalances and not is_stream and not self.args.dataloader_drop_last:
            steps = self.args.gradient_accumulation_steps
            warn_of_repeats(len(dataset), self._rows_of_all(batch_size) * steps, self.accelerator.num_processes * steps)
        if self.accelerator.num_processes > 1 and (is_stream or not (self.args.dataloader_drop_last or rebalances)):
            size = self._rows_of_all(batch_size)
            rows = dataset if is_stream else self._remove_unused_columns(dataset, description=description)
            order = sampler_fn if is_training else None
            dataset, sampler_fn = filled(rows, order, size=size, seed=self._order_seed)
        if is_training and sampler_fn is not None and not is_stream:
            self._train_sampler = sampler_fn(dataset)
            sampler_fn = self._made_train_sampler
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)

    def _made_train_sampler(self, train_dataset: Any) -> Any:
        return self._train_sampler

    # The reference

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if not self._plan.needs_reference:
            return dataset
        if isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # raises TRL's error for streams
        if has_ref_logps(dataset):
            return dataset
        reference = self._reference
        if not reference.is_live and reference.kind == "copy" and self.state.global_step == 0:
            # Until training starts, the policy itself is the reference
            reference = Reference("copy", self._scorer, self._precomputing_policy, autocast=self.accelerator.autocast)
        if not reference.is_live:
            raise ValueError(
                "With precompute_ref_log_probs=True and no ref_model, the reference no longer exists after training "
                f"has begun, so its log-probabilities cannot be computed for the {name} dataset. Pass this dataset to "
                "the trainer as an eval_dataset, pass a ref_model, or set precompute_ref_log_probs=False."
            )
        if self._precomputed_identity is None:
            # Taken while there is a reference
            self._precomputed_identity = reference.identity(self._precomputing_policy, self._probe_tokens)
        else:
            now = reference.fingerprint(self._precomputing_policy, self._probe_tokens)
            off = self._precomputed_identity.difference(now)
            is_precise = is_exact(bare_model(self.model), self.accelerator.mixed_precision)
            if not off <= (TOLERANCE if is_precise else COARSE_TOLERANCE):
                raise ValueError(
                    f"The reference has changed by {off:.2g} nats per token since its log-probabilities were "
                    f"precomputed, so they cannot be computed for the {name} dataset: training, or other code, has "
                    "changed weights that the reference computes with. Pass this dataset to the trainer as an "
                    "eval_dataset, or pass a ref_model and set precompute_ref_log_probs=False."
                )
        # Evaluation datasets can be called "train", too
        is_trained_on = dataset is self.train_dataset and "ref_logps" not in dataset.column_names
        return with_ref_logps(
            dataset,
            self._plan.compared(dataset) if is_trained_on else np.ones(len(dataset), dtype=bool),
            reference=reference,
            policy=self._precomputing_policy,
            collate=self.data_collator,
            accelerator=self.accelerator,
            key=cache_key(reference, self._precomputing_policy, self._probe_tokens, self.accelerator),
            batch_size=batch_size,
            num_workers=self.args.dataloader_num_workers,
            what=f"Computing reference log-probabilities of the {name} dataset",
        )

    @functools.cached_property
    def _precomputing_policy(self) -> Any:
        """The policy before Trainer prepares it. DeepSpeed must place and gather its parameters."""
        return prepare_deepspeed(self.model, self.accelerator) if self.is_deepspeed_enabled else self.model

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Like `DPOTrainer.evaluate`. You can also pass the trainer's own datasets, even after training.

        With `precompute_ref_log_probs=True`, the training set only has the log-probabilities of its compared rows. If
        there are others, pass it as an `eval_dataset` to evaluate it after training.
        """
        self._check_changes()
        if isinstance(eval_dataset, dict):
            found = {}
            for name, dataset in eval_dataset.items():
                found |= self.evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
            return found
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepared_to_evaluate(eval_dataset, "eval")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _check_changes(self) -> None:
        """Raise ValueError if settings or rows were replaced in a way that cannot take effect; prepare other rows."""
        self._use_own_precision()
        self._late_changes.check()
        if not self._rows.has(self.train_dataset):
            self.train_dataset = self._rows.to_train_on(self.train_dataset)
            self._read_labels_again()
        self._late_changes.check_parts()
        self._check_collator()
        self._rows.check_transforms(self._datasets_now())
        held = self.eval_dataset
        if isinstance(held, dict):
            others = {name: rows for name, rows in held.items() if not self._rows.has(rows)}
            self.eval_dataset = held | {name: self._prepared_to_evaluate(rows, name) for name, rows in others.items()}
        elif held is not None and not self._rows.has(held):
            self.eval_dataset = self._prepared_to_evaluate(held, "eval")
        self._rows.hold(self._datasets_now())

    def _check_collator(self) -> None:
        """Raise ValueError if another collator was put in the place of the first one, and does not fit the rows."""
        if self.data_collator is self._plan.data_collator:
            return
        if self._is_precomputed:
            raise ValueError(
                "trainer.data_collator was replaced after the reference's log-probabilities were precomputed with the "
                "first one. Create another trainer with this data_collator."
            )
        check_collator(self.data_collator, self.train_dataset)
        self._plan.data_collator = self.data_collator

    def _read_labels_again(self) -> None:
        """Let what depends on the labels of the training set be that of a part that was put in its place."""
        plan, rows = self._plan, self.train_dataset
        if not isinstance(rows, Dataset):
            return
        check_labels(self.args, rows, plan.compared)
        plan.train_dataset = rows
        vars(plan).pop("label_center", None)
        self._objective.center = plan.label_center
        plan.raw_labels = labels_before(rows, self.args, plan.raw_rows)
        self._label_report = show_report(rows, self.args, plan.raw_labels, plan.rules.transform, plan.raw_rows)
        vars(self).pop("_training_prompts", None)
        if self.args.log_z == "prior":
            self._log_partition = self._new_log_partition()

    def _use_own_precision(self) -> None:
        # accelerate has one state for all trainers, which the last one that was created has set. autocast reads it.
        self.accelerator.state._mixed_precision = self._mixed_precision

    def _rows_of_all(self, batch_size: int) -> int:
        """The number of rows in a micro-batch over all processes."""
        return batch_size * (1 if self.accelerator.split_batches else self.accelerator.num_processes)

    def _prepared_to_evaluate(self, dataset: Any, name: str) -> Any:
        prepared = self._prepare_dataset(dataset, self.processing_class, self.args, name)
        if self._is_precomputed:
            batch_size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
            prepared = self._precompute_ref_logps(prepared, name, batch_size)
        self._rows.hold_last(prepared)
        return prepared

    # The loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an optimizer step, and the number of its rows over all processes, without fillers."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None  # the stream has ended on all processes
        rows = mark_real(batches, num_batches)
        # Rewards of demonstrations without a log-ratio in their loss are only needed for logging
        compares_all = self.args.cell == ("pointwise_dpo", "pointwise_dpo")
        if self._plan.needs_reference and not (self._is_precomputed or compares_all or self._is_logged):
            compared = [self._objective.terms(batch).compared for batch in batches]
            plan_references(batches, compared, at_least_one=self._is_sharded)
        if self.accelerator.num_processes == 1:
            return batches, rows
        total: Any = self.accelerator.reduce(torch.tensor(float(rows), device=self.accelerator.device), "sum")
        return batches, total

    @functools.cached_property
    def _is_sharded(self) -> bool:
        """Whether a forward pass is a collective operation of all processes."""
        plugin = self.accelerator.state.deepspeed_plugin
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    @property
    def _is_logged(self) -> bool:
        return is_logged(self.args, self.state, ends_epoch=self.accelerator.gradient_state.end_of_dataloader)

    def training_step(self, *args, **kwargs):
        """Like `Trainer.training_step`, but stops the run if the loss is not finite.

        Raises:
            FloatingPointError: if the loss is not finite. The message names the rows.
            ValueError: if a callback has changed settings in a way that cannot take effect.
        """
        self._late_changes.check_step()
        # For a subclass whose compute_loss calls ours without it
        self._rows_of_this_step = args[2] if len(args) > 2 else kwargs.get("num_items_in_batch")
        self._divided_by = 1 if self.loss_is_scaled_for_ga else self.current_gradient_accumulation_steps
        try:
            loss = super().training_step(*args, **kwargs)
        finally:
            self._rows_of_this_step, self._divided_by = None, 1
        if not self._is_sharded:  # which puts other parameters in their place
            self._late_changes.check_optimized()
        # Reading the loss waits for the device. Trainer does the same right afterwards, to filter its logs.
        if not torch.isfinite(loss):
            named = functools.partial(with_origins, rows=self._plan.raw_rows)
            refuse_not_finite(loss, *self._row_losses, step=self.state.global_step + 1, named=named)
        return loss

    def _on_optimizer_step(self, state: Any) -> None:
        # A step that ran out of memory and is retried has not reached this point
        sums = self.log_partition.take_sums()
        if sums is not None:
            rate = schedule_rate(self.optimizer, self.lr_scheduler)
            self.log_partition.update(self.accelerator.reduce(sums, "sum"), rate)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._rows_in_step = self._rows_of_this_step if num_items_in_batch is None else num_items_in_batch
        return super().compute_loss(model, inputs, return_outputs)

    def _compute_loss(self, model, inputs, return_outputs):
        inputs = dict(inputs)
        asked = inputs.pop("asked", None)
        rows = {name: inputs.pop(name) for name in ROW_KEYS if name in inputs}
        if not (self._plan.needs_reference or self.model.training) and self._objective.terms(rows).compared.any():
            raise ValueError(NO_REFERENCE.format("evaluated"))  # rows of a stream are not known earlier
        real = rows.get("real", torch.ones_like(rows["sft_mask"]))
        if self.args.log_z == "batch_kl" and self.model.training:
            ask = functools.partial(self._reference.logps, model)
            normalize = self.args.length_normalize
            sums = mismatched_sums(self._scorer, model, ask, inputs, real, rows.get("image_key"), normalize=normalize)
            self.log_partition.set_kl(*self.accelerator.reduce(sums, "sum"))
        # Mixture-of-experts models return their auxiliary loss if `output_router_logits` is set
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        states = self.log_partition.needs_prompt_states
        policy = self._scorer(model, inputs, statistics=True, prompt_states=states, **router)
        if router and policy.aux_loss is None:
            go_without_auxiliary_loss(self)
        ref_logps = self._ref_logps(model, inputs, rows, asked)
        # If the reference only ran on some rows, their mean reward would be logged as that of all rows
        found = self._objective(
            policy,
            ref_logps,
            rows,
            inputs,
            self.log_partition,
            all_rewarded=asked is None,
            is_training=self.model.training,
        )
        self._row_losses = (rows.get("row", torch.full_like(rows["label"], -1)), found.weighted.detach())
        self._figures.add(found, rows["label"], self._row_losses[0], real, is_evaluated=not self.model.training)
        if self.model.training:
            self.log_partition.observe(found.observed, found.continuous, policy.prompt_states)
        if self._rows_in_step is None:
            loss = found.total / real.sum().clamp(min=1)
        else:
            # Gradients are averaged over the processes and micro-batches, but the loss is a sum
            loss = found.total * (self.accelerator.num_processes * self._divided_by) / self._rows_in_step
        predictions = found.rewards if self._plan.needs_reference else found.policy_logps
        return (loss, {"predictions": predictions.detach(), "label": rows["label"]}) if return_outputs else loss

    def _ref_logps(self, model: Any, inputs: dict, rows: dict, asked: Any) -> torch.Tensor:
        """`(B,)` log π_ref in nats, summed over tokens. NaN for rows that the reference did not run on."""
        if "ref_logps" in rows:
            if not self._is_precomputed:
                raise ValueError(
                    "The batch has ref_logps, which the data_collator or a transform of the rows adds, but with "
                    "precompute_ref_log_probs=False the trainer runs the reference itself. Leave ref_logps out of the "
                    "batch. To compare with another reference, pass it as ref_model."
                )
            return rows["ref_logps"]
        if self._is_precomputed:
            raise ValueError(
                "precompute_ref_log_probs=True stores the reference's log-probabilities in the column ref_logps, but "
                "the data_collator drops this column. Keep ref_logps in the batch, as "
                "DataCollatorForPointwisePreference does."
            )
        if not self._plan.needs_reference:
            return torch.full_like(rows["label"], torch.nan)
        return self._reference.logps_of(model, inputs, asked)

    # Evaluation, and figures

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss, and the implicit reward (log π_θ if there is no reference) and label of each row."""
        inputs = self._prepare_inputs(inputs)
        if not self._checks.is_done:
            self._check_start(model)
        elif not self._is_evaluation_checked:
            self._checks.check_unmoved(model)
        self._is_evaluation_checked = True
        inputs["real"] = is_real(inputs).to(self.accelerator.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, outputs["predictions"], outputs["label"]

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Like `Trainer.evaluation_loop`, but every metric is a ratio of sums over the whole dataset."""
        of_table = self._objective.of_table if self.args.log_z == "group" else None
        self._is_evaluation_checked = False
        compute_metrics: Any = self.compute_metrics

        def compute(*args: Any, **kwargs: Any) -> dict[str, Any]:
            return with_own_names(compute_metrics(*args, **kwargs) or {}, metric_key_prefix)

        self.compute_metrics = None if compute_metrics is None else compute
        try:
            with self._figures.of_evaluation(metric_key_prefix, of_table) as found:
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
                )
        finally:
            self.compute_metrics = compute_metrics
        if output.metrics is not None:
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """Implicit rewards (`predictions`, `(N,)`), labels (`label_ids`) and `metrics`.

        Without a reference, `predictions` holds log π_θ instead.

        Args:
            test_dataset: raw rows in the format of `train_dataset`.
            ignore_keys: see `Trainer.predict`.
            metric_key_prefix: the prefix of the metric names.
        """
        self._check_changes()
        test_dataset = self._prepared_to_evaluate(test_dataset, metric_key_prefix)
        return super().predict(test_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Decide by the names of the logs: at the last log, an evaluation may have changed the model's mode
        # Trainer's last log has total_flos; an evaluation with the prefix "train" has train_loss, too
        if "loss" in logs or "total_flos" in logs:
            found = self._figures.take()
            found.pop("loss", None)  # Trainer logs the mean of the steps' losses
            self._total_train_tokens += int(found.pop("num_tokens", 0))
            logs.update(found)
            logs["num_tokens"] = self._total_train_tokens
        super().log(logs, start_time)

    def score(self, dataset: Dataset) -> Dataset:
        """Score each row with the policy's implicit reward, see `trl_ulma.judge.Judge.score`.

        Args:
            dataset: raw rows in the format of `train_dataset`, with or without `label`.

        Raises:
            TypeError: if `dataset` is not a `Dataset`.
            ValueError: if rows cannot be scored, or if the model has no reference.
        """
        if not self._plan.needs_reference:
            raise ValueError(
                f"A reward needs a reference model; with {self.args.method} no row is compared with one, so none was "
                "loaded. Train with a loss that uses the reference."
            )
        judge = Judge(
            self.saved_settings(),
            self.processing_class,
            self._rewards,
            positions=self._plan.positions,
            num_proc=self.args.dataset_num_proc,
            training_prompts=self._training_prompts if self.state.global_step > 0 else None,
        )
        return judge.score(dataset, invalid_rows=self.args.invalid_rows)

    def _rewards(self, prepared: Dataset) -> np.ndarray:
        """`(N,)` implicit rewards of prepared rows."""
        compute_metrics, self.compute_metrics = self.compute_metrics, None
        try:
            with self._with_args(prediction_loss_only=False, eval_do_concat_batches=True):
                predictions = self.predict(prepared, metric_key_prefix="score").predictions
        finally:
            self.compute_metrics = compute_metrics
        return np.asarray(predictions, dtype=np.float64)

    @contextlib.contextmanager
    def _with_args(self, **settings: Any) -> Iterator[None]:
        """A context in which settings have other values."""
        before = {name: getattr(self.args, name) for name in settings}
        vars(self.args).update(settings)
        try:
            yield
        finally:
            vars(self.args).update(before)

    # Checkpoints, and the files beside the weights

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Like `Trainer.train`. `resume_from_checkpoint=True` resumes from the newest complete checkpoint. If there is
        none, training starts from scratch.

        Raises:
            KeyboardInterrupt: after Ctrl-C, once the current step has finished and a checkpoint is written.
            ValueError: if the checkpoint's weights are pickled, or if its reference differs from this one.
        """
        self._late_changes.check_model()
        self._check_changes()
        if torch.is_autocast_enabled(self.accelerator.device.type) and torch.is_autocast_cache_enabled():
            raise ValueError(
                "train() was called within torch.autocast, which keeps rounded copies of the weights until it ends, so "
                "all steps would compute with the weights of the first one. Call train() outside of it, and set "
                "bf16=True or fp16=True instead."
            )
        self._late_changes.check_of_optimizer()
        step_itself(self.optimizer)
        check_batches(self.args, self.train_dataset, self._rows_of_all(self._train_batch_size))
        loading = self.args.model_init_kwargs
        resume = checkpoint_to_resume(resume_from_checkpoint, str(self.args.output_dir), loading)
        self._resumed_identity = self._stream_position = None
        self._resumed_logps = ()
        if resume is not None:
            if self.args.sync_ref_model:
                raise ValueError(
                    "sync_ref_model=True changes the reference during training, and checkpoints do not contain the "
                    "reference, so a resumed run would use a different one. Train without interruption, or set "
                    "sync_ref_model=False."
                )
            self._resumed_identity, self._resumed_logps = identity_in(resume), policy_logps_in(resume)
            warn_of_other_conditions(resume, self._conditions, skips=not self.args.ignore_data_skip)
            if isinstance(self.train_dataset, IterableDataset) and not self.args.ignore_data_skip:
                self._stream_position = stream_position(resume, self.args.gradient_accumulation_steps)
        with self.interruption:
            try:
                result = super().train(resume, *args, **kwargs)
            finally:  # Trainer leaves it on the model if training ends with an error
                if getattr(self, "neftune_hook_handle", None) is not None:
                    self.neftune_hook_handle.remove()
            if self.interruption.agree() and not self.args.load_best_model_at_end:
                folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
                if not (folder / WHOLE).exists():
                    self._save_checkpoint(self.model, trial=None)
            self._use_averaged_weights()
        if self.interruption.agreed:
            # Code after `train` must not run for a training that was interrupted
            raise KeyboardInterrupt
        return result

    def _use_averaged_weights(self) -> None:
        """Have an optimizer that trains other weights than it is to be evaluated with, as schedule-free ones do, put
        the latter into the model. Trainer only does it in an evaluation. The next step puts the others back.
        """
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()

    @functools.cached_property
    def _conditions(self) -> dict[str, dict[str, Any]]:
        return conditions_of(self.args, self.train_dataset, self.accelerator.num_processes)

    @property
    def _optimized_parameters(self) -> dict[str, Any]:
        return optimized_parameters(bare_model(self.model), self.optimizer)

    def _init_training_state(self, *args, **kwargs):
        # Trainer does not know the length of a stream, and would look for the position within its first pass
        position = super()._init_training_state(*args, **kwargs)
        if 0 < self.state.max_steps <= self.state.global_step:
            logger.warning(_COMPLETE.format(self.state.max_steps))
            return self.state.num_train_epochs, 0  # Trainer would make another step, if an epoch has more
        return self._stream_position or position

    def _finalize_training(self, *args, **kwargs):
        # Trainer would add this process's loss of the steps since the last log to `train_loss`
        self._tr_loss = self.accelerator.reduce(self._tr_loss, "mean")
        return super()._finalize_training(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        note_best_checkpoint(self, folder)
        with written_whole(self.args, folder, lambda: self.state.best_model_checkpoint):
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                own = {} if self._is_sharded else {"parameters": self._optimized_parameters}
                write_conditions(folder, self._conditions | own)
                # Instead of PEFT's empty form
                copy_files(Path(self.args.output_dir), str(folder), ("README.md",))

    def _determine_best_metric(self, metrics, trial):
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:  # transformers 5.2 does not note it with save_strategy="best"
            self.state.best_global_step = self.state.global_step
        return is_best

    def _push_from_checkpoint(self, checkpoint_folder):
        # Trainer only copies and uploads the files that it knows, and does so before the checkpoint is marked
        self.accelerator.wait_for_everyone()
        folder = Path(checkpoint_folder)
        if self.args.should_save:
            mark_whole(folder)
            copy_files(folder, str(self.args.output_dir), (SETTINGS_FILE, LOG_Z_FILE))
        super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir=None, _internal_call=False):
        self._use_averaged_weights()
        self._use_own_precision()
        # Scripts may call this on one process alone, and a forward of DDP is one of all processes
        policy = self.model_wrapped if self._is_sharded else self.model
        if not self._checks.is_done:  # before any training
            self._check_start(policy)
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        self._policy_logps = self._checks.policy_logps(policy)
        settings = self.saved_settings()
        if self.args.sync_ref_model and self._reference.is_live:
            # No saved model is the reference as it is now, least of all the one that training started from
            moved = self._checks.current_identity(policy)
            settings = dataclasses.replace(settings, reference=dataclasses.replace(moved, name="", revision=None))
        self._refuse_lost_weights(str(folder))
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            settings.write(folder)
            save_log_partition(self.log_partition, folder)
            # A checkpoint on the Hub would disclose the prompts to whoever guesses them
            is_uploaded = _internal_call and self.args.push_to_hub
            has_trained = self.state.global_step > 0
            seen_prompts.save(self._training_prompts if has_trained and not is_uploaded else None, folder)
        had_card = (folder / "README.md").exists()
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and not _internal_call and not had_card and (folder / "README.md").exists():
            self._write_card_instead_of_pefts(folder)

    def _refuse_lost_weights(self, folder: str) -> None:
        is_named = self._reference.kind in ("copy", "given")
        refuse_lost_weights(folder, self.model, self._reference.name if is_named else None)

    def _write_card_instead_of_pefts(self, folder: Path) -> None:
        own = Path(self.args.output_dir)
        if folder.resolve() == own.resolve():
            self.create_model_card()
        else:
            copy_files(own, str(folder), ("README.md",))

    @functools.cached_property
    def _training_prompts(self) -> np.ndarray | None:
        """Hashes of the training prompts. None if the raw prompts are not at hand."""
        raw, rows = self._plan.raw_rows, self._plan.train_dataset
        if not isinstance(raw, Dataset) or raw.format["type"] == "custom" or "prompt_ids" in raw.column_names:
            return None
        if has_images(raw):  # the same words about another image are another prompt
            return None
        return seen_prompts.training_hashes(raw, rows["row"][:])

    def saved_settings(self) -> SavedSettings:
        """What scores depend on besides the weights. It is saved with the model."""
        return SavedSettings.of_training(
            self.args,
            self._plan.rules,
            self.model,
            label_center=self._plan.label_center,
            is_chat=model_card.trained_on_chat(self._plan),
            mixed_precision=self._mixed_precision,
            policy_logps=self._policy_logps,
            reference=self._checks.identity or ReferenceIdentity("none"),
        )

    def _load_optimizer_and_scheduler(self, checkpoint):
        own = set(self.optimizer.param_groups[0])
        if checkpoint is not None and not self._is_sharded:
            check_same_parameters(checkpoint, self._optimized_parameters)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            check_optimizer_state(checkpoint, str(self.args.optim.value), own, self.optimizer)
            load_log_partition(self.log_partition, checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with other_shapes_explained(resume_from_checkpoint):
            if load_adapter_without_peft_model(resume_from_checkpoint, self.model):
                return
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:  # its checkpoints hold all adapters in one file
            load_adapter_of(resume_from_checkpoint, self.model)

    def _load_best_model(self):
        self._use_averaged_weights()  # afterwards, the optimizer would take the loaded weights for its own
        best = Path(self.state.best_model_checkpoint)
        # Trainer does not find an adapter in a folder of its own, where PEFT saves those not called "default"
        name: Any = self.model.active_adapter if is_peft_model(self.model) else "default"
        if name != "default" and (best / name / "adapter_config.json").exists():
            self.model.load_adapter(str(best / name), name)
        elif not load_adapter_without_peft_model(best, self.model):
            super()._load_best_model()
        load_log_partition(self.log_partition, self.state.best_model_checkpoint)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """Write README.md into `output_dir`, on the main process.

        Args:
            model_name: the title. Default: the name on the Hub or of the folder.
            dataset_name: the name of the dataset.
            tags: tags to add to those of TRL and of the method.
        """
        if not self.is_world_process_zero():
            return
        # The card's header links to datasets on the Hub, so it must not name a local file
        hub_dataset = None if dataset_name is None or Path(dataset_name).exists() else dataset_name
        super().create_model_card(model_name=model_name, dataset_name=hub_dataset, tags=tags)
        steps = self.state.global_step
        # A training that has ended before its last step, such as with early stopping, is finished
        is_unfinished = self.interruption.is_training and steps < self.state.max_steps
        model_card.write(
            self.args,
            model=self.accelerator.unwrap_model(self.model),
            plan=self._plan,
            processes=self.accelerator.num_processes,
            log_history=self.state.log_history,
            label_report=self._label_report,
            evaluated=self.evaluated,
            reference=(self._reference.kind, self._reference.name),
            paper=self._paper,
            title=model_name or (self.hub_model_id or Path(self.args.output_dir).resolve().name).split("/")[-1],
            location=self.hub_model_id,
            dataset_name=dataset_name,
            unfinished=(steps, self.state.max_steps) if is_unfinished else None,
        )


class ULMATrainer(PointwiseDPOTrainer):
    r"""Trainer for ULMA, which learns demonstrations (SFT) and noisy feedback (KL-regularized) with one loss.

    Rows whose `sft_mask` is True are demonstrations. If the data has no such column, rows with label 1 or with a
    continuous label of at least `sft_threshold` are demonstrations. `positive_loss` and `negative_loss` of `ULMAConfig`
    select any other method of the paper's tables. The arguments are those of `PointwiseDPOTrainer`, but `args` is a
    `ULMAConfig`.

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
