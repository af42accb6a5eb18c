"""Log-probabilities and generated answers of real, tiny models."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, MptConfig

from trl_ulma import ULMAConfig, ULMATrainer
from trl_ulma.evaluation.generation import Sampling, ServerGenerator, TransformersGenerator, generate
from trl_ulma.evaluation.records import RecordFile
from trl_ulma.evaluation.server import Reply, Server, ServerError
from trl_ulma.labels import LabelRules
from trl_ulma.likelihood.layouts import positions_of
from trl_ulma.likelihood.table import completion_logps
from trl_ulma.rows.preparation import Preparation
from trl_ulma.saved import adapter_base, as_reference, check_same_tokens, load_model, load_tokenizer, positions

ROWS = [
    {"prompt": "The cat", "completion": " sat on the mat.", "label": 1.0},
    {"prompt": "What is the capital of France? Please write a short letter.", "completion": " Paris.", "label": 1.0},
    {"prompt": "", "completion": "Go away. Of course, here it is.", "label": 0.0},
    {"prompt": "How are you today?", "completion": " I am fine, thank you! How are you? " * 5, "label": 0.0},
]


def prepared(source, rows=ROWS):
    return Preparation(load_tokenizer(source), LabelRules())(Dataset.from_list(rows), "test")


@pytest.fixture(scope="module")
def adapter(tiny_llama, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("adapter"))
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(folder)
    return folder


# Log-probabilities


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("checkpoint", ["tiny_gpt2", "tiny_llama"])
def test_logps_are_the_sum_over_completion_tokens(checkpoint, batch_size, request):
    source = request.getfixturevalue(checkpoint)
    rows, model = prepared(source), load_model(source)
    logps, tokens = completion_logps(model, rows, batch_size=batch_size)
    for i, row in enumerate(rows):
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            of_tokens = model(input_ids=ids).logits.double().log_softmax(-1)
        start = max(len(row["prompt_ids"]), 1)
        expected = sum(of_tokens[0, t - 1, ids[0, t]].item() for t in range(start, ids.size(1)))
        assert logps[i] == pytest.approx(expected, abs=1e-4)
        assert tokens[i] == ids.size(1) - start
    assert tokens[2] == len(rows[2]["completion_ids"]) - 1  # an empty prompt: nothing predicts the first token


def test_rewards_are_those_that_the_trainer_predicts(tiny_llama, adapter, tmp_path):
    rows = Dataset.from_list(ROWS)
    args = ULMAConfig(str(tmp_path), beta=0.3, report_to="none", bf16=False, use_cpu=True, save_strategy="no")
    trainer = ULMATrainer(
        model=load_model(adapter).merge_and_unload().requires_grad_(True),
        ref_model=load_model(tiny_llama),
        args=args,
        train_dataset=rows,
        processing_class=load_tokenizer(adapter),
    )
    model, tokens = load_model(adapter), prepared(adapter)
    policy = completion_logps(model, tokens)[0]
    with as_reference(model) as reference:
        ref = completion_logps(reference, tokens)[0]
    assert np.abs(policy - ref).max() > 1
    assert 0.3 * (policy - ref) == pytest.approx(trainer.predict(rows).predictions, abs=1e-3)
    assert ref == pytest.approx(completion_logps(load_model(tiny_llama), tokens)[0], abs=1e-5)
    assert completion_logps(model, tokens)[0] == pytest.approx(policy)  # the adapter is on again


def test_an_adapter_without_a_tokenizer_has_its_bases(tiny_llama, adapter):
    assert adapter_base(adapter) == tiny_llama
    assert adapter_base(tiny_llama) is None
    assert load_tokenizer(adapter).get_vocab() == load_tokenizer(tiny_llama).get_vocab()
    assert positions(adapter) is None  # rotary
    with (
        pytest.raises(ValueError, match="no adapter, so it does not contain its reference"),
        as_reference(load_model(tiny_llama)),
    ):
        pass


def test_positions_of_learned_embeddings(tiny_gpt2):
    assert positions(tiny_gpt2) == 512


def test_positions_of_a_table_of_biases_by_distance():
    assert positions_of(MptConfig(max_seq_len=24)) == 24


def test_a_broken_weight_is_named_by_row(tiny_gpt2):
    model = load_model(tiny_gpt2)
    model.transformer.ln_f.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"The log-probability of row 0 is nan \(in total, 4 rows"):
        completion_logps(model, prepared(tiny_gpt2))


def test_a_reference_with_other_tokens_is_refused(tiny_gpt2):
    ours, theirs = load_tokenizer(tiny_gpt2), load_tokenizer(tiny_gpt2)
    rows = prepared(tiny_gpt2)
    check_same_tokens(ours, theirs, rows, "a", "b")
    state = json.loads(theirs.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    used = rows[0]["completion_ids"][0]
    token = ours.convert_ids_to_tokens(used)
    vocabulary["Ā"], vocabulary[token] = used, vocabulary["Ā"]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    with pytest.raises(ValueError, match=f"Token {used} is {token!r} for a, but 'Ā' for its reference b"):
        check_same_tokens(ours, theirs, rows, "a", "b")


# Generation


class Counting:
    """A generator that counts, and stops where it is told to."""

    def __init__(self, inner, stop_after=None):
        self.inner, self.identity, self.stop_after = inner, inner.identity, stop_after
        self.asked: list = []

    def text_of(self, prompt):
        return self.inner.text_of(prompt)

    def __call__(self, prompts, wanted, sampling, seed, done):
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += [prompts[place] for place in wanted]
        self.inner(prompts, wanted, sampling, seed, done)


@pytest.fixture(scope="module")
def generator(tiny_llama):
    return TransformersGenerator(load_model(tiny_llama), load_tokenizer(tiny_llama), tiny_llama, positions=512)


@pytest.fixture(scope="module")
def prompts(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = ["The cat", "How are you today?", "What is the capital of France?", "Please", "No. Go away.", "The cat"]
    return [tokenizer(text)["input_ids"] for text in texts]


def test_greedy_answers_do_not_depend_on_the_batch(generator, prompts, tmp_path):
    sampling = Sampling(max_new_tokens=12)
    one = generate(generator, prompts, tmp_path / "1.jsonl", sampling, batch_size=1)
    many = generate(generator, prompts, tmp_path / "4.jsonl", sampling, batch_size=4)
    assert one == many
    model, tokenizer = generator.model, generator.tokenizer
    for prompt, reply in zip(prompts, one, strict=True):
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] in generator.ends:
                break
        assert reply.text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        assert reply.finished == (ids[-1] in generator.ends)


def test_answers_do_not_depend_on_a_models_own_settings_of_generate(generator, prompts, tmp_path):
    sampling = Sampling(max_new_tokens=12)
    plain = generate(generator, prompts, tmp_path / "plain.jsonl", sampling)
    own = GenerationConfig(no_repeat_ngram_size=1, suppress_tokens=[5, 6, 7], repetition_penalty=5.0, min_length=60)
    before, generator.model.generation_config = generator.model.generation_config, own
    try:
        assert generate(generator, prompts, tmp_path / "own.jsonl", sampling) == plain
        assert generator.model.generation_config is own
    finally:
        generator.model.generation_config = before


def test_a_stopped_run_goes_on_and_nothing_is_generated_twice(generator, prompts, tmp_path):
    sampling = Sampling(max_new_tokens=8, temperature=1.0, seed=3)
    whole = generate(generator, prompts, tmp_path / "whole.jsonl", sampling, batch_size=2)
    path = tmp_path / "stopped.jsonl"
    stopping = Counting(generator, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        generate(stopping, prompts, path, sampling, batch_size=2)
    rest = Counting(generator)
    assert generate(rest, prompts, path, sampling, batch_size=2) == whole
    assert (len(stopping.asked), len(rest.asked)) == (2, 3)  # "The cat" comes twice and is asked once
    assert len(path.read_text().splitlines()) == 5
    again = Counting(generator)
    assert generate(again, prompts, path, sampling, batch_size=2) == whole
    assert again.asked == []


def test_a_batch_of_which_some_answers_were_kept_is_sampled_as_before(generator, prompts, tmp_path):
    sampling, path = Sampling(max_new_tokens=8, temperature=1.0, seed=3), tmp_path / "answers.jsonl"
    whole = generate(generator, prompts, path, sampling, batch_size=5)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:4:2]))
    rest = Counting(generator)
    assert generate(rest, prompts, path, sampling, batch_size=5) == whole
    assert len(rest.asked) == 3


def test_special_tokens_that_separate_reasoning_from_the_answer(tiny_llama, monkeypatch):
    tokenizer = load_tokenizer(tiny_llama)
    channels = ["<|channel|>", "<|message|>", "<|start|>"]
    tokenizer.add_special_tokens({"extra_special_tokens": channels})
    generator = TransformersGenerator(load_model(tiny_llama), tokenizer, tiny_llama)
    end = [generator.ends[0]]
    text = "<|channel|>analysis<|message|>Hm.<|start|>assistant<|channel|>final<|message|>Yes."
    for written, expected in ((text, ("Hm.", "Yes.")), ("Yes.<|start|>", ("", "Yes."))):
        ids = tokenizer(written, add_special_tokens=False)["input_ids"] + end
        monkeypatch.setattr(generator.model, "generate", lambda input_ids, ids=ids, **_: torch.tensor([[1, *ids]]))
        replies = {}
        generator([[1]], [0], Sampling(), 0, replies.__setitem__)
        assert (replies[0].reasoning, replies[0].text, replies[0].finished) == (*expected, True)


def test_seeds_and_settings_draw_anew_and_leave_the_process_seed_alone(generator, prompts, tmp_path):
    path = tmp_path / "answers.jsonl"
    state = torch.random.get_rng_state()
    of = {
        (seed, temperature): generate(generator, prompts, path, Sampling(8, temperature, seed=seed))
        for seed in (0, 1)
        for temperature in (0.0, 2.0)
    }
    assert torch.equal(torch.random.get_rng_state(), state)
    assert of[0, 2.0] != of[1, 2.0]
    assert of[0, 2.0] != of[0, 0.0]
    assert of[0, 0.0] == of[1, 0.0]
    assert generate(generator, prompts, tmp_path / "anew.jsonl", Sampling(8, 2.0, seed=1)) == of[1, 2.0]


def test_a_model_trained_anew_in_the_same_place_is_asked_anew(tiny_llama, generator, tmp_path):
    for place in ("a", "b"):
        generator.model.save_pretrained(tmp_path / place)
    same = [TransformersGenerator(generator.model, generator.tokenizer, str(tmp_path / "a")).identity for _ in range(2)]
    assert same[0] == same[1]
    (tmp_path / "a" / "model.safetensors").touch()
    assert TransformersGenerator(generator.model, generator.tokenizer, str(tmp_path / "a")).identity != same[0]


def test_another_dtype_and_another_base_are_asked_anew(tiny_llama, generator, tmp_path):
    bases = [tmp_path / "a", tmp_path / "b"]
    for base in bases:
        generator.model.save_pretrained(base)
    found = set()
    for base, dtype, is_new in ((0, "float32", 0), (0, "bfloat16", 0), (1, "float32", 0), (0, "float32", 1)):
        if is_new:
            (bases[base] / "model.safetensors").touch()
        model = AutoModelForCausalLM.from_pretrained(bases[base], dtype=dtype)
        adapted = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM"))
        found.add(TransformersGenerator(adapted, generator.tokenizer, "adapter").identity)
    assert len(found) == 4


def test_another_commit_on_the_hub_and_another_server_are_asked_anew(tiny_llama, generator, tmp_path):
    found = set()
    for commit, quantization in (("0a", None), ("1b", None), ("1b", {"load_in_4bit": True})):
        model = copy.deepcopy(generator.model)
        model.config._commit_hash, model.config.quantization_config = commit, quantization
        found.add(TransformersGenerator(model, generator.tokenizer, "org/model").identity)
    assert len(found) == 3
    urls = ("http://localhost:8000/v1", "http://localhost:8000/v1/", "http://localhost:8001/v1")
    one, same, other = (ServerGenerator(Server("m", url)).identity for url in urls)
    assert one == same != other


def test_a_torn_line_is_cut_off_and_a_broken_one_named(generator, prompts, tmp_path, caplog):
    path, sampling = tmp_path / "answers.jsonl", Sampling(max_new_tokens=4)
    answers = generate(generator, prompts, path, sampling)
    path.write_text(path.read_text()[:-10])
    counting = Counting(generator)
    assert generate(counting, prompts, path, sampling) == answers
    assert len(counting.asked) == 1
    path.write_text("not json\n" + path.read_text())
    with pytest.raises(ValueError, match=r"answers.jsonl holds no record in line 1 \(JSONDecodeError"):
        generate(generator, prompts, path, sampling)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"reply": "VERDICT: 1"},
        {"reply": None, "finished": True},
        {"reply": 1, "finished": True},
        {"reply": "VERDICT: 1", "finished": "yes"},
        {"refused": "another reason"},
        {"answer": "VERDICT: 1", "finished": True},
    ],
)
def test_a_record_of_another_version_is_named(tmp_path, record):
    file = tmp_path / "verdicts.jsonl"
    lines = [{"key": "a", "reply": "VERDICT: 1", "finished": True}, {"key": "b", "refused": "too long"}]
    file.write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert len(RecordFile(file, text="reply")) == 2
    file.write_text("".join(json.dumps(each) + "\n" for each in (*lines, {"key": "c", **record})))
    with pytest.raises(ValueError, match=r"verdicts.jsonl holds no record in line 3 \(ValueError: it is no reply of"):
        RecordFile(file, text="reply")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or above; got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or above; got -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0 or above; got nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
    ],
)
def test_sampling_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_prompts_that_do_not_fit_are_refused_before_any_is_answered(generator, tmp_path):
    path = tmp_path / "answers.jsonl"
    with pytest.raises(
        ValueError, match=r"Prompt 1 has 510 tokens, .* more than the model's 512 positions. Set max_length=509"
    ):
        generate(generator, [[5], [5] * 510], path, Sampling(max_new_tokens=3), batch_size=1)
    with pytest.raises(ValueError, match="Prompt 0 has no tokens"):
        generate(generator, [[]], path, Sampling(max_new_tokens=3))
    assert not path.exists()


def test_a_server_is_asked_once_a_prompt_and_its_answers_survive_its_end(tmp_path):
    from servers import LoopbackServer, said

    def answer_five(asked):
        return said(f"{asked}!") if len(server.requests) <= 5 else (500, {})

    server = LoopbackServer(answer_five)
    try:
        path, sampling = tmp_path / "answers.jsonl", Sampling(5, 0.5, 0.9, seed=7)
        of = ServerGenerator(Server("m", server.url, retries=0, concurrency=1))
        prompts = [f"p{i}" for i in range(20)] + ["p3"]
        with pytest.raises(ServerError, match="answered 500"):
            generate(of, prompts, path, sampling, batch_size=3)
        failed = [request["prompt"] for request in server.requests][5:]
        server.answer = lambda asked: said(f"{asked}!", "length" if asked == "p1" else "stop")
        replies = generate(of, prompts, path, sampling, batch_size=3)
        assert replies == [Reply(f"{asked}!", asked != "p1") for asked in prompts]
        texts = [request["prompt"] for request in server.requests]
        assert sorted(set(texts)) == sorted(set(prompts))
        # What was answered before the end is not asked again
        assert {text for text in texts if texts.count(text) > 1} == set(failed)
        settings = {name: server.requests[-1][name] for name in ("max_tokens", "temperature", "top_p", "model")}
        assert settings == {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "model": "m"}
        assert len({request["seed"] for request in server.requests}) > 1
    finally:
        server.stop()
