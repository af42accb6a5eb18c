"""python examples/frontier/learning_rate.py [--write]

Which learning rate does LoRA need for a few hundred ratings? Trains with the settings of the README's first command on
240 rated answers: LoRA as `--use_peft` sets it, 8 rows a step, 3 epochs, standardized stars. Then it reads the rewards
of answers to 30 other prompts, and the perplexity of prose that people wrote.

A record is written for each learning rate and seed, so a run that was stopped goes on. `--write` makes
`LEARNING_RATE.md` of the records.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers
from answers import human_texts, perplexity
from contenders import quiet
from datasets import Dataset
from pool import Pool, copy_of, load_reference, measured_on, write
from prompts import prompt
from scipy import stats
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import ModelConfig, get_peft_config

from trl_ulma import PointwiseDPOConfig, PointwiseDPOTrainer
from trl_ulma.ranking import spearman
from trl_ulma.scripts.demo_models import fetch_checkpoint

RATES = (1e-4, 1e-3)
SEEDS = (0, 1, 2)
PROMPTS, ANSWERS = 60, 4  # trained on; the group's other prompts are held out, with all their answers
BETA, BATCH, EPOCHS = 0.1, 8, 3
NOISE = 0.7  # standard deviation of a rater's error, in stars
HERE = Path(__file__).parent


def rated(pool: Pool, seed: int) -> tuple[Dataset, Dataset]:
    """(Rows to train on, held-out rows): answers of the reference with 1 to 5 stars for their sentiment."""
    random = np.random.default_rng([seed, 7])
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for number, answers in enumerate(pool.group(f"train-{seed}")):
        usable = [each for each in answers if each.usable]
        for each in usable[:ANSWERS] if number < PROMPTS else usable:
            stars = np.clip(np.rint(3 + each.rewards["sentiment"] / 2 + random.normal(0, NOISE)), 1, 5)
            row = {"prompt": prompt(each.question), "completion": each.text, "label": float(stars)}
            parts[number >= PROMPTS].append(row)
    return Dataset.from_list(parts[0]), Dataset.from_list(parts[1])


def measure(
    rate: float, seed: int, pool: Pool, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Train, and read the rewards of the held-out rows.

    Returns:
        `spearman` of rewards and stars, `error` and `error_of_mean` in stars (of the predicted stars, and of the mean
        star), `kl` in nats (the mean of log π_ref − log π over answers of π_ref, which estimates KL(π_ref ‖ π)),
        `perplexity`, and numbers of rows and steps.
    """
    rows, held_out = rated(pool, seed)
    with tempfile.TemporaryDirectory() as folder, quiet():
        set_seed(seed)
        args = PointwiseDPOConfig(
            folder,
            beta=BETA,
            label_type="continuous",
            label_transform="standardize",
            learning_rate=rate,
            per_device_train_batch_size=BATCH,
            num_train_epochs=EPOCHS,
            seed=seed,
            chat=False,  # the prompts are rendered
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            label_report=False,
        )
        trainer: Any = PointwiseDPOTrainer(
            model=copy_of(reference),
            args=args,
            processing_class=tokenizer,
            train_dataset=rows,
            peft_config=get_peft_config(ModelConfig(use_peft=True)),
        )
        trainer.train()
        scored = trainer.score(held_out)
    stars, reward = np.asarray(held_out["label"][:]), np.asarray(scored["reward"][:])
    predicted = np.asarray(scored["predicted_label"][:])
    return {
        "rate": rate,
        "seed": seed,
        "spearman": float(spearman(reward, stars)),
        "error": float(np.abs(predicted - stars).mean()),
        "error_of_mean": float(np.abs(np.mean(rows["label"]) - stars).mean()),
        "kl": float(-reward.mean() / BETA),
        "perplexity": perplexity(trainer.model.merge_and_unload().eval(), tokenizer, human_texts()),
        "rows": len(rows),
        "held_out": len(held_out),
        "steps": trainer.state.global_step,
    }


def table(records: list[dict[str, Any]], before: float) -> str:
    """The records as Markdown: means over seeds with 95% intervals (Student's t).

    Args:
        records: what `measure` returned, for each rate and seed.
        before: perplexity before training.
    """
    lines = [
        "| learning rate | Spearman's correlation | error, stars | error of the mean star | KL, nats | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for rate in RATES:
        found = [each for each in records if each["rate"] == rate]
        cells = [interval([each[name] for each in found]) for name in ("spearman", "error", "error_of_mean", "kl")]
        of_prose = interval([each["perplexity"] / before for each in found])
        lines.append(f"| {rate:.0e} | {' | '.join(cells)} | × {of_prose} |".replace("e-0", "e-"))
    return "\n".join(lines)


def difference(records: list[dict[str, Any]]) -> str:
    """What the higher rate has more than the lower one, within seeds."""
    low, high = ({each["seed"]: each for each in records if each["rate"] == rate} for rate in RATES)
    of = {name: interval([high[seed][name] - low[seed][name] for seed in SEEDS]) for name in ("spearman", "kl")}
    rates = f"{RATES[1]:.0e} less {RATES[0]:.0e}".replace("e-0", "e-")
    return f"{rates}, within seeds: Spearman's correlation {of['spearman']}, KL {of['kl']} nats."


def interval(values: list[float]) -> str:
    """Their mean and its 95% interval."""
    half = float(stats.t.ppf(0.975, len(values) - 1)) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.2f} [{np.mean(values) - half:.2f}, {np.mean(values) + half:.2f}]"


def main() -> None:
    """Measure what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="The folder of records and answers.")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "trl-ulma", help="Where SmolLM2 goes.")
    parser.add_argument("--minutes", type=float, default=None, help="Start no training after so many minutes.")
    parser.add_argument("--seed", type=int, action="append", help="Measure only this seed. Can be repeated.")
    parser.add_argument("--write", action="store_true", help="Write LEARNING_RATE.md from the stored records.")
    options = parser.parse_args()
    folder = options.results / "learning_rate"

    def path_of(rate: float, seed: int) -> Path:
        return folder / f"{rate:g}_{seed}.json"

    if options.write:
        paths = [path_of(rate, seed) for rate in RATES for seed in SEEDS]
        if missing := [path.name for path in paths if not path.exists()]:
            parser.error(f"{folder} has no {', '.join(missing)}: measure them first, without --write")
        records = [json.loads(path.read_text()) for path in paths]
        before = json.loads((options.results / "reference.json").read_text())["perplexity"]
        text = PAGE.format(
            table=table(records, before),
            difference=difference(records),
            rows=records[0]["rows"],
            steps=records[0]["steps"],
            held_out=", ".join(str(each["held_out"]) for each in records if each["rate"] == RATES[0]),
            devices=" and ".join(sorted({each["device"] for each in records})),
            minutes=round(np.mean([each["seconds"] for each in records]) / 60),
        )
        (HERE / "LEARNING_RATE.md").write_text(text, encoding="utf-8")
        return
    os.environ.setdefault("TQDM_DISABLE", "1")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    reference, tokenizer = load_reference(str(fetch_checkpoint(options.cache)))
    pool = Pool(options.results / "answers", reference, tokenizer)
    begun = time.monotonic()
    for seed in options.seed or SEEDS:
        for rate in RATES:
            path = path_of(rate, seed)
            if path.exists():
                continue
            if options.minutes is not None and time.monotonic() - begun > 60 * options.minutes:
                return
            started = time.monotonic()
            found = measure(rate, seed, pool, reference, tokenizer)
            found["seconds"] = round(time.monotonic() - started, 1)
            write(path, {**found, **measured_on(reference.device.type)})
            print(json.dumps(found), flush=True)


PAGE = """# Which learning rate for LoRA and a few hundred ratings?

About {rows} answers of SmolLM2-135M-Instruct to 60 prompts have 1 to 5 stars: their sentiment, with noise. They are
trained on as in the README's first command: pointwise DPO, LoRA as `--use_peft` sets it, β = 0.1, standardized stars,
8 rows a step, 3 epochs, {steps} steps. The figures are of answers to 30 other prompts ({held_out} rows).

{table}

{difference}

Means over 3 seeds with 95% intervals (Student's t over the seeds). Every seed has its own prompts, answers, noise,
adapter and order of rows. *Error*: of the predicted stars, and if every answer got the mean star. *KL*: the mean of
log π_ref − log π over the reference's held-out answers. *Perplexity*: of prose that people wrote, as a multiple of the
untrained model's. Measured on {devices}.

    python examples/frontier/learning_rate.py          # about {minutes} minutes a training
    python examples/frontier/learning_rate.py --write  # this page
"""


if __name__ == "__main__":
    main()
