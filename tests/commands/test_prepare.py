"""`trl-ulma prepare`: files in, files out, the report, what is wrong in one line, and training on what it wrote."""

import importlib.util
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Value
from family_samples import SAMPLES

from trl_ulma.data.adapters import FAMILIES
from trl_ulma.data.convert import FEATURES
from trl_ulma.data.files import load_rows
from trl_ulma.scripts.cli import main
from trl_ulma.scripts.prepare import family_parser

HI = "\n\nHuman: Hi {i}\n\nAssistant:"
QUESTION = {
    "question": "Capital?",
    "passages": [["France", "It is in Europe."]],
    **{f"prediction {number}": f"City {number}." for number in (1, 2, 3, 4)},
    "feedback": {"errors": [{"start": 0}], "missing-info": [], "corrected-prediction": "Paris."},
    "preference": [1, 1, 0, 0, 2, 2],
}
RAW = {
    "hh": [{"chosen": f"{HI.format(i=i)} Yes…", "rejected": f"{HI.format(i=i)} No"} for i in range(20)],
    "qa-feedback": [QUESTION | {"question": f"Capital {i}?"} for i in range(20)],
    "red-team": [{"transcript": f"{HI.format(i=i)} No.\n", "rating": float(i % 5), "tags": None} for i in range(20)],
    "votes": [
        {"question": f"{i}?", "answers": [{"text": "a", "score": i}, {"text": "b", "score": 0}]} for i in range(20)
    ],
    "pairs": [{"prompt": f"{i}?", "chosen": "Yes", "rejected": "No"} for i in range(20)],
    "demonstrations": [{"prompt": f"{i}?", "completion": "Yes"} for i in range(20)],
}
RAW["golden-hh"] = RAW["hh"]
RAW |= {family: [make(i) for i in range(20)] for family, make in SAMPLES.items()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def raw(tmp_path):
    for name, rows in RAW.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(rows))
    return tmp_path


def prepare(family, source, output, *options) -> int:
    return main(["prepare", family, "--input", str(source), "--output", str(output), *map(str, options)])


def error_of(capsys, *argv, code: int = 1) -> str:
    """The one line of a command with input that cannot be used, or (code 2) of a wrong command."""
    capsys.readouterr()
    assert main(["prepare", *map(str, argv)]) == code
    said = capsys.readouterr()
    assert said.out == ""
    [line] = said.err.splitlines()
    return line


def test_a_label_that_is_better_if_it_is_low_is_told(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i}?", "completion": "So.", "toxicity": i % 2} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = "a low `toxicity` looks better, but a high one is read as better here. Add --liked"
    assert prepare("kto", file, tmp_path / "a", "--columns", "label=toxicity") == 0
    assert said in capsys.readouterr().err
    assert prepare("kto", file, tmp_path / "b", "--columns", "label=toxicity", "--label_map", "0=1,1=0") == 0
    assert said not in capsys.readouterr().err


def prompts(rows) -> set[str]:
    return {json.dumps(prompt) for prompt in rows["prompt"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_has_a_train_and_a_test_part_without_a_common_prompt(raw, family, capsys):
    assert prepare(family, raw / f"{family}.jsonl", raw / "out", "--test_size", "0.3", "--report", raw / "r.json") == 0
    splits = load_rows(raw / "out")
    report = json.loads((raw / "r.json").read_text())
    assert report["answers"] == report["rows_out"] == report["rows"]
    assert (report["rows_in"], report["left_out"], report["family"]) == (20, {}, family)
    assert {name: len(rows) for name, rows in splits.items()} == {
        name: report["splits"][name]["rows"] for name in ("train", "test")
    }
    assert sum(len(rows) for rows in splits.values()) == report["rows_out"]
    assert len(splits["test"]) == round(0.3 * report["rows_out"])
    assert not prompts(splits["train"]) & prompts(splits["test"])
    assert len(prompts(splits["train"])) == report["splits"]["train"]["prompts"]
    features = {name: FEATURES[name] for name in splits["train"].column_names}
    if family == "stepwise":
        features |= {"prompt": Value("string"), "completion": Value("string")}
    assert dict(splits["train"].features) == features
    out = capsys.readouterr().out
    assert "rows in             20, with" in out
    assert "left out            nothing" in out
    assert f"→ {raw / 'out' / 'test.parquet'}" in out
    assert not list(raw.rglob("*.part"))


def test_the_seed_of_the_split(raw):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert prepare("hh", raw / "hh.jsonl", raw / name, "--seed", seed) == 0
    a, b, c = (prompts(load_rows(raw / name)["test"]) for name in "abc")
    assert a == b != c


def test_parquet_and_json_lines_hold_the_same(raw):
    for name in ("rows.parquet", "rows.jsonl"):
        assert prepare("qa-feedback", raw / "qa-feedback.jsonl", raw / name, "--wins") == 0
    parquet, lines = (load_rows(raw / name)["train"] for name in ("rows.parquet", "rows.jsonl"))
    assert len(parquet) == 100
    assert list(parquet) == list(lines)
    assert parquet[0]["prompt"] == [{"role": "user", "content": "France\nIt is in Europe.\n\nCapital 0?"}]
    assert parquet[0]["completion"] == [{"role": "assistant", "content": "Paris."}]


def test_all_rows_can_be_training_rows(raw):
    assert prepare("pairs", raw / "pairs.jsonl", raw / "out", "--test_size", "0") == 0
    assert {name: len(rows) for name, rows in load_rows(raw / "out").items()} == {"train": 40}


def test_what_is_left_out_is_said(raw, capsys):
    rows = [*RAW["hh"], {"chosen": f"{HI} ", "rejected": f"{HI} No\n\nHuman: Bye"}]
    (raw / "odd.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert prepare("hh", raw / "odd.jsonl", raw / "rows.jsonl", "--report", raw / "report.json", "--liked") == 0
    out = capsys.readouterr().out
    assert "rows in             21, with 42 answers\nrows out            40\n" in out
    assert "left out            1 × its answer is empty (first: row 20)\n" in out
    assert "                    1 × it ends in a human turn (first: row 20)\n" in out
    assert "labels, binary      0: 20   1: 20\n" in out
    assert "demonstrations      0 (0.0%)\n" in out
    assert "completion          characters: 0% ≤ 2   5% ≤ 2   25% ≤ 2   50% ≤ 3   75% ≤ 4" in out
    report = json.loads((raw / "report.json").read_text())
    assert report["left_out"] == {
        "its answer is empty": {"count": 1, "first_row": 20},
        "it ends in a human turn": {"count": 1, "first_row": 20},
    }
    assert report["options"] == {"liked": True, "alternating": False}
    assert report["demonstrations"] == 0


def test_the_report_with_rich_and_without(raw, capsys, monkeypatch):
    assert importlib.util.find_spec("rich")
    monkeypatch.setenv("TERM", "xterm")  # a dumb terminal has no bold type
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert prepare("red-team", raw / "red-team.jsonl", raw / "a.jsonl") == 0
    rich = capsys.readouterr().out
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "rich" else find_spec(name))
    assert prepare("red-team", raw / "red-team.jsonl", raw / "a.jsonl", "--overwrite") == 0
    plain = capsys.readouterr().out
    assert "\x1b[1minput" in rich
    # A narrow terminal folds long paths
    assert re.sub(r"\x1b\[\d*m|\s", "", rich) == re.sub(r"\s", "", plain)
    assert "labels, continuous  -4: 4   -3: 4   -2: 4   -1: 4   0: 4" in plain


def test_a_split_of_several(raw, capsys):
    rows = Dataset.from_list(RAW["pairs"])
    DatasetDict(train=rows, validation=rows.select([0, 1])).save_to_disk(raw / "saved")
    assert prepare("pairs", raw / "saved", raw / "a.jsonl") == 0
    assert "split train (not read: validation)" in capsys.readouterr().out
    assert prepare("pairs", raw / "saved", raw / "b.jsonl", "--split", "validation") == 0
    assert len(load_rows(raw / "b.jsonl")["train"]) == 4
    message = error_of(capsys, "pairs", "--input", raw / "saved", "--output", raw / "c.jsonl", "--split", "test")
    assert "has no split 'test', but train, validation. Set --split to one of them." in message
    assert not (raw / "c.jsonl").exists()


def test_what_is_wrong_is_said_in_a_line(raw, capsys):
    (raw / "file").write_text("")
    (raw / "bad.jsonl").write_text(json.dumps(RAW["hh"][0]) + "\n{oops}\n")
    (raw / "q.jsonl").write_text(json.dumps({"question": "2 + 2?", "chosen": "It is 4", "rejected": "It is 5"}))
    (raw / "alpaca.jsonl").write_text('{"instruction": "Hi", "output": "Hello!"}')
    (raw / "one.jsonl").write_text(json.dumps(RAW["demonstrations"][0]))
    (raw / "full").mkdir()
    (raw / "full" / "old.jsonl").write_text("{}")
    (raw / "there.jsonl").write_text("")
    hh, out = raw / "hh.jsonl", raw / "new.jsonl"
    for argv, message, code in (
        (["hh", "--input", hh], "hh: error: the following arguments are required: --output", 2),
        (["hh", "--input", raw / "h.jsonl", "--output", out], "There is no file or folder", 1),
        (["votes", "--input", hh, "--output", out], "chosen, rejected. It looks like hh or golden-hh or pairs.", 1),
        (["pairs", "--input", raw / "q.jsonl", "--output", out], "its column question would be ignored. If", 1),
        (["hh", "--input", raw / "bad.jsonl", "--output", out], "bad.jsonl is invalid JSON in line 2, column 2", 1),
        (["hh", "--input", hh, "--output", raw / "there.jsonl"], "exists already. Choose another name, or set", 1),
        (["hh", "--input", hh, "--output", raw / "rows.csv"], "--output ends in '.csv'; it must be a .parquet or", 2),
        (["hh", "--input", hh, "--output", raw / "file" / "out"], "cannot be written: ", 1),
        (["hh", "--input", hh, "--output", raw / "full", "--overwrite"], "would be read together with the rows", 2),
        (["hh", "--input", hh, "--output", raw / "o", "--report", raw / "o" / "r.json"], "would be read as data", 2),
        (["hh", "--input", hh, "--output", out, "--test_size", "0.1"], "is one file, which has no test part", 2),
        (["hh", "--input", hh, "--output", raw / "o", "--test_size", "1.5"], "1.5 is neither a fraction from 0", 2),
        (["hh", "--input", hh, "--output", raw / "o", "--test_size", "x"], "argument --test_size: invalid", 2),
        (["hh", "--input", hh, "--output", raw / "o", "--test_size", "40"], "--test_size 40 does not do for 40", 1),
        (["demonstrations", "--input", raw / "one.jsonl", "--output", raw / "o"], "two different prompts", 1),
        (["hh", "--input", hh, "--output", out, "--wins"], "--wins is not an option. See trl-ulma prepare hh", 2),
        (["hh", "--input", hh, "--output", out, "--label_map", "up=1"], "--label_map is not an option. See", 2),
        (["alpaca", "--input", raw / "alpaca.jsonl", "--output", out, "--label_map", "up=1"],
         "has no column label that --label_map could map; its columns are instruction, output. Name it", 1),
        (["hh", "--input", hh, "--output", out, "--config", "x"], "is a file, so it has no configurations", 1),
        (["votes", "--input", raw / "votes.jsonl", "--output", out, "--accepted"], "Remove `accepted`.", 1),
        (["hhh", "--input", hh], "trl-ulma prepare: error: hhh is not a family of datasets. Did you mean hh?", 2),
        (["xyzzy"], "They are hh, golden-hh, qa-feedback, red-team, votes, pairs, demonstrations, kto, messages, ", 2),
    ):  # fmt: skip
        line = error_of(capsys, *argv, code=code)
        assert line.startswith("trl-ulma prepare")
        assert message in line, line
    assert not out.exists()
    assert not (raw / "o").exists()
    assert error_of(capsys, "hh", "--input", raw / "bad.jsonl", "--output", raw / "deep" / "er" / "out")
    assert not (raw / "deep").exists()
    assert not list(raw.rglob("*.part"))
    assert not list(raw.rglob("*.parquet"))


def test_a_broken_file_in_a_folder(raw, capsys):
    (raw / "data").mkdir()
    (raw / "data" / "train.parquet").write_bytes(b"PAR1")
    line = error_of(capsys, "hh", "--input", raw / "data", "--output", raw / "new.jsonl")
    assert f"{raw / 'data' / 'train.parquet'} cannot be read as parquet: Parquet file size is 4 bytes" in line


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (
            "hh",
            ("--columns", "label=chosen"),
            "--columns names label, which hh does not read. It reads chosen, rejected.",
        ),
        ("pairs", ("--columns", "answer=chosen"), "--columns names answer, which pairs does not read."),
        ("beavertails", ("--columns", "label=is_safe"), "Rated answers are the families kto and messages."),
        ("kto", ("--label_type", "continuous", "--liked"), "liked is for answers with the binary label 1, but all"),
        ("open-webui", ("--feedback", "rating", "--liked"), "liked is for answers with the binary label 1, but all"),
        ("tldr", ("--aspect", "coherence"), "The summaries are compared, and not rated by aspects. Remove the aspect"),
    ],
)
def test_an_option_that_would_not_be_used_is_refused(raw, capsys, family, options, message):
    assert message in error_of(capsys, family, "--input", raw / f"{family}.jsonl", "--output", raw / "out", *options)
    assert not (raw / "out").exists()


def test_a_seed_without_a_test_part_is_refused(raw, capsys):
    for output, *options in (("out.jsonl",), ("out", "--test_size", "0")):
        assert prepare("hh", raw / "hh.jsonl", raw / output, *options) == 0
        capsys.readouterr()
        assert prepare("hh", raw / "hh.jsonl", raw / output, *options, "--seed", 1, "--overwrite") == 2
        assert "--seed chooses the test part, but there is none" in capsys.readouterr().err


def test_optional_columns_can_be_named(raw):
    rows = [{"instruction": f"{i}?", "output": "Yes", "more": f"So {i}.", "stars": i % 2} for i in range(20)]
    (raw / "rows.json").write_text(json.dumps(rows))
    names = ("--columns", "input=more,label=stars")
    assert prepare("alpaca", raw / "rows.json", raw / "out.jsonl", *names) == 0
    first = json.loads((raw / "out.jsonl").read_text().splitlines()[0])
    assert (first["label"], first["prompt"][0]["content"].endswith("So 0.")) == (0.0, True)


def test_overwriting_replaces_the_parts(raw):
    assert prepare("hh", raw / "hh.jsonl", raw / "out") == 0
    assert prepare("pairs", raw / "pairs.jsonl", raw / "out") == 1
    assert len(load_rows(raw / "out")["train"]) == 36
    assert prepare("demonstrations", raw / "demonstrations.jsonl", raw / "out", "--overwrite") == 0
    assert len(load_rows(raw / "out")["train"]) == 18


def test_a_new_family_is_a_file_and_a_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "thumbs.py").write_text(
        "from trl_ulma.data.adapters import Adapter, LeftOut, row\n"
        "def thumbs(rows, *, strict=False):\n"
        "    for raw in rows:\n"
        "        if raw['thumb'] is None:\n"
        "            yield LeftOut('nobody voted')\n"
        "        else:\n"
        "            yield row(raw['q'], raw['a'], 1.0 if raw['thumb'] == 'up' else 0.0, demonstration=strict)\n"
        "THUMBS = Adapter(thumbs, needs=(('q', 'a', 'thumb'),), options={'--strict': {'action': 'store_true'}})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(FAMILIES, "thumbs", ("thumbs:THUMBS", "thumbs up and down"))
    rows = [{"q": "a", "a": "b", "thumb": thumb} for thumb in ("up", "down", None)]
    (tmp_path / "raw.json").write_text(json.dumps(rows))
    assert main(["prepare", "--help"]) == 0
    assert re.search(r"^  thumbs +thumbs up and down$", capsys.readouterr().out, re.M)
    assert prepare("thumbs", tmp_path / "raw.json", tmp_path / "out.jsonl", "--strict") == 0
    assert "1 × nobody voted (first: row 2)" in capsys.readouterr().out
    written = load_rows(tmp_path / "out.jsonl")["train"]
    assert (written["label"][:], written["sft_mask"][:]) == ([1.0, 0.0], [True, True])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_of_a_file_is_detected(raw, family, capsys):
    assert main(["prepare", "--detect", "--input", str(raw / f"{family}.jsonl")]) == 0
    first, *found = capsys.readouterr().out.splitlines()
    assert first == f"{raw / family}.jsonl, split train:"
    answers = {line.split()[0]: line for line in found}
    assert "of the first 20 rows can be used" in answers[family]
    assert set(answers) - {family} <= {"hh": {"golden-hh", "pairs"}, "golden-hh": {"hh", "pairs"}}.get(family, set())


def test_a_file_of_no_family_and_one_with_other_names(raw, capsys):
    (raw / "other.jsonl").write_text(json.dumps({"text": "a"}))
    assert main(["prepare", "--detect", "--input", str(raw / "other.jsonl")]) == 1
    assert "no family reads it" in capsys.readouterr().out
    (raw / "named.jsonl").write_text(json.dumps({"text": "\n\nHuman: Hi\n\nAssistant: Hello!", "score": "2"}))
    argv = ["--input", str(raw / "named.jsonl"), "--columns", "transcript=text,rating=score"]
    assert main(["prepare", "--detect", *argv]) == 0
    assert "  red-team               1 of 1 answers of the first 1 rows can be used" in capsys.readouterr().out
    assert prepare("red-team", argv[1], raw / "out.jsonl", *argv[2:]) == 0
    assert error_of(capsys, "--detect", "--input", raw / "absent.jsonl").startswith(
        "trl-ulma prepare: error: --dataset: There is no file"
    )


def test_the_commands_of_readme_are_commands():
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^trl-ulma prepare (\S+) (.*)$", text, re.MULTILINE)
    assert {family for family, _ in commands} == {"hh", "qa-feedback"}
    for family, options in commands:
        assert family_parser(family).parse_args(options.split()).output
    assert all(f"`{family}`" in text for family in FAMILIES)


def test_help_is_fast_and_work_needs_no_torch(raw):
    def python(*argv, unused):
        code = (
            f"import sys; from trl_ulma.scripts.cli import main; code = main({list(map(str, argv))}); "
            f"assert not {unused} & set(sys.modules), 'imported'; sys.exit(code)"
        )
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run.returncode == 0, run.stderr
        return run.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    for argv in (["prepare", "--help"], *(["prepare", family, "--help"] for family in ("hh", "qa-feedback"))):
        out, seconds = python(*argv, unused={"torch", "transformers", "trl", "datasets"})
        assert out.startswith("usage: trl-ulma prepare")
        assert seconds < 2
    argv = ["prepare", "hh", "--input", raw / "hh.jsonl", "--output", raw / "out"]
    out, _ = python(*argv, unused={"torch", "transformers", "trl"})
    assert "rows out            40" in out
    assert main(["prepare"]) == 2


@pytest.mark.parametrize(
    ("family", "options", "trainer"),
    [("hh", [], "ULMA"), ("qa-feedback", ["--wins"], "ULMA"), ("red-team", [], "ULMA"), ("votes", [], "PointwiseDPO")],
)
def test_what_is_written_is_trained_on_as_it_is(raw, tiny_llama, family, options, trainer):
    import trl_ulma

    assert prepare(family, raw / f"{family}.jsonl", raw / "rows", *options) == 0
    splits = load_rows(raw / "rows")
    args = getattr(trl_ulma, f"{trainer}Config")(
        str(raw / "model"), max_steps=1, per_device_train_batch_size=8, report_to="none", bf16=False, logging_steps=1,
        learning_rate=0.1,
    )  # fmt: skip
    made = getattr(trl_ulma, f"{trainer}Trainer")(
        model=tiny_llama, args=args, train_dataset=splits["train"], eval_dataset=splits["test"]
    )
    before = made.model.get_input_embeddings().weight.detach().clone()
    result = made.train()
    assert result.global_step == 1
    assert result.training_loss > 0
    assert not before.equal(made.model.get_input_embeddings().weight)
    labels = made.evaluate()
    assert labels["eval_loss"] > 0
    if family == "red-team":
        assert "eval_rewards/mse" in labels


def test_a_mixture_of_families_is_trained_on(raw, tiny_llama):
    from trl_ulma import ULMAConfig, ULMATrainer
    from trl_ulma.data.mix import mix

    for family in ("hh", "red-team"):
        assert prepare(family, raw / f"{family}.jsonl", raw / f"{family}.parquet") == 0
    assert prepare("pairs", raw / "pairs.jsonl", raw / "pairs-rows.jsonl") == 0
    names = ("hh.parquet", "red-team.parquet", "pairs-rows.jsonl")
    mixture = mix({name: load_rows(raw / name)["train"] for name in names}, dict.fromkeys(names, 0.5), seed=0)
    assert str(mixture).startswith("50 rows (seed 0): 20 of 40 rows of hh.parquet (40.0%), 10 of 20 rows of red-team")
    args = ULMAConfig(str(raw / "model"), max_steps=1, per_device_train_batch_size=16, report_to="none", bf16=False)
    assert ULMATrainer(model=tiny_llama, args=args, train_dataset=mixture.rows).train().global_step == 1


def test_text_of_pairs_that_is_not_read_is_named(tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text(json.dumps([row | {"system": "Be kind."} for row in RAW["pairs"]]))
    assert prepare("pairs", tmp_path / "pairs.jsonl", tmp_path / "out") == 0
    assert "the text in column system is ignored. If" in capsys.readouterr().err
