r"""Trains a judge for a run's answers: a reward model of the pairs that no cell of the run has seen.

    python examples/paper/judge.py paper-runs --data hh --model smollm2 --input hh=hh_harmless.jsonl.gz --output judge
    python examples/paper/reproduce.py … --judge reward:judge --output paper-runs

For those who have no server and no reward model at hand. It is as good as its agreement with the held-out labels, which
the tables show beside what it says. Its prompts are neither trained on nor held out by any cell of the run, and
its settings are those of the reward model of `rlhf` at the small scale.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import grid
import preparing
import stages
from datasets import Dataset
from reproduce import option, remember, smollm2, source_of
from stored import load
from transformers import AutoTokenizer

from trl_ulma.data.files import load_rows


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="the folder of reproduce.py's --output")
    parser.add_argument("--data", default="hh", help="one that has pairs (default: hh)")
    parser.add_argument("--input", action="append", default=[], type=source_of, metavar="FAMILY=FILE", help="raw data")
    parser.add_argument("--model", help="what it begins as: a checkpoint, or smollm2 (default: the small scale's)")
    parser.add_argument(
        "--max_length", type=int, default=512, help="in tokens; longer pairs are left out (default: 512)"
    )
    parser.add_argument("--set", action="append", default=[], type=option, metavar="NAME=VALUE", help="of its trainer")
    parser.add_argument("--output", type=Path, required=True, help="the folder of the reward model")
    return parser


def unseen_pairs(run: Path, data: str, inputs: dict[str, str], tokenizer: object, max_length: int) -> Dataset:
    """The pairs of a dataset whose prompts are in no file of rows of a run.

    Raises:
        ValueError: where the run has no rows, or writes prompts otherwise; the data have no pairs, or none is left.
    """
    settings = grid.settings(grid.Cell("small", data, "rlhf"))["rows"]
    if not settings["pairs"]:
        raise ValueError(f"{data} has no pairs for a reward model to learn from.")
    folders = sorted(file.parent for file in (run / "work" / "rows").rglob("facts.json"))
    if not folders:
        raise ValueError(f"There are no rows in {run / 'work' / 'rows'}, so what the judge may not see is not known.")
    seen: set[str] = set()
    for folder in folders:
        of_run = load(folder / "facts.json")["settings"]
        if of_run["chat_template"] is not None or (
            of_run["family"] == settings["family"] and of_run["options"] != settings["options"]
        ):
            raise ValueError(
                f"The prompts in {folder} are written otherwise than the judge's ({data} at the small scale), so which "
                "of them it may not see cannot be told. Take another run's folder."
            )
        for part in ("train", "test"):
            rows = load_rows(folder / f"{part}.parquet")["train"]
            seen |= {preparing.prompt_key(prompt) for prompt in rows["prompt"]}
    name = preparing.source(settings["family"], settings["input"], inputs)
    rows, _ = preparing.converted(settings["family"], name, settings["options"])
    new = rows.select([i for i, prompt in enumerate(rows["prompt"]) if preparing.prompt_key(prompt) not in seen])
    pairs = preparing.pairs_of(preparing.short_enough(new, tokenizer, max_length, {})) if len(new) else []
    if not pairs:
        raise ValueError(f"The run has seen all pairs of {name}. Bring more, or lower --train_rows of the run.")
    print(f"{len(pairs):,} pairs of {len(rows):,} answers are left for the judge; the run has {len(seen):,} prompts.")
    return Dataset.from_list(pairs)


def main(argv: Sequence[str] | None = None) -> int:
    """Train the judge, and write it as one model."""
    args = make_parser().parse_args(argv)
    work = args.output / "work"
    try:
        for name in ("seed", "max_length", "output_dir", "dataset_name", "model_name_or_path"):
            if name in dict(args.set):
                raise ValueError(f"--set {name} is not possible: the judge has options for it, or needs none.")
        stage = grid.settings(grid.Cell("small", args.data, "rlhf"), changed=dict(args.set))["stages"][0]
        if args.model is not None:
            stage["options"]["model_name_or_path"] = smollm2() if args.model == "smollm2" else args.model
        stage["options"] |= {"max_length": args.max_length, "seed": 0}
        tokenizer = AutoTokenizer.from_pretrained(stage["options"]["model_name_or_path"])
        pairs = unseen_pairs(args.run, args.data, dict(args.input), tokenizer, args.max_length)
        work.mkdir(parents=True, exist_ok=True)
        file = work / "pairs.parquet"
        if file.exists() and load_rows(file)["train"].to_list() != pairs.to_list():
            raise ValueError(f"The judge in {args.output} learned from other pairs. Choose another --output.")
        before = work / "reward.yaml"
        asked = before.read_text(encoding="utf-8") if before.exists() else None
        stages.write_options(stage, before, work, work / "reward")
        if asked is not None and asked != before.read_text(encoding="utf-8"):
            before.write_text(asked, encoding="utf-8")
            raise ValueError(f"The judge in {args.output} was begun with other settings. Choose another --output.")
        pairs.to_parquet(file)
        remember(args.run, Path(__file__).name, sys.argv[1:] if argv is None else argv)
        stages.run("reward", before, None)
    except (OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except stages.Interrupted as stop:
        print(f"{stop} Repeat the command to go on.", file=sys.stderr)
        return 130
    model, tokenizer = stages.load_scorer(work / "reward")
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"The judge is in {args.output}: --judge reward:{args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
