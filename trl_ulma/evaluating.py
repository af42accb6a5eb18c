"""What a trainer evaluates, predicts and logs: figures that are ratios of sums over rows, however these are split."""

# transformers declares the model and the dataset of a trainer optional or of many kinds
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

import numpy as np
import torch
from accelerate.utils import gather_object
from trl import DPOTrainer

from trl_ulma.metrics import RatioSums, figures, ranking_figures
from trl_ulma.steps import real_rows


class EvaluatesRows(DPOTrainer):
    """A `DPOTrainer` that adds up its rows' figures in `_sums`, and keeps evaluated rows' rewards in `_evaluated`.

    Attributes:
        evaluated: `(N, 3)` of the last evaluation's rows: implicit reward, label after the transform, and 1 where the
            label is continuous.
    """

    evaluated: np.ndarray = np.empty((0, 3))
    _sums: RatioSums
    _evaluated: list[torch.Tensor]
    _has_reference: bool

    @property
    def has_rewards(self) -> bool:
        """Whether any row is compared with a reference; without one there are no rewards."""
        return self._has_reference

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss, and for each row its implicit reward (without a reference: log π_θ) and label."""
        inputs = self._prepare_inputs(inputs)
        inputs["real"] = real_rows(inputs, self.accelerator, is_last=True).to(self.accelerator.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, outputs["predictions"], outputs["label"]

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """As `Trainer.evaluation_loop`; every figure is a ratio of sums over the whole data set."""
        training, self._sums = self._sums, RatioSums(self.accelerator.device)
        self._evaluated = []
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
            )
            found = figures(self.accelerator.reduce(self._sums.totals(), "sum"))
        finally:
            self._sums = training
        found.pop("num_tokens", None)
        everything = torch.cat(gather_object([torch.cat(self._evaluated)]))
        self.evaluated = everything.numpy()
        rewards, label, continuous = everything.unbind(1)
        found.update(ranking_figures(rewards, label, continuous.bool()))
        if output.metrics is not None:
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """Implicit rewards (`predictions`, `(N,)`; without a reference log π_θ), labels (`label_ids`) and `metrics`.

        Args:
            test_dataset: raw rows, as the trainer takes them.
            ignore_keys: as in `Trainer.predict`.
            metric_key_prefix: begins the metrics' names.
        """
        test_dataset = self._prepare_dataset(test_dataset, self.processing_class, self.args, metric_key_prefix)
        if self.precompute_ref_logps:
            batch_size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
            test_dataset = self._precompute_ref_logps(test_dataset, metric_key_prefix, batch_size)
        return super().predict(test_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def train(self, *args, **kwargs):
        """As `Trainer.train`; what a training that was broken off left in the sums is not the next one's."""
        self._sums.reset()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # By their names, since the last log finds the model as an evaluation left it
        if "loss" in logs or "train_loss" in logs:
            found = figures(self.accelerator.reduce(self._sums.totals(), "sum"))
            found.pop("loss", None)  # Trainer's own figure is the same sum
            self._total_train_tokens += int(found.pop("num_tokens", 0)) // self.get_tp_size()
            logs.update(found)
            logs["num_tokens"] = self._total_train_tokens
            self._sums.reset()
        super().log(logs, start_time)
