r"""Dry run: shows what a training would do, without loading a model.

    trl-ulma check --model Qwen/Qwen3-0.6B --dataset feedback.jsonl
    trl-ulma check --method pointwise-dpo --config run.yaml --use_peft --num_processes 8

The command accepts all options of the training command that `--method` names. Without it, the command suggests a method
and settings for the rows. It reads and checks all rows, and lists those that are invalid. If none is, it prints the
label report, a few rows as the model will see them, the number of steps, the memory needed, and the command that
trains. It trains nothing and writes nothing.
"""

import functools
import itertools
import logging
import math
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from trl_ulma.scripts.command_line import CommandParser, as_options, attempt, held_back, in_lines, is_verbose, show
from trl_ulma.scripts.needed_options import needed
from trl_ulma.scripts.suggestions import Suggestion, in_words, may_suggest, suggest

if TYPE_CHECKING:
    from rich.text import Text

PROG = "trl-ulma check"
# The default of transformers, without --output
DEFAULT_OUTPUT = "trainer_output"
METHODS = {"ulma": "ULMATrainer", "pointwise-dpo": "PointwiseDPOTrainer"}
HELP = {"-h", "--help", "--help-all", "--help_all"}
# The most characters of a prompt and a completion that are shown, with --verbose and without
CHARACTERS_SHOWN, FEW_CHARACTERS = 1_000, 400


def make_parser(method: str = "ulma") -> Any:
    """The parser: the options of the training command, and --method."""
    parser = import_module(f"trl_ulma.scripts.{method.replace('-', '_')}").make_parser(prog=PROG)
    parser.description = "Dry run: check the rows and the settings, and show what would be trained."
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="the training command whose options are checked (default: suggested for the rows, with other settings; "
        "ulma with --config)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check. Returns the exit code: 2 for invalid options, 1 for invalid rows or settings."""
    given = list(sys.argv[1:] if argv is None else argv)
    suggested: list[Suggestion] = []
    if may_suggest(given) and HELP.isdisjoint(given):
        others = needed(given)
        words = [*given, *_words_of(others)]
        make_parser().parse_for_launch(list(words))  # wrong options are told before the data is read
        code = attempt(CommandParser(prog=PROG), lambda: suggested.extend(suggest(words)))
        if code:
            return code
        suggested += others
    introduce = functools.cache(lambda: print(f"{in_words(suggested)}\n", flush=True) if suggested else None)
    try:
        return _run(given, suggested, introduce)
    except SystemExit:  # a wrong option, which can be a suggested one
        introduce()
        raise


def _words_of(suggested: Sequence[Suggestion]) -> list[str]:
    return [word for each in suggested for word in each.options]


def _run(given: Sequence[str], suggested: Sequence[Suggestion], introduce: Callable[[], None]) -> int:
    """Check with the options that are given and those that are suggested. See `main` for the exit code.

    `introduce` prints the suggested options, once.
    """
    words = [*given, *_words_of(suggested)]
    chooser = CommandParser(prog=PROG, add_help=False)
    chooser.add_argument("--method", choices=METHODS, default="ulma")
    chosen, words = chooser.parse_known_args(words)
    parser = make_parser(chosen.method)
    if not {"-h", "--help"}.isdisjoint(words):
        parser.print_help()
        return 0
    if {"--help-all", "--help_all"}.intersection(words):
        print(parser.format_help())
        return 0
    script: Any = import_module(f"trl_ulma.scripts.{chosen.method.replace('-', '_')}")
    parser = script.make_parser(prog=PROG)
    launcher = CommandParser(prog=PROG, add_help=False)
    launcher.add_argument("--num_processes", type=int, default=1)
    launch_options, script_words = parser.parse_for_launch(list(words))
    processes = launcher.parse_known_args(launch_options)[0].num_processes
    settings = parser.parse_settings(script_words)
    training_args = settings[1]
    following = following_command(chosen.method, words, has_output=training_args.output_dir != DEFAULT_OUTPUT)
    chooser = CommandParser(prog=PROG, add_help=False)
    chooser.add_argument("--invalid_rows", "--invalid-rows")
    # It suggests the same settings again
    others = chooser.parse_known_args(given if suggested else ["--method", chosen.method, *words])[1]
    again = in_lines(["trl-ulma", "check", *others, "--invalid_rows", "drop"])

    def run() -> None:
        from trl_ulma.labels import InvalidRows

        try:
            check(METHODS[chosen.method], following, again, introduce, processes, parser, *settings)
        except InvalidRows:  # which are corrected first
            raise
        except Exception:  # can be about a suggested setting
            introduce()
            raise

    with tempfile.TemporaryDirectory() as folder:
        training_args.output_dir = folder
        return attempt(parser, run)


def following_command(method: str, words: Sequence[str], *, has_output: bool) -> str:
    """The training command with the options that were checked.

    Example:
        >>> following_command("ulma", ["--model", "m", "--dataset", "my rows.csv"], has_output=False)
        "trl-ulma ulma --model m --dataset 'my rows.csv' --output out"
    """
    return in_lines(["trl-ulma", method, *words, *([] if has_output else ["--output", "out"])])


def check(
    trainer: str,
    following: str,
    again: str,
    introduce: Callable[[], None],
    processes: int,
    parser: Any,
    script_args: Any,
    training_args: Any,
    model_args: Any,
    dataset_args: Any,
) -> None:
    """Print what is known before a model is loaded.

    Args:
        trainer: the name of the trainer's class.
        following: the command that trains.
        again: this command, leaving out invalid rows.
        introduce: prints the suggested settings. It is not called if there are invalid rows to correct first.
        processes: the number of processes.
        parser: the parser of the command.
        script_args, training_args, model_args, dataset_args: the results of the parser.

    Raises:
        ValueError: if rows or settings are invalid.
    """
    from rich.console import Console
    from rich.padding import Padding
    from trl import get_peft_config

    import trl_ulma
    from trl_ulma.labels import InvalidRows, render_repeats, render_report
    from trl_ulma.rows.dataset_labels import repeats_of, report_labels, shown_by
    from trl_ulma.rows.dropped import COLLECTED
    from trl_ulma.scripts.training import check_model, load_splits, loading, no_bars_in_files, small_learning_rate

    no_bars_in_files()
    console = Console(highlight=False, soft_wrap=True)
    train_dataset, eval_dataset, said = load_splits(script_args, training_args, dataset_args)
    training_args.model_init_kwargs = loading(training_args, model_args)
    check_model(model_args.model_name_or_path, training_args.model_init_kwargs)
    peft_config = get_peft_config(model_args)
    invalid: list[InvalidRows] = []
    notices: list[logging.LogRecord] = []
    token = COLLECTED.set(invalid)
    try:
        # Notices about how the rows are read come after the suggested settings, and not if rows have to be corrected
        with held_back(notices), shown_by(None if is_verbose() else PROG):
            start = getattr(trl_ulma, trainer).dry_run(
                model_args.model_name_or_path, training_args, train_dataset, eval_dataset, peft_config=peft_config
            )
    except Exception as problem:
        if isinstance(problem, InvalidRows):
            invalid.append(problem)
        if invalid and isinstance(problem, ValueError):
            raise InvalidRows.joined(invalid) from problem
        introduce()
        show(notices)
        raise
    finally:
        COLLECTED.reset(token)
    rows = start.train_dataset
    outliers: list[str] = []
    if hasattr(rows, "__len__"):
        report = report_labels(rows, training_args, start.raw_labels, start.rules.transform, start.raw_rows)
        outliers = report["outliers"]
        report["warnings"] = [warning for warning in report["warnings"] if warning not in outliers]
        text = render_report(
            report,
            in_detail=is_verbose(),
            spelling=lambda said: as_options(said, parser._option_string_actions),
        )
    else:
        text = "The rows are a stream. They are checked as they are read, and have no label report."
    if invalid:  # what the others are like is shown by the next check
        for said in outliers:
            console.print(f"\n{_ODD}{said} --invalid_rows drop keeps them.", markup=False)
        console.print()
        sys.stdout.flush()  # before the list of invalid rows, which goes to stderr
        raise InvalidRows.joined(invalid).with_command(again)
    introduce()
    sys.stdout.flush()
    show(notices)
    if said:
        console.print(said, markup=False)
    console.print(f"\n{text}", markup=False)
    if hasattr(start.eval_dataset, "__len__"):
        found = repeats_of(start.eval_dataset, training_args, eval_dataset)
        if found["repeated"] or found["contradicting"]:
            console.print("\n" + render_repeats(found, "eval", len(start.eval_dataset)), markup=False)
    legend = _LEGEND[console.is_terminal]
    console.print(f"\nRows as the model sees them. The rated answer is {legend}:", markup=False)
    for title, text in rows_shown(start, training_args, in_color=console.is_terminal):
        console.print(f"\n{title}", markup=False)
        console.print(Padding(text, (0, 2)), soft_wrap=False)
    console.print("\n" + steps_in_words(start, training_args, processes), markup=False)
    console.print("\n" + memory_in_words(start, training_args, model_args, peft_config), markup=False)
    if note := small_learning_rate(training_args, model_args):
        console.print("\n" + note, markup=False)
    for said in outliers:  # at the end, where they are not overlooked
        console.print(f"\n{_ODD}{said}", markup=False)
    print("\nReady. To train:\n\n" + textwrap.indent(following, "    "))


_ODD = "Look at this before you train: "
_LEGEND = {True: "in color", False: "between ⟦ and ⟧"}


def rows_shown(start: Any, args: Any, *, in_color: bool) -> Iterator[tuple[str, "Text"]]:
    """Yield (title, text) of the first row of each kind. Kinds are rows that the loss treats in different ways, such as
    demonstrations; with --verbose also good and bad answers. Up to three.
    """
    import torch
    from rich.text import Text

    from trl_ulma.data.origins import origin
    from trl_ulma.losses import route
    from trl_ulma.rows.rendering import tokenizer_of

    tokenizer = tokenizer_of(start.processing_class)
    seen = set()
    for i, row in enumerate(itertools.islice(start.train_dataset, 2_000)):
        label, mask = torch.tensor([row["label"]]), torch.tensor([bool(row["sft_mask"])])
        continuous = torch.tensor([row.get("label_type", args.label_type) == "continuous"])
        positive, negative = args.cell
        terms = route(label, mask, continuous, positive_loss=positive, negative_loss=negative)
        what = [name for name in ("imitated", "unlearned", "compared") if getattr(terms, name).item()]
        named = (
            ""
            if what == ["compared"] and positive == negative
            else f", {' and '.join(what) or 'in no term of the loss'}"
        )
        kind = (*what, is_verbose() and row["label"] >= 0.5)
        if kind in seen:
            continue
        seen.add(kind)
        prompt, completion = row["prompt_ids"], row["completion_ids"]
        weight = f", weight {row['weight']:g}" if "weight" in row else ""
        length = len(prompt) + len(completion)
        cut = f", cut to {args.max_length}" if args.max_length and length > args.max_length else ""
        learned = f"{row['label']:g}"
        if start.raw_labels is not None and math.isfinite(start.raw_labels[i]):
            learned = f"{start.raw_labels[i]:g} → {row['label']:+.2f}"
        place = origin(start.raw_rows, row["row"]) or f"Row {row['row']}"
        title = (
            f"{place}: label {learned}{weight}{named}; prompt of {len(prompt)} and completion of {len(completion)} "
            f"tokens{cut}"
        )
        left, right = ("", "") if in_color else ("⟦", "⟧")
        style = "bold green" if "imitated" in what or row["label"] >= 0.5 else "bold red"
        begin = str(tokenizer.decode(prompt))
        room = CHARACTERS_SHOWN if is_verbose() else FEW_CHARACTERS
        parts = [("…" + begin[-room:] if len(begin) > room else begin, "dim")]
        # A completion of several turns is scored in parts
        mask = row.get("completion_mask") or [1] * len(completion)
        for is_scored, run in itertools.groupby(zip(completion, mask, strict=True), lambda token: token[1]):
            text = str(tokenizer.decode([token for token, _ in run]))
            shown = text if len(text) <= room else text[:room] + "…"
            parts.append((f"{left}{shown}{right}", style) if is_scored else (shown, "dim"))
            room -= len(shown)
            if room <= 0:
                break
        yield title, Text.assemble(*parts)
        if len(seen) == 3:
            return


def steps_in_words(start: Any, args: Any, processes: int) -> str:
    """A sentence on the number of steps, the rows per step, and when evaluations and checkpoints happen."""
    from trl_ulma.labels.report import counted

    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    rows = start.train_dataset
    steps = args.max_steps
    parts = [f"{counted(args.per_device_train_batch_size, 'row')} per micro-batch"]
    if args.gradient_accumulation_steps > 1:
        parts.append(f"{args.gradient_accumulation_steps} micro-batches")
    if processes > 1:
        parts.append(f"{processes} processes")
    said = f"Each step takes {counted(batch, 'row')}" + (f": {' × '.join(parts)}. " if len(parts) > 1 else ". ")
    if hasattr(rows, "__len__"):
        micro = len(rows) / (args.per_device_train_batch_size * processes)
        micro = math.floor(micro) if args.dataloader_drop_last else math.ceil(micro)
        an_epoch = max(math.ceil(micro / args.gradient_accumulation_steps), 1)
        if steps <= 0:
            steps = math.ceil(an_epoch * args.num_train_epochs)
        said += f"{counted(len(rows), 'row')} make {counted(an_epoch, 'step')} per epoch; "
    said += f"{counted(steps, 'step')} in total"
    if args.max_steps <= 0:
        said += f" ({counted(args.num_train_epochs, 'epoch')})"
    warmup = args.get_warmup_steps(steps)
    said += f", including {counted(warmup, 'warmup step')}." if warmup else "."
    for what, strategy, every in (
        ("Evaluation", args.eval_strategy, args.eval_steps),
        ("A checkpoint", args.save_strategy, args.save_steps),
    ):
        if strategy == "steps":
            every = max(math.ceil(every * steps), 1) if every < 1 else int(every)
            if every > steps:
                continue
            said += f" {what} every {counted(every, 'step')}." if every > 1 else f" {what} after each step."
        elif strategy == "epoch":
            said += f" {what} after each epoch."
    return said


def memory_in_words(start: Any, args: Any, model_args: Any, peft_config: Any) -> str:
    """A sentence on the estimated memory and the memory of this machine."""
    import torch

    from trl_ulma.labels.report import counted
    from trl_ulma.scripts.memory import estimate_memory

    model = empty_model(model_args, args)
    if peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config, low_cpu_mem_usage=True)
    longest = args.max_length or 0
    if hasattr(start.train_dataset, "__len__"):
        longest = max(start.train_dataset["length"][:])
        longest = min(longest, args.max_length or longest)
    found = estimate_memory(
        model,
        tokens=longest * args.per_device_train_batch_size,
        optimizer=str(getattr(args.optim, "value", args.optim)),
        has_reference=start.needs_reference and peft_config is None and not args.precompute_ref_log_probs,
        gradient_checkpointing=args.gradient_checkpointing,
        autocast=bool(args.bf16 or args.fp16),
        bits=4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else None,
    )
    total = sum(found.values())
    if torch.cuda.is_available():
        there, where = torch.cuda.get_device_properties(0).total_memory, f"A {torch.cuda.get_device_name(0)}"
    else:
        import psutil

        there, where = psutil.virtual_memory().total, "This machine"
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in found.items() if size)
    fits = total < 0.9 * there
    said = (
        f"The longest row has {counted(longest, 'token')}. Training needs about {_gib(total)} of memory on each device"
    )
    said += f"{'' if fits and not is_verbose() else f': {parts}'}. {where} has {_gib(there)}."
    return said if fits else f"{said} That does not fit: try --use_peft, also with --load_in_4bit, or a smaller batch."


def empty_model(model_args: Any, args: Any) -> Any:
    """The model without weights, created from its configuration."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=args.trust_remote_code,
    )
    named = getattr(transformers, (config.architectures or [""])[0], None)
    dtype = getattr(torch, model_args.dtype or "", None) or config.dtype or torch.float32
    with torch.device("meta"):
        if named is not None:
            return named._from_config(config, dtype=dtype)
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=args.trust_remote_code
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


if __name__ == "__main__":
    raise SystemExit(main())
