r"""Close the loop: sample from the current policy, rate the answers, train on them, and repeat.

    python examples/scripts/rounds.py \
        --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name prompts.jsonl --rate rating.py:rate --rounds 3 --answers 8 \
        --label_type continuous --log_z prior --beta 0.1 \
        --use_peft --learning_rate 1e-4 --output_dir rounds-out

Rows of the dataset have a `prompt`. `rate` in `rating.py` is a function of your own. It takes a list of prompts and a
list of answers, both as text, and returns a number per answer; it can ask a reward model or a judge.

Every round trains the first model anew, with the first model as the reference, on the rated answers of all rounds so
far, or of the last one with `--use_rows last`. A tenth of the prompts is held out. Before every round and after the
last one the policy answers them, and the mean rating goes into `round-N/record.json`. Nothing that is stored is made
again: run the same command after a crash, or with more rounds. Answers that are cut off are not trained on.
"""

import copy
import gc
import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from trl_ulma import PointwiseDPOConfig, PointwiseDPOTrainer
from trl_ulma.data.files import load_rows, split_by_prompt

Rate = Callable[[list[str], list[str]], list[float]]


@dataclass
class RoundsArguments(ScriptArguments):
    """TRL's, and how a round goes."""

    rate: str = field(default="rating.py:rate", metadata={"help": "FILE.py:FUNCTION that rates answers."})
    rounds: int = field(default=3, metadata={"help": "How often the policy is sampled and trained."})
    answers: int = field(default=8, metadata={"help": "Answers per prompt and round."})
    use_rows: str = field(default="all", metadata={"help": "Rounds to train on.", "choices": ["all", "last"]})
    max_new_tokens: int = field(default=64, metadata={"help": "Longer answers are cut off."})
    sampling_batch_size: int = field(default=8, metadata={"help": "Prompts answered at a time."})


def rating_function(name: str) -> Rate:
    """The function FUNCTION of FILE.py."""
    file, colon, function = name.rpartition(":")
    if not colon or not Path(file).is_file():
        raise SystemExit(f"--rate {name}: expected FILE.py:FUNCTION, and {file or name} is not a file.")
    spec: Any = importlib.util.spec_from_file_location("rating", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise SystemExit(f"--rate {name}: {file} has no function {function}.")
    return getattr(module, function)


def answered(
    policy: str, prompts: list[Any], answers: int, seed: int, o: RoundsArguments, rate: Rate, device: torch.device
) -> list[dict]:
    """Rated answers to each prompt, drawn from the policy at temperature 1; `ended` unless they were cut off."""
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(policy, dtype="auto").eval().to(device)
    set_seed(seed)
    rows = []
    for start in range(0, len(prompts), o.sampling_batch_size):
        batch = prompts[start : start + o.sampling_batch_size]
        texts = [
            each
            if isinstance(each, str)
            else tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True)
            for each in batch
        ]
        special = isinstance(batch[0], str)  # a chat template writes the special tokens itself
        inputs = tokenizer(texts, padding=True, add_special_tokens=special, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            drawn = model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=answers,
                max_new_tokens=o.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )[:, inputs["input_ids"].size(1) :]
        found = tokenizer.batch_decode(drawn, skip_special_tokens=True)
        asked = [each for each in batch for _ in range(answers)]
        labels = rate([each if isinstance(each, str) else each[-1]["content"] for each in asked], found)
        if len(labels) != len(found):
            raise SystemExit(f"--rate {o.rate} returned {len(labels)} ratings of {len(found)} answers.")
        for prompt, text, label, ids in zip(asked, found, labels, drawn.tolist(), strict=True):
            completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            ended = tokenizer.eos_token_id in ids
            rows.append({"prompt": prompt, "completion": completion, "label": float(label), "ended": ended})
        print(f"{policy}: {min(start + len(batch), len(prompts))} of {len(prompts)} prompts answered", flush=True)
    del model
    gc.collect()
    return rows


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def check_settings(path: Path, o: RoundsArguments, training_args: PointwiseDPOConfig, model_args: ModelConfig) -> None:
    """Store the settings, or exit if other ones made what is stored; `--rounds` may change."""
    own = asdict(o) | asdict(model_args) | training_args.to_sanitized_dict()
    found = {name: str(value) for name, value in own.items() if name not in ("rounds", "sampling_batch_size")}
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        other = sorted(name for name in {*stored, *found} if stored.get(name) != found.get(name))
        if other:
            raise SystemExit(
                f"{path.parent} holds rounds with other settings of {', '.join(other)}: use another folder."
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = TrlParser((RoundsArguments, PointwiseDPOConfig, ModelConfig))
    o, training_args, model_args = parser.parse_args_and_config()
    rate = rating_function(o.rate)
    if training_args.world_size > 1:
        raise SystemExit("rounds.py runs in one process. Start it with python, not with accelerate launch.")
    rows = load_rows(o.dataset_name, config=o.dataset_config)[o.dataset_train_split]
    splits = split_by_prompt(rows.select_columns("prompt"), test_size=0.1, seed=training_args.seed)
    first = model_args.model_name_or_path
    folder = Path(training_args.output_dir)
    device = training_args.device
    check_settings(folder / "settings.json", o, training_args, model_args)
    policy, trained_on = first, []
    for number in range(o.rounds + 1):
        own = folder / f"round-{number}"
        own.mkdir(parents=True, exist_ok=True)
        seed = training_args.seed + 1000 * number
        if not (own / "record.json").exists():
            held_out = answered(policy, splits["test"]["prompt"][:], 1, seed + 1, o, rate, device)
            mean = sum(row["label"] for row in held_out) / len(held_out)
            ended = sum(row["ended"] for row in held_out) / len(held_out)
            write(own / "record.json", json.dumps({"rating": mean, "ended": ended, "prompts": len(held_out)}) + "\n")
        record = json.loads((own / "record.json").read_text(encoding="utf-8"))
        print(f"After {number} rounds: mean rating {record['rating']:.3f} on {record['prompts']} held-out prompts")
        if number == o.rounds:
            break
        if not (own / "rows.jsonl").exists():
            drawn = answered(policy, splits["train"]["prompt"][:], o.answers, seed, o, rate, device)
            write(own / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in drawn))
        fresh = [json.loads(line) for line in (own / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
        usable = [{name: row[name] for name in ("prompt", "completion", "label")} for row in fresh if row["ended"]]
        trained_on = usable if o.use_rows == "last" else trained_on + usable
        print(f"Round {number + 1}: {len(usable)} of {len(fresh)} answers ended; training on {len(trained_on)} rows")
        if not trained_on:
            raise SystemExit(f"No answer ended within {o.max_new_tokens} tokens. Raise --max_new_tokens.")
        policy = str(own / "policy")
        if Path(policy).exists():
            continue
        args = copy.deepcopy(training_args)
        args.output_dir, args.model_init_kwargs = str(own / "training"), {"dtype": model_args.dtype}
        trainer = PointwiseDPOTrainer(
            model=first,
            args=args,
            train_dataset=Dataset.from_list(trained_on),
            peft_config=get_peft_config(model_args),
        )
        trainer.train()
        trainer.save_model(str(own / "policy.part"))
        (own / "policy.part").rename(policy)


if __name__ == "__main__":
    main()
