"""What a trainer does for log Z: makes the chosen estimator, feeds it, moves it once a step, keeps its state."""

# transformers declares the model and the dataset of a trainer optional or of many kinds
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from trl import DPOTrainer

from trl_ulma.log_partition import NEED_CLASSES, BatchKL, Learned, LogPartition, Prior, RunningMean
from trl_ulma.rows.dataset_labels import is_continuous
from trl_ulma.steps import mismatched

# Beside the model's weights
FILE = "log_z.safetensors"


class EstimatesLogZ(DPOTrainer):
    """A `DPOTrainer` with a `log_partition`, whose state is saved and loaded with the model.

    Attributes:
        log_partition: what `log_z` of its config chooses.
    """

    log_partition: LogPartition

    def _make_log_partition(
        self, train_dataset: Dataset | IterableDataset, compared: Callable[[Dataset], np.ndarray]
    ) -> None:
        """Set `log_partition`.

        Args:
            train_dataset: prepared rows, for which the choice has been checked.
            compared: which of them are compared with the reference, `(N,)` bool.

        Raises:
            ValueError: where the choice has no meaning for this model.
        """
        args: Any = self.args
        choice, beta, device = args.log_z, args.beta, self.accelerator.device
        if choice == "prior":
            labels = _labels_of(train_dataset, args, compared(train_dataset))
            self.log_partition = Prior(*labels, beta=beta, device=device)
        elif choice == "running_mean":
            self.log_partition = RunningMean(device=device)
        elif choice == "batch_kl":
            self.log_partition = BatchKL(device=device)
        elif choice in ("learned", "learned_constant"):
            size = 0
            if choice == "learned":
                if isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
                    raise ValueError(
                        "log_z='learned' reads the prompt's hidden state, which adapters that put virtual tokens "
                        "before the rows do not leave where it is. Set log_z='learned_constant', or train with LoRA."
                    )
                # Of the states that the output embeddings take, which OPT-350m projects to another width
                hidden_size = self.model.config.get_text_config().hidden_size
                size = getattr(self.model.get_output_embeddings(), "in_features", hidden_size)
            self.log_partition = Learned(size, beta=beta, learning_rate=args.log_z_learning_rate, device=device)
        else:
            self.log_partition = LogPartition(0.0 if choice == "column" else choice, device)

    def _set_batch_kl(
        self, model: Any, inputs: dict[str, torch.Tensor], real: torch.Tensor, image_key: torch.Tensor | None
    ) -> None:
        """Estimate KL(π_θ‖π_ref) on this micro-batch's prompts with other rows' completions, on all processes alike."""
        names = ("input_ids", "attention_mask", "completion_mask")
        text, counts = mismatched({name: inputs[name] for name in names}, real, image_key)
        batch = {**inputs, **text}  # the images stay with their prompts
        with torch.no_grad():
            policy_logps = self._scorer(model, batch).log_probs.sum(1)
        ref_logps = self.compute_ref_log_probs(self.ref_model or self.model, batch)[0]
        log_ratio = policy_logps - ref_logps
        if self.args.length_normalize:
            log_ratio = log_ratio / batch["completion_mask"][:, 1:].sum(1).clamp(min=1)
        sums = torch.stack([torch.where(counts, log_ratio, 0.0).sum(), counts.sum().to(log_ratio)])
        total, count = self.accelerator.reduce(sums, "sum")
        self.log_partition.set_kl(total, count)

    def _update_log_partition(self) -> None:
        """Move the estimator by the sums of an optimiser step over all processes."""
        sums = self.log_partition.take_sums()
        if sums is None:
            return
        group = self.optimizer.param_groups[0]
        # Schedulers of torch keep it there under this name, others nowhere; it is saved with the optimiser
        initial = group.setdefault("initial_lr", group["lr"])
        rate = float(group["lr"] / initial) if initial else 1.0
        self.log_partition.update(self.accelerator.reduce(sums, "sum"), rate)

    # Its state goes where the model's goes

    def save_model(self, output_dir=None, _internal_call=False):
        state = self.log_partition.state_dict()
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if state and self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: value.cpu().contiguous() for name, value in state.items()}, folder / FILE)
        super().save_model(output_dir, _internal_call)

    def _load_log_partition(self, folder: str | Path) -> None:
        path = Path(folder) / FILE
        self.log_partition.load_state_dict(load_file(path) if path.exists() else {})

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_log_partition(checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        self._load_log_partition(self.state.best_model_checkpoint)


def check_column(choice: float | str, dataset: Dataset | IterableDataset, name: str) -> None:
    """Raise ValueError where a data set lacks the column that `log_z` reads, or has one that it contradicts.

    Args:
        choice: `log_z` of the config.
        dataset: prepared rows; of streams only those are checked whose columns are known.
        name: of the data set, in the message.
    """
    names = dataset.column_names
    has_column = "log_z" in (names or ())
    if choice == "column" and names and not has_column:
        raise ValueError(f"log_z='column' needs a column log_z in the {name} dataset, in nats; there is none.")
    if isinstance(choice, str) and choice != "column" and has_column:
        raise ValueError(
            f"log_z={choice!r} and a column log_z in the {name} dataset contradict one another. Remove the column, "
            "or set log_z='column'."
        )


def check_labels(args: Any, train_dataset: Dataset | IterableDataset, compared: Callable) -> None:
    """Raise ValueError where the labels do not tell what `log_z` is to be learned from.

    Args:
        args: the trainer's config.
        train_dataset: prepared rows.
        compared: which of them are compared with the reference, `(N,)` bool.
    """
    if args.log_z not in NEED_CLASSES:
        return
    if isinstance(train_dataset, Dataset):
        _check_classes(args.log_z, *_labels_of(train_dataset, args, compared(train_dataset)))
    elif args.log_z == "prior":
        raise ValueError(
            "log_z='prior' needs the mean label of all rows, which a stream does not tell. Set log_z to a number, to "
            "'learned_constant', or load the data set without streaming."
        )


def _labels_of(rows: Dataset, args: Any, compared: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(label, continuous, weight in the loss) of the prepared rows that are compared, each `(M,)`."""
    label = np.asarray(rows["label"][:])
    continuous = is_continuous(rows, args.label_type)
    chosen = np.where(continuous, np.asarray(rows["sft_mask"][:]), label >= 0.5)
    weight = np.where(chosen, args.desirable_weight, args.undesirable_weight)
    if "weight" in rows.column_names:
        weight = weight * np.asarray(rows["weight"][:])
    return label[compared], continuous[compared], weight[compared]


def _check_classes(choice: str, label: np.ndarray, continuous: np.ndarray, weight: np.ndarray) -> None:
    for kind in (False, True):
        rows = (continuous == kind) & (weight > 0)
        if rows.any() and (label[rows] == label[rows][0]).all():
            raise ValueError(
                f"log_z={choice!r} needs compared rows of both classes: all {rows.sum()} that are compared with the "
                f"reference have the label {label[rows][0]:g}, which log Z alone would fit, and the policy would learn "
                "nothing. (Of binary labels, ULMA compares only rows that are no demonstrations.) Mark with sft_mask "
                "which of the good answers are demonstrations, or set log_z to a number."
            )
