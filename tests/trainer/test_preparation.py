"""Preparation: caches, rows that are prepared already, streams in shards, invalid rows together, text as chat."""

import json
import logging
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from tiny import CHAT_TEMPLATE, make_tokenizer
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from vlm import StillsProcessor, make_llava
from world import make_rows, make_trainer

from trl_ulma.labels import LabelRules, parse_transform
from trl_ulma.rows import batches, identity
from trl_ulma.rows import chat as chats
from trl_ulma.rows.dataset_labels import with_transform
from trl_ulma.rows.notes import left_out_of
from trl_ulma.rows.preparation import Preparation
from trl_ulma.rows.token_ids import check_token_ids

GOOD = {"prompt": "Hi", "completion": " Hello!", "label": 1.0}
CHAT = {
    "prompt": [{"role": "user", "content": "Hi"}],
    "completion": [{"role": "assistant", "content": "Hello!"}],
    "label": 1.0,
}
BINARY = LabelRules()


def prepared(tokenizer: Any, rows: Any, rules: LabelRules = BINARY, **how: Any) -> Dataset:
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return Preparation(tokenizer, rules, **how)(rows, "train")


def cache_key(how: Preparation) -> str:
    return identity.cache_key(how, identity.serialized(how))


def vocabulary(tokenizer: Any) -> str:
    how = Preparation(tokenizer, BINARY)
    return identity.token_rules(how, True, identity.serialized(how))["vocabulary"]


def bpe(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    tokens = {token: i for i, token in enumerate(["a", "b", "c", "ab", "bc", "</s>"])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(tokens, merges)), eos_token="</s>")


@pytest.mark.parametrize(
    "make", [make_tokenizer, ByT5Tokenizer, lambda: bpe([("a", "b")])], ids=["word level", "not fast", "bpe"]
)
def test_a_vocabulary_is_the_same_after_loading(tmp_path, make):
    tokenizer = make()
    own = vocabulary(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert vocabulary(type(tokenizer).from_pretrained(tmp_path)) == own
    tokenizer(["a b", "a"], padding=True, truncation=True, max_length=1) if tokenizer.pad_token else None
    assert vocabulary(tokenizer) == own
    tokenizer.add_tokens(["<|new|>"])
    assert vocabulary(tokenizer) != own


def test_other_merges_of_the_same_tokens_are_another_vocabulary():
    assert vocabulary(bpe([("a", "b")])) == vocabulary(bpe([("a", "b")])) != vocabulary(bpe([("b", "c")]))


# Caches


@pytest.fixture
def on_disk(tmp_path):
    """Rows in a file, whose preparation is cached."""
    Dataset.from_list([CHAT, CHAT | {"label": 0.0}]).save_to_disk(str(tmp_path / "rows"))
    return lambda: Dataset.load_from_disk(str(tmp_path / "rows"))


PRINTS_ALL = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ sep_token }}" + CHAT_TEMPLATE


def change_bos(tokenizer):
    tokenizer.bos_token = "<|system|>"


def change_unk(tokenizer):
    tokenizer.unk_token = "<|user|>"


def change_sep(tokenizer):
    tokenizer.sep_token = "<|user|>"


def change_eos(tokenizer):
    tokenizer.eos_token = "<|user|>"


def change_pad(tokenizer):
    tokenizer.pad_token = "<|user|>"


def change_template(tokenizer):
    tokenizer.chat_template = "X" + PRINTS_ALL


def add_token(tokenizer):
    tokenizer.add_tokens(["Hello"])


def add_special(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["ello"]})


def split_special(tokenizer):
    tokenizer.split_special_tokens = True


CHANGES = {
    each.__name__: each
    for each in (
        *(change_bos, change_unk, change_sep, change_eos, change_pad),
        *(change_template, add_token, add_special, split_special),
    )
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_tokenizer_is_not_served_the_earlier_runs_tokens(on_disk, change):
    tokenizer = make_tokenizer(PRINTS_ALL)
    before = list(prepared(tokenizer, on_disk()))
    assert list(prepared(make_tokenizer(PRINTS_ALL), on_disk())) == before
    change(tokenizer)
    after = list(prepared(tokenizer, on_disk()))
    fresh = list(prepared(tokenizer, Dataset.from_list([CHAT, CHAT | {"label": 0.0}])))
    assert after == fresh
    assert after != before


@pytest.mark.parametrize(
    "how",
    [
        {"max_length": 8},
        {"max_length": 8, "truncation_mode": "keep_end"},
        {"assistant_only_loss": False},
        {"system_message": "Be kind."},
    ],
)
def test_other_settings_are_not_served_the_earlier_runs_tokens(on_disk, how):
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    prepared(tokenizer, on_disk(), max_length=9)
    found = list(prepared(tokenizer, on_disk(), **how))
    assert found == list(prepared(tokenizer, [CHAT, CHAT | {"label": 0.0}], **how))


def test_nothing_is_prepared_twice(on_disk, monkeypatch):
    tokenizer = make_tokenizer(PRINTS_ALL)
    first = list(prepared(tokenizer, on_disk()))
    tokenizer(["Hello there"], padding=True, truncation=True, max_length=3)  # what a call leaves behind is no change

    def fails(self, *args):
        raise AssertionError("prepared again")

    monkeypatch.setattr(batches.RawBatches, "__call__", fails)
    assert list(prepared(tokenizer, on_disk())) == first


def test_a_template_that_prints_the_date_is_cached_for_a_day(monkeypatch):
    how = Preparation(make_tokenizer("{{ strftime_now('%d %B') }}" + CHAT_TEMPLATE), BINARY)
    today = cache_key(how)
    assert cache_key(how) == today

    class Tomorrow(identity.datetime.date):
        @classmethod
        def today(cls):
            return cls(2099, 1, 1)

    monkeypatch.setattr(identity.datetime, "date", Tomorrow)
    assert cache_key(how) != today
    plain = Preparation(make_tokenizer(CHAT_TEMPLATE), BINARY)
    key = cache_key(plain)
    monkeypatch.undo()
    assert cache_key(plain) == key


PRINTS_DATE = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if messages[0]['role'] != 'system' %}Today is {{ date_string }}.{% endif %}" + CHAT_TEMPLATE
)
SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("row", "is_told"),
    [
        (CHAT, True),
        (CHAT | {"chat_template_kwargs": {"date_string": "1 May 2001"}}, False),
        (CHAT | {"prompt": [SYSTEM, *CHAT["prompt"]]}, False),  # its template only prints the date without one
        (GOOD, False),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_template_that_prints_the_date_is_told(monkeypatch, row, is_told, is_stream):
    told = []
    monkeypatch.setattr(chats.logger, "warning_once", told.append)
    rows = Dataset.from_list([row] * 2)
    prepared(make_tokenizer(PRINTS_DATE), rows.to_iterable_dataset() if is_stream else rows)
    told = [message for message in told if "prints the date of today" in message]
    assert len(told) == is_told
    assert not told or "Replace strftime_now('%d %b %Y') in tokenizer.chat_template by" in told[0]


@pytest.mark.parametrize("attribute", ["patch_size", "num_additional_image_tokens", "image_token"])
def test_a_changed_processor_is_another_one(tmp_path, attribute):
    from transformers import AutoProcessor

    make_llava(str(tmp_path))
    how = Preparation(AutoProcessor.from_pretrained(tmp_path), BINARY)
    key = cache_key(how)
    assert cache_key(how) == key
    setattr(how.processing_class, attribute, "<|user|>" if attribute == "image_token" else 2)
    assert cache_key(how) != key


def test_a_changed_image_processor_is_another_one(tmp_path):
    from transformers import AutoProcessor

    make_llava(str(tmp_path))
    how = Preparation(AutoProcessor.from_pretrained(tmp_path), BINARY)
    key = cache_key(how)
    how.processing_class.image_processor.size = {"shortest_edge": 16}
    assert cache_key(how) != key
    assert StillsProcessor is not type(how.processing_class)


# Rows that are prepared already


@pytest.mark.parametrize("as_stream", [False, True])
def test_prepared_rows_are_read_by_the_rules_of_the_trainer_that_gets_them(as_stream):
    tokenizer = make_tokenizer()
    labels = (2.0, -1.0, 0.5, 0.25, 1.0)
    rated = prepared(tokenizer, [GOOD | {"label": label} for label in labels], LabelRules("continuous"))
    rated = rated.to_iterable_dataset() if as_stream else rated
    with pytest.raises(ValueError) as error:
        list(prepared(tokenizer, rated))
    for row, label in ((0, 2.0), (1, -1.0)):
        assert f"Row {row} of the train dataset: label is {label}, outside [0, 1]." in str(error.value)
    assert [row["label"] for row in prepared(tokenizer, rated, invalid_rows="drop")] == [0.5, 0.25, 1.0]


@pytest.mark.parametrize(
    ("first", "then", "masks"),
    [
        # Ratings that pointwise DPO prepared, for ULMA
        (LabelRules("continuous"), LabelRules("continuous", 0.6, need_mask=True), [True, False, True]),
        (LabelRules("continuous", 0.6, need_mask=True), LabelRules("continuous", 0.9), [True, False, False]),
        (LabelRules(), LabelRules("continuous", 0.6), [True, False, True]),
        (LabelRules("continuous", 0.6), LabelRules(), [True, False, False]),
    ],
)
@pytest.mark.parametrize("as_stream", [False, True])
def test_demonstrations_of_prepared_rows_are_found_as_those_of_raw_ones(first, then, masks, as_stream):
    tokenizer = make_tokenizer()
    raw = [GOOD | {"label": label} for label in (1.0, 0.3, 0.7)]
    made = prepared(tokenizer, raw, first)
    if as_stream:
        made = prepared(tokenizer, Dataset.from_list(raw).to_iterable_dataset(), first)
    assert [row["sft_mask"] for row in prepared(tokenizer, made, then)] == masks
    assert [row["sft_mask"] for row in prepared(tokenizer, raw, then)] == masks


def test_demonstrations_that_the_raw_rows_name_stay():
    tokenizer = make_tokenizer()
    raw = [GOOD | {"label": label, "sft_mask": label < 0.5} for label in (0.9, 0.3)]
    made = prepared(tokenizer, raw, LabelRules("continuous"))
    assert prepared(tokenizer, made, LabelRules("continuous", 0.6))["sft_mask"][:] == [False, True]


@pytest.mark.parametrize("column", ["sft_mask", "label"])
def test_demonstrations_that_are_found_again_in_edited_rows_are_counted(column, caplog):
    tokenizer, rules = make_tokenizer(), LabelRules("continuous", 0.7)
    made = prepared(tokenizer, [GOOD | {"label": label} for label in (0.9, 0.7, 0.3)], rules)
    assert prepared(tokenizer, made, rules) is made
    edited = made.map(lambda row: {column: [not row["sft_mask"], 1 - row["label"]][column == "label"]})
    assert not caplog.text
    again = prepared(tokenizer, edited, rules)
    assert again["sft_mask"][:] == [label >= 0.7 for label in edited["label"]]
    assert "sft_mask of 3 rows (such as row 0) of the train dataset is computed again from the labels" in caplog.text
    caplog.clear()
    prepared(tokenizer, edited, LabelRules("continuous", 0.6))  # other settings find others
    assert "computed again" not in caplog.text


def test_prepared_rows_of_another_transform_are_refused():
    tokenizer, rows = make_tokenizer(), [GOOD | {"label": 4.0}, GOOD | {"label": 2.0}]
    half = LabelRules("continuous", transform=parse_transform("center:3", "continuous"))
    made = prepared(tokenizer, rows, half)
    assert prepared(tokenizer, made, half) is made
    other = LabelRules("continuous", transform=parse_transform("center:2", "continuous"))
    with pytest.raises(ValueError, match=r"was prepared by a trainer with label_transform=center:3.*Pass the raw"):
        prepared(tokenizer, made, other)
    with pytest.raises(ValueError, match=r"label_transform=center:3, but this trainer has label_transform=None"):
        prepared(tokenizer, made, LabelRules("continuous"))
    raw = prepared(tokenizer, rows, LabelRules("continuous"))
    with pytest.raises(ValueError, match=r"label_transform=None, but this trainer has label_transform=center:3"):
        prepared(tokenizer, raw, half)


def test_a_trainer_checks_the_prepared_rows_of_another(tiny_gpt2, tmp_path):
    rows = Dataset.from_list([GOOD | {"label": 2.0}, GOOD | {"label": -1.0}])
    made = make_trainer(tiny_gpt2, rows, tmp_path, label_type="continuous", sft_threshold=1.0).train_dataset
    with pytest.raises(ValueError, match=r"label is 2\.0, outside \[0, 1\]"):
        make_trainer(tiny_gpt2, made, tmp_path)


# Tokens without an embedding


@pytest.mark.parametrize("kind", ["raw", "prepared", "stream", "prepared stream"])
def test_a_token_without_an_embedding_is_named_before_training(kind):
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["Zebra"])
    rows: Any = Dataset.from_list([GOOD] * 3 + [GOOD | {"completion": " a Zebra"}])
    if "stream" in kind:
        rows = rows.to_iterable_dataset()
    if "prepared" in kind:
        rows = prepared(tokenizer, rows)
    with pytest.raises(ValueError) as error:
        list(prepared(tokenizer, rows, vocab_size=size))
    # Prepared rows can be changed by hand, so they are listed with all that is wrong with them
    listed = '\nFix these rows, or set invalid_rows="drop" (on the command line --invalid_rows drop) to leave them out.'
    assert str(error.value).removesuffix(listed if "prepared" in kind else "") == (
        f"Row 3 of the train dataset has the token 'Zebra' with id {size}, but the model only has embeddings for ids "
        f"below {size}. If you added the token on purpose, call model.resize_token_embeddings(len(tokenizer)). "
        "Otherwise use the tokenizer that belongs to the model."
    )
    assert len(list(prepared(tokenizer, rows, vocab_size=size + 1))) == 4


def test_the_row_of_a_token_is_found_among_many():
    ids = [[1, 2, 3]] * 20_000
    rows = Dataset.from_dict({"prompt_ids": [[0]] * 20_000, "completion_ids": ids, "row": range(7, 20_007)})
    check_token_ids(rows, 4, "train", make_tokenizer())
    ids = [*ids[:12_345], [1, 300], *ids[12_346:]]
    wrong = Dataset.from_dict({"prompt_ids": [[0]] * 20_000, "completion_ids": ids, "row": range(7, 20_007)})
    with pytest.raises(ValueError, match=r"^Row 12352 of the train dataset has the token .* with id 300,"):
        check_token_ids(wrong, 4, "train", make_tokenizer())


# Streams in shards


def shard(numbers):
    for number in numbers:
        for row in range(200):
            yield GOOD | {"label": 7.0 if (number, row) == (1, 190) else 1.0}


@pytest.mark.parametrize(("shards", "workers"), [(2, 2), (4, 2), (2, 0), (1, 1)])
def test_an_error_in_a_sharded_stream_names_the_shard_and_the_row_in_it(shards, workers):
    rows = IterableDataset.from_generator(shard, gen_kwargs={"numbers": list(range(shards))})
    stream = prepared(make_tokenizer(), rows)
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    if shards == 1:
        assert sum(1 for _ in loader) == 200
        return
    with pytest.raises(ValueError) as error:
        list(loader)
    named = {(2, 2): "Row 190 of shard 1 of", (4, 2): "Row 190, counted in the shards 1, 3, of", (2, 0): "Row 390 of"}
    assert f"{named[shards, workers]} the train dataset: label is 7.0" in str(error.value)


# Invalid rows, all at once

NAN = float("nan")
BAD: dict[str, list[dict]] = {
    "label is missing": [GOOD | {"label": None}] * 2,
    "label is not finite in float32": [GOOD | {"label": NAN}],
    "label outside [0, 1]": [GOOD | {"label": 1.5}, GOOD | {"label": -1.0}],  # three could be ratings
    "prompt is missing": [GOOD | {"prompt": None}],
    "completion is missing": [GOOD | {"completion": None}],
    "completion is empty": [GOOD | {"completion": " "}, GOOD | {"completion": "\u200b\ufeff\n"}],
    "weight below 0": [GOOD | {"weight": -1.0}],
    "weight is not finite in float32": [GOOD | {"weight": NAN}],
    "sft_mask is no bool": [GOOD | {"sft_mask": None}],
    "sft_mask=True with label 0": [GOOD | {"label": 0.0, "sft_mask": True}],
    "half of a surrogate pair": [GOOD | {"completion": " \ud83d"}],
}


def bad_rows() -> list[dict]:
    full = {"weight": 1.0, "sft_mask": False}
    rows = [full | row for kind in BAD for row in BAD[kind]]
    return [full | GOOD | {"prompt": "Good"}, *rows, full | GOOD | {"label": 0.0, "prompt": "Good"}]


def as_dataset(rows: list[dict], kind: str) -> Any:
    if kind == "stream":
        return IterableDataset.from_generator(lambda: iter(rows))
    if kind == "transformed":  # whose rows never were in Arrow
        return Dataset.from_dict({"number": range(len(rows))}).with_transform(
            lambda batch: {name: [rows[i][name] for i in batch["number"]] for name in rows[0]}
        )
    return Dataset.from_list([row for row in rows if "\ud83d" not in str(row["completion"])])


@pytest.mark.parametrize("kind", ["table", "transformed", "stream"])
def test_all_invalid_rows_are_listed_at_once_or_left_out(kind, caplog):
    rows = bad_rows()
    with pytest.raises(ValueError) as error:
        prepared(make_tokenizer(), as_dataset(rows, kind))
    lines = str(error.value).splitlines()
    invalid = len(rows) - 2 - (kind == "table")
    total = "" if kind == "stream" else f" of {invalid + 2}"
    assert lines[0] == f"{invalid}{total} rows of the train dataset are invalid:"
    for number, line in enumerate(lines[1 : invalid + 1], start=1):
        assert line.startswith(f"  Row {number} of the train dataset")
        assert line.endswith("Prompt: 'Hi'") or "prompt is None" in line
    for name, found in BAD.items():
        if (name, kind) != ("half of a surrogate pair", "table"):
            assert f"{len(found)} × {name}" in lines[invalid + 1]
    assert 'invalid_rows="drop"' in lines[-1]

    caplog.clear()
    kept = prepared(make_tokenizer(), as_dataset(rows, kind), invalid_rows="drop")
    assert [row["label"] for row in kept] == [1.0, 0.0]
    assert [row["row"] for row in kept] == [0, invalid + 1]
    if kind == "stream":
        assert sum("because it is invalid" in message for message in caplog.messages) >= invalid
    else:
        assert caplog.messages[0].startswith(
            f"Left out {invalid} of {invalid + 2} rows of the train dataset. Reason: it is invalid ({invalid} rows)."
        )
        assert left_out_of(kept)["invalid: label is missing"] == 2
        assert sum(left_out_of(kept).values()) == invalid


def test_twenty_rows_are_listed_and_the_others_counted():
    rows = [GOOD] + [GOOD | {"label": 9.0, "prompt": "Why is\n the sky blue? " * 9}] * 57
    with pytest.raises(ValueError) as error:
        prepared(make_tokenizer(), rows)
    lines = str(error.value).splitlines()
    assert len(lines) == 24
    assert "Prompt: 'Why is the sky blue? Why is the sky blue? Why is the sky blu…'" in lines[1]
    assert lines[21:23] == ["  … and 37 more.", "By kind: 57 × label outside [0, 1]."]


def test_one_invalid_row_is_said_in_a_line():
    with pytest.raises(ValueError) as error:
        prepared(make_tokenizer(), [GOOD, GOOD | {"label": 1.4}])
    assert str(error.value).splitlines()[:2] == [
        'Row 1 of the train dataset: label is 1.4, outside [0, 1]. Rescale it, or set label_type="continuous".',
        "Its prompt begins: 'Hi'",
    ]


def test_rows_that_are_not_utf_8_are_listed_with_the_others(caplog):
    import pyarrow as pa

    texts = [b" a", b" caf\xe9", b" b", b" \xff", b" c"]
    table = {"prompt": ["Hi"] * 5, "completion": pa.array(texts).view(pa.string()), "label": [1.0, 0.0, 9.0, 0.0, 0.0]}
    with pytest.raises(ValueError) as error:
        prepared(make_tokenizer(), Dataset(pa.table(table)))
    found = str(error.value)
    assert found.startswith("3 of 5 rows of the train dataset are invalid:")
    assert [f"Row {row} of" in found for row in range(5)] == [False, True, True, True, False]
    kept = prepared(make_tokenizer(), Dataset(pa.table(table)), invalid_rows="drop")
    assert kept["row"][:] == [0, 4]
    assert left_out_of(kept) == {"invalid: text that is not UTF-8": 2, "invalid: label outside [0, 1]": 1}


def test_a_first_row_without_a_prompt_does_not_decide_on_the_kind():
    rows = [CHAT | {"prompt": None}, CHAT, CHAT | {"label": 0.0}]
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    for made in (Dataset.from_list(rows), IterableDataset.from_generator(lambda: iter(rows))):
        assert [row["row"] for row in prepared(tokenizer, made, invalid_rows="drop")] == [1, 2]


def test_a_template_that_fails_on_some_rows_names_them_all():
    template = (
        "{% for m in messages %}{{ raise_exception('no ' + m.role) if m.role == 'critic' }}{% endfor %}" + CHAT_TEMPLATE
    )
    critic = CHAT | {"prompt": [{"role": "critic", "content": "Hm"}]}
    with pytest.raises(ValueError, match=r"(?s)^2 of 3 rows .*Row 0 of.*the chat template fails.*Row 2 of"):
        prepared(make_tokenizer(template), [critic, CHAT, critic])


def test_halves_of_pairs_are_invalid_on_their_own():
    pair = {"prompt": "Hi", "chosen": " Hello!", "rejected": " Go away."}
    rows = [pair, pair | {"chosen": None}, pair | {"prompt": None}]
    with pytest.raises(ValueError, match=r"(?s)^3 of 6 rows .*Row 1 \(chosen\).*Row 2 \(chosen\).*Row 2 \(rejected\)"):
        prepared(make_tokenizer(), rows)
    kept = prepared(make_tokenizer(), rows, invalid_rows="drop")
    assert list(zip(kept["row"][:], kept["label"][:], strict=True)) == [(0, 1.0), (0, 0.0), (1, 0.0)]


def test_a_transform_is_fitted_to_the_valid_labels_and_the_others_are_listed():
    raw = Dataset.from_list([GOOD | {"label": label} for label in (1.0, None, 3.0, NAN, 5.0)])
    rules = with_transform(LabelRules("continuous"), "standardize", raw)
    with pytest.raises(ValueError, match=r"(?s)^2 of 5 rows .*Row 1 of.*Row 3 of"):
        prepared(make_tokenizer(), raw, rules)
    kept = prepared(make_tokenizer(), raw, rules, invalid_rows="drop")
    assert torch.tensor(kept["label"][:]).mean().item() == pytest.approx(0)
    assert kept["row"][:] == [0, 2, 4]


def test_the_label_report_counts_what_was_left_out(tiny_gpt2, tmp_path, capsys):
    rows = Dataset.from_list([GOOD, GOOD | {"label": 0.0}, GOOD | {"label": None}, GOOD | {"completion": ""}])
    make_trainer(tiny_gpt2, rows, tmp_path, invalid_rows="drop", label_report=True)
    report = json.loads((tmp_path / "label_report.json").read_text())
    assert report["left_out"] == {"invalid: completion is empty": 1, "invalid: label is missing": 1}
    assert "left out" in capsys.readouterr().out


def test_a_report_without_left_out_rows_says_nothing_of_them(tiny_gpt2, tmp_path, capsys):
    make_trainer(tiny_gpt2, Dataset.from_list([GOOD, GOOD | {"label": 0.0}]), tmp_path, label_report=True)
    assert "left_out" not in json.loads((tmp_path / "label_report.json").read_text())
    assert "left out" not in capsys.readouterr().out


def test_an_unknown_way_with_invalid_rows_is_refused():
    with pytest.raises(ValueError, match=r"^invalid_rows must be one of \('error', 'drop'\); got 'skip'\."):
        Preparation(make_tokenizer(), BINARY, invalid_rows="skip")


# Text as chat


@pytest.fixture
def csv_file(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,label\nHi,Hello!,1\nHow are you today?, Fine ,0\n")
    return path


@pytest.fixture
def csv(csv_file):
    return load_dataset("csv", data_files=str(csv_file), split="train")


def texts(tokenizer: Any, rows: Any) -> list[tuple[str, str]]:
    return [(tokenizer.decode(row["prompt_ids"]), tokenizer.decode(row["completion_ids"])) for row in rows]


def test_a_csv_becomes_a_chat_by_itself_if_there_is_a_template(csv_file, csv, caplog):
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    stream = load_dataset("csv", data_files=str(csv_file), split="train", streaming=True)
    for rows in (csv, stream, csv.select([0, 1])):
        caplog.clear()
        logging.Logger.warning_once.cache_clear()
        assert texts(tokenizer, prepared(tokenizer, rows)) == [
            ("<|user|>Hi<|end|><|assistant|>", "Hello!<|end|>"),
            ("<|user|>How are you today?<|end|><|assistant|>", "Fine<|end|>"),
        ]
        assert any("files become conversations" in message for message in caplog.messages)
    as_text = texts(make_tokenizer(), prepared(make_tokenizer(), csv))
    assert as_text[1] == ("How are you today?", " Fine <|end|>")
    assert texts(tokenizer, prepared(tokenizer, csv, chat="false")) == as_text


def test_other_text_stays_with_a_warning(caplog):
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    rows = Dataset.from_list([GOOD, GOOD | {"label": 0.0}])
    assert texts(tokenizer, prepared(tokenizer, rows))[0] == ("Hi", " Hello!<|end|>")
    assert texts(tokenizer, prepared(tokenizer, rows, chat="true"))[0] == (
        "<|user|>Hi<|end|><|assistant|>",
        "Hello!<|end|>",
    )
    caplog.clear()
    prepared(tokenizer, rows, chat="false")
    assert not any("chat template" in message for message in caplog.messages)


def test_a_system_message_goes_before_conversations_that_have_none(csv):
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    [first, _] = texts(tokenizer, prepared(tokenizer, csv, system_message="No."))
    assert first[0] == "<|system|>No.<|end|><|user|>Hi<|end|><|assistant|>"
    own = CHAT | {"prompt": [{"role": "system", "content": "Go."}, *CHAT["prompt"]]}
    found = texts(tokenizer, prepared(tokenizer, [CHAT, own], system_message="No."))
    assert [prompt.split("<|end|>")[0] for prompt, _ in found] == ["<|system|>No.", "<|system|>Go."]


@pytest.mark.parametrize(
    ("how", "template", "message"),
    [
        ({"chat": "true"}, None, r"but the tokenizer has no chat template"),
        ({"system_message": "No."}, CHAT_TEMPLATE, r"^system_message needs conversations"),
        ({"chat": "false", "system_message": "No."}, CHAT_TEMPLATE, r"^system_message needs conversations"),
        ({"chat": "maybe"}, None, r"^chat must be one of"),
        ({"system_message": " "}, None, r"^system_message must be non-empty text"),
    ],
)
def test_a_chat_that_cannot_be(how, template, message):
    with pytest.raises(ValueError, match=message):
        prepared(make_tokenizer(template), [GOOD], **how)


def test_pairs_without_prompts_and_transcripts_do_not_become_chats(tmp_path):
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    with pytest.raises(ValueError, match=r"^chat=True converts each prompt to a user message, but .* has no prompts"):
        prepared(tokenizer, [{"chosen": "a b", "rejected": "a c"}], chat="true")
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion,label\n"\n\nHuman: Hi\n\nAssistant:"," Hello!",1\n')
    rows = load_dataset("csv", data_files=str(path), split="train")
    assert texts(tokenizer, prepared(tokenizer, rows))[0] == ("\n\nHuman: Hi\n\nAssistant:", " Hello!<|end|>")


def test_the_config_takes_chat_as_yaml_writes_it(tiny_llama, tmp_path):
    rows = Dataset.from_list([GOOD, GOOD | {"label": 0.0}])
    for chat in (True, "True", "true"):
        trainer = make_trainer(tiny_llama, rows, tmp_path, chat=chat)
        assert trainer.processing_class.decode(trainer.train_dataset[0]["prompt_ids"]).startswith("<|user|>")
    with pytest.raises(ValueError, match=r"^chat must be one of"):
        make_trainer(tiny_llama, make_rows(2), tmp_path, chat="sometimes")


def test_prompts_of_evaluation_are_kept_as_the_messages_that_they_became(csv):
    rows = prepared(make_tokenizer(CHAT_TEMPLATE), csv, keeps_prompts=True, system_message="No.")
    assert rows[0]["prompt"] == [{"role": "system", "content": "No."}, {"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "is_chat"), [("rows.csv", True), ("rows.tsv", True), ("rows.jsonl", False)])
def test_files_that_cannot_hold_messages_become_chats(tmp_path, name, is_chat, streaming):
    from trl_ulma.data.files import load_rows

    path = tmp_path / name
    if is_chat:
        make_rows(4).to_csv(path, sep="\t" if name.endswith("tsv") else ",", index=False)
    else:
        make_rows(4).to_json(path)
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    rows = load_rows(str(path), streaming=streaming)["train"]
    prepared = list(Preparation(tokenizer, LabelRules())(rows, "train"))
    assert tokenizer.decode(prepared[0]["prompt_ids"]).startswith("<|user|>") == is_chat


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_which_some_are_tables_need_a_decision(tmp_path, streaming):
    from trl_ulma.data.files import load_rows

    (tmp_path / "rows").mkdir()
    make_rows(4).to_csv(tmp_path / "rows" / "train-0.csv", index=False)
    make_rows(4).to_json(tmp_path / "rows" / "train-1.jsonl")
    rows = load_rows(tmp_path / "rows", streaming=streaming)["train"]
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    with pytest.raises(ValueError, match=r"^A part of the train dataset comes from CSV or TSV, .* \(--chat false\)"):
        prepared(tokenizer, rows)
    for chat in ("true", "false"):
        found = texts(tokenizer, prepared(tokenizer, rows, chat=chat))
        assert {prompt.startswith("<|user|>") for prompt, _ in found} == {chat == "true"}
    assert not texts(make_tokenizer(), prepared(make_tokenizer(), rows))[0][0].startswith("<|user|>")


@pytest.mark.parametrize("first", ["", "  "])
def test_an_empty_first_prompt_does_not_decide_on_chat(tmp_path, first):
    from trl_ulma.data.files import load_rows

    (tmp_path / "rows.csv").write_text(f'prompt,completion,label\n"{first}",Hello!,1\nHi,Hello!,0\n')
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    found = texts(tokenizer, prepared(tokenizer, load_rows(tmp_path / "rows.csv")["train"]))
    assert found == [
        ("<|user|><|end|><|assistant|>", "Hello!<|end|>"),
        ("<|user|>Hi<|end|><|assistant|>", "Hello!<|end|>"),
    ]


def asked(question: str, answer: str = "Yes.", **keys: Any) -> dict[str, Any]:
    prompt = [{"role": "user", "content": question}]
    return {
        "prompt": prompt,
        "completion": [{"role": "assistant", "content": answer}],
        "label": len(answer) % 2,
        **keys,
    }


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("is_chat", [False, True])
def test_completions_that_begin_with_their_prompt_are_counted(is_chat, streaming, caplog):
    def found(pairs):
        rows = [asked(*pair) if is_chat else dict(zip(("prompt", "completion"), pair, strict=True)) for pair in pairs]
        rows = [{**row, "label": i % 2} for i, row in enumerate(rows)]
        caplog.clear()
        logging.Logger.warning_once.cache_clear()
        made = IterableDataset.from_generator(lambda: iter(rows)) if streaming else Dataset.from_list(rows)
        list(prepared(make_tokenizer(CHAT_TEMPLATE), made))
        return "a completion that begins with its prompt" in caplog.text

    question = "What is the capital of France?"
    repeated = (f"{question} ", f"{question}\nParis.")
    assert found([("Hi", "Hi there"), (question, "Paris."), repeated])
    assert not found([("Hi", "Hi there"), (question, "Paris.")])
    assert not found([*((question, f"It is {i}.") for i in range(20)), repeated])  # a few answers may do so


@pytest.mark.parametrize("is_chat", [False, True])
def test_completions_that_json_or_python_printed_are_counted(is_chat, caplog):
    def found(*answers):
        rows = [asked("Hi", each) if is_chat else {"prompt": "Hi", "completion": each} for each in answers]
        rows = [{**row, "label": i % 2} for i, row in enumerate(rows)]
        caplog.clear()
        prepared(make_tokenizer(CHAT_TEMPLATE), Dataset.from_list(rows))
        return "a completion in quotes, or with" in caplog.text

    texts = ["Yes.", "It's\nfine."]
    for printed in (map(json.dumps, texts), map(repr, texts), (str(each.encode()) for each in texts), [r"a\nb"] * 2):
        assert found(*printed)
    assert not found(*texts, '"Yes," he said, "now."', 'print("a\\n")\n')
    assert not found('"Yes."', *texts, "No.")  # some answers may be in quotes


def test_special_tokens_in_messages_are_counted(caplog):
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    tokenizer.add_tokens(["<think>"])
    end = tokenizer.eos_token
    rows = [asked("<think> <|im_end|>"), asked("Hi", f"Yes.{end}"), asked(f"a {end} b")]
    prepared(tokenizer, rows)
    said = "2 of 3 rows of the train dataset have a special token, such as EOS or an end-of-turn token, in the text of"
    assert f"{said} a message: rows 1, 2. " in caplog.text
    caplog.clear()
    tokenizer.split_special_tokens = True
    prepared(tokenizer, rows)
    assert "a special token" not in caplog.text


def test_tools_that_the_template_leaves_out_are_counted(caplog):
    rows = [asked("Hi", tools=json.dumps([{"name": "f"}])), asked("Ho", "No", tools=None)]
    prepared(make_tokenizer(CHAT_TEMPLATE), rows)
    assert "1 of 2 rows of the train dataset has tools that the chat template leaves out: row 0. The" in caplog.text
    caplog.clear()
    prepared(make_tokenizer("{{ tools }}" + CHAT_TEMPLATE), rows)
    assert "leaves out" not in caplog.text


@pytest.mark.parametrize("column", [{"tools": json.dumps([{"name": "f"}])}, {"chat_template_kwargs": {"loud": True}}])
def test_tools_of_plain_text_are_counted(column, caplog):
    [name] = column
    rows = [GOOD | column, GOOD | {"label": 0.0, name: None}]
    prepared(make_tokenizer(), rows)
    assert (
        "1 of 2 rows of the train dataset has tools or chat_template_kwargs that are ignored, because the rows are "
        "plain text: row 0. The model does not see them. Set chat=True"
    ) in caplog.text
    caplog.clear()
    prepared(make_tokenizer("{{ tools }}" + CHAT_TEMPLATE), rows, chat="true")
    assert "plain text" not in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_prompts_are_counted(streaming, caplog):
    logging.Logger.warning_once.cache_clear()
    rows = [GOOD, GOOD | {"prompt": " "}, GOOD | {"prompt": "", "label": 0.0}]
    made = IterableDataset.from_generator(lambda: iter(rows * 700)) if streaming else Dataset.from_list(rows)
    list(prepared(make_tokenizer(), made))
    said = "2 of 3 rows of the train dataset have an empty prompt: rows 1, 2. Check the column prompt."
    if streaming:
        said = "The train dataset, a stream, has rows with an empty prompt. Check the column prompt."
    assert sum(message.startswith(said) for message in caplog.messages) == 1
    caplog.clear()
    prepared(make_tokenizer(), [{"chosen": "Yes", "rejected": "No"}])
    assert not any("empty prompt" in message for message in caplog.messages)


def test_padding_has_positions_too():
    tokenizer = make_tokenizer()
    rows = [GOOD, GOOD | {"completion": " yes" * 15}]
    lengths = prepared(tokenizer, rows)["length"][:]
    positions = max(lengths)
    assert positions % 16
    message = (
        rf"has {positions} tokens \(\d+ with pad_to_multiple_of=16\), but the model only has {positions} positions"
    )
    with pytest.raises(ValueError, match=rf"{message}\. Set max_length={positions // 16 * 16}, or remove"):
        prepared(tokenizer, rows, positions=positions, pad_to_multiple_of=16)
    with pytest.raises(ValueError, match="Lower pad_to_multiple_of=128"):
        prepared(tokenizer, rows, positions=positions, pad_to_multiple_of=128)
    for how in ({"positions": positions}, {"positions": 128, "pad_to_multiple_of": 16}):
        assert prepared(tokenizer, rows, **how)["length"][:] == lengths
