"""Runs an evaluation: reads the rows, evaluates one model after the other, and writes the report."""

import gc
import json
import os
import re
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.special import expit

from trl_ulma.data import seen_prompts
from trl_ulma.data.files import check_splits, load_rows, split_by_prompt
from trl_ulma.evaluation import report
from trl_ulma.evaluation.as_trained import BETA, as_trained, reward_scale
from trl_ulma.evaluation.findings import changed, on_own_scale, surprises
from trl_ulma.evaluation.generation import Generator, Sampling, ServerGenerator, TransformersGenerator, generate
from trl_ulma.evaluation.held_out import HeldOut, Question
from trl_ulma.evaluation.implicit_reward import (
    binary_figures,
    calibration_curve,
    continuous_figures,
    implicit_reward,
    split_figures,
)
from trl_ulma.evaluation.judges import Judge, ProfanityJudge, RewardModelJudge
from trl_ulma.evaluation.judging import Judging
from trl_ulma.evaluation.llm_judge import LLMJudge
from trl_ulma.evaluation.perplexity import perplexity
from trl_ulma.evaluation.pictures import pictures
from trl_ulma.evaluation.records import digest
from trl_ulma.evaluation.server import Budget, Reply, Server
from trl_ulma.judge import beyond_training, saved_file
from trl_ulma.labels import LabelRules
from trl_ulma.likelihood.table import batching_difference, collator_for, completion_logps, prompt_states
from trl_ulma.rows.chat import with_system_message
from trl_ulma.rows.images import has_images
from trl_ulma.rows.notes import left_out_of
from trl_ulma.rows.preparation import Preparation
from trl_ulma.rows.rendering import processor_of, tokenizer_of
from trl_ulma.saved import (
    SETTINGS_FILE,
    SavedSettings,
    adapter_base,
    as_reference,
    batching_note,
    check_same_tokens,
    differs_from_training,
    load_model,
    load_processing_class,
    load_reference,
    load_tokenizer,
    positions,
    saved_settings,
    training_autocast,
)

SERVED = "served:"
# Kinds of references that are separate models
OWN_MODEL = ("copy", "given")
_ENOUGH_JUDGED = 200  # prompts
# Length limit in tokens of the few answers that are shown if no others are generated
EXAMPLE_TOKENS = 128
_MOST_LABELS = 100
# How many of the rows that were left out the report names
_LISTED = 5
# Notes on the train split, or a part of it, for a model without a record of its training prompts
_MAYBE_SEEN = (
    "The train split is evaluated. Training may have seen these rows, so the figures do not show what a model does on "
    "new ones."
)
_MAYBE_HELD_OUT = (
    "It is not known whether {} was trained on these rows. Training held them out if it ran with --eval_strategy or "
    "--do_eval, the same --test_split_size, and this seed as its --seed."
)


def run(args: Namespace) -> dict[str, Any]:
    """Evaluate, write the report, and return the contents of `report.json`.

    Args:
        args: the options of `trl_ulma.scripts.evaluate`, with `model` as (name, source) and `judge` as (kind, name).

    Raises:
        ValueError, OSError, ServerError: if rows, models or servers cannot be used.
    """
    return _Run(args)()


def _file_name(run: str) -> str:
    return re.sub(r"[^\w.-]+", "_", run) + ".jsonl"


class _Run:
    def __init__(self, args: Namespace):
        self.args = args
        self.notes: list[str] = []
        self.loading = {"trust_remote_code": args.trust_remote_code}
        self.sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
        self.names = run_names([name for name, _ in args.model])
        files = [_file_name(name) for name in self.names]
        if alike := [name for name, file in zip(self.names, files, strict=True) if files.count(file) > 1]:
            raise ValueError(
                f"--model names the runs {', '.join(map(repr, alike))}, whose files would have the same name. Give "
                "them names that differ in letters, digits, dots or dashes."
            )
        self.budget = Budget(args.max_requests)
        self.servers = {
            source: self._server(source.removeprefix(SERVED), args.server_url, args.server_key_variable)
            for _, source in args.model
            if source.startswith(SERVED)
        }
        self._check_models()
        args.output.mkdir(parents=True, exist_ok=True)
        judges = [self._judge(kind, name) for kind, name in args.judge]
        self.judging = Judging(judges, args.criterion, seed=args.seed, note=self._note)
        for server in (*self.servers.values(), *(each.server for each in judges if isinstance(each, LLMJudge))):
            server.check()
        self.answers_all = bool(judges or args.generate or self.servers)
        self.held_out, self.split = self._rows(self.answers_all)
        self.center, self.own_center, self.is_reversed = self._centers()
        self.questions = self._questions() if self.answers_all else self._examples()
        self._ref_logps: dict[str, np.ndarray] = {}
        # The models before training by their name or folder, see `_before`, and the answers of all models
        self.bases: dict[str, dict[str, Any]] = {}
        self.replies: dict[str, dict[int, str | None]] = {}

    def __call__(self) -> dict[str, Any]:
        args, held_out = self.args, self.held_out
        # First, because an error of a judge should not come after all answers have been generated
        if self.answers_all:
            self._announce()
            self.judging.agree(self.questions)
        models = [self._model(run, source) for run, (_, source) in zip(self.names, args.model, strict=True)]
        for model in models:
            self._compare_answers(model)
        drawings, not_drawn = pictures([*models, *self.bases.values()], held_out.own_label, held_out.sft_mask)
        settings = {name: value for name, value in vars(args).items() if value is not None and value != []}
        labels = Counter(held_out.own_label.tolist())
        facts = {
            "settings": settings,
            "versions": report.versions(),
            "commit": report.commit(),
            "data": {
                "dataset": args.dataset,
                "split": self.split,
                "rows": len(held_out.rows),
                "left_out": dict(held_out.left_out),
                "invalid_rows": [str(error) for error in held_out.invalid[:_LISTED]],
                "label_type": self.how.rules.label_type,
                "label_transform": None if self.how.rules.transform is None else str(self.how.rules.transform),
                "max_length": self.how.max_length,
                "prompts": len(np.unique(held_out.prompt)),
                "demonstrations": int(held_out.sft_mask.sum()),
                "labels": {f"{label:g}": n for label, n in sorted(labels.most_common(_MOST_LABELS))},
                "label_center": self.own_center if held_out.continuous.any() else None,
                "is_reversed": self.is_reversed,
                "questions": len(self.questions) if self.answers_all else 0,
            },
            "models": [*models, *self.bases.values()],
            "judges": self.judging.facts(),
            "differences": self.judging.differences(),
            "over_seeds": report.over_runs([name for name, _ in args.model], models),
            "notes": self.notes,
            "not_drawn": not_drawn,
        }
        report.write(args.output, facts, drawings)
        return facts

    # Before any work

    def _check_models(self) -> None:
        """Raise ValueError if a model or the reference cannot be loaded."""
        named = [("--model", source) for _, source in self.args.model if source not in self.servers]
        if self.args.ref_model is not None:
            named.append(("--ref_model", self.args.ref_model))
        for option, source in named:
            try:
                load_tokenizer(source, **self.loading)
                positions(source, **self.loading)
            except (ImportError, OSError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{option} {source}: its configuration and its tokenizer cannot be loaded "
                    f"({' '.join(str(error).split())[:300]}). Name the folder of a checkpoint or an adapter, or a "
                    "model on the hub."
                ) from error

    def _rows(self, answers: bool) -> tuple[HeldOut, str]:
        """Returns (held-out rows, name of the split or description). `answers` is whether answers will be generated."""
        args = self.args
        splits: Any = load_rows(
            args.dataset,
            config=args.dataset_config,
            columns=args.columns,
            label_map=args.label_map,
            invalid_rows="mark",
        )
        there = ", ".join(map(str, splits))
        split = args.split or "test"
        read = split if split in splits else "train"
        for note in check_splits({read: splits[read]} if read in splits else {}, args.dataset):
            self._note(note)
        if read in splits and has_images(splits[read]):
            self._check_images(answers)
        if split in splits:
            return self._held_out(splits[split], split), split
        if args.split is not None or "train" not in splits:
            raise ValueError(f"{args.dataset} has no split {split!r}, but {there}. Set --split to one of them.")
        rows: Dataset = splits["train"]
        held_out = split_by_prompt(rows, test_size=args.test_split_size, seed=args.split_seed)["test"]
        part = f"{args.test_split_size:g} of train by prompt, seed {args.split_seed}"
        self._note(
            f"{args.dataset} has no test split, so {len(held_out):,} of its {len(rows):,} rows are selected ({part}). "
            "--split train evaluates all rows."
        )
        return self._held_out(held_out, "test"), part

    def _held_out(self, rows: Dataset, name: str) -> HeldOut:
        held_out = HeldOut.of(rows, name, self._as_trained(rows), self.args.invalid_rows, takes_images=True)
        own = held_out.continuous == (self.how.rules.label_type == "continuous")
        self._note_any(beyond_training(held_out.own_label[own], self.how.rules))
        return held_out

    def _centers(self) -> tuple[float, float, bool]:
        """Returns (center of the continuous labels after the transform, center on the scale of the rows, whether lower
        labels on this scale are better)."""
        held_out, rules = self.held_out, self.how.rules
        if not held_out.continuous.any():
            return 0.0, 0.0, False
        center = self.how.label_center
        if center is None:
            center = round(float(held_out.label[held_out.continuous].mean()), 9)
            self._note(
                "The mean of the training labels is not known, so rows are split into chosen and rejected ones at the "
                "mean label of the rows here."
            )
        if rules.transform is None or rules.label_type != "continuous":
            return center, center, False
        own, above = rules.transform.invert(np.array([center, center + 0.01])).tolist()
        return center, own, above < own

    def _check_images(self, answers: bool) -> None:
        """Raise ValueError if rows with images cannot be evaluated as asked."""
        blind = [
            source
            for _, source in self.args.model
            if source not in self.servers and processor_of(load_processing_class(source, **self.loading)) is None
        ]
        if blind:
            raise ValueError(
                f"{self.args.dataset} has images, and {blind[0]} was saved with a tokenizer alone, without a processor "
                "of images. Evaluate a vision-language model, or remove the column of images."
            )
        if answers:
            raise ValueError(
                f"{self.args.dataset} has images, and answers to rows with images are not generated. Leave out "
                "--judge, --generate and served: models. Perplexity and rewards are computed for rows with images."
            )

    def _as_trained(self, rows: Dataset) -> LabelRules:
        """The rules for labels. Also sets `how`."""
        args, names = self.args, rows.column_names
        self.how = as_trained(
            [source for _, source in args.model if source not in self.servers],
            label_type=args.label_type,
            label_transform=args.label_transform,
            sft_threshold=args.sft_threshold,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            is_paired="chosen" in names,
            labels=rows["label"][:] if "label" in names and "label_type" not in names else (),
        )
        for note in self.how.notes:
            self._note(note)
        return self.how.rules

    def _questions(self) -> list[Question]:
        found = self.held_out.questions(self.args.num_prompts, self.args.seed, self.center)
        if not found:
            raise ValueError(
                "No prompt has a good answer to compare with: a row with sft_mask, with a binary label of ½ and above, "
                f"or with a continuous label of {self.own_center:g} and {'below' if self.is_reversed else 'above'}. "
                "Evaluate more rows, or leave --judge and --generate out."
            )
        if len(found) < _ENOUGH_JUDGED and self.args.judge:
            are = "prompt is" if len(found) == 1 else "prompts are"
            self._note(
                f"{len(found)} {are} too few for a conclusion from judged answers. Use {_ENOUGH_JUDGED} or more."
            )
        return found

    def _examples(self) -> list[Question]:
        """Return a few prompts whose answers before and after training the report shows."""
        args = self.args
        if not (args.examples and args.base) or has_images(self.held_out.rows):
            return []
        self.sampling = replace(self.sampling, max_new_tokens=min(args.max_new_tokens, EXAMPLE_TOKENS))
        return self.held_out.questions(args.examples, args.seed, self.center)

    def _server(self, model: str, url: str | None, key_variable: str | None) -> Server:
        args = self.args
        if key_variable is not None and not os.environ.get(key_variable, "").strip():
            raise ValueError(
                f"The environment variable {key_variable} holds the key of {model}'s server and is not set. Set it, or "
                "name another with --key_variable (for served models: --server_key_variable)."
            )
        return Server(
            model,
            url,
            key_variable=key_variable,
            timeout=args.timeout,
            retries=args.retries,
            concurrency=args.concurrency,
            note=partial(print, file=sys.stderr),  # and for the report it is kept with each answer
            budget=self.budget,
        )

    def _judge(self, kind: str, name: str) -> Judge:
        args = self.args
        if kind == "profanity":
            return ProfanityJudge()
        if kind == "reward":
            return RewardModelJudge(
                name, args.criterion[0], label=args.judge_label, batch_size=args.batch_size, **self.loading
            )
        cache = args.judge_cache or args.output / "verdicts.jsonl"
        server = self._server(name, args.judge_url, args.key_variable)
        return LLMJudge(
            server,
            cache,
            temperature=args.judge_temperature,
            max_tokens=args.judge_max_tokens,
            resume=args.resume,
            retry_refused=args.retry_refused,
        )

    def _announce(self) -> None:
        """Print the largest number of requests and tokens, before the first request."""
        args = self.args
        bases = {self._before(source) for _, source in args.model} - {None, *self.servers, *(s for _, s in args.model)}
        runs = len(args.model) + (len(bases) if args.base else 0)
        told = [
            f"Judge {name}: at most {plan.requests:,} requests (each comparison in both orders), about {plan.tokens:,} "
            f"input tokens in total, and at most {args.judge_max_tokens:,} output tokens per request"
            + (f". {plan.cached:,} replies are already cached." if plan.cached else ".")
            for name, plan in self.judging.plan(self.questions, runs).items()
        ]
        told += [
            f"Model {source.removeprefix(SERVED)}: at most {len(self.questions):,} requests, with at most "
            f"{args.max_new_tokens:,} output tokens each."
            for source in self.servers
        ]
        if told and args.max_requests is not None:
            told.append(f"This run stops asking after {args.max_requests:,} requests (--max_requests).")
        for each in told:
            print(each, file=sys.stderr)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        print(text, file=sys.stderr)

    def _note_any(self, text: str | None) -> None:
        if text is not None:
            self._note(text)

    # The models

    def _model(self, run: str, source: str) -> dict[str, Any]:
        facts: dict[str, Any] = {"name": run, "source": source, "perplexity": {}, "implicit_reward": {}, "judged": {}}
        if source in self.servers:
            prompts = [question.prompt for question in self.questions]
            if self.how.system_message is not None:  # the other models read it, too
                prompts = [with_system_message(prompt, self.how.system_message) for prompt in prompts]
            return facts | self._answers(run, ServerGenerator(self.servers[source]), self.questions, prompts)
        args = self.args
        processing_class = load_processing_class(source, **self.loading)
        tokenizer = tokenizer_of(processing_class)
        most = positions(source, **self.loading)
        rules = replace(self.how.rules, transform=None)  # the labels are already transformed
        prepare = Preparation(
            processing_class,
            rules,
            self.how.max_length,
            self.how.truncation_mode,
            most,
            invalid_rows=args.invalid_rows,
            assistant_only_loss=self.how.assistant_only_loss,
            chat=self.how.chat,
            system_message=self.how.system_message,
        )
        rows: Any = prepare(self.held_out.rows, "test")
        missing = np.setdiff1d(np.arange(len(self.held_out.rows)), rows["row"][:])
        facts["left_out"] = len(missing)
        facts["left_out_reasons"] = left_out_of(rows)
        facts["left_out_rows"] = [self.held_out.places[row] or f"row {row}" for row in missing[:_LISTED]]
        facts["trained_on"] = self._note_seen(run, source, np.asarray(rows["row"][:]))
        model = load_model(source, dtype=args.dtype, **self.loading)
        facts |= self._likelihoods(run, source, model, processing_class, rows)
        befores = {self._before(each) for _, each in args.model}
        if self.questions and (self.answers_all or self._before(source) is not None or source in befores):
            ids = dict(zip(rows["row"][:], rows["prompt_ids"][:], strict=True))
            questions = [question for question in self.questions if question.row in ids]
            if not self.answers_all:
                longest = float("inf") if most is None else most - self.sampling.max_new_tokens
                questions = [question for question in questions if 0 < len(ids[question.row]) <= longest]
            elif len(questions) < len(self.questions):
                fewer = len(self.questions) - len(questions)
                self._note(
                    f"{run} does not answer {fewer} of the {len(self.questions)} prompts, because their rows were left "
                    "out for it."
                )
            prompts = [ids[question.row] for question in questions]
            generator = TransformersGenerator(model, tokenizer, source, most)
            facts |= self._answers(run, generator, questions, prompts)
            base = self._before(source)
            if base in self.bases and base not in self.replies:
                if args.ref_model is None and base in (adapter_base(source), f"{source}/ref"):
                    with as_reference(model, source) as reference:
                        self._base_answers(
                            base, TransformersGenerator(reference, tokenizer, base, most), questions, prompts
                        )
                else:
                    dtype = str(model.dtype).removeprefix("torch.")
                    del model, generator
                    _free()
                    model = load_model(base, dtype=dtype, revision=self._revision(source), **self.loading)
                    self._base_answers(base, TransformersGenerator(model, tokenizer, base, most), questions, prompts)
        del model
        _free()
        return facts

    def _before(self, source: str) -> str | None:
        """The name or folder of the model before training, or None if it is unknown."""
        if source in self.servers:
            return None
        if self.args.ref_model is not None:
            return self.args.ref_model
        saved = saved_settings(source)
        base = adapter_base(source)
        if base is None or (saved is not None and saved.reference is not None and saved.reference.kind in OWN_MODEL):
            # A full model, or an adapter whose reference was not its base
            return None if saved is None or saved.reference is None else saved.reference.name or None
        # An adapter that was trained further keeps the earlier one in `ref`
        return base if saved_file(source, "ref/adapter_config.json") is None else f"{source}/ref"

    def _revision(self, source: str) -> str | None:
        """The revision on the Hub of the model in `_before`."""
        saved = saved_settings(source)
        if self.args.ref_model is not None or saved is None or saved.reference is None:
            return None
        return saved.reference.revision

    def _base_answers(self, base: str, generator: Generator, questions: list[Question], prompts: list) -> None:
        facts = self.bases[base]
        facts |= self._answers(facts["name"], generator, questions, prompts, key=base)

    def _answers(
        self, run: str, generator: Generator, questions: list[Question], prompts: list, *, key: str | None = None
    ) -> dict[str, Any]:
        args = self.args
        path = self._file("answers", run)
        options = {"batch_size": args.batch_size, "resume": args.resume, "retry_refused": args.retry_refused}
        replies = generate(generator, prompts, path, self.sampling, **options)
        told = {
            "prompts": len(replies),
            "cut_at_max_new_tokens": sum(not reply.finished for reply in replies),
            "empty": sum(not reply.text.strip() and reply.refused is None for reply in replies),
            "refused": dict(Counter(reply.refused.value for reply in replies if reply.refused is not None)),
            "changes": sorted({change for reply in replies for change in reply.changes}),
        }
        self._note_answers(run, replies, told)
        answers = [None if reply.refused is not None else reply.text for reply in replies]
        self.replies[key or run] = dict(zip((question.row for question in questions), answers, strict=True))
        return {"answers": told, "judged": self.judging.judge(run, questions, answers)}

    def _note_answers(self, run: str, replies: list[Reply], told: dict[str, Any]) -> None:
        if told["changes"]:
            self._note(f"The server of {run}: {'; '.join(told['changes'])}.")
        if told["refused"]:
            whys = ", ".join(f"{count} {why}" for why, count in told["refused"].items())
            self._note(
                f"The server of {run} gave no answer to {sum(told['refused'].values())} of {len(replies)} prompts "
                f"({whys}). They are not judged. --retry_refused asks again."
            )
        unfinished = sum(not reply.text.strip() and bool(reply.reasoning) for reply in replies)
        if unfinished:
            self._note(
                f"{unfinished} of {len(replies)} answers of {run} contain only reasoning, which is not judged, so they "
                "count as empty. Raise --max_new_tokens."
            )

    def _compare_answers(self, model: dict[str, Any]) -> None:
        """Add answers before and after training to the facts of a model, if both exist."""
        base = self._before(model["source"])
        named = {source: run for run, (_, source) in zip(self.names, self.args.model, strict=True)}
        before = self.replies.get(named.get(base or "", base or ""))
        after = self.replies.get(model["name"])
        if before is None or after is None or before is after:
            return
        questions = [question for question in self.questions if question.row in after and question.row in before]
        if not questions:
            return
        found = changed(
            [question.prompt for question in questions],
            [before[question.row] for question in questions],
            [after[question.row] for question in questions],
            [question.chosen for question in questions],
            self.args.examples,
        )
        model["changed"] = {"base": named.get(base or "") or self.bases[str(base)]["name"], **found}

    def _likelihoods(self, run: str, source: str, model: Any, processing_class: Any, rows: Dataset) -> dict[str, Any]:
        args, held_out = self.args, self.held_out
        cut = {"max_length": self.how.max_length, "truncation_mode": self.how.truncation_mode}
        collate = collator_for(processing_class, **cut)
        raw = np.asarray(rows["row"][:])
        prompt, label = held_out.prompt[raw], held_out.label[raw]
        mask, continuous = held_out.sft_mask[raw], held_out.continuous[raw]
        has_log_z = "log_z" in rows.column_names
        scale = None
        saved = saved_settings(source)
        identity = None if saved is None else saved.reference
        names_reference = identity is not None and (identity.name or identity.kind == "none")
        if args.ref_model is None and adapter_base(source) is None and not names_reference:
            self._note(f"{run} has no implicit rewards, because its reference is not known. Name it with --ref_model.")
        elif args.ref_model is None and identity is not None and identity.kind == "none":
            self._note(
                f"{run} has no implicit rewards, because it was trained without a reference. Name one with --ref_model."
            )
        else:  # before the scoring, because an error should not come after it
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
        self._note_any(batching_note(source, saved, model, scale.beta, off))
        ref_logps = self._reference(
            run, source, model, tokenizer_of(processing_class), rows, collate, scale.beta, int(tokens.max(initial=1))
        )
        log_z = np.asarray(rows["log_z"][:]) if has_log_z else scale.log_z
        per = tokens.clip(min=1) if scale.length_normalize else 1
        rewards = implicit_reward(logps / per, ref_logps / per, scale.beta, log_z)
        facts["reward"] = {"beta": scale.beta, "length_normalize": scale.length_normalize}
        facts |= self._of_rewards(rewards, raw)
        self._write_rewards(run, raw, held_out.own_label[raw], rewards)
        facts["surprises"] = surprises(
            rewards, label, held_out.own_label[raw], continuous, self.how.rules, held_out.rows, raw, held_out.places
        )
        base = self._before(source)
        if args.base and base is not None and base not in self.bases and base not in dict(self.args.model).values():
            # The base gives all answers the reward 0
            self.bases[base] = {
                "name": self._base_name(base, run),
                "source": base,
                "is_base": True,
                "rows": len(rows),
                "perplexity": self._perplexity(ref_logps, tokens, prompt, mask),
                **self._of_rewards(np.zeros(len(rows)), raw),
                "judged": {},
            }
        return facts

    def _note_seen(self, run: str, source: str, numbers: np.ndarray) -> int | None:
        """Note how many of these rows a model was trained on. Returns the number, or None if it is not known."""
        prompts = self.held_out.rows["prompt"][:]
        found = seen_prompts.seen([prompts[row] for row in numbers], saved_file(source, seen_prompts.FILE))
        message = seen_prompts.in_words(found, run)
        if message is not None:
            trained_on = int((found == seen_prompts.SEEN).sum())
            new = " Figures on rows that it was trained on do not show what it does on new ones." if trained_on else ""
            self._note(message + new)
            return trained_on if trained_on or (found == seen_prompts.NEW).all() else None
        if saved_settings(source) is not None and self.split == "train" and _MAYBE_SEEN not in self.notes:
            self._note(_MAYBE_SEEN)
        if saved_settings(source) is not None and self.split not in ("train", "test") and self.args.split is None:
            self._note(_MAYBE_HELD_OUT.format(run))
        return None

    def _note_training(self, run: str, saved: SavedSettings | None, has_log_z: bool) -> None:
        """Note if the scale of the rewards is unknown or another one in training."""
        args = self.args
        if has_log_z and saved is not None and isinstance(saved.log_z, str) and saved.log_z != "column":
            self._note(
                f"{run} has its own log Z ({saved.log_z}), but the column log_z of the rows is used. Remove the column "
                "to get the rewards of the training."
            )
        unknown = [f"--{name}" for name in ("beta", "log_z") if getattr(args, name) is None]
        if saved is None and unknown:
            self._note(
                f"{run} has no {SETTINGS_FILE}, so the scale of its rewards is unknown. They are computed with "
                f"β = {args.beta or BETA:g} and log Z = {args.log_z or 0:g}. Set {' and '.join(unknown)} as in "
                "training."
            )

    def _write_rewards(self, run: str, rows: np.ndarray, label: np.ndarray, rewards: np.ndarray) -> None:
        """Write the reward of each row."""
        path = self._file("rewards", run)
        path.parent.mkdir(exist_ok=True)
        places = self.held_out.places
        columns = sorted(zip(rows.tolist(), label.tolist(), rewards.tolist(), strict=True))
        found = [
            {"row": row, "file_line": places[row], "label": label, "reward": reward} for row, label, reward in columns
        ]
        lines = [json.dumps({name: value for name, value in each.items() if value is not None}) for each in found]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def _file(self, folder: str, run: str) -> Path:
        """The file for the rows of a run, in a folder of the report."""
        return self.args.output / folder / _file_name(run)

    def _base_name(self, base: str, run: str) -> str:
        return f"{run} before training" if base.endswith("/ref") else f"{base.rstrip('/').split('/')[-1]} (base)"

    def _perplexity(
        self, logps: np.ndarray, tokens: np.ndarray, prompt: np.ndarray, mask: np.ndarray
    ) -> dict[str, Any]:
        return {
            name: perplexity(logps[which], tokens[which], prompt[which], seed=self.args.seed)
            for name, which in (("demonstrations", mask), ("other answers", ~mask))
            if which.any()
        }

    def _of_rewards(self, rewards: np.ndarray, raw: np.ndarray) -> dict[str, Any]:
        """Figures of rewards, also on the scale of the labels if it is not 0 and 1.

        Args:
            rewards: `(N,)`.
            raw: `(N,)` numbers of the rows.
        """
        seed, rules, held_out = self.args.seed, self.how.rules, self.held_out
        label, continuous, prompt = held_out.label[raw], held_out.continuous[raw], held_out.prompt[raw]
        found: dict[str, Any] = {
            "implicit_reward": {
                name: estimate
                for which, of in ((~continuous, binary_figures), (continuous, continuous_figures))
                if which.any()
                for name, estimate in of(rewards[which], label[which], prompt[which], seed=seed).items()
            }
        }
        found["split"] = split_figures(rewards, label, continuous, prompt, self.center, seed=seed)
        if not continuous.all():
            found["calibration"] = calibration_curve(expit(rewards[~continuous]), label[~continuous])
        own = continuous == (rules.label_type == "continuous")
        if own.any() and (rules.label_type == "continuous" or rules.transform is not None):
            which = (rewards[own], held_out.own_label[raw][own], continuous[own], prompt[own])
            found["own_scale"] = on_own_scale(*which, rules, seed=seed)
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
        options = {"dtype": args.dtype, **self.loading}
        how = (str(model.dtype), saved and (saved.mixed_precision, saved.reference and saved.reference.dtype))
        seen = rows["image_key"][:] if "image_key" in rows.column_names else None
        key = digest(rows["prompt_ids"][:], rows["completion_ids"][:], seen, str(how))
        if args.ref_model is not None and key in self._ref_logps:
            self._note_any(differs_from_training(model, None, source, saved, longest, beta))
            return self._ref_logps[key]
        if args.ref_model is not None:
            check_same_tokens(tokenizer, load_tokenizer(args.ref_model, **self.loading), rows, run, args.ref_model)
        reference = load_reference(model, source, saved, args.ref_model, **options)
        self._note_any(differs_from_training(model, reference, source, saved, longest, beta))
        with training_autocast(saved, model):
            logps = completion_logps(reference.model or model, rows, collate, reference=reference, **scoring)[0]
        if args.ref_model is not None:
            self._ref_logps[key] = logps
        del reference
        _free()
        return logps


def run_names(names: list[str]) -> list[str]:
    """A name for each run. If several runs have the same name, they are numbered.

    Example:
        >>> run_names(["ulma", "sft", "ulma"])
        ['ulma (1)', 'sft', 'ulma (2)']
    """
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name} ({seen[name]})" if names.count(name) > 1 else name)
    return found


def _free() -> None:
    """Free the memory of deleted models."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
