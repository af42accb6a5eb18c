"""Checks of the reference: at the start of a training, in it and at its end, and against the resumed checkpoint."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from trl_ulma.likelihood.proof import LONGEST, LONGEST_OF_LAYOUT, StartupProof, probe_rows
from trl_ulma.likelihood.reference import Reference, ReferenceIdentity, plain_batch
from trl_ulma.likelihood.table import forward_inputs

logger = logging.getLogger(__name__)


class TrainingChecks:
    """The startup proof of a training, and the identity of its reference.

    Args:
        proof: the proof for the training's scorer and reference.
        context: returns the context that forward passes run in, for example mixed precision.
        tokens: `(N, W)` tokens that identify the reference, see `probe_tokens`.
        is_on: whether to run the proof (`startup_checks`).
        before: the reference's identity when its log-probabilities were precomputed, if they were.
        positions: the maximum number of tokens that the model can read. None if there is no limit.
    """

    def __init__(
        self,
        proof: StartupProof,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        context: Callable[[], AbstractContextManager],
        tokens: torch.Tensor,
        *,
        is_on: bool,
        before: ReferenceIdentity | None = None,
        positions: int | None = None,
    ):
        self.is_done = self._has_trained = self._is_moving = False
        self.identity: ReferenceIdentity | None = None
        self._proof = proof
        self._collate = collate
        self._context = context
        self._tokens = tokens
        self._is_on = is_on
        self._before = before
        self._positions = positions
        self._was_autocast = False

    @property
    def _reference(self) -> Reference:
        return self._proof.reference

    def start(
        self,
        policy: Any,
        rows: Any,
        *,
        at_start: bool,
        is_training: bool,
        is_moving: bool = False,
        resumed: ReferenceIdentity | None = None,
        resumed_logps: Sequence[float] = (),
    ) -> None:
        """Run the proof. All processes run the same forward passes.

        Args:
            at_start: whether the policy is still as it was before training.
            is_training: whether a training starts. False for an evaluation.
            is_moving: whether the reference changes during training, or is only used before training.
            resumed: the reference's identity in the checkpoint that training resumes from.
            resumed_logps: log π_θ of its `input_ids` when the checkpoint was written.

        Raises:
            ValueError: if a check fails. The message states what is wrong, by how much, and what to do.
        """
        if self.is_done:
            self.check_unmoved(policy)
        else:
            self._was_autocast = self._is_autocast()
        # A second training continues from the end of the first one
        at_start = at_start and not self._has_trained
        self._has_trained |= is_training
        self.is_done = True
        if is_training:
            with self._context():
                self._proof.scorer.check_nothing_is_trained_after_head(policy, plain_batch(self._tokens))
        if self._is_on:
            examples = list(islice(rows, 4))
            has_images = "prompt_images" in examples[0]
            batch = self._batch(examples[:2] if has_images else probe_rows(examples, LONGEST, same_prompt=False))
            layout = self._proof.scorer.layout
            laid_out = None
            if layout != "padded":
                # One row's prompt and another's completion must not have more tokens than the model has positions
                longest = min(LONGEST_OF_LAYOUT, (self._positions or 2 * LONGEST_OF_LAYOUT) // 2)
                laid_out = self._batch(probe_rows(examples, longest, same_prompt=layout == "shared"))
            with self._context():
                self._proof(policy, batch, laid_out, at_start=at_start, is_training=is_training)
                if at_start:
                    self._check_precomputed(policy, rows)
                if is_training:
                    self._proof.check_gradients(policy, batch)
        if self._before is not None:
            self.identity = self._before
        elif self._reference.kind != "none":
            self.identity = self._reference.identity(policy, self._tokens)
        self._is_moving = is_moving
        if resumed is not None and (self._reference.is_live or self._knows(resumed)):
            if self._before is not None and self._knows(resumed):  # training may have moved it since
                off = resumed.difference(self._before.logps)
            else:
                tokens = torch.tensor(resumed.input_ids, device=self._tokens.device)
                off = resumed.difference(self._reference.fingerprint(policy, tokens))
            if not off <= self._proof.tolerance:
                name = resumed.name or "no name"
                raise ValueError(
                    f"The checkpoint was trained against another reference ({resumed.kind}, {name}): its "
                    f"log-probabilities differ by {off:.2g} nats per token from those of this reference. Pass the "
                    "model that training started from, or the same ref_model."
                )

        if resumed is not None and resumed_logps and self._is_on:
            self._check_resumed(policy, dataclasses.replace(resumed, logps=resumed_logps))

    def _check_resumed(self, policy: Any, resumed: ReferenceIdentity) -> None:
        """Raise ValueError if the policy is not the model that the checkpoint was written from."""
        with self._context():
            tokens = torch.tensor(resumed.input_ids, device=self._tokens.device)
            off = resumed.difference(self._proof.policy_logps(policy, plain_batch(tokens)).double().tolist())
        if not off <= self._proof.tolerance:
            raise ValueError(
                f"After resuming, the model differs from the one that the checkpoint was written from: its "
                f"log-probabilities differ by {off:.2g} nats per token ({self._proof.tolerance:g} is allowed). Either "
                "some weights of the checkpoint were not loaded, or the model is loaded differently, for example in "
                "another dtype. Resume with the settings and package versions of the interrupted run. To train anyway, "
                "set startup_checks=False."
            )

    def _knows(self, resumed: ReferenceIdentity) -> bool:
        """Whether the precomputed reference was asked about the tokens that the checkpoint knows it by."""
        before = self._before
        return before is not None and [*map(list, before.input_ids)] == [*map(list, resumed.input_ids)]

    def policy_logps(self, policy: Any) -> list[float]:
        """log π_θ of the sequences that the reference is known by, which later tells whether the policy is the same
        model as it is now; [] if there is no reference.
        """
        if self.identity is None or not self.identity.input_ids:
            return []
        with self._context():
            return self._proof.policy_logps(policy, plain_batch(self._tokens)).double().tolist()

    def current_identity(self, policy: Any) -> ReferenceIdentity:
        """The identity of a reference that has changed since the start.

        Args:
            policy: the policy's model as it is trained.
        """
        return self._reference.identity(policy, self._tokens)

    def after_step(self, policy: Any, step: int) -> None:
        """Do what `end` does after steps 1, 2, 4, 8 and so on, so that a long training does not end with an error."""
        if step & (step - 1) == 0:
            self.end(policy)

    def end(self, policy: Any) -> None:
        """Raise ValueError if the reference, or the way from hidden states to logits, has changed since the start, and
        FloatingPointError if the weights are not finite. The loss of the last step was that before its update."""
        with torch.no_grad(), self._context():
            if not self._proof.policy_logps(policy, plain_batch(self._tokens)).isfinite().all():
                raise FloatingPointError(
                    "The last step has made the model's log-probabilities NaN or infinite. Lower learning_rate, load "
                    "the model with dtype='float32' (bf16=True or fp16=True still computes in half precision), or "
                    "train on from an earlier checkpoint."
                )
            self._proof.scorer.check_map(policy, plain_batch(self._tokens))
        self.check_unmoved(policy)

    def check_unmoved(self, policy: Any) -> None:
        """Raise ValueError if the reference has changed since the start. A precomputed one is not asked."""
        if self._is_on and self._proof.is_exact and self.identity and self._is_autocast() != self._was_autocast:
            now, before = ("outside of", "within") if self._was_autocast else ("within", "outside of")
            raise ValueError(
                f"This is called {now} torch.autocast, but the trainer first used its reference {before} it, so "
                "rewards would be differences of log-probabilities that are rounded differently. Call train(), "
                "evaluate(), predict() and score() all outside of torch.autocast. To compute in half precision, set "
                "bf16=True or fp16=True."
            )
        if self.identity is None or not self._reference.is_live or self._is_moving:
            return
        with torch.no_grad(), self._context():
            off = self.identity.difference(self._reference.fingerprint(policy, self._tokens))
        if off <= self._proof.tolerance:
            return
        message = (
            f"The reference has changed since the trainer first used it, by {off:.2g} nats per token, so it is not the "
            "fixed reference of one training. Other code, or another trainer, has changed its weights or adapter."
        )
        if self._is_on:
            raise ValueError(
                f"{message} Pass a ref_model that no other code uses. If a callback changes the reference on purpose, "
                "set startup_checks=False."
            )
        logger.warning(f"{message} The files saved with the model describe the reference of the start.")
        self._is_moving = True

    def _is_autocast(self) -> bool:
        return torch.is_autocast_enabled(self._tokens.device.type)

    def _check_precomputed(self, policy: Any, rows: Any) -> None:
        """Raise ValueError if the column `ref_logps` differs from the policy's log-probabilities before training, or
        from the batch that the rows are collated to."""
        if not isinstance(rows, Dataset) or "ref_logps" not in rows.column_names:
            return
        known = np.flatnonzero(~np.isnan(np.asarray(rows.select(range(min(len(rows), 64)))["ref_logps"][:])))
        if len(known):
            batch = self._collate([rows[int(i)] for i in known[:2]])
            if "ref_logps" not in batch:
                return  # the user's collator drops the column; computing the loss raises an error for that
            column = torch.tensor([rows[int(i)]["ref_logps"] for i in known[:2]])
            if not torch.allclose(batch["ref_logps"].cpu().to(column), column):
                raise ValueError(
                    "The data_collator changes ref_logps, the reference's precomputed log-probabilities: it makes "
                    f"{batch['ref_logps'].tolist()} of {column.tolist()}. Leave them as they are. To compare with "
                    "another reference, pass it as ref_model."
                )
            if self._reference.kind == "given":
                return
            found = self._proof.policy_logps(policy, forward_inputs(batch))
            tokens = batch["completion_mask"][:, 1:].sum(1)
            self._proof.check_reference(policy, found, batch["ref_logps"], tokens)

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return forward_inputs(self._collate(rows))


def probe_tokens(tokenizer: PreTrainedTokenizerBase, embeddings: int, positions: int | None = None) -> torch.Tensor:
    """`(4, 8)` random tokens without special tokens. There are fewer columns if the policy cannot read 8 tokens.

    The tokens only depend on the vocabulary of the tokenizer.

    Args:
        embeddings: the number of tokens that the policy has embeddings for.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    size = min(len(tokenizer), embeddings)
    usual = np.array([token for token in range(size) if token not in special] or range(size))
    drawn = np.random.default_rng(0).integers(len(usual), size=(4, 8))
    return torch.from_numpy(usual[drawn])[:, :positions]
