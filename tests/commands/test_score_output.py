"""What `trl-ulma score` writes and says of scored rows, whatever scored them."""

import codecs
import csv
import datetime
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from tiny import make_tokenizer
from world import make_rows, make_trainer

from trl_ulma.data import seen_prompts
from trl_ulma.data.csv_rows import Layout
from trl_ulma.data.files import load_rows
from trl_ulma.data.names import Names
from trl_ulma.judge import Judge
from trl_ulma.labels import parse_transform
from trl_ulma.saved import SavedSettings
from trl_ulma.scripts.cli import main
from trl_ulma.scripts.score import as_named, in_one_line, most_notable, summary, write
from trl_ulma.scripts.score import layout as layout_of

TURNS = [{"role": "user", "content": "Hi"}]
CALL = {"type": "function", "function": {"name": "now", "arguments": {"zone": "CET"}}}
ROWS = [
    {
        "prompt": TURNS,
        "completion": [{"role": "assistant", "content": f"It's “{i}”,\\nsir", "tool_calls": [CALL]}],
        "label": float(i % 2),
        "row": i,
        "reward": 0.1 * i,
        "predicted_label": 0.5,
        "surprise": float(i),
    }
    for i in range(7)
]


def test_cells_of_conversations_are_json(tmp_path):
    scored = Dataset.from_list(ROWS)
    write(scored, tmp_path / "scored.csv")
    with open(tmp_path / "scored.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [json.loads(row["prompt"]) for row in found] == [TURNS] * 7
    assert [json.loads(row["completion"]) for row in found] == scored["completion"][:]
    assert [float(row["reward"]) for row in found] == scored["reward"][:]
    assert list(found[0]) == scored.column_names
    write(scored, tmp_path / "scored.jsonl")
    assert Dataset.from_json(str(tmp_path / "scored.jsonl"))["completion"][:] == scored["completion"][:]
    plain = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["[1]", None], "row": [0, 1]})
    write(plain, tmp_path / "plain.csv")
    with open(tmp_path / "plain.csv", newline="", encoding="utf-8") as file:
        assert [row["completion"] for row in csv.DictReader(file)] == ["[1]", ""]
    returns = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["50 %\r100 %", "c\r\nd"], "label": [1, None]})
    write(returns, tmp_path / "returns.csv")
    assert load_rows(tmp_path / "returns.csv")["train"].to_dict() == returns.to_dict()


def test_values_of_several_kinds_in_a_column_are_cells_like_others(tmp_path):
    notes = ['a/b "c" é', [1], 0.5, True]
    lines = [
        json.dumps({"prompt": "a", "completion": "b", "label": label, "note": note})
        for label, note in zip((1, "N/A", None, 0.25), notes, strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    rows = load_rows(tmp_path / "rows.jsonl", needs_label=False)["train"]
    write(rows, tmp_path / "scored.csv")
    with open(tmp_path / "scored.csv", newline="", encoding="utf-8") as file:
        found = [(row["label"], row["note"]) for row in csv.DictReader(file)]
    assert found == [("1", notes[0]), ("N/A", "[1]"), ("", "0.5"), ("0.25", "True")]
    write(rows, tmp_path / "scored.csv", Layout(";", ","))
    assert load_rows(tmp_path / "scored.csv", needs_label=False)["train"]["label"][:] == [1, "N/A", None, 0.25]


HEAD, RATED = "id;Frage;Antwort;Note", 'a;"Grün; oder?";Ja;{}'


@pytest.mark.parametrize(
    ("name", "text", "encoding", "layout"),
    [
        ("rows.csv", f"{HEAD}\n{RATED.format('4,5')}\n{RATED.format('0,25')}\n", "cp1252", Layout(";", ",", True)),
        ("rows.csv", f"{HEAD}\n{RATED.format(4)}\n{RATED.format(2)}\n", "utf-8-sig", Layout(";", ",", True)),
        ("rows.csv", f"{HEAD}\n{RATED.format('4.5')}\n{RATED.format('1.000')}\n", "utf-8", Layout(";", ".")),
        ("rows.csv", f"{HEAD}\n{RATED.format(4)}\n".replace(";", "|"), "utf-8", Layout("|")),
        ("rows.tsv", f"{HEAD}\n{RATED.format(4)}\n".replace(";", "\t"), "utf-16", Layout(has_mark=True)),
    ],
)
def test_a_csv_file_is_written_for_the_program_that_wrote_the_rows(tmp_path, name, text, encoding, layout, caplog):
    (tmp_path / name).write_bytes(text.encode(encoding))
    names = "prompt=Frage,completion=Antwort,label=Note"
    rows = load_rows(tmp_path / name, columns=names)["train"]
    assert layout_of(rows, Names.of(names, None)) == layout
    labels = [4.5, 1.234, 1.5e-05, -3.0]
    scored = rows.select([0] * 4).remove_columns("label").add_column("label", labels)
    scored = scored.add_column("reward", [0.125, -1e-07, None, 2.0])
    write(as_named(scored, Names.of(names, None)), tmp_path / "scored.csv", layout)
    content = (tmp_path / "scored.csv").read_bytes()
    assert content.startswith(codecs.BOM_UTF8) == layout.has_mark
    assert f'reward\n"Grün{"|" if "|" in text else layout.delimiter}'.encode() not in content
    caplog.clear()
    found = load_rows(tmp_path / "scored.csv", columns=f"{names},weight=reward")["train"]
    assert found["label"][:] == labels
    assert found["weight"][:] == [0.125, -1e-07, None, 2.0]
    assert [found[name][:] for name in ("prompt", "id")] == [scored[name][:] for name in ("prompt", "id")]
    assert all("separated by" in said or "decimal commas" in said for said in caplog.messages)


def test_scored_rows_have_the_names_and_labels_of_their_file():
    scored = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", "d"], "label": [1, None], "reward": [0.5, 0]})

    def named(columns, label_map=None, rows=scored):
        return as_named(rows, Names.of(columns, label_map)).to_dict()

    found = named("prompt=q,label=thumb", "Up=1,down=0")
    assert found == {"q": ["a", "b"], "completion": ["c", "d"], "thumb": ["up", None], "reward": [0.5, 0]}
    # Which of two words a label was is not known
    assert named("label=thumb", "up=1,yes=1,no=0")["label"] == [1, None]
    # The name is taken by what is written
    assert named("label=reward")["label"] == [1, None]
    halves = Dataset.from_dict({"chosen": ["a"], "rejected": ["b"], "label": [1]})
    assert named("chosen=rejected,rejected=chosen,label=x", rows=halves) == {
        "rejected": ["a"],
        "chosen": ["b"],
        "label": [1],
    }


def test_a_file_of_json_lines_keeps_values_exactly(tmp_path):
    day = datetime.datetime(2024, 1, 2, 3, 4, 5)
    rows = {
        "p": [1.5e-12, 0.12345678901234567],
        "day": [day, day],
        "deep": [{"x": -1e-11}, {"x": 0.1}],
        "raw": [b"\xff"] * 2,
    }
    write(Dataset.from_dict(rows), tmp_path / "scored.jsonl")
    found = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [row["p"] for row in found] == rows["p"]
    assert [row["deep"] for row in found] == rows["deep"]
    assert found[0]["day"] == "2024-01-02T03:04:05"


def test_what_json_lacks_is_written_as_what_it_has(tmp_path):
    rows = {"label": [1.0, np.nan], "deep": [{"x": [np.nan, 1.0]}, {"x": [np.inf]}]}
    write(Dataset.from_dict(rows), tmp_path / "scored.jsonl")
    found = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [row["label"] for row in found] == [1.0, None]
    assert [row["deep"]["x"] for row in found] == [[None, 1.0], ["inf"]]
    write(Dataset.from_dict(rows), tmp_path / "scored.csv")
    with open(tmp_path / "scored.csv", newline="", encoding="utf-8") as file:
        assert [(row["label"], row["deep"]) for row in csv.DictReader(file)] == [
            ("1.0", '{"x": [null, 1.0]}'), ("", '{"x": ["inf"]}'),
        ]  # fmt: skip


def test_the_file_that_is_read_is_not_written(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n")
    assert main(["score", "--model", "m", "--dataset", str(file), "--output", f"{tmp_path}/./rows.jsonl"]) == 2
    assert "is the file that is read. Name another one." in capsys.readouterr().err
    assert file.read_text() == "{}\n"


@pytest.mark.parametrize("output", ["folder.csv", "rows.jsonl/scored.csv"])
def test_an_output_that_cannot_be_written_is_told_before_a_model_is_loaded(tmp_path, capsys, output):
    (tmp_path / "folder.csv").mkdir()
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": "b", "label": 1}) + "\n")
    assert main(["score", "--model", "m", "--dataset", str(file), "--output", f"{tmp_path}/{output}"]) == 1
    assert f"{output} cannot be written. Name a file" in capsys.readouterr().err


def test_columns_that_are_written_are_refused_before_a_model_is_loaded(tmp_path, capsys):
    file = tmp_path / "scored.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": "b", "label": 1, "reward": 0.5}) + "\n")
    assert main(["score", "--model", str(tmp_path), "--dataset", str(file), "--output", f"{tmp_path}/o.csv"]) == 1
    assert "columns that score writes: reward. Rename or remove them." in capsys.readouterr().err


def test_halves_of_pairs_are_counted_as_answers():
    rows = Dataset.from_dict({"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", ""]})
    scored = Dataset.from_dict({"row": [0, 0, 1], "surprise": [3.0, 2.0, 1.0]})
    said = "out.csv holds 3 scored answers of 2 pairs, the most surprising first; 1 of 4 were left out."
    assert summary(Path("out.csv"), rows, scored, "surprise") == said
    rows = Dataset.from_dict({"prompt": ["a"] * 4, "completion": ["b"] * 4})
    assert summary(Path("o"), rows, scored, "row") == "o holds 3 scored rows; 1 of 4 were left out."


def test_the_three_most_notable_rows_are_shown():
    lines = most_notable(Dataset.from_list(ROWS))
    assert len(lines) == 1 + 3 * 3
    assert [line.split(":")[0].strip() for line in lines[1::3]] == ["row 6", "row 5", "row 4"]
    assert lines[4] == "  row 5: label 1, predicted 0.50"
    assert lines[5].startswith("    prompt: ")
    assert lines[6].startswith("    answer: ")
    pairs = Dataset.from_dict(
        {
            "chosen": ["good " * 30] * 2,
            "rejected": ["bad"] * 2,
            "label": [1.0, 0.0],
            "row": [0, 0],
            "predicted_label": [0.5, 0.5],
            "surprise": [1.0, 2.0],
        }
    )
    _, first, _, second = most_notable(pairs)[1:]  # the prompts are in the answers
    assert first == "    answer: bad"
    assert second.startswith("    answer: good good")
    assert "…" in second
    assert len(second) < 100


@pytest.mark.parametrize("held_out", [None, True])
@pytest.mark.parametrize("skill", [0.0, 1.0])
def test_a_list_of_extreme_labels_is_named_so_and_raters_are_named(held_out, skill):
    label = np.tile([1.0, 2, 3, 4, 5], 16)
    predicted = 3 + skill * (label - 3)
    known = np.arange(80) < 40
    # What a model knows of rows that it was trained on does not count
    predicted = np.where(known & (held_out is True), label, predicted)
    rows = {
        "prompt": ["Why?"] * 80,
        "completion": ["So."] * 80,
        "rater": ["Mira", None] * 40,
        "label": label,
        "row": np.arange(80),
        "predicted_label": predicted,
        "surprise": (predicted - label) ** 2 + np.arange(80) / 1e6,
        "held_out": [held_out and not each for each in known.tolist()],
    }
    first, *lines = most_notable(Dataset.from_dict(rows), {"Mira"})
    assert all(("by Mira" in line) == line.endswith(" for this rater") for line in lines if "predicted" in line)
    assert ("mostly those farthest from the mean" in first) == (skill == 0)
    named = {line.split(": ", 1)[1].split(",")[0] for line in lines if "predicted" in line}
    assert any(each.endswith(" by Mira") for each in named)
    assert any(" by" not in each for each in named)


@pytest.mark.parametrize(
    ("rows", "places"),
    [
        (3, ["From the best to the worst:", "row 2", "row 1", "row 0"]),
        (
            12,
            [
                "The best:",
                *(f"row {i}" for i in (11, 10, 9)),
                "The worst:",
                *(f"row {i}" for i in (2, 1, 0)),
            ],
        ),
    ],
)
def test_without_labels_the_best_and_worst_answers_are_shown(rows, places):
    scored = [{"completion": f"No {i}", "row": i, "reward": i / 7, "predicted_label": i / 9} for i in range(rows)]
    lines = most_notable(Dataset.from_list(scored[::-1]))
    assert [line.split(": ")[0].strip() for line in lines if "answer:" not in line] == places
    assert lines[1] == f"  row {rows - 1}: predicted {(rows - 1) / 9:.2f}"


def test_what_a_row_says_is_one_line_of_a_terminal():
    assert in_one_line([{"role": "user", "content": "How?\n\x1b[31m"}]) == "How? [31m"
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert in_one_line(turns) == "system: Be kind. user: Hi"
    assert in_one_line([{"role": "assistant", "content": None, "tool_calls": []}]).startswith('[{"role": "assistant"')


def judge(label_type="binary", transform=None, labels=(1.0, 2.0, 4.0)):
    """A judge whose reward of each row is 0.5, after a training on `labels`."""
    fitted = None if transform is None else parse_transform(transform, label_type).fit(np.array(labels))
    settings = SavedSettings(beta=0.1, label_type=label_type, label_transform=fitted)
    return Judge(settings, make_tokenizer(), lambda rows: np.full(len(rows), 0.5))


def test_each_row_says_whether_it_was_held_out_of_the_training(tmp_path, monkeypatch):
    rows = make_rows(3).map(lambda row, i: {"prompt": f"What is {i}?"}, with_indices=True)
    pairs = Dataset.from_dict({"prompt": rows["prompt"][:], "chosen": [" a"] * 3, "rejected": [" b"] * 3})
    hashes = seen_prompts.training_hashes(rows, [0])
    seen_prompts.save(hashes, tmp_path)
    file, settings = str(tmp_path / seen_prompts.FILE), SavedSettings(beta=0.1)

    def held_out(rows, known):
        judge = Judge(settings, make_tokenizer(), lambda rows: np.full(len(rows), 0.5), training_prompts=known)
        return judge.score(rows)

    assert held_out(rows, None)["held_out"][:] == [None] * 3
    scored = held_out(rows, file)
    assert scored["held_out"][:] == [False, True, True]
    assert held_out(rows.remove_columns("label"), file)["held_out"][:] == [False, True, True]
    halves = held_out(pairs, file)
    assert [(row["row"], row["held_out"]) for row in halves] == [(i, i > 0) for i in (0, 0, 1, 1, 2, 2)]
    # If there are very many prompts, the greatest hashes are not stored, so nothing is known of their rows
    monkeypatch.setattr(seen_prompts, "MOST", 1)
    greater = seen_prompts.hashes_of(rows["prompt"][:]) > hashes.max()
    found = [None if is_greater else i > 0 for i, is_greater in enumerate(greater)]
    assert held_out(rows, file)["held_out"][:] == found
    assert found[0] is False
    # What is not known is null, or an empty cell
    for name in ("s.jsonl", "s.csv"):
        write(scored, tmp_path / name)
        assert load_rows(tmp_path / name)["train"]["held_out"][:] in ([False, True, True], ["False", "True", "True"])
    write(held_out(rows, None), tmp_path / "s.jsonl")
    assert [json.loads(line)["held_out"] for line in (tmp_path / "s.jsonl").read_text().splitlines()] == [None] * 3
    with pytest.raises(ValueError, match=r"The rows have columns that score writes: held_out\. Rename or remove them."):
        held_out(rows.add_column("held_out", [True] * 3), file)


def test_what_a_row_does_not_have_is_not_written(tmp_path):
    rows = make_rows(2, label=[1.0, 4.0], note=["", None])
    scored = judge("continuous").score(rows)
    for name in ("s.jsonl", "s.csv", "s.parquet"):
        write(scored, tmp_path / name)
        assert "probability" not in load_rows(tmp_path / name)["train"].column_names
    mixed = judge().score(make_rows(2, label=[1.0, 4.0], label_type=["binary", "continuous"], note=["", None]))
    write(mixed, tmp_path / "s.jsonl")
    one, other = map(json.loads, (tmp_path / "s.jsonl").read_text().splitlines())
    assert one["probability"] == pytest.approx(0.6224593)
    assert "probability" not in other
    assert other["note"] is None  # as in the row


def test_errors_do_not_advise_options_that_score_does_not_have():
    with pytest.raises(ValueError, match=r"Row 1 of the scored dataset: label is 4.0, outside \[0, 1\]") as caught:
        judge().score(make_rows(2, label=[1.0, 4.0]))
    assert "set label_type" not in str(caught.value)
    assert 'leave it empty, or add a column label_type with "continuous"' in str(caught.value)
    assert judge().score(make_rows(2, label=[1.0, None]))["reward"][:] == [0.5, 0.5]
    types = {"label": [1.0, 4.0], "label_type": ["binary", "continuous"]}
    assert judge().score(make_rows(2, **types))["predicted_label"][:] == pytest.approx([0.6224593, 0.5])


@pytest.mark.parametrize("transform", ["standardize", "quantile", None])
def test_pairs_are_scored_by_a_model_of_ratings(transform):
    pairs = Dataset.from_dict({"prompt": ["a"], "chosen": [" b"], "rejected": [" c"]})
    scored = judge("continuous", transform).score(pairs)
    assert scored["label"][:] == [1.0, 0.0]
    assert scored["probability"][:] == scored["predicted_label"][:] == pytest.approx([0.6224593] * 2)
    assert scored["surprise"][:] == pytest.approx([0.474077, 0.974077])


@pytest.mark.parametrize("own", [1, 0, 7.5, "better", None])
def test_a_column_of_labels_beside_pairs_does_not_hide_which_half_a_row_is(own):
    pairs = Dataset.from_dict({"prompt": ["a"] * 2, "chosen": [" b"] * 2, "rejected": [" c"] * 2, "label": [own] * 2})
    scored = judge().score(pairs)
    assert scored["label"][:] == [1.0, 0.0] * 2
    assert [line.split(": ")[1] for line in most_notable(scored) if "answer:" in line] == ["c", "c", "b"]
    assert summary(Path("o"), pairs.select([0]), scored.select([0, 1]), "row").startswith(
        "o holds 2 scored answers of 1 pair;"
    )


def test_labels_beyond_those_of_the_training_are_counted(caplog, monkeypatch):
    for name in ("transformers", "trl_ulma"):  # whichever the package's loggers are below
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    rows = make_rows(5, label=[0.0, 1.0, 3.0, 9.0, None])
    judge("continuous", "quantile").score(rows)
    said = "2 of 4 labels are outside the range of the training labels, 1 to 4. The transform quantile reads them"
    assert [record for record in caplog.messages if record.startswith(said)]
    caplog.clear()
    judge("continuous", "standardize").score(rows)
    judge("continuous", "quantile").score(make_rows(2, label=[1.0, 4.0]))
    assert not [record for record in caplog.messages if "outside the range" in record]


def test_thumbs_scored_by_a_model_of_ratings_are_cautioned_about(caplog, monkeypatch):
    for name in ("transformers", "trl_ulma"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)

    def warned(center, label, transform=None, **columns):
        caplog.clear()
        fitted = transform and parse_transform(transform, "continuous").fit(np.arange(1.0, 6.0))
        settings = SavedSettings(beta=0.1, label_type="continuous", label_transform=fitted, label_center=center)
        rows = make_rows(3, label=label, **columns)
        Judge(settings, make_tokenizer(), lambda prepared: np.arange(3.0)).score(rows)
        return [message for message in caplog.messages if "are 0 or 1" in message]

    said = ["All 3 labels are 0 or 1 (false or true), and those of the training are about 3 on average. If they are "
            'likes and dislikes, add a column label_type with "binary".']  # fmt: skip
    assert warned(3.0, [True, False, True]) == warned(0.0, [0, 1, 1], "standardize") == said
    assert warned(0.0, [0, 1, 5], "standardize") == warned(0.5, [0, 1, 1]) == warned(None, [0, 1, 1]) == []
    assert warned(3.0, [0, 1, 1], label_type=["binary"] * 3) == []


def test_rows_have_the_rewards_of_the_format_trained_on_whatever_file_they_come_from(tiny_llama, tmp_path):
    texts = [{"prompt": f"What is {i}?", "completion": f"It is {i}.", "label": i % 2} for i in range(8)]
    Dataset.from_list(texts).to_csv(tmp_path / "rows.csv")
    Dataset.from_list(texts).to_json(tmp_path / "rows.jsonl")
    found = {}
    for trained_on in ("csv", "jsonl"):  # which become conversations, and which stay text
        trainer = make_trainer(
            tiny_llama, load_rows(tmp_path / f"rows.{trained_on}")["train"], tmp_path / trained_on, max_steps=3
        )
        trainer.train()
        trainer.save_model()
        for scored in ("csv", "jsonl"):
            output = tmp_path / f"{trained_on}-{scored}.jsonl"
            argv = ["--model", str(tmp_path / trained_on), "--dataset", str(tmp_path / f"rows.{scored}")]
            assert main(["score", *argv, "--ref_model", tiny_llama, "--sort", "row", "--output", str(output)]) == 0
            found[trained_on, scored] = [json.loads(line)["reward"] for line in output.read_text().splitlines()]
        assert found[trained_on, "csv"] == found[trained_on, "jsonl"]
    assert found["csv", "csv"] != found["jsonl", "csv"]


def test_rewards_that_do_not_tell_rows_apart_are_cautioned_about(caplog, tmp_path):
    logging.getLogger("transformers").propagate = True

    def warned(rewards, rows, label_type="binary"):
        caplog.clear()
        settings = SavedSettings(beta=0.1, label_type=label_type)
        Judge(settings, make_tokenizer(), lambda prepared: np.array(rewards)).score(rows)
        return [message for message in caplog.messages if "rewards of all" in message or "nearly alike" in message]

    rows, stars = make_rows(6), make_rows(6, label=[1.0, 2, 3, 4, 5, 5])
    (zero,) = warned([0.0] * 6, rows)
    assert zero.startswith("The rewards of all 6 rows are 0, because the model computes the same log-probabilities as")
    assert warned([0.0] * 6, rows.remove_columns("label")) == [zero]
    (near,) = warned([3.1, 3.2, 3.3, 3.2, 3.1, 3.2], stars, "continuous")
    assert near.startswith(
        "The predicted labels of the 6 rows are nearly alike, as is common after little training: 90% of them are "
        "between 3.1 and 3.27, "
    )
    assert "and 90% of their labels between 1.25 and 5. " in near
    assert near.endswith("These are too few rows to measure how good their order is.")
    assert warned([1.0, 2, 3, 3, 4, 3], stars, "continuous") == []
    assert warned([-2.0, 2, -2, 2, -2, 2], rows) == []
    (near,) = warned([0.1, 0.2, 0.1, 0.2, 0.1, 0.2], rows.remove_columns("label"))
    assert near.startswith(
        "The predicted labels of the 6 rows are nearly alike, as is common after little training: 90% of them are "
        "between 0.525 and 0.55."
    )
    assert near.endswith(" `trl-ulma evaluate` measures their order on rows with labels.")
    # Enough held-out rows are looked at without those that were trained on
    many = make_rows(100).map(lambda row, i: {"prompt": f"What is {i}?"}, with_indices=True)
    rewards = np.where(np.arange(100) < 60, np.linspace(-3, 3, 100), np.linspace(0, 0.1, 100))
    for count, told in ((60, "The predicted labels of the 40 held-out rows are nearly alike"), (90, None), (0, None)):
        seen_prompts.save(seen_prompts.training_hashes(many, range(count)), tmp_path)
        settings, file = SavedSettings(beta=0.1), str(tmp_path / seen_prompts.FILE)
        caplog.clear()
        Judge(settings, make_tokenizer(), lambda prepared: rewards, training_prompts=file).score(many)
        found = [message for message in caplog.messages if "nearly alike" in message]
        assert (told is None and not found) or found[0].startswith(told)
    # One reward, or labels that are all alike, tell nothing of the model
    assert warned([0.5], make_rows(1)) == []
    assert warned([0.1] * 6, make_rows(6, label=[1.0] * 6)) == []
