r"""Score rows with a trained model: rank answers, find labels that are wrong, filter data.

    trl-ulma score --model out --ref_model Qwen/Qwen3-0.6B --dataset feedback.jsonl --output scored.jsonl
    trl-ulma score --model adapter-folder --dataset answers.csv --output scored.csv

Each row is written with the column names of its file, and with `reward`, `probability` (for binary labels),
`predicted_label` and `held_out` (whether its prompt was not in the training data). If rows have labels, `surprise` is
written too, and the most surprising rows come first. Rows without a label among them come last, with no `surprise`. A
`.csv` file has the separator and the decimal mark of the CSV file that was read, so that the same program opens it.

The model is compared with the reference that training wrote down; `--ref_model` names another place where it is. β,
log Z, the label transform, the number format and the quantization are those saved with the model (`pointwise.json`).
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Container, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ulma.scripts.command_line import CommandParser, add_verbose, attempt, is_verbose, terminal_width
from trl_ulma.scripts.data_options import check_output, fill, is_as_in_training

if TYPE_CHECKING:
    from datasets import Dataset

    from trl_ulma.data.csv_rows import Layout
    from trl_ulma.data.names import Names

WRITTEN = (".jsonl", ".csv", ".parquet")
# Rows that are printed
SHOWN = 3
SORTS = ("surprise", "reward", "row")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def make_parser(prog: str = "trl-ulma score") -> argparse.ArgumentParser:
    """The command's options."""
    parser = CommandParser(
        prog=prog,
        usage=f"{prog} --model MODEL --dataset DATA --output FILE [options]",
        description="Score rows with a trained model: implicit reward, P(label = 1), the label that it expects, and "
        "how surprising the row's own label is.",
    )
    parser.add_argument("--model", required=True, help="trained model or adapter: a folder, or a name on the Hub")
    parser.add_argument(
        "--ref_model",
        help="reference model of the training (default: the one that training recorded)",
    )
    parser.add_argument(
        "--dataset", required=True, metavar="DATA", help="a file, a folder or a name on the Hub; labels are optional"
    )
    parser.add_argument("--split", default="train", help="split of the dataset (default: train; a file has no other)")
    parser.add_argument("--dataset_config", help="configuration of a dataset that has several")
    parser.add_argument(
        "--invalid_rows",
        choices=("error", "drop"),
        help="list the rows that cannot be read and stop, or leave them out (default: as in training, else error)",
    )
    parser.add_argument(
        "--columns",
        help="names of the columns in your data: prompt=question,completion=response "
        "(default for this and --label_map: as in training, if the file has these columns)",
    )
    parser.add_argument("--label_map", help="numbers for labels that are words: up=1,down=0")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help=f"the file to write: {', '.join(WRITTEN)}"
    )
    parser.add_argument(
        "--sort",
        choices=SORTS,
        help="order of the output: surprise or reward, highest first, or row (default: surprise if there are labels)",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="rows at once (default: 8)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="number format of the weights (default: that of training)"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add_verbose(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Score, and return the exit code: 2 for wrong options, 1 for what is wrong with what they name."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.output.suffix not in WRITTEN:
        parser.error(f"--output {args.output} must end in {', '.join(WRITTEN)}.")
    if args.output.exists() and Path(args.dataset).exists() and args.output.samefile(args.dataset):
        parser.error(f"--output {args.output} is the file that is read. Name another one.")
    if args.batch_size < 1:
        parser.error(f"--batch_size must be 1 or above; got {args.batch_size}.")
    return attempt(parser, lambda: print(run(args)))


def run(args: argparse.Namespace) -> str:
    """Load, score, sort and write; what to say of it."""
    import numpy as np

    from trl_ulma.data import seen_prompts
    from trl_ulma.data.csv_rows import DELIMITERS
    from trl_ulma.data.files import check_splits, load_rows
    from trl_ulma.data.names import Names
    from trl_ulma.data.unread import UNREAD
    from trl_ulma.judge import Judge, check_free, without_label
    from trl_ulma.rows.dataset_labels import shown_by

    check_output(args.output, args.dataset)
    _make_folder(args.output)
    note = fill(args, [args.model])
    if note and is_as_in_training(args, [args.model]) and not is_verbose():
        note = f"{args.dataset} is read as in training."
    if note:
        print(note, file=sys.stderr)
    splits: Any = load_rows(
        args.dataset,
        config=args.dataset_config,
        columns=args.columns,
        label_map=args.label_map,
        invalid_rows="mark",
        needs_label=False,
    )
    if args.split not in splits:
        there = ", ".join(map(str, splits))
        raise ValueError(f"{args.dataset} has no split {args.split!r}, but {there}. Set --split to one of them.")
    rows = splits[args.split]
    for note in check_splits({args.split: rows}, args.dataset, needs_label=False, columns=args.columns):
        print(note, file=sys.stderr)
    names = Names.of(args.columns, args.label_map)
    theirs = names.columns.get("label")
    if theirs is not None and "label" not in rows.column_names:
        print(f"{args.dataset} has no column {theirs}, so its rows are scored without labels.", file=sys.stderr)
    is_labeled = not without_label(rows).all()
    if args.sort == "surprise" and not is_labeled:
        raise ValueError(
            f"--sort surprise needs labels, which {args.dataset} does not have (its columns are "
            f"{', '.join(rows.column_names)}). Use --sort reward."
        )
    check_free(rows.column_names)
    judge = Judge.from_pretrained(
        args.model,
        args.ref_model,
        batch_size=args.batch_size,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )
    with shown_by(None if is_verbose() else "trl-ulma score"):
        scored = judge.score(rows, invalid_rows=args.invalid_rows)
    if UNREAD in scored.column_names:  # the rows that it is about are left out
        scored = scored.remove_columns(UNREAD)
    order = args.sort or ("surprise" if is_labeled else "row")
    if order != "row":
        scored = scored.sort(order, reverse=True)
    like = layout(rows, names) if args.output.suffix == ".csv" else None
    if like is not None and like.delimiter != ",":
        marks = f" and decimal {'commas' if like.decimal == ',' else 'points'}" * (like.delimiter == ";")
        print(f"{args.output} has {DELIMITERS[like.delimiter]}{marks}, as {args.dataset} has.", file=sys.stderr)
    write(as_named(scored, names), args.output, like)
    raters = getattr(judge.settings.label_transform, "offsets", {})
    lines = [summary(args.output, rows, scored, order), *most_notable(scored, raters)]
    held_out = dict(zip(scored["row"][:], scored["held_out"][:], strict=True))  # a pair has two rows
    kinds = {True: seen_prompts.NEW, False: seen_prompts.SEEN, None: seen_prompts.UNKNOWN}
    if told := seen_prompts.in_words(np.array([kinds[each] for each in held_out.values()]), args.model):
        lines.insert(1, told)
    return "\n".join(lines)


def _make_folder(path: Path) -> None:
    """Make the folder of the output. Raises OSError if it cannot be written, because scoring can take hours."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_free = not path.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)
    except OSError:
        is_free = False
    if not is_free:
        raise OSError(f"--output {path} cannot be written. Name a file in a folder that you can write to.")


def as_named(scored: "Dataset", names: "Names") -> "Dataset":
    """Scored rows with the names of columns and labels in the file that they are from.

    Labels stay numbers, in a column `label`, if several words mean the same number. A name that `score` itself writes,
    such as `reward`, is not given back.
    """
    columns, there = dict(names.columns), scored.column_names
    words = {number: word for word, number in names.label_map.items()}
    is_paired = "chosen" in there
    if is_paired or len(words) < len(names.label_map):
        columns.pop("label", None)
    elif words and "label" in there:
        # A text is a word for no label
        labels = [each if isinstance(each, str) else words.get(each) for each in scored["label"][:]]
        scored = scored.remove_columns("label").add_column("label", labels).select_columns(there)
    taken = set(there) - set(columns)
    return scored.rename_columns(
        {ours: theirs for ours, theirs in columns.items() if ours in there and theirs not in taken}
    )


def layout(rows: "Dataset", names: "Names") -> "Layout | None":
    """The layout of the CSV file that rows are from. None if they are from another file."""
    from trl_ulma.data.columns import NUMBERS, READ
    from trl_ulma.data.csv_rows import Layout
    from trl_ulma.data.file_rows import KINDS, suffix_of
    from trl_ulma.data.origins import joined_origins

    files = [Path(name) for name in joined_origins([("", rows)]).names if KINDS.get(suffix_of(Path(name))) == "csv"]
    numbers = [names.columns.get(name, name) for name in NUMBERS]
    return Layout.of(files[0], numbers, (*READ, *names.columns.values())) if files else None


def write(scored: "Dataset", path: Path, layout: "Layout | None" = None) -> None:
    """Write scored rows; in the cells of a CSV file, what is not text or a number is JSON, as `trl-ulma` reads it.

    A CSV file has the given layout.

    What a row does not have, such as the probability of a continuous label, is left out: in JSON lines of each row,
    and elsewhere if no row has it. `held_out` is always there. Files of text do not hold images, which are left out of
    them with a note.
    """
    from trl_ulma.data.csv_rows import Layout
    from trl_ulma.data.json_rows import json_text
    from trl_ulma.judge import COLUMNS

    layout = layout or Layout()
    own = [name for name in COLUMNS if name in scored.column_names and name != "held_out"]
    scored = scored.remove_columns([name for name in own if all(value is None for value in scored[name][:])])
    if path.suffix != ".parquet":
        from datasets import Image

        seen = [name for name, kind in scored.features.items() if isinstance(getattr(kind, "feature", kind), Image)]
        if seen:
            print(f"The column {seen[0]} is not in {path}. A .parquet file keeps images.", file=sys.stderr)
            scored = scored.remove_columns(seen)
    row: Any
    if path.suffix == ".jsonl":  # Dataset.to_json rounds numbers, and writes dates as numbers
        with path.open("w", encoding="utf-8") as file:
            for row in scored:
                there = {name: value for name, value in row.items() if name not in own or value is not None}
                file.write(json_text(there) + "\n")
    elif path.suffix == ".csv":  # Dataset.to_csv writes values of columns with several kinds as JSON
        with path.open("w", encoding="utf-8-sig" if layout.has_mark else "utf-8", newline="") as file:
            # A carriage return outside of quotes ends a line
            form: Any = {"quoting": csv.QUOTE_NONNUMERIC, "delimiter": layout.delimiter, "lineterminator": "\n"}
            writer = csv.writer(file, **form)
            writer.writerow(scored.column_names)
            for row in scored:
                writer.writerow([_cell(value, layout.decimal) for value in row.values()])
    else:
        scored.to_parquet(str(path))


def _cell(value: Any, decimal: str) -> Any:
    """The value of a cell of a CSV file."""
    from trl_ulma.data.json_rows import json_text

    if isinstance(value, (dict, list)):
        return json_text(value)
    if value != value:
        return None
    return _with_comma(value) if isinstance(value, float) and decimal == "," else value


def _with_comma(value: float) -> str:
    """A number with a decimal comma, as `trl-ulma` reads it: 1,234 could be a thousand, and 1,5e-3 is no number.

    Example:
        >>> _with_comma(4.0), _with_comma(1.234), _with_comma(1.5e-05)
        ('4,0', '1,2340', '0,000015')
    """
    text = format(Decimal(repr(value)), "f").replace(".", ",")
    return f"{text}0" if text[-4:-3] == "," else text


def summary(path: Path, rows: "Dataset", scored: "Dataset", order: str) -> str:
    """How many rows were scored and left out, and how many have no label; of a pair, each half is an answer."""
    said = {"surprise": ", the most surprising first", "reward": ", the highest reward first", "row": ""}[order]
    is_paired = "chosen" in rows.column_names
    answers, unit = (2 * len(rows), "answers") if is_paired else (len(rows), "rows")
    of = f" of {len(rows):,} pair{'s' * (len(rows) != 1)}" if is_paired else ""
    left_out = f"{answers - len(scored):,} of {answers:,}"
    unit = unit.removesuffix("s") if len(scored) == 1 else unit
    message = f"{path} holds {len(scored):,} scored {unit}{of}{said}; {left_out} were left out."
    unlabeled = sum(each is None for each in scored["surprise"][:]) if "surprise" in scored.column_names else 0
    if unlabeled:
        have = "row has" if unlabeled == 1 else "rows have"
        message += f" {unlabeled:,} {have} no label."
    return message


def most_notable(scored: "Dataset", raters: Container[str] = ()) -> list[str]:
    """Lines about the rows whose labels surprise the model most, or without labels, about the best and worst ones.

    Args:
        scored: the scored rows.
        raters: the raters whose own labels are predicted. For others, it is the label of an average one.
    """
    surprise = scored["surprise"][:] if "surprise" in scored.column_names else [None] * len(scored)
    labeled = [row for row, each in enumerate(surprise) if each is not None]
    if labeled:
        top = scored.select(labeled).sort("surprise", reverse=True).select(range(min(SHOWN, len(labeled))))
        return [f"The most surprising labels{_why_extreme(scored.select(labeled))}:", *_lines(top, raters)]
    ordered = scored.sort("reward", reverse=True)
    if len(ordered) <= 2 * SHOWN:
        return ["From the best to the worst:", *_lines(ordered)]
    best, worst = ordered.select(range(SHOWN)), ordered.select(range(len(ordered) - SHOWN, len(ordered)))
    return ["The best:", *_lines(best), "The worst:", *_lines(worst)]


def _why_extreme(rows: "Dataset") -> str:
    """In parentheses, why the most surprising labels of these rows may be no mistakes. "" if they may be some.

    Held-out rows decide if there are enough, because a model can know the labels of the others by heart.
    """
    import numpy as np

    from trl_ulma.predictions import AS_THE_MEAN, ENOUGH

    label, predicted = (np.array(rows[name][:], dtype=np.float64) for name in ("label", "predicted_label"))
    held_out = rows["held_out"][:] if "held_out" in rows.column_names else [None] * len(rows)
    is_new = np.array([each is True for each in held_out])
    if is_new.sum() >= ENOUGH:
        label, predicted = label[is_new], predicted[is_new]
    of_mean = np.abs(label - label.mean()).mean()
    if len(label) < ENOUGH or np.abs(label - predicted).mean() < (1 - AS_THE_MEAN) * of_mean:
        return ""
    return ", which are mostly those farthest from the mean, because predictions are hardly better than the mean"


def _lines(rows: "Dataset", raters: Container[str] = ()) -> list[str]:
    from trl_ulma.data.sheet_rows import with_sheet_row
    from trl_ulma.labels.rater_offsets import rater_name

    lines = []
    row: Any
    for row in rows:
        answer = row.get("completion") or row["chosen" if row.get("label") == 1 else "rejected"]
        place = with_sheet_row(row.get("file_line") or f"row {row['row']}")
        place += ", held out" if row.get("held_out") else ""
        rater = rater_name(row.get("rater"))
        label = "" if row.get("surprise") is None else f"label {row['label']:g}{f' by {rater}' if rater else ''}, "
        of = " for this rater" if rater in raters else ""
        lines.append(f"  {place}: {label}predicted {row['predicted_label']:.2f}{of}")
        texts = {"prompt": row.get("prompt"), "answer": answer}
        lines += [f"    {name}: {in_one_line(text)}" for name, text in texts.items() if text is not None]
    return lines


def in_one_line(text: Any) -> str:
    """Return text or messages in one line of a terminal, shortened in the middle if it is long."""
    if isinstance(text, list) and all(isinstance(turn.get("content"), str) and turn["content"] for turn in text):
        text = " ".join(turn["content"] if len(text) == 1 else f"{turn['role']}: {turn['content']}" for turn in text)
    elif not isinstance(text, str):
        text = json.dumps(text, ensure_ascii=False, default=str)
    shown = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    most = terminal_width() - 12
    return shown if len(shown) <= most else f"{shown[: most // 2]}…{shown[-(most // 2) :]}"


if __name__ == "__main__":
    raise SystemExit(main())
