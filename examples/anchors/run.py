"""python examples/anchors/run.py qrpo-magpie-air --output qrpo-run --num_processes 8

Trains a model of 7B or 8B parameters as a published experiment did, and measures it as that was measured, so that the
figure can be compared with the published one. The stages are: rows, the reference's answers, ratings, training, answers
to AlpacaEval's instructions, and their comparison with the untuned model's. Each stage leaves a file in the output
folder. The same command goes on where a run was stopped. `--dry_run` runs all stages on a tiny model in minutes.
"""

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trial
import yaml
from estimate import estimate
from scipy import stats
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trl_ulma.data.files import load_rows
from trl_ulma.data.pairs import pairs_to_rows
from trl_ulma.evaluation.generation import Generator, Sampling, ServerGenerator, TransformersGenerator, generate
from trl_ulma.evaluation.server import Server
from trl_ulma.log_partition import quantile_log_z

Row = dict[str, Any]
RECIPES = Path(__file__).parent / "recipes"
INSTRUCTIONS = ("tatsu-lab/alpaca_eval", "alpaca_eval.json")


def read(path: Path) -> list[Row]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON lines, whole or not at all."""
    part = path.with_suffix(".part")
    with open(part, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    part.replace(path)


def make_rows(recipe: Row, path: Path, limit: int | None) -> None:
    """Both halves of each pair as rows: `prompt` and `completion` as messages, and `label` 1 for the chosen one."""
    source = recipe["pairs"]
    splits: Any = load_rows(source["name"])
    table = splits[source["split"]].select_columns(["chosen", "rejected"])
    table = table if limit is None else table.select(range(min(limit, len(table))))
    made = pairs_to_rows(table[:])
    names = ("prompt", "completion", "label", "left_out")
    rows = [dict(zip(names, values, strict=True)) for values in zip(*(made[name] for name in names), strict=True)]
    kept = [{name: row[name] for name in names[:3]} for row in rows if not row["left_out"]]
    print(f"rows: {len(kept):,} of {len(rows):,}; the others are no pair of answers to one prompt")
    write(path, kept)


def unique_prompts(rows: Iterable[Row]) -> list[Any]:
    """Each prompt once, in the rows' order."""
    return list({json.dumps(row["prompt"]): row["prompt"] for row in rows}.values())


def answer(model: str, prompts: list[Any], path: Path, sampling: Sampling, options: argparse.Namespace) -> list[str]:
    """The model's answers to conversations, kept in a file as they come."""
    generator: Generator
    if options.server_url:
        generator = ServerGenerator(Server(options.server_url, model))
        asked: list[Any] = prompts
    else:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
        loaded.to("cuda" if torch.cuda.is_available() else "cpu")
        generator = TransformersGenerator(loaded, tokenizer, model)
        asked = [tokenizer.apply_chat_template(each, add_generation_prompt=True, return_dict=False) for each in prompts]
    replies = generate(generator, asked, path, sampling, batch_size=options.batch_size)
    refused = sum(reply.refused is not None for reply in replies)
    if refused:
        raise SystemExit(
            f"{path}: {refused} of {len(replies)} prompts were refused. Run the command again to ask them."
        )
    del generator
    gc.collect()
    return [reply.text for reply in replies]


class Rater:
    """Scores conversations with a reward model, and keeps the scores in a file as they come.

    Args:
        checkpoint: a sequence classifier with one output, or one whose output has a `score`, as ArmoRM's.
        batch_size: conversations at once.
    """

    def __init__(self, checkpoint: str, batch_size: int):
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            checkpoint, dtype="auto", trust_remote_code=True
        ).eval()
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size = batch_size

    def __call__(self, conversations: list[list[Row]], path: Path) -> np.ndarray:
        """`(N,)` scores."""
        done = [float(line) for line in path.read_text().split()] if path.exists() else []
        with open(path, "a", encoding="utf-8") as file, tqdm(total=len(conversations), initial=len(done)) as bar:
            for start in range(len(done), len(conversations), self.batch_size):
                batch = conversations[start : start + self.batch_size]
                ids = [self.tokenizer.apply_chat_template(each, return_dict=False) for each in batch]
                inputs = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)
                with torch.inference_mode():
                    found = self.model(**inputs)
                score = found.get("score")
                scores = (found.logits if score is None else score).float().reshape(len(batch), -1)
                if scores.size(1) != 1 or not bool(scores.isfinite().all()):
                    raise SystemExit(
                        f"The reward model gives {scores.size(1)} scores an answer, or one that is no number."
                    )
                done += scores[:, 0].tolist()
                file.writelines(f"{value!r}\n" for value in scores[:, 0].tolist())
                file.flush()
                bar.update(len(batch))
        return np.array(done)


def rate(recipe: Row, folder: Path, options: argparse.Namespace) -> None:
    """Labels: the share of the reference's answers to the same prompt that are rated no higher; or the thumbs."""
    rows, count = read(folder / "rows.jsonl"), recipe["reference_answers"]
    if not count:
        write(folder / "rated.jsonl", rows)
        return
    prompts = unique_prompts(rows)
    longest = recipe["answers"]["max_new_tokens"]
    drawn = [
        answer(recipe["model"], prompts, folder / f"reference-{seed}.jsonl", Sampling(longest, 1.0, 1.0, seed), options)
        for seed in range(count)
    ]
    rater = Rater(recipe["reward_model"], options.batch_size)
    own = rater([[*row["prompt"], *row["completion"]] for row in rows], folder / "scores.txt")
    others = [
        rater(
            [[*prompt, turn(text)] for prompt, text in zip(prompts, texts, strict=True)], folder / f"scores-{seed}.txt"
        )
        for seed, texts in enumerate(drawn)
    ]
    of_prompt = dict(zip(map(json.dumps, prompts), np.stack(others, 1), strict=True))
    labels = [
        float((of_prompt[json.dumps(row["prompt"])] <= score).mean()) for row, score in zip(rows, own, strict=True)
    ]
    write(folder / "rated.jsonl", ({**row, "label": label} for row, label in zip(rows, labels, strict=True)))


def turn(text: str) -> Row:
    """An answer as a message."""
    return {"role": "assistant", "content": text}


def train(recipe: Row, folder: Path, options: argparse.Namespace) -> None:
    """One `trl-ulma` command, which goes on from the last checkpoint if there is one."""
    settings = dict(recipe["training"])
    command, rows = settings.pop("command"), settings.pop("batch_rows")
    if settings.get("log_z") == "quantile":
        settings["log_z"] = quantile_log_z(settings["beta"])
    each = options.rows_per_device
    settings |= {
        "model": recipe["model"],
        "dataset": str(folder / "rated.jsonl"),
        "output": str(folder / "model"),
        "dtype": "float32" if options.dry_run else "bfloat16",
        "per_device_train_batch_size": each,
        "gradient_accumulation_steps": max(rows // (each * options.num_processes), 1),
        "save_strategy": "steps",
        "save_steps": 100,
        "save_total_limit": 1,
        "report_to": "none",
    }
    if any((folder / "model").glob("checkpoint-*")):
        settings["resume_from_checkpoint"] = True
    launched = ["--num_processes", str(options.num_processes)]
    if options.accelerate_config:
        launched += ["--accelerate_config", options.accelerate_config]
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-m", "trl_ulma.scripts.cli", command, *words, *launched], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def instructions(options: argparse.Namespace) -> list[Row]:
    """AlpacaEval's instructions, or those of a file of the same form."""
    if options.instructions is None:
        from huggingface_hub import hf_hub_download

        options.instructions = Path(hf_hub_download(*INSTRUCTIONS, repo_type="dataset"))
    return json.loads(options.instructions.read_text(encoding="utf-8"))


def compare(recipe: Row, folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Answers in AlpacaEval's form, and how often the reward model prefers the tuned model's to the untuned one's."""
    asked, texts = instructions(options), {}
    prompts = [[{"role": "user", "content": each["instruction"]}] for each in asked]
    for name, model in (("untuned", recipe["model"]), ("tuned", str(folder / "model"))):
        texts[name] = answer(model, prompts, folder / f"{name}.jsonl", Sampling(**recipe["answers"]), options)
        outputs = [
            {"instruction": each["instruction"], "output": text, "generator": f"{options.recipe}-{name}"}
            for each, text in zip(asked, texts[name], strict=True)
        ]
        (folder / f"{name}-outputs.json").write_text(json.dumps(outputs, indent=1), encoding="utf-8")
    rater = Rater(recipe["reward_model"], options.batch_size)
    scores = {
        name: rater([[*p, turn(t)] for p, t in zip(prompts, texts[name], strict=True)], folder / f"scores-{name}.txt")
        for name in texts
    }
    wins = (scores["tuned"] > scores["untuned"]) + 0.5 * (scores["tuned"] == scores["untuned"])
    low, high = stats.bootstrap(
        (wins,), np.mean, random_state=0, n_resamples=2000, method="percentile"
    ).confidence_interval
    share = f"{wins.mean():.1%} [{low:.1%}, {high:.1%}] of {len(wins)} instructions"
    yield f"The reward model prefers the tuned model's answer to {share}."
    if recipe["reference_answers"]:
        yield "The answers were rated by the same reward model in training: this says that training worked, not more."
    yield f"Published: {recipe['anchor']}. To measure that, with a key for its judge:"
    yield f"    alpaca_eval evaluate --model_outputs {folder / 'tuned-outputs.json'}"


def main() -> None:
    """Run the stages that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    parser.add_argument("recipe", choices=names)
    parser.add_argument("--output", type=Path, required=True, help="The folder of the run.")
    parser.add_argument("--num_processes", type=int, default=1, help="GPUs to train on.")
    parser.add_argument("--accelerate_config", help="How they share the model: zero3, fsdp2, or a file.")
    parser.add_argument("--rows_per_device", type=int, default=4, help="Rows at once on a GPU in training.")
    parser.add_argument("--batch_size", type=int, default=32, help="Answers at once in sampling and rating.")
    parser.add_argument("--server_url", help="A server, such as vLLM's, that answers instead of transformers.")
    parser.add_argument("--instructions", type=Path, help="Instructions in AlpacaEval's form (default: AlpacaEval's).")
    parser.add_argument("--rows", type=int, help="Take only so many pairs.")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="Another training setting.")
    parser.add_argument("--estimate", action="store_true", help="Only estimate time and memory.")
    parser.add_argument("--dry_run", action="store_true", help="All stages with a tiny model and made-up rows.")
    options = parser.parse_args()
    recipe = yaml.safe_load((RECIPES / f"{options.recipe}.yaml").read_text(encoding="utf-8"))
    for setting in options.set:
        name, equals, value = setting.partition("=")
        if not equals:
            parser.error(f"--set {setting}: expected NAME=VALUE")
        recipe["training"][name] = yaml.safe_load(value)
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    print("\n".join(estimate(recipe, options)), flush=True)
    if options.estimate:
        return
    if options.dry_run:
        trial.shrink(recipe, options, folder / "trial")
    kept = folder / "recipe.yaml"
    stated = yaml.safe_dump(recipe, sort_keys=False)
    if kept.exists() and kept.read_text(encoding="utf-8") != stated:
        parser.error(f"{folder} is a run of other settings ({kept}). Give another --output.")
    kept.write_text(stated, encoding="utf-8")
    if not (folder / "rows.jsonl").exists():
        make_rows(recipe, folder / "rows.jsonl", options.rows)
    if not (folder / "rated.jsonl").exists():
        rate(recipe, folder, options)
    if not (folder / "model" / "config.json").exists():
        train(recipe, folder, options)
    print("\n".join(compare(recipe, folder, options)))


if __name__ == "__main__":
    main()
