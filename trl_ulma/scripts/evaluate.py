r"""Measure how good models are on held-out rows: perplexity, implicit rewards, judged answers, pictures.

    trl-ulma evaluate --model out --dataset feedback.jsonl --output report
    trl-ulma evaluate --model ulma=out/ulma --model sft=out/sft --ref_model base --dataset test.parquet \
        --output report --judge llm:some-model --judge_url http://localhost:8000/v1

The `--output` folder then contains report.html, report.md, report.json, the pictures, the reward of each row
(rewards/), and the answers and verdicts. A second run reads answers and verdicts from there instead of asking again.
Rows with images are taken as in training, but no answers to them are generated.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from trl_ulma.scripts.command_line import (
    CommandParser,
    add_verbose,
    attempt,
    in_lines,
    is_verbose,
    terminal_width,
)
from trl_ulma.scripts.data_options import check_output, fill, is_as_in_training

JUDGES = "llm:MODEL, reward:CHECKPOINT or profanity"
# Options that read labels or sequences in another way than training
_LABELS = ("label_type", "label_transform", "sft_threshold", "max_length", "truncation_mode")
_KEY = "(default: OPENAI_API_KEY; none if the URL is given)"


def make_parser(prog: str = "trl-ulma evaluate") -> argparse.ArgumentParser:
    """The command's options."""
    parser = CommandParser(
        prog=prog,
        usage=f"{prog} --model [NAME=]MODEL --dataset DATA --output FOLDER [options]",
        description="Measure perplexity and implicit rewards on held-out rows, compare the rewards with what length "
        "alone would rank, and judge generated answers.",
    )
    add_verbose(parser)
    what = parser.add_argument_group("models and data")
    what.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]MODEL",
        help="a checkpoint's or adapter's folder, a name on the Hub, or served:MODEL for one on --server_url (answers "
        "only); give it several times to compare models, with one NAME for runs that differ in their seed",
    )
    what.add_argument(
        "--ref_model",
        help="the model that training started from, for implicit rewards (default for an adapter: its base model)",
    )
    what.add_argument(
        "--dataset", required=True, metavar="DATA", help="rows as for training: a file, a folder, or a name on the Hub"
    )
    what.add_argument("--dataset_config", help="configuration of a dataset that has several")
    what.add_argument(
        "--columns",
        help="names of the columns in your data: prompt=question,completion=response,label=rating (default for this "
        "and the other options of the data: as in training, if it read the same dataset)",
    )
    what.add_argument("--label_map", help="numbers for labels that are words: up=1,down=0")
    what.add_argument(
        "--split",
        help='split to evaluate on (default: "test"; without one, a part of "train", split by prompt: the part that '
        "training held out if it ran with --eval_strategy and the same --test_split_size and seed)",
    )
    what.add_argument(
        "--test_split_size",
        type=_positive(float),
        help="size of that part (default: as in training, else 0.1, or what 30 prompts need, up to 0.3)",
    )
    what.add_argument("--split_seed", type=int, help="seed of that part (default: the training's --seed, else 42)")
    what.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="the folder for the report")

    rows = parser.add_argument_group("labels and scoring")
    rows.add_argument(
        "--label_type",
        choices=("binary", "continuous"),
        help="type of the labels (default: that of training, else binary; pairs are binary)",
    )
    rows.add_argument(
        "--label_transform",
        help='transform of the labels, with its numbers, or "none" (default: the one fitted in training; none '
        "for pairs)",
    )
    rows.add_argument(
        "--sft_threshold",
        type=float,
        help="continuous labels of at least this value, after the transform, are demonstrations (default: as in "
        "training)",
    )
    rows.add_argument(
        "--beta", type=_positive(float), help="β of the implicit reward (default: that of training, else 0.1)"
    )
    rows.add_argument(
        "--log_z", type=float, help="log Z in nats; a column log_z takes precedence (default: that of training, else 0)"
    )
    rows.add_argument(
        "--max_length", type=_positive(int), help="longest sequence in tokens (default: that of training)"
    )
    rows.add_argument(
        "--truncation_mode",
        choices=("keep_start", "keep_end"),
        help="which end is kept of longer ones (default: that of training)",
    )
    rows.add_argument(
        "--invalid_rows",
        choices=("error", "drop"),
        help="list the rows that cannot be read and stop, or leave them out (default: as in training, else error)",
    )
    rows.add_argument("--batch_size", type=_positive(int), default=8, help="rows at once (default: 8)")
    rows.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="number format of the weights, also of a reward:CHECKPOINT judge (default: that of training; float32 if "
        "it is not known, and of judges)",
    )
    rows.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")
    rows.add_argument("--seed", type=int, default=0, help="random seed of prompts, answers and intervals (default: 0)")

    answers = parser.add_argument_group("answers")
    answers.add_argument("--generate", action="store_true", help="generate answers even if there is no judge")
    answers.add_argument(
        "--examples",
        type=_count,
        default=3,
        help="answers before and after training to show, even without --generate (default: 3)",
    )
    answers.add_argument(
        "--base",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also evaluate the model that training started from, and its answers (default: yes)",
    )
    answers.add_argument(
        "--num_prompts", type=_positive(int), default=200, help="the most prompts to answer (default: 200)"
    )
    answers.add_argument(
        "--max_new_tokens",
        type=_positive(int),
        help="longest answer (default: 256, or 128 if only --examples are generated)",
    )
    answers.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="sampling temperature (default: 0, the likeliest token each time)",
    )
    answers.add_argument("--top_p", type=float, default=1.0, help="nucleus sampling (default: 1)")
    answers.add_argument(
        "--server_url", help="OpenAI-compatible server of served:MODEL models (default: OPENAI_BASE_URL)"
    )
    answers.add_argument("--server_key_variable", help=f"environment variable with that server's key {_KEY}")

    judges = parser.add_argument_group("judges")
    judges.add_argument(
        "--judge",
        action="append",
        default=[],
        type=_judge,
        metavar="JUDGE",
        help=f"{JUDGES}; may be given several times",
    )
    judges.add_argument(
        "--criterion",
        action="append",
        choices=("helpful", "harmless"),
        help="what is judged; may be given several times (default: all that a judge knows)",
    )
    judges.add_argument("--judge_url", help="OpenAI-compatible server of llm:MODEL judges (default: OPENAI_BASE_URL)")
    judges.add_argument("--key_variable", help=f"environment variable with that server's key {_KEY}")
    judges.add_argument("--judge_label", help="label of good answers, if a reward:CHECKPOINT has several labels")
    judges.add_argument(
        "--judge_cache", type=Path, help="file of verdicts, to share between runs (default: in --output)"
    )
    judges.add_argument("--judge_max_tokens", type=_positive(int), default=16, help="longest verdict (default: 16)")
    judges.add_argument(
        "--judge_temperature",
        type=_number_or_none,
        default=0.0,
        help='temperature of judges; "none" leaves it to the server (default: 0)',
    )

    servers = parser.add_argument_group("servers")
    servers.add_argument(
        "--timeout", type=_positive(float), default=60.0, help="seconds to wait for an answer (default: 60)"
    )
    servers.add_argument("--retries", type=_count, default=5, help="tries after the first (default: 5)")
    servers.add_argument("--concurrency", type=_positive(int), default=8, help="requests at once (default: 8)")
    servers.add_argument(
        "--max_requests",
        type=_positive(int),
        help="limit on the requests of this run to all servers together (default: none); comparisons beyond it count "
        "as not judged, and the next run asks for them",
    )
    servers.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reuse the answers and verdicts of earlier runs with this --output (default: yes)",
    )
    servers.add_argument("--retry_refused", action="store_true", help="ask again what servers refused in earlier runs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation, and return its exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    command = in_lines(_words(parser, args))
    args.model = _named(args.model)
    sources = [source for _, source in args.model]
    if len({_whole_path(source) for source in sources}) < len(sources):
        parser.error("a --model is given twice; each run needs a folder of its own.")
    if len(set(args.judge)) < len(args.judge):
        parser.error("a --judge is given twice.")
    kinds = {kind for kind, _ in args.judge}
    served = [source for source in sources if source.startswith("served:")]
    is_judged = bool(args.judge or args.generate or served)
    for what, is_there, options in (
        ("a judge", bool(kinds), ("criterion",)),
        ("a reward:CHECKPOINT judge", "reward" in kinds, ("judge_label",)),
        (
            "an llm:MODEL judge",
            "llm" in kinds,
            ("judge_url", "key_variable", "judge_cache", "judge_max_tokens", "judge_temperature"),
        ),
        ("a served:MODEL model", bool(served), ("server_url", "server_key_variable")),
        (
            "an llm:MODEL judge or a served:MODEL model",
            "llm" in kinds or bool(served),
            ("timeout", "retries", "concurrency", "max_requests", "retry_refused"),
        ),
        ("a judge, --generate or a served:MODEL model", is_judged, ("num_prompts",)),
        (
            "a judge, --generate, or --examples with --base",
            is_judged or (args.examples > 0 and args.base),
            ("max_new_tokens", "temperature"),
        ),
        ("--base", args.base or not args.examples or (is_judged and len(sources) > 1), ("examples",)),
        ("--temperature above 0", args.temperature > 0, ("top_p",)),
        (
            "a model that is not served",
            len(served) < len(sources),
            ("ref_model", "beta", "log_z", "max_length", "truncation_mode"),
        ),
        (
            "a model that is not served, or a reward:CHECKPOINT judge",
            len(served) < len(sources) or "reward" in kinds,
            ("dtype",),
        ),
    ):
        for option in options:
            if not is_there and getattr(args, option) != parser.get_default(option):
                parser.error(f"--{option} needs {what}, which is not given. Leave it out.")
    if any(kind == "reward" for kind, _ in args.judge) and len(args.criterion or ()) != 1:
        parser.error("a reward model has one criterion, which its authors say: give --criterion once.")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when torch is loaded

    def evaluate() -> None:
        check_output(args.output, args.dataset)
        from trl_ulma.evaluation.report import in_terminal
        from trl_ulma.evaluation.run import run
        from trl_ulma.rows.dataset_labels import shown_by

        args.chose_part = args.test_split_size is not None or args.split_seed is not None
        trained = [source for source in sources if source not in served]
        note = fill(args, trained)
        is_own = any(getattr(args, name) is not None for name in _LABELS)
        is_usual = not is_own and is_as_in_training(args, trained)
        with shown_by(None if is_verbose() else parser.prog):
            facts = run(args, command=command, data_note=note, is_as_in_training=is_usual)
        print(in_terminal(facts, min(terminal_width(), 100)))

    if code := attempt(parser, evaluate):
        return code
    print(f"Open {args.output / 'report.html'} in a browser. It explains the figures.")
    return 0


def _words(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """The command with these options, without those that have their default.

    Example:
        >>> parser = make_parser()
        >>> words = "--model a=out --dataset d --output o --no-base --judge llm:m --judge_temperature none --seed 0"
        >>> " ".join(_words(parser, parser.parse_args(words.split())))
        'trl-ulma evaluate --model a=out --dataset d --output o --no-base --judge llm:m --judge_temperature none'
    """
    words = parser.prog.split()
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        option = next((name for name in action.option_strings if name.startswith("--")), "")
        if value == parser.get_default(action.dest):
            continue
        if action.nargs == 0:
            words.append(option if value else f"--no-{action.dest}")
            continue
        for each in value if isinstance(value, list) else [value]:
            text = ":".join(filter(None, each)) if isinstance(each, tuple) else str(each)
            words += [option, "none" if each is None else text]
    return words


def _named(models: Sequence[str]) -> list[tuple[str, str]]:
    """(name, source) of each model: a name is what is before "=", or the last part of the source where that is unique.

    Example:
        >>> _named(["a=out/1", "a=out/2", "base", "x/final", "y/final"])
        [('a', 'out/1'), ('a', 'out/2'), ('base', 'base'), ('x/final', 'x/final'), ('y/final', 'y/final')]
        >>> _named(["served:m"])
        [('m', 'served:m')]
        >>> _named(["."]) == [(Path.cwd().name, ".")]
        True
    """
    pairs = []
    for model in models:
        name, equals, source = model.partition("=")
        is_named = equals and name and source and not re.search(r"[/\\]", name) and not Path(model).exists()
        pairs.append((name, source) if is_named else ("", model))
    last = [name or Path(_whole_path(source.removeprefix("served:"))).name for name, source in pairs]
    return [
        (name or (part if last.count(part) == 1 else source), source)
        for (name, source), part in zip(pairs, last, strict=True)
    ]


def _whole_path(source: str) -> str:
    """The whole path of a folder, of which there are several spellings, such as "." and "out/"."""
    return os.path.abspath(source) if Path(source).exists() else source


def _judge(text: str) -> tuple[str, str]:
    kind, _, name = text.partition(":")
    if (kind in ("llm", "reward") and name) or text == "profanity":
        return kind, name
    raise argparse.ArgumentTypeError(f"{text!r} is no judge; it must be {JUDGES}")


def _positive(kind: type) -> "type":
    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} must be above 0")
        return value

    number.__name__ = kind.__name__  # in argparse's message
    return number  # type: ignore[return-value]


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} must be 0 or above")
    return value


def _number_or_none(text: str) -> float | None:
    if text == "none":
        return None
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be 0 or above")
    return value


if __name__ == "__main__":
    sys.exit(main())
