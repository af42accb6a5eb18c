"""Bad rows: each ends in an error that says where, what was found and what is needed, or is left out and counted."""

import contextlib
import datetime
import decimal
import logging
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, IterableDataset, disable_progress_bars, enable_progress_bars
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from world import make_rows, make_trainer

from trl_ulma.data.pairs import pairs_to_rows, split_answer, split_transcript
from trl_ulma.labels import LabelRules, read_labels
from trl_ulma.rows.preparation import Preparation

GOOD = {"prompt": "Hi", "completion": " Hello!", "label": 1}
BINARY = LabelRules()
ULMA_RATINGS = LabelRules("continuous", need_mask=True)
RATINGS = LabelRules("continuous")


def user(text: Any) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: Any) -> list[dict]:
    return [{"role": "assistant", "content": text}]


CHAT = {"prompt": user("Hi"), "completion": assistant("Hello!"), "label": 1}
PAIR = {"prompt": "Hi", "chosen": " Hello!", "rejected": " Go away."}
CONVERSATIONS = {"chosen": [*user("Hi"), *assistant("Hello!")], "rejected": [*user("Hi"), *assistant("No.")]}
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Hello!"

AT = "Row 1 of the train dataset"
TEXT_OR_MESSAGES = 'it must be text, or a list of messages such as {"role": "user", "content": "Hi"}.'
NEEDED = "Needed are prompt, completion and label (one answer per row), or chosen and rejected (pairs)."
ANSWER_FIRST = (
    "it must begin with the assistant's. Move the turns before it into the prompt. (If chosen and rejected are "
    "whole conversations, remove the column prompt.)"
)
BOTH_ALIKE = (
    "Both must be text, or both messages. (If chosen and rejected are whole conversations, remove the column prompt.)"
)
SURROGATE = (
    "its text contains half of a surrogate pair, which is not a character. Remove the row, or repair the text with "
    'text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").'
)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    """One that has a chat template, an EOS token and a pad token."""
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def without_weights(tiny_gpt2, tmp_path_factory) -> str:
    """A model's folder that has a configuration and a tokenizer, so that loading the model fails."""
    folder = tmp_path_factory.mktemp("checkpoints") / "without-weights"
    shutil.copytree(tiny_gpt2, folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return str(folder)


def stream(*rows: Any) -> IterableDataset:
    """A stream of `rows`; an exception among them is raised in its place."""

    def generate() -> Iterator:
        for row in rows:
            if isinstance(row, Exception):
                raise row
            yield row

    return IterableDataset.from_generator(generate)


def prepare(tokenizer: Any, rows: Any, rules: LabelRules = BINARY, **how: Any) -> list[dict]:
    """The prepared rows of a dataset, or of a list of rows; without a `completion_mask` that is None, as in streams of
    conversations."""
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    found = list(Preparation(tokenizer, rules, **how)(rows, "train"))
    return [{k: v for k, v in row.items() if k != "completion_mask" or v is not None} for row in found]


def two(**changes: Any) -> list[dict]:
    """Two rows, of which the second is changed; each change is the first row's value and the second's."""
    first, second = dict(GOOD), GOOD | {"label": 0}
    for name, values in changes.items():
        first[name], second[name] = values
    return [first, second]


def said(error: Any) -> list[str]:
    """What an error says of each row, or of the dataset, without the starts of prompts."""
    return [line.strip().split(" Prompt: ")[0] for line in str(error.value).splitlines()]


def without(row: dict, *names: str) -> dict:
    return {name: value for name, value in row.items() if name not in names}


LABELS = {
    "a string": (
        two(label=("1", "0")),
        "Row 0 of the train dataset: label is the text '1'; it must be a number, true or false.",
    ),
    "None": (two(label=(1, None)), f"{AT}: label is None; it must be a number, true or false."),
    "only None": (
        two(label=(None, None)),
        "Row 0 of the train dataset: label is None; it must be a number, true or false.",
    ),
    "NaN": (
        two(label=(1.0, float("nan"))),
        f"{AT}: label is nan; it must be finite, and within ±3.4e38, the range of float32.",
    ),
    "infinite": (
        two(label=(1.0, float("-inf"))),
        f"{AT}: label is -inf; it must be finite, and within ±3.4e38, the range of float32.",
    ),
    "above 1": (
        two(label=(1.0, 1.4)),
        f'{AT}: label is 1.4, outside [0, 1]. Rescale it, or set label_type="continuous".',
    ),
    "below 0": (
        two(label=(1, -1)),
        f'{AT}: label is -1.0, outside [0, 1]. Rescale it, or set label_type="continuous".',
    ),
    "a list": (
        two(label=([1], [0])),
        "Row 0 of the train dataset: label is a list of 1; it must be one number per row.",
    ),
    "nested lists": (
        two(label=([[1, 0]], [[0, 1]])),
        "Row 0 of the train dataset: label is a list of 1; it must be one number per row.",
    ),
    "a dict": (
        two(label=({"stars": 1}, {"stars": 2})),
        "Row 0 of the train dataset: label is {'stars': 1}, a dict; it must be a number, true or false.",
    ),
    "bytes": (
        two(label=(b"1", b"0")),
        "Row 0 of the train dataset: label is b'1', a bytes; it must be a number, true or false.",
    ),
    "a decimal": (
        two(label=(decimal.Decimal("0.5"), decimal.Decimal("0.5"))),
        "Row 0 of the train dataset: label is Decimal('0.5'), a Decimal; it must be a number, true or false.",
    ),
    "a date": (
        two(label=(datetime.date(2024, 1, 2), datetime.date(2024, 1, 2))),
        "Row 0 of the train dataset: label is datetime.date(2024, 1, 2), a date; it must be a number, true or false.",
    ),
    "a long string": (
        two(label=("very " * 100, "")),
        f"Row 0 of the train dataset: label is the text '{('very ' * 100)[:59]}…; it must be a number, true or false.",
    ),
    "mask of ints": (
        two(sft_mask=(1, 0)),
        "Row 0 of the train dataset: sft_mask is 1; it must be True or False.",
    ),
    "mask of text": (
        two(sft_mask=("yes", "no")),
        "Row 0 of the train dataset: sft_mask is 'yes'; it must be True or False.",
    ),
    "mask None": (two(sft_mask=(True, None)), f"{AT}: sft_mask is None; it must be True or False."),
    "mask on label 0": (
        two(sft_mask=(True, True)),
        f"{AT} is marked sft_mask=True but has label 0.0. A demonstration is imitated, so its label must be "
        "above 0: set sft_mask=False, or drop the row.",
    ),
    "negative weight": (two(weight=(1.0, -0.5)), f"{AT}: weight is -0.5; it must be 0 or above."),
    "tiny weight": (
        two(weight=(1.0, 1e-300)),
        f"{AT}: weight is 1e-300, which float32 rounds to 0. Write 0 if the row is not to count, or scale all weights "
        "up.",
    ),
    "NaN weight": (
        two(weight=(1.0, float("nan"))),
        f"{AT}: weight is nan; it must be finite, and within ±3.4e38, the range of float32.",
    ),
    "weight of text": (
        two(weight=("1", "2")),
        "Row 0 of the train dataset: weight is the text '1'; it must be a number.",
    ),
    "weight None": (two(weight=(1, None)), f"{AT}: weight is None; it must be a number."),
    "all weights 0": (
        two(weight=(0, 0)),
        "Every row of the train dataset has weight 0, so the loss of every row would be 0. Remove the column weight, "
        "or set some weights above 0.",
    ),
    "infinite log Z": (
        two(log_z=(0.0, float("inf"))),
        f"{AT}: log_z is inf; it must be finite, and within ±3.4e38, the range of float32.",
    ),
    "log Z beyond float32": (
        two(log_z=(0.0, 1e39)),
        f"{AT}: log_z is 1e+39; it must be finite, and within ±3.4e38, the range of float32.",
    ),
    "list of log Z": (
        two(log_z=([0.0, 1.0], [0.0])),
        "Row 0 of the train dataset: log_z is a list of 2; it must be one number per row.",
    ),
    "unknown label_type": (
        two(label_type=("binary", "stars")),
        f"{AT}: label_type is 'stars'; it must be one of ('binary', 'continuous').",
    ),
    "label_type None": (
        two(label_type=("binary", None)),
        f"{AT}: label_type is None; it must be one of ('binary', 'continuous').",
    ),
    "label_type of a row decides": (
        two(label=(3.0, 3.0), label_type=("continuous", "binary")),
        f'{AT}: label is 3.0, outside [0, 1]. Rescale it, or set label_type="continuous".',
    ),
}


OUT_OF = " Write {} if all labels are out of 5, or write all labels as shares, such as 0.8."


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("4 stars", " Did you mean 4?"),
        ("4,5 Sterne", " Did you mean 4.5?"),
        ("3.5⭐", " Did you mean 3.5?"),
        (" Five", " Did you mean 5?"),
        ("4/5", OUT_OF.format(4)),
        ("4.5 out of 5 stars", OUT_OF.format(4.5)),
        ("4,5 von 5", OUT_OF.format(4.5)),
        ("1.000 points", ""),  # a thousand, or one
        ("4k", ""),
        ("N/A", ""),
        ("good", ""),
    ],
)
def test_errors_suggest_a_number_if_it_is_certain(text, hint):
    for label_type, wanted in (("continuous", "a number"), ("binary", "a number, true or false")):
        with pytest.raises(ValueError) as error:
            read_labels({"label": [text]}, [0], "train", LabelRules(label_type))
        found = f"Row 0 of the train dataset: label is the text {text!r}; it must be {wanted}."
        assert str(error.value).splitlines()[0] == found + hint


@pytest.mark.parametrize(("rows", "message"), LABELS.values(), ids=LABELS)
def test_labels_and_numbers(tokenizer, rows, message):
    with pytest.raises(ValueError) as error:
        prepare(tokenizer, rows)
    assert message in said(error)


@pytest.mark.parametrize("as_stream", [False, True])
@pytest.mark.parametrize(
    ("rows", "rules", "message"),
    [
        (
            two(label=(4.5, 2.0)),
            ULMA_RATINGS,
            "Row 0 of the train dataset has a continuous label, and nothing says which of these rows are "
            "demonstrations. Add a boolean column sft_mask, or set sft_threshold: rows with labels at or above it are "
            "demonstrations.",
        ),
        (
            two(label_type=("binary", "continuous")),
            LabelRules(binary_only=True),
            f"{AT} has a continuous label, but negative_loss='unlearning' needs binary labels: a continuous label does "
            "not say whether to unlearn an answer. Use negative_loss='pointwise_dpo'.",
        ),
        (
            two(label=(1.0, 1e39)),
            RATINGS,
            f"{AT}: label is 1e+39; it must be finite, and within ±3.4e38, the range of float32.",
        ),
    ],
    ids=["ULMA on ratings without a mask", "unlearning of ratings", "a rating beyond float32"],
)
def test_labels_that_the_method_cannot_take(tokenizer, rows, rules, message, as_stream):
    with pytest.raises(ValueError) as error:
        prepare(tokenizer, stream(*rows) if as_stream else rows, rules)
    assert message in said(error)


COLUMNS = {
    "no label": (
        [without(GOOD, "label")],
        f"The train dataset lacks the column label; found completion, prompt. {NEEDED}",
    ),
    "no prompt": (
        [without(GOOD, "prompt")],
        f"The train dataset lacks the column prompt; found completion, label. {NEEDED}",
    ),
    "a text alone": (
        [{"text": "Hi"}],
        f"The train dataset lacks the columns prompt, completion, label; found text. {NEEDED}",
    ),
    "half a pair": (
        [without(PAIR, "rejected")],
        f"The train dataset lacks the column rejected; found chosen, prompt. {NEEDED}",
    ),
    "chosen and completion": (
        [GOOD | {"chosen": "a"}],
        "The train dataset has `completion` together with `chosen` or `rejected`, so it is not clear which are its "
        "answers (found chosen, completion, label, prompt). Remove the one or the others.",
    ),
    "images": (
        [GOOD | {"images": ["a.png"]}],
        "The train dataset has images (found completion, images, label, prompt). Only a trainer with a "
        "vision-language model and its processor reads them. Pass the processor as processing_class, or remove "
        "the column.",
    ),
    "images of pairs": (
        [PAIR | {"image": "a.png"}],
        "The train dataset has images (found chosen, image, prompt, rejected). Only a trainer with a "
        "vision-language model and its processor reads them. Pass the processor as processing_class, or remove "
        "the column.",
    ),
    "half prepared": (
        [{"prompt_ids": [5], "completion_ids": [6], "row": 0}],
        "The rows of the train dataset are prepared (they have prompt_ids and completion_ids), but lack the columns "
        "label, length, sft_mask. Pass the raw rows, or the prepared rows with their columns as they were.",
    ),
    "no row": (
        Dataset.from_dict({"prompt": [], "completion": [], "label": []}),
        "The train dataset is empty. Pass at least one row.",
    ),
    "no column": (Dataset.from_dict({}), "The train dataset is empty. Pass at least one row."),
    "an empty stream": (stream(), "The train dataset is empty. Pass at least one row."),
    "a stream of strings": (
        stream("Hi"),
        "Row 0 of the train dataset is 'Hi'; it must be a dict of columns, such as prompt, completion and label.",
    ),
    "a stream of lists": (
        stream(["Hi", " Hello!", 1]),
        "Row 0 of the train dataset is ['Hi', ' Hello!', 1]; it must be a dict of columns, such as prompt, completion "
        "and label.",
    ),
    "a stream of numbered columns": (
        stream({0: "Hi", 1: " Hello!", None: 1}),
        f"The train dataset lacks the columns prompt, completion, label; found 0, 1, None. {NEEDED}",
    ),
    "a stream that loses a column": (
        stream(*[GOOD] * 64, *[without(GOOD, "label")] * 3),
        "Rows 64 to 66 of the train dataset have the columns completion, prompt, but its first row has completion, "
        "label, prompt. All rows must have the same columns.",
    ),
    "a stream that gains a column": (
        stream(*[GOOD] * 64, *[GOOD | {"weight": 2.0}] * 3),
        "Rows 64 to 66 of the train dataset have the columns completion, label, prompt, weight, but its first row has "
        "completion, label, prompt. All rows must have the same columns.",
    ),
    "a stream of rows, then pairs": (
        stream(*[GOOD] * 64, PAIR),
        "Rows 64 to 64 of the train dataset have the columns chosen, prompt, rejected, but its first row has "
        "completion, label, prompt. All rows must have the same columns.",
    ),
    "a row of a stream that lacks a column": (
        stream(*[GOOD] * 5, without(GOOD, "label"), GOOD),
        "Row 5 of the train dataset: label is None; it must be a number, true or false.",
    ),
}


@pytest.mark.parametrize(("rows", "message"), COLUMNS.values(), ids=COLUMNS)
def test_columns(tokenizer, rows, message):
    with pytest.raises(ValueError) as error:
        prepare(tokenizer, rows)
    assert message in said(error)


TEXTS = {
    "a part that is text alone": (
        stream(CHAT, CHAT | {"completion": assistant(["Hello!"])}),
        f'{AT}: completion has a message with the part \'Hello!\'; it must be such as {{"type": "text", "text": '
        '"Hi"}.',
    ),
    "a refusal": (
        stream(CHAT, CHAT | {"completion": assistant([{"type": "refusal", "refusal": "No."}])}),
        f"{AT}: completion has a message with the part {{'type': 'refusal', 'refusal': 'No.'}}; it must be such as "
        '{"type": "text", "text": "Hi"}.',
    ),
    "content that is a dict": (
        stream(CHAT, CHAT | {"prompt": user({"text": "Hi"})}),
        f"{AT}: prompt has a message of role 'user' whose content is a dict; it must be text, or a list of parts such "
        'as {"type": "text", "text": "Hi"}.',
    ),
    "an answer of another role": (
        [CHAT, CHAT | {"completion": [{"role": "gpt", "content": "Hello!"}]}],
        f"{AT}: completion has no turn of the role 'assistant'; its roles are 'gpt'. Rename the role of the answer.",
    ),
    "empty completion": (
        two(completion=(" a", "")),
        f"{AT}: completion is empty, so there is nothing to learn. Fill it in, or drop the row.",
    ),
    "an answer that is only a refusal": (
        [CHAT, CHAT | {"completion": [{"role": "assistant", "content": None, "refusal": "No."}]}],
        f"{AT}: completion has no content, only refusal, which chat templates do not read. Write a text into content "
        "and a call into tool_calls.",
    ),
    "blank completion": (
        two(completion=(" a", " \n\t")),
        f"{AT}: completion is empty, so there is nothing to learn. Fill it in, or drop the row.",
    ),
    "completion None": (two(completion=(" a", None)), f"{AT}: completion is None; {TEXT_OR_MESSAGES}"),
    "prompt None": (two(prompt=("Hi", None)), f"{AT}: prompt is None; {TEXT_OR_MESSAGES}"),
    "prompt a number": (two(prompt=(1, 2)), f"Row 0 of the train dataset: prompt is 1; {TEXT_OR_MESSAGES}"),
    "prompt bytes": (two(prompt=(b"\xff", b"")), f"Row 0 of the train dataset: prompt is b'\\xff'; {TEXT_OR_MESSAGES}"),
    "completions in a list": (
        two(completion=([" a"], [" b"])),
        f"Row 0 of the train dataset: completion is [' a']; {TEXT_OR_MESSAGES}",
    ),
    "token ids": (
        two(completion=([5, 6], [7])),
        f"Row 0 of the train dataset: completion is [5, 6]; {TEXT_OR_MESSAGES}",
    ),
    "one message, not a list": (
        [CHAT | {"prompt": user("Hi")[0]}],
        f"Row 0 of the train dataset: prompt is {{'role': 'user', 'content': 'Hi'}}; {TEXT_OR_MESSAGES}",
    ),
    "messages of another schema": (
        [CHAT | {"prompt": [{"from": "human", "value": "Hi"}]}],
        f"Row 0 of the train dataset: prompt is [{{'from': 'human', 'value': 'Hi'}}]; {TEXT_OR_MESSAGES}",
    ),
    "nested messages": (
        [CHAT | {"prompt": [user("Hi")]}],
        "Row 0 of the train dataset: prompt is [[{'role': 'user', 'content': 'Hi'}]]; " + TEXT_OR_MESSAGES,
    ),
    "a role None": (
        [CHAT | {"completion": [{"role": None, "content": "Hi"}]}],
        "Row 0 of the train dataset: completion is [{'role': None, 'content': 'Hi'}]; " + TEXT_OR_MESSAGES,
    ),
    "no prompt message": (
        [CHAT, CHAT | {"prompt": []}],
        f"{AT}: prompt is an empty list; it must hold at least one message.",
    ),
    "no completion message": (
        [CHAT, CHAT | {"completion": []}],
        f"{AT}: completion is an empty list; it must hold at least one message.",
    ),
    "an empty message": (
        [CHAT, CHAT | {"completion": assistant(" ")}],
        f"{AT}: completion is empty, so there is nothing to learn. Fill it in, or drop the row.",
    ),
    "content a number": (
        [CHAT | {"completion": assistant(3)}],
        "Row 0 of the train dataset: completion is [{'role': 'assistant', 'content': 3}]; " + TEXT_OR_MESSAGES,
    ),
    "content an image": (
        [CHAT | {"prompt": user([{"type": "image", "image": "a.png"}])}],
        "Row 0 of the train dataset: prompt has a message with 'image' in it; the column `images` is missing.",
    ),
    "text, then messages": (
        [GOOD | {"completion": assistant("Hello!")}],
        f"Row 0 of the train dataset has a prompt of text, but a completion of messages. {BOTH_ALIKE}",
    ),
    "messages, then text": (
        [CHAT | {"completion": "Hello!"}],
        f"Row 0 of the train dataset has a prompt of messages, but a completion of text. {BOTH_ALIKE}",
    ),
    "the whole conversation as completion": (
        [CHAT, CHAT | {"completion": [*user("Hi"), *assistant("Hello!")]}],
        f"{AT}: completion begins with a turn of 'user'; {ANSWER_FIRST}",
    ),
    "tools that are not JSON": (
        [CHAT | {"tools": "{search"}],
        "Row 0 of the train dataset: tools is text that is not JSON (Expecting property name enclosed in double "
        "quotes: line 1 column 2 (char 1)). Pass a list of JSON schemas.",
    ),
    "tools that are no list": (
        [CHAT | {"tools": '{"name": "search"}'}],
        "Row 0 of the train dataset: tools is {'name': 'search'}; it must be a list of JSON schemas, or such a list as "
        "JSON text.",
    ),
    "tools by name": (
        [CHAT | {"tools": ["search"]}],
        "Row 0 of the train dataset: tools is ['search']; it must be a list of JSON schemas, or such a list as JSON "
        "text.",
    ),
    "template options as text": (
        [CHAT | {"chat_template_kwargs": "enable_thinking"}],
        "Row 0 of the train dataset: chat_template_kwargs is 'enable_thinking'; it must be a dict.",
    ),
    "template options of the trainer's": (
        [CHAT | {"chat_template_kwargs": {"add_generation_prompt": True}}],
        "Row 0 of the train dataset: chat_template_kwargs sets add_generation_prompt, which only the trainer can "
        "set. Remove it.",
    ),
}


@pytest.mark.parametrize(("rows", "message"), TEXTS.values(), ids=TEXTS)
def test_texts_and_messages(tokenizer, rows, message):
    with pytest.raises(ValueError) as error:
        prepare(tokenizer, rows)
    assert message in said(error)


# What Arrow keeps out of a dataset, and a stream lets through
ONLY_IN_STREAMS = {
    "text, then a conversation": (
        [GOOD, CHAT],
        f"{AT}: prompt is a list of messages, but that of the first row is text. Use the same kind for all rows, or "
        "write messages as text.",
    ),
    "a conversation, then text": (
        [CHAT, GOOD],
        f"{AT}: prompt is text, but that of the first row is a list of messages. Use the same kind for all rows, or "
        "write messages as text.",
    ),
    "half a surrogate pair": ([GOOD, GOOD | {"completion": " a \ud83d"}], f"{AT}: {SURROGATE}"),
    "half a surrogate pair in a prompt": ([GOOD, GOOD | {"prompt": "\udfff"}], f"{AT}: {SURROGATE}"),
    "half a surrogate pair in a message": ([CHAT, CHAT | {"prompt": user("\ud83d")}], f"{AT}: {SURROGATE}"),
    "half a surrogate pair in a half of a pair": (
        [PAIR, PAIR | {"rejected": "\ud83d"}],
        f"Row 1 (rejected) of the train dataset: {SURROGATE}",
    ),
    "a label of 400 digits": (
        [GOOD, GOOD | {"label": 10**400}],
        f"{AT}: label is an int of many digits; it must be finite, and within ±3.4e38, the range of float32.",
    ),
    "a label type of 5,000 digits": (
        [GOOD | {"label_type": "binary"}, GOOD | {"label_type": 10**5000}],
        f"{AT}: label_type is a int; it must be one of ('binary', 'continuous').",
    ),
    "an array of labels": (
        [GOOD, GOOD | {"label": np.array([1.0, 0.0])}],
        f"{AT}: label is a list of 2; it must be one number per row.",
    ),
    "an array of label types": (
        [GOOD | {"label_type": "binary"}, GOOD | {"label_type": np.array(["binary"])}],
        f"{AT}: label_type is array(['binary'], dtype='<U6'); it must be one of ('binary', 'continuous').",
    ),
    "a tensor": (
        [GOOD, GOOD | {"label": torch.tensor(1.0)}],
        f"{AT}: label is tensor(1.), a Tensor; it must be a number, true or false.",
    ),
    "a complex label": (
        [GOOD, GOOD | {"label": np.complex64(1)}],
        f"{AT}: label is (1+0j), a complex; it must be a number, true or false.",
    ),
    "infinite in float16": (
        [GOOD, GOOD | {"label": np.float16("inf")}],
        f"{AT}: label is inf; it must be finite, and within ±3.4e38, the range of float32.",
    ),
    "messages in a tuple": (
        [CHAT, CHAT | {"prompt": tuple(user("Hi"))}],
        f"{AT}: prompt is ({{'role': 'user', 'content': 'Hi'}},); {TEXT_OR_MESSAGES}",
    ),
    "pairs of two kinds": (
        [CONVERSATIONS, CONVERSATIONS | {"rejected": "No."}],
        "Row 1 (rejected) of the train dataset: prompt is text, but that of the first row is a list of messages. Use "
        "the same kind for all rows, or write messages as text.",
    ),
}


@pytest.mark.parametrize(("rows", "message"), ONLY_IN_STREAMS.values(), ids=ONLY_IN_STREAMS)
def test_what_only_a_stream_can_hold(tokenizer, rows, message):
    with pytest.raises(ValueError) as error:
        prepare(tokenizer, stream(*rows))
    assert message in said(error)


def test_the_advice_on_surrogates_mends_them(tokenizer):
    text = " a \ud83d\ude00 b \ud83d"
    mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert mended == " a 😀 b �"
    assert len(prepare(tokenizer, stream(GOOD | {"completion": mended}))) == 1


@pytest.mark.parametrize("num_proc", [None, 2])
def test_text_of_another_encoding(tokenizer, num_proc):
    latin = pa.array([" a", " b", " caf\xe9".encode("latin-1")]).cast(pa.binary()).view(pa.string())
    rows = Dataset(pa.table({"prompt": ["Hi"] * 3, "completion": latin, "label": [1, 0, 1]}))
    with pytest.raises(ValueError) as error:
        Preparation(tokenizer, BINARY)(rows, "train", num_proc)
    assert said(error)[0] == (
        "Row 2 of the train dataset contains text that is not UTF-8 ('utf-8' codec can't decode byte 0xe9 in position "
        "4: unexpected end of data). Read the file in its actual encoding, and write it again as UTF-8."
    )


PAIRS = {
    "a half None": (
        [PAIR, PAIR | {"rejected": None}],
        f"Row 1 (rejected) of the train dataset: completion is None; {TEXT_OR_MESSAGES}",
    ),
    "a half None, without prompts": (
        [CONVERSATIONS, CONVERSATIONS | {"chosen": None}],
        f"Row 1 (chosen) of the train dataset: completion is None; {TEXT_OR_MESSAGES}",
    ),
    "numbers": (
        [{"chosen": 1, "rejected": 2}],
        f"Row 0 (chosen) of the train dataset: completion is 1; {TEXT_OR_MESSAGES}",
    ),
    "lists of text": (
        [{"chosen": ["a"], "rejected": ["b"]}],
        f"Row 0 (chosen) of the train dataset: completion is ['a']; {TEXT_OR_MESSAGES}",
    ),
    "lists of text after a prompt": (
        [PAIR | {"chosen": ["a"], "rejected": ["b"]}],
        f"Row 0 (chosen) of the train dataset: completion is ['a']; {TEXT_OR_MESSAGES}",
    ),
    "messages without a role": (
        [{"chosen": [{"content": "a"}], "rejected": [{"content": "b"}]}],
        f"Row 0 (chosen) of the train dataset: completion is [{{'content': 'a'}}]; {TEXT_OR_MESSAGES}",
    ),
    "an answer to nothing": (
        [CONVERSATIONS, CONVERSATIONS | {"chosen": assistant("Hello!")}],
        "Row 1 (chosen) of the train dataset: prompt is an empty list; it must hold at least one message.",
    ),
    "conversations after a text prompt": (
        [CONVERSATIONS | {"prompt": "Hi"}],
        f"Row 0 (chosen) of the train dataset has a prompt of text, but a completion of messages. {BOTH_ALIKE}",
    ),
    "conversations that repeat the prompt": (
        [CONVERSATIONS | {"prompt": user("Hi")}],
        f"Row 0 (chosen) of the train dataset: completion begins with a turn of 'user'; {ANSWER_FIRST}",
    ),
    "mask None": (
        [PAIR | {"sft_mask": True}, PAIR | {"sft_mask": None}],
        "Row 1 of the train dataset: sft_mask is None; it must be True or False.",
    ),
    "negative weight": ([PAIR | {"weight": -1}], "Row 0 of the train dataset: weight is -1.0; it must be 0 or above."),
}


@pytest.mark.parametrize("as_stream", [False, True])
@pytest.mark.parametrize(("rows", "message"), PAIRS.values(), ids=PAIRS)
def test_pairs(tokenizer, rows, message, as_stream):
    with pytest.raises(ValueError) as error:
        prepare(tokenizer, stream(*rows) if as_stream else rows)
    assert message in said(error)


# rows → what is left out, of how many, and why
DROPPED = {
    "an empty half": ([PAIR | {"rejected": ""}], "1 of 2", "its answer is empty"),
    "a blank half of a conversation": (
        [CONVERSATIONS | {"chosen": [*user("Hi"), *assistant("")]}],
        "1 of 2",
        "its answer is empty",
    ),
    "the same answer twice": (
        [PAIR, PAIR | {"chosen": " Go away."}],
        "2 of 4",
        "chosen and rejected are the same",
    ),
    "the same text twice": (
        [{"chosen": "a b", "rejected": "a c"}, {"chosen": "a b", "rejected": "a b"}],
        "2 of 4",
        "chosen and rejected are the same",
    ),
    "a transcript that ends in a human turn": (
        [{"chosen": TRANSCRIPT, "rejected": TRANSCRIPT + "\n\nHuman: Why?"}],
        "1 of 2",
        "it ends in a human turn",
    ),
    "a transcript without an answer": (
        [{"chosen": TRANSCRIPT, "rejected": "\n\nHuman: Hi\n\nHuman: Hi?"}],
        "1 of 2",
        "it has no assistant turn",
    ),
    "a conversation that ends in a user's turn": (
        [CONVERSATIONS | {"rejected": [*CONVERSATIONS["rejected"], *user("Why?")]}],
        "1 of 2",
        "it does not end in an assistant turn",
    ),
    "a prompt that fills max_length": (
        [GOOD, GOOD | {"prompt": "a" * 50}, GOOD | {"prompt": "b" * 20}],
        "2 of 3",
        "its prompt alone fills max_length",
    ),
    "nothing before a single token": (
        [GOOD, {"prompt": "", "completion": "<|end|>", "label": 0}],
        "1 of 2",
        "it has no token to score: the prompt is empty and the completion is a single token",
    ),
}


@pytest.mark.parametrize(("rows", "counts", "why"), DROPPED.values(), ids=DROPPED)
def test_what_is_left_out_is_counted(tokenizer, caplog, rows, counts, why):
    left, total = (int(n) for n in counts.split(" of "))
    assert len(prepare(tokenizer, rows, max_length=20)) == total - left
    number = f"{left} row{'' if left == 1 else 's'}"
    assert f"Left out {counts} rows of the train dataset. Reason: {why} ({number})." in caplog.messages


@pytest.mark.parametrize(("rows", "counts", "why"), DROPPED.values(), ids=DROPPED)
def test_what_a_stream_leaves_out_is_said_by_row(tokenizer, caplog, rows, counts, why):
    left, total = (int(n) for n in counts.split(" of "))
    prepared = Preparation(tokenizer, BINARY, max_length=20)(stream(*rows), "train")
    caplog.clear()
    kept = [row["row"] for row in prepared]
    said = [message for message in caplog.messages if message.startswith("Left out row ")]
    assert len(kept) == total - left
    assert len(said) == left
    assert all(message.endswith(f" of the train dataset because {why}.") for message in said)


ALL_DROPPED = {
    "prompts that fill max_length": (
        [GOOD | {"prompt": "a" * 50}] * 3,
        "All 3 rows of the train dataset were left out. Reason: its prompt alone fills max_length (3 rows). Raise "
        "max_length.",
    ),
    "pairs without answers": (
        [PAIR | {"chosen": "", "rejected": " "}],
        "All 2 rows of the train dataset were left out. Reason: its answer is empty (2 rows). Check the rows.",
    ),
    "for two reasons": (
        [PAIR | {"rejected": "", "prompt": "a" * 50}, PAIR | {"chosen": "", "prompt": "a" * 50}],
        "All 4 rows of the train dataset were left out. Reasons: its prompt alone fills max_length (2 rows); its "
        "answer is empty (2 rows). Raise max_length.",
    ),
}


@pytest.mark.parametrize(("rows", "message"), ALL_DROPPED.values(), ids=ALL_DROPPED)
def test_nothing_left_is_an_error(tokenizer, caplog, rows, message):
    with pytest.raises(ValueError) as error:
        prepare(tokenizer, rows, max_length=20)
    assert message in said(error)
    with pytest.raises(ValueError, match=r"^All rows of the train dataset were left out\. The logged warnings give"):
        prepare(tokenizer, stream(*rows), max_length=20)


def test_columns_of_pairs_that_are_not_read_are_named(tokenizer, caplog):
    assert len(prepare(tokenizer, [PAIR | {"label": 7, "label_type": "stars", "margin": 0.3}])) == 2
    assert caplog.messages[:2] == [
        f"The train dataset is paired, so its column `{column}` is ignored." for column in ("label", "label_type")
    ]


@pytest.mark.parametrize(
    ("rows", "rules", "alike"),
    [
        ([GOOD] * 2, LabelRules(), "every label is 1/2 or above"),
        ([GOOD | {"label": 0.4}, GOOD | {"label": 0}], LabelRules(), "every label is below 1/2"),
        ([GOOD | {"label": -2.5}] * 2, RATINGS, "every label is -2.5"),
        ([GOOD | {"label": -2.5}, GOOD | {"label": -2}], RATINGS, None),
        ([GOOD | {"label": -2.5, "label_type": "continuous"}] * 2, RATINGS, "every label is -2.5"),
    ],
)
def test_one_class_is_a_warning(tokenizer, caplog, rows, rules, alike):
    prepare(tokenizer, rows, rules)
    said = (
        f"The train dataset has only one class: {alike}. This is correct for SFT or unlearning. Comparing answers "
        "requires good and bad ones."
    )
    assert caplog.messages == ([said] if alike else [])


# Chat templates


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{% for message in messages %}", "TemplateSyntaxError: "),
        ("{{ raise_exception('No system role.') }}", "TemplateError: No system role."),
        ("{{ messages[0].parts.text }}", "UndefinedError: "),
        ("{{ messages[0].content + 1 }}", "TypeError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError: "),
        ({"chat": "x", "tools": "y"}, "ValueError: This model has multiple chat templates with no default"),
    ],
)
def test_a_chat_template_that_fails_names_the_row(tiny_llama, template, found):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = template
    with pytest.raises(ValueError) as error:
        prepare(tokenizer, [CHAT])
    message = said(error)[0]
    assert message.startswith(f"Row 0 of the train dataset: the chat template fails on it ({found}")
    assert message.endswith("). Correct the row, or set another tokenizer.chat_template.")


@pytest.mark.parametrize(
    ("template", "role"),
    [
        ("{# nothing #}", "user"),
        ("{% for m in messages if m.role == 'user' %}<|user|>{{ m.content }}{% endfor %}", "assistant"),
        ("{% for m in messages %}x{% endfor %}{% if add_generation_prompt %}x{% endif %}", "user"),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content[:2] }}<|end|>{% endfor %}", "assistant"),
    ],
)
def test_a_chat_template_that_leaves_the_answer_out(tiny_llama, template, role):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = template
    with pytest.raises(ValueError) as error:
        prepare(tokenizer, [CHAT] * 2)
    assert str(error.value) == (
        "All 2 rows of the train dataset were left out. Reason: the chat template leaves out the content of its "
        f"{role} message (2 rows). Check the rows."
    )


def test_roles_that_the_chat_template_does_not_know_are_invalid_rows(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{# 'critic' #}"
    )
    roles = ["human", "User", "user ", "critic", "expert", "tool", "user"]
    rows = [CHAT | {"prompt": [{"role": role, "content": "Hi"}, *CHAT["prompt"]]} for role in roles]
    with pytest.raises(ValueError) as caught:
        Preparation(tokenizer, LabelRules())(Dataset.from_list(rows), "train")
    message = str(caught.value)
    assert "4 of 7 rows of the train dataset are invalid" in message
    known = "has a message of the role {!r}, which the chat template does not name. Did you mean 'user'? Rename"
    assert all(known.format(role) in message for role in roles[:3])
    assert "role 'expert', which the chat template does not name. Rename the role" in message


def test_conversations_need_a_chat_template(tiny_gpt2):
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    for rows in ([CHAT], [CONVERSATIONS]):
        with pytest.raises(ValueError) as error:
            prepare(tokenizer, rows)
        assert str(error.value) == (
            "The rows are conversations, but the tokenizer has no chat template. Set tokenizer.chat_template (or use "
            "the tokenizer of an instruction-tuned model), and pass it as processing_class."
        )


def test_special_tokens_that_a_text_has_already_are_not_doubled(tiny_gpt2, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    [plain] = prepare(tokenizer, [GOOD])
    user, end = tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>"])
    tokenizer.bos_token = "<|user|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A <|end|>", special_tokens=[("<|user|>", user), ("<|end|>", end)]
    )
    texts = ({}, {"prompt": "<|user|>Hi"}, {"completion": " Hello!<|end|>"}, {"prompt": ""})
    found = prepare(tokenizer, [GOOD | text for text in texts])
    assert [row["prompt_ids"] for row in found] == [[user, *plain["prompt_ids"]]] * 3 + [[user]]
    assert [row["completion_ids"] for row in found] == [plain["completion_ids"]] * 4
    assert not any("part" in message for message in caplog.messages)


def test_text_needs_an_eos_token(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.eos_token = None
    for rows in ([GOOD], [PAIR], [without(PAIR, "prompt")]):
        with pytest.raises(ValueError) as error:
            prepare(tokenizer, rows)
        assert str(error.value) == (
            "The tokenizer has no EOS token to end completions of plain text with. Set tokenizer.eos_token, and pass "
            "the tokenizer as processing_class."
        )
    assert len(prepare(tokenizer, [CHAT])) == 1


# Streams that fail midway


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (GOOD | {"label": 7}, ValueError, "Row 100 of the train dataset: label is 7.0, outside [0, 1]."),
        (GOOD | {"completion": ""}, ValueError, "Row 100 of the train dataset: completion is empty,"),
        (OSError("The share is gone."), OSError, "The share is gone."),
    ],
)
def test_a_stream_fails_at_the_row_that_is_bad(tokenizer, bad, error, message):
    prepared = Preparation(tokenizer, BINARY)(stream(*[GOOD] * 100, bad, GOOD), "train")
    rows = iter(prepared)
    assert [next(rows)["row"] for _ in range(64)] == list(range(64))
    with pytest.raises(error) as raised:
        list(rows)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("bad", [GOOD | {"label": 7}, OSError("The share is gone.")])
def test_a_stream_whose_fiftieth_row_is_bad_fails_at_once(tokenizer, bad):
    with pytest.raises((ValueError, OSError), match=r"Row 49 of the train dataset: label is 7\.0|The share is gone"):
        Preparation(tokenizer, BINARY)(stream(*[GOOD] * 49, bad), "train")


@pytest.mark.parametrize("bad", [GOOD | {"label": 7}, OSError("The share is gone.")])
def test_training_ends_at_the_row_of_a_stream_that_is_bad(tiny_gpt2, tmp_path, bad):
    rows = stream(*[GOOD] * 70, bad)
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, per_device_train_batch_size=8, max_steps=20)
    with pytest.raises((ValueError, OSError), match=r"Row 70 of the train dataset: label is 7\.0|The share is gone"):
        trainer.train()
    assert 0 < trainer.state.global_step < 20


def test_the_row_is_the_right_one_with_two_processes(tokenizer):
    rows = Dataset.from_list([GOOD | {"label": float(i == 7) * 3} for i in range(12)])
    with pytest.raises(ValueError) as error:
        Preparation(tokenizer, BINARY)(rows, "train", num_proc=2)
    assert said(error)[0] == (
        'Row 7 of the train dataset: label is 3.0, outside [0, 1]. Rescale it, or set label_type="continuous".'
    )


# Odd, and right


@pytest.mark.parametrize(
    "row",
    [
        GOOD | {"label": np.bool_(True), "sft_mask": np.bool_(True)},
        GOOD | {"label": np.float16(1), "weight": np.int64(2), "log_z": np.float32(-1)},
        GOOD | {"label": np.array(1.0)},
        GOOD | {"prompt": np.str_("Hi"), "label_type": np.str_("binary")},
        GOOD | {"prompt": ""},
        GOOD | {"completion": " \0 \u202e 😀"},
        GOOD | {"label": -0.0},
        GOOD | {"chat_template_kwargs": {"thinking": True}, "tools": None, "source": b"\xff", "id": 3},
        CHAT | {"prompt": [{"role": "user", "content": None, "name": "Ann"}]},
        CHAT | {"completion": [{"role": "assistant", "content": "assistant", "tool_calls": [{"name": "sis"}]}]},
        CHAT | {"tools": '[{"name": "search"}]', "chat_template_kwargs": {"thinking": True}},
        GOOD | {"prompt_ids": [1], "completion_ids": [], "row": "x", "length": None, "left_out": "no", "cut": True},
    ],
)
def test_odd_rows_that_are_taken(tokenizer, row):
    (prepared,) = prepare(tokenizer, stream(row))
    assert prepared["completion_ids"]
    assert prepared["row"] == 0
    assert prepared["length"] == len(prepared["prompt_ids"]) + len(prepared["completion_ids"])


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow"])
@pytest.mark.parametrize("rows", [[GOOD, GOOD | {"label": 0}], [CHAT], [PAIR]], ids=["text", "chat", "pairs"])
def test_rows_are_the_same_in_any_format(tokenizer, rows, kind):
    expected = prepare(tokenizer, rows)
    assert prepare(tokenizer, Dataset.from_list(rows).with_format(kind)) == expected
    assert prepare(tokenizer, Dataset.from_list(rows).with_format(kind, columns=[])) == expected
    assert prepare(tokenizer, stream(*rows).with_format(kind)) == expected


def test_rows_made_by_a_transform(tokenizer):
    rows = Dataset.from_dict({"question": ["Hi", "Hi"], "stars": [1, 0]}).with_transform(
        lambda batch: {"prompt": batch["question"], "completion": [" Hello!"] * 2, "label": batch["stars"]}
    )
    assert prepare(tokenizer, rows) == prepare(tokenizer, [GOOD, GOOD | {"label": 0}])


def test_class_labels_are_numbers(tokenizer):
    rows = Dataset.from_list([GOOD | {"label": 0}, GOOD])
    assert [
        row["label"] for row in prepare(tokenizer, rows.cast_column("label", ClassLabel(names=["bad", "good"])))
    ] == [0.0, 1.0]
    rows = Dataset.from_list([GOOD, GOOD | {"label": 2}]).cast_column("label", ClassLabel(names=["0", "1", "2"]))
    with pytest.raises(ValueError, match=r"^Row 1 of the train dataset: label is 2\.0, outside \[0, 1\]"):
        prepare(tokenizer, rows)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["good", "bad"], "has labels of the classes good, bad, and their numbers do not say which is better"),
        (["bad", "good", "great"], "has labels of the classes bad, good, great, and their numbers"),
        (["5", "1"], "has labels of the classes 5, 1, which are numbered from 0 in this order. Convert"),
    ],
)
def test_classes_in_an_unknown_order_are_refused(tokenizer, names, message):
    rows = Dataset.from_list([GOOD | {"label": 0}, GOOD]).cast_column("label", ClassLabel(names=names))
    with pytest.raises(ValueError, match=message):
        prepare(tokenizer, rows)


def test_weights_that_are_classes_are_refused(tokenizer):
    rows = Dataset.from_list([GOOD | {"weight": 0}, GOOD | {"weight": 1}])
    with pytest.raises(ValueError, match=r"The train dataset has classes in the column weight, .* Convert the column"):
        prepare(tokenizer, rows.cast_column("weight", ClassLabel(names=["1", "5"])))


def test_a_row_of_100_000_tokens_is_cut_and_counted(tokenizer, caplog):
    rows = [GOOD | {"completion": " a" * 100_000}, GOOD | {"label": 0}]
    assert [row["length"] for row in prepare(tokenizer, rows)] == [100_003, 9]
    assert [row["length"] for row in prepare(tokenizer, rows, max_length=16)] == [16, 9]
    assert caplog.messages == ["Truncated 1 of 2 rows of the train dataset to max_length."]
    assert [row["length"] for row in prepare(tokenizer, rows, max_length=16, truncation_mode="keep_end")] == [16, 9]


@pytest.mark.parametrize("as_stream", [False, True])
def test_a_row_beyond_the_models_positions(tokenizer, as_stream):
    rows = [GOOD, GOOD | {"completion": " a" * 2_000}]
    with pytest.raises(ValueError) as error:
        prepare(tokenizer, stream(*rows) if as_stream else rows, positions=512)
    assert said(error)[0] == (
        "Row 1 of the train dataset has 2,003 tokens, but the model only has 512 positions. Set max_length=512, or "
        "remove the row."
    )
    assert len(prepare(tokenizer, rows, positions=512, max_length=512)) == 2


def test_prepared_rows_are_taken_as_they_are(tokenizer):
    prepare = Preparation(tokenizer, BINARY)
    prepared = prepare(Dataset.from_list([GOOD]), "train")
    assert prepare(prepared, "train") is prepared


@pytest.mark.parametrize("as_stream", [False, True])
@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
def test_prepared_rows_are_cut_and_left_out_as_raw_ones(tokenizer, caplog, truncation_mode, as_stream):
    rows = [GOOD, GOOD | {"completion": " Hello!" * 4, "label": 0}, GOOD | {"prompt": "Hi there! " * 5}]
    prepared = Preparation(tokenizer, BINARY)(stream(*rows) if as_stream else Dataset.from_list(rows), "train")
    how = {"max_length": 12, "truncation_mode": truncation_mode}
    wanted = prepare(tokenizer, rows, **how)
    said = caplog.messages[:]
    caplog.clear()
    assert prepare(tokenizer, prepared, **how) == wanted
    assert len(wanted) == (2 if truncation_mode == "keep_start" else 3)
    if as_stream:
        why = "Left out row 2 of the train dataset because its prompt alone fills max_length."
        assert (why in caplog.messages) == (truncation_mode == "keep_start")
    else:
        assert caplog.messages == said
    with pytest.raises(ValueError, match=r"Row 0 of the train dataset has \d tokens, but the model only has 4 pos"):
        prepare(tokenizer, prepared, positions=4)
    with pytest.raises(ValueError, match=r"^All .*rows of the train dataset were left out"):
        prepare(tokenizer, prepared, max_length=1)


def test_a_prepared_reference_is_left_behind(tokenizer):
    prepared = Preparation(tokenizer, BINARY)(Dataset.from_list([GOOD]), "train")
    with_reference = prepared.add_column("ref_logps", [-3.0])
    assert prepare(tokenizer, with_reference) == list(prepared)
    assert prepare(tokenizer, with_reference.to_iterable_dataset()) == list(prepared)


@pytest.mark.parametrize("rows", [[GOOD], {"train": [GOOD]}, "rows.jsonl", None])
def test_what_is_no_data_set(tokenizer, rows):
    with pytest.raises(TypeError) as error:
        Preparation(tokenizer, BINARY)(rows, "eval")
    assert str(error.value) == (
        f"The eval dataset must be a Dataset or an IterableDataset; got {type(rows).__name__}. Use Dataset.from_list "
        "for a list of rows."
    )


# Before a model is loaded

BAD = two(label=(1.0, 1.4))
OUTSIDE = 'label is 1.4, outside [0, 1]. Rescale it, or set label_type="continuous".'


@pytest.mark.parametrize("as_stream", [False, True])
@pytest.mark.parametrize("split", ["train", "eval", "thumbs"])
def test_rows_are_read_before_a_model_is_loaded(without_weights, tmp_path, split, as_stream):
    bad = stream(*BAD) if as_stream else Dataset.from_list(BAD)
    train = bad if split == "train" else make_rows(2)
    evaluated = {"train": None, "eval": bad, "thumbs": {"ratings": make_rows(2), "thumbs": bad}}[split]
    with pytest.raises(ValueError) as error:
        make_trainer(without_weights, train, tmp_path, eval_dataset=evaluated, max_steps=1)
    assert said(error)[0] == f"Row 1 of the {split} dataset: {OUTSIDE}"
    with pytest.raises(OSError, match=r"model\.safetensors"):
        make_trainer(without_weights, make_rows(2), tmp_path)


def test_evaluation_reads_raw_rows_with_the_same_care(tiny_gpt2, tmp_path):
    trainer = make_trainer(tiny_gpt2, make_rows(2), tmp_path)
    for evaluate in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match=r"^Row 1 of the (eval|test) dataset: label is 1\.4, outside \[0, 1\]"):
            evaluate(Dataset.from_list(BAD))


# Any rows at all

ANY_TEXT = st.text(st.characters(), max_size=12)  # half surrogate pairs too
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
) | st.sampled_from([np.float32("nan"), np.int64(1), np.array([1, 0]), np.array(0.5), 10**5000, 1j, object])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"])},
        optional={"content": ANY_TEXT | st.none() | JUNK, "tool_calls": JUNK},
    ),
    max_size=3,
)
NUMBERS = st.floats(0, 1) | st.booleans() | st.integers(0, 1)
MORE = {
    "sft_mask": st.booleans(),
    "label_type": st.sampled_from(["binary", "continuous"]),
    "log_z": st.floats(-9, 9),
    "weight": st.floats(0, 9),
    "tools": st.none() | st.sampled_from(["[]", "[{}]", "{", "3"]) | JUNK,
    "chat_template_kwargs": st.none() | JUNK,
}
TRANSCRIPTS = st.lists(st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " ", "a"]) | ANY_TEXT, max_size=6).map("".join)


@st.composite
def any_rows(draw: Any) -> list[Any]:
    """A few rows of one kind, in which some values are something else."""
    answer = draw(st.sampled_from([ANY_TEXT, MESSAGES, TRANSCRIPTS]))
    kinds = [
        {"prompt": answer, "completion": answer, "label": NUMBERS},
        {"prompt": answer, "chosen": answer, "rejected": answer},
        {"chosen": answer, "rejected": answer},
    ]
    fields = draw(st.sampled_from(kinds))
    fields = fields | {name: MORE[name] for name in draw(st.sets(st.sampled_from(sorted(MORE)), max_size=3))}
    rows = draw(st.lists(st.fixed_dictionaries(fields), min_size=1, max_size=4))
    names = st.sampled_from([*fields, "image", "id"])
    for row, name, value in draw(st.lists(st.tuples(st.sampled_from(rows), names, JUNK), max_size=2)):
        row[name] = value
    for row, name in draw(st.lists(st.tuples(st.sampled_from(rows), names), max_size=1)):
        row.pop(name, None)
    return rows


def check_any_rows(tokenizer: Any, rows: list[dict], max_length: int | None, truncation_mode: str) -> None:
    """Rows are refused by an error that names them, or taken, finite and within max_length."""
    datasets: list[Any] = [stream(*rows)]
    with contextlib.suppress(Exception):  # Arrow refuses some values in its own ways, or cannot give them back
        table = Dataset.from_list(rows)
        datasets += [table] if list(table) else []
    for dataset in datasets:
        try:
            prepared = prepare(tokenizer, dataset, max_length=max_length, truncation_mode=truncation_mode)
            refusal = ""
        except (ValueError, TypeError) as error:
            prepared, refusal = [], str(error)
        assert prepared or "of the train dataset" in refusal or refusal.startswith("The train dataset")
        for row in prepared:
            assert row["completion_ids"]
            assert 2 <= row["length"] == len(row["prompt_ids"]) + len(row["completion_ids"])
            assert max_length is None or row["length"] <= max_length
            numbers = torch.tensor([row["label"], row.get("log_z", 0.0), row.get("weight", 0.0)], dtype=torch.float32)
            assert torch.isfinite(numbers).all()
            assert row.get("label_type") == "continuous" or 0 <= row["label"] <= 1
            assert isinstance(row["sft_mask"], bool)


@pytest.fixture(scope="module")
def quiet():
    """Without progress bars and warnings."""
    disable_progress_bars()
    loggers = [logging.getLogger(f"trl_ulma.rows.{module}") for module in ("preparation", "rendering", "dropped")]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger in loggers:
        logger.setLevel(logging.NOTSET)
    enable_progress_bars()


FUZZ = {"max_length": st.none() | st.integers(2, 30), "truncation_mode": st.sampled_from(["keep_start", "keep_end"])}


@pytest.mark.usefixtures("quiet")
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(rows=any_rows(), **FUZZ)
def test_any_rows(tokenizer, rows, max_length, truncation_mode):
    check_any_rows(tokenizer, rows, max_length, truncation_mode)


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
@settings(max_examples=2_500, deadline=None, derandomize=True, database=None)
@given(rows=any_rows(), **FUZZ)
def test_any_rows_at_length(tokenizer, rows, max_length, truncation_mode):
    check_any_rows(tokenizer, rows, max_length, truncation_mode)


def check_any_transcripts(chosen: str, rejected: str) -> None:
    """Cutting loses no character, and each half is cut or left out for a reason."""
    refusal = ""
    for answer, other in ((chosen, rejected), (rejected, chosen)):
        for cut in (lambda text, other=other: split_answer(text, other), split_transcript):
            try:
                whole = "".join(cut(answer))
            except ValueError as error:
                whole, refusal = answer, str(error)
            assert whole == answer
            assert refusal in ("", "it has no assistant turn", "it ends in a human turn")
    rows = pairs_to_rows({"chosen": [chosen], "rejected": [rejected]})
    assert rows["label"] == [1.0, 0.0]
    for prompt, completion, left_out, whole in zip(
        rows["prompt"], rows["completion"], rows["left_out"], (chosen, rejected), strict=True
    ):
        assert left_out is not None or (prompt + completion == whole and completion.strip())


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(TRANSCRIPTS, TRANSCRIPTS)
def test_any_transcripts(chosen, rejected):
    check_any_transcripts(chosen, rejected)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, derandomize=True, database=None)
@given(TRANSCRIPTS, TRANSCRIPTS)
def test_any_transcripts_at_length(chosen, rejected):
    check_any_transcripts(chosen, rejected)


@pytest.mark.parametrize("fault", [{"completion": None}, {"completion": ""}, {"label": None}], ids=str)
@pytest.mark.parametrize("chat", ["true", "auto"])
def test_an_invalid_row_of_an_evaluation_is_dropped_whatever_is_wrong_with_it(tiny_gpt2, tmp_path, fault, chat):
    rows = [{"prompt": f"{i}?", "completion": f" {i}", "label": float(i % 2)} for i in range(6)]
    evaluated = Dataset.from_list([*rows[:3], rows[3] | fault])
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    settings = {"invalid_rows": "drop", "chat": chat, "eval_strategy": "epoch", "processing_class": tokenizer}
    trainer = make_trainer(tiny_gpt2, Dataset.from_list(rows), tmp_path, eval_dataset=evaluated, **settings)
    assert len(trainer.eval_dataset) == 3
    settings["invalid_rows"] = "error"
    with pytest.raises(ValueError, match="Row 3 of the eval dataset"):
        make_trainer(tiny_gpt2, Dataset.from_list(rows), tmp_path, eval_dataset=evaluated, **settings)
