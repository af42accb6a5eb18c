"""What the pages of the site say is true: settings, metrics, commands and code run as they are printed."""

import csv
import gzip
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from servers import make_parrot, transformers_serve

from trl_ulma import PointwiseDPOConfig, ULMAConfig
from trl_ulma.config_checks import PAIRWISE
from trl_ulma.labels import TRANSFORMS, parse_transform
from trl_ulma.log_partition import LOG_Z_CHOICES
from trl_ulma.metrics import EVALUATED
from trl_ulma.scripts import cli

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
VISION_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
BLOCK = re.compile(
    r"^(<!-- not run: (?P<why>.+?) -->\n)?"
    r"```(?:(?P<kind>bash|python)|csv title=\"(?P<file>[\w.]+)\")\n(?P<text>.*?)^```",
    re.M | re.S,
)
PAGES = sorted(page.stem for page in DOCS.glob("*.md") if BLOCK.search(page.read_text(encoding="utf-8")))
# Blocks that need a server or a GPU: few, and known
NOT_RUN = {"evaluation": 1, "examples": 1}


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """The commands of a bash block, continued lines joined."""
    return text.replace("\\\n", " ").strip().splitlines()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A working directory with the files that commands of the pages read."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "prompt": f"What is {i}?",
            "completion": answer,
            "label": label,
            "sft_mask": label == 1,
        }
        for i in range(20)
        for answer, label in ((" It is a number.", 1.0), (" No idea. Go away.", 0.0))
    ]
    pairs = [{"prompt": f"What is {i}?", "chosen": " A number.", "rejected": " No."} for i in range(8)]
    demonstrations = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows if row["label"]]
    for name, each in {"feedback": rows, "pairs": pairs, "demonstrations": demonstrations}.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    votes = [f"What is {i}?,{answer},{vote}" for i in range(8) for answer, vote in (("It is.", "up"), ("No.", "down"))]
    Path("votes.csv").write_text("\n".join(["question,response,rating", *votes]) + "\n")
    return tmp_path


def run_command(command: str, monkeypatch) -> None:
    """A command of a page in this process; accelerate's launch, which other tests try, is left out."""
    program, *options = shlex.split(command)
    if program == "pip":
        assert options[0] == "install"
        extras = re.search(r"^\.\[(.*)\]$", options[-1])
        declared = (ROOT / "pyproject.toml").read_text()
        assert extras, f"{command}: the package is not on PyPI, so a page installs it from the checkout."
        assert all(re.search(rf"^{extra} = ", declared, re.M) for extra in extras[1].split(","))
        return
    assert program == "trl-ulma", command

    def launch(module: str, parser, argv: list[str]) -> int:
        import_module(module).main(*parser.parse_settings([*argv, "--report_to", "none", "--use_cpu"]))
        return 0

    monkeypatch.setattr("trl_ulma.scripts.training.launch", launch)
    monkeypatch.setattr("sys.stdin", io.StringIO("How do I boil an egg?\n"))
    assert cli.main(options) == 0, command


def run_blocks(name: str, model: str, vision_model: str, monkeypatch) -> int:
    """Run the blocks of a page one after another; how many are marked as not run."""
    scope: dict = {"__name__": "a page"}
    left_out = 0
    for block in BLOCK.finditer(page(name)):
        if block["why"]:
            left_out += 1
            continue
        text = block["text"].replace(MODEL, model).replace(VISION_MODEL, vision_model)
        if block["file"]:
            Path(block["file"]).write_text(text)
            continue
        if block["kind"] == "python":
            exec(compile(text, f"{name}.md", "exec"), scope)
            continue
        for command in commands(text):
            run_command(command, monkeypatch)
    return left_out


@pytest.mark.parametrize("name", [name for name in PAGES if name != "quickstart"])
def test_the_blocks_of_a_page_run(name, files, tiny_gpt2, tiny_llava, monkeypatch):
    assert run_blocks(name, tiny_gpt2, tiny_llava, monkeypatch) == NOT_RUN.get(name, 0)


def test_the_quick_start_runs_and_leaves_what_it_says(files, tiny_llama, tiny_llava, monkeypatch, capsys):
    assert run_blocks("quickstart", tiny_llama, tiny_llava, monkeypatch) == 0
    said = capsys.readouterr().out
    # The expected output of the page, as far as it does not depend on the model
    shown = re.findall(r"^```text\n(.*?)^```", page("quickstart"), re.M | re.S)
    assert shown[1][shown[1].index("The model is in out.") :] in said
    rows = "          4 → +0.38 ████████████████                 2  25.0%"
    for line in ("Labels of the train dataset: 8 rows, 3 prompts", rows, "3 steps in total (3 epochs)", "Ready. To"):
        assert line in shown[0]
        assert line in said
    assert json.loads(Path("out/label_report.json").read_text())["continuous"]["rows"] == 8
    with open("ratings.csv", newline="") as file:
        rows = len(list(csv.DictReader(file)))
    assert len(Path("out/scored.jsonl").read_text().splitlines()) == rows
    assert "spearman" in Path("out/report/report.md").read_text()
    assert shown[2].strip() in Path("out/report/report.md").read_text()


def test_readmes_first_hour_runs_as_printed(tmp_path, tiny_gpt2, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Your own ratings")[1].split("\n## ")[0]
    [ratings] = re.findall(r"```csv\n(.*?)```", section, re.S)
    [block] = re.findall(r"```bash\n(.*?)```", section, re.S)
    Path("ratings.csv").write_text(ratings)
    for command in (all_commands := commands(block.replace(MODEL, tiny_gpt2))):
        run_command(command, monkeypatch)
    said = capsys.readouterr().out
    assert "10 rows" in said
    assert "Training needs about" in said
    assert "trained with pointwise DPO" in Path("out/README.md").read_text()
    assert "spearman" in Path("out/report/report.md").read_text()
    assert len(Path("out/scored.jsonl").read_text().splitlines()) == 10
    printed = " ".join(said.replace("\\\n", " ").split())
    for command in all_commands[1:]:  # `check` prints the second one, and the training the others
        assert " ".join(command.split()) in printed


def test_the_judged_report_runs_as_printed(tmp_path, tiny_llama, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = page("evaluation").split("### From a public dataset to a judged report")[1].split("\n### ")[0]
    [block] = re.findall(r"```bash\n(.*?)```", section, re.S)
    # The server is real; its model, which always says the same, and its port are the test's
    asked = re.search(r"pip install 'transformers\[serving\]'; transformers serve (\S+) --port (\d+) &\n", block)
    assert f"--judge_url http://localhost:{asked[2]}/v1" in block
    assert f"--judge llm:{asked[1]}" in block
    parrot = make_parrot(tmp_path_factory.mktemp("parrot"), "VERDICT: 1")
    turns = "\n\nHuman: How are you, {}?\n\nAssistant: "
    pairs = [
        {"chosen": f"{turns.format(i)}Fine, thank you.", "rejected": f"{turns.format(i)}Go away."} for i in range(30)
    ]
    with gzip.open("hh_harmless.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(pair) + "\n" for pair in pairs)
    with transformers_serve(parrot) as url:
        block = block.replace(asked[0], "").replace(f"http://localhost:{asked[2]}/v1", url)
        for command in commands(block.replace(MODEL, tiny_llama).replace(asked[1], parrot)):
            run_command(command, monkeypatch)
    facts = json.loads(Path("hh-report/report.json").read_text())
    held_out = facts["data"]["prompts"]
    assert facts["data"]["rows"] == 2 * held_out > 0
    assert facts["judges"][0]["orders_disagree"] == facts["judges"][0]["comparisons"] >= 2 * held_out
    assert facts["models"][0]["judged"][parrot]["harmless"]["counts"]["tie"] == held_out
    said = Path("hh-report/report.md").read_text()
    assert "Perplexity" in said
    assert "no ranking is claimed" in said
    assert "too few for a conclusion about how well the model ranks" in said
    assert "Pictures that need more data" in said
    assert Path("hh-report/report.html").stat().st_size > 1000


def test_the_settings_page_has_our_fields_their_defaults_and_no_other():
    own = {
        name: config.__dataclass_fields__[name].default
        for config in (PointwiseDPOConfig, ULMAConfig)
        for name in inspect.get_annotations(config)
        # The last one only differs from transformers' own with older versions
        if name not in {*PAIRWISE, "trackio_space_id"}
    }
    own["trust_remote_code"] = False  # TRL's, but for older versions
    found = re.findall(r"^### `(\w+)`\n\nDefault: `(.+)`$", page("settings"), re.M)
    assert dict(found) == {name: repr(default) for name, default in own.items()}
    assert page("settings").count("\n### ") == len(found)


def test_the_settings_page_has_every_choice_of_log_z():
    table = page("settings").split("### `log_z`\n")[1].split("###")[0]
    assert set(re.findall(r'^\| `"(\w+)"`', table, re.M)) == set(LOG_Z_CHOICES)


def test_the_refused_settings_are_those_of_the_migration_page():
    table = page("migrating").split("These settings raise an error that names them")[1]
    table = table.split("\n\n`label_smoothing_factor`")[0]
    named = [name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(PAIRWISE)


def test_the_transforms_of_the_page_are_those_that_there_are():
    table = page("rows").split("| step |")[1].split("\n\n")[0]
    named = [spec for row in re.findall(r"^\| (`.*?`) \|", table, re.M) for spec in re.findall(r"`([^`]*)`", row)]
    assert {spec.partition(":")[0] for spec in named} == set(TRANSFORMS)
    for spec in named:
        parse_transform(spec, "binary" if spec.startswith(("threshold", "votes")) else "continuous")


def test_the_families_of_the_page_are_those_that_there_are():
    from trl_ulma.data.adapters import FAMILIES

    table = page("rows").split("| family |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.M)) == set(FAMILIES)


def test_the_metrics_page_has_every_figure():
    table = page("metrics").split("| name | what |")[1].split("\n\n")[0]
    named = set(re.findall(r"`([\w/…]+)`", table))
    elsewhere = {"logits/chosen", "logits/rejected", "aux_loss"}  # TRL's, the first two as logits/…
    assert set(EVALUATED) - named == elsewhere


def test_every_picture_is_drawn_by_a_script_and_shown():
    sys.path.insert(0, str(DOCS))
    try:
        from make_pictures import DRAWN
    finally:
        sys.path.remove(str(DOCS))
    texts = [file.read_text(encoding="utf-8") for file in DOCS.glob("*.md")]
    shown = {name for text in texts for name in re.findall(r"\(pictures/([\w-]+)\.png\)", text)}
    # compare_with_dpo.py draws the last one
    assert sorted(shown) == sorted([*DRAWN, "swap"]) == sorted(file.stem for file in (DOCS / "pictures").glob("*.png"))


def test_every_result_is_a_page_of_the_site():
    nav = (ROOT / "mkdocs.yml").read_text()
    for source in (ROOT / "examples").glob("*/RESULTS.md"):
        wanted = f"results/{source.parent.name}/index.md"
        assert wanted in nav, f"Add {wanted} to the nav of mkdocs.yml."


def test_there_are_answers_to_many_questions_each_with_an_anchor():
    questions = re.findall(r"^### (.+)$", page("faq"), re.M)
    assert len(questions) >= 15
    assert len(set(questions)) == len(questions)
    assert all(question.endswith("?") for question in questions)


def test_no_page_installs_the_package_from_pypi():
    texts = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    texts += [*(ROOT / "examples").rglob("*.py"), *(ROOT / "examples").rglob("*.ipynb")]
    from_pypi = re.compile(r"pip install [^\n]*(?<!/)\btrl-ulma\b(?!\[[\w,]+\] @\s)[^\n]*")
    for file in texts:
        found = from_pypi.findall(file.read_text(encoding="utf-8"))
        assert not found, f"{file}: {found}"


def test_the_site_builds_without_a_warning(tmp_path):
    """With `--quiet`, `--strict` counts no warnings, so broken links pass there."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    built = {file.name for file in (tmp_path / "site").glob("*.html")}
    assert {f"{file.stem}.html" for file in DOCS.glob("*.md")} <= built
    assert "RESULTS.md" not in re.findall(r'href="([^"]*)"', (tmp_path / "site/results/paper/running.html").read_text())


def test_formulas_are_typeset_by_files_of_the_site():
    settings = (ROOT / "mkdocs.yml").read_text()
    for name in ("katex/katex.min.css", "katex/katex.min.js", "katex/render.js"):
        assert name in settings
        assert (DOCS / name).is_file()
    style = (DOCS / "katex/katex.min.css").read_text()
    assert not re.search(r"url\((?!fonts/)", style)
