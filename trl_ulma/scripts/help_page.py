"""The text of `--help` for training commands: the most important options, in groups. Imports no library.

The complete parser (`--help-all`) imports TRL, which takes many seconds. A test compares this page with that parser.
"""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from trl_ulma.scripts.command_line import terminal_width

_NAME_WIDTH = 32


@dataclass(frozen=True)
class Option:
    """An option on the page.

    Attributes:
        name: the name, with dashes.
        value: the placeholder of the value, or "" for a switch.
        text: the description.
        default: the default of the parser, or None to show none.
        methods: the commands that have the option.
    """

    name: str
    value: str
    text: str
    default: str | None = None
    methods: tuple[str, ...] = ("ulma", "pointwise-dpo")


_ULMA = ("ulma",)

GROUPS: dict[str, list[Option]] = {
    "data": [
        Option("--dataset", "DATA", "a CSV, TSV, JSON, JSONL or Parquet file, a folder, or a name on the Hub"),
        Option("--dataset_config", "NAME", "configuration of a dataset that has several"),
        Option("--dataset_train_split", "SPLIT", "split to train on", "train"),
        Option("--dataset_test_split", "SPLIT", "split to evaluate on, see --eval_strategy", "test"),
        Option("--dataset_streaming", "", "read the rows as they are needed; requires --max_steps"),
        Option(
            "--columns", "NAMES", "names of the columns in your data: prompt=question,completion=answer,label=stars"
        ),
        Option(
            "--invalid_rows", "{error,drop}", "list invalid rows and stop, or leave them out and count them", "error"
        ),
        Option(
            "--chat",
            "{auto,true,false}",
            "whether rows of text become chat messages; auto: those of CSV and TSV "
            "files, if the tokenizer has a chat template",
            "auto",
        ),
        Option("--system_message", "TEXT", "system message for conversations that have none"),
        Option(
            "--assistant_only_loss",
            "BOOL",
            "if a completion has several turns, score only those of the assistant",
            "True",
        ),
        Option("--max_length", "TOKENS", "maximum length of a row; longer rows are truncated", "1024"),
    ],
    "labels": [
        Option(
            "--label_type",
            "{binary,continuous}",
            "binary: labels in [0, 1], such as thumbs; continuous: any number, higher is better",
            "binary",
        ),
        Option("--label_map", "NUMBERS", "numbers for labels that are words: up=1,down=0"),
        Option(
            "--label_transform", "STEPS", "how labels are transformed first, in steps separated by commas: {transforms}"
        ),
        Option(
            "--sft_threshold",
            "LABEL",
            "rows with a continuous label of at least this value, after the transform, are demonstrations",
            methods=_ULMA,
        ),
        Option("--desirable_weight", "W", "weight of rows with a label of 0.5 and above", "1.0"),
        Option("--undesirable_weight", "W", "weight of the other rows", "1.0"),
        Option(
            "--label_report",
            "BOOL",
            "save a report on the labels, and print its warnings; check prints all of it",
            "True",
        ),
    ],
    "method": [
        Option("--beta", "B", "β: a larger value keeps the model closer to the reference", "0.1"),
        Option(
            "--log_z",
            "NATS|NAME",
            "log-partition function: a number, or an estimate: column, prior, "
            "running_mean, batch_kl, learned_constant, learned, group",
            "0.0",
        ),
        Option("--log_z_learning_rate", "LR", "learning rate of a learned log Z", "0.01"),
        Option(
            "--binary_loss",
            "{cross_entropy,squared_error,kto}",
            "loss of compared rows with binary labels: pointwise DPO's, UNA's or KTO's",
            "cross_entropy",
        ),
        Option("--preset", "{qrpo,sppo,bco,una,kto}", "set the options of a published method"),
        Option("--length_normalize", "", "divide log-probabilities by the number of tokens of the completion"),
        Option("--sft_weight", "W", "weight of the SFT loss of demonstrations", "1.0", _ULMA),
        Option("--positive_loss", "{sft,pointwise_dpo,none}", "loss of demonstrations", "sft", _ULMA),
        Option("--negative_loss", "{pointwise_dpo,unlearning,none}", "loss of the other rows", "pointwise_dpo", _ULMA),
        Option(
            "--startup_checks", "BOOL", "check log-probabilities and reference on a few rows before training", "True"
        ),
    ],
    "model": [
        Option("--model", "MODEL", "model to train: the folder of a checkpoint, or a name on the Hub"),
        Option("--model_revision", "REVISION", "branch, tag or commit on the Hub", "main"),
        Option("--dtype", "{auto,bfloat16,float16,float32}", "number format of the weights", "float32"),
        Option("--attn_implementation", "NAME", "attention implementation, such as sdpa, eager or flash_attention_2"),
        Option("--trust_remote_code", "", "run code that comes with the model"),
        Option("--use_peft", "", "train a LoRA adapter instead of all weights"),
        Option("--lora_r", "R", "rank of the adapter", "16"),
        Option("--lora_alpha", "A", "scale of the adapter", "32"),
        Option("--lora_target_modules", "NAME …", "modules with an adapter, such as all-linear"),
        Option("--load_in_4bit", "", "quantize the base model; requires --use_peft"),
    ],
    "training": [
        Option("--output", "FOLDER", "folder for the model and its checkpoints"),
        Option("--learning_rate", "LR", "highest learning rate", "1e-06"),
        Option("--num_train_epochs", "N", "passes over the rows", "3.0"),
        Option("--max_steps", "N", "stop after this many steps, regardless of the epochs"),
        Option("--per_device_train_batch_size", "ROWS", "rows per micro-batch on each device", "8"),
        Option("--gradient_accumulation_steps", "N", "micro-batches per step", "1"),
        Option("--lr_scheduler_type", "NAME", "learning rate schedule", "linear"),
        Option("--warmup_steps", "N", "steps over which the learning rate rises", "0"),
        Option("--gradient_checkpointing", "BOOL", "save memory by computing activations twice", "True"),
        Option("--padding_free", "", "pack a micro-batch into one sequence without padding"),
        Option("--share_prompts", "", "compute each prompt of a micro-batch once for all of its rows"),
        Option(
            "--precompute_ref_log_probs", "", "compute the log-probabilities of the reference once, before training"
        ),
        Option("--bf16", "BOOL", "compute in bfloat16 (default: yes, if the device supports it)"),
        Option("--seed", "N", "random seed", "42"),
        Option("--logging_steps", "N", "steps between log lines, after that of the first step", "10"),
        Option("--report_to", "NAME", "tracker: tensorboard, trackio, wandb", "none"),
        Option("--save_strategy", "{no,steps,epoch,best}", "when checkpoints are saved", "steps"),
        Option("--save_steps", "N", "steps between checkpoints", "500"),
        Option("--resume_from_checkpoint", "True|FOLDER", "continue from the last checkpoint, or from this one"),
        Option("--push_to_hub", "", "upload the model to the Hub, see --hub_model_id"),
        Option("--hub_model_id", "NAME", "name of the model on the Hub"),
    ],
    "evaluation": [
        Option(
            "--eval_strategy",
            "{no,steps,epoch}",
            "when to evaluate; without a test split, 10% of the rows are held out by prompt",
            "no",
        ),
        Option("--eval_steps", "N", "steps between evaluations (default: --logging_steps)"),
        Option(
            "--test_split_size",
            "SIZE",
            "rows to hold out: a fraction, a number, or 0 for none (default: 0.1, or what 30 prompts need, up to 0.3)",
        ),
        Option("--per_device_eval_batch_size", "ROWS", "rows per batch on each device", "8"),
        Option("--load_best_model_at_end", "", "keep the checkpoint with the best --metric_for_best_model"),
        Option("--metric_for_best_model", "NAME", "such as eval_rewards/spearman (default: eval_loss)"),
    ],
    "launch": [
        Option("--config", "FILE", "read options from a YAML file; options on the command line take precedence"),
        Option(
            "--num_processes",
            "N",
            "number of processes, one per GPU; other options of accelerate launch are accepted, too",
        ),
        Option("--accelerate_config", "NAME", "single_gpu, multi_gpu, fsdp1, fsdp2, zero1, zero2, zero3, or a file"),
        Option("--verbose", "", "show all figures, the warnings of other libraries, and the tracebacks of errors"),
        Option("--help-all", "", "show all options, including those of TRL and transformers"),
    ],
}

TITLES = {
    "ulma": "Train with ULMA: imitate demonstrations, and learn from the ratings of all other answers.",
    "pointwise-dpo": "Train with pointwise DPO: learn from thumbs, votes and ratings, one answer at a time.",
    "check": "Dry run: check the rows and the settings, and show what would be trained. Nothing is written.",
}
NAMES = (
    "--model, --dataset and --output are also accepted as TRL's --model_name_or_path, --dataset_name and --output_dir. "
    "A BOOL is True or False. Options cannot be abbreviated."
)


def usage(command: str) -> str:
    """The usage of the command, without its name.

    Example:
        >>> usage("check")
        '--model MODEL --dataset DATA [options]'
    """
    return f"--model MODEL --dataset DATA {'' if command == 'check' else '--output FOLDER '}[options]"


def help_page(command: str, method: str | None = None) -> str:
    """The page of `trl-ulma ulma`, `trl-ulma pointwise-dpo` or `trl-ulma check`, as wide as the terminal.

    Args:
        command: the name of the command.
        method: for check, the training command whose options are shown.
    """
    width = terminal_width()
    method = command if command in ("ulma", "pointwise-dpo") else method or "ulma"
    line = f"usage: trl-ulma {command} {usage(command)}"
    lines = [*textwrap.wrap(line, width, subsequent_indent=" " * 7), "", *textwrap.wrap(TITLES[command], width)]
    for title, options in GROUPS.items():
        shown = [option for option in options if method in option.methods]
        if command == "check":
            shown = [option for option in shown if option.name != "--output"]
            if title == "method":
                choice = "the training command whose options are checked"
                default = "suggested for the rows, with other settings; ulma with --config"
                shown = [Option("--method", "{ulma,pointwise-dpo}", choice, default), *shown]
        lines += ["", f"{title}:"]
        for option in shown:
            lines += _rendered(option, width)
    return "\n".join([*lines, "", *textwrap.wrap(NAMES, width)])


def _rendered(option: Option, width: int) -> Iterator[str]:
    name = f"  {option.name} {option.value}".rstrip()
    text = option.text
    if "{transforms}" in text:
        from trl_ulma.labels.transforms import TRANSFORMS

        text = text.replace("{transforms}", ", ".join(TRANSFORMS))
    if option.default is not None:
        text += f" (default: {option.default})"
    first, *rest = textwrap.wrap(text, width - _NAME_WIDTH, break_on_hyphens=False)
    if len(name) < _NAME_WIDTH - 1:
        yield f"{name:<{_NAME_WIDTH}}{first}"
    else:
        yield name
        yield f"{'':<{_NAME_WIDTH}}{first}"
    for line in rest:
        yield f"{'':<{_NAME_WIDTH}}{line}"
