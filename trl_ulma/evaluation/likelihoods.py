"""Perplexity and implicit rewards of one model after the other on the same rows."""

import gc
import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.special import expit

from trl_ulma.evaluation.as_trained import BETA, reward_scale
from trl_ulma.evaluation.before import model_before, name_before
from trl_ulma.evaluation.findings import on_own_scale, surprises
from trl_ulma.evaluation.implicit_reward import (
    binary_figures,
    calibration_curve,
    continuous_figures,
    implicit_reward,
    length_figures,
    over_length,
    split_figures,
)
from trl_ulma.evaluation.perplexity import perplexity
from trl_ulma.evaluation.reading import Note, Reading
from trl_ulma.evaluation.records import digest
from trl_ulma.likelihood.table import batching_difference, collator_for, completion_logps, prompt_states
from trl_ulma.losses import group_means, is_informative
from trl_ulma.rows.rendering import tokenizer_of
from trl_ulma.saved import (
    SETTINGS_FILE,
    SavedSettings,
    adapter_base,
    batching_note,
    check_same_tokens,
    differs_from_training,
    load_reference,
    load_tokenizer,
    saved_settings,
    training_autocast,
)


@dataclass
class Likelihoods:
    """Perplexity and implicit rewards of models on the rows of an evaluation.

    Attributes:
        args: the options of `trl_ulma.scripts.evaluate`.
        reading: the rows.
        note: called with each note for the report.
        file: the file for the rewards of a run, by the run's name.
        befores: figures of the models before training that are not evaluated themselves, by their name or folder.
    """

    args: Namespace
    reading: Reading
    note: Note
    file: Callable[[str], Path]
    befores: dict[str, dict[str, Any]] = field(default_factory=dict)
    _ref_logps: dict[str, np.ndarray] = field(default_factory=dict)
    _rewards: dict[Path, str] = field(default_factory=dict)

    def __call__(self, run: str, source: str, model: Any, processing_class: Any, rows: Dataset) -> dict[str, Any]:
        """Return the figures of a model, for the report.

        Args:
            run: the name of the model in the report.
            source: its folder, or its name on the Hub.
            model: the model.
            processing_class: its tokenizer or processor.
            rows: the prepared rows.
        """
        args, held_out, how = self.args, self.reading.held_out, self.reading.how
        collate = collator_for(processing_class, max_length=how.max_length, truncation_mode=how.truncation_mode)
        raw = np.asarray(rows["row"][:])
        prompt, label = held_out.prompt[raw], held_out.label[raw]
        mask, continuous = held_out.sft_mask[raw], held_out.continuous[raw]
        has_log_z = "log_z" in rows.column_names
        saved = saved_settings(source)
        scale = None
        if self._has_reference(run, source, saved):  # before the scoring, because an error should not come after it
            scale = reward_scale(
                source,
                continuous,
                beta=args.beta,
                log_z=0.0 if has_log_z else args.log_z,
                prompt_states=partial(prompt_states, model, rows, collate, batch_size=args.batch_size),
            )
        with training_autocast(saved, model):
            scoring = {"batch_size": args.batch_size, "what": f"Scoring, {run}"}
            logps, tokens = completion_logps(model, rows, collate, **scoring)
            off = 0.0
            if scale is not None:
                off = batching_difference(model, rows, logps, collate, batch_size=args.batch_size)
        facts: dict[str, Any] = {
            "rows": len(rows),
            "tokens": int(tokens.sum()),
            "perplexity": self._perplexity(logps, tokens, prompt, mask),
        }
        if scale is None:
            return facts
        self._note_training(run, saved, has_log_z)
        self.note(batching_note(source, saved, model, scale.beta, off))
        ref_logps = self._reference(
            run, source, model, tokenizer_of(processing_class), rows, collate, scale.beta, int(tokens.max(initial=1))
        )
        log_z = np.asarray(rows["log_z"][:]) if has_log_z else scale.log_z
        per = tokens.clip(min=1) if scale.length_normalize else 1
        rewards = implicit_reward(logps / per, ref_logps / per, scale.beta, log_z)
        facts["reward"] = {"beta": scale.beta, "length_normalize": scale.length_normalize}
        self._keep(run, raw, held_out.own_label[raw], rewards)
        groups = None
        if saved is not None and saved.log_z == "group" and args.log_z is None and not has_log_z:
            groups = torch.from_numpy(2 * prompt + continuous)  # as in training
            groups[~is_informative(torch.from_numpy(label), groups, torch.from_numpy(continuous))] = -1
            self._note_groups(run, int((groups >= 0).sum()), len(groups))
        facts |= self._of_rewards(rewards, tokens, raw, groups)
        if groups is None:
            raters = None if held_out.raters is None else [held_out.raters[row] for row in raw]
            own = held_out.own_label[raw]
            facts["surprises"] = surprises(
                rewards, label, own, continuous, how.rules, held_out.rows, raw, held_out.places, raters
            )
        before = model_before(source, args.ref_model)
        if args.base and before is not None and before not in (*self.befores, *dict(args.model).values()):
            others = [model_before(each, args.ref_model) for _, each in args.model if not each.startswith("served:")]
            # It gives all answers the reward 0
            self.befores[before] = {
                "name": name_before(before, run, dict(args.model), others),
                "source": before,
                "is_base": True,
                "rows": len(rows),
                "perplexity": self._perplexity(ref_logps, tokens, prompt, mask),
                **self._of_rewards(np.zeros(len(rows)), None, raw, groups),
                "judged": {},
            }
        return facts

    def _has_reference(self, run: str, source: str, saved: SavedSettings | None) -> bool:
        """Whether the reference of a model is known, without which there are no rewards. Notes if it is not."""
        identity, called = None if saved is None else saved.reference, self._called(run)
        if self.args.ref_model is not None:
            return True
        if identity is not None and identity.kind == "none":
            self.note(
                f"{called} has no implicit rewards, because it was trained without a reference. Name one with "
                "--ref_model."
            )
            return False
        if adapter_base(source) is None and (identity is None or not identity.name):
            self.note(
                f"{called} has no implicit rewards, because its reference is not known. Name it with --ref_model."
            )
            return False
        return True

    def _called(self, run: str) -> str:
        """What notes call a model, at the beginning of a sentence."""
        return "The model" if len(self.args.model) == 1 else run

    def _note_training(self, run: str, saved: SavedSettings | None, has_log_z: bool) -> None:
        """Note if the scale of the rewards is unknown or another one in training."""
        args, called = self.args, self._called(run)
        if has_log_z and saved is not None and saved.log_z not in (0, "column"):
            self.note(
                f"{called} has its own log Z ({saved.log_z}), but the column log_z of the rows is used. Remove the "
                "column to get the rewards of the training."
            )
        unknown = [f"--{name}" for name in ("beta", "log_z") if getattr(args, name) is None]
        if saved is None and unknown:
            self.note(
                f"{called} has no {SETTINGS_FILE}, so the scale of its rewards is unknown. They are computed with "
                f"β = {args.beta or BETA:g} and log Z = {args.log_z or 0:g}. Set {' and '.join(unknown)} as in "
                "training."
            )

    def _note_groups(self, run: str, compared: int, rows: int) -> None:
        """Note that only rows of one prompt are compared."""
        alone = (
            f" {rows - compared} of {rows} rows have no other of their prompt to compare." if compared < rows else ""
        )
        self.note(
            f'{self._called(run)} was trained with log_z="group", so only the rewards of one prompt can be compared. '
            "As in the training's own evaluation, the figures are of rewards and ratings that are centered within the "
            f"prompt, and no labels are predicted.{alone}"
        )

    def write(self) -> None:
        """Write the reward of each row, in a file per model, and remove the files of an earlier report."""
        for path, text in self._rewards.items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        for folder in {path.parent for path in self._rewards}:
            for path in set(folder.glob("*.jsonl")).difference(self._rewards):
                path.unlink()

    def _keep(self, run: str, rows: np.ndarray, label: np.ndarray, rewards: np.ndarray) -> None:
        """Keep the reward of each row for `write`."""
        places = self.reading.held_out.places
        columns = sorted(zip(rows.tolist(), label.tolist(), rewards.tolist(), strict=True))
        found = [
            {"row": row, "file_line": places[row], "label": label, "reward": reward} for row, label, reward in columns
        ]
        lines = [json.dumps({name: value for name, value in each.items() if value is not None}) for each in found]
        self._rewards[self.file(run)] = "".join(f"{line}\n" for line in lines)

    def _perplexity(
        self, logps: np.ndarray, tokens: np.ndarray, prompt: np.ndarray, mask: np.ndarray
    ) -> dict[str, Any]:
        return {
            name: perplexity(logps[which], tokens[which], prompt[which], seed=self.args.seed)
            for name, which in (("demonstrations", mask), ("other answers", ~mask))
            if which.any()
        }

    def _of_rewards(
        self, rewards: np.ndarray, tokens: np.ndarray | None, raw: np.ndarray, groups: torch.Tensor | None
    ) -> dict[str, Any]:
        """Figures of rewards, also on the scale of the labels if it is not 0 and 1.

        Args:
            rewards: `(N,)`.
            tokens: `(N,)` number of tokens of each completion, with which rewards are compared, or None.
            raw: `(N,)` numbers of the rows.
            groups: `(N,)` groups within which rows are compared, as a training with log_z="group" does, negative for
                rows that are not compared. None if all rows are compared with each other.
        """
        seed, rules, held_out = self.args.seed, self.reading.how.rules, self.reading.held_out
        label, continuous, prompt = held_out.label[raw], held_out.continuous[raw], held_out.prompt[raw]
        found: dict[str, Any] = {"implicit_reward": {}}
        if groups is not None:
            kept = (groups >= 0).numpy()
            if not kept.any():
                return found
            rewards, tokens = _centered(rewards, groups), None if tokens is None else _centered(tokens, groups)[kept]
            label = np.where(continuous, _centered(label, groups), label)
            rewards, label, continuous, prompt = (each[kept] for each in (rewards, label, continuous, prompt))
        found["implicit_reward"] = {
            name: estimate
            for which, of in ((~continuous, binary_figures), (continuous, continuous_figures))
            if which.any()
            for name, estimate in of(rewards[which], label[which], prompt[which], seed=seed).items()
        }
        has_auc = "auc" in found["implicit_reward"]  # of which the report concludes first
        found["ranked_rows"] = int((~continuous & (label != 0.5) if has_auc else continuous).sum())
        if tokens is not None:
            found["length_alone"] = length_figures(tokens, label, continuous, prompt, seed=seed)
            found["over_length"] = over_length(
                rewards, tokens, label, continuous, prompt, found["length_alone"], seed=seed
            )
        if groups is not None:  # no probability or label is predicted
            found["implicit_reward"].pop("brier", None)
            return found
        found["split"] = split_figures(rewards, label, continuous, prompt, self.reading.center, seed=seed)
        if not continuous.all():
            found["calibration"] = calibration_curve(expit(rewards[~continuous]), label[~continuous])
        own = continuous == (rules.label_type == "continuous")
        if own.any() and (rules.label_type == "continuous" or rules.transform is not None):
            which = (rewards[own], held_out.own_label[raw][own], continuous[own], prompt[own])
            raters = None if held_out.raters is None else [held_out.raters[row] for row in raw[own]]
            found["own_scale"] = on_own_scale(*which, rules, raters, seed=seed)
        return found

    def _reference(
        self,
        run: str,
        source: str,
        model: Any,
        tokenizer: Any,
        rows: Dataset,
        collate: Any,
        beta: float,
        longest: int,
    ) -> np.ndarray:
        """`(N,)` log π_ref(y|x). Notes if the model or the reference is not computed as in training."""
        args, saved = self.args, saved_settings(source)
        scoring = {"batch_size": args.batch_size, "what": f"Scoring, reference of {run}"}
        loading = {"trust_remote_code": args.trust_remote_code}
        how = (str(model.dtype), saved and (saved.mixed_precision, saved.reference and saved.reference.dtype))
        seen = rows["image_key"][:] if "image_key" in rows.column_names else None
        key = digest(rows["prompt_ids"][:], rows["completion_ids"][:], seen, str(how))
        if args.ref_model is not None and key in self._ref_logps:
            self.note(differs_from_training(model, None, source, saved, longest, beta))
            return self._ref_logps[key]
        if args.ref_model is not None:
            check_same_tokens(tokenizer, load_tokenizer(args.ref_model, **loading), rows, run, args.ref_model)
        reference = load_reference(model, source, saved, args.ref_model, dtype=args.dtype, **loading)
        self.note(differs_from_training(model, reference, source, saved, longest, beta))
        with training_autocast(saved, model):
            logps = completion_logps(reference.model or model, rows, collate, reference=reference, **scoring)[0]
        if args.ref_model is not None:
            self._ref_logps[key] = logps
        del reference
        gc.collect()
        return logps


def _centered(values: np.ndarray, groups: torch.Tensor) -> np.ndarray:
    """Values `(N,)` without the mean of their group."""
    of = torch.from_numpy(values.astype(np.float64))
    return (of - group_means(of, groups)).numpy()
