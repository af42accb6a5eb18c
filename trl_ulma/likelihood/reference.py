"""What a trainer asks its reference: for which rows, once before training or in each step, on one process or many."""

# transformers declares the model and the dataset of a trainer optional or of many kinds
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false

import contextlib
import copy
import functools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from peft import PeftModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from trl_ulma.config import PointwiseDPOConfig
from trl_ulma.labels import LabelRules
from trl_ulma.likelihood.scorer import Scorer
from trl_ulma.losses import Terms, route
from trl_ulma.rows.dataset_labels import terms_of

# What a batch holds about rows, and is not for the model's forward
ROW_KEYS = ("label", "sft_mask", "continuous", "log_z", "weight", "ref_logps", "row", "real", "image_key")
# Of which row by row a part can be taken
_TEXT = {"input_ids", "attention_mask", "completion_mask"}


class AsksReference(DPOTrainer):
    """A `DPOTrainer` whose reference is asked for the rows that are compared with it, and for no others.

    Whoever inherits sets the attributes below.
    """

    _rules: LabelRules
    _cell: tuple[str, str]
    _has_reference: bool
    _stream_has_mask: bool
    _layout: str
    _probe_rows: Sequence[dict[str, Any]]

    def _terms(self, label: torch.Tensor, sft_mask: torch.Tensor, continuous: torch.Tensor | None) -> Terms:
        if continuous is None:
            continuous = torch.full_like(sft_mask, self._rules.label_type == "continuous")
        positive, negative = self._cell
        return route(label, sft_mask, continuous, positive_loss=positive, negative_loss=negative)

    def _compared(self, dataset: Dataset) -> np.ndarray:
        """`(N,)` bool: the rows of a prepared data set whose loss needs the reference."""
        return terms_of(dataset, self._rules.label_type, self._cell).compared.numpy()

    def _may_compare(self, dataset: Dataset | IterableDataset) -> bool:
        """Whether a row's loss needs the reference. Rows of a stream are not known: whether one could."""
        if isinstance(dataset, Dataset):
            return bool(self._compared(dataset).any())
        return "pointwise_dpo" in self._cell or self._stream_has_mask

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if not self._has_reference:
            return dataset
        if isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # which says that it can't
        if _has_ref_logps(dataset):
            return dataset
        if "ref_logps" in dataset.column_names:  # of the training set's compared rows alone
            dataset = dataset.remove_columns("ref_logps")
        if self.ref_model is None and not isinstance(self.model, PeftModel) and self.state.global_step > 0:
            raise ValueError(
                "With precompute_ref_log_probs=True and no ref_model the reference is gone once training has begun, so "
                f"the {name} dataset can not be compared with it. Pass it to the trainer as an eval_dataset, or pass "
                "a ref_model, or set precompute_ref_log_probs=False."
            )
        # Evaluation sets may be called "train"
        is_trained_on = dataset is self.train_dataset
        asked = self._compared(dataset) if is_trained_on else np.ones(len(dataset), dtype=bool)
        ref_logps = np.full(len(dataset), np.nan)
        if asked.any():
            part = copy.copy(dataset if asked.all() else dataset.select(np.flatnonzero(asked)))
            # By which DPOTrainer knows what it has computed before; autocast, which changes the values, it leaves out
            part._fingerprint = Hasher.hash((part._fingerprint, self.accelerator.mixed_precision))
            # Whether they are computed or read from the cache, training draws the same random numbers: a data loader
            # takes its seed from torch's
            with self._same_file_for_all(part) as part, torch.random.fork_rng(devices=[]):
                ref_logps[asked] = super()._precompute_ref_logps(part, name, batch_size)["ref_chosen_logps"][:]
        return dataset.add_column("ref_logps", ref_logps.tolist())

    def _is_own(self, dataset: Any) -> bool:
        """Whether a data set is one that this trainer has prepared for itself."""
        held = getattr(self, "eval_dataset", None)
        own = (getattr(self, "train_dataset", None), *(held.values() if isinstance(held, dict) else (held,)))
        return any(dataset is each for each in own) and "prompt_ids" in (dataset.column_names or ())

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """As `DPOTrainer.evaluate`, which computes the reference of what it is given, but not of the trainer's own data
        sets that have it already, after training too."""
        if isinstance(eval_dataset, Dataset) and self._is_own(eval_dataset) and _has_ref_logps(eval_dataset):
            return super(DPOTrainer, self).evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    @contextlib.contextmanager
    def _same_file_for_all(self, rows: Dataset) -> Iterator[Dataset]:
        """The rows in a file that all processes read: DPOTrainer hands on what it computes in a file beside it, and of
        rows made in memory each process has a folder of its own."""
        if self.accelerator.num_processes == 1 or rows.cache_files:
            yield rows
            return
        folder = broadcast_object_list([tempfile.mkdtemp(prefix="trl-ulma-")])[0]
        try:
            if self.accelerator.is_main_process:
                rows.save_to_disk(folder)
            self.accelerator.wait_for_everyone()
            yield Dataset.load_from_disk(folder)
            self.accelerator.wait_for_everyone()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @functools.cached_property
    def _scorer(self) -> Scorer:
        def collate(rows):
            return self._prepare_inputs(self.data_collator(rows))

        return Scorer(self.accelerator, self._layout, self._probe_rows, collate)

    def compute_ref_log_probs(self, model, inputs):
        """Reference log-probabilities of a batch's rows, `(B,)` nats, summed over the completion; twice the same,
        since DPOTrainer's precomputation stores one for each half of a pair."""
        inputs = {name: value for name, value in inputs.items() if name not in ROW_KEYS}
        adapter = contextlib.nullcontext()
        if self.ref_model is None and isinstance(self.model, PeftModel):
            unwrapped = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None)
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, adapter, self.accelerator.autocast():
            log_probs = self._scorer(model, inputs).log_probs
        ref_logps = summed(log_probs)
        return ref_logps, ref_logps

    def _ref_logps(self, inputs: dict, rows: dict, asked: tuple[list[int], int] | None) -> torch.Tensor:
        """`(B,)` log π_ref in nats, summed; NaN for rows that it was not computed for.

        `asked` are the rows that need it and their width; all rows where it is None.
        """
        if "ref_logps" in rows:
            return rows["ref_logps"]
        if self.precompute_ref_logps:
            raise ValueError(
                "precompute_ref_log_probs=True has put the log-probabilities into the column ref_logps, and the "
                "data_collator leaves it out. Have it pass ref_logps on, as DataCollatorForPointwisePreference does."
            )
        unknown = torch.full_like(rows["label"], torch.nan)
        if not self._has_reference or (asked is not None and not asked[0]):
            return unknown
        model = self.ref_model or self.model
        if asked is None:
            return self.compute_ref_log_probs(model, inputs)[0]
        if set(inputs) - _TEXT:  # where a row's images are among all of the batch, only its processor knows
            return self.compute_ref_log_probs(model, inputs)[0]
        index = torch.tensor(asked[0], device=unknown.device)
        part = {name: value[index, : asked[1]] for name, value in inputs.items()}
        ref_logps = self.compute_ref_log_probs(model, part)[0]
        return unknown.to(ref_logps).index_copy(0, index, ref_logps)

    @property
    def _is_sharded(self) -> bool:
        """Whether a forward is a collective of all processes."""
        plugin = self.accelerator.state.deepspeed_plugin
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)


def _has_ref_logps(dataset: Dataset) -> bool:
    return "ref_logps" in dataset.column_names and not np.isnan(dataset["ref_logps"][:]).any()


def check_adapter(model: Any) -> None:
    """Raise ValueError where a PEFT model would train another adapter than the one that its reference is a copy of.

    Args:
        model: the policy, of which no reference model is given apart.
    """
    if isinstance(model, str) or not is_peft_model(model):
        return
    active = model.active_adapters
    if active != ["default"]:
        raise ValueError(
            f"The model trains its adapter {', '.join(active)}, and the reference is a copy of the one that is called "
            "default. Load the adapter under that name (as without adapter_name), or pass a ref_model."
        )


def is_copied(model: Any, peft_config: Any, args: PointwiseDPOConfig) -> bool:
    """Whether the reference is a copy of a model in memory, which DPOTrainer would load anew from where it once came
    from. Under ZeRO-3 there are parts of it only."""
    if isinstance(model, str) or is_peft_model(model) or peft_config is not None:
        return False
    return not (args.precompute_ref_log_probs or is_deepspeed_zero3_enabled())


def summed(per_token_logps: torch.Tensor) -> torch.Tensor:
    """`(B,)` sums of `(B, T)`, in at least float32; positions without a label hold 0."""
    return per_token_logps.sum(1, dtype=torch.promote_types(per_token_logps.dtype, torch.float32))
