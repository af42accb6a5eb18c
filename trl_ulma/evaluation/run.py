"""Runs an evaluation: reads the rows, evaluates one model after the other, and writes the report."""

import gc
import os
import re
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from trl_ulma.data import seen_prompts
from trl_ulma.data.sheet_rows import named_rows, with_sheet_row
from trl_ulma.evaluation import report
from trl_ulma.evaluation.before import model_before, revision_before
from trl_ulma.evaluation.findings import changed, without_part_of_word
from trl_ulma.evaluation.generation import Generator, Sampling, ServerGenerator, TransformersGenerator, generate
from trl_ulma.evaluation.held_out import Question, invalid_in_words
from trl_ulma.evaluation.judges import Judge, ProfanityJudge, RewardModelJudge
from trl_ulma.evaluation.judging import Judging
from trl_ulma.evaluation.likelihoods import Likelihoods
from trl_ulma.evaluation.llm_judge import LLMJudge
from trl_ulma.evaluation.model_names import other_models
from trl_ulma.evaluation.pictures import accuracy_in_training, pictures, training_log
from trl_ulma.evaluation.reading import read
from trl_ulma.evaluation.report_seeds import over_runs
from trl_ulma.evaluation.server import Budget, Reply, Server
from trl_ulma.judge import saved_file
from trl_ulma.labels.report import counted
from trl_ulma.rows.dataset_labels import SHOWN_BY
from trl_ulma.rows.images import has_images
from trl_ulma.rows.notes import left_out_of
from trl_ulma.rows.preparation import Preparation
from trl_ulma.rows.rendering import OF_TEMPLATES, tokenizer_of
from trl_ulma.saved import (
    adapter_base,
    as_reference,
    check_source,
    load_model,
    load_processing_class,
    positions,
    saved_settings,
)

logger = logging.get_logger(__name__)

SERVED = "served:"
_ENOUGH_JUDGED = 200  # prompts
# Length limit in tokens of answers, and of the few that are shown if no others are generated
ANSWER_TOKENS, EXAMPLE_TOKENS = 256, 128
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


def run(
    args: Namespace, *, command: str | None = None, data_note: str | None = None, is_as_in_training: bool = False
) -> dict[str, Any]:
    """Evaluate, write the report, and return the contents of `report.json`.

    Args:
        args: the options of `trl_ulma.scripts.evaluate`, with `model` as (name, source) and `judge` as (kind, name).
        command: the command that makes the report again.
        data_note: says which options of the data are those of the training.
        is_as_in_training: whether all of them are.

    Raises:
        ValueError, OSError, ServerError: if rows, models or servers cannot be used.
    """
    return _Run(args, command, data_note, is_as_in_training)()


def _file_name(run: str) -> str:
    return re.sub(r"[^\w.-]+", "_", run) + ".jsonl"


class _Run:
    def __init__(self, args: Namespace, command: str | None, data_note: str | None, is_as_in_training: bool):
        self.args, self.command, self.is_as_in_training = args, command, is_as_in_training
        self.notes: list[str] = []
        # How the rows are read, which needs no action
        self.how_read: list[str] = [] if data_note is None else [data_note]
        self.loading = {"trust_remote_code": args.trust_remote_code}
        self.sampling = Sampling(args.max_new_tokens or ANSWER_TOKENS, args.temperature, args.top_p, args.seed)
        self.names = run_names([name for name, _ in args.model])
        files = [_file_name(name).casefold() for name in self.names]
        if alike := [name for name, file in zip(self.names, files, strict=True) if files.count(file) > 1]:
            raise ValueError(
                f"--model names the runs {', '.join(map(repr, alike))}, whose files would have the same name, "
                "at least on file systems that ignore case. Give them names that differ in letters, digits, dots or "
                "dashes."
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
        trained = [source for _, source in args.model if source not in self.servers]
        try:
            self.reading = read(args, trained, self._note, self.how_read.append, answers=self.answers_all)
        except (OSError, TypeError, ValueError):
            self._print_how_read()  # because an error can come from it
            raise
        self.is_usual = self._tell_reading(trained)
        self.questions = self._questions() if self.answers_all else self._examples()
        self.likelihoods = Likelihoods(args, self.reading, self._note, partial(self._file, "rewards"))
        # Answers by the name of the run; of a model before training, by its own name or folder. They are as the report
        # shows them: with "…" if the limit of tokens ended them
        self.replies: dict[str, dict[int, str | None]] = {}

    def __call__(self) -> dict[str, Any]:
        args, reading = self.args, self.reading
        held_out, rules = reading.held_out, reading.how.rules
        # First, because an error of a judge should not come after all answers have been generated
        if self.answers_all:
            self._announce()
            self.judging.agree(self.questions)
        models = [self._model(run, source) for run, (_, source) in zip(self.names, args.model, strict=True)]
        for model in models:
            self._compare_answers(model)
        if len({model["tokens"] for model in models if "tokens" in model}) > 1:
            self._note(
                "The models have different tokenizers, or left out different rows, so their perplexities cannot be "
                "compared."
            )
        models += self.likelihoods.befores.values()
        drawings, not_drawn = pictures(models, held_out.own_label, held_out.sft_mask)
        settings = {name: value for name, value in vars(args).items() if value is not None and value != []}
        settings |= asdict(self.sampling) if self.questions else {}
        labels = Counter(held_out.own_label.tolist())
        facts = {
            "settings": settings,
            "command": self.command,
            "versions": report.versions(),
            "commit": report.commit(),
            "data": {
                "dataset": args.dataset,
                "split": reading.split,
                "rows": len(held_out.rows),
                "left_out": dict(held_out.left_out),
                "invalid_rows": [str(error) for error in held_out.invalid[:_LISTED]],
                "label_type": rules.label_type,
                "label_transform": None if rules.transform is None else str(rules.transform),
                "max_length": reading.how.max_length,
                "prompts": len(np.unique(held_out.prompt)),
                "demonstrations": int(held_out.sft_mask.sum()),
                "labels": {f"{label:g}": n for label, n in sorted(labels.most_common(_MOST_LABELS))},
                "label_center": reading.own_center if held_out.continuous.any() else None,
                "is_training_center": reading.how.label_center is not None,
                "is_reversed": reading.is_reversed,
                "questions": len(self.questions) if self.answers_all else 0,
            },
            "models": models,
            "judges": self.judging.facts(),
            "differences": self.judging.differences(),
            "over_seeds": over_runs([name for name, _ in args.model], models[: len(args.model)]),
            "notes": self.notes,
            "how_read": self.how_read,
            "not_drawn": not_drawn,
        }
        self.likelihoods.write()  # with the report, so that both are of the same run
        report.write(args.output, facts, drawings)
        return facts

    # Before any work

    def _check_models(self) -> None:
        """Raise ValueError if a model or the reference cannot be loaded."""
        named = [("--model", source) for _, source in self.args.model if source not in self.servers]
        if self.args.ref_model is not None:
            named.append(("--ref_model", self.args.ref_model))
        for option, source in named:
            check_source(option, source, **self.loading)

    def _questions(self) -> list[Question]:
        found = self.reading.questions(self.args.num_prompts, self.args.seed)
        if not found:
            side = "below" if self.reading.is_reversed else "above"
            raise ValueError(
                "No prompt has a good answer to compare with: a row with sft_mask, with a binary label of ½ and above, "
                f"or with a continuous label of {self.reading.own_center:g} and {side}. Evaluate more rows, or leave "
                "--judge and --generate out."
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
        if not (args.examples and args.base) or has_images(self.reading.held_out.rows):
            return []
        self.sampling = replace(self.sampling, max_new_tokens=args.max_new_tokens or EXAMPLE_TOKENS)
        return self.reading.held_out.questions(args.examples, args.seed, self.reading.center)

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
                name,
                args.criterion[0],
                label=args.judge_label,
                batch_size=args.batch_size,
                dtype="float32" if args.dtype == "auto" else args.dtype,
                **self.loading,
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
            f"{self.sampling.max_new_tokens:,} output tokens each."
            for source in self.servers
        ]
        if told and args.max_requests is not None:
            told.append(f"This run stops asking after {args.max_requests:,} requests (--max_requests).")
        for each in told:
            print(each, file=sys.stderr)

    def _tell_reading(self, trained: list[str]) -> bool:
        """Print how the rows were read. Returns whether one sentence says it, because all is as in training and none of
        the rows was trained on.

        Args:
            trained: the folders of the models, or their names on the Hub.
        """
        held_out, command = self.reading.held_out, SHOWN_BY.get()
        if command is not None and self.is_as_in_training:
            files = [saved_file(each, seen_prompts.FILE) for each in trained]
            prompts = held_out.rows["prompt"][:]
            if all((seen_prompts.seen(prompts, file) == seen_prompts.NEW).all() for file in files):
                left_out = len(held_out.invalid)
                told = f" ({counted(left_out, 'invalid row')} left out)" if left_out else ""
                print(
                    f"{self.args.dataset} is read as in training, and only its "
                    f"{counted(len(prompts), 'held-out row')} {'is' if len(prompts) == 1 else 'are'} evaluated{told}.",
                    file=sys.stderr,
                )
                return True
        self._print_how_read()
        if command is not None and held_out.invalid:
            logger.warning(invalid_in_words(held_out.invalid, len(held_out.rows), self.reading.name, command))
        return False

    def _print_how_read(self) -> None:
        for each in self.how_read:
            print(each, file=sys.stderr)

    def _note(self, text: str | None) -> None:
        if text is not None:
            self.notes.append(text)
            print(text, file=sys.stderr)

    # The models

    def _model(self, run: str, source: str) -> dict[str, Any]:
        facts: dict[str, Any] = {"name": run, "source": source, "perplexity": {}, "implicit_reward": {}, "judged": {}}
        if source in self.servers:
            prompts = [question.prompt for question in self.questions]
            self._note_unsent(run)
            return facts | self._answers(run, ServerGenerator(self.servers[source]), self.questions, prompts)
        args = self.args
        processing_class = load_processing_class(source, **self.loading)
        tokenizer = tokenizer_of(processing_class)
        most = positions(source, **self.loading)
        how = self.reading.how
        prepare = Preparation(
            processing_class,
            replace(how.rules, transform=None),  # the labels are already transformed
            how.max_length,
            how.truncation_mode,
            most,
            invalid_rows=args.invalid_rows,
            assistant_only_loss=how.assistant_only_loss,
            chat=how.chat,
            system_message=how.system_message,
        )
        rows: Any = prepare(self.reading.held_out.rows, self.reading.name)
        missing = np.setdiff1d(np.arange(len(self.reading.held_out.rows)), rows["row"][:])
        facts["left_out"] = len(missing)
        facts["left_out_reasons"] = left_out_of(rows)
        places = self.reading.held_out.places
        first = missing[:_LISTED].tolist()
        facts["left_out_rows"] = named_rows(first, [with_sheet_row(places[row] or "") for row in first])
        facts["trained_on"] = self._note_seen(run, source, np.asarray(rows["row"][:]))
        facts["accuracy_in_training"] = accuracy_in_training(training_log(Path(source)))
        model = load_model(source, dtype=args.dtype, **self.loading)
        print(f"Scoring {len(rows):,} row{'' if len(rows) == 1 else 's'}: {run}.", file=sys.stderr)
        facts |= self.likelihoods(run, source, model, processing_class, rows)
        before, befores = self._before(source), {self._before(each) for _, each in args.model}
        if self.questions and (self.answers_all or before is not None or source in befores):
            questions, prompts = self._answered(run, rows, most)
            facts |= self._answers(run, TransformersGenerator(model, tokenizer, source, most), questions, prompts)
            # The model before training answers once, here or below, whatever is compared with it
            before = before if before in self.likelihoods.befores and before not in self.replies else None
            if before is not None and args.ref_model is None and before in (adapter_base(source), f"{source}/ref"):
                with as_reference(model, source) as reference:
                    self._answers_before(before, reference, tokenizer, most, questions, prompts)
            elif before is not None:
                dtype, revision = str(model.dtype).removeprefix("torch."), revision_before(source, args.ref_model)
                del model
                gc.collect()
                model = load_model(before, dtype=dtype, revision=revision, **self.loading)
                self._answers_before(before, model, tokenizer, most, questions, prompts)
        del model
        gc.collect()
        return facts

    def _note_unsent(self, run: str) -> None:
        """Note what the rows have for the chat template that servers are not sent."""
        rows = self.reading.held_out.rows
        for name in OF_TEMPLATES:
            values = rows[name][:] if name in rows.column_names else []
            count = sum(bool(values[question.row]) for question in self.questions) if len(values) else 0
            if count:
                self._note(
                    f"{count} of {len(self.questions)} prompts have {name}, which are not sent to the server of {run}. "
                    "Its answers are those to the messages alone."
                )

    def _before(self, source: str) -> str | None:
        return None if source in self.servers else model_before(source, self.args.ref_model)

    def _answered(self, run: str, rows: Any, most: int | None) -> tuple[list[Question], list[list[int]]]:
        """The questions that a model answers, and the tokens of their prompts.

        Args:
            run: the name of the model in the report.
            rows: the prepared rows of this model.
            most: its longest sequence in tokens, or None.
        """
        ids = dict(zip(rows["row"][:], rows["prompt_ids"][:], strict=True))
        found = [question for question in self.questions if question.row in ids]
        if not self.answers_all:
            longest = float("inf") if most is None else most - self.sampling.max_new_tokens
            found = [question for question in found if 0 < len(ids[question.row]) <= longest]
        elif len(found) < len(self.questions):
            fewer, called = len(self.questions) - len(found), self._called(run)
            self._note(
                f"{fewer} of the {len(self.questions)} prompts are not answered by {called}, because their rows were "
                "left out for it."
            )
        return found, [ids[question.row] for question in found]

    def _answers_before(
        self, before: str, model: Any, tokenizer: Any, most: int | None, questions: list[Question], prompts: list
    ) -> None:
        facts = self.likelihoods.befores[before]
        generator = TransformersGenerator(model, tokenizer, before, most)
        facts |= self._answers(facts["name"], generator, questions, prompts, key=before)

    def _answers(
        self, run: str, generator: Generator, questions: list[Question], prompts: list, *, key: str | None = None
    ) -> dict[str, Any]:
        args = self.args
        path = self._file("answers", run)
        options = {"batch_size": args.batch_size, "resume": args.resume, "retry_refused": args.retry_refused}
        print(f"Answers to {len(prompts):,} prompt{'' if len(prompts) == 1 else 's'}: {run}.", file=sys.stderr)
        replies = generate(generator, prompts, path, self.sampling, **options)
        told = {
            "prompts": len(replies),
            "cut_at_max_new_tokens": sum(not reply.finished for reply in replies),
            "empty": sum(not reply.text.strip() and reply.refused is None for reply in replies),
            "refused": dict(Counter(reply.refused.value for reply in replies if reply.refused is not None)),
            "changes": sorted({change for reply in replies for change in reply.changes}),
            "answered_by": dict(Counter(reply.answered_by for reply in replies if reply.answered_by)),
        }
        self._note_answers(run, replies, told)
        if isinstance(generator, ServerGenerator):
            # The server has printed it, but not to the report
            asked = generator.server.model
            self.notes += [f"The server of {run}: {each}" for each in other_models(asked, told["answered_by"])]
        answers = [None if reply.refused is not None else reply.text for reply in replies]
        self.replies[key or run] = {
            question.row: text if text is None or reply.finished else without_part_of_word(text)
            for question, text, reply in zip(questions, answers, replies, strict=True)
        }
        return {"answers": told, "judged": self.judging.judge(run, questions, answers)}

    def _note_answers(self, run: str, replies: list[Reply], told: dict[str, Any]) -> None:
        called = self._called(run)
        if told["changes"]:
            self._note(f"The server of {run}: {'; '.join(told['changes'])}.")
        if told["refused"]:
            whys = ", ".join(f"{count} {why}" for why, count in told["refused"].items())
            self._note(
                f"The server of {run} gave no answer to {sum(told['refused'].values())} of {len(replies)} prompts "
                f"({whys}). They are not judged. --retry_refused asks again."
            )
        unfinished = sum(not reply.text.strip() and bool(reply.reasoning) for reply in replies)
        cut, empty = told["cut_at_max_new_tokens"], told["empty"] - unfinished
        if cut and self.answers_all:
            self._note(
                f"{cut} of {len(replies)} answers of {called} were cut at {self.sampling.max_new_tokens} tokens, and "
                "are judged as they are. Raise --max_new_tokens."
            )
        if empty and self.answers_all:
            self._note(f"{empty} of {len(replies)} answers of {called} are empty.")
        if unfinished:
            self._note(
                f"{unfinished} of {len(replies)} answers of {called} contain only reasoning, which is not judged, so "
                "they count as empty. Raise --max_new_tokens."
            )

    def _called(self, run: str) -> str:
        """What notes call a model."""
        return "the model" if self.names == [run] else run

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
        model["changed"] = {"base": named.get(base or "") or self.likelihoods.befores[str(base)]["name"], **found}

    def _note_seen(self, run: str, source: str, numbers: np.ndarray) -> int | None:
        """Tell how many of these rows a model was trained on. Returns the number, or None if it is not known."""
        prompts = self.reading.held_out.rows["prompt"][:]
        found = seen_prompts.seen([prompts[row] for row in numbers], saved_file(source, seen_prompts.FILE))
        message = seen_prompts.in_words(found, run)
        if message is not None:
            trained_on = int((found == seen_prompts.SEEN).sum())
            if (found == seen_prompts.NEW).all():
                self.how_read.append(message)
                if not self.is_usual:
                    print(message, file=sys.stderr)
                return 0
            new = " Figures on rows that it was trained on do not show what it does on new ones." if trained_on else ""
            self._note(message + new)
            return trained_on or None
        if saved_settings(source) is None:
            return None
        if self.reading.split == "train" and _MAYBE_SEEN not in self.notes:
            self._note(_MAYBE_SEEN)
        if self.reading.split not in ("train", "test") and self.args.split is None:
            self._note(_MAYBE_HELD_OUT.format(run))
        return None

    def _file(self, folder: str, run: str) -> Path:
        """The file for the rows of a run, in a folder of the report."""
        return self.args.output / folder / _file_name(run)


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
