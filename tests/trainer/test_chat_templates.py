"""Conversations: no template drops an answer in silence, and only the assistant's turns are scored."""

import json
import re
from importlib.resources import files
from itertools import pairwise
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from world import make_trainer

from trl_ulma.data.convert import convert
from trl_ulma.labels import LabelRules
from trl_ulma.likelihood.scorer import Scorer
from trl_ulma.rows.collator import DataCollatorForPointwisePreference
from trl_ulma.rows.preparation import Preparation

FOLDER = files("trl") / "chat_templates"
SHIPPED = {
    file.name.removesuffix(".jinja"): file.read_text(encoding="utf-8")
    # Older versions of TRL ship fewer, or have no such folder
    for file in sorted(FOLDER.iterdir() if FOLDER.is_dir() else (), key=lambda file: file.name)
    if file.name.endswith(".jinja")
}
MARKED = sorted(name for name, text in SHIPPED.items() if re.search(r"\{%-?\s*generation", text))
# Those that take their contents as parts only, as processors give them
OF_PARTS = {name for name in SHIPPED if name.startswith(("idefics3", "smolvlm", "llava", "qwen2_5_vl", "diffusion"))}
# What the special tokens of templates look like
SPECIAL = re.compile(
    r"<[|｜][^<>\s]+?[|｜]>|</?s>|<(?:start|end)_of_\w+>|<\|?turn\|?>|<turn\|>|\[/?INST\]|<end_of_utterance>"
)

USER = {"role": "user", "content": "How do I boil an egg?"}
ANSWER = {"role": "assistant", "content": "In hot water, eight minutes."}
AGAIN = {"role": "user", "content": "And for a soft one?"}
SECOND = {"role": "assistant", "content": "Four minutes suffice."}


def shipped(name: str, *values: Any) -> Any:
    """A case with the text of TRL's template of that name, for versions of TRL that ship it."""
    lacks = pytest.mark.skipif(name not in SHIPPED, reason=f"TRL {trl.__version__} ships no template {name}")
    return pytest.param(SHIPPED.get(name), *values, marks=lacks)


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer with this template, to which the template's special tokens are tokens."""
    tokenizer = make_tokenizer(template)
    names = sorted({*SPECIAL.findall(template), "<bos>"})
    tokenizer.add_special_tokens({"additional_special_tokens": names, "bos_token": "<bos>"})
    return tokenizer


def prepared(tokenizer: Any, *rows: dict, **how: Any) -> list[dict]:
    made = Preparation(tokenizer, LabelRules(), **how)(
        Dataset.from_list([{"label": 1.0, **row} for row in rows]), "train"
    )
    return list(made)


def scored(tokenizer: Any, row: dict) -> str:
    """The text of a prepared row that is scored, "…" for each gap."""
    mask = row.get("completion_mask") or [1] * len(row["completion_ids"])
    runs, last = [], 0
    for token, is_scored in zip(row["completion_ids"], mask, strict=True):
        if is_scored and not last:
            runs.append([])
        if is_scored:
            runs[-1].append(token)
        last = is_scored
    return "…".join(tokenizer.decode(run) for run in runs)


def taken(tokenizer: Any, *rows: dict, **how: Any) -> tuple[list[dict], str]:
    """(prepared rows, why there are none)."""
    try:
        return prepared(tokenizer, *rows, **how), ""
    except ValueError as error:
        return [], str(error)


def refusal(tokenizer: Any, *rows: dict, **how: Any) -> str:
    with pytest.raises(ValueError) as error:
        prepared(tokenizer, *rows, **how)
    return str(error.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_an_answer_is_trained_on_whatever_the_template(name, caplog):
    tokenizer = tokenizer_for(SHIPPED[name])
    row = {"prompt": [USER], "completion": [ANSWER]}
    if name in OF_PARTS:
        row = {side: [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in row[side]] for side in row}
    rows, why = taken(tokenizer, row)
    if not rows:  # a template of parts, which a tokenizer does not give
        assert name in OF_PARTS
        assert "the chat template" in why
        return
    [made] = rows
    assert ANSWER["content"] in tokenizer.decode(made["completion_ids"])
    assert USER["content"] in tokenizer.decode(made["prompt_ids"])
    assert "completion_mask" not in made


@pytest.mark.parametrize("name", sorted(set(SHIPPED) - OF_PARTS))
def test_parts_of_text_are_text(name):
    tokenizer = tokenizer_for(SHIPPED[name])
    parts = [{"type": "text", "text": "In hot "}, {"type": "text", "text": "water, eight minutes."}]
    in_parts = {"prompt": [{"role": "user", "content": [{"type": "text", "text": USER["content"]}]}]}
    in_parts["completion"] = [{"role": "assistant", "content": parts}]
    as_text = {"prompt": [USER], "completion": [ANSWER]}
    assert prepared(tokenizer, in_parts) == prepared(tokenizer, as_text)


SEVERAL = {"prompt": [USER], "completion": [ANSWER, AGAIN, SECOND]}


@pytest.mark.parametrize("name", sorted(set(SHIPPED) - OF_PARTS))
def test_only_the_assistants_turns_are_scored(name):
    tokenizer = tokenizer_for(SHIPPED[name])
    [made] = prepared(tokenizer, SEVERAL)
    found = scored(tokenizer, made)
    first, second = found.split("…")
    assert ANSWER["content"] in first
    assert SECOND["content"] in second
    assert AGAIN["content"] not in found
    if name != "glm4moe_training":  # whose markers take in <|user|>, at which this model stops
        assert "user" not in found.replace(" to=user", "").lower()
    assert AGAIN["content"] in tokenizer.decode(made["completion_ids"])
    assert made["completion_mask"][0] == 1
    # As before: all that follows the prompt
    [whole] = prepared(tokenizer, SEVERAL, assistant_only_loss=False)
    assert "completion_mask" not in whole
    assert whole["prompt_ids"] + whole["completion_ids"] == made["prompt_ids"] + made["completion_ids"]


@pytest.mark.parametrize("name", sorted(set(MARKED) - OF_PARTS))
def test_rendering_turn_by_turn_finds_what_the_markers_mark(name):
    marked = SHIPPED[name]
    plain = re.sub(r"(\{%-?)\s*generation\s*(-?%\})", r"\1 if true \2", marked)
    plain = re.sub(r"(\{%-?)\s*endgeneration\s*(-?%\})", r"\1 endif \2", plain)
    both = [tokenizer_for(template) for template in (marked, plain)]
    [by_markers], [by_turns] = (prepared(tokenizer, SEVERAL) for tokenizer in both)

    def words(tokenizer, row):
        # Templates differ in whether they mark the spaces and the header around an answer
        return [part.replace("assistant", "").split() for part in scored(tokenizer, row).split("…")]

    texts = [words(tokenizer, row) for tokenizer, row in zip(both, (by_markers, by_turns), strict=True)]
    for a, b in zip(*texts, strict=True):
        assert " ".join(a) in " ".join(b) or " ".join(b) in " ".join(a)


CALL = {"name": "weather", "arguments": {"city": "Graz", "days": 3}}
TOOLS = {
    "prompt": [{"role": "user", "content": "Will it rain in Styria?"}],
    "completion": [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "name": "weather", "content": "drizzle until noon"},
        {"role": "assistant", "content": "Yes, until midday."},
    ],
}


def with_text_arguments(row: dict) -> dict:
    """A row whose tool calls have their arguments as JSON text."""
    made = json.loads(json.dumps(row))
    for turn in made["completion"]:
        for call in turn.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return made


@pytest.mark.parametrize("name", sorted(set(SHIPPED) - OF_PARTS))
def test_tool_results_are_read_and_not_scored(name):
    tokenizer = tokenizer_for(SHIPPED[name])
    made, why = taken(tokenizer, TOOLS)
    if not made:  # a template without tools: the row is left out, and said why
        assert re.search(r"left out\. Reason: .*tool|the chat template fails", why)
        return
    found = scored(tokenizer, made[0])
    assert "drizzle" not in found
    assert "drizzle" in tokenizer.decode(made[0]["completion_ids"])
    assert "Graz" in found
    assert "Yes, until midday." in found
    # Arguments as JSON text are decoded, once
    assert prepared(tokenizer, with_text_arguments(TOOLS)) == made


def test_most_templates_with_tools_take_them():
    """Lest the test above passes because every template fails."""
    names = ("qwen2_5", "qwen3", "qwen3_training", "deepseekv3", "deepseekv3_training", "glm4moe", "gptoss")
    names = [name for name in names if name in SHIPPED]
    found = {name: taken(tokenizer_for(SHIPPED[name]), TOOLS) for name in names}
    assert [name for name in names if found[name][0]] == names, {n: why for n, (_, why) in found.items() if why}


# What templates leave out

THOUGHT = {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}
SUM = {"role": "user", "content": "What is 2 + 2?"}
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "completion", "lacks"),
    [
        (PLAIN, [THOUGHT], "the reasoning of its assistant message"),
        (PLAIN, [ANSWER | {"thinking": "Two and two."}], "the reasoning of its assistant message"),
        (PLAIN, [ANSWER | {"tool_calls": [{"function": CALL}]}], "the tool call of its assistant message"),
        shipped("deepseekv3", [ANSWER | {"content": "<think>a b</think>c"}], "the content of its assistant message"),
        shipped("qwen3", [THOUGHT, AGAIN, SECOND], "the reasoning of its assistant message"),
        (PLAIN.replace("m.content", "m.content[:9]"), [ANSWER], "the content of its user message"),
    ],
)
def test_a_row_of_which_the_template_drops_text_is_left_out_and_counted(caplog, template, completion, lacks):
    tokenizer = tokenizer_for(template)
    good = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]}
    made = prepared(tokenizer, good, {"prompt": [SUM], "completion": completion})
    assert [row["row"] for row in made] == [0]
    said = f"Left out 1 of 2 rows of the train dataset. Reason: the chat template leaves out {lacks} (1 row)."
    assert said in caplog.messages


@pytest.mark.parametrize(
    ("side", "turn", "lacks"),
    [
        ("completion", {"content": "Yes", "function_call": {"name": "add", "arguments": "{}"}}, "key 'function_call'"),
        ("completion", {"content": "Yes", "refusal": "I can't."}, "key 'refusal'"),
        ("completion", {"content": "Yes", "tool_calls": '[{"name": "add"}]'}, "tool calls in JSON text"),
        ("completion", {"content": None, "tool_calls": '[{"name": "add"}]'}, "tool calls in JSON text"),
        ("prompt", {"content": None, "function_call": {"name": "add", "arguments": "{}"}}, "key 'function_call'"),
        ("prompt", {"parts": [{"text": "Hi"}]}, "key 'parts'"),
        ("prompt", {"value": "Hi"}, "key 'value'"),
    ],
)
def test_what_is_said_in_a_key_that_the_template_does_not_know_is_missed(side, turn, lacks):
    """The rest of the row was trained on without a message."""
    sides: dict[str, list[dict]] = {"prompt": [USER], "completion": [ANSWER]}
    row = {**sides, side: [*sides[side], {"role": "assistant", **turn}]}
    tokenizer = tokenizer_for(PLAIN.replace("{{ m.content }}", "{{ m.content or '' }}"))
    assert f"leaves out the {lacks} of its assistant message" in refusal(tokenizer, row)
    empty = {**row, side: [*sides[side], {"role": "assistant", "content": "Yes", "refusal": None, "value": 4}]}
    assert len(prepared(tokenizer, empty)) == 1


def test_an_answer_that_the_prompt_has_too_is_missed():
    """ "Yes" stands in the prompt, and the template drops the answer."""
    template = PLAIN.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}")
    row = {
        "prompt": [{"role": "user", "content": "Yes or no?"}],
        "completion": [{"role": "assistant", "content": "Yes"}],
    }
    assert "leaves out the content of its assistant message" in refusal(tokenizer_for(template), row)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        # Thoughts of earlier turns are left out of prompts on purpose
        shipped("qwen3", [SUM, THOUGHT, AGAIN]),
        shipped("qwen3", [SUM, THOUGHT | {"content": "<think>\nTwo\n</think>\n\nFour."}, AGAIN]),
        # Escaped, trimmed, and the system message elsewhere
        (PLAIN.replace("m.content", "m.content | tojson"), [{"role": "user", "content": 'Say "é"\n\tplease'}]),
        (PLAIN.replace("m.content", "m.content | trim"), [{"role": "user", "content": "  Hi \n"}]),
        shipped("gemma3", [{"role": "system", "content": "Be kind."}, USER]),
        shipped("cohere2", [{"role": "system", "content": "Be kind."}, USER]),
    ],
)
def test_what_templates_change_on_purpose_is_taken(template, prompt):
    [made] = prepared(tokenizer_for(template), {"prompt": prompt, "completion": [ANSWER]})
    assert made["completion_ids"]


# The end of an answer


def test_answers_that_the_template_does_not_end_are_counted(caplog):
    tokenizer = tokenizer_for("{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}")
    made = prepared(tokenizer, {"prompt": [USER], "completion": [ANSWER]}, {"prompt": [SUM], "completion": [ANSWER]})
    assert len(made) == 2
    assert any(
        m.startswith("The chat template ends 2 of 2 answers of the train dataset without") for m in caplog.messages
    )
    caplog.clear()
    prepared(tokenizer_for(PLAIN), {"prompt": [USER], "completion": [ANSWER]})
    assert not any("The chat template ends" in message for message in caplog.messages)


@pytest.mark.parametrize(("eos", "is_whole"), [("<|end|>", True), ("</s>", False), ("END", False)])
def test_an_eos_that_is_not_one_token_is_said(caplog, eos, is_whole):
    tokenizer = make_tokenizer()
    tokenizer._special_tokens_map["eos_token"] = eos
    prepared(tokenizer, {"prompt": "Hi", "completion": " Hello"})
    assert (
        any(m.startswith(f"The tokenizer splits the EOS token {eos!r} into ") for m in caplog.messages) is not is_whole
    )


# Streams, cutting, pairs


def test_a_stream_has_the_same_masks():
    tokenizer = tokenizer_for(PLAIN)
    rows = [{**SEVERAL, "label": 1.0}, {"prompt": [USER], "completion": [ANSWER], "label": 0.0}]
    table = list(Preparation(tokenizer, LabelRules())(Dataset.from_list(rows), "train"))
    stream = Preparation(tokenizer, LabelRules())(IterableDataset.from_generator(lambda: iter(rows)), "train")
    assert list(stream) == table
    assert table[1]["completion_mask"] is None
    assert table[0]["completion_mask"].count(0) > 5


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_masks_are_cut_with_their_tokens(mode):
    tokenizer = tokenizer_for(PLAIN)
    [whole] = prepared(tokenizer, SEVERAL)
    ids, mask = whole["completion_ids"], whole["completion_mask"]
    total = len(whole["prompt_ids"]) + len(ids)
    for less in (1, 5, 12):
        [made] = prepared(tokenizer, SEVERAL, max_length=total - less, truncation_mode=mode)
        kept = len(made["completion_ids"])
        cut = slice(kept) if mode == "keep_start" else slice(len(ids) - kept, None)
        assert made["completion_ids"] == ids[cut]
        assert (made.get("completion_mask") or [1] * kept) == mask[cut]
    again = Preparation(tokenizer, LabelRules(), total - 5, mode)(
        Preparation(tokenizer, LabelRules())(Dataset.from_list([{**SEVERAL, "label": 1.0}]), "train"), "train"
    )
    assert list(again) == prepared(tokenizer, SEVERAL, max_length=total - 5, truncation_mode=mode)


def test_a_row_of_which_no_scored_token_is_left_is_left_out(caplog):
    tokenizer = tokenizer_for(PLAIN)
    row = {"prompt": [USER], "completion": [ANSWER, {"role": "tool", "content": "a " * 50}]}
    [whole] = prepared(tokenizer, row)
    assert "completion_mask" in whole
    message = refusal(tokenizer, row, max_length=20, truncation_mode="keep_end")
    assert "max_length cuts off all of its assistant tokens" in message


@pytest.mark.parametrize("template", [shipped("qwen3")], ids=["qwen3"])
def test_the_first_turn_may_be_rendered_otherwise_once_others_follow(template):
    """Qwen3 puts an empty thought before the last answer only."""
    tokenizer = tokenizer_for(template)
    [made] = prepared(tokenizer, SEVERAL)
    first, second = scored(tokenizer, made).split("…")
    assert "<think>" not in first
    assert "<think>" in second
    assert first.startswith("In hot water")


def test_a_slow_tokenizers_masks(monkeypatch):
    tokenizer = tokenizer_for(PLAIN)
    fast = prepared(tokenizer, SEVERAL)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    slow = prepared(tokenizer, SEVERAL, max_length=10_000)
    assert slow == fast


def test_assistant_turns_in_text_are_as_they_are(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    [made] = prepared(tokenizer, {"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": " Hello\n\nHuman: Bye"})
    assert "completion_mask" not in made


# The trainer


@pytest.mark.parametrize(
    "settings", [{}, {"assistant_only_loss": False}, {"padding_free": True}, {"share_prompts": True}]
)
def test_log_probabilities_are_those_of_the_assistants_tokens(tiny_llama, tmp_path, settings):
    rows = Dataset.from_list([{**SEVERAL, "label": 1.0}, {"prompt": [USER], "completion": [SECOND], "label": 1.0}])
    trainer = make_trainer(tiny_llama, rows, tmp_path, eval_dataset=rows, per_device_eval_batch_size=2, **settings)
    found = trainer.evaluate()["eval_logps/chosen"]
    wanted = []
    for row in trainer.train_dataset:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        mask = row.get("completion_mask") or [1] * len(row["completion_ids"])
        assert (0 in mask) is (row["row"] == 0 and "assistant_only_loss" not in settings)
        with torch.no_grad():
            logps = trainer.model.eval()(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        wanted.append((logps[-len(mask) :] * torch.tensor(mask)).sum().item())
    assert found == pytest.approx(sum(wanted) / 2, rel=1e-4)


TOOL = {"role": "tool", "content": "The water boils at 100 degrees."}
OF_TURNS = (
    {"prompt": [USER], "completion": [ANSWER, AGAIN, SECOND]},
    {"prompt": [USER], "completion": [SECOND, TOOL, ANSWER, AGAIN, TOOL, SECOND]},
    {"prompt": [USER], "completion": [SECOND, TOOL]},  # ends with tokens that are not scored
    {"prompt": [USER], "completion": [ANSWER]},
    {"prompt": [SUM, ANSWER, AGAIN], "completion": [SECOND, AGAIN, SECOND]},
    {"prompt": [SUM], "completion": [ANSWER, AGAIN, SECOND]},
)


@pytest.mark.parametrize("how", [{}, {"max_length": 90}, {"max_length": 90, "truncation_mode": "keep_end"}])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_turns_that_are_not_scored_are_read_in_every_layout(tiny_llama, layout, how):
    """Each scored token has the log-probability that it has in its row alone, after all that comes before it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64).eval()
    rows = prepared(AutoTokenizer.from_pretrained(tiny_llama), *OF_TURNS, **how)
    batch = DataCollatorForPointwisePreference(pad_token_id=0)(rows)
    with torch.no_grad():
        found = Scorer(layout)(model, batch)
    gaps = 0
    for row, log_probs in zip(rows, found.log_probs, strict=True):
        ids = row["prompt_ids"] + row["completion_ids"]
        mask = [0] * len(row["prompt_ids"]) + (row.get("completion_mask") or [1] * len(row["completion_ids"]))
        gaps += 0 in mask[len(row["prompt_ids"]) :]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        wanted = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0] * torch.tensor(mask[1:])
        assert torch.allclose(log_probs[: len(wanted)], wanted, atol=1e-9)
        assert not log_probs[len(wanted) :].any()
    assert gaps >= 3


# Steps of an answer


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_only_the_last_step_of_an_answer_ends(name, request):
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(name))
    raw = {"prompt": "2 + 3 + 4?", "completions": ["2 + 3 = 5.", "5 + 4 = 9.", "So 9."], "labels": [True, True, False]}
    rows, _ = convert("stepwise", Dataset.from_list([raw]))
    made = list(Preparation(tokenizer, LabelRules(), chat="false")(rows, "train"))
    assert [tokenizer.decode(row["completion_ids"]) for row in made] == [
        "2 + 3 = 5.\n",
        "5 + 4 = 9.\n",
        f"So 9.{tokenizer.eos_token}",
    ]
    for row, after in pairwise(made):
        assert after["prompt_ids"] == row["prompt_ids"] + row["completion_ids"]
    answer = {"prompt": "2 + 3 + 4?\n", "completion": "2 + 3 = 5.\n5 + 4 = 9.\nSo 9."}
    [whole] = prepared(tokenizer, answer, chat="false")
    assert [token for row in made for token in row["completion_ids"]] == whole["completion_ids"]


def test_an_eos_that_is_not_valid_is_refused():
    text = {"prompt": "Hi", "completion": " Hello", "eos": False}
    plain = tokenizer_for(PLAIN)
    assert plain.decode(prepared(plain, text)[0]["completion_ids"]) == " Hello"
    assert plain.decode(prepared(plain, text | {"eos": None})[0]["completion_ids"]) == " Hello<|end|>"
    assert "eos is 'no'; it must be True or False" in refusal(plain, text | {"eos": "no"})
    assert "eos is False; the chat template ends conversations" in refusal(plain, text, chat="true")
    assert "eos is False; the chat template ends" in refusal(
        plain, {"prompt": [USER], "completion": [ANSWER], "eos": False}
    )
    pair = {"prompt": "Hi", "chosen": " Hello", "rejected": " Go", "eos": False}
    assert [plain.decode(row["completion_ids"]) for row in prepared(plain, pair)] == [" Hello", " Go"]
