"""Files are read as they are written: types that all rows agree with, names and labels that are mapped, and fuzz."""

import csv
import gzip
import io
import json
import math
import pickle
import random
import re
import shlex
import subprocess
import sys
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, concatenate_datasets
from trl.scripts.utils import DatasetConfig

import trl_ulma
from trl_ulma.data.columns import number
from trl_ulma.data.directions import direction
from trl_ulma.data.files import check_splits, load_files, load_rows, split_by_prompt
from trl_ulma.data.mixture import load_mixture
from trl_ulma.data.names import Names
from trl_ulma.data.origins import StreamOrigins, joined_origins, located, origin, places_of
from trl_ulma.data.proposals import rating_of
from trl_ulma.data.read_files import code_hash
from trl_ulma.labels import InvalidRow, LabelRules, read_labels
from trl_ulma.scripts.cli import main
from trl_ulma.scripts.data_options import _as_text


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, content, encoding="utf-8"):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(label, **others):
    return {"prompt": "p", "completion": "c", "label": label, **others}


def read(path, **kwargs):
    return load_rows(path, **kwargs)["train"]


def typed(values):
    """Values with their types: True, 1 and 1.0 are not the same."""
    return [(type(value), value) for value in values]


# Types


@pytest.mark.parametrize("streaming", [False, True])
def test_tools_keep_the_order_of_their_keys_and_their_nulls(tmp_path, streaming):
    def tool(**parameters):
        return {"name": "find", "parameters": parameters}

    tools = [[tool(what="text", most=5)], [tool(most=None, what="text"), tool(least=0.3)], [], None]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "Hi", "tools": each}) + "\n" for each in tools))
    read = [row["tools"] for row in load_rows(file, streaming=streaming)["train"]]
    assert read == [json.dumps(tools[0]), json.dumps(tools[1]), [], None]


def test_each_split_has_the_types_of_its_own_rows(tmp_path):
    write(tmp_path / "train.jsonl", lines([row(True), row(False)]))
    write(tmp_path / "test.jsonl", lines([row(0.5), row(0.2)]))
    splits = load_rows(tmp_path)
    assert typed(splits["train"]["label"]) == typed([True, False])
    assert typed(splits["test"]["label"]) == typed([0.5, 0.2])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [(lines([row(1), row(5)]), lines([row(4.5)])), (lines([row(True)]), lines([row(0.5)])), (None, lines([row(0.5)]))],
)
def test_files_of_one_split_agree(tmp_path, first, second, streaming):
    if first is None:
        pq.write_table(pa.table({"prompt": ["p"], "completion": ["c"], "label": [True]}), tmp_path / "train-0.parquet")
    else:
        write(tmp_path / "train-0.jsonl", first)
    write(tmp_path / "train-1.jsonl", second)
    labels = [each["label"] for each in load_rows(tmp_path, streaming=streaming)["train"]]
    assert labels in ([1, 5, 4.5], [1, 0.5])


def test_labels_that_change_after_ten_megabytes(tmp_path):
    rows = [row(i % 2, note=None) | {"prompt": "x" * 2000} for i in range(6000)] + [row(0.5, note=["late"])]
    found = read(write(tmp_path / "rows.jsonl", lines(rows)))
    assert found["label"][:][-3:] == [0.0, 1.0, 0.5]
    assert (found["note"][0], found["note"][-1]) == (None, ["late"])


@pytest.mark.parametrize(
    "values",
    [
        [1, "x", 2.5, None],
        ["", "text"],
        [None, None, 3],
        [[1], "x"],
        [{"a": 1}, {"a": "x"}],
        [{"a": 0.1234567890123456}, "x"],
        [2**70, 1],
        [float("nan"), "x"],
        [{}, {"a": 1}],
        ["2020-01-01 00:00:00", "2020-13-01"],
        ["4", "true", '{"a": 1}', [1]],
        [json.loads("[" * 700 + "]" * 700), [1]],
        [json.loads('{"a":' * 300 + "1" + "}" * 300)],
    ],
)
def test_columns_that_nothing_reads_never_matter(tmp_path, values):
    rows = [row(i % 2, other=value) for i, value in enumerate(values)]
    found = read(write(tmp_path / "rows.jsonl", lines(rows)))
    assert found["label"][:] == [i % 2 for i in range(len(values))]
    assert found["prompt"][:] == ["p"] * len(values)
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    read_back = found["other"][:]
    assert (
        read_back == values
        or [None if v is None else v for v in read_back]
        == [None if v is None else t for v, t in zip(values, texts, strict=True)]
        or values == [{}, {"a": 1}]
    )


@pytest.mark.parametrize("odd", [float("nan"), 0.1234567890123456, 2**70, [float("nan")]])
@pytest.mark.parametrize("column", ["completion", "label"])
def test_one_odd_value_does_not_make_text_of_the_others(tmp_path, column, odd):
    turns = [{"role": "user", "content": "Hi"}]
    rows = [row(1), row("good"), row(5) | {"completion": turns}, row(1) | {column: odd}]
    found = read(write(tmp_path / "rows.jsonl", lines(rows)))
    assert found[column][:3] == [each[column] for each in rows[:3]]
    assert not isinstance(found[column][3], str)


def test_bytes_among_texts_are_no_text(tmp_path):
    for name, prompt in (("a", pa.array(["p"])), ("b", pa.array([b"p"]))):
        pq.write_table(pa.table({"prompt": prompt, "completion": ["c"], "label": [1]}), tmp_path / f"{name}.parquet")
    assert read(tmp_path)["prompt"][:] == ["p", {"bytes": "b'p'"}]


@pytest.mark.parametrize("streaming", [False, True])
def test_numbers_truth_values_and_marks(tmp_path, streaming):
    rows = [row("4", weight=1, sft_mask=1, log_z="-0.5"), row(" 0.5", weight="2", sft_mask="false", log_z=0)]
    [one, other] = read(write(tmp_path / "rows.jsonl", lines(rows)), streaming=streaming)
    assert (one["label"], other["label"]) == (4, 0.5)
    assert (one["sft_mask"], other["sft_mask"]) == (True, False)
    assert (one["weight"], other["weight"], one["log_z"]) == (1, 2, -0.5)


def test_what_is_read_as_a_number_is_said(tmp_path, caplog):
    read(write(tmp_path / "rows.jsonl", lines([row("4"), row("5")])))
    assert [each.getMessage() for each in caplog.records] == [
        f"{tmp_path / 'rows.jsonl'}: label: numbers that are stored as text are converted to numbers (2 values)."
    ]


def test_labels_that_are_no_numbers_stay_what_they_are(tmp_path):
    found = read(write(tmp_path / "rows.jsonl", lines([row("4"), row("up"), row(None), row([1]), row(math.inf)])))
    assert found["label"][:] in ([4, "up", None, [1], math.inf], ["4", "up", None, "[1]", "Infinity"])


@pytest.mark.parametrize(
    ("text", "value"),
    [("4", 4), ("-1", -1), (".5", 0.5), ("1e3", 1000.0), ("TRUE", True), (" 2 ", 2), ("0" * 17 + "7", 7)]
    + [(text, None) for text in ("", "up", "nan", "inf", "1_000", "1,5", "0x1", "4/5", "9" * 30, "٤")],
)
def test_what_is_a_number(text, value):
    assert typed([number(text)]) == typed([value])


def test_messages_keep_what_they_hold(tmp_path):
    turns = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "weight": 0}],
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "x"}],
    ]
    found = read(write(tmp_path / "rows.jsonl", lines([{"prompt": each, "label": 1} for each in turns])))
    assert found["prompt"][:] == turns


def test_parquet_types(tmp_path):
    table = {
        "prompt": pa.array(["a", "b"], pa.large_string()),
        "completion": pa.array(["x", "y"]).dictionary_encode(),
        "label": pa.array([Decimal("0.50"), Decimal("1")], pa.decimal128(5, 2)),
        "about": pa.array([{"a": 1}, {"a": 2}]),
    }
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    table["map"] = pa.array([[("a", 1)], [("b", 2)]], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table(table), tmp_path / "map.parquet")
    for name in ("rows", "map"):
        for streaming in (False, True):
            [one, other] = read(tmp_path / f"{name}.parquet", streaming=streaming)
            assert (one["prompt"], one["completion"], other["about"]) == ("a", "x", {"a": 2})
            assert typed([one["label"], other["label"]])[0] == (float, 0.5)
            assert other["label"] == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_file_without_rows_is_refused(tmp_path, streaming):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet cannot be read as parquet: it contains no rows"):
        load_rows(tmp_path / "rows.parquet", streaming=streaming)


# CSV


def csv_file(path, text, encoding="utf-8"):
    return read(write(path, text, encoding))


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.csv.gz"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_any_delimiter_and_encoding(tmp_path, name, delimiter, encoding, caplog):
    rows = [["prompt", "completion", "label"], ["Où, là; ça\t?", 'He said "non".\r\nThen left.', "1"], ["é", "", "0.5"]]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    content = text.getvalue().encode(encoding)
    found = read(write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content))
    assert found["prompt"][:] == [rows[1][0], rows[2][0]]
    assert found["completion"][:] == [rows[1][1], ""]
    assert found["label"][:] == [1, 0.5]
    said = " ".join(record.getMessage() for record in caplog.records)
    shown = {"cp1252": "cp1252", "utf-16": "UTF-16", "utf-16-le": "UTF-16-LE", "utf-16-be": "UTF-16-BE"}
    assert (f"the file is read as {shown.get(encoding)}" in said) == (encoding in shown)
    usual = "\t" if name == "rows.tsv" else ","
    assert ("the fields are separated by" in said) == (delimiter != usual)


@pytest.mark.parametrize("text", ["None", "NA", "null", "NaN", "4", "5.0", "true", "2020-01-01", " ", "-", "#N/A"])
def test_text_is_text(tmp_path, text):
    found = csv_file(tmp_path / "rows.csv", f"prompt,completion,chosen,rejected\n{text},{text},{text},{text}\nx,,,\n")
    assert found[0] == dict.fromkeys(("prompt", "completion", "chosen", "rejected"), text)
    assert found[1] == {"prompt": "x", "completion": "", "chosen": "", "rejected": ""}


def test_errors_of_a_spreadsheet_are_counted(tmp_path, caplog):
    text = "prompt,completion,label\nHi,#NAME?,1\nHo,#NAME?,0\nHu,#1,1\n#REF!,No,−1\n"
    rows = read(write(tmp_path / "rows.csv", text))
    assert rows["completion"][:] == ["#NAME?", "#NAME?", "#1", "No"]
    assert rows["label"][:] == [1, 0, 1, -1]  # with a Unicode minus
    found = "cells that are errors of a spreadsheet, such as"
    assert [each.partition("rows.csv: ")[2] for each in caplog.messages] == [
        f"completion: {found} #NAME?, are read as text. Restore them (2 values).",
        f"prompt: {found} #REF!, are read as text. Restore them.",
    ]


def test_labels_that_a_spreadsheet_turned_into_dates_are_named(tmp_path):
    start = "prompt;completion;label\n"
    file = tmp_path / "rows.csv"
    for dates in ("05.04.2024 04.Mai", "5-Apr Apr-5", "2024-04-05 2024-04-06T00:00:00"):
        file.write_text(start + "".join(f"{i}?;No {i};{date}\n" for i, date in enumerate(dates.split())))
        with pytest.raises(
            ValueError, match=r"has labels that are dates \(.*\)\. Spreadsheets turn ratings such as 4/5"
        ):
            check_splits(load_rows(file), str(file))
    with pytest.raises(ValueError, match=r"It is a date\. Spreadsheets turn ratings"):
        read_labels({"label": ["5-Apr"], "prompt": ["Hi"]}, [0], "train", LabelRules())


@pytest.mark.parametrize("streaming", [False, True])
def test_a_day_among_decimal_commas_is_no_number(tmp_path, streaming):
    file = tmp_path / "rows.csv"
    file.write_text("prompt;completion;label\nHi;Ho;3,5\nHi;No;01.05\n")
    with pytest.raises(ValueError, match=r"rows\.csv, line 3: label is '01.05', .* looks like a day and a month"):
        load_rows(file, streaming=streaming)
    file.write_text("prompt;completion;label\nHi;Ho;03.50\nHi;No;01.05\n")
    assert [row["label"] for row in load_rows(file, streaming=streaming)["train"]] == [3.5, 1.05]


def test_the_guard_around_a_number_is_no_part_of_it(tmp_path, caplog):
    file = tmp_path / "rows.csv"
    file.write_text('prompt,completion,label\nHi,Ho,\'-1\nHi,No,"=""4.5"""\nHi,Yes,2\n')
    assert load_rows(file)["train"]["label"][:] == [-1, 4.5, 2]
    assert 'label: numbers that exports guard, as in \'-1 and ="4", are read without the guard (2 values' in caplog.text


SHEET_ERRORS = "#WERT! #NV #BEZUG! #VALEUR! #ZAHL! #ERROR! #ÜBERLAUF! #¡REF! #NOM? Err:502 Loading... ########"


@pytest.mark.parametrize(
    ("cell", "said"),
    [("'- Yes", "an apostrophe before -"), ("'=1+1", "an apostrophe before ="), ('="Yes"', '="…"'), ("'Yes'", "")],
)
def test_guards_against_formulas_in_cells_are_counted(tmp_path, caplog, cell, said):
    lines = [["prompt", "completion", "label"], ["a", cell, "1"], ["b", "Fine, 'thank you'.", "0"], ["c", "=1+1", "1"]]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    assert read(tmp_path / "rows.csv")["completion"][0] == cell
    counted = f"completion: cells have {said}, which exports write so that a spreadsheet takes no text for a formula"
    assert (counted in caplog.text) == bool(said)
    assert caplog.text.count("cells have") == bool(said)


@pytest.mark.parametrize("cell", SHEET_ERRORS.split())
def test_errors_of_a_spreadsheet_in_other_languages_are_counted(tmp_path, caplog, cell):
    rows = csv_file(tmp_path / "rows.csv", f"prompt,completion,label\nHi,{cell},1\n{cell} ,No,0\n")
    assert rows["completion"][0] == cell
    assert [each.partition("rows.csv: ")[2] for each in caplog.messages] == [
        f"{name}: cells that are errors of a spreadsheet, such as {cell}, are read as text. Restore them."
        for name in ("completion", "prompt")
    ]
    caplog.clear()
    text = "#win!", "###", "#WERT! is an error", "#1!", "Loading", "#NAVY", "Err: 502"
    csv_file(tmp_path / "good.csv", "prompt,completion,label\n" + "".join(f"Hi,{each},1\n" for each in text))
    assert not caplog.messages


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_missing_values_of_databases_and_escapes_of_excel_are_counted(tmp_path, caplog, name):
    texts = [r"\N", "a_x000D_\\nb", "x_y", r"C:\New", "_x0_", r"\N"]
    if name.endswith("parquet"):
        pq.write_table(pa.table({"prompt": ["p"] * 6, "completion": texts, "label": [1] * 6}), tmp_path / name)
    else:
        write(tmp_path / name, with_completions(texts, name))
    assert read(tmp_path / name)["completion"][:] == texts
    assert [each.partition("completion: ")[2] for each in caplog.messages] == [
        r"texts that are only \N, as databases export a missing value. Remove these rows (2 values).",
        "texts contain _x000D_, as Excel stores a control character. Replace it with the character.",
    ]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_texts_that_were_missing_values_of_pandas_are_counted(tmp_path, caplog, name):
    values = (("Hi", "nan", 1), ("Ho", "nan", 0), ("<NA>", "NaN, not a number", 1))
    keys = ("prompt", "completion", "label")
    lines = "".join(json.dumps(dict(zip(keys, each, strict=True))) + "\n" for each in values)
    table = "prompt,completion,label\n" + "".join(f'{one},"{other}",{label}\n' for one, other, label in values)
    rows = read(write(tmp_path / name, table if name.endswith("csv") else lines))
    assert rows["completion"][:] == ["nan", "nan", "NaN, not a number"]
    assert [each.partition(f"{name}: ")[2] for each in caplog.messages] == [
        "completion: texts that are only nan, as pandas prints a missing value. Remove these rows (2 values).",
        "prompt: texts that are only <NA>, as pandas prints a missing value. Remove these rows.",
    ]


def test_odd_texts_in_parquet_files_are_counted(tmp_path, caplog):
    texts = ["nan", "cafÃ©", "a\x1bb", "nan", None, "nan is good"]
    table = {"prompt": ["p"] * 6, "reply": pa.array(texts, pa.large_string()), "label": [1] * 6}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet", columns="completion=reply")["completion"][:] == texts
    found = [each.partition("reply: texts ")[2].split(",")[0] for each in caplog.messages]
    assert found == ["that are only nan", "were decoded wrongly before", "contain control characters"]
    assert caplog.messages[0].endswith("(2 values).")


@pytest.mark.parametrize("columns", [None, "label=stars"])
def test_odd_texts_in_a_stream_of_parquet_are_said_when_they_are_met(tmp_path, caplog, columns):
    texts = ["good"] * 1200 + ["nan", "cafÃ©", "a\x1bb", "nan", None]
    name = "stars" if columns else "label"
    table = {"prompt": ["p"] * 1205, "completion": pa.array(texts, pa.large_string()), name: [1] * 1205}
    pq.write_table(pa.table({**table, "note": [[0.5]] * 1205}), tmp_path / "rows.parquet")
    stream = read(tmp_path / "rows.parquet", streaming=True, columns=columns)
    assert not caplog.messages
    for _ in range(2):
        rows = list(stream)
    assert [each["completion"] for each in rows] == texts
    assert (rows[0]["prompt"], rows[0]["label"], rows[0]["note"]) == ("p", 1, [0.5])
    found = [each.partition("completion: texts ")[2].split(",")[0] for each in caplog.messages]
    assert found == ["that are only nan", "were decoded wrongly before", "contain control characters"]


def test_rows_of_empty_fields_are_left_out_and_counted(tmp_path, caplog):
    text = "prompt,completion,label\nHi,Yo,1\n,,\nHo,,0\n,,\n,,,,\n"
    rows = read(write(tmp_path / "rows.csv", text))
    assert rows["prompt"][:] == ["Hi", "Ho"]
    assert rows["completion"][:] == ["Yo", ""]
    [said] = caplog.messages
    assert said.endswith("rows.csv: rows whose fields are all empty, as in line 3, are left out (3 values).")
    assert origin(rows, 1) == f"{tmp_path / 'rows.csv'}, line 4"


def test_texts_that_excel_has_cut_are_counted(tmp_path, caplog):
    cut = "long " + "x" * 32_762
    text = f"prompt,completion,label\nHi,{cut},1\nHi,{cut}y,1\nHi,{cut[:-1]},0\nHi,{cut},0\n"
    assert read(write(tmp_path / "rows.csv", text))["completion"][0] == cut
    [said] = caplog.messages
    found = "completion: texts have exactly 32,767 characters, after which Excel cuts a cell"
    assert f"{found} (2 values: 'long xxxxxxxxxxxxxxx' in line 2, 'long xxxxxxxxxxxxxxx' in line 5)." in said


@pytest.mark.parametrize(("name", "mark"), [("rows.csv", ","), ("rows.tsv", "\t")])
def test_a_quote_that_swallows_rows_is_counted(tmp_path, caplog, name, mark):
    head, whole = f"prompt{mark}completion{mark}label\n", f"x{mark}y{mark}1\n"
    swallowed = f'"Hi{mark}Hello{mark}1\nBye"{mark}Ciao{mark}0\n'
    read(write(tmp_path / name, head + whole + swallowed + swallowed))
    found = f"{name}: a field in quotes contains the end of a row, as in line 3: a quote is missing (2 values)."
    assert [each.partition(str(tmp_path))[2].removeprefix("/") for each in caplog.messages] == [found]
    caplog.clear()
    written = f'"One{mark} two:\n1. Yes{mark} 2"{mark}"No\n{mark}3"{mark}1\n'
    read(write(tmp_path / f"good-{name}", head + whole + written))
    assert not caplog.messages


@pytest.mark.parametrize(
    "text",
    [
        'prompt,completion,label,rater\nq,"a1,4,bob\nq2,a2,5,bob\nq3,a3",4,bob\nq4,a4,3,bob\n',
        'label,prompt,completion\n1,q1,"a1\n0,q2,a2\n1,q3,a3"\n0,q4,a4\n',
        'label,prompt,completion\r\n1,q1,"a1\r\n\r\n0,q2,a2"\r\n0,q4,a4\r\n',
        'prompt,chosen,rejected\nq1,c1,"r1\nq2,c2,r2\nq3,c3,r3"\nq4,c4,r4\n',
        'prompt,chosen,rejected\nq1,"c1,r1\nq2,c2,r2\nq3,c3",r3\nq4,c4,r4\n',
        'prompt;completion;label\nq1;"a1;\nq2;a2;0\nq3;a3";1\n',  # one label is missing
    ],
)
def test_a_quote_that_swallows_rows_is_counted_in_any_column(tmp_path, caplog, text):
    csv_file(tmp_path / "rows.csv", text)
    assert "a field in quotes contains the end of a row, as in line 2: a quote is missing" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        'label,prompt,completion\n1,q1,"Sure:\nred, green, blue\none, two, three"\n0,q4,a4\n',
        'label,prompt,completion\n1,q1,"Sure:\n1, 2, 3\n4, 5, 6"\n0,q4,a4\n',
        'label,prompt,completion\n1,q1,"As a table:\nname,age,city\nAnn,30,Rome"\n0,q4,a4\n',
        'prompt,chosen,rejected\nq1,c1,"As a table:\nname,age,city\nAnn,30,Rome"\nq4,c4,r4\n',
        'prompt,chosen,rejected\nq1,c1,"Use this:\nf(a,b,c)"\nq4,c4,r4\n',
        'prompt,chosen,rejected\nq1,c1,"Yes:\nred, or green, or blue\nhot, or cold, or neither"\nq4,c4,r4\n',
        'prompt,completion\nq1,"Yes\nno,yes\nyes,no"\nq2,a2\n',
        'prompt,completion,label\nq1,"They are 3, 4\nor 5, 6",1\nq2,a2,0\n',
    ],
)
def test_texts_with_commas_and_line_breaks_swallow_no_rows(tmp_path, caplog, text):
    csv_file(tmp_path / "rows.csv", text)
    assert not caplog.messages


@pytest.mark.parametrize("encoding", ["mac_roman", "cp850", "cp437"])
def test_encodings_of_old_macs_and_of_dos_are_not_taken_for_cp1252(tmp_path, encoding):
    text = "prompt,completion,label\nHi,Yes,1\nMüssen wir gehen?,Natürlich gefällt es mir nicht,1\n"
    with pytest.raises(
        ValueError, match=r"rows\.csv is not UTF-8 text: byte 0x\w\w in line 3\. Save the file as UTF-8"
    ):
        csv_file(tmp_path / "rows.csv", text, encoding)
    # What Windows writes is read as it was
    for good in ("Müssen", "Don’t “go” – 10€…", "C’est un cœur", "Žižek, Škoda, Božo", "L'été où", "naïve"):
        found = csv_file(tmp_path / "good.csv", f'prompt,completion,label\n"{good}",Yes,1\n', "cp1252")
        assert found["prompt"][:] == [good]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        *(("łódź", each) for each in ("iso8859-2", "cp1250")),
        *(("Może być, że to mały dom.", each) for each in ("iso8859-2", "cp1250")),
        *(("Książka", each) for each in ("iso8859-2", "cp1250")),
        *(("Říká se, že tři věci jsou důležité", each) for each in ("iso8859-2", "cp1250")),
        *(("Az első időben nem volt erő.", each) for each in ("iso8859-2", "cp1250")),
        *(("Koji je način bolji?", each) for each in ("iso8859-2", "cp1250")),
        ("Poţi să îmi spui ce oraşul are?", "cp1250"),
        ("Güneş doğuyor", "cp1254"),
    ],
)
def test_encodings_of_central_europe_are_not_taken_for_cp1252(tmp_path, text, encoding):
    with pytest.raises(ValueError, match=r"is not UTF-8 text: byte 0x\w\w in line 2\. Save the file as UTF-8"):
        csv_file(tmp_path / "rows.csv", f'prompt,completion,label\n"{text}",Yes,1\n', encoding)


@pytest.mark.parametrize(
    "text",
    [
        "3 m³ or 5 cm³, ½ cup, 1¼ cups, ¹ see this³ and that¹, ² not",
        "sin³x + cos³x dx, 2a³b, x³y, e¹x, a±b, mean±sd, 25ºC nº5 nºs, 1ª, one¶two, £100, µm",
        "¿Qué tal? hola¿que tal, Mañana vendrá José. ¿Cuándo? Así, allá, después, también, canción",
        "L'été où, c'est là, «Où est-il?» même poète, ère, très, cœur, maïs, 1ère, siècle brûlé",
        "Müssen wir? »So« groß wie 2½ Stück, öde, Maß",
        "Não são as ações, põe os pães, 1º lugar, 2ª vez, você está lá",
        "Perché sì, così è più bello. Già, lunedì, città, virtù",
        "Når øen er rød, så går vi. Søndag i løbet af året, øje, høj, kø, æ",
        "Þetta er íslenska. Það er ný þjóð og íþrótt, alþingi, ský, maður",
        "Jõe õhk on külm, nõu ja põhi, või õpetaja, sõber ööd, nõ",
        "Tha sìth agus mìos ann, tìm. Això és què, ciència, cafè",
    ],
)
def test_signs_and_letters_of_western_europe_are_read_as_cp1252(tmp_path, text):
    found = csv_file(tmp_path / "rows.csv", f'prompt,completion,label\n"{text}",Yes,1\n', "cp1252")
    assert found["prompt"][:] == [text]


def with_completions(texts, name):
    """The text of a CSV or JSON lines file with these completions."""
    if name == "rows.csv":
        return "prompt,completion,label\n" + "".join(f"Hi,{each},1\n" for each in texts)
    return lines([row(1, completion=each) for each in texts])


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
@pytest.mark.parametrize("control", ["\x00", "\x1b"])
def test_control_characters_in_texts_are_counted(tmp_path, caplog, name, control):
    texts = [f"a{control}b", f"{control}c", "a\tb\u200b"]
    assert read(write(tmp_path / name, with_completions(texts, name)))["completion"][:] == texts
    [said] = caplog.messages
    assert f"completion: texts contain control characters, such as {control!r}. Remove them (2 values)" in said


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_characters_as_html_are_counted(tmp_path, caplog, name):
    texts = ["Don&#39;t.", "a &amp; b", "&quot;Yes&quot;", "R&D", "a && b; c", "x &lt y", "a &b; c"]
    if name.endswith("parquet"):
        table = {"prompt": ["p"] * len(texts), "completion": texts, "label": [1] * len(texts)}
        pq.write_table(pa.table(table), tmp_path / name)
        file = tmp_path / name
    else:
        file = write(tmp_path / name, with_completions(texts, name))
    assert read(file)["completion"][:] == texts
    [said] = caplog.messages
    assert "completion: texts contain characters as HTML. Unescape them, unless" in said
    assert "3 values" in said
    assert ("'&#39;' in " in said) == (not name.endswith("parquet"))


def test_marks_of_files_that_were_appended_are_counted(tmp_path, caplog):
    text = "prompt,completion,label\nWhy?,So\ufeffso.,1\n\ufeffHow?,So.,0\n"
    assert read(write(tmp_path / "rows.csv", text))["prompt"][:] == ["Why?", "\ufeffHow?"]
    assert "prompt: texts contain control characters, such as '\\ufeff'. Remove them." in caplog.text


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_texts_that_were_decoded_wrongly_are_counted(tmp_path, caplog, name):
    texts = ["caf\ufffd", "cafÃ©", "donâ€™t", "café", "SÃO Paulo", "10 € â"]
    assert read(write(tmp_path / name, with_completions(texts, name)))["completion"][:] == texts
    [said] = caplog.messages
    assert "completion: texts were decoded wrongly before" in said
    assert said.endswith("(3 values).")


def test_a_blank_cell_is_empty(tmp_path):
    rows = read(write(tmp_path / "rows.csv", "prompt,completion,label,weight\na,b, ,\u00a0\nc,d,1,2\n"))
    assert (rows["label"][:], rows["weight"][:]) == ([None, 1], [None, 2])


def test_a_misspelled_column_is_named(tmp_path):
    rows = [row(1, weights=2, **{"sft-mask": True, "Label_Type": "binary", "note": "x"})]
    assert check_splits(load_rows(write(tmp_path / "rows.jsonl", lines(rows))), "rows.jsonl") == [
        f"rows.jsonl: the column {name} is ignored. If it is {meant}, set --columns {meant}={name}."
        for name, meant in (("weights", "weight"), ("sft-mask", "sft_mask"), ("Label_Type", "label_type"))
    ]
    assert not check_splits(
        load_rows(write(tmp_path / "good.jsonl", lines([row(1, weight=2, weights=3)]))), "good.jsonl"
    )


def test_work_that_was_rejected_is_counted(tmp_path):
    text = "prompt,completion,label,AssignmentStatus,http_status\nHi,Yo,5,Approved,\nHi,No,1,Rejected,404\nHi,Ho,1,,\n"
    assert check_splits(load_rows(write(tmp_path / "rows.csv", text)), "rows.csv") == [
        "rows.csv: the column AssignmentStatus, which is not read, says Rejected in 1 of the first 3 rows. Remove such "
        "rows if they do not count."
    ]


def test_cells_that_say_nothing_and_cells_that_are_lists(tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    text = io.StringIO()
    rows = [["prompt", "label", "weight", "sft_mask"], [json.dumps(chat), "", "", "1"], [repr(chat), "up", "2", ""]]
    csv.writer(text).writerows(rows)
    found = csv_file(tmp_path / "rows.csv", text.getvalue())
    assert found["prompt"][:] == [chat, chat]
    assert (found["label"][:], found["weight"][:], found["sft_mask"][:]) == ([None, "up"], [None, 2], [True, None])


RAGGED = "prompt,completion,label\nWhy?,Because.,1\n{}\nWho?,Me.,1\n"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RAGGED.format("How?,In water, eight minutes.,1"), r"has 4 fields in line 3, but 3 columns .* double quotes"),
        (RAGGED.format("How?,1"), r"has 2 fields in line 3, but 3 columns"),
        (RAGGED.format('"two\nlines","more\n\n",1\nHow?'), r"has 1 field in line 7"),
        (
            RAGGED.format('How?,1\n"a\nb",\nOk,Ok,1\n\nHow?,a,b,c,1'),
            r"has 2 fields in line 3, .* cannot be read either: 4 \(2 fields\), 8 "
            r"\(5 fields; row 7 in a spreadsheet\)\. .*--invalid_rows drop",
        ),
        (RAGGED.format('How?,"He said ""so"",1'), r"is invalid CSV in line 3: unexpected end of data\. Put each field"),
        (RAGGED.format('How?,"He said \\"so\\"",1'), r"is invalid CSV in line 3: ',' expected after '\"'"),
        ("prompt,label,prompt\na,1,b\n", r"names the column prompt twice in line 1"),
        ('{"prompt": "a", "label": 1}\n', r"looks like JSON and not like CSV in line 1\. Name the file \.jsonl"),
        ('prompt, label\n"a", "b, c"\n', r"has 3 fields in line 2, .* in double quotes, without a space before them"),
        ("sep=;\nprompt;label\na;b;1\n", r"has 3 fields in line 3"),
        ("prompt,label\na,1,\n", r"has 3 fields in line 2"),
        ("prompt,label\n\ra,1\n", r"has a carriage return outside of double quotes in line 2"),
        ("prompt;label\na;1;b\n", r"has 3 fields in line 2, .* contains a semicolon in double quotes"),
        (("prompt,label\né,1\n").encode() + b"\xe9,1\n", r"is not UTF-8 text: byte 0xe9 in line 3"),
        (b"prompt,label\n\x81,1\n", r"is not CP1252 text"),
        ("prompt,label\n".encode("utf-16") + b"\x00\xd8", r"is not UTF-16 text"),
    ],
)
def test_csv_that_is_refused(tmp_path, text, message, streaming):
    with pytest.raises(ValueError, match=rf"rows\.csv {message}"):
        read(write(tmp_path / "rows.csv", text), streaming=streaming)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("\ufeff prompt,chosen ,rejected", "repeats the names of the columns in line 4"),
        ('"{""ImportId"":""Q1""}",,"{""ImportId"":""Q3""}"', "is a header of Qualtrics in line 4"),
    ],
)
def test_a_second_header_is_no_pair(tmp_path, line, message):
    file = write(tmp_path / "rows.csv", f"prompt,chosen,rejected\nHi,Yo,No\nHo,A,B\n{line}\nprompt,chosen,No\n")
    with pytest.raises(ValueError, match=message):
        read(file)
    assert read(file, invalid_rows="drop")["chosen"][:] == ["Yo", "A", "chosen"]


IDS = '"{""ImportId"":""startDate"",""timeZone"":""UTC""}","{""ImportId"":""QID1""}","{\'ImportId\': \'QID2\'}",'


@pytest.mark.parametrize(
    ("lines", "left_out"),
    [
        (["Start Date,Write a good answer,And a bad one,", IDS], ["lines 2 and 3 are headers"]),
        ([IDS], ["line 2 is a header"]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_the_header_lines_of_qualtrics_are_no_rows(tmp_path, lines, left_out, streaming, caplog):
    head, answers = "StartDate,chosen,rejected,note", ["2026-01-01,Yo,No,", "2026-01-02,Hi,{},x"]
    rows = read(write(tmp_path / "rows.csv", "\n".join([head, *lines, *answers])), streaming=streaming)
    assert [row["chosen"] for row in rows] == ["Yo", "Hi"]
    assert [each.partition("rows.csv: ")[2] for each in caplog.messages] == [
        f"{found} of Qualtrics, and left out." for found in left_out
    ]
    # Joined exports have all three lines again
    joined = write(tmp_path / "joined.csv", "\n".join([head, *lines, *answers, head, *lines, *answers]))
    rows = read(joined, streaming=streaming, invalid_rows="drop")
    assert [row["chosen"] for row in rows] == ["Yo", "Hi"] * 2


@pytest.mark.parametrize(
    ("head", "line", "program"),
    [
        ("StartDate,EndDate,chosen,rejected", "Start Date,End Date,Write a good answer,And a bad one", "Qualtrics"),
        ("Respondent ID,chosen,rejected,Which?,", ",Open-Ended Response,Open-Ended Response,Red,Blue", "SurveyMonkey"),
        ("chosen,rejected", "Open-Ended Response,Open-Ended Response", "SurveyMonkey"),
    ],
)
def test_a_header_of_two_lines_is_an_error(tmp_path, head, line, program):
    more = "," * head.count(",")
    rows = "\n".join([head, line, more.replace(",", "Response,"), more.replace(",", "Hi,")])
    file = write(tmp_path / "rows.csv", f"{rows}\n")
    with pytest.raises(ValueError, match=rf"rows\.csv has a second header of {program} in line 2\. Remove it\."):
        read(file)
    assert len(read(file, invalid_rows="drop")) == 2


BROKEN = {
    "rows.csv": "prompt,completion,label\nToo,many,fields,1\nWhy?,Because.,1\nHow?,1\nWho?,Me.,0\n",
    "rows.jsonl": "\n".join(
        [
            '{"prompt": "Too", "prompt": "many", "label": 1}',
            '{"prompt": "Why?", "completion": "Because.", "label": 1}',
            '["How?", 1]',
            '{"prompt": "Who?", "completion": "Me.", "label": 0}',
            '{"prompt": "Cut',
        ]
    ),
}
WHOLE = [{"prompt": "Why?", "completion": "Because.", "label": 1}, {"prompt": "Who?", "completion": "Me.", "label": 0}]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_lines_that_cannot_be_read(tmp_path, name, streaming, caplog):
    file, other = write(tmp_path / name, BROKEN[name]), write(tmp_path / f"more-{name}", BROKEN[name])
    own = [line - (name == "rows.jsonl") for line in (2, 4)] + [5] * (name == "rows.jsonl")
    with pytest.raises(ValueError, match=f"in line {own[0]}[ ,.].* cannot be read either: {own[1]}") as caught:
        read(file, streaming=streaming)
    assert str(caught.value).startswith(f"{file} ")
    # All files are read
    with pytest.raises(ValueError, match=rf"cannot be read either: {own[1]} .*, line {own[0]} of .*, line {own[1]} of"):
        load_files([file, other], streaming=streaming)
    dropped = read(file, streaming=streaming, invalid_rows="drop")
    assert [{column: row[column] for column in WHOLE[0]} for row in dropped] == WHOLE
    for line in own:
        assert re.search(rf"\b{line}\b", caplog.text), line
    marked = list(read(file, streaming=streaming, invalid_rows="mark"))
    faults = [row.get("unread_line") for row in marked]
    assert [fault is not None for fault in faults] == [True, False, True, False] + [True] * (name == "rows.jsonl")
    assert f"in line {own[1]}" in faults[2]
    assert [{column: row[column] for column in WHOLE[0]} for row in (marked[1], marked[3])] == WHOLE
    assert all(marked[2][column] is None for column in WHOLE[0])
    if not streaming:
        assert origin(read(file, invalid_rows="mark"), 2) == f"{file}, line {own[1]}"
        assert origin(dropped, 1) == f"{file}, line {own[1] + 1}"


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_without_a_line_that_can_be_read(tmp_path, name):
    bad = {"rows.csv": "prompt,label\na\nb\n", "rows.jsonl": "oops\n[1]\n"}[name]
    for invalid_rows in ("error", "drop", "mark"):
        with pytest.raises(ValueError, match=r"in line \d.* cannot be read either"):
            read(write(tmp_path / name, bad), invalid_rows=invalid_rows)
    with pytest.raises(ValueError, match="invalid_rows must be one of"):
        read(write(tmp_path / name, BROKEN[name]), invalid_rows="skip")


def test_lines_that_end_as_they_did_on_old_computers(tmp_path):
    assert list(csv_file(tmp_path / "rows.csv", 'prompt,label\r\r"a\nb",1\rc,0')) == [
        {"prompt": "a\nb", "label": 1},
        {"prompt": "c", "label": 0},
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("sep=;\r\nprompt;label\r\na, b;1\r\n", {"prompt": "a, b", "label": 1}),  # as Excel declares the delimiter
        ("sep=|\nprompt|label\na|1\n", {"prompt": "a", "label": 1}),
        ("\u200bprompt\u00a0,\ufefflabel\na,1\n", {"prompt": "a", "label": 1}),  # what browsers and mails add
        ("prompt,label\n\ufeffa,1\n", {"prompt": "\ufeffa", "label": 1}),  # what a field has is its own
        ("prompt,label,\na,1,\n", {"prompt": "a", "label": 1, "unnamed 2": ""}),
        ("prompt,label\na\x00b,1\n", {"prompt": "a\x00b", "label": 1}),
    ],
)
def test_csv_as_programs_write_it(tmp_path, text, found):
    assert list(csv_file(tmp_path / "rows.csv", text)) == [found]


def test_a_long_field_and_blank_lines(tmp_path):
    found = csv_file(tmp_path / "rows.csv", f'prompt,completion\n\n"{"x, " * 100_000}",y\n\n')
    assert len(found) == 1
    assert len(found[0]["prompt"]) == 300_000


# JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines([row(1)]) + '{"prompt": "a"\n' + lines([row(0)]), r"is invalid JSON in line 2"),
        (lines([row(1)]) + "{'prompt': 'a'}\n", r"is invalid JSON in line 2, column 2"),
        ("// rows\n" + lines([row(1)]), r"is invalid JSON in line 1"),
        (json.dumps(row(1)) + ",\n" + lines([row(1)]), r"is invalid JSON in line 1"),
        (lines([row(1)]) + '["a", 1]\n', r"has '\[\"a\", 1\]' in line 2; each row must be an object"),
        (lines([row(1)]) + '{"label": 1' + "0" * 5000 + "}\n", r"is invalid JSON in line 2: Exceeds the limit"),
        ('[{"label": 1' + "0" * 5000 + "}]", r"is invalid JSON in line 1 or below: Exceeds the limit"),
        ('{"prompt": 1, "prompt": 2}\n', r"has an object with the key 'prompt' twice in line 1"),
        ('[{"prompt": "a"},\n {"prompt": 1, "prompt": 2}]', r"has an object with the key 'prompt' twice in line 2"),
        ('[{"prompt": "a"}\n{"prompt": "b"}]', r"is invalid JSON in line 2, column 1: Expecting ',' delimiter"),
        ('[{"prompt": "a"},\n]', r"is invalid JSON in line 2, column 1: Expecting value"),
        ('[{"prompt": "a"}', r"is invalid JSON in line 1, column 17: the array is not closed"),
        ('[{"prompt": "a"}]\n[1]', r"is invalid JSON in line 2, column 1: there is text after the end of the array"),
        ('[{"prompt": "a"}, 5]', r"has '5\]' in line 1; each row must be an object"),
        ('{"prompt": "\\ud800"}\n', r"has half of a surrogate pair \(\\ud800\) in line 1"),
        ("[" * 100_000, r"holds|is"),
    ],
)
def test_json_that_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"rows\.json ?{message}"):
        read(write(tmp_path / "rows.json", text))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_messages_that_are_stored_as_text(tmp_path, kind, caplog):
    messages = [[{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Yo"}]]
    rows = [dict(zip(("prompt", "completion", "label"), [*map(json.dumps, messages), 1], strict=True))] * 2
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        Dataset.from_list(rows).to_csv(path, index=False)
    elif kind == "jsonl":
        write(path, lines(rows))
    else:
        Dataset.from_list(rows).to_parquet(str(path))
        with pytest.raises(ValueError, match=r"lists of messages that are stored as text in the column prompt\. Conv"):
            check_splits(load_rows(path), "rows.parquet")
        return
    assert read(path)["prompt"][:] == [messages[0]] * 2
    assert "prompt: lists that are stored as text are converted to lists (2 values)" in caplog.text
    for text in ("[{}]", '[{"a": 1}]', "[{", '[{"role": 1}]', '[{"role": "user"}]x'):
        assert read(write(tmp_path / "text.jsonl", lines([row(1) | {"prompt": text}])))["prompt"][:] == [text]


def test_objects_one_after_the_other(tmp_path):
    rows = [row(1), row(0, other={"a": [1, 2]})]
    text = "\n".join(json.dumps(each, indent=2) for each in rows)
    assert [each["other"] for each in read(write(tmp_path / "rows.json", text))] == [None, {"a": [1, 2]}]


@pytest.mark.parametrize("size", [5, 17, 300])
def test_an_array_is_read_in_pieces(tmp_path, monkeypatch, size):
    monkeypatch.setattr("trl_ulma.data.json_rows._CHUNK", size)
    rows = [row(i, other={"n": [i, {"text": "x]},{" * (i % 7)}]}) for i in range(60)]
    path = write(tmp_path / "rows.json", json.dumps(rows, indent=1))
    found = read(path)
    assert list(found) == rows
    line = path.read_text().splitlines().index('  "label": 59,') - 2  # counted from 1, of the brace
    assert origin(found, 59).endswith(f"rows.json, line {line}")
    (tmp_path / "broken.json").write_text(path.read_text().replace('"label": 40,', '"label" 40,'))
    with pytest.raises(ValueError, match=r"is invalid JSON in line \d+, column 11: Expecting ':' delimiter"):
        read(tmp_path / "broken.json")


# Where rows come from


def test_the_line_of_a_row(tmp_path):
    text = 'prompt,label\n"a\n\nb",1\n\nc,0\nd,1\n'
    rows = csv_file(tmp_path / "rows.csv", text)
    sheet = {2: "", 6: " (row 4 in a spreadsheet)", 7: " (row 5 in a spreadsheet)"}
    expected = [f"{tmp_path / 'rows.csv'}, line {line}{sheet[line]}" for line in (2, 6, 7, 7)]
    assert [origin(rows, i) for i in (0, 1, 2, -1)] == expected
    assert origin(rows.select([2, 0]), 1) == f"{tmp_path / 'rows.csv'}, line 2"
    write(tmp_path / "many" / "a.jsonl", "\n" + lines([row(1)]))
    write(tmp_path / "many" / "b.csv", "prompt,label\na,1\n")
    rows = read(tmp_path / "many")
    assert [origin(rows, i) for i in (0, 1)] == [
        f"{tmp_path / 'many' / 'a.jsonl'}, line 2",
        f"{tmp_path / 'many' / 'b.csv'}, line 2",
    ]
    assert origin(Dataset.from_dict({"prompt": ["a"]}), 0) is None


def test_the_line_of_a_row_that_was_selected_split_off_or_concatenated(tmp_path):
    one = read(write(tmp_path / "one.jsonl", lines([row(i, weight=i) for i in range(12)])))
    other = read(
        write(tmp_path / "other.csv", "prompt,completion,label,weight\n" + "".join(f"p,c,0,{i}\n" for i in range(5)))
    )
    saved = Dataset.from_dict({"prompt": ["p"] * 3, "completion": ["c"] * 3, "label": [0] * 3, "weight": [0, 1, 2]})
    saved.save_to_disk(tmp_path / "saved")
    saved = Dataset.load_from_disk(tmp_path / "saved")
    made = [
        one.select(range(3, 9)),
        one.select([4, 5, 6]).select([2, 0]),
        one.filter(lambda row: row["weight"] % 3 == 1),
        one.add_column("more", [0] * 12).shuffle(seed=3),
        other.select_columns(["label", "weight"]).rename_column("label", "rating").select(range(2, 5)),
    ]
    for rows in made:
        first, name = (2, "other.csv") if "rating" in rows.column_names else (1, "one.jsonl")
        assert [origin(rows, i) for i in range(len(rows))] == [
            f"{tmp_path / name}, line {number + first}" for number in rows["weight"][:]
        ]
    both = concatenate_datasets([one.select(range(10, 12)), saved.select(range(1, 3)), other.shuffle(seed=1)])
    names = [("one.jsonl", "line", 1)] * 2 + [("saved/data-00000-of-00001.arrow", "row", 0)] * 2
    names += [("other.csv", "line", 2)] * 5
    expected = [
        f"{tmp_path / name}, {unit} {i + add}" for (name, unit, add), i in zip(names, both["weight"][:], strict=True)
    ]
    assert [origin(both, i) for i in range(len(both))] == expected
    found = joined_origins([("a", one.select([7, 2])), ("the saved rows", saved), ("b", other)])
    assert [found[i] for i in range(10)] == [
        *(f"{tmp_path / 'one.jsonl'}, line {n}" for n in (8, 3)),
        *(f"the saved rows, row {n}" for n in range(3)),
        *(f"{tmp_path / 'other.csv'}, line {n}" for n in range(2, 7)),
    ]
    # Rows that are computed have no line
    assert origin(one.map(lambda row: {"weight": row["weight"] + 1}), 0) is None
    prompts = read(write(tmp_path / "prompts.jsonl", lines([row(0, weight=i) | {"prompt": str(i)} for i in range(20)])))
    for half in split_by_prompt(prompts, test_size=0.3, seed=1).values():
        assert [origin(half, i) for i in range(len(half))] == [
            f"{tmp_path / 'prompts.jsonl'}, line {i + 1}" for i in half["weight"][:]
        ]


def test_an_invalid_row_is_told_of_in_the_words_of_its_own_file(tmp_path):
    table = write(tmp_path / "a.csv", "prompt,completion,stars\nHi,Yo,5\nHi,Ho,\n")
    other = write(tmp_path / "b.jsonl", lines([{"prompt": "Hi", "completion": "Yo", "thumb": None}] * 2))
    parts = [(str(table), read(table, columns="label=stars")), (str(other), read(other, columns="label=thumb"))]
    both = concatenate_datasets([rows for _, rows in parts])
    joined_origins(parts).save(written := Dataset.load_from_disk(saved(both, tmp_path / "saved")))
    for rows in (both, written, written.shuffle(seed=3)):
        numbers = [number for number in range(4) if origin(rows, number) != f"{table}, line 2"]
        error = InvalidRow("is None; it must be a number.", "label is missing", "label")
        found = located([(i, error.at(i, "train")) for i in numbers], rows)
        assert sorted((str(each), each.kind) for each in found) == [
            (f"{table}, line 3: stars is empty; it must be a number.", "stars is empty"),
            (f"{other}, line 1: thumb is None; it must be a number.", "thumb is missing"),
            (f"{other}, line 2: thumb is None; it must be a number.", "thumb is missing"),
        ]


def saved(rows, folder):
    rows.save_to_disk(folder)
    return folder


def test_the_line_of_a_row_of_a_stream(tmp_path):
    folder = tmp_path / "rows"
    write(folder / "a.jsonl", "\n" + lines([row(i) for i in range(3)]))
    write(folder / "b.csv", 'prompt,label\n"a\nb",1\nc,0\n')
    stream = load_rows(folder, streaming=True)["train"]
    place = StreamOrigins(places_of(stream))
    expected = [
        *(f"{folder / 'a.jsonl'}, line {n}" for n in (2, 3, 4)),
        *(f"{folder / 'b.csv'}, line {n}" for n in ("2", "4 (row 3 in a spreadsheet)")),
    ]
    assert [place(number) for number in (0, 1, 1, 2, 4, 3, 5)] == [expected[i] for i in (0, 1, 1, 2, 4, 3)] + [None]
    assert pickle.loads(pickle.dumps(place))(4) == expected[4]
    assert place("5 of shard 2") is None
    for changed in (stream.shuffle(seed=1), stream.skip(1), stream.map(lambda row: row)):
        assert places_of(changed) is None


def test_the_row_of_a_parquet_file(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, numbers in (("a", range(3)), ("b", range(4))):
        pq.write_table(pa.table({"prompt": ["p"] * len(numbers), "id": list(numbers)}), folder / f"{name}.parquet")
    rows = read(folder)
    assert [origin(rows, i) for i in range(7)] == [
        *(f"{folder / 'a.parquet'}, row {i}" for i in range(3)),
        *(f"{folder / 'b.parquet'}, row {i}" for i in range(4)),
    ]


def test_a_second_start_reads_what_the_first_wrote(tmp_path):
    path = write(tmp_path / "rows.csv", "prompt,label\na,1\n")
    first, second = read(path), read(path)
    assert first.cache_files == second.cache_files
    assert first._fingerprint == second._fingerprint
    write(path, "prompt,label\na,1\nb,0\n")
    assert len(read(path)) == 2
    assert read(path, columns="prompt=label,label=prompt")["prompt"][:] == ["1", "0"]


def test_a_start_with_other_code_reads_anew(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.csv", "prompt,label\na,1\n")
    first = read(path)
    assert code_hash() == code_hash(Path(next(iter(trl_ulma.__path__))))
    write(tmp_path / "code" / "a.py", "x = 1\n")
    write(tmp_path / "code" / "b" / "c.py", "x = 1\n")
    hashes = {code_hash.__wrapped__(tmp_path / "code")}
    write(tmp_path / "code" / "b" / "c.py", "x = 2\n")
    hashes.add(code_hash.__wrapped__(tmp_path / "code"))
    (tmp_path / "code" / "b" / "c.py").rename(tmp_path / "code" / "c.py")
    hashes.add(code_hash.__wrapped__(tmp_path / "code"))
    assert len(hashes) == 3
    monkeypatch.setattr("trl_ulma.data.read_files.code_hash", hashes.pop)
    assert read(path)._fingerprint != first._fingerprint


def test_files_of_a_folder_that_are_in_no_split_are_named(tmp_path, caplog):
    write(tmp_path / "data" / "train.jsonl", lines([row(1)]))
    write(tmp_path / "data" / "more.csv", "prompt,label\na,1\n")
    assert len(read(tmp_path / "data")) == 1
    assert "more.csv is not in a split and is ignored" in caplog.text


def test_links_in_a_folder_that_are_not_read_are_named(tmp_path, caplog):
    write(tmp_path / "data" / "train.jsonl", lines([row(1)]))
    write(tmp_path / "v2" / "rows.jsonl", lines([row(0)]))
    for name, target in (("again", "."), ("up", ".."), ("latest", "v1"), ("lost.txt", "gone")):
        (tmp_path / "data" / name).symlink_to(target)
    (tmp_path / "data" / "test.jsonl").symlink_to(tmp_path / "v2" / "rows.jsonl")
    assert set(load_rows(tmp_path / "data")) == {"train", "test"}
    assert "link" not in caplog.text
    lost, other = tmp_path / "data" / "train-2.jsonl", tmp_path / "data" / "validation"
    lost.symlink_to(".git/annex/objects/a1")
    other.symlink_to(tmp_path / "v2")
    load_rows(tmp_path / "data")
    assert f"{lost} is a link to .git/annex/objects/a1, which does not exist. Run git annex get" in caplog.text
    assert f"{other} is a link to a folder, whose files are not read. Copy the folder itself." in caplog.text
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "train").symlink_to(tmp_path / "v2")
    with pytest.raises(FileNotFoundError, match=r"contains no data file.*only/train is a link to a folder"):
        load_rows(tmp_path / "only")


def test_what_a_readme_says_of_files(tmp_path):
    about = "---\nconfigs:\n- config_name: {}\n  data_files: {}\n{}---\n"
    write(tmp_path / "README.md", about.format("one", "a.csv", "- config_name: two\n  data_files: b.jsonl\n"))
    write(tmp_path / "a.csv", "prompt;label\nNA;1\n")
    write(tmp_path / "b.jsonl", lines([row(0.5)]))
    assert read(tmp_path, config="one")[0] == {"prompt": "NA", "label": 1}
    assert read(tmp_path, config="two")["label"][:] == [0.5]
    with pytest.raises(
        ValueError, match=r"cannot be read: Config name is missing\. Please pick one among .*'one', 'two'"
    ):
        load_rows(tmp_path)
    write(tmp_path / "README.md", about.format("default", "c.csv", "  sep: '~'\n"))
    write(tmp_path / "c.csv", "prompt~label\na~1\n")
    assert read(tmp_path)[0] == {"prompt": "a", "label": 1}


def test_messages_of_several_kinds_are_prepared(tmp_path, tiny_llama):
    from transformers import AutoTokenizer

    from trl_ulma.labels import LabelRules
    from trl_ulma.rows.preparation import Preparation

    rows = [
        {"prompt": [{"role": "user", "content": "Hi", "id": each}], "completion": GOOD, "label": 1}
        for each in (1, "a", 0.5)
    ]
    found = read(write(tmp_path / "rows.jsonl", lines(rows)))
    assert found["prompt"][:] == [each["prompt"] for each in rows]
    plain = Dataset.from_list([{"prompt": [USER], "completion": GOOD, "label": 1}] * 3)
    prepare = Preparation(AutoTokenizer.from_pretrained(tiny_llama), LabelRules(), 64)
    assert prepare(found, "train")["prompt_ids"][:] == prepare(plain, "train")["prompt_ids"][:]
    stream = prepare(read(tmp_path / "rows.jsonl", streaming=True), "train")
    assert [each["prompt_ids"] for each in stream] == prepare(plain, "train")["prompt_ids"][:]


# Names and labels

USER, GOOD = {"role": "user", "content": "Hi"}, [{"role": "assistant", "content": "Hello!"}]
NAMES = "prompt=question,completion=response,label=rating"
VOTES = "question,response,rating,note\nWhy?,So.,up,a\nWho?,Me.,Down,b\n"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "saved", "folder"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_names_and_labels_are_mapped(tmp_path, kind, streaming, as_text):
    rows = Dataset.from_list(
        [
            {"question": "Why?", "response": "So.", "rating": "up", "note": "a"},
            {"question": "Who?", "response": "Me.", "rating": "Down", "note": "b"},
        ]
    )
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        write(path, VOTES)
    elif kind == "jsonl":
        write(path, lines(rows))
    elif kind == "parquet":
        rows.to_parquet(path)
    elif kind == "saved":
        DatasetDict(train=rows).save_to_disk(path)
    else:
        write(path / "train.csv", VOTES)
    names, labels = NAMES, "up=1, down=0"
    if not as_text:
        names, labels = dict(each.split("=") for each in NAMES.split(",")), {"up": 1, "down": 0}
    found = list(read(path, columns=names, label_map=labels, streaming=streaming))
    assert found == [
        {"prompt": "Why?", "completion": "So.", "label": 1, "note": "a"},
        {"prompt": "Who?", "completion": "Me.", "label": 0, "note": "b"},
    ]


@pytest.mark.parametrize(
    ("labels", "label_map", "found"),
    [
        ([1, 5, 3], {5: 1, 1: 0, 3: 0.5}, [0, 1, 0.5]),
        ([True, False, None], "true=0,false=1", [0, 1, None]),
        (["yes", "no", "yes"], {True: 1, False: 0}, [1, 0, 1]),
        (["a=b", "c", "c"], "a=b=1,c=-2.5", [1, -2.5, -2.5]),
    ],
)
def test_what_a_label_means(tmp_path, labels, label_map, found):
    path = write(tmp_path / "rows.jsonl", lines([row(label) for label in labels]))
    assert read(path, label_map=label_map)["label"][:] == found


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_labels_that_label_map_lacks(tmp_path, name, caplog):
    path, labels = tmp_path / name, ["up", "sideways", "down", "3"]
    rows = Dataset.from_list([row(label) for label in labels])
    {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[path.suffix[1:]](str(path))
    with pytest.raises(ValueError, match=r"does not contain the labels 'sideways' \(1 row\), '3' \(1 row\)"):
        read(path, label_map="up=1,down=0")
    assert read(path, label_map="up=1,down=0", invalid_rows="drop")["label"][:] == [1, 0]
    assert all(f"label {label!r}" in caplog.text or f"'{label}' (1 row)" in caplog.text for label in ("sideways", "3"))
    marked = read(path, label_map="up=1,down=0", invalid_rows="mark")
    assert marked["label"][:] == [1, None, 0, None]
    faults = marked["unread_line"][:]
    assert [fault is None for fault in faults] == [True, False, True, False]
    assert faults[1].startswith("has the label 'sideways'")
    assert faults[1].endswith("which label_map does not contain. Add it to label_map.")


def test_a_late_label_that_label_map_lacks_stops_a_stream_at_its_row(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines([row(label) for label in [5] * 1500 + [3, 5]]))
    found = []
    with pytest.raises(ValueError, match=r"does not contain the labels '3' \(1 row\)"):
        found.extend(each["label"] for each in read(path, label_map={5: 1}, streaming=True))
    marked = list(read(path, label_map={5: 1}, streaming=True, invalid_rows="mark"))
    assert marked[1500]["label"] is None
    assert marked[1501]["label"] == 1


def test_labels_that_are_classes_go_by_their_names(tmp_path):
    features = Features({"prompt": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    Dataset.from_dict({"prompt": ["a", "b"], "label": [1, 0]}, features=features).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved", label_map="good=1,bad=-1")["label"][:] == [1, -1]
    assert read(tmp_path / "saved")["label"][:] == [1, 0]
    features["label"] = ClassLabel(names=["5", "1"])
    Dataset.from_dict({"prompt": ["a", "b"], "label": [0, -1]}, features=features).save_to_disk(tmp_path / "stars")
    assert read(tmp_path / "stars")["label"][:] == [5, None]
    features["label"] = ClassLabel(names=["good", "bad"])
    Dataset.from_dict({"prompt": ["a", "b"], "label": [0, 1]}, features=features).save_to_disk(tmp_path / "turned")
    with pytest.raises(ValueError, match=r"classes good, bad, and .* Map them to numbers: label_map good=…,bad=…"):
        read(tmp_path / "turned")


TRUTHS = r"true and false stand among ratings such as 5, and count as 1 and 0\. .* label_type, .*"


@pytest.mark.parametrize("streaming", [False, True])
def test_thumbs_among_stars_are_counted_in_a_warning(tmp_path, caplog, streaming):
    write(tmp_path / "rows" / "thumbs.jsonl", lines([row(True), row(False)]))
    write(tmp_path / "rows" / "stars.jsonl", lines([row(5), row(1)]))
    read(tmp_path / "rows", streaming=streaming)
    [said] = caplog.messages
    assert re.search(TRUTHS + r" \(2 values\)\.$", said)
    parts = [DatasetConfig(path=str(tmp_path / "rows" / name)) for name in ("thumbs.jsonl", "stars.jsonl")]
    [said] = load_mixture(parts, streaming=streaming)[1]
    assert re.search(TRUTHS, said)


@pytest.mark.parametrize("late", ["thumbs", "stars"])
def test_late_thumbs_among_stars_are_found(tmp_path, caplog, late):
    many, few = ([row(5), row(1)] * 600, [row(True)]) if late == "thumbs" else ([row(True)] * 1200, [row(5)])
    stream = read(write(tmp_path / "rows.jsonl", lines(many + few)), streaming=True)
    assert not caplog.messages
    for _ in range(2):
        assert len(list(stream)) == 1201
    [said] = caplog.messages
    assert re.search(rf"rows.jsonl, line 1201: label: {TRUTHS}$", said)

    caplog.clear()

    def named(name, rows):
        return DatasetConfig(path=str(write(tmp_path / name, lines(rows))))

    [said] = load_mixture([named("a.jsonl", many), named("b.jsonl", few)])[1]
    assert re.search(TRUTHS, said)
    mixed, said = load_mixture([named("a.jsonl", many), named("b.jsonl", many[:1100] + few)], streaming=True)
    assert not said
    assert len(list(mixed["train"])) == 2301
    assert any(re.search(rf"part 2 of .*b.jsonl\), row 1100: label: {TRUTHS}", each) for each in caplog.messages)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_of_0_and_1_beside_a_file_of_ratings_is_found(tmp_path, caplog, streaming):
    write(tmp_path / "rows" / "stars.jsonl", lines([row(5), row(1)] * 20))
    write(tmp_path / "rows" / "thumbs.jsonl", lines([row(0), row(1), row(1)] * 7))
    list(read(tmp_path / "rows", streaming=streaming))
    [said] = caplog.messages
    found = r"label: .*thumbs\.jsonl.* has only 0 and 1, beside ratings such as 5 elsewhere\. .* label_type"
    assert re.search(found, said)
    parts = [DatasetConfig(path=str(tmp_path / "rows" / name)) for name in ("thumbs.jsonl", "stars.jsonl")]
    [said] = load_mixture(parts, streaming=streaming)[1]
    assert re.search(found, said)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ([1, 5] * 20, [0, 1] * 12, "the split 'test' has only 0 and 1, beside ratings such as 5 elsewhere"),
        ([0, 1] * 12, [1, 5] * 20, "the split 'train' has only 0 and 1, beside ratings such as 5 elsewhere"),
        ([1, 5] * 20, [True, False], "true and false stand among ratings such as 5, and count as 1 and 0"),
        ([1, 5] * 20, [1, 5, 0] * 9, None),
        ([1, 5] * 20, [0, 1], None),
        ([0, 1] * 20, [0, 1] * 20, None),
        ([0.5, 1] * 20, [0, 1] * 20, None),
    ],
)
def test_splits_whose_labels_are_on_other_scales_are_said(tmp_path, train, test, said, streaming):
    for split, labels in (("train", train), ("test", test)):
        write(tmp_path / f"{split}.jsonl", lines([row(label) | {"prompt": f"{split} p"} for label in labels]))
    found = check_splits(load_rows(tmp_path, streaming=streaming), "rows")
    end = "If they are likes and dislikes, add a column label_type, with binary for them and continuous for ratings."
    assert found == ([f"rows: label: {said}. {end}"] if said else [])
    for split in ("train", "test"):
        assert not check_splits({split: load_rows(tmp_path, streaming=streaming)[split]}, "rows")


def test_ratings_of_which_a_few_are_only_0_and_1_need_no_warning(tmp_path, caplog):
    write(tmp_path / "rows" / "a.jsonl", lines([row(4), row(1)] * 20))
    write(tmp_path / "rows" / "b.jsonl", lines([row(0), row(1)]))
    write(tmp_path / "rows" / "c.jsonl", lines([row(1)] * 30))
    read(tmp_path / "rows")
    assert not caplog.messages


@pytest.mark.parametrize("streaming", [False, True])
def test_thumbs_as_text_among_stars_in_parquet_are_counted_in_a_warning(tmp_path, caplog, streaming):
    rows = Dataset.from_list([row("true"), row("5")])
    rows.to_parquet(tmp_path / "rows.parquet")
    assert [each["label"] for each in read(tmp_path / "rows.parquet", streaming=streaming)] == [1, 5]
    assert re.search("label: " + TRUTHS, caplog.text)
    caplog.clear()
    rows.rename_column("label", "stars").to_parquet(tmp_path / "rows.parquet")
    list(read(tmp_path / "rows.parquet", columns="label=stars", streaming=streaming))
    assert re.search("stars: " + TRUTHS, caplog.text)
    assert "stars: numbers that are stored as text" in caplog.text
    assert "label: " not in caplog.text


@pytest.mark.parametrize(
    "rows",
    [
        [row(True), row(0), row(0.5)],
        [row(5), row(1)],
        [row(True, label_type="binary"), row(5, label_type="continuous")],
    ],
)
def test_thumbs_that_are_told_apart_from_stars_need_no_warning(tmp_path, caplog, rows):
    read(write(tmp_path / "rows.jsonl", lines(rows)))
    assert not caplog.messages


@pytest.mark.parametrize("streaming", [False, True])
def test_classes_in_parquet_files_go_by_their_names(tmp_path, streaming):
    def labels(names, classes, column="label", **how):
        features = Features({"prompt": Value("string"), column: ClassLabel(names=names)})
        rows = Dataset.from_dict({"prompt": ["a"] * len(classes), column: classes}, features=features)
        rows.to_parquet(tmp_path / "rows.parquet")
        return [each["label"] for each in read(tmp_path / "rows.parquet", streaming=streaming, **how)]

    assert labels(["bad", "good"], [1, 0], label_map="good=1,bad=-1") == [1, -1]
    assert labels(["bad", "good"], [1, 0], "stars", columns="label=stars", label_map="good=1,bad=-1") == [1, -1]
    assert labels(["5", "1"], [0, 1, None]) == [5, 1, None]
    with pytest.raises(ValueError, match=r"classes good, bad, and .* Map them to numbers"):
        labels(["good", "bad"], [0, 1])


@pytest.mark.parametrize("streaming", [False, True])
def test_classes_of_other_columns_go_by_their_names(tmp_path, streaming):
    """A weight of 5 was read as 1, the number of its class."""
    columns = {"label": [1, 1], "weight": [1, 5], "sft_mask": [True, False], "label_type": ["binary", "continuous"]}
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["x", "y"], **columns})
    for column in columns:
        rows = rows.class_encode_column(column) if column != "label" else rows
    rows.to_parquet(tmp_path / "rows.parquet")
    [one, other] = read(tmp_path / "rows.parquet", streaming=streaming)
    assert (one["weight"], one["sft_mask"], one["label_type"]) == (1, True, "binary")
    assert (other["weight"], other["sft_mask"], other["label_type"]) == (5, False, "continuous")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("more", [{}, {"note": ["new"]}])
def test_each_parquet_file_has_its_own_classes(tmp_path, streaming, more):
    """The second file was read with the classes of the first, or, with another column, as the numbers of classes."""
    for name, order, columns in (("a", ["5", "1"], {}), ("b", ["1", "5"], more)):
        rows = Dataset.from_dict({"prompt": [name], "label": [0], **columns})
        rows.cast_column("label", ClassLabel(names=order)).to_parquet(tmp_path / f"{name}.parquet")
    assert [row["label"] for row in read(tmp_path, streaming=streaming)] == [5, 1]
    assert [row["label"] for row in read(tmp_path, streaming=streaming, label_map="5=1,1=-1")] == [1, -1]


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_with_two_columns_of_a_name_are_refused(tmp_path, streaming):
    """Beside a file of other columns, the last of the two was read."""
    pq.write_table(pa.table([["a"], [1], [0]], ["prompt", "label", "label"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has several columns label\. Give each column its own name"):
        read(tmp_path / "a.parquet", streaming=streaming)
    pq.write_table(pa.table([["b"], [1]], ["prompt", "label"]), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has several columns label\. Give each column its own name"):
        read(tmp_path, streaming=streaming)


def test_each_parquet_file_with_an_unknown_order_of_classes_is_named(tmp_path):
    for name, order in (("a", ["bad", "good"]), ("b", ["good", "bad"])):
        rows = Dataset.from_dict({"prompt": [name], "label": [0]})
        rows.cast_column("label", ClassLabel(names=order)).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet has labels of the classes good, bad, and their numbers do not"):
        read(tmp_path)
    assert read(tmp_path, label_map="good=1,bad=0")["label"][:] == [0, 1]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_an_empty_label_is_missing_also_with_a_label_map(tmp_path, name, streaming):
    rows = [row(label) for label in ("up", "", " ", "down")]
    text = "prompt,completion,label\n" + "".join(f"Hi,Hello!,{each['label']}\n" for each in rows)
    path = write(tmp_path / name, text if name.endswith("csv") else lines(rows))
    mapped = read(path, label_map="up=1,down=0", streaming=streaming)
    assert [each["label"] for each in mapped] == [1, None, None, 0]


@pytest.mark.parametrize("streaming", [False, True])
def test_points_that_may_separate_thousands_are_refused(tmp_path, streaming):
    def labels(*cells, delimiter=";"):
        text = "".join(delimiter.join(("Hi", "Hello!", cell)) + "\n" for cell in ("label", *cells))
        path = write(tmp_path / "rows.csv", text.replace("Hi", "prompt", 1).replace("Hello!", "completion", 1))
        return [each["label"] for each in read(path, streaming=streaming)]

    for cells in (("800", "1.000"), ("2,5", "1.000"), ("-2.500", "4"), ("", "1.234.567")):
        with pytest.raises(ValueError, match=r"rows\.csv, line [23]: label is '.*'\. Semicolons .* Write such numbers"):
            labels(*cells)
    assert labels("1.000", "0.500") == [1.0, 0.5]
    assert labels("2.500", "1.5", "2,5") == [2.5, 1.5, 2.5]
    assert labels("1.000", "2.500", delimiter=",") == [1.0, 2.5]


ODD_LABELS = {"yes, please": 1, "no": 0, "a=b": 0.5, "a=1,b": 0.25, "it's, well, fine": 0.75, "=": 0}


def test_labels_with_commas_and_equals_signs_can_be_mapped(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines([row(word) for word in ODD_LABELS]))
    written = """"yes, please"=1,no=0, a=b =0.5,'a=1,b'=0.25,"it's, well, fine"=0.75,"="=0"""
    for label_map in (ODD_LABELS, written, _as_text(ODD_LABELS)):
        assert [each["label"] for each in read(path, label_map=label_map)] == [*ODD_LABELS.values()]
    # Quotes are only needed if a part of a label looks like an entry
    assert Names.of(None, "yes, please=1,no=0").label_map == {"yes, please": 1, "no": 0}
    assert Names.of(None, '\'tis=1,"no"=0').label_map == {"'tis": 1, '"no"': 0}


def test_columns_with_commas_and_equals_signs_can_be_named():
    named = {"prompt": "Ask, label=x", "label": "5=good, 1=bad"}
    for columns in (named, """prompt="Ask, label=x",label='5=good, 1=bad'""", _as_text(named)):
        assert Names.of(columns, None).columns == named


@pytest.mark.parametrize("label_map", ["Up=1,up=0", {5: 1, "5.0": 0}, {True: 1, "Yes": 0}])
def test_a_label_with_two_meanings_is_refused(label_map):
    with pytest.raises(ValueError, match="two meanings"):
        Names.of(None, label_map)


def test_labels_of_many_digits_are_told_apart():
    names = Names.of(None, {1234567: 1, 1234568: 0, 0.1: 5})
    found = [names.label(label, Counter()) for label in (1234567, "1234568", 1234568.0, "0.10", "1e-1", 0.1)]
    assert found == [1, 0, 0, 5, 5, 5]


def test_pairs_can_be_turned_round(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines([{"chosen": "a", "rejected": "b"}]))
    assert read(path, columns="chosen=rejected,rejected=chosen")[0] == {"chosen": "b", "rejected": "a"}


def test_a_column_of_the_same_name_is_not_read(tmp_path, caplog):
    path = write(tmp_path / "rows.jsonl", lines([row("fine", rating=4)]))
    assert read(path, columns={"label": "rating"})["label"][:] == [4]
    assert "label: the column of this name is ignored, because rating is read as label" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": "prompt=qestion"}, r"rows\.csv has no column qestion; .* Did you mean question\?"),
        ({"columns": "prompt"}, r"columns has 'prompt'; it must be written as prompt=question"),
        ({"columns": "prompt=a,prompt=b"}, r"columns has 'prompt=b'; .* each name once"),
        ({"columns": "prompt=note,label=note"}, r"columns names 'note' twice"),
        ({"columns": ["prompt"]}, r"columns is \['prompt'\]; it must be a mapping, or text"),
        ({"columns": {"prompt": 3}}, r"columns has 'prompt': 3; it must map names"),
        ({"label_map": "up=yes"}, r"label_map has 'yes' for 'up'; it must be a number"),
        ({"label_map": {"up": None}}, r"label_map has None for 'up'"),
        (
            {"columns": NAMES, "label_map": "up=1"},
            r"label_map does not contain the labels 'Down' \(1 row\) of .*rows\.csv, only up\. Add the",
        ),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_names_that_are_wrong(tmp_path, options, message, streaming):
    path = write(tmp_path / "rows.csv", VOTES)
    with pytest.raises(ValueError, match=message):
        list(read(path, streaming=streaming, **options))


@pytest.mark.parametrize(
    "name",
    ["How good? (1 = bad, 5 = good)", "Good (bad=1, good=5)", "1 = bad, 5 = good", "Rate it, 5=good", "a, b = c, d"],
)
def test_a_column_with_commas_and_equals_signs_can_be_named(tmp_path, name):
    path = write(tmp_path / "rows.csv", f'question,answer,"{name}"\nWhy?,So.,4\n')
    columns = f"prompt=question,label={name}, completion = answer"
    assert Names.of(columns, None).columns == {"prompt": "question", "label": name, "completion": "answer"}
    assert read(path, columns=columns)["label"][:] == [4]
    with pytest.raises(ValueError, match="lacks the column label"):
        check_splits(load_rows(path, columns=f"prompt=question,completion=answer,lable={name}"), "rows.csv")


def test_a_key_that_trainers_do_not_read_is_a_key():
    named = {"prompt": "a", "messages": "chat (all, of it)", "sft-mask": "b"}
    assert Names.of("prompt=a,messages=chat (all, of it),sft-mask=b", None).columns == named


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "saved", "rows.csv"])
@pytest.mark.parametrize(
    ("theirs", "given"),
    [("Prompt ", "Prompt"), ("Qualite\u0301", "Qualit\u00e9"), ("Your\u00a0question", "Your question")],
)
def test_names_that_look_like_those_of_columns_name_them(tmp_path, name, theirs, given, streaming, caplog):
    rows = Dataset.from_list([{theirs: "Hi", "completion": "Yo", "label": 1}])
    kind = {"rows.jsonl": rows.to_json, "rows.parquet": rows.to_parquet, "rows.csv": rows.to_csv}.get(name)
    if kind is None:
        rows.save_to_disk(tmp_path / name)
    else:
        kind(tmp_path / name)
    found = list(read(tmp_path / name, columns={"prompt": given}, streaming=streaming))
    assert found == [{"prompt": "Hi", "completion": "Yo", "label": 1}]
    assert not caplog.messages


def test_names_that_look_like_those_of_two_columns_are_refused(tmp_path):
    rows = [{" Prompt": "a", "Prompt ": "b", "completion": "Yo", "label": 1}]
    path = write(tmp_path / "rows.jsonl", lines(rows))
    with pytest.raises(ValueError, match=r"has no column Prompt; .* Did you mean"):
        read(path, columns="prompt=Prompt")
    assert read(path, columns={"prompt": "Prompt "})["prompt"][:] == ["b"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize(
    ("label", "given"),
    [
        ("👍\ufe0f", "👍"),
        ("👍", "👍\ufe0f"),
        ("tre\u0300s bon", "tr\u00e8s bon"),
        ("very\xa0good", "Very good"),
        ("good\u200b", "good"),
        ("I don’t", "I don't"),
        ("I don't", "I don’t"),
    ],
)
def test_labels_that_look_the_same_are_the_same(tmp_path, name, label, given):
    rows, path = Dataset.from_list([row(label), row("bad")]), tmp_path / name
    {"csv": rows.to_csv, "jsonl": rows.to_json, "parquet": rows.to_parquet}[path.suffix[1:]](str(path))
    assert read(path, label_map={given: 1, "bad": 0})["label"][:] == [1, 0]
    assert read(path)["label"][:] == [label, "bad"]  # labels that are not mapped stay as they are
    with pytest.raises(ValueError, match=r"label_map gives .* two meanings, 1 and 0"):
        Names.of(None, {given: 1, label: 0})


def test_names_are_made_once():
    assert Names.of("a=b", None) == Names.of({"a": "b"}, {})


# What is missing


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "completion": "b", "rating": 4}], "`rating` looks like the label: --columns label=rating"),
        (
            [{"question": "a", "response": "b", "score": 0.5, "id": 1}],
            "`question` looks like the prompt, `response` like the completion and `score` like the label: "
            "--columns prompt=question,completion=response,label=score",
        ),
        (
            [{"prompt": "a", "completion": "b", "rank": 1, "vote_count": 9}],
            "`rank` looks like the label: --columns label=rank. A low `rank` looks better, so train with --label_type "
            "continuous and --label_transform lower_is_better,prompt_quantile",
        ),
        (
            [{"prompt": "a", "completion": "b", "Toxicity-Score": 1}],
            "--columns label=Toxicity-Score. A low `Toxicity-Score` looks better, .* --label_transform lower_is_better",
        ),
        ([{"prompt": "a", "completion": "b", "harm_score": 1, "help_rating": 1}], "--columns label=help_rating$"),
        (
            [{"prompt": "a", "completion": "b", "feedback_id": 1, "score_latency": 2, "n votes": 3}],
            'votes. If `n votes` says how good answers are, set --columns "label=n votes". If not',
        ),
        ([{"prompt": "a", "completion": "b", "user_rating_count": 3, "user_rating": 3}], "label=user_rating$"),
        ([{"prompt": "a", "completion": "b", "rating_max": 5, "rating_mean": 3}], "label=rating_mean$"),
        ([{"prompt": "a", "completion": "b", "is_bad": True}], "label=is_bad. A low `is_bad` looks better, so train"),
        (
            [{"prompt": "a", "completion": "b", "mark": 1}],
            r"If `mark` says how good answers are, set --columns label=mark\. If not, it looks like demonstrations "
            r"data: trl-ulma prepare demonstrations --dataset rows.jsonl --output FOLDER$",
        ),
        (
            [{"prompt": "a", "completion": "b", "mark": 1, "tier": 2}],
            r"If a column says how good answers are, name it: --columns label=COLUMN\. If not, it looks like "
            r"demonstrations data: trl-ulma prepare demonstrations",
        ),
        (
            [{"prompt": "a", "completion": "b", "lang": "en", "Temperature": 1, "model_mark": 1}],
            r"If `model_mark` says how good answers are, set --columns label=model_mark\. If not, it looks like",
        ),
        (
            [{"prompt": "a", "completion": "b", "lang": "en"}],
            r"lang\. If a column says how good answers are",
        ),
        (
            [{"prompt": "a", "completion": "b", "num_errors": 1}],
            r"set --columns label=num_errors\. A low `num_errors` looks better, so train with --label_transform "
            r"lower_is_better\. If not",
        ),
        (
            [{"question": "a", "answer": "b"}],
            "`question` looks like the prompt and `answer` like the completion. It looks like demonstrations data: "
            "trl-ulma prepare demonstrations --dataset rows.jsonl --output FOLDER --columns "
            "prompt=question,completion=answer$",
        ),
        (
            [{"prompt": "a", "response": "b", "views": 3}],
            "`response` looks like the completion. If `views` says how good answers are, set --columns "
            "completion=response,label=views. If not, it looks like demonstrations data: .* --columns "
            "completion=response$",
        ),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "rating": 4}],
            "`rating` looks like the label of messages data: trl-ulma prepare messages --dataset rows.jsonl --output "
            "FOLDER --columns label=rating --label_type continuous$",
        ),
        ([{"prompt": "a", "completion": "b"}], r"completion\. It looks like demonstrations data"),
        (
            [{"prompt": "a", "response_a": "b", "response_b": "c", "chosen": "A", "rejected": "B"}],
            "names in the place of answers: chosen and rejected are a and b, as in the columns response_a and",
        ),
        (
            [{"prompt": "a", "answer_1": "b", "answer_2": "c", "chosen": 2, "rejected": 1}],
            "names in the place of answers: chosen and rejected are 1 and 2, as in the columns answer_1 and answer_2",
        ),
        (
            [{"prompt": "a", "completion": "b", "rating_1": 1, "rating_2": 5}],
            r"label=rating_1\. `rating_2` stays unread\. To keep all ratings, write one row per rating\.$",
        ),
        (
            [{"prompt": "a", "completion": "b", "raterAScore": 1, "raterBScore": 5, "raterCScore": 5}],
            r"label=raterAScore\. `raterBScore`, `raterCScore` stay unread\. To keep all ratings",
        ),
        (
            [{"prompt": "a", "completion": "b", "rater_a_error": 1, "rater_b_error": 0, "score": 4, "score.1": 5}],
            r"label=score\. `score\.1` stays unread\. To keep all ratings",
        ),
        (
            [{"prompt": "a", "response_1": "b", "rating_1": 1, "response_2": "c", "rating_2": 5}],
            r"label=rating_1\. `response_2`, `rating_2` stay unread\. To keep all answers, write one row per answer\.$",
        ),
        ([{"prompt": "a", "completion": "b", "rating": 1, "rating_id": 5, "rating_2_reason": "x"}], "label=rating$"),
        ([{"Question": "a", "Model Answer": "b", "label": 4}], '--columns "prompt=Question,completion=Model Answer"'),
        ([{"prompt": "a", "preferred": "b", "worse": "c"}], "--columns chosen=preferred,rejected=worse"),
        ([{"prompt": "a", "completion": "b", "label": "up"}], r"words \('up'\)\. .* --label_map up=1"),
        ([row("down"), row("up")], "--label_map down=0,up=1"),
        ([row("ja"), row("nein")], "--label_map ja=1,nein=0"),
        ([row("0,5")], r"labels with a comma \('0,5'\)\. Write them with a decimal point and without separators"),
        ([row("1,234.5"), row("2,5")], r"labels with a comma \('1,234\.5', '2,5'\)"),
        ([{"foo": "a"}], "Rows need prompt, completion and label"),
        ([{"transcript": "a", "rating": 1}], "It looks like red-team data: trl-ulma prepare red-team --dataset rows"),
        (
            [{"system": "s", "question": "q", "chosen": "To solve a", "rejected": "To solve b"}],
            "column question would be ignored. .* --columns prompt=question",
        ),
    ],
)
def test_what_fits_is_proposed(tmp_path, rows, message, streaming):
    splits = load_rows(write(tmp_path / "rows.jsonl", lines(rows)), streaming=streaming)
    with pytest.raises(ValueError, match=message):
        check_splits(splits, "rows.jsonl")


LOW = (
    "thumbs_down",
    "thumbsDown",
    "down_votes",
    "votes_against",
    "not_helpful",
    "notVeryHelpful",
    "helpful_no",
    "not_liked",
    "unhelpful_votes",
    "dislike_score",
    "disagree",
    "incorrect_score",
    "inaccuracy_rating",
    "negative_feedback",
    "wrong_score",
    "hate_score",
    "refusal_score",
    "toxicity_rating",
    "low_quality",
    "poor_quality",
    "quality_issues",
    "complaints",
    "no_of_errors",
    "sycophancy",
    "fabricated_facts",
    "bug_count",
    "is_plagiarism",
    "unanswered",
    "Fehlerzahl",
)
HIGH = (
    "less_toxic",
    "toxicity_inverted",
    "error_handling",
    "jailbreak_resistance",
    "answered",
    "thumbs_up",
    "up_votes",
    "helpful",
    "helpful_yes",
    "helpful_yes_no",
    "like_dislike",
    "thumbs_up_down",
    "is_safe",
    "no_issues",
    "not_toxic",
    "low_toxicity",
    "error_free",
    "issue_resolved",
    "unbiased",
    "harmless",
    "flawless",
    "harmonic_mean",
    "non_expert_quality",
    "no_of_likes",
    "downstream_score",
    "default_score",
    "understanding",
    "interest",
    "rating",
)


@pytest.mark.parametrize("name", [*LOW, *HIGH])
def test_names_of_labels_for_which_lower_is_better(name):
    assert ("--label_transform lower_is_better" in direction(name)) == (name in LOW)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("thumbs_down", "thumbs_up"), "thumbs_up"),
        (("helpful_no", "helpful_yes"), "helpful_yes"),
        (("dislike_score", "likes"), "likes"),
        (("thumbs_down", "id"), "thumbs_down"),
        (("complaints", "id"), "complaints"),
        (("userRating", "id"), "userRating"),
        (("voteCount", "id"), None),
    ],
)
def test_of_several_labels_one_is_proposed_for_which_higher_is_better(names, expected):
    for order in (names, names[::-1]):
        assert rating_of({"prompt": "a", "completion": "b", **dict.fromkeys(order, 1)}) == expected


def test_answers_that_are_letters_of_options_are_answers(tmp_path):
    rows = [{"prompt": "Is it A or B?", "A": "red", "B": "blue", "chosen": "A", "rejected": "B"}]
    assert not check_splits(load_rows(write(tmp_path / "rows.jsonl", lines(rows))), "rows.jsonl")


def test_what_is_proposed_keeps_the_columns_that_are_named_already(tmp_path):
    file = write(tmp_path / "rows.jsonl", lines([{"question": "q", "response": "r", "noten": 4}]))
    message = r"found noten, question, response\. .*: --columns prompt=question,completion=response,label=noten$"
    with pytest.raises(ValueError, match=message):
        check_splits(load_rows(file, columns="label=noten"), "rows.jsonl", columns="label=noten")


def test_a_number_too_large_for_a_label_is_left_to_the_check_of_rows(tmp_path):
    splits = load_rows(write(tmp_path / "rows.jsonl", lines([row(10**400), row(-(10**400)), row(1)])))
    assert not check_splits(splits, "rows.jsonl")
    with pytest.raises(ValueError, match=r"^2 of 3 rows of the train dataset are invalid:"):
        read_labels(splits["train"][:], range(3), "train", LabelRules())


@pytest.mark.parametrize("streaming", [False, True])
def test_a_few_words_among_numbers_are_left_to_the_check_of_rows(tmp_path, streaming):
    rows = [row(5), row("n/a"), row("4,5"), row(None), row(1)]
    splits = load_rows(write(tmp_path / "rows.jsonl", lines(rows)), streaming=streaming)
    assert check_splits(splits, "rows.jsonl") == []
    assert [each["label"] for each in splits["train"]] == [5, "n/a", "4,5", None, 1]


@pytest.mark.parametrize("missing", ["NA", "n/a", "null", "None", "NaN", "-", "<NA>", "#N/A", "\\N"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_words_for_a_missing_label_are_no_vocabulary(tmp_path, missing, name):
    rows = [row(i % 5 + 1 if i < 8 else missing) for i in range(20)]
    table = "prompt,completion,label\n" + "".join(f"p,c,{each['label']}\n" for each in rows)
    splits = load_rows(write(tmp_path / name, table if name.endswith("csv") else lines(rows)))
    assert check_splits(splits, name) == []
    labels = {"label": [each["label"] for each in splits["train"]]}
    with pytest.raises(ValueError, match=r"12 × label is"):  # so that they can be dropped
        read_labels(labels, range(20), "train", LabelRules("continuous"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("invalid_rows", ["error", "drop", "mark"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_words_for_a_missing_label_beside_a_label_map_are_read_as_without_one(tmp_path, kind, invalid_rows, streaming):
    def found(words, label_map):
        rows = [row(word) for word in words]
        path = tmp_path / f"{'of words' if label_map else 'numbers'}.{kind}"
        if kind == "jsonl":
            write(path, lines(rows))
        else:
            table = Dataset.from_list([each | {"label": str(each["label"])} for each in rows])
            table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
        read = load_rows(path, label_map=label_map, invalid_rows=invalid_rows, streaming=streaming)["train"]
        return [each["label"] for each in read]

    missing = ["N/A", "n/a", "-", "None", "NaN", " NA "]
    mapped = found(["up", *missing, "down"], "up=1,down=0")
    assert mapped == found([1, *missing, 0], None) == [1, *missing, 0]
    with pytest.raises(ValueError, match=r"^6 of 8 rows of the train dataset are invalid:"):
        read_labels({"label": mapped}, range(8), "train", LabelRules("continuous"))


def test_a_label_map_can_name_words_for_a_missing_label(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines([row(word) for word in ("up", "n/a", "None", "-")]))
    assert [each["label"] for each in read(path, label_map="up=1,N/A=0.5,none=0,-=0.25")] == [1, 0.5, 0, 0.25]
    # Beside +, it is a label
    signs = write(tmp_path / "signs.jsonl", lines([row(word) for word in ("+", "-", "-")]))
    with pytest.raises(ValueError, match=r"label_map does not contain the labels '-' \(2 rows\)"):
        read(signs, label_map="+=1")


def test_a_label_that_is_no_number_needs_no_place_in_a_label_map(tmp_path):
    rows = [row(label) for label in (5.0, math.nan, 1.0)]
    path = write(tmp_path / "rows.jsonl", lines(rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for file in (path, tmp_path / "rows.parquet"):
        found = [each["label"] for each in read(file, label_map={5: 1, 1: 0})]
        assert (found[0], found[2]) == (1, 0)
        assert found[1] is None or math.isnan(found[1])


@pytest.mark.parametrize(
    ("words", "label_map"),
    [(["up", "NA", "down", "NA", "NA"], "up=1,down=0"), (["+", "-", "NA"], r"\+=1,-=0"), (["+", "-"], r"\+=1,-=0")],
)
def test_words_for_a_missing_label_are_not_mapped(tmp_path, words, label_map):
    splits = load_rows(write(tmp_path / "rows.jsonl", lines([row(word) for word in words])))
    with pytest.raises(ValueError, match=f"--label_map {label_map}$"):
        check_splits(splits, "rows.jsonl")


def test_text_that_is_not_read_is_said(tmp_path):
    pairs = [{"about": "a text of its own", "id": "x1", "chosen": "To be", "rejected": "Not to be"}]
    splits = load_rows(write(tmp_path / "rows.jsonl", lines(pairs)))
    asked = "is ignored. If the answers depend on it, put it into the prompt."
    assert check_splits(splits, "rows.jsonl") == [f"rows.jsonl: the text in column about {asked}"]
    splits = load_rows(write(tmp_path / "more.jsonl", lines([row(1, system="Be kind.")])))
    assert check_splits(splits, "more.jsonl") == [f"more.jsonl: the text in column system {asked}"]
    chat = {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}
    assert check_splits(load_rows(write(tmp_path / "chat.jsonl", lines([chat | {"question": "a"}]))), "x") == []


@pytest.mark.parametrize(
    ("given", "is_said"),
    [
        ({"system_message": "Be kind."}, True),
        ({"System Prompt": "Be kind."}, True),
        ({"context": "Ann is five years old."}, True),
        ({"input": "3 + 2"}, True),
        ({"history": [["Hi", "Hello!"]]}, True),
        ({"passages": ["Ann is five.", "Bob is six."]}, True),
        ({"prompt": "Ann is five. How old is she?", "context": "Ann is five. "}, False),
        ({"prompt": [{"role": "system", "content": "Be kind."}], "system_message": "Be kind."}, False),
        ({"prompt": "Ann is five. How old?", "documents": [{"text": "Ann is five."}]}, False),
        ({"input": "", "context": None, "history": []}, False),
        ({"system_fingerprint": "fp_1 a", "rating_system": "1 to 5", "context_id": "a b", "note": "Well done."}, False),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_that_belongs_before_the_answer_and_is_not_read_is_said(tmp_path, given, is_said, streaming):
    file = write(tmp_path / "rows.jsonl", lines([row(1) | given, row(0) | given]))
    said = check_splits(load_rows(file, streaming=streaming), "rows.jsonl")
    [name] = given if is_said else [""]
    expected = f"rows.jsonl: the text in column {name} is ignored. If the answers depend on it, put it into the prompt."
    assert said == [expected] * is_said


ASKED = [{"role": "user", "content": "How do I boil an egg"}]
SAID = {"chosen": "In hot water.", "rejected": "In cold water."}
SAID_BY_ASSISTANT = {name: [{"role": "assistant", "content": text}] for name, text in SAID.items()}


@pytest.mark.parametrize(
    ("pair", "is_said"),
    [
        (SAID | {"質問": "卵の茹で方を教えてください。"}, True),
        (SAID | {"问题": "怎么煮鸡蛋？"}, True),
        (SAID | {"คำถาม": "ต้มไข่อย่างไร"}, True),
        (SAID | {"turns": ASKED}, True),
        (SAID_BY_ASSISTANT | {"turns": ASKED}, True),
        (SAID_BY_ASSISTANT | {"about": "How do I boil an egg"}, True),
        ({name: ASKED + SAID_BY_ASSISTANT[name] for name in SAID} | {"turns": ASKED}, False),
        (SAID | {"分類": "料理", "id": "x1", "タグ": ["卵の茹で方を"], "turns": []}, False),
        (SAID | {"prompt": "Hi", "質問": "卵の茹で方を教えてください。"}, False),
    ],
)
def test_a_question_of_pairs_that_is_not_read_is_said(tmp_path, pair, is_said):
    file = write(tmp_path / "rows.jsonl", lines([pair, pair]))
    said = check_splits(load_rows(file), "rows.jsonl")
    assert [each.partition(" is ignored")[0] for each in said] == [
        f"rows.jsonl: the text in column {name}" for name in pair if is_said and name not in SAID
    ]


def test_the_input_of_rated_alpaca_data_is_kept(tmp_path):
    rows = [{"instruction": "Add.", "input": f"{i} + 2", "output": f"{i + 2}", "rating": i % 5 + 1} for i in range(6)]
    file = write(tmp_path / "my rows.jsonl", lines(rows))
    proposal = r"`rating` looks like the label of alpaca data: (trl-ulma prepare alpaca --dataset .*)$"
    with pytest.raises(ValueError, match=proposal) as error:
        check_splits(load_rows(file), str(file))
    found = re.search(proposal, str(error.value))
    assert found is not None
    assert main(shlex.split(found[1].replace("FOLDER", str(tmp_path / "out")))[1:]) == 0
    made = load_rows(tmp_path / "out")["train"]
    assert "Add.\n\n" in made["prompt"][0][-1]["content"]
    assert set(made["label"][:]) <= {1, 2, 3, 4, 5}
    file = write(tmp_path / "thumbs.jsonl", lines([each | {"rating": each["rating"] % 2} for each in rows]))
    with pytest.raises(ValueError, match=r"--columns label=rating$"):
        check_splits(load_rows(file), "thumbs.jsonl")
    for rest in ({}, {"input": ""}):  # nothing is lost
        file = write(tmp_path / "rest.jsonl", lines([{"instruction": "a", "output": "b", "rating": 1} | rest]))
        with pytest.raises(ValueError, match=r"--columns prompt=instruction,completion=output,label=rating$"):
            check_splits(load_rows(file), "rest.jsonl")


def test_the_input_that_a_part_of_a_mixture_leaves_unread_is_said(tmp_path):
    rows = [{"instruction": "Add.", "input": "1 + 2", "output": "3", "rating": 1}]
    names = {"prompt": "instruction", "completion": "output", "label": "rating"}
    file = write(tmp_path / "rows.jsonl", lines(rows))
    [said] = load_mixture([DatasetConfig(path=str(file), columns=names)])[1]
    assert "rows.jsonl: the text in column input is ignored. If the answers depend on it" in said


def test_rows_to_score_need_no_label(tmp_path):
    splits = load_rows(write(tmp_path / "rows.jsonl", lines([{"prompt": "a", "completion": "b"}])))
    assert check_splits(splits, "rows.jsonl", needs_label=False) == []
    with pytest.raises(ValueError, match="lacks the column label"):
        check_splits(splits, "rows.jsonl")


# Fuzz: what is written is read back, or refused

PIECES = [
    "a",
    "é",
    "\n",
    "\r\n",
    "\r",
    '"',
    '""',
    ",",
    ";",
    "\t",
    " ",
    "None",
    "4",
    "true",
    "'",
    "\\",
    "\u2028",
    "🙂",
    "[",
    "{",
]
PLAIN = ["label", "id", "note"]


def random_text(draw):
    return "".join(draw.choice(PIECES) for _ in range(draw.randrange(6)))


def random_value(draw, depth=0):
    kind = draw.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [random_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 7:
        return {draw.choice("abc"): random_value(draw, depth + 1) for _ in range(draw.randrange(4))}
    return draw.choice(
        [None, True, False, draw.randrange(-5, 5), draw.random(), draw.choice([2**60, 1e300, -0.5]), random_text(draw)]
    )


def without_none(value):
    """As Arrow gives objects: each has the keys of all, and None where it has no value."""
    if isinstance(value, dict):
        return {key: without_none(each) for key, each in value.items() if each is not None}
    return [without_none(each) for each in value] if isinstance(value, list) else value


def same(one, other, tolerance=0.0):
    if isinstance(one, bool) != isinstance(other, bool):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key], tolerance) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(same(*pair, tolerance) for pair in zip(one, other, strict=True))
    are_floats = isinstance(one, float) and isinstance(other, float)
    return one == other or (are_floats and math.isclose(one, other, rel_tol=tolerance))


def rows_or_refusal(path):
    try:
        return list(read(path))
    except ValueError as error:
        if str(path) not in str(error):
            raise
        return None


def fuzz_csv(folder, seed):
    draw = random.Random(seed)
    names = ["prompt", "completion", *draw.sample(["label", "note", "id"], draw.randrange(4))]
    draw.shuffle(names)
    rows = [{name: random_text(draw) for name in names} for _ in range(draw.randrange(1, 6))]
    for each in rows:
        if "label" in each:
            each["label"] = draw.choice(["0", "1", "0.5", "true", "False", "-2"])
    delimiter = draw.choice([",", ",", ";", "\t"])
    encoding = draw.choice(["utf-8", "utf-8-sig", "utf-16"])
    path = folder / (f"{seed}.tsv" if delimiter == "\t" else f"{seed}.csv")
    careless = draw.random() < 0.2  # as people write who do not know of quotes
    with path.open("w", encoding=encoding, newline="") as file:
        if careless:
            file.write(
                "\n".join(delimiter.join(each) for each in [names, *([r[n] for n in names] for r in rows)]) + "\n"
            )
        else:
            # csv writes a carriage return without quotes where lines end in "\n"
            end, quoting = draw.choice([("\r\n", csv.QUOTE_MINIMAL), ("\r\n", csv.QUOTE_ALL), ("\n", csv.QUOTE_ALL)])
            writer = csv.DictWriter(file, names, delimiter=delimiter, quoting=quoting, lineterminator=end)
            writer.writeheader()
            writer.writerows(rows)
    found = rows_or_refusal(path)
    if found is None:
        assert careless or not any(any(each.values()) for each in rows), seed
        return "refused"
    if careless and any(set('\n\r"' + delimiter) & set(text) for each in rows for text in each.values()):
        return "careless"  # what such a file holds, only its writer knows
    rows = [each for each in rows if any(each.values())]  # the others are left out
    expected = [each | ({"label": number(each["label"])} if "label" in each else {}) for each in rows]
    assert len(found) == len(expected), seed
    for one, other in zip(found, expected, strict=True):
        assert {name: float(v) if name == "label" else v for name, v in one.items()} == {
            name: float(v) if name == "label" else v for name, v in other.items()
        }, seed
    return "read"


def fuzz_json(folder, seed):
    draw = random.Random(seed)
    names = ["prompt", "completion", "label", "x", "y"]
    rows = [
        {"prompt": random_text(draw), **{name: random_value(draw) for name in names[1:] if draw.random() < 0.9}}
        for _ in range(draw.randrange(1, 6))
    ]
    kind = draw.randrange(3)
    path = folder / f"{seed}.json"
    if kind == 0:
        text = "\n".join(json.dumps(each, ensure_ascii=draw.random() < 0.5) for each in rows)
    else:
        text = (
            json.dumps(rows, indent=draw.choice([None, 1]))
            if kind == 1
            else "\n\n".join(json.dumps(r, indent=1) for r in rows)
        )
    if draw.random() < 0.2:  # cut off, or a character is lost
        at = draw.randrange(len(text))
        text = text[:at] + text[at + 1 :] if draw.random() < 0.5 else text[:at]
        rows = None
    path.write_text(text, encoding="utf-8", newline="")
    found = rows_or_refusal(path)
    if found is None:
        assert rows is None, seed
        return "refused"
    if rows is None:
        return "damaged"
    assert len(found) == len(rows), seed
    for one, other in zip(found, rows, strict=True):
        for name in names:
            value, written = without_none(one.get(name)), without_none(other.get(name))
            if name == "label" and isinstance(written, str) and number(written) is not None:
                written = number(written)
            if name == "label" and isinstance(written, bool) and not isinstance(value, bool | str):
                value = bool(value)  # truth values among numbers are numbers
            is_text = isinstance(value, str) and not isinstance(written, str) and written is not None
            value = without_none(json.loads(value)) if is_text else value
            tolerance = 0.0 if name in "xy" else 1e-12  # JSON rounds numbers among other values, with a warning
            assert same(value, written, tolerance), (seed, name)
    return "read"


@pytest.mark.parametrize("fuzz", [fuzz_csv, fuzz_json])
def test_what_is_written_is_read_back_or_refused(tmp_path, fuzz):
    ends = [fuzz(tmp_path, seed) for seed in range(100)]
    assert ends.count("read") >= 60
    assert ends.count("refused") >= 3


@pytest.mark.slow
@pytest.mark.parametrize("fuzz", [fuzz_csv, fuzz_json])
def test_ten_thousand_files_are_read_back_or_refused(tmp_path, fuzz):
    ends = []
    for seed in range(1000, 6000):
        ends.append(fuzz(tmp_path, seed))
        for file in tmp_path.glob("cache/trl_ulma/*"):
            file.unlink()
    print({end: ends.count(end) for end in set(ends)})
    assert ends.count("read") >= 3000


# Memory

READ = """
import resource, sys
from trl_ulma.data.files import load_rows
import datasets
datasets.config.HF_DATASETS_CACHE = sys.argv[2]
rows = load_rows(sys.argv[1])["train"]
print(len(rows), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_of_reading(path, number):
    with path.open("w", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.writer(file)
            writer.writerow(["prompt", "completion", "label"])
            writer.writerows((f"question {i} " * 20, "so it is, " * 40, i % 2) for i in range(number))
        else:
            opening, closing, between = ("[", "]", ",\n") if path.suffix == ".json" else ("", "", "\n")
            file.write(opening)
            for i in range(number):
                text = {"prompt": f"question {i} " * 20, "completion": "so it is. " * 40, "label": i % 2}
                file.write((between if i else "") + json.dumps(text))
            file.write(closing)
    command = [sys.executable, "-c", READ, str(path), str(path.parent / "cache")]
    read_rows, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:]
    assert int(read_rows) == number
    return int(peak)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_reading_is_flat_to_320_000_rows(tmp_path, suffix):
    few, many = (peak_of_reading(tmp_path / f"{number}.{suffix}", number) for number in (20_000, 320_000))
    assert many - few < 0.15 * few  # the files are of 13 MB and of 210 MB


# Values of several kinds in Parquet, and JSON that leaves out empty values


def test_one_odd_cell_of_parquet_leaves_the_others_readable(tmp_path):
    own = {"label": ["4", "5", ""], "trials": ["3", "n/a", None], "sft_mask": [1.0, 0.0, math.nan]}
    table = {"prompt": ["a", "b", "c"], "completion": ["x", "y", "z"], **own, "weight": [1.0, 2.0, 3.0]}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    rows = load_rows(str(tmp_path / "rows.parquet"))["train"]
    assert rows["label"][:] == [4, 5, ""]
    assert rows["trials"][:] == [3, "n/a", None]
    assert rows["sft_mask"][:] == [True, False, None]
    assert rows.features["weight"] == Value("float64")
    columns = {name: rows[name][:] for name in ("prompt", "completion", "label")}
    invalid: dict[int, InvalidRow] = {}
    labels = read_labels(columns, range(3), "train", LabelRules("continuous"), invalid)
    assert list(invalid) == [2]
    assert labels["label"][:2] == [4.0, 5.0]


def test_thumbs_among_ratings_are_counted_beside_an_odd_cell_of_parquet(tmp_path, caplog):
    texts = ["a", "b", "c", "d"]
    table = {"prompt": texts, "completion": texts, "label": ["true", "4", "5", "?"]}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    assert load_rows(str(tmp_path / "rows.parquet"))["train"]["label"][:] == [True, 4, 5, "?"]
    assert "true and false" in caplog.text


def test_words_in_parquet_stay_words(tmp_path):
    words = ["good", "bad", None]
    pq.write_table(pa.table({"prompt": words, "completion": words, "label": words}), tmp_path / "rows.parquet")
    rows = load_rows(str(tmp_path / "rows.parquet"))["train"]
    assert (rows["label"][:], rows.features["label"]) == (words, Value("string"))


@pytest.mark.parametrize("streaming", [False, True])
def test_json_lines_may_lack_a_named_column_at_first(tmp_path, streaming):
    lines = [{"q": "a", "r": "x"}, {"q": "b", "r": "y", "stars": 4}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    names = "prompt=q,completion=r,label=stars"
    rows = list(load_rows(str(file), columns=names, streaming=streaming)["train"])
    assert [row.get("label") for row in rows] == [None, 4]
    with pytest.raises(ValueError, match=r"has no column star; its columns are q, r, stars\. Did you mean stars\?"):
        list(load_rows(str(file), columns="prompt=q,completion=r,label=star", streaming=streaming)["train"])
