"""The command line: commands, options, YAML files, launches, and whole runs."""

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import accelerate
import numpy as np
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset, DatasetDict
from forks import HAS_FSDP2, python_path
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from trl_ulma import __version__
from trl_ulma.checkpoints import last_whole
from trl_ulma.ranking import auc, spearman
from trl_ulma.scripts import cli, pointwise_dpo, ulma
from trl_ulma.scripts.cli import COMMANDS, main
from trl_ulma.scripts.training import _least_told_apart, last_checkpoint_or, load_splits

NEEDED = ["--model_name_or_path", "some-model", "--dataset_name", "org/rows"]
SCRIPTS = {"ulma": ulma, "pointwise-dpo": pointwise_dpo}


def as_yaml(tmp_path, settings) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return str(file)


def error_of(capsys, argv) -> str:
    """The one line that a command with a wrong option prints."""
    capsys.readouterr()
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("trl-ulma")]
    assert len(errors) == 1
    assert lines[-1] == errors[0]
    assert "Traceback" not in lines
    return errors[0]


@pytest.fixture
def launched(monkeypatch):
    """What `accelerate launch` would have been given, on a machine with two GPUs."""
    calls = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", calls.append)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    return calls


@pytest.fixture
def pairs(tmp_path) -> str:
    file = tmp_path / "pairs.jsonl"
    rows = [
        {
            "chosen": f"\n\nHuman: What is {i}?\n\nAssistant: It is a number.",
            "rejected": f"\n\nHuman: What is {i}?\n\nAssistant: It is a cat.",
        }
        for i in range(20)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


# The commands


def test_help_needs_no_torch_and_is_fast():
    code = (
        "import sys; from trl_ulma.scripts.cli import main; code = main(['--help']); "
        "assert not {'torch', 'transformers', 'datasets', 'trl'} & set(sys.modules); sys.exit(code)"
    )
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 2
    for name, (_, what, example) in COMMANDS.items():
        assert name in run.stdout
        assert what in " ".join(run.stdout.split())  # wrapped
        assert f"    $ {example}\n" in run.stdout
        assert f"{example} ".startswith(f"trl-ulma {name} ")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trl-ulma {__version__}\n"


def test_no_command_is_answered_with_the_help(capsys):
    assert main([]) == 2
    assert "usage: trl-ulma COMMAND [options]" in capsys.readouterr().err


def test_an_unknown_command_is_named_with_the_nearest(capsys):
    assert error_of(capsys, ["ulms"]) == "trl-ulma: error: ulms is not a command. Did you mean ulma?"
    assert error_of(capsys, ["frobnicate", "--help"]) == (
        f"trl-ulma: error: frobnicate is not a command. The commands are {', '.join(COMMANDS)}."
    )


def test_the_demo_gets_its_own_options(monkeypatch):
    class Demo:
        seen: list

        @classmethod
        def main(cls, argv):
            cls.seen = argv
            return 3

    monkeypatch.setitem(sys.modules, "trl_ulma.scripts.demo", Demo)
    assert main(["demo", "--tiny"]) == 3
    assert Demo.seen == ["--tiny"]


def test_an_interrupt_is_no_traceback(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_ulma.scripts.training.launch", interrupted)
    assert main(["ulma", *NEEDED]) == 130


def test_the_module_runs_as_the_command():
    run = subprocess.run([sys.executable, "-m", "trl_ulma", "ulms"], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (2, "trl-ulma: error: ulms is not a command. Did you mean ulma?\n")


@pytest.mark.parametrize("command", SCRIPTS)
def test_help_of_a_training_command_leaves_out_what_is_for_pairs_only(capsys, command):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    usage = f"usage: trl-ulma {command} --model MODEL --dataset DATA --output FOLDER [options]"
    assert usage in " ".join(text.split())  # wrapped
    for shown in (
        "--label_type",
        "--desirable_weight",
        "--beta",
        "--use_peft",
        "--dataset_name",
        "--accelerate_config",
    ):
        assert shown in text
    for hidden in ("--loss_type", "--ld_alpha", "--label_smoothing ", "--f_divergence_type", "--discopop_tau"):
        assert hidden not in text
    assert ("--sft_threshold" in text) == (command == "ulma")


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_script_begins_with_its_command(command):
    assert f"trl-ulma {command} " in (SCRIPTS[command].__doc__ or "")


# Wrong options on the command line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bets", "0.2"], "--bets is not an option. Did you mean --beta?"),
        (["--bets=0.2"], "--bets is not an option. Did you mean --beta?"),
        (["--num_train", "1"], "--num_train is not an option. Did you mean --num_train_epochs?"),
        (["--learning-rat=1"], "--learning-rat is not an option. Did you mean --learning_rate?"),
        (["--use_pef"], "--use_pef is not an option. Did you mean --use_peft?"),
        (["--num_proc", "2"], "--num_proc is not an option. Did you mean --num_processes?"),
        (["--conf", "run.yaml"], "--conf is not an option. Did you mean --config or --config_file?"),
        (["--module"], "--module is not an option. Did you mean --model?"),
        (["stray"], "stray is not an option. See trl-ulma ulma --help."),
        (["--beta", "0.1", "0.2"], "0.2 is not an option. See trl-ulma ulma --help."),
        (["-x"], "-x is not an option. See trl-ulma ulma --help."),
        (["--multi_gpu", "2"], "--multi_gpu takes no value; got '2'."),
        (["--multi_gpu=yes"], "--multi_gpu takes no value; got 'yes'."),
        (["--num_processes"], "--num_processes needs a value."),
        (["--num_processes", "--use_peft"], "--num_processes needs a value."),
        (["--num_processes", "two"], "argument --num_processes: invalid int value: 'two'"),
        (
            ["--accelerate_config", "zero9"],
            "Accelerate config zero9 is neither a file nor a valid config in the `trl` ",
        ),
        (["--beta", "high"], "argument --beta: invalid float value: 'high'"),
        (["--beta", "-1"], "--beta must be above 0; got -1.0."),
        (["--label_type", "odd"], "argument --label_type: invalid choice: 'odd'"),
        (["--loss_type", "ipo"], "loss_type=['ipo'] is a setting of pairwise losses"),
        (["--config"], "--config needs the name of a YAML file."),
        (["--config", "a.yaml", "--config=b.yaml"], "--config is given twice. Put all options in one file."),
        (["--config", "/nowhere/run.yaml"], "--config: There is no file or folder /nowhere/run.yaml (looked in /)."),
    ],
)
def test_a_wrong_option_is_an_error_that_names_it(capsys, launched, argv, message):
    assert error_of(capsys, ["ulma", *NEEDED, *argv]).startswith(f"trl-ulma ulma: error: {message}")
    assert not launched


def test_the_other_command_has_its_own_options(capsys):
    error = error_of(capsys, ["pointwise-dpo", *NEEDED, "--sft_weight", "1"])
    assert error.startswith("trl-ulma pointwise-dpo: error: --sft_weight is not an option.")


def test_a_model_and_data_are_needed(capsys, launched):
    assert "--model is missing: a checkpoint's folder" in error_of(capsys, ["ulma", *NEEDED[2:]])
    assert "--dataset is missing: a file, a folder or a name on the Hub" in error_of(capsys, ["ulma", *NEEDED[:2]])
    assert "--bets is not an option" in error_of(capsys, ["ulma", "--bets", "1"])
    assert not launched


# Wrong options in the YAML file


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bets": 0.2}, "bets is not an option. Did you mean beta?"),
        ({"num_train": 1}, "num_train is not an option. Did you mean num_train_epochs?"),
        ({"learning-rate": 1}, "learning-rate is not an option. Did you mean learning_rate?"),
        ({"num_proc": 2}, "num_proc is not an option. Did you mean num_processes?"),
        ({"help": True}, "help is not an option. See"),
        ({"module": True}, "module is not an option. Did you mean model?"),
        ({"config": "other.yaml"}, "config is not an option. Did you mean config_file?"),
        ({"beta": "high"}, "beta is 'high'; it must be a number."),
        ({"beta": None}, "beta is None; it must be a number."),
        ({"beta": [0.1]}, "beta is [0.1]; it must be a number."),
        ({"beta": True}, "beta is True; it must be a number."),
        ({"max_steps": "many"}, "max_steps is 'many'; it must be a whole number."),
        ({"max_steps": 1.5}, "max_steps is 1.5; it must be a whole number."),
        ({"use_peft": "perhaps"}, "use_peft is 'perhaps'; it must be true or false."),
        ({"output_dir": ["out"]}, "output_dir is ['out']; it must be text or null."),
        ({"lora_target_modules": {"q": 1}}, "lora_target_modules is {'q': 1}; it must be a list (text each) or null."),
        ({"loss_weights": ["a"]}, "loss_weights is ['a']; it must be a list (a number each) or null."),
        ({"label_type": "odd"}, "label_type is 'odd'; it must be one of binary, continuous."),
        ({"eval_strategy": "never"}, "eval_strategy is 'never'; it must be one of no, steps, epoch."),
        ({"multi_gpu": 2}, "multi_gpu is 2; it must be true or false."),
        ({"datasets": ["a"]}, "datasets is ['a']; it must be a list of datasets, each with a `path`."),
        (
            {"datasets": [{"pth": "a"}]},
            "datasets, entry 1, has no `path`: a file, a folder, a builder (json) or a hub name.",
        ),
        (
            {"datasets": [{"path": "a"}, {"path": "a", "clumns": ["b"]}]},
            "datasets, entry 2: clumns is not an option. Did you mean columns?",
        ),
        ({"datasets": [{"path": "a", "split": 3}]}, "datasets, entry 1: split is 3; it must be text."),
    ],
)
def test_a_wrong_yaml_value_is_an_error_that_names_it(capsys, launched, tmp_path, settings, message):
    file = as_yaml(tmp_path, settings)
    error = error_of(capsys, ["ulma", *NEEDED, "--config", file])
    assert error.startswith(f"trl-ulma ulma: error: {file}: {message}")
    assert not launched


def test_a_launch_option_of_the_wrong_type_in_yaml(capsys, launched, tmp_path):
    file = as_yaml(tmp_path, {"num_processes": "two"})
    assert "argument --num_processes: invalid int value: 'two'" in error_of(capsys, ["ulma", *NEEDED, "--config", file])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: }", "run.yaml"),
        ("just text", "must contain a YAML mapping"),
        ("env: 3", "`env` field should be a dict"),
    ],
)
def test_a_file_that_is_no_list_of_options(capsys, tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    assert message in error_of(capsys, ["ulma", *NEEDED, "--config", str(tmp_path / "run.yaml")])


def test_a_misspelt_file_is_answered_with_the_nearest(capsys, tmp_path):
    as_yaml(tmp_path, {})
    error = error_of(capsys, ["ulma", *NEEDED, "--config", str(tmp_path / "rum.yaml")])
    assert f"Did you mean {tmp_path / 'run.yaml'}?" in error


def test_missing_files_are_all_named_before_anything_large_is_imported(tmp_path):
    (tmp_path / "ratings.csv").write_text("prompt,completion,label\nHi,Hello,1\n")
    (tmp_path / "run.yaml").write_text("model: typo/\ndataset: rating.csv\n")
    code = (
        "import sys; from trl_ulma.scripts.cli import main; "
        "print(main(sys.argv[1:]), [name for name in ('torch', 'trl', 'datasets') if name in sys.modules])"
    )
    lost = "--dataset: There is no file or folder rating.csv"
    for words, named in (
        (["ulma", "--config", "run.yaml"], [lost, "--model: There is no file or folder typo"]),
        (["check", "--config=run.yaml", "--model", "org/m"], [lost]),
        (
            ["check", "--config=rum.yaml", "--model", "./m"],
            ["--config: There is no file or folder rum.yaml", "--model"],
        ),
        (["evaluate", "--model", "a=typo/", "--dataset=rating.csv"], ["--model: There is", lost]),
        (["score", "--model", "m", "--ref-model", "./m", "--dataset", "ratings.csv"], ["--ref_model: There is no"]),
        (["prepare", "kto", "--input", "rating.csv"], [lost]),
        (["ulma", "--resume-from-checkpoint", "out/9"], ["--resume_from_checkpoint: There is no file or folder out/9"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": python_path()},
        )
        assert done.stdout == f"{2 if '--config: ' in done.stderr else 1} []\n", done
        said = done.stderr.splitlines()
        assert len(said) == len(named)
        assert all(any(f"error: {each}" in line for line in said) for each in named)


def test_names_on_the_hub_and_files_beside_a_mixture_are_not_looked_for(tmp_path):
    (tmp_path / "run.yaml").write_text("datasets: [{path: org/rows}]\ndataset: none.csv\n")
    words = ["--model", "org/m", "--ref_model", "served:a/b/c/d", "--config", str(tmp_path / "run.yaml")]
    assert cli._missing_paths("ulma", words) == []
    assert cli._missing_paths("env", []) == []
    assert cli._missing_paths("prepare", ["--config", "none.csv", "--dataset", "org/rows"]) == []
    assert cli._missing_paths("ulma", ["--resume_from_checkpoint", "True", "--columns", "dataset=a.csv"]) == []


# What is read from options


def test_yaml_values_are_read_as_on_the_command_line(tmp_path):
    file = as_yaml(
        tmp_path,
        {
            "learning_rate": "1e-5",  # which YAML takes for text
            "save_strategy": False,  # which is how YAML reads `no`
            "resume_from_checkpoint": True,
            "run_name": 5,
            "warmup_steps": 3,
            "use_peft": "yes",
            "lora_target_modules": "all-linear",
            "loss_type": "sigmoid",
            "pad_to_multiple_of": 8,
            "report_to": ["none"],
            "model_init_kwargs": {"attn_implementation": "eager"},
            "dtype": "bfloat16",
            "beta": 0.3,
            "num_processes": 2,
            "datasets": [{"path": "json", "data_files": "a.jsonl"}],
        },
    )
    script_args, training_args, model_args, dataset_args = ulma.make_parser().parse_settings(
        ["--model_name_or_path", "m", f"--config={file}", "--beta=0.2", "--lora-r", "4"]
    )
    assert training_args.learning_rate == 1e-5
    assert training_args.save_strategy == "no"
    assert last_checkpoint_or(training_args.resume_from_checkpoint) is True
    assert training_args.run_name == "5"
    assert training_args.warmup_steps == 3
    assert training_args.loss_type == ["sigmoid"]
    assert training_args.pad_to_multiple_of == 8
    assert training_args.model_init_kwargs == {"attn_implementation": "eager"}
    assert training_args.beta == 0.2
    assert (model_args.use_peft, model_args.lora_target_modules, model_args.lora_r) == (True, "all-linear", 4)
    assert model_args.dtype == "bfloat16"
    assert dataset_args.datasets[0].data_files == "a.jsonl"
    assert script_args.dataset_name is None


def test_a_script_that_is_run_by_hand_takes_no_launch_options(capsys):
    with pytest.raises(SystemExit):
        ulma.make_parser().parse_settings([*NEEDED, "--num_processes", "2"])
    assert "--num_processes is an option of accelerate launch: give it before the script" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("True", True),
        ("true", True),
        (True, True),
        ("False", None),
        (None, None),
        ("out/checkpoint-2", "out/checkpoint-2"),
    ],
)
def test_resume_from_checkpoint(given, taken):
    assert last_checkpoint_or(given) is taken


# The launch


def test_options_are_told_apart_for_the_launch(launched, tmp_path):
    file = as_yaml(
        tmp_path, {"accelerate_config": "zero2", "num_processes": 4, "cpu": True, "multi_gpu": False, "seed": 1}
    )
    argv = [*NEEDED, f"--config={file}", "--num-processes=2", "--lora_target_modules", "a", "b", "--log_z", "-2"]
    assert main(["ulma", *argv, "--accelerate_config", "zero3", "--use_peft", "--main_process_port", "2"]) == 0
    (args,) = launched
    assert args.module
    assert args.quiet
    assert args.cpu
    assert not args.multi_gpu
    assert args.num_processes == 2
    assert args.main_process_port == 2
    assert Path(args.config_file).name == "zero3.yaml"
    assert args.training_script == "trl_ulma.scripts.ulma"
    assert args.training_script_args == [
        *(*NEEDED, "--config", file, "--lora_target_modules", "a", "b", "--log_z", "-2", "--use_peft")
    ]
    ulma.make_parser().parse_settings(args.training_script_args)  # the YAML's launch options are no error there


def test_fsdp2_is_refused_if_accelerate_does_not_have_it(launched, monkeypatch, capsys):
    argv = ["ulma", *NEEDED, "--accelerate_config", "fsdp2"]
    if HAS_FSDP2:
        assert main(argv) == 0
        assert len(launched) == 1

        class Older(argparse.Namespace):
            """accelerate before 1.6, which takes any key in the file, has no such option."""

            def __getattribute__(self, name):
                if name == "fsdp_version":
                    raise AttributeError(name)
                return super().__getattribute__(name)

        def older():
            parser = launch_command_parser()
            monkeypatch.setattr(parser, "parse_args", partial(parser.parse_args, namespace=Older()))
            return parser

        monkeypatch.setattr("accelerate.commands.launch.launch_command_parser", older)
    launched.clear()
    assert main(argv) == 2
    assert not launched
    said = capsys.readouterr().err
    assert f"fsdp2.yaml sets fsdp_version: 2, but accelerate {accelerate.__version__} only has FSDP1. Install " in said
    assert main([*argv[:-1], "fsdp1"]) == 0


def test_the_launch_names_no_space_for_trackio(launched, monkeypatch):
    for before in (None, "own"):
        # TRL before 1.0 sets the variable when its command line is imported
        for name in [name for name in sys.modules if name.startswith(("trl.cli", "trl.scripts."))]:
            monkeypatch.delitem(sys.modules, name)
        if before is None:
            monkeypatch.delenv("TRACKIO_SPACE_ID", raising=False)
        else:
            monkeypatch.setenv("TRACKIO_SPACE_ID", before)
        assert main(["ulma", *NEEDED]) == 0
        assert os.environ.get("TRACKIO_SPACE_ID") == before
    assert len(launched) == 2


@pytest.mark.parametrize("command", SCRIPTS)
def test_each_command_launches_its_module(launched, command):
    assert main([command, *NEEDED]) == 0
    module = launched[0].training_script
    assert importlib.import_module(module) is SCRIPTS[command]


@pytest.mark.parametrize("command", SCRIPTS)
@pytest.mark.parametrize("reason", ["nothing", "an option", "a file", "two GPUs"])
def test_a_training_without_a_reason_for_a_launch_runs_in_the_commands_process(
    launched, monkeypatch, tmp_path, command, reason
):
    """`accelerate launch` would import everything again, and allow one CPU thread."""
    ran = []
    monkeypatch.setattr(SCRIPTS[command], "main", lambda *settings: ran.append(settings))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2 if reason == "two GPUs" else 1)
    file = tmp_path / "default_config.yaml"
    monkeypatch.setattr("accelerate.commands.config.default_config_file", str(file))
    if reason == "a file":
        # accelerate 1.4 needs the first two
        file.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 1\n")
    option = ["--num_processes", "1"] if reason == "an option" else []
    assert main([command, *NEEDED, *option, "--beta", "0.3"]) == 0
    assert (len(ran), len(launched)) == ((1, 0) if reason == "nothing" else (0, 1))
    for script_args, training_args, model_args, _ in ran:
        assert [model_args.model_name_or_path, script_args.dataset_name] == NEEDED[1::2]
        assert training_args.beta == 0.3


@pytest.mark.parametrize(("stop", "code"), [(1, 1), (7, 7), ("text", 1)])
def test_the_launch_exit_code_is_returned(monkeypatch, stop, code):
    def fail(args):
        raise SystemExit(stop)

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    assert main(["ulma", *NEEDED, "--num_processes", "1"]) == code


def test_a_folder_of_the_package_name_does_not_hide_the_package(monkeypatch, tmp_path):
    """A clone in the working directory is such a folder. The launched process imports what is installed."""
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", python_path())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trl_ulma").mkdir()
    (tmp_path / "trl_ulma" / "__init__.py").write_text("raise ImportError('the wrong folder')\n")
    found = []

    def run(args):
        command = [sys.executable, "-m", "trl_ulma", "--version"]
        found.append(subprocess.run(command, capture_output=True, text=True, check=False))

    monkeypatch.setattr("accelerate.commands.launch.launch_command", run)
    assert main(["ulma", *NEEDED, "--num_processes", "1"]) == 0
    assert (found[0].stdout, found[0].stderr) == (f"trl-ulma {__version__}\n", "")
    assert "PYTHONSAFEPATH" not in os.environ


def test_a_failing_process_among_many_is_told_without_a_traceback(monkeypatch, capsys):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def fail(args):
        raise ChildFailedError("trl_ulma.scripts.ulma", {0: ProcessFailure(0, 123, 5, "/nowhere")})

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
    assert main(["ulma", *NEEDED, "--num_processes", "2"]) == 5
    assert "trl_ulma.scripts.ulma FAILED" in capsys.readouterr().err


# The data


def settings_of(*argv):
    script_args, training_args, _, dataset_args = ulma.make_parser().parse_settings(
        ["--model_name_or_path", "m", *argv]
    )
    return script_args, training_args, dataset_args


def test_no_evaluation_takes_no_split(pairs):
    train, evaluation, said = load_splits(*settings_of("--dataset_name", pairs))
    assert (len(train), evaluation, said) == (20, None, "")


@pytest.mark.parametrize(
    ("argv", "held_out"),
    [
        (["--eval_strategy", "steps"], 2),
        (["--eval_strategy", "epoch", "--test_split_size", "0.25"], 5),
        (["--do_eval", "--test_split_size", "3"], 3),
        (["--test_split_size", "0.5"], 10),
    ],
)
def test_evaluation_without_a_test_split_takes_a_seeded_one(pairs, argv, held_out):
    train, evaluation, said = load_splits(*settings_of("--dataset_name", pairs, *argv, "--seed", "7"))
    assert (len(train), len(evaluation)) == (20 - held_out, held_out)
    assert not set(train["chosen"]) & set(evaluation["chosen"])
    assert said.startswith(
        f"{pairs} has no test split, so {held_out} of its 20 rows are held out for evaluation, by prompt (seed 7).\n"
    )
    assert " too few to conclude anything from an evaluation. Rate answers to more prompts: 30 held-out ones" in said
    again = load_splits(*settings_of("--dataset_name", pairs, *argv, "--seed", "7"))[1]
    assert again["chosen"] == evaluation["chosen"]


def test_a_test_split_is_taken_as_it_is(tmp_path):
    rows = Dataset.from_dict({"prompt": list("abc"), "completion": list("abc"), "label": [True] * 3})
    DatasetDict(train=rows, test=rows.select([0]), other=rows.select([0, 1])).save_to_disk(tmp_path / "rows")
    name = ["--dataset_name", str(tmp_path / "rows")]
    train, evaluation, said = load_splits(*settings_of(*name, "--eval_strategy", "steps"))
    assert (len(train), len(evaluation)) == (3, 1)
    assert said.startswith(
        "1 of 1 row has a prompt in the split 'test' that is also trained on. Figures on them do not"
    )
    apart = DatasetDict(train=rows.select([0, 1]), test=rows.select([2]), validation=rows.select([2]))
    apart.save_to_disk(tmp_path / "apart")
    assert load_splits(*settings_of("--dataset_name", str(tmp_path / "apart"), "--eval_strategy", "steps"))[2] == ""
    del apart["test"]
    apart.save_to_disk(tmp_path / "validated")
    said = load_splits(*settings_of("--dataset_name", str(tmp_path / "validated"), "--eval_strategy", "steps"))[2]
    assert "Its split 'validation' is not used; --dataset_test_split validation evaluates on it." in said
    other = ["--dataset_train_split", "test", "--dataset_test_split", "other", "--eval_strategy", "steps"]
    train, evaluation, _ = load_splits(*settings_of(*name, *other))
    assert (len(train), len(evaluation)) == (1, 2)
    streamed = load_splits(*settings_of(*name, "--eval_strategy", "steps", "--dataset_streaming", "--max_steps", "1"))
    assert [len(list(each)) for each in streamed[:2]] == [3, 1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset_train_split", "training"], r"has no split 'training', but train\. Set --dataset_train_split"),
        (
            ["--dataset_test_split", "validation", "--eval_strategy", "steps"],
            r"has no split 'validation', but train\. Set --dataset_test_split to one of them",
        ),
        (
            ["--dataset_streaming", "--eval_strategy", "steps", "--max_steps", "1"],
            r"has no test split, but train, and rows that are streamed cannot be split\. Set --dataset_test_split",
        ),
        (["--test_split_size", "1.5"], r"test_split_size is 1\.5; it must be a fraction between 0 and 1"),
    ],
)
def test_a_split_that_is_not_there(pairs, argv, message):
    with pytest.raises(ValueError, match=message):
        load_splits(*settings_of("--dataset_name", pairs, *argv))


def test_a_mixture_is_split_by_prompt_with_the_seed(tmp_path, pairs):
    mixture = {
        "datasets": [{"path": "json", "data_files": pairs, "columns": ["chosen", "rejected"]}] * 2,
        "test_split_size": 0.2,
        "eval_strategy": "steps",
    }
    argv = ["--config", as_yaml(tmp_path, mixture), "--dataset_name", "unread.jsonl"]
    train, evaluation, said = load_splits(*settings_of(*argv))
    assert (len(train), len(evaluation)) == (32, 8)
    assert not set(train["chosen"]) & set(evaluation["chosen"])
    assert load_splits(*settings_of(*argv))[1]["chosen"] == evaluation["chosen"]
    assert said.splitlines() == [
        "The mixture `datasets` is trained on; dataset_name=unread.jsonl is not read.",
        "the mixture has no test split, so 8 of its 40 rows are held out for evaluation, by prompt (seed 42).",
        "The held-out rows have 4 prompts, too few to conclude anything from an evaluation. Rate answers to more "
        "prompts: 30 held-out ones are enough. With about 60 prompts, 40 more than now, --test_split_size 0.5 "
        "holds out so many.",
    ]


@pytest.mark.parametrize(
    ("prompts", "held_out", "advice"),
    [
        (400, 40, ""),
        (300, 30, ""),
        (290, 43, ""),
        (120, 30, ""),
        (100, 30, ""),
        (99, 10, "have 10 prompts, too few .* Add --test_split_size 0.35 to the training command"),
        (70, 7, "have 7 prompts, too few .* Add --test_split_size 0.45 to the training command"),
        (
            60,
            6,
            "have 6 prompts, too few .* Add --test_split_size 0.5 to the training command, which holds out 30 ",
        ),
        (
            50,
            5,
            "have 5 prompts, too few .* Add --test_split_size 0.6 .* 30 prompts and trains on 40 rows, or rate",
        ),
        (40, 4, "have 4 prompts, too few .* With about 60 prompts, 20 more than now, --test_split_size 0.5 holds"),
    ],
)
def test_too_few_held_out_prompts_are_told_with_what_to_do(tmp_path, prompts, held_out, advice):
    rows = [{"prompt": f"{i}", "completion": text, "label": text == "a"} for i in range(prompts) for text in "ab"]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    test, said = load_splits(*settings_of("--dataset_name", str(file), "--do_eval"))[1:]
    assert len(set(test["prompt"])) == held_out
    assert re.search(advice, said)
    if size := re.search(r"--test_split_size (0\.\d+) to the", said):
        words = ["--dataset_name", str(file), "--do_eval", "--test_split_size", size[1]]
        assert "too few" not in load_splits(*settings_of(*words))[2]
    assert ("too few" in said) == bool(advice)


@pytest.mark.parametrize("seed", range(6))
def test_more_prompts_are_asked_for_only_if_half_of_them_are_too_few(tmp_path, seed):
    # Prompts of one to ten rows: the held-out rows can be few prompts by chance
    rows = [{"prompt": f"{i}", "completion": f"{k}", "label": k % 2} for i in range(62) for k in range(1 + i * i % 11)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--dataset_name", str(file), "--do_eval", "--seed", str(seed)]
    said = load_splits(*settings_of(*words))[2]
    assert "too few" in said
    size = re.search(r"--test_split_size (0\.\d+) to the", said)
    again = load_splits(*settings_of(*words, "--test_split_size", size[1] if size else "0.5"))[2]
    assert ("too few" in again) == (size is None)


def test_a_streamed_mixture_has_nothing_to_split(tmp_path, pairs):
    mixture = {"datasets": [{"path": "json", "data_files": pairs}], "streaming": True, "max_steps": 1}
    train, evaluation, _ = load_splits(*settings_of("--config", as_yaml(tmp_path, mixture)))
    assert (len(list(train)), evaluation) == (20, None)
    with pytest.raises(ValueError, match=r"the mixture has no test split, but train, and rows that are streamed"):
        load_splits(*settings_of("--config", as_yaml(tmp_path, {**mixture, "eval_strategy": "steps"})))


# Whole runs


def run_here(script, *argv):
    script.main(*script.make_parser().parse_settings([*argv, "--report_to", "none"]))


def launch(*argv):
    return subprocess.run(
        [sys.executable, "-m", "trl_ulma", *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@dataclass
class WholeRuns:
    """A run from a YAML file in the command's process, and its resumption by `accelerate launch` with `--verbose`."""

    out: Path
    rows: Path
    quiet: subprocess.CompletedProcess
    resumed: subprocess.CompletedProcess


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory, tiny_llama) -> WholeRuns:
    folder = tmp_path_factory.mktemp("whole")
    out, rows = folder / "out", folder / "rows.csv"
    answers = ("A number.,1", "A cat.,0")
    lines = [f"What is {i}?,{answer}" for i in range(10) for answer in answers]
    rows.write_text("\n".join(["prompt,completion,label", *lines, ""]))
    file = as_yaml(
        folder,
        {
            "model_name_or_path": tiny_llama,
            "dataset_name": str(rows),
            "output_dir": str(out),
            "use_peft": True,
            "lora_r": 2,
            "learning_rate": 0.01,
            "max_steps": 2,
            "logging_steps": 1,
            "save_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "per_device_train_batch_size": 4,
            "report_to": "none",
        },
    )
    quiet = launch("ulma", "--config", file)
    more = ["--max_steps", "3", "--resume_from_checkpoint", "true", "--save_steps=1", "--verbose"]
    more += ["--num_processes", "1", "--cpu"]
    return WholeRuns(out, rows, quiet, launch("ulma", "--config", file, *more))


def test_a_run_from_yaml_with_lora_and_its_resumption(whole_runs):
    out, run, resumed = whole_runs.out, whole_runs.quiet, whole_runs.resumed
    assert run.returncode == 0, run.stderr
    assert "%|" not in run.stderr  # no progress bars in files
    assert (
        f"{whole_runs.rows} has no test split, so 2 of its 20 rows are held out for evaluation, by prompt (seed 42)"
        in run.stdout
    )
    assert re.search(r"^Step 1 of 2: loss [\d.]+, loss/sft [\d.]+, .*learning_rate 0\.01$", run.stdout, re.MULTILINE)
    assert "loss/preference" not in run.stdout
    assert "'loss/preference': " in resumed.stdout  # with --verbose
    logged = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert "loss/preference" in logged[0]
    # The run evaluates at its last step. That is not repeated, and printed once.
    assert run.stdout.count("Evaluation at step 2 of 2: eval_loss") == 1
    assert f"The model is in {out}. {out}/README.md shows how to load it in Python.\n" in run.stdout
    card = (out / "README.md").read_text()
    assert "model = AutoPeftModelForCausalLM.from_pretrained(" in card
    assert 'dtype="float32"' in card
    assert "eval_loss" in json.loads((out / "eval_results.json").read_text())
    AutoPeftModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)

    assert resumed.returncode == 0, resumed.stderr
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"] if "loss" in log] == [1, 2, 3]
    assert not (out / "checkpoint-1").exists()  # two of the three steps came from the checkpoint


def test_a_whole_run_says_nothing_of_other_libraries_unless_it_is_asked_to(whole_runs):
    noise = (
        "FutureWarning",
        "were not passed to `accelerate launch`",
        "pin_memory",
        "gemm_4bit_forward",
        "UserWarning",
    )
    said = whole_runs.quiet.stdout + whole_runs.quiet.stderr
    assert not [each for each in noise if each in said]
    # What is ours stays
    assert said.count("files become conversations") == 1  # of two datasets
    assert "Labels of the train dataset" in said
    verbose = whole_runs.resumed
    assert "were not passed to `accelerate launch`" in verbose.stdout + verbose.stderr
    # Older versions of transformers do not deprecate an option that TRL sets
    deprecates = hasattr(TrainingArguments, "activation_checkpointing")
    assert ("FutureWarning" if deprecates else "UserWarning") in verbose.stderr


def test_ctrl_c_ends_a_run_with_a_checkpoint_and_no_model(tmp_path, tiny_gpt2, pairs):
    out = tmp_path / "out"
    options = ["--model_name_or_path", tiny_gpt2, "--dataset_name", pairs, "--output_dir", str(out)]
    options += ["--max_steps", "100000", "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none"]
    printed = tmp_path / "printed"
    command = [sys.executable, "-m", "trl_ulma", "ulma", *options]
    with (
        printed.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True) as process,
    ):
        while ": loss " not in printed.read_text():  # until a step is done
            assert process.poll() is None, printed.read_text()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.returncode == 130
    said = printed.read_text()
    assert "Traceback" not in said
    assert "Interrupted: saving step" in said
    assert "The model is in" not in said
    assert last_whole(out) is not None
    assert not (out / "model.safetensors").exists()


def test_point_wise_rows_from_a_csv_file(tmp_path, tiny_gpt2, capsys):
    rows = tmp_path / "thumbs.csv"
    rows.write_text("prompt,completion,label\n" + "".join(f"What is {i}?, A number.,{i % 2}\n" for i in range(8)))
    out = tmp_path / "out"
    argv = [
        "--model_name_or_path",
        tiny_gpt2,
        "--dataset_name",
        str(rows),
        "--output_dir",
        str(out),
        "--max_steps",
        "1",
    ]
    run_here(pointwise_dpo, *argv, "--ignore_bias_buffers")
    assert f"The model is in {out}. {out}/README.md shows how to load it in Python.\n" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(out)
    assert not (out / "eval_results.json").exists()


def test_conversations_are_streamed(tmp_path, tiny_llama, capsys):
    rows = tmp_path / "rows.json"
    message = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]}
    rows.write_text(json.dumps([{**message, "label": i % 2 == 0} for i in range(8)]))
    argv = ["--model_name_or_path", tiny_llama, "--dataset_name", str(rows), "--output_dir", str(tmp_path / "out")]
    run_here(ulma, *argv, "--dataset_streaming", "--max_steps", "2")
    assert "The model is in" in capsys.readouterr().out


def test_data_that_cannot_be_read_ends_the_run_in_one_line(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{oops}")
    with pytest.raises(SystemExit, match=r"error: .*rows\.jsonl is invalid JSON in line 1, column 2"):
        run_here(ulma, "--model_name_or_path", "m", "--dataset_name", str(rows))


@pytest.mark.parametrize("prompts", [30, 120])
@pytest.mark.parametrize("label_type", ["continuous", "binary"])
def test_the_least_figure_that_is_told_from_chance_is_that_of_chance(prompts, label_type):
    said = _least_told_apart(prompts, prompts, label_type)
    random = np.random.default_rng(0)
    label = np.arange(prompts) % 2 if label_type == "binary" else random.normal(size=prompts)
    figure = auc if label_type == "binary" else spearman
    chance = [float(figure(random.normal(size=prompts), label > 0.5 if figure is auc else label)) for _ in range(4000)]
    least = float(re.search(r"below about ([\d.]+) can be chance\.$", said)[1])
    assert least == pytest.approx(np.quantile(chance, 0.975), abs=0.02)


@pytest.mark.parametrize("prompts", [29, 200])
def test_nothing_is_said_of_few_prompts_or_many(prompts):
    assert _least_told_apart(prompts, 100, "continuous") == ""


def test_real_transcripts_as_they_are(shared_data, tmp_path, tiny_gpt2, capsys):
    argv = ["--model_name_or_path", tiny_gpt2, "--dataset_name", str(shared_data / "hh_harmless.jsonl.gz")]
    argv += ["--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--logging_steps", "1", "--max_length", "128"]
    run_here(ulma, *argv, "--eval_strategy", "steps", "--eval_steps", "2", "--test_split_size", "40")
    out = capsys.readouterr().out
    assert "40 of its 1,800 rows are held out for evaluation, by prompt (seed 42)." in out
    assert "eval_rewards/auc" in out


@pytest.mark.parametrize(("learning_rate", "is_told"), [("1e-5", True), ("1e-1", False)])
def test_a_training_that_learned_little_says_so_on_the_scale_of_the_labels(
    tmp_path, tiny_gpt2, capsys, learning_rate, is_told
):
    rows = tmp_path / "stars.csv"
    rows.write_text("prompt,completion,label\n" + "".join(f"Why {i}?,answer {i % 5},{i % 5 + 1}\n" for i in range(40)))
    argv = ["--model", tiny_gpt2, "--dataset", str(rows), "--output", str(tmp_path / "out"), "--max_steps", "4"]
    argv += ["--label_type", "continuous", "--label_transform", "standardize", "--learning_rate", learning_rate]
    run_here(pointwise_dpo, *argv, "--eval_strategy", "epoch", "--bf16", "false")
    out = capsys.readouterr().out
    told = re.search(
        r"The predicted labels of the 4 held-out rows are nearly alike, as is common after little training: 90% of "
        r"them are between (\S+) and",
        out,
    )
    assert (told is not None) == is_told
    assert told is None or 1 <= float(told[1]) <= 5  # stars, not standardized ones


def test_a_training_without_a_reference_says_nothing_of_rewards(tmp_path, tiny_gpt2, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,completion,label\n" + "".join(f"Why {i}?,answer {i % 5},1\n" for i in range(40)))
    argv = ["--model", tiny_gpt2, "--dataset", str(rows), "--output", str(tmp_path / "out"), "--max_steps", "2"]
    run_here(ulma, *argv, "--negative_loss", "none", "--eval_strategy", "epoch", "--bf16", "false")
    out = capsys.readouterr().out
    assert "To evaluate it on the held-out rows" in out
    assert "The predicted labels" not in out


@pytest.mark.parametrize("argv", [["--help"], ["ulma", "--help"]])
def test_a_reader_that_has_had_enough_is_no_error(argv):
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "trl_ulma", *argv]
    found = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert found.returncode in (0, 141)  # argparse itself lets it pass
    assert "BrokenPipe" not in found.stderr
    assert "Traceback" not in found.stderr
