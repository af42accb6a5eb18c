"""`trl-ulma chat`: what the model reads, what it answers, and what a person sees."""

import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tiny import CHAT_TEMPLATE, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationMixin,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    TextStreamer,
)
from world import make_rows, make_trainer

from trl_ulma.evaluation.generation import TransformersGenerator
from trl_ulma.evaluation.repetition import Repetition
from trl_ulma.evaluation.server import Reply
from trl_ulma.scripts import cli

SYSTEM = "Write a short letter."
QUICK = {"max_steps": 2, "learning_rate": 0.05, "per_device_train_batch_size": 4}
SHORT = ("--max_new_tokens", "8")
GREEDY = (*SHORT, "--temperature", "0")


def as_chat(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def chat_adapter(tiny_llama, tmp_path_factory) -> str:
    """An adapter that was trained on conversations with a system message."""
    rows = make_rows(8)
    texts = {"prompt": "user", "completion": "assistant"}
    rows = Dataset.from_list(
        [{**row, **{name: [as_chat(role, row[name])] for name, role in texts.items()}} for row in rows]
    )
    folder = str(tmp_path_factory.mktemp("chat") / "out")
    lora = LoraConfig(r=4, task_type="CAUSAL_LM")
    trainer = make_trainer(tiny_llama, rows, folder, peft_config=lora, system_message=SYSTEM, **QUICK)
    trainer.train()
    trainer.save_model(folder)
    return folder


@pytest.fixture(scope="module")
def text_model(tiny_gpt2, tmp_path_factory) -> str:
    """A whole model that was trained on bare text, whose tokenizer has a chat template by now."""
    folder = str(tmp_path_factory.mktemp("text") / "out")
    trainer = make_trainer(tiny_gpt2, make_rows(8), folder, **QUICK)
    trainer.train()
    trainer.save_model(folder)
    make_tokenizer(CHAT_TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture
def generated(monkeypatch) -> list[list[int]]:
    """The tokens that answers were generated from."""
    found = []
    generate = GenerationMixin.generate

    def recorded(self, *args, **kwargs):
        found.append(kwargs["input_ids"][0].tolist())
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", recorded)
    return found


@pytest.fixture
def chat(monkeypatch, capsys):
    """Runs the command: (exit code, stdout, stderr)."""

    def run(model: str, *words: str, stdin: str | None = None):
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin) if stdin is not None else None)
        code = cli.main(["chat", "--model", model, *words])
        return code, *capsys.readouterr()

    return run


def greedy(model, tokenizer, ids: list[int], tokens: int = 8) -> str:
    """The likeliest answer, by transformers alone."""
    ends = tokenizer.eos_token_id
    inputs = torch.tensor([ids])
    mask = torch.ones_like(inputs)
    with torch.no_grad():
        made = model.eval().generate(
            input_ids=inputs, attention_mask=mask, do_sample=False, max_new_tokens=tokens, eos_token_id=ends
        )
    return tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)


def chat_ids(tokenizer, *messages: dict) -> list[int]:
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)


# What is read and answered


def test_bare_text_is_continued_as_transformers_does(tiny_gpt2, chat, generated):
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    ids = tokenizer("The cat sat")["input_ids"]
    wanted = greedy(AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype=torch.float32), tokenizer, ids)
    generated.clear()
    code, out, err = chat(tiny_gpt2, "--prompt", "The cat sat", *GREEDY)
    assert (code, out) == (0, f"{wanted}\n")
    assert generated == [ids]
    assert f"Model: {tiny_gpt2}, in float32 on the CPU\n" in err
    assert "Format: bare text, because the tokenizer has no template. Each prompt stands alone." in err


def test_a_conversation_keeps_its_turns_and_the_system_message(chat_adapter, tiny_llama, chat, generated):
    tokenizer = AutoTokenizer.from_pretrained(chat_adapter)
    model = AutoPeftModelForCausalLM.from_pretrained(chat_adapter, dtype=torch.float32)
    turns = [as_chat("system", SYSTEM), as_chat("user", "How are you?")]
    prompts, answers = [chat_ids(tokenizer, *turns)], []
    answers.append(greedy(model, tokenizer, prompts[0]))
    turns += [as_chat("assistant", answers[0]), as_chat("user", "Why?")]
    prompts.append(chat_ids(tokenizer, *turns))
    answers.append(greedy(model, tokenizer, prompts[1]))
    generated.clear()
    code, out, err = chat(chat_adapter, *GREEDY, stdin="How are you?\n\n  Why? \n")
    assert (code, out) == (0, f"{answers[0]}\n\n{answers[1]}\n")
    assert generated == prompts
    assert f"Model: {chat_adapter}, an adapter on {tiny_llama}, in float32 on the CPU\n" in err
    assert "Format: chat, as in training\n" in err
    assert f"System message: {SYSTEM}\n" in err
    assert re.findall("You: .*", err) == ["You: How are you?", "You: Why?"]
    assert "Loading" not in err


def test_bare_text_has_no_history(text_model, chat, generated):
    code, out, err = chat(text_model, *GREEDY, stdin="The cat\n The dog \n/clear\n")
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    assert tokenizer.chat_template is not None  # what was saved with the model decides
    assert generated == tokenizer(["The cat", " The dog ", "/clear"])["input_ids"]
    assert (code, out.count("\n\n") >= 2) == (0, True)
    assert "Format: bare text, as in training. Each prompt stands alone." in err


def test_clear_starts_again(chat_adapter, chat, generated):
    code, _, err = chat(chat_adapter, *GREEDY, stdin="How are you?\nWhy?\n/clear\nHow are you?\n")
    assert code == 0
    assert len(generated) == 3
    assert len(generated[1]) > len(generated[0])
    assert generated[2] == generated[0]
    assert "[a new conversation]" in err


def test_a_model_without_settings_chats_if_its_tokenizer_has_a_template(tiny_llama, chat, generated):
    code, _, err = chat(tiny_llama, "--prompt", "Why?", *GREEDY)
    assert code == 0
    assert generated == [chat_ids(AutoTokenizer.from_pretrained(tiny_llama), as_chat("user", "Why?"))]
    assert "Format: chat, because the tokenizer has a template\n" in err


def test_a_vision_model_chats_about_text(tiny_llava, chat, generated):
    processor = AutoProcessor.from_pretrained(tiny_llava)
    messages = [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32)
    wanted = greedy(model, processor.tokenizer, ids)
    generated.clear()
    code, out, err = chat(tiny_llava, "--prompt", "Why?", *GREEDY)
    assert (code, out) == (0, f"{wanted}\n")
    assert generated == [ids]
    assert "The model also takes images, but a chat here is text only." in err


def test_a_seed_repeats_the_answers_and_each_message_has_its_own(tiny_gpt2, chat):
    def answers(*words):
        return chat(tiny_gpt2, *SHORT, "--temperature", "2", *words, stdin="The cat\nThe cat\n")[1]

    first = answers()
    assert first == answers("--seed", "0")
    assert first != answers("--seed", "5")
    one, other = first.removesuffix("\n").split("\n\n", 1)
    assert one != other
    assert answers("--top_p", "0.001") != first


# Comparisons


def saved_adapter(base: str, folder: Path, *, seed: int | None) -> str:
    """A folder with an adapter that changes the model, or with `seed` None with one that was not trained."""
    torch.manual_seed(seed or 0)
    lora = LoraConfig(r=4, init_lora_weights=seed is None, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(folder)
    return str(folder)


def compared(out: str) -> list[tuple[str, str]]:
    """(heading, answer) of each answer."""
    parts = re.split(r"^((?:After|Before) training \(.*\)):\n", out, flags=re.M)[1:]
    return [(name, said.rstrip("\n")) for name, said in zip(parts[::2], parts[1::2], strict=True)]


def test_the_model_before_training_answers_the_same_conversation(tiny_llama, tmp_path, chat, generated):
    adapter = saved_adapter(tiny_llama, tmp_path / "tuned", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    trained = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    turns, prompts, wanted = [], [], []
    for text in ("How are you?", "Why?"):
        turns.append(as_chat("user", text))
        prompts.append(chat_ids(tokenizer, *turns))
        after, before = (greedy(model, tokenizer, prompts[-1]) for model in (trained, base))
        assert after != before
        turns.append(as_chat("assistant", after))  # the conversation goes on with it
        wanted += [("After training (tuned)", after), (f"Before training ({Path(tiny_llama).name})", before)]
    generated.clear()
    code, out, err = chat(adapter, "--compare", *GREEDY, stdin="How are you?\nWhy?\n")
    assert code == 0
    assert generated == [prompts[0], prompts[0], prompts[1], prompts[1]]
    assert compared(out) == [(name, said.rstrip("\n")) for name, said in wanted]
    assert f"Compared with the model before training: {tiny_llama}\n" in err
    assert "[the same answer]" not in err


def test_an_adapter_that_was_not_trained_changes_nothing(tiny_llama, tmp_path, chat):
    code, out, err = chat(saved_adapter(tiny_llama, tmp_path, seed=None), "--compare", "--prompt", "Why?", *GREEDY)
    (_, after), (_, before) = compared(out)
    assert (code, after) == (0, before)
    assert "[the same answer]" in err


def test_an_adapter_that_training_began_with_is_the_model_before(tiny_llama, tmp_path, chat):
    adapter = saved_adapter(tiny_llama, tmp_path / "out", seed=1)
    begun = saved_adapter(tiny_llama, tmp_path / "out" / "ref", seed=2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), begun)
    wanted = greedy(model, tokenizer, chat_ids(tokenizer, as_chat("user", "Why?")))
    code, out, _ = chat(adapter, "--compare", "--prompt", "Why?", *GREEDY)
    after, before = compared(out)
    assert (code, before) == (0, ("Before training (out/ref)", wanted.rstrip("\n")))
    assert after[1] != before[1]


def test_a_whole_model_is_compared_with_the_one_that_it_names(text_model, tiny_gpt2, tmp_path, chat):
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    ids = tokenizer("The cat")["input_ids"]
    wanted = greedy(AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype=torch.float32), tokenizer, ids)
    code, out, _ = chat(text_model, "--compare", "--prompt", "The cat", *GREEDY)
    after, before = compared(out)
    assert (code, before) == (0, (f"Before training ({Path(tiny_gpt2).name})", wanted.rstrip("\n")))
    assert after[1] != before[1]
    # It can be gone, have too few embeddings, or not be named
    folder = shutil.copytree(text_model, tmp_path / "moved")
    settings = json.loads((folder / "pointwise.json").read_text())
    settings["reference"]["name"] = str(tmp_path / "gone")
    (folder / "pointwise.json").write_text(json.dumps(settings))
    code, _, err = chat(str(folder), "--compare", "--prompt", "The cat")
    assert code == 1
    assert f"{folder} was trained from {tmp_path / 'gone'}, which could not be loaded (" in err
    settings["reference"]["name"] = tiny_gpt2
    (folder / "pointwise.json").write_text(json.dumps(settings))
    grown = AutoTokenizer.from_pretrained(text_model)
    grown.add_tokens(["<|new|>"])
    grown.save_pretrained(folder)
    code, _, err = chat(str(folder), "--compare", "--prompt", "The cat")
    assert code == 1
    assert "which has 384 embeddings, but the tokenizer has 385 tokens" in err


def test_a_model_that_names_none_before_it_is_not_compared(tiny_gpt2, chat):
    code, out, err = chat(tiny_gpt2, "--compare", "--prompt", "The cat")
    assert (code, out) == (1, "")
    assert err == (
        f"trl-ulma chat: error: --compare needs the model before training, but {tiny_gpt2} is a whole model that does "
        "not name it. Leave out --compare.\n"
    )


# What does not fit


@pytest.mark.parametrize("checkpoint", ["tiny_llama", "tiny_gpt2"])
def test_a_prompt_that_does_not_fit_is_an_error(request, checkpoint, chat, generated):
    code, out, err = chat(request.getfixturevalue(checkpoint), *GREEDY, "--prompt", "The cat " * 300)
    assert (code, out, generated) == (1, "", [])
    assert re.search(r"error: The prompt has \d+ tokens, which with an answer of 8 is more than the model's 512\.", err)
    assert err.endswith("Shorten it, or lower --max_new_tokens.\n")


def test_the_oldest_turns_are_left_out_and_counted(tiny_llama, chat, generated):
    long, short = "The cat " * 84, "Why?"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    asked = [long, short, long, long]
    code, _, err = chat(tiny_llama, *GREEDY, stdin="".join(f"{text}\n" for text in asked))
    assert code == 0
    assert max(map(len, generated)) <= 512 - 8
    said = [line for line in err.splitlines() if "no longer fits" in line]
    left = "[The conversation no longer fits the model's 512 tokens: its {} left out now.]"
    assert said == [left.format("oldest turn is"), left.format("2 oldest turns are")]
    # The third prompt begins with the second message, and the last one is alone
    begin = chat_ids(tokenizer, as_chat("user", short))
    assert generated[2][: len(begin)] == begin
    assert generated[3] == chat_ids(tokenizer, as_chat("user", long.strip()))


def test_cut_and_empty_answers_are_told(tiny_gpt2, tmp_path, chat):
    assert "[cut at 8 tokens; see --max_new_tokens]" in chat(tiny_gpt2, "--prompt", "The cat", *GREEDY)[2]
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    with torch.no_grad():  # the hidden states are the embedding of the end
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(100 * model.lm_head.weight[model.config.eos_token_id])
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(tmp_path)
    code, out, err = chat(str(tmp_path), "--prompt", "The cat", *GREEDY)
    assert (code, out) == (0, "\n")
    assert "[an empty answer]" in err


# Answers that repeat themselves


def scripted(folder: Path, prompt: list[int], answer: str, *, template: str | None = None) -> str:
    """A GPT-2 whose likeliest answer to a prompt of that length is a text. It reads positions only."""
    tokenizer = make_tokenizer(template)
    size = 512
    config = GPT2Config(
        n_embd=size, n_inner=1, n_layer=1, n_head=1, n_positions=size, vocab_size=384, tie_word_embeddings=False
    )
    model = GPT2LMHeadModel(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    block = model.transformer.h[0]
    answers = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        for weight in (model.transformer.wte.weight, block.attn.c_proj.weight, block.mlp.c_proj.weight):
            weight.zero_()
        model.transformer.wpe.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        for place, token in enumerate(answers, len(prompt) - 1):
            model.lm_head.weight[token, place] = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


LONG = ("--max_new_tokens", "400", "--temperature", "0")
STOPPED = "[stopped here, because the answer repeats itself; --allow_repetition shows all of it]\n"
RIVER = "The longest river is the Nile. "
LOOPS = {
    "a sentence": ("Here it is: ", RIVER, "Here it is: The longest river is the Nile."),
    "from the start": ("", RIVER, "The longest river is the Nile."),
    "after another sentence": ("It flows. ", RIVER, "It flows. The longest river is the Nile."),
    "lines": ("Rivers:\n", "- the Nile\n", "Rivers:\n- the Nile"),
    "a word": ("It is ", "very ", "It is very"),
    "a paragraph": ("", "The rain falls on the mat.\nThe cat sat on it.\n\n", None),
    "from within a sentence": (
        "The dog sat. ",
        "The cat ran, the dog sat. ",
        "The dog sat. The cat ran, the dog sat.",
    ),
    "another script": ("", "Нил. ", "Нил."),
}


@pytest.mark.parametrize(("start", "span", "shown"), LOOPS.values(), ids=LOOPS)
def test_an_answer_that_repeats_itself_is_stopped(tmp_path, chat, start, span, shown):
    tokenizer = make_tokenizer()
    prompt = tokenizer("The cat")["input_ids"]
    repeats = 390 // len(tokenizer(span)["input_ids"]) - 1
    model = scripted(tmp_path, prompt, start + span * repeats)
    code, out, err = chat(model, "--prompt", "The cat", *LONG)
    assert (code, out.rstrip()) == (0, shown or (start + span).rstrip())
    assert err.endswith(STOPPED)
    assert err.count(STOPPED) == 1
    assert "[cut at" not in err
    code, out, err = chat(model, "--prompt", "The cat", *LONG, "--allow_repetition")
    assert (code, out) == (0, f"{start}{span * repeats}\n")
    assert "[stopped" not in err


def test_an_interrupt_prints_what_was_held_back(tmp_path, chat, monkeypatch):
    tokenizer = make_tokenizer()
    prompt = tokenizer("The cat")["input_ids"]
    model = scripted(tmp_path, prompt, RIVER * 12)
    add = Repetition.add

    def interrupted(self, token):
        add(self, token)
        if len(self.tokens) == len(tokenizer(RIVER * 3)["input_ids"]):
            assert self.undecided
            raise KeyboardInterrupt

    monkeypatch.setattr(Repetition, "add", interrupted)
    code, out, _ = chat(model, "--prompt", "The cat", *LONG)
    assert (code, out.rstrip()) == (130, (RIVER * 3).rstrip())


def test_the_model_does_not_go_on_after_the_stop(tmp_path, chat, monkeypatch):
    lengths = []
    generate = GenerationMixin.generate

    def recorded(self, *args, **kwargs):
        made = generate(self, *args, **kwargs)
        lengths.append(made.shape[1] - kwargs["input_ids"].shape[1])
        return made

    monkeypatch.setattr(GenerationMixin, "generate", recorded)
    tokenizer = make_tokenizer()
    model = scripted(tmp_path, tokenizer("The cat")["input_ids"], "very " * 70)
    chat(model, "--prompt", "The cat", *LONG)
    chat(model, "--prompt", "The cat", *LONG, "--allow_repetition")
    assert lengths[0] < 140 < 200 < lengths[1]


ROW = "[0, 0, 0, 0, 0, 0],\n"
NORMAL = {
    "laughing": "Ha ha ha ha ha ha ha ha! That is fine.",
    "zeros": f"x = [{'0, ' * 50}0]",
    "rows of zeros": f"x = [\n{ROW * 6}]",
    "a rule": f"Title\n{'-' * 80}\nText",
    "a table": "| a | b | c |\n|---|---|---|\n" + "| no | no | no |\n" * 4,
    "a refrain": "".join(f"Row {i} of the boat.\nLet it be, let it be, let it be, let it be.\n\n" for i in range(4)),
    "a list": "".join(f"{i}. The cat sat on the mat.\n" for i in range(1, 10)),
    "code": "a = [None, None, None, None, None]\n" + 'print("Hi")\n' * 4,
    "twice": "No, thank you, I am fine today. " * 2,
}


@pytest.mark.parametrize("answer", NORMAL.values(), ids=NORMAL)
def test_normal_repetitions_are_shown(tmp_path, chat, answer):
    model = scripted(tmp_path, make_tokenizer()("The cat")["input_ids"], answer)
    code, out, err = chat(model, "--prompt", "The cat", *LONG)
    assert (code, out) == (0, f"{answer}\n")
    assert "[stopped" not in err
    assert "[cut" not in err


def test_an_answer_cut_within_a_repetition_is_shown_to_its_end(tmp_path, chat):
    tokenizer = make_tokenizer()
    model = scripted(tmp_path, tokenizer("The cat")["input_ids"], "very " * 70)
    _, out, err = chat(model, "--prompt", "The cat", "--max_new_tokens", "30", "--temperature", "0")
    assert out == tokenizer.decode(tokenizer("very " * 70)["input_ids"][:30]) + "\n"
    assert "[cut at 30 tokens; see --max_new_tokens]" in err


def test_the_conversation_keeps_what_was_shown(tmp_path, chat, generated):
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    question = as_chat("user", "Why?")
    model = scripted(tmp_path, chat_ids(tokenizer, question), RIVER * 12, template=CHAT_TEMPLATE)
    code, out, _ = chat(model, "--max_new_tokens", "250", "--temperature", "0", stdin="Why?\nHow?\n")
    assert (code, out.split("\n\n")[0]) == (0, RIVER)
    assert generated[1] == chat_ids(tokenizer, question, as_chat("assistant", RIVER), as_chat("user", "How?"))


def test_both_answers_of_a_comparison_are_stopped(tmp_path, chat):
    tokenizer = make_tokenizer()
    base = scripted(tmp_path / "base", tokenizer("The cat")["input_ids"], RIVER * 15)
    adapter = saved_adapter(base, tmp_path / "out", seed=None)
    tokenizer.save_pretrained(adapter)
    code, out, err = chat(adapter, "--compare", "--prompt", "The cat", *LONG)
    assert code == 0
    assert [said for _, said in compared(out)] == [RIVER] * 2
    assert err.count(STOPPED) == 2
    assert err.endswith("[the same answer]\n")


def test_an_answer_is_shown_while_it_is_generated(tmp_path, chat, monkeypatch):
    shown = []
    show = TextStreamer.on_finalized_text

    def recorded(self, text, stream_end=False):
        show(self, text, stream_end)
        shown.append(text)

    monkeypatch.setattr(TextStreamer, "on_finalized_text", recorded)
    answer = "The cat sat on the mat. How are you today?"
    chat(scripted(tmp_path, make_tokenizer()("The cat")["input_ids"], answer), "--prompt", "The cat", *LONG)
    parts = [text for text in shown if text]
    assert "".join(parts) == answer
    assert len(parts) == len(answer.split())


# Errors


def classifier(folder: Path) -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=384, num_labels=2, pad_token_id=0)
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def classifying_adapter(folder: Path) -> None:
    classifier(folder / "base")
    model = GPT2ForSequenceClassification.from_pretrained(folder / "base")
    get_peft_model(model, LoraConfig(r=2, task_type="SEQ_CLS")).save_pretrained(folder)


def translator(folder: Path) -> None:
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=384)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def without_tokenizer(folder: Path) -> None:
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=384)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


UNLOADABLE = ": its configuration and its tokenizer cannot be loaded ("


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, UNLOADABLE),
        (
            without_tokenizer,
            f"{UNLOADABLE}its tokenizer has no tokens, because its files are missing). Name the folder",
        ),
        (classifier, " is a GPT2ForSequenceClassification, and not a causal language model."),
        (classifying_adapter, " is an adapter for SEQ_CLS, and not a causal language model."),
        (translator, " is a T5ForConditionalGeneration, and not a causal language model."),
    ],
    ids=["empty", "no tokenizer", "classifier", "adapter of a classifier", "translator"],
)
def test_what_is_no_language_model_is_refused_in_one_line(tmp_path, chat, make, message):
    make(tmp_path)
    code, out, err = chat(str(tmp_path), "--prompt", "Hi")
    assert (code, out) == (1, "")
    assert err.startswith(f"trl-ulma chat: error: --model {tmp_path}{message}")
    assert err.count("\n") == 1


def test_a_folder_that_is_missing_is_named(tmp_path, chat):
    code, out, err = chat(str(tmp_path / "typo"), "--prompt", "Hi")
    assert (code, out) == (1, "")
    assert err.startswith(f"trl-ulma chat: error: --model: There is no file or folder {tmp_path / 'typo'}")


def test_conversations_need_the_template_of_the_training(chat_adapter, tmp_path, chat):
    folder = shutil.copytree(chat_adapter, tmp_path / "out")
    make_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    code, out, err = chat(str(folder), "--prompt", "Hi")
    assert (code, out) == (1, "")
    assert f"{folder} was trained on conversations, but its tokenizer has no chat template." in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--prompt", " "], 2, "--prompt is empty."),
        (["--temperature", "-1"], 2, "--temperature must be 0 or above; got -1.0."),
        (["--seed", str(2**70)], 2, f"--seed must be within ±2**62; got {2**70}."),
        (["--max_new_tokens", "0"], 2, "--max_new_tokens must be 1 or above; got 0."),
        (["--temperature", "0", "--top_p", "0.9"], 2, "--top_p needs --temperature above 0. Leave it out."),
        (["--prompt", "a\ud800"], 1, "The prompt contains half of a surrogate pair, which is not a character."),
        (
            ["--prompt", "a", "--max_new_tokens", "512"],
            1,
            "--max_new_tokens must be below the 512 tokens of the model; got 512.",
        ),
    ],
)
def test_options_that_cannot_be_are_named(tiny_gpt2, chat, words, code, message):
    found, out, err = chat(tiny_gpt2, *words)
    assert (found, out) == (code, "")
    assert f"trl-ulma chat: error: {message}" in err
    assert "Traceback" not in err


def test_a_closed_stdin_is_an_error(tiny_gpt2, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    assert cli.main(["chat", "--model", tiny_gpt2]) == 1
    assert capsys.readouterr().err == (
        "trl-ulma chat: error: stdin is closed, so there is no message. Give one with --prompt.\n"
    )


def test_a_closed_stdout_is_no_error(tiny_gpt2, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert cli.main(["chat", "--model", tiny_gpt2, *GREEDY, "--prompt", "The cat"]) == 0


def test_a_line_that_does_not_fit_is_named(tiny_gpt2, chat):
    code, _, err = chat(tiny_gpt2, *GREEDY, stdin="The cat\n" + "The cat " * 300 + "\n")
    assert code == 1
    assert "trl-ulma chat: error: Line 2 of stdin: The prompt has " in err


def test_a_byte_order_mark_is_not_read(tiny_gpt2, chat, generated):
    assert chat(tiny_gpt2, *GREEDY, stdin="\ufeffThe cat\n")[0] == 0
    assert generated == [AutoTokenizer.from_pretrained(tiny_gpt2)("The cat")["input_ids"]]


def test_a_character_that_stdout_lacks_is_replaced(tiny_gpt2, monkeypatch, capsys):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    monkeypatch.setattr(TransformersGenerator, "reply", lambda self, *_: print("Grün") or Reply("Grün", True))
    assert cli.main(["chat", "--model", tiny_gpt2, "--prompt", "The cat"]) == 0
    assert stdout.buffer.getvalue() == b"Gr?n\n"


def test_the_token_that_ends_an_answer_is_not_shown(tiny_gpt2, tmp_path, chat):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_gpt2), AutoTokenizer.from_pretrained(tiny_gpt2)
    ids = tokenizer("The cat", return_tensors="pt")["input_ids"]
    model.generation_config.eos_token_id = [model(ids).logits[0, -1].argmax().item()]  # which is no special token
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code, out, err = chat(str(tmp_path), "--prompt", "The cat", *GREEDY)
    assert (code, out) == (0, "\n")
    assert "[an empty answer]" in err


def test_an_answer_ends_with_the_turn_also_if_the_eos_token_is_another(tmp_path, chat):
    # As of base models with a chat template, whose EOS token ends documents
    prompt = chat_ids(make_tokenizer(CHAT_TEMPLATE), as_chat("user", "The cat"))
    folder = scripted(tmp_path, prompt, "Yes.<|end|> No, no", template=CHAT_TEMPLATE)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<|pad|>"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    code, out, err = chat(folder, "--prompt", "The cat", *GREEDY)
    assert (code, out) == (0, "Yes.\n")
    assert "[cut" not in err


def test_lines_in_another_encoding_are_an_error(tiny_gpt2, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Grün\n".encode("cp1252")), encoding="utf-8"))
    assert cli.main(["chat", "--model", tiny_gpt2, *GREEDY]) == 1
    assert "trl-ulma chat: error: A line of stdin is not utf-8 (" in capsys.readouterr().err


# A terminal


class Typed(io.StringIO):
    """A terminal on which nothing is read, because `input` is replaced."""

    def isatty(self) -> bool:
        return True


def type_lines(monkeypatch, *lines) -> None:
    """Let a person type these lines, or press Ctrl-C (KeyboardInterrupt) or Ctrl-D (EOFError)."""
    left = list(lines)

    def typed(prompt: str = "") -> str:
        line = left.pop(0)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr("sys.stdin", Typed())
    monkeypatch.setattr("builtins.input", typed)


@pytest.mark.parametrize("end", ["", " ", KeyboardInterrupt, EOFError])
def test_an_empty_line_and_the_keys_end_the_chat(tiny_gpt2, monkeypatch, capsys, end):
    type_lines(monkeypatch, "The cat", end, "never read")
    assert cli.main(["chat", "--model", tiny_gpt2, *GREEDY]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{Path(tiny_gpt2).name}: ")
    assert said.out.count(f"{Path(tiny_gpt2).name}: ") == 1
    assert said.err.count("You: ") == 2  # stdout is no terminal here
    assert "An empty line or Ctrl-D ends the chat. Ctrl-C stops an answer.\n" in said.err


def test_an_answer_can_be_stopped_and_is_left_out_of_the_conversation(chat_adapter, monkeypatch, capsys, generated):
    shown = TextStreamer.on_finalized_text
    answers = []

    def stopped(self, text, stream_end=False):
        shown(self, text, stream_end)
        answers.append(text)
        if len(generated) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TextStreamer, "on_finalized_text", stopped)
    type_lines(monkeypatch, "How are you?", "Stop!", "Why?", "")
    assert cli.main(["chat", "--model", chat_adapter, *GREEDY]) == 0
    said = capsys.readouterr().err
    assert "[stopped, and left out of the conversation]\n" in said
    assert "Traceback" not in said
    text = AutoTokenizer.from_pretrained(chat_adapter).decode(generated[2])
    assert "How are you?" in text
    assert "Stop!" not in text


def test_without_a_terminal_an_interrupt_ends_the_command(tiny_gpt2, monkeypatch, chat):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(TextStreamer, "on_finalized_text", interrupt)
    assert chat(tiny_gpt2, *GREEDY, stdin="The cat\nThe dog\n")[0] == 130


def test_a_message_that_is_too_long_does_not_end_the_chat(tiny_llama, monkeypatch, capsys, generated):
    type_lines(monkeypatch, "Why?", "The cat " * 300, "How?", "")
    assert cli.main(["chat", "--model", tiny_llama, *GREEDY]) == 0
    assert "Shorten it, or lower --max_new_tokens." in capsys.readouterr().err
    text = AutoTokenizer.from_pretrained(tiny_llama).decode(generated[-1])
    assert len(generated) == 2
    assert text.startswith("<|user|>Why?<|end|>")
    assert text.endswith("<|user|>How?<|end|><|assistant|>")


def read_until(terminal: int, wanted: str, seconds: float = 120) -> str:
    """What a terminal shows, up to a text."""
    shown, end = "", time.monotonic() + seconds
    while wanted not in shown and select.select([terminal], [], [], max(end - time.monotonic(), 0))[0]:
        try:
            shown += os.read(terminal, 1000).decode(errors="replace")
        except OSError:  # the command has ended
            break
    assert wanted in shown, shown
    return shown


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("end", [b"\n", b"\x04", b"\x03"])
def test_a_person_at_a_terminal(chat_adapter, end):
    process, terminal = pty.fork()
    if process == 0:  # what `trl-ulma chat` does in a terminal, without the seconds of its imports
        with contextlib.suppress(BaseException):
            sys.stdin, sys.stdout, sys.stderr = (os.fdopen(os.dup(i), "rw"[i > 0], buffering=1) for i in range(3))
            torch.set_num_threads(1)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
            os._exit(cli.main(["chat", "--model", chat_adapter, *GREEDY]))
        os._exit(99)
    shown = read_until(terminal, "You: ")
    assert "An empty line or Ctrl-D ends the chat, and /clear starts it again. Ctrl-C stops an answer." in shown
    os.write(terminal, b"How are you?\n")
    shown = read_until(terminal, "\r\nYou: ")
    assert "How are you?\r\nout: " in shown
    with contextlib.suppress(OSError):  # raised when the command has ended
        for _ in range(12):  # Python drops a Ctrl-C that arrives while it destroys an object
            os.write(terminal, end)
            while select.select([terminal], [], [], 5)[0]:
                os.read(terminal, 1000)
        os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    os.close(terminal)
