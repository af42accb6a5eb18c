"""What all commands share: option names, help in groups, errors, and quiet libraries."""

import json
import logging
import re
import resource
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from trl import DPOConfig

from trl_ulma import PointwiseDPOConfig, ULMAConfig
from trl_ulma.scripts import check, demo, evaluate, pointwise_dpo, prepare, score, ulma
from trl_ulma.scripts.cli import main
from trl_ulma.scripts.command_line import VERBOSE, CommandParser, as_options, attempt, is_refusal, tell_last_counts
from trl_ulma.scripts.help_page import GROUPS, help_page
from trl_ulma.scripts.options import DataArguments

SCRIPTS = {"ulma": ulma, "pointwise-dpo": pointwise_dpo}
NAMES = {
    "--model": ("--model", "--model_name_or_path", "--model-name-or-path"),
    "--dataset": ("--dataset", "--dataset_name", "--dataset-name"),
    "--output": ("--output", "--output_dir", "--output-dir"),
}


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """Commands that run in this process leave no trace in it."""
    monkeypatch.delenv(VERBOSE, raising=False)
    with warnings.catch_warnings():
        yield


# One name for one thing


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("script", SCRIPTS.values())
def test_training_takes_short_names_and_those_of_trl(script, number, tmp_path):
    model, dataset, output = (names[number] for names in NAMES.values())
    words = [model, "some-model", f"{dataset}=rows.jsonl", output, str(tmp_path)]
    script_args, training_args, model_args, _ = script.make_parser().parse_settings(words)
    assert model_args.model_name_or_path == "some-model"
    assert script_args.dataset_name == "rows.jsonl"
    assert training_args.output_dir == str(tmp_path)


@pytest.mark.parametrize("number", range(3))
def test_the_other_commands_take_them_too(number):
    model, dataset, output = (names[number] for names in NAMES.values())
    words = [model, "m", dataset, "d.jsonl", output, "o.jsonl"]
    for script in (score, evaluate):
        args = script.make_parser().parse_args(words)
        assert (args.model, args.dataset) == ("m" if script is score else ["m"], "d.jsonl")
        assert args.output == Path("o.jsonl")
    args = prepare.family_parser("hh").parse_args(words[2:])
    assert (args.input, args.output) == ("d.jsonl", "o.jsonl")
    assert prepare.family_parser("hh").parse_args(["--input", "d", "--output", "o"]).input == "d"
    assert demo.make_parser().parse_args([output, "o"]).output_dir == Path("o")


def test_check_takes_the_names_of_training(tiny_gpt2, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "Hi", "completion": f" {i}.", "label": i}) + "\n" for i in (0, 1)))
    words = ["--model_name_or_path", tiny_gpt2, "--dataset_name", str(file), "--output_dir", "out"]
    assert check.main(["--method", "ulma", *words]) == 0
    said = capsys.readouterr().out.replace(" \\\n       ", "")
    assert said.endswith(f"trl-ulma ulma --model_name_or_path {tiny_gpt2} --dataset_name {file} --output_dir out\n")


def test_a_yaml_file_takes_them_too(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": "m", "dataset": "rows.jsonl", "output": str(tmp_path / "a")}))
    script_args, training_args, model_args, _ = ulma.make_parser().parse_settings(["--config", str(file)])
    assert (model_args.model_name_or_path, script_args.dataset_name) == ("m", "rows.jsonl")
    assert training_args.output_dir == str(tmp_path / "a")
    # The command line comes first, under whichever name
    found = ulma.make_parser().parse_settings(["--config", str(file), "--model_name_or_path", "other"])
    assert found[2].model_name_or_path == "other"
    file.write_text(yaml.safe_dump({"model": "m", "model_name_or_path": "other", "dataset": "d"}))
    assert main(["ulma", "--config", str(file)]) == 2
    assert capsys.readouterr().err == (
        f"trl-ulma ulma: error: {file}: model and model_name_or_path are two names of one setting. Give it once.\n"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["ulma", "--dataset", "d", "--model", "a", "--model_name_or_path", "b"],
        ["pointwise-dpo", "--dataset", "d", "--model-name-or-path=b", "--model=a"],
        ["check", "--dataset", "d", "--model", "a", "--model_name_or_path=b"],
        ["score", "--output", "o.csv", "--model", "m", "--dataset", "a", "--dataset_name", "b"],
        ["evaluate", "--model", "m", "--output", "o", "--dataset", "a", "--dataset_name", "b"],
        ["prepare", "hh", "--dataset", "a", "--input", "b", "--output", "o"],
        ["demo", "--output", "a", "--output_dir", "b"],
    ],
)
def test_two_values_under_two_names_are_an_error(words, capsys):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"trl-ulma [a-z -]+: error: --\S+ [ab] and --\S+ [ab] are two names of one option, with two values\. "
        r"Give it once\.",
        line,
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["chat", "--model", "a", "--model", "b"], "--model is given more than once. Its last value counts."),
        (["chat", "--model", "a", "--seed=1", "--seed", "2"], "--seed is given more than once. Its last value counts."),
        (["score", "--output=o.csv", "--output", "p.csv"], "--output is given more than once. Its last value counts."),
        (["demo", "--steps", "1", "--steps", "1"], None),
        (["ulma", "--beta", "0.1", "--beta=0.2"], "--beta is given more than once. Its last value counts."),
        (["ulma", "--beta", "0.1", "--beta=0.10"], None),
        (["ulma", "--use_peft", "--use_peft", "false"], "--use_peft is given more than once. Its last value counts."),
        (["ulma", "--use_peft", "--use_peft", "true"], None),
        (["ulma", "--lora_target_modules", "q", "v"], None),
        (["ulma", "--lora_target_modules", "q", "v", "--lora_target_modules", "q", "v"], None),
        (
            ["ulma", "--lora_target_modules", "q", "v", "--beta", "1", "--lora_target_modules", "k"],
            "--lora_target_modules is given more than once. Its last value counts.",
        ),
        (
            ["ulma", "--num_processes", "1", "--num_processes=2"],
            "--num_processes is given more than once. Its last value counts.",
        ),
    ],
)
def test_the_last_value_of_an_option_counts_and_this_is_said_once(words, told, capsys):
    command, *options = words
    tell_last_counts.cache_clear()
    needed = ["--model", "m", "--dataset", "d"] if command == "ulma" else ["--no_such_option"]
    assert main([command, *options, *needed])
    lines = [line for line in capsys.readouterr().err.splitlines() if "more than once" in line]
    assert lines == ([] if told is None else [f"trl-ulma {command}: {told}"])


def test_the_last_value_is_used_and_several_values_are_collected(tmp_path):
    words = ["--dataset", "d", "--output", str(tmp_path), "--model", "a", "--model_name_or_path", "a"]
    assert ulma.make_parser().parse_settings(words)[2].model_name_or_path == "a"
    words = ["--dataset", "d", "--output", str(tmp_path), "--model", "a", "--model", "b", "--beta", "0.1", "--beta=1"]
    settings = ulma.make_parser().parse_settings(words)
    assert (settings[2].model_name_or_path, settings[1].beta) == ("b", 1.0)
    launched, _ = ulma.make_parser().parse_for_launch([*words, "--num_processes", "1", "--num_processes", "2"])
    assert launched == ["--num_processes", "2"]
    several = ["--model", "a", "--model", "b", "--model_name_or_path", "c", "--dataset", "d", "--output", "o"]
    assert evaluate.make_parser().parse_args(several).model == ["a", "b", "c"]


def test_an_option_beside_a_yaml_file_overrides_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": "m", "dataset": "d", "beta": 0.5, "num_processes": 2}))
    words = ["--config", str(file), "--beta", "0.1", "--num_processes", "1", "--output", str(tmp_path / "out")]
    launched, _ = ulma.make_parser().parse_for_launch(words)
    assert launched == ["--num_processes", "1"]
    assert ulma.make_parser().parse_settings([*words[:4], *words[6:]])[1].beta == 0.1


def test_an_invalid_value_of_an_option_that_is_given_twice_is_reported_as_ever(capsys):
    for words, message in (
        (["--seed", "one"], "argument --seed: invalid int value: 'one'"),
        (["--seed", "one", "--seed", "2"], "argument --seed: invalid int value: 'one'"),
        (["--model", "--model", "b"], "argument --model: expected one argument"),
    ):
        assert main(["chat", "--model", "b", *words]) == 2
        assert capsys.readouterr().err == f"trl-ulma chat: error: {message}\n"


# Help


@pytest.mark.parametrize("command", ["ulma", "pointwise-dpo", "check"])
def test_help_is_in_groups_ours_first_and_fast(command):
    code = (
        f"import sys; from trl_ulma.scripts.cli import main; code = main(['{command}', '--help']); "
        "assert not {'torch', 'transformers', 'datasets', 'trl'} & set(sys.modules); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # On an idle machine that is the time one waits
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    said = found.stdout
    places = [said.index(f"\n{group}:\n") for group in ("data", "labels", "method", "model", "training", "evaluation")]
    assert places == sorted(places)
    assert places[-1] < said.index("\nlaunch:\n")
    assert max(map(len, said.splitlines())) <= 100
    for theirs in ("--adam_beta1", "--ddp_backend", "--hub_token", "--loss_type"):
        assert theirs not in said


@pytest.mark.parametrize("command", SCRIPTS)
def test_the_page_agrees_with_the_parser(command):
    parser = SCRIPTS[command].make_parser()
    config = ULMAConfig if command == "ulma" else PointwiseDPOConfig
    shown = [option for options in GROUPS.values() for option in options if command in option.methods]
    actions = {**parser._launcher_actions, **parser._option_string_actions, "--config": None}
    for option in shown:
        action = actions[option.name]
        if option.default is not None:
            assert str(action.default) == option.default, option.name
        if option.value.startswith("{"):
            choices = action.choices or ("auto", "true", "false")  # which `chat` checks itself
            assert option.value == f"{{{','.join(map(str, choices))}}}", option.name
        if action is not None and not option.value:
            assert action.nargs in (0, "?"), option.name
    names = {option.name for option in shown}
    theirs = {field.name for field in fields(DPOConfig)}
    theirs |= {"router_aux_loss_coef"}  # which TRL before 1.7 does not have
    own = {field.name for field in fields(config)} - theirs | {"beta", "columns", "label_map"}
    assert {field.name for field in fields(DataArguments)} > {"columns", "label_map"}
    assert {f"--{name}" for name in own} <= names
    assert all(f"\n  {name}" in help_page(command) for name in names)


def test_all_options_are_shown_on_demand_each_under_one_name(capsys):
    assert main(["ulma", "--help-all"]) == 0
    said = capsys.readouterr().out
    shown = re.findall(r"^  (--\S+)", said, re.MULTILINE)
    assert len(shown) == len(set(shown)) > 180
    assert {"--model", "--dataset", "--output", "--adam_beta1", "--hub_token", "--no_gradient_checkpointing"} <= set(
        shown
    )
    assert not {"--loss_type", "--model_name_or_path", "--label-type"} & set(shown)
    assert "(default: 0.9)" in said  # of Adam's β₁
    # Ours come first, in the groups of --help
    assert said.index("\nlabels:") < said.index("--label_type") < said.index("\nmodel:")
    assert said.index("\nlaunch:") < said.index("\nother options of TRL and transformers:") < said.index("--adam_beta1")
    assert main(["check", "--help-all", "--method", "pointwise-dpo"]) == 0
    said = capsys.readouterr().out
    assert "--adam_beta1" in said
    assert "--sft_weight" not in said


@pytest.mark.parametrize("command", ["score", "evaluate", "chat", "env", "demo", "completion"])
def test_help_of_the_others_names_an_option_once(command, capsys):
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert "--verbose" in said
    assert "--model_name_or_path" not in said
    assert "--output_dir" not in said


def test_a_misspelt_option_is_answered_with_the_nearest(capsys):
    for command in ("score", "evaluate"):
        assert main([command, "--model", "m", "--dataset", "d", "--output", "o.csv", "--bach_size", "3"]) == 2
        assert capsys.readouterr().err == (
            f"trl-ulma {command}: error: --bach_size is not an option. Did you mean --batch_size?\n"
        )


# Errors


@pytest.fixture
def stars(tmp_path) -> str:
    file = tmp_path / "stars.csv"
    file.write_text("prompt,completion,label\n" + "".join(f"What is {i}?, A number.,{i}\n" for i in range(1, 6)))
    return str(file)


def test_training_refuses_bad_rows_as_check_does(tiny_gpt2, stars, tmp_path, capfd):
    """Once and in the same words, though another process finds it than the one that is asked."""
    words = ["--model", tiny_gpt2, "--dataset", stars]
    assert main(["ulma", *words, "--output", str(tmp_path / "out"), "--report_to", "none"]) == 1
    trained = capfd.readouterr().err
    assert "Traceback" not in trained
    first, *rows = [line for line in trained.splitlines() if not line.startswith("The ")]
    assert first == "trl-ulma ulma: error: 4 of 5 rows of the train dataset are invalid:"
    assert rows[0] == (
        f"  {stars}, line 3: label is 2.0, outside [0, 1]. Rescale it, or set --label_type continuous. "
        "Prompt: 'What is 2?'"
    )
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert main(["check", "--method", "ulma", *words]) == 1
    assert capfd.readouterr().err.replace("trl-ulma check", "trl-ulma ulma") == trained


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--label_type", "continuous", "--negative_loss", "unlearning"], 2, "--negative_loss unlearning needs binary"),
        (
            ["--label_type", "continuous", "--log_z", "batch_kl", "--per_device_train_batch_size", "1"],
            2,
            "--log_z batch",
        ),
        (
            ["--label_type", "continuous", "--sft_threshold", "9", "--desirable_weight", "2"],
            1,
            "For continuous labels, --desirable_weight applies to demonstrations",
        ),
        (["--model", "no-such-folder"], 1, "--model no-such-folder cannot be loaded ("),
        (["--dataset", "none.csv"], 1, "There is no file or folder none.csv"),
    ],
)
@pytest.mark.parametrize("command", ["check", "ulma"])
def test_settings_and_files_are_refused_in_a_line(command, words, code, message, tiny_gpt2, stars, tmp_path, capsys):
    argv = ["--model", tiny_gpt2, "--dataset", stars, *words]
    if command == "check":
        assert main(["check", "--method", "ulma", *argv]) == code
        last = capsys.readouterr().err.splitlines()[-1]
    else:
        with pytest.raises(SystemExit) as stop:
            ulma.main(*ulma.make_parser().parse_settings([*argv, "--output", str(tmp_path / "out")]))
        last = capsys.readouterr().err.splitlines()[-1] if stop.value.code == 2 else str(stop.value)
        assert (2 if stop.value.code == 2 else 1) == code
    assert last.startswith(f"trl-ulma {command}: error: ")
    assert message in last


@pytest.mark.parametrize("command", ["check", "ulma"])
def test_labels_that_label_map_lacks_are_refused_row_by_row(command, tiny_gpt2, stars, tmp_path, capsys):
    argv = ["--model", tiny_gpt2, "--dataset", stars, "--label_map", "up=1"]
    if command == "check":
        assert main(["check", "--method", "ulma", *argv]) == 1
        said = capsys.readouterr().err
    else:
        with pytest.raises(SystemExit) as stop:
            ulma.main(*ulma.make_parser().parse_settings([*argv, "--output", str(tmp_path / "out")]))
        said = str(stop.value)
    assert f"trl-ulma {command}: error: 5 of 5 rows of the train dataset are invalid:\n  {stars}, line 2 has" in said
    assert said.count("which --label_map does not contain. Add it to --label_map.") == 5


def test_what_nobody_expected_keeps_its_traceback(tiny_gpt2, stars, tmp_path, monkeypatch):
    words = ["--model", tiny_gpt2, "--dataset", stars, "--output", str(tmp_path / "out")]
    for problem in (KeyError("rewards"), ValueError("of some library")):

        def fail(*args, problem=problem, **kwargs):
            raise problem

        fail.__globals__["__name__"], name = "torch.somewhere", fail.__globals__["__name__"]
        try:
            monkeypatch.setattr("trl_ulma.scripts.training.load_splits", fail)
            with pytest.raises(type(problem)):
                ulma.main(*ulma.make_parser().parse_settings(words))
            with pytest.raises(type(problem)):
                check.main(words[:4])
        finally:
            fail.__globals__["__name__"] = name


def test_what_is_raised_on_purpose_is_told_from_bugs():
    def problem_of(code: str, package: str) -> Exception:
        try:
            exec(code, {"__name__": f"{package}.module"})
        except Exception as problem:
            return problem
        raise AssertionError

    assert is_refusal(problem_of("raise ValueError('Row 3 is empty.')", "trl_ulma"))
    assert is_refusal(problem_of("raise TypeError('args must be a config.')", "trl_ulma"))
    assert is_refusal(problem_of("raise ValueError('eval_steps must be set.')", "transformers"))
    assert is_refusal(problem_of("open('/nowhere/file')", "anything"))
    assert not is_refusal(problem_of("raise ValueError('shapes')", "torch"))
    assert not is_refusal(problem_of("raise KeyError('label')", "trl_ulma"))
    assert not is_refusal(problem_of("int('x')", "trl_ulma"))
    assert not is_refusal(problem_of("'a' + 1", "trl_ulma"))
    assert not is_refusal(problem_of("raise BrokenPipeError", "trl_ulma"))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Set max_length=512, or drop it.", "Set --max_length 512, or drop it."),
        ("label_transform='threshold:3' needs it", "--label_transform threshold:3 needs it"),
        ("Its columns are prompt, label_type.", "Its columns are prompt, label_type."),
        ("A column `label_type` decides.", "A column `label_type` decides."),
        ("Leave max_length out.", "Leave --max_length out."),
        ("rows.jsonl has max_lengths.", "rows.jsonl has max_lengths."),
        ("Set other_thing=1 and `max_length`.", "Set other_thing=1 and `max_length`."),
        ("max_length=None is fine.", "max_length=None is fine."),
        ("Bad. Prompt: 'Set max_length=3'", "Bad. Prompt: 'Set max_length=3'"),
        ('Say system_message="Be kind"', 'Say --system_message "Be kind"'),
        ("Set max_length=3 (on the command line --max_length 3) to cut.", "Set --max_length 3 to cut."),
    ],
)
def test_messages_are_in_the_spelling_of_the_command_line(message, said):
    options = ["--max_length", "--label_transform", "--label_type", "--system_message", "-h"]
    assert as_options(message, options) == said


def test_log_messages_of_a_command_are_in_that_spelling_too(capsys):
    parser = CommandParser(prog="trl-ulma x")
    parser.add_argument("--max_length")

    def log() -> None:
        for name in ("trl_ulma.rows", "transformers"):
            about = {"name": name, "levelno": logging.WARNING, "msg": "Set max_length=%d.", "args": (3,)}
            logging.lastResort.handle(logging.makeLogRecord(about))

    assert attempt(parser, log) == 0
    assert capsys.readouterr().err == "Set --max_length 3.\nSet max_length=3.\n"
    log()  # outside of a command
    assert capsys.readouterr().err == "Set max_length=3.\nSet max_length=3.\n"


def test_verbose_shows_tracebacks(tmp_path, capsys):
    words = ["score", "--model", "m", "--dataset", str(tmp_path / "none.csv"), "--output", str(tmp_path / "o.csv")]
    assert main(words) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert main([*words, "--verbose"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("trl-ulma score: error: There is no file or folder")


# Quiet libraries


def test_only_the_known_lines_are_silenced():
    code = """
import logging, sys, warnings
from trl_ulma.scripts.command_line import be_quiet
be_quiet(); be_quiet()
kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
kernels.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no kernels")
kernels.warning("The library could not be loaded")
logging.getLogger("transformers.modeling_utils").warning("Some weights were newly initialized")
def warn(category, module):
    exec("import warnings; warnings.warn('from ' + __name__, category, stacklevel=1)",
         {"__name__": module, "category": category})
for module in ("transformers.training_args", "trl_ulma.config"):
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warn(category, module)
from tqdm.auto import tqdm
list(tqdm(range(3)))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = found.stderr
    assert "gemm_4bit_forward" not in said
    assert "The library could not be loaded" in said
    assert "newly initialized" in said
    for category, number in (("FutureWarning", 1), ("DeprecationWarning", 1), ("UserWarning", 2)):
        assert said.count(f"{category}: from") == number, said
    assert "FutureWarning: from trl_ulma.config" in said
    assert "%|" not in said  # no progress bars in files


def test_the_first_step_is_logged_unless_it_is_switched_off():
    words = ["--model", "m", "--dataset", "d", "--bf16", "false"]
    assert pointwise_dpo.make_parser().parse_settings(words)[1].logging_first_step
    assert (
        not pointwise_dpo.make_parser().parse_settings([*words, "--logging_first_step", "false"])[1].logging_first_step
    )


def test_silence_is_for_commands_and_not_for_the_library():
    code = "import trl_ulma.config, logging; print(logging.getLogger('accelerate.commands.launch').filters)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
    assert logging.getLogger("trl_ulma").filters == []


def test_a_parser_shows_both_names_of_a_switch(capsys):
    evaluate.make_parser().print_help()
    assert "--base, --no-base" in capsys.readouterr().out
    assert isinstance(evaluate.make_parser(), CommandParser)
