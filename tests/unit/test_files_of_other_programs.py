"""Files as spreadsheets, pandas, R, JavaScript and survey tools write them."""

import bz2
import csv
import gzip
import io
import json
import lzma

import pytest
from datasets import Dataset

from trl_ulma.data.files import check_splits, load_files, load_rows
from trl_ulma.data.mixture import load_mixture
from trl_ulma.labels import InvalidRow, LabelRules, read_labels
from trl_ulma.scripts.options import PartConfig

HEAD = "prompt,completion,label\n"
ROW = {"prompt": "Hi", "completion": "Yo", "label": 1}
LINE = json.dumps(ROW) + "\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(path, **options):
    splits = load_rows(path, **options)
    check_splits(splits, path.name)
    return list(splits["train"])  # before datasets 4.8.5, `to_list` keeps JSON as text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        # CSV
        ("a.csv", HEAD + "Hi,Yo,1,\n", r"remove the comma at its end, or add as many to the first line"),
        ("a.csv", HEAD + "Hi,Yo,1,,\n", r"remove the 2 delimiters at its end"),
        ("a.csv", HEAD[:-1] + ",\nHi,Yo,1\n", r"remove a comma at the end of the first line"),
        ("a.csv", HEAD + "1,Hi,Yo,1\n", r"write number, before the first line"),
        ("a.csv", b"PK\x03\x04" + bytes(99), r"is a zip archive or an Excel file\. Save the sheet as CSV"),
        ("a.csv", (HEAD + "Привет,Как дела,1\n").encode("cp1251"), r"is not UTF-8 text: byte 0xcf in line 2"),
        ("a.csv", (HEAD + "안녕하세요,반갑습니다,1\n").encode("euc-kr"), r"is not UTF-8 text: byte 0xbe in line 2"),
        ("a.xlsx", b"PK", r"ends in '\.xlsx'; a data file must be .* Save the sheet as CSV\."),
        ("a.csv", HEAD + "Hi,Yo,80%\n", r"labels with a percent sign \('80%'\)\. Write them as numbers between 0"),
        ("a.csv", HEAD + "Hi,Yo,thumbs_up\nHi,Ho,👎🏽\n", r"--label_map thumbs_up=1,👎🏽=0$"),
        ("a.csv", HEAD + 'Hi,Yo,"Yes, it\'s $5"\n', r"--label_map 'Yes, it'\"'\"'s \$5=NUMBER'$"),
        ("a.csv", "Your question,answer,rating\nHi,Yo,1\n", r'--columns "prompt=Your question,completion=answer,'),
        ("a.csv", bz2.compress((HEAD + "Hi,Yo,1\n").encode()), r"is a bzip2 file\. Unpack it"),
        ("a.csv", lzma.compress((HEAD + "Hi,Yo,1\n").encode()), r"is an xz file\. Unpack it"),
        ("a.csv", "\n <!DOCTYPE HTML><html>Log in</html>", r"is an HTML page, .* Download the file itself"),
        ("a.csv", "prompt  completion  label\nq  a  1\n", r"only one column, .* Separate the fields with commas"),
        ("a.csv", "prompt completion label\nq a 1\n", r"only one column, .* Separate the fields with commas"),
        ("a.csv", '"prompt,completion,label"\n"q,a,1"\n', r"each line is in double quotes as a whole\. Remove these"),
        ("a.csv", '"question;answer;rating"\n"q;a;1"\n', r"each line is in double quotes as a whole\. Remove these"),
        ("a.csv", "# exported 2020\n" + HEAD + "q,a,1\n", r"like a comment, .* '# exported 2020'\. Remove it\."),
        ("a.csv", "# by Ann, 2020\n" + HEAD + "q,a,1\n", r"looks like a comment, .* '# by Ann'\. Remove it\."),
        ("a.csv", "# by Ann\nprompt;completion;label\nq;a;1\n", r"has a comment in place of .*, '# by Ann'\. Remove"),
        ("a.csv", "#,prompt,completion,label\n1,q,a,b,1\n", r"Put each field that contains a comma in double quotes"),
        ("a.csv", '"question, long"\n"a, b"\n', r"found question, long\. Rows need prompt, completion and label"),
        ("a.csv", "my question\nHi\n", r"`my question` looks like the prompt: --columns .prompt=my question"),
        # JSON
        ("a.jsonl", LINE.strip() + ",\n" + LINE, r"line 1, .*: there is text after the object\. Write one object per"),
        ("a.json", json.dumps({"data": [ROW, ROW]}), r"whose `data` is a list of 2 objects\..* jq \.data"),
        ("a.json", json.dumps({"data": [ROW]}, indent=1), r"only one row, whose `data` is a list of 1 object\. "),
        ("a.json", json.dumps({key: [value] * 2 for key, value in ROW.items()}), r'orient="records", lines=True'),
        ("a.json", json.dumps({key: {"0": value} for key, value in ROW.items()}), r'orient="records", lines=True'),
        ("a.json", json.dumps({"0": ROW, "1": ROW}), r'orient="records", lines=True'),
        ("a.jsonl", gzip.compress(LINE.encode(), mtime=0), r"is a gzip file\. Add \.gz to its name"),
    ],
)  # fmt: skip
def test_errors_that_say_what_to_do(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / name, text))


LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.csv.gz", "a.parquet", "folder/train.parquet"])
def test_a_pointer_in_the_place_of_a_file_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    write(tmp_path / name, LFS)
    for options in ({}, {"invalid_rows": "drop"}, {"streaming": True}):
        with pytest.raises(ValueError, match=r"is a pointer of Git LFS, which .* Run git lfs pull in its folder"):
            load_rows(tmp_path / name.partition("/")[0], **options)
    write(tmp_path / name, "/annex/objects/SHA256E-s12345--0.csv\n")
    with pytest.raises(ValueError, match=r"is a pointer of git-annex, .* Run git annex get \."):
        load_rows(tmp_path / name)


def test_files_that_are_not_downloaded_in_saved_datasets_and_behind_links(tmp_path):
    Dataset.from_list([ROW]).save_to_disk(tmp_path / "saved")
    [arrow] = (tmp_path / "saved").glob("*.arrow")
    write(arrow, LFS)
    with pytest.raises(ValueError, match=r"\.arrow is a pointer of Git LFS"):
        load_rows(tmp_path / "saved")
    (tmp_path / "a.csv").symlink_to(".git/annex/objects/SHA256E-s12345--0.csv")
    with pytest.raises(
        FileNotFoundError, match=r"is a link to \.git/annex/objects/.*, which does not .* git annex get"
    ):
        load_rows(tmp_path / "a.csv")


def test_the_mark_of_a_line_is_no_column_of_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"found text\. Rows need"):
        read(write(tmp_path / "a.csv", "text\nHi, you\nHo\n"), invalid_rows="mark")


@pytest.mark.parametrize("opening", ["{ ", '{"note": [\n{"a": 1}], '])
def test_objects_over_several_lines(tmp_path, opening):
    text = (opening + '"prompt": "Hi",\n "completion": "Yo", "label": 1}\n') * 2
    assert [row["completion"] for row in read(write(tmp_path / "a.json", text))] == ["Yo", "Yo"]


def test_a_first_line_that_is_cut_off_is_one_invalid_row(tmp_path):
    rows = read(write(tmp_path / "a.jsonl", LINE[:20] + "\n" + LINE[:-1] + "\n" + LINE), invalid_rows="drop")
    assert rows == [ROW, ROW]
    rows = load_rows(write(tmp_path / "a.jsonl", '{"prompt": "Hi",\n' + LINE), invalid_rows="drop")["train"].to_list()
    assert rows == [ROW]


@pytest.mark.parametrize("is_array", [False, True])
def test_a_text_that_is_cut_inside_an_emoji_is_an_invalid_row(tmp_path, is_array):
    rows = [ROW, ROW | {"prompt": "Hi \ud83d"}, ROW | {"prompt": "Hi 😀", "label": 0}]
    text = json.dumps(rows, indent=1) if is_array else "".join(json.dumps(row) + "\n" for row in rows)
    path = write(tmp_path / "a.json", text)
    line = 7 if is_array else 2
    where = f"in line {line}{' or below' * is_array}"
    message = rf"half of a surrogate pair \(\\ud83d\) {where}, which is not a character\. Correct or remove this row\."
    with pytest.raises(ValueError, match=message):
        read(path)
    assert read(path, invalid_rows="drop") == [rows[0], rows[2]]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("more", [0, 1200])
def test_quotes_that_are_not_those_of_csv_are_counted(tmp_path, caplog, streaming, more):
    text = 'prompt, reply, label\nq1, "Hello", 1\nq2, "Bye ""you""", 0\nq3,None,1\n' + 'q4, "No", 1\n' * more
    rows = list(load_rows(write(tmp_path / "a.csv", text), columns="completion=reply", streaming=streaming)["train"])
    assert rows[0]["completion"] == ' "Hello"'
    found = "reply: most texts begin with a space and a quote, so the quotes are read as text. Remove these spaces"
    assert caplog.text.count(found) == 1
    caplog.clear()
    list(load_rows(write(tmp_path / "b.csv", f"{HEAD}'Hi','yes',1\n'Ho','it's',0\n"), streaming=streaming)["train"])
    for name in ("prompt", "completion"):
        assert (
            f"{name}: most texts are between single quotes, which are read as text. Replace them by double quotes"
            in caplog.text
        )


def test_texts_with_quotes_of_their_own_are_no_fault(tmp_path, caplog):
    texts = ["'tis", ' "Hello" ', ' Yes, "it" is', '"Quoted"', "'Q"]
    cells = [f'"{each.replace(chr(34), 2 * chr(34))}"' for each in texts]
    text = HEAD + "'Hi'," + ",1\nHo,".join(cells) + ",0\n"
    read(write(tmp_path / "a.csv", text))
    read(write(tmp_path / "a.jsonl", LINE.replace("Yo", " 'Yo'")))
    assert not caplog.messages


def test_columns_of_one_name_that_nothing_reads(tmp_path, caplog):
    path = write(tmp_path / "a.csv", "prompt,completion,label,note,note\nHi,Yo,1,a,b\n")
    assert read(path) == [ROW | {"note 1": "a", "note 2": "b"}]
    assert "several columns are named note, and get numbers after their names" in caplog.text
    with pytest.raises(ValueError, match="names the column note twice"):
        read(path, columns="weight=note")


def test_names_and_labels_with_commas(tmp_path):
    path = write(tmp_path / "a.csv", 'question,answer,"Good, or not?"\nHi,Yo,"Yes, very"\nHi,No,no\n')
    names = "prompt=question,label=Good, or not?,completion=answer"
    assert [row["label"] for row in read(path, columns=names, label_map="Yes, very=1,no=0")] == [1, 0]


def test_answers_that_are_json_are_text_and_messages_are_not(tmp_path):
    answer = '[{"city": "Paris"}]'
    chat = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Yo"}]
    text = io.StringIO()

    csv.writer(text).writerows(
        [
            ["prompt", "completion", "label"],
            ["Hi", answer, "1"],
            [f" {json.dumps(chat[0])} ", json.dumps(chat[1], indent=1), "1"],
        ]
    )
    rows = read(write(tmp_path / "a.csv", text.getvalue()))
    assert rows[0]["completion"] == answer
    assert (rows[1]["prompt"], rows[1]["completion"]) == chat


def test_messages_that_numpy_printed_are_refused(tmp_path):
    half = "[{'role': 'user', 'content': 'Hi'} {'role': 'assistant', 'content': 'Yo'}]"
    path = write(tmp_path / "a.csv", f'chosen,rejected\n"{half}","{half}"\n')
    with pytest.raises(ValueError, match=r"lists of messages that are stored as text in the column chosen.* NumPy"):
        read(path)


PRODIGY = {"text": "Is it good?", "options": [{"id": "yes"}], "accept": ["yes"]}


def test_a_verdict_about_a_row_is_no_completion(tmp_path):
    rows = [PRODIGY | {"answer": answer} for answer in ("accept", "reject", "ignore")]
    with pytest.raises(
        ValueError, match=r"found text, options, accept, answer\. Rows need prompt, completion and label"
    ):
        read(write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    with pytest.raises(ValueError, match=r"`answer` like the completion"):
        read(write(tmp_path / "a.jsonl", json.dumps({"question": "Accept?", "answer": "yes"}) + "\n"))


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        (["accept", "ignore", "reject", "reject"], "ignore and reject in 3 of the first 4 rows. Remove such rows if"),
        (["accept", "accept"], None),
        (["reject", "I do not know"], None),
        ([None, None], None),
    ],
)
def test_rows_that_their_annotator_refused_are_counted(tmp_path, answers, found):
    rows = [ROW | {"answer": answer} for answer in answers]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    said = check_splits(load_rows(path), "a.jsonl")
    assert len(said) == (found is not None)
    assert all(f"a.jsonl: the column answer, which is not read, says {found}" in each for each in said)


@pytest.mark.parametrize("invalid_rows", ["error", "mark"])
def test_labels_that_are_lists_cannot_be_mapped(tmp_path, invalid_rows):
    rows = [{"prompt": "Hi", "completion": "Yo", "label": [label]} for label in ("good", "bad")]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    remedy = "A label that is a list cannot be mapped."
    if invalid_rows == "mark":
        assert remedy in load_rows(path, label_map="good=1,bad=0", invalid_rows="mark")["train"][0]["unread_line"]
        return
    with pytest.raises(ValueError, match=remedy):
        load_rows(path, label_map="good=1,bad=0")


def test_a_label_alone_is_not_proposed(tmp_path):
    talk = [{"role": "user", "content": "Hi", "turn": 1}, {"role": "assistant", "content": "Yo", "turn": 1}]
    row = {"conversation_hash": "a1", "model": "gpt", "conversation": talk, "language": "English", "toxic": False}
    with pytest.raises(ValueError, match=r"found .*, toxic\. Rows need prompt, completion and label"):
        read(write(tmp_path / "a.jsonl", json.dumps(row) + "\n"))


@pytest.mark.parametrize(
    "value",
    [
        [{"from": "human", "value": "Hi"}],
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}],
        {"from": "human", "value": "Hi"},
        {"role": "user", "content": "Hi"},
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
@pytest.mark.parametrize("as_text", [json.dumps, str])
def test_turns_that_are_stored_as_text_are_refused(tmp_path, value, name, as_text):
    text = io.StringIO()
    csv.writer(text).writerows([ROW, (as_text(value), "Yo", 1), ("", "No", 0)])
    row = ROW | {"prompt": as_text(value)}
    path = write(tmp_path / name, text.getvalue() if name == "a.csv" else json.dumps(row) + "\n")
    with pytest.raises(
        ValueError, match=r"a\.(csv|jsonl) has messages that are stored as text in the column prompt, s"
    ):
        read(path)


@pytest.mark.parametrize(
    "answer",
    [
        {"city": "Paris"},
        {"role": "clerk", "content": "files"},
        {"role": "user", "name": "Ann"},
        [{"from": "Rome", "to": "Bonn"}],
        [{"from": "human", "count": 2}],
        ["human"],
        {},
        [],
    ],
)
def test_answers_that_are_other_objects_stay_text(tmp_path, answer):
    row = ROW | {"completion": json.dumps(answer)}
    assert read(write(tmp_path / "a.jsonl", json.dumps(row) + "\n")) == [row]


def test_an_answer_among_others_may_be_a_message_as_text(tmp_path):
    rows = [ROW | {"completion": '{"role": "user", "content": "Hi"}'}, ROW]
    assert read(write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))) == rows


@pytest.mark.parametrize("label", ["0,5", "1,000.5", "80%", "1 000"])
def test_numbers_in_other_forms_say_how_to_write_them(label):
    invalid: dict[int, InvalidRow] = {}
    read_labels({"label": [1, label]}, [0, 1], "train", LabelRules(), invalid)
    assert "Write it as in 0.5 or 1234" in str(invalid[1])
    read_labels({"label": [1, "2024-01-02"]}, [0, 1], "train", LabelRules(), invalid := {})
    assert "Write it as" not in str(invalid[1])


@pytest.mark.parametrize(
    ("label", "meant"),
    [("4,5", "4.5"), (" -0,125 ", "-0.125"), ("1,234", None), ("1,000.5", None), ("1,2,3", None), ("80%", None)],
)
def test_a_number_with_one_decimal_comma_is_read_back(label, meant):
    invalid: dict[int, InvalidRow] = {}
    read_labels({"label": [label]}, [0], "train", LabelRules(), invalid)
    assert (f" Did you mean {meant}? Write it as in 0.5" in str(invalid[0])) == (meant is not None)
    assert ("Did you mean" in str(invalid[0])) == (meant is not None)


def test_decimal_commas_are_numbers_where_semicolons_separate_the_fields(tmp_path, caplog):
    table = tmp_path / "excel.csv"
    table.write_text('prompt;completion;stars\nHi;Yo;4,5\nHi;"Ho; ho";-0,5\nHi;Hu;3\n')
    rows = load_rows(str(table), columns="label=stars")["train"]
    assert rows["label"][:] == [4.5, -0.5, 3.0]
    said = "stars: decimal commas are read as decimal points, because semicolons separate the fields (2 values)"
    assert said in caplog.text
    # What is found in a file is one line
    assert [record.getMessage() for record in caplog.records] == [
        f"{table}: the fields are separated by semicolons; {said}."
    ]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_commas_are_decimal_where_the_column_shows_it(tmp_path, mark, streaming):
    def labels(*cells):
        text = "".join(mark.join(("Hi", "Yo", cell)) + "\n" for cell in cells)
        path = write(tmp_path / "a.csv", HEAD.replace(",", mark) + text)
        return [row["label"] for row in load_rows(path, streaming=streaming)["train"]]

    assert labels("0,500", "3,250") == labels("3,250", "0,500")[::-1] == [0.5, 3.25]
    assert labels("1,234", "2,5", "-1,000") == [1.234, 2.5, -1.0]
    assert labels("4,5", "3") == [4.5, 3.0]
    assert labels("0.500", "2.250") == [0.5, 2.25]
    for cells in (("4,500", "3,250"), ("1,000", "5"), ("1,000", "2.5"), ("2,5", "1.000")):
        with pytest.raises(ValueError, match=r"a\.csv, line [23]: label is '.*'\. .* separate the fields, so .* 1000"):
            labels(*cells)
    if mark != ";":
        assert labels("1.000", "3") == [1.0, 3.0]


def test_a_comma_within_a_file_of_commas_is_no_decimal_mark(tmp_path):
    with pytest.raises(ValueError, match=r"labels with a comma \('4,5', '0,500'\)"):
        read(write(tmp_path / "a.csv", HEAD + 'Hi,Yo,"4,5"\nHi,Ho,"0,500"\n'))


def test_labels_with_a_unit_or_in_words_are_numbers(tmp_path, caplog):
    table = write(tmp_path / "stars.csv", HEAD + 'Hi,Yo,4 stars\nHi,Ho,"3,5 Stars"\nHi,Hu, Two\nHi,Ha,1\nHi,He,4/5\n')
    assert [row["label"] for row in read(table)] == [4, 3.5, 2, 1, "4/5"]
    shown = "(2 values: '4 stars' in line 2, '3,5 Stars' in line 3)"
    assert f"label: numbers with a unit, such as '4 stars', are read as numbers {shown}" in caplog.text
    assert "label: numbers in words, such as 'four', are read as numbers ('Two' in line 4)." in caplog.text
    lines = "".join(LINE.replace(": 1}", f': "{label}"}}') for label in ("5⭐", "one"))
    assert [row["label"] for row in read(write(tmp_path / "stars.jsonl", lines))] == [5, 1]
    Dataset.from_list([{**ROW, "label": f"{i} pts"} for i in range(5)]).to_parquet(tmp_path / "a.parquet")
    assert [row["label"] for row in read(tmp_path / "a.parquet")] == [0, 1, 2, 3, 4]
    assert "(5 values: '0 pts' in row 0, '1 pts' in row 1, '2 pts' in row 2)." in caplog.text
    load_files([table, tmp_path / "stars.jsonl"])
    assert f"('Two' in {table}, line 4, 'one' in {tmp_path / 'stars.jsonl'}, line 2)" in caplog.text.replace(
        "2 values: ", ""
    )
    thousand = write(tmp_path / "points.csv", f"{HEAD}Hi,Yo,1.000 points\nHi,Ho,1\n")
    assert [row["label"] for row in read(thousand)] == ["1.000 points", 1]  # a thousand, or one


def test_whole_numbers_beyond_64_bits(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", LINE + LINE.replace(": 1}", ": 12345678901234567890123}"))
    assert [row["label"] for row in read(path)] == [1.0, 12345678901234567890123.0]
    assert "label: whole numbers of more than 64 bits are rounded to floats" in caplog.text


def test_folders_say_what_they_have_instead_of_data(tmp_path):
    write(tmp_path / "rows.xlsx", "x")
    with pytest.raises(FileNotFoundError, match=r"contains no data file\. It contains rows\.xlsx\. Add at least one"):
        load_rows(tmp_path)
    write(tmp_path / "train.CSV", HEAD + "Hi,Yo,1\n")
    assert load_rows(tmp_path)["train"]["label"][:] == [1]


@pytest.mark.parametrize("streaming", [False, True])
def test_lines_that_cannot_be_read_keep_their_mark_in_a_part_with_some_columns(tmp_path, streaming):
    path = write(tmp_path / "a.csv", "prompt,completion,label,note\nHi,Yo,1,a\nHi,Yo,0,a,b\n")
    part = PartConfig(path=str(path), columns=["prompt", "completion", "label"])
    splits, _ = load_mixture([part], streaming=streaming)
    first, second = splits["train"]
    assert "note" not in first
    assert second["unread_line"].startswith("has 5 fields in line 3")
    part.columns = ["prompt", "rating"]
    with pytest.raises(ValueError, match=r"its columns are prompt, completion, label, note$"):
        load_mixture([part], streaming=streaming)
