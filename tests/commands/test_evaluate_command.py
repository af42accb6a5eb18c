"""`trl-ulma evaluate`: whole runs, with a judge behind a real server, and what is said of a command that is wrong."""

import json
import math
import shutil
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scipy.stats import spearmanr
from servers import (
    LLAMA_SERVER,
    REFUSALS,
    LoopbackServer,
    groq,
    llama_server,
    make_gguf,
    make_parrot,
    mistral,
    reasoning_model,
    said,
    transformers_serve,
)
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM
from world import make_rows, make_trainer

from trl_ulma.data.files import load_rows
from trl_ulma.data.pairs import pairs_to_rows
from trl_ulma.evaluation.as_trained import as_trained
from trl_ulma.evaluation.held_out import HeldOut
from trl_ulma.labels import LabelRules, parse_transform
from trl_ulma.likelihood.table import completion_logps
from trl_ulma.rows.preparation import Preparation
from trl_ulma.saved import SavedSettings, as_reference, load_model, load_tokenizer
from trl_ulma.scripts.cli import main
from trl_ulma.scripts.evaluate import make_parser

PLANTED = "sk-planted-9d2e"


@pytest.fixture(scope="module")
def adapters(tiny_llama, tmp_path_factory) -> list[str]:
    """Two adapters, as of two seeds, one with a training's log."""
    folders = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp(f"seed{seed}")
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        lora = LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(base, lora).save_pretrained(folder)
        folders.append(str(folder))
    state = {"log_history": [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folders


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    """Six prompts with a good and a bad answer each, as pairs."""
    words = ("cat", "mat", "letter", "week", "capital", "heating")
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"Please, what is the {word}?"}],
            "chosen": [{"role": "assistant", "content": f"I am fine, thank you! The {word} is here."}],
            "rejected": [{"role": "assistant", "content": f"No. Go away, {word}."}],
        }
        for word in words
    ]
    file = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, pairs)))
    return str(file)


def error_of(capsys, argv, code=1) -> str:
    capsys.readouterr()
    assert main(["evaluate", *argv]) == code
    return capsys.readouterr().err.splitlines()[-1]


def test_a_whole_run_with_a_judge_behind_transformers_serve(
    adapters, rows, tmp_path, tmp_path_factory, monkeypatch, capsys
):
    monkeypatch.setenv("PLANTED_KEY", PLANTED)
    parrot = make_parrot(tmp_path_factory.mktemp("parrot"), "VERDICT: 1")
    report = tmp_path / "report"
    argv = ["evaluate", "--dataset", rows, "--split", "train", "--output", str(report), "--max_new_tokens", "16"]
    argv += ["--model", f"ulma={adapters[0]}", "--model", f"ulma={adapters[1]}", "--model", f"served:{parrot}"]
    argv += ["--judge", f"llm:{parrot}", "--judge", "profanity", "--criterion", "harmless", "--beta", "0.5"]
    with transformers_serve(parrot) as url:
        argv += ["--server_url", url, "--judge_url", url, "--key_variable", "PLANTED_KEY"]
        assert main(argv) == 0
    facts = json.loads((report / "report.json").read_text())

    # The figures are those of the same rows scored by hand
    model, tokenizer = load_model(adapters[0]), load_tokenizer(adapters[0])
    made = pairs_to_rows(load_rows(rows)["train"][:])
    raw = Dataset.from_dict({name: made[name] for name in ("prompt", "completion", "label")})
    tokens = Preparation(tokenizer, LabelRules())(raw, "test")
    policy, count = completion_logps(model, tokens)
    with as_reference(model) as base:
        rewards = 0.5 * (policy - completion_logps(base, tokens)[0])
    label = np.array(tokens["label"][:])
    first = facts["models"][0]
    assert first["name"] == "ulma (1)"
    good = label == 1
    assert first["perplexity"]["demonstrations"]["value"] == pytest.approx(
        math.exp(-policy[good].sum() / count[good].sum()), rel=1e-5
    )
    assert first["perplexity"]["other answers"]["value"] == pytest.approx(
        math.exp(-policy[~good].sum() / count[~good].sum()), rel=1e-5
    )
    assert first["implicit_reward"]["auc"]["value"] == pytest.approx(roc_auc_score(label, rewards))
    assert first["implicit_reward"]["auc"]["n"] == 6
    assert first["length_alone"]["auc"]["value"] == pytest.approx(roc_auc_score(label, count))
    assert sum(each["rows"] for each in first["calibration"]) == 12

    # The judge always says "1": whatever it is shown, its two orders disagree, which is a tie, and it ranks nothing
    judge = next(each for each in facts["judges"] if each["judge"] == parrot)
    assert judge["agreement"]["value"] == 0.5
    assert [run["name"] for run in facts["models"]][2:] == [parrot.split("/")[-1], "tiny-llama (base)"]
    assert judge["comparisons"] == judge["orders_disagree"] == 6 + 4 * 6
    assert judge["not_judged"] == {}
    assert judge["replies"] == {"first": 60, "second": 0, "tie": 0}
    for run in facts["models"]:
        found = run["judged"][parrot]["harmless"]
        assert {verdict: count for verdict, count in found["counts"].items() if count} == {"tie": 6}
        assert (found["unjudged"], found["unanswered"]) == ({}, 0)
    served = facts["models"][2]
    assert served["answers"].pop("answered_by") == {f"{parrot}@main": 6}
    assert served["answers"] == {"prompts": 6, "cut_at_max_new_tokens": 0, "empty": 0, "refused": {}, "changes": []}
    answers = [
        json.loads(line)["answer"] for line in next((report / "answers").glob("*parrot*")).read_text().splitlines()
    ]
    assert answers == ["VERDICT: 1"] * 6
    assert list(facts["over_seeds"]) == ["ulma"]
    assert facts["over_seeds"]["ulma"]["auc"]["n"] == 2
    assert facts["differences"] == []
    assert facts["versions"]["trl-ulma"]

    text = (report / "report.md").read_text()
    assert "which are too few to show that it is above chance: no ranking is claimed" in text
    assert "6 prompts are too few for a conclusion from judged answers. Use 200 or more." in text
    few = "ulma (1): 6 prompts are too few for a conclusion about how well it ranks answers. Use 30 or more. AUC (how"
    assert f"**{few}" in text
    assert "100.0% of them name the one shown first" in text
    assert f"| ulma (1) | {first['perplexity']['demonstrations']['value']:.2f} [" in text
    printed = capsys.readouterr().out
    assert few in " ".join(printed.split())
    assert f"Open {report / 'report.html'} in a browser." in printed
    assert facts["pictures"] == ["training"]
    assert len(facts["not_drawn"]) == 4
    for name in ("training", "training-dark"):
        assert (report / f"{name}.png").stat().st_size > 1000
        assert (report / f"{name}.svg").is_file()
    for file in report.rglob("*"):
        assert file.is_dir() or PLANTED.encode() not in file.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA_SERVER, reason="set LLAMA_SERVER to llama.cpp's llama-server, or put it on the PATH")
@pytest.mark.parametrize("form", ["chats", "texts"])
def test_llama_cpps_own_server_answers_and_judges_and_can_be_killed(tmp_path, tmp_path_factory, capsys, form):
    gguf = make_gguf(make_parrot(tmp_path_factory.mktemp("parrot"), "VERDICT: 1"))
    words = [*("cat", "mat", "letter", "week", "capital", "heating"), "cat " * 1200]
    halves = {"chosen": "I am fine, thank you! The {} is here.", "rejected": "No. Go away."}
    pairs = [
        {
            "prompt": f"Please, what is the {word}?",
            **{half: f" {text.format(number)}" for half, text in halves.items()},
        }
        for number, word in enumerate(words)
    ]
    if form == "chats":
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        pairs = [{half: [{"role": roles[half], "content": text}] for half, text in pair.items()} for pair in pairs]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    argv = ["evaluate", "--dataset", str(tmp_path / "pairs.jsonl"), "--split", "train", "--model", "served:parrot"]
    argv += ["--output", str(tmp_path / "report"), "--judge", "llm:parrot", "--criterion", "helpful", "--retries", "0"]
    argv += ["--max_new_tokens", "16", "--temperature", "0.5", "--top_p", "0.9", "--concurrency", "1"]
    verdicts = tmp_path / "report" / "verdicts.jsonl"

    def records() -> list[dict]:
        return [json.loads(line) for line in verdicts.read_text().splitlines()] if verdicts.is_file() else []

    def kill(process: subprocess.Popen) -> None:
        while process.poll() is None and len(records()) < 4:
            time.sleep(0.005)
        process.kill()

    options = ("--ctx-size", "1024", "--parallel", "1", "--api-key", PLANTED)
    with pytest.MonkeyPatch.context() as patch:
        with llama_server(gguf, *options) as (url, process):
            urls = ["--server_url", url, "--judge_url", url]
            assert "It was asked without a key." in error_of(capsys, [*argv[1:], *urls])
            patch.setenv("PLANTED_KEY", PLANTED)
            keys = ["--key_variable", "PLANTED_KEY", "--server_key_variable", "PLANTED_KEY"]
            killer = threading.Thread(target=kill, args=(process,))
            killer.start()
            assert "cannot be reached, in 1 try" in error_of(capsys, [*argv[1:], *urls, *keys])
            killer.join()
        kept = records()
        assert 4 <= len(kept) < 14
        with llama_server(gguf, *options) as (url, _):
            assert main([*argv, "--server_url", url, "--judge_url", url, *keys]) == 0
    facts = facts_in(tmp_path / "report")
    # What was answered before is not asked again, and the rest is
    assert records()[: len(kept)] == kept
    asked = [record for record in records() if record.get("reply") is not None or "refused" in record]
    assert facts["judges"][0]["from_cache"] == len(kept)
    assert facts["judges"][0]["asked"] == len(asked) - len(kept)
    # The last prompt is longer than the server's context, and costs nothing else
    assert facts["models"][0]["answers"]["refused"] == {"too long": 1}
    assert facts["judges"][0]["not_judged"] == {"too long": 2}
    assert facts["models"][0]["answers"]["changes"] == []
    assert facts["judges"][0]["agreement"]["value"] == 0.5  # it says "1" in both orders
    found = facts["models"][0]["judged"]["parrot"]["helpful"]
    assert {verdict: count for verdict, count in found["counts"].items() if count} == {"tie": 6, "refused": 1}
    for file in (tmp_path / "report").rglob("*"):
        assert file.is_dir() or PLANTED.encode() not in file.read_bytes()


def test_a_second_run_asks_the_judge_nothing_and_says_the_same(adapters, rows, tmp_path):
    server = LoopbackServer(lambda messages: said("VERDICT: TIE"))
    argv = ["evaluate", "--model", adapters[0], "--dataset", rows, "--split", "train", "--output", str(tmp_path)]
    argv += ["--judge", "llm:m", "--judge_url", server.url, "--max_new_tokens", "4", "--num_prompts", "3"]
    try:
        assert main(argv) == 0
        asked, text = len(server.requests), (tmp_path / "report.md").read_text()
        assert asked == 2 * 2 * (3 + 2 * 3)  # two criteria, two orders, known pairs and answers of two models
        assert main(argv) == 0
        assert len(server.requests) == asked
        assert (tmp_path / "report.md").read_text() == text
    finally:
        server.stop()


# Servers and judges as they are


@pytest.fixture
def served():
    """A server that answers as a model and judges fairly, and its requests."""

    def answer(prompt):
        text = prompt if isinstance(prompt, str) else prompt[0]["content"]
        if "<answer number=" not in text:
            return said("I am fine, as a model.")
        first = text.split('<answer number="1">')[1].split("</answer>")[0]
        second = text.split('<answer number="2">')[1].split("</answer>")[0]
        if "as a model" in first + second:
            return said("VERDICT: TIE")
        return said(f"VERDICT: {1 if 'fine' in first else 2} (it is kinder)")

    server = LoopbackServer(answer)
    yield server
    server.stop()


def serve_argv(rows, output, server):
    argv = ["evaluate", "--dataset", rows, "--split", "train", "--output", str(output), "--criterion", "helpful"]
    argv += ["--model", "served:m", "--server_url", server.url, "--judge", "llm:j", "--judge_url", server.url]
    return [*argv, "--retries", "0"]


def test_a_served_model_reads_the_system_message_of_the_others(adapters, rows, tmp_path, served):
    shutil.copytree(adapters[0], tmp_path / "kind")
    SavedSettings(beta=0.1, system_message="Be kind.").write(tmp_path / "kind")
    argv = [*serve_argv(rows, tmp_path, served), "--model", str(tmp_path / "kind"), "--max_new_tokens", "2"]
    assert main([*argv, "--num_prompts", "2"]) == 0
    asked = [each["messages"] for each in served.requests if each["model"] == "m"]
    assert [[turn["role"] for turn in messages] for messages in asked] == [["system", "user"]] * 2
    assert {messages[0]["content"] for messages in asked} == {"Be kind."}
    assert (
        "2 of 2 answers of kind were cut at 2 tokens, and are judged as they are. Raise --max_new_tokens."
        in (facts_in(tmp_path)["notes"])
    )


def test_a_served_model_reads_rows_of_csv_as_messages(tmp_path, served):
    (tmp_path / "rows.csv").write_text("prompt,completion,label\n How are you?,I am fine.,1\n", encoding="utf-8")
    assert main(serve_argv(str(tmp_path / "rows.csv"), tmp_path / "report", served)) == 0
    asked = [each["messages"] for each in served.requests if each["model"] == "m"]
    assert asked == [[{"role": "user", "content": "How are you?"}]]


@pytest.mark.parametrize("is_paired", [True, False])
def test_tools_that_a_served_model_does_not_get_are_told(tmp_path, served, is_paired):
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    prompt, answer = ([{"role": role, "content": text}] for role, text in (("user", "Time?"), ("assistant", "Noon.")))
    answers = {"chosen": answer, "rejected": [{"role": "assistant", "content": "No."}]}
    rows = [{"prompt": prompt, **(answers if is_paired else {"completion": answer, "label": 1}), "tools": [tool]}]
    rows.append({**rows[0], "prompt": [{"role": "user", "content": "Hi"}], "tools": None})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(serve_argv(str(tmp_path / "rows.jsonl"), tmp_path / "report", served)) == 0
    told = "1 of 2 prompts have tools, which are not sent to the server of m."
    assert any(note.startswith(told) for note in facts_in(tmp_path / "report")["notes"])


def test_csv_of_pairs_is_read_as_messages_like_rows(tmp_path):
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\nHow are you?,Fine.,Bad.\n", encoding="utf-8")
    rows = load_rows(str(tmp_path / "pairs.csv"))["train"]
    assert HeldOut.of(rows, "test", LabelRules()).rows.info.builder_name == rows.info.builder_name == "csv"


def facts_in(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("name", ["azure", "vllm", "llama.cpp, 500", "gpt-5", "other"])
def test_one_refused_request_does_not_end_an_evaluation(rows, tmp_path, capsys, served, name):
    why, refusal = REFUSALS[name]
    answer = served.answer
    served.answer = lambda prompt: refusal if "the mat?" in json.dumps(prompt) else answer(prompt)
    argv = serve_argv(rows, tmp_path, served)
    assert main(argv) == 0
    facts, text = facts_in(tmp_path), (tmp_path / "report.md").read_text()
    assert facts["judges"][0]["agreement"]["value"] == 1
    assert facts["judges"][0]["agreement"]["n"] == 5
    assert facts["judges"][0]["not_judged"] == {why: 2}
    assert (
        f"1 of 6 comparisons of the data's own answers were not judged (j, helpful; missing replies: 2 {why})" in text
    )
    [model] = facts["models"]
    assert model["answers"]["refused"] == {why: 1}
    found = model["judged"]["j"]["helpful"]
    assert (found["counts"]["tie"], found["counts"]["refused"], found["unanswered"]) == (5, 1, 1)
    assert "the model's server refused to answer" in text
    # It is remembered, and asked again where that is wanted
    asked = len(served.requests)
    assert main(argv) == 0
    assert len(served.requests) == asked
    served.answer = answer
    assert main([*argv, "--retry_refused"]) == 0
    facts = facts_in(tmp_path)
    assert facts["judges"][0]["not_judged"] == {}
    assert facts["models"][0]["answers"]["refused"] == {}
    assert len(served.requests) == asked + 2 + 1 + 2  # known pair, answer, its judgment
    assert main([*argv, "--no-resume"]) == 0
    assert len(served.requests) == asked + 5 + 30  # all of it, none refused


def test_another_model_that_answers_is_in_the_report(rows, tmp_path, capsys, served):
    answer = served.answer

    def by_another(prompt):
        status, body = answer(prompt)
        return status, {**body, "model": "llama-3-8b"}

    served.answer = by_another
    argv = serve_argv(rows, tmp_path, served)
    assert main(argv) == 0
    facts, text = facts_in(tmp_path), (tmp_path / "report.md").read_text()
    assert facts["judges"][0]["answered_by"] == {"llama-3-8b": 24}
    assert facts["models"][0]["answers"]["answered_by"] == {"llama-3-8b": 6}
    assert "The server of m: 6 answers are of llama-3-8b, and not of m, which was asked." in text
    assert "The judge's server: 24 answers are of llama-3-8b, and not of j, which was asked." in text
    printed = capsys.readouterr().err
    for name in ("m", "j"):
        assert printed.count(f"{name}: the server answers with another model, llama-3-8b.") == 1
    # They are read from the files of answers and verdicts in the next run
    assert main(argv) == 0
    assert facts_in(tmp_path)["judges"][0]["answered_by"] == {"llama-3-8b": 24}
    assert facts_in(tmp_path)["models"][0]["answers"]["answered_by"] == {"llama-3-8b": 6}


def test_a_limit_of_requests_is_kept_and_the_rest_is_asked_later(rows, tmp_path, capsys, served):
    argv = serve_argv(rows, tmp_path, served)
    assert main([*argv, "--max_requests", "15"]) == 0
    told = capsys.readouterr().err
    # Known pairs and answers of six prompts, both orders; the answers themselves
    assert "Judge j: at most 24 requests (each comparison in both orders), about " in told
    assert "Model m: at most 6 requests, with at most 256 output tokens each." in told
    assert "This run stops asking after 15 requests (--max_requests)." in told
    assert len(served.requests) == 15
    facts = facts_in(tmp_path)
    assert facts["models"][0]["answers"]["refused"] == {"not asked": 3}
    assert "raise --max_requests, or run the same command again" in (tmp_path / "report.md").read_text()
    assert main([*argv, "--max_requests", "15"]) == 0
    assert len(served.requests) == 12 + 6 + 12
    facts = facts_in(tmp_path)
    assert facts["models"][0]["answers"]["refused"] == {}
    assert facts["judges"][0]["not_judged"] == {}
    capsys.readouterr()
    assert main(argv) == 0
    assert "12 replies are already cached." in capsys.readouterr().err


@pytest.mark.parametrize("refuse", [mistral, reasoning_model, groq])
def test_strict_servers_are_asked_what_they_take(tmp_path, served, refuse):
    """Text rows, a temperature, and calls of tools, on servers that know chats only and not each parameter."""
    file = tmp_path / "rows.jsonl"
    made = [{"prompt": f"How are you, {i}?", "completion": f" fine {i}", "label": 1.0} for i in range(3)]
    made += [{"prompt": f"How are you, {i}?", "completion": f" Go away {i}.", "label": 0.0} for i in range(3)]
    file.write_text("\n".join(map(json.dumps, made)))
    served.refuse = refuse
    argv = [*serve_argv(str(file), tmp_path / "report", served), "--temperature", "0.5", "--top_p", "0.9"]
    assert main(argv) == 0
    facts, text = facts_in(tmp_path / "report"), (tmp_path / "report" / "report.md").read_text()
    assert facts["judges"][0]["agreement"]["value"] == 1
    assert facts["models"][0]["answers"]["refused"] == {}
    dropped = {
        mistral: ["seed"],
        reasoning_model: ["temperature", "top_p"],
        groq: ["seed", "top_p"],
    }[refuse]
    changes = [f"{name} is left out" for name in dropped]
    if refuse is not groq:
        changes = ["it takes chats only, so each text is asked as a user's message", *changes]
    assert facts["models"][0]["answers"]["changes"] == changes
    assert f"The server of m: {'; '.join(changes)}." in text
    assert facts["judges"][0]["changes"] == (["temperature is left out"] if refuse is reasoning_model else [])
    assert main(argv) == 0  # what was found out is in the report of a run that asks nothing, too
    assert (tmp_path / "report" / "report.md").read_text() == text


def test_calls_are_judged_as_calls_and_reasoning_is_not(tmp_path, served):
    def call(city):
        return {"type": "function", "function": {"name": "weather", "arguments": {"city": city, "zone": None}}}

    turns = [
        {
            "prompt": [{"role": "user", "content": f"Weather in {city}?"}],
            "chosen": [{"role": "assistant", "content": "", "tool_calls": [call(city)], "reasoning_content": "Hm!"}],
            "rejected": [{"role": "assistant", "content": "<think>Hm!</think>No idea."}],
        }
        for city in ("Oslo", "Rome")
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, turns)))

    def answer(messages):
        if "<answer number=" in messages[0]["content"]:
            return said("VERDICT: TIE", reasoning="VERDICT: 1")
        city = messages[0]["content"].split()[-1].rstrip("?")
        asked = {**call(city), "id": "x"}
        asked["function"]["arguments"] = json.dumps({"city": city})
        return said("<think>Hm!</think>", "tool_calls", tool_calls=[asked])

    served.answer = answer
    assert main(serve_argv(str(file), tmp_path / "report", served)) == 0
    judged = [text for request in served.requests if "<answer number=" in (text := request["messages"][0]["content"])]
    assert len(judged) == 4  # the model's calls are the data's, which is a tie that nobody is asked about
    assert all('[tool call] weather({"city": "Oslo"})' in text or "Rome" in text for text in judged)
    assert all("Hm!" not in text and "(no answer)" not in text and "zone" not in text for text in judged)
    assert facts_in(tmp_path / "report")["models"][0]["judged"]["j"]["helpful"]["counts"]["tie"] == 2
    kept = [json.loads(line) for line in (tmp_path / "report" / "answers" / "m.jsonl").read_text().splitlines()]
    assert [each["reasoning"] for each in kept] == ["Hm!", "Hm!"]


def test_a_judge_that_is_cut_is_said_to_be(rows, tmp_path, served):
    answer = served.answer

    def cut(prompt):
        is_judge = "<answer number=" in json.dumps(prompt)
        return said("<think>The first answer", "length") if is_judge else answer(prompt)

    served.answer = cut
    assert main(serve_argv(rows, tmp_path, served)) == 0
    text = (tmp_path / "report.md").read_text()
    assert "missing replies: 12 cut). They count in no rate and no agreement. Cut: raise --judge_max_tokens" in text
    assert "| m | – | – | – | – | 6 (6 cut) |" in text


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "It was asked without a key"), (404, "It has no model 'j'"), (403, "It was asked without a key")],
)
def test_what_makes_all_requests_pointless_ends_at_once(rows, tmp_path, capsys, served, monkeypatch, status, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    served.answer = lambda prompt: (status, {"error": {"message": "no"}})
    assert message in error_of(capsys, serve_argv(rows, tmp_path, served)[1:])
    assert len(served.requests) <= 2


def test_a_model_that_is_no_adapter_needs_its_reference_named(tiny_llama, adapters, rows, tmp_path, capsys):
    argv = ["evaluate", "--model", tiny_llama, "--dataset", rows, "--split", "train", "--output", str(tmp_path)]
    assert main(argv) == 0
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["models"][0]["implicit_reward"] == {}
    assert "has no implicit rewards, because its reference is not known. Name it with --ref_model." in facts["notes"][0]
    assert facts["judges"] == []
    assert main([*argv, "--ref_model", tiny_llama]) == 0
    figures = json.loads((tmp_path / "report.json").read_text())["models"][0]["implicit_reward"]
    assert {name: figure["value"] for name, figure in figures.items()} == {"auc": 0.5, "accuracy": 0.5, "brier": 0.25}


def test_a_full_model_is_compared_with_the_model_that_its_training_began_with(tiny_llama, tmp_path, capsys):
    rows = make_rows(12)
    trainer = make_trainer(tiny_llama, rows, tmp_path / "run", beta=0.5, learning_rate=1e-2, max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))
    rows.to_json(tmp_path / "rows.jsonl")
    argv = ["evaluate", "--model", str(tmp_path / "tuned"), "--dataset", str(tmp_path / "rows.jsonl")]
    argv += ["--split", "train", "--output", str(tmp_path / "report"), "--generate", "--max_new_tokens", "8"]
    assert main(argv) == 0
    facts = json.loads((tmp_path / "report" / "report.json").read_text())
    tuned, base = facts["models"]
    assert (base["source"], base["name"], base["is_base"]) == (tiny_llama, "tiny-llama (base)", True)
    assert base["implicit_reward"]["auc"]["value"] == 0.5
    brier = ((1 / (1 + np.exp(-trainer.predict(rows).predictions)) - np.array(rows["label"])) ** 2).mean()
    assert tuned["implicit_reward"]["brier"]["value"] == pytest.approx(brier, abs=1e-4)
    # Its answers are those of the model that training began with
    assert tuned["changed"]["base"] == "tiny-llama (base)"
    capsys.readouterr()
    other = [*argv, "--ref_model", tiny_llama]
    other[other.index(str(tmp_path / "report"))] = str(tmp_path / "named")
    assert main(other) == 0
    named = json.loads((tmp_path / "named" / "report.json").read_text())["models"]
    assert named[0]["changed"] == tuned["changed"]
    assert named[1]["perplexity"] == base["perplexity"]
    note, *others = facts["notes"]
    assert all("were cut at 8 tokens, and are judged as they are. Raise" in other for other in others)
    assert note.startswith(
        "Rows whose prompt was in the training data of the model tuned: 12 of 12. Held out: 0. Figures"
    )
    assert (tuned["trained_on"], base.get("trained_on")) == (12, None)
    (tmp_path / "tuned" / "_training_prompts.npy").unlink()
    assert main([*argv, "--no-base"]) == 0
    note, *others = json.loads((tmp_path / "report" / "report.json").read_text())["notes"]
    assert all("are judged as they are. Raise --max_new_tokens." in other for other in others)
    assert note.startswith("The train split is evaluated. Training may have seen these rows")


@pytest.mark.parametrize("names", [("one", "two"), ("one", "base (base)")])
def test_models_before_training_have_names_of_their_own(tiny_llama, tmp_path, names):
    rows = make_rows(4)
    rows.to_json(tmp_path / "rows.jsonl")
    argv = ["evaluate", "--dataset", str(tmp_path / "rows.jsonl"), "--split", "train", "--output", f"{tmp_path}/report"]
    for name, folder in zip(names, "ab", strict=True):
        shutil.copytree(tiny_llama, tmp_path / folder / "base")
        trainer = make_trainer(f"{tmp_path}/{folder}/base", rows, tmp_path / "run", max_steps=1)
        trainer.train()
        trainer.save_model(f"{tmp_path}/{folder}/out")
        argv += ["--model", f"{name}={tmp_path}/{folder}/out"]
    assert main([*argv, "--generate", "--max_new_tokens", "2"]) == 0
    models = facts_in(tmp_path / "report")["models"]
    bases = [f"{tmp_path}/a/base (base)", f"{tmp_path}/b/base (base)"]
    assert [model["name"] for model in models] == [*names, *bases]
    assert [model["changed"]["base"] for model in models[:2]] == bases
    assert len(list((tmp_path / "report" / "answers").iterdir())) == 4


def test_a_report_shows_a_few_answers_before_and_after_training(adapters, rows, tmp_path):
    argv = ["evaluate", "--model", adapters[0], "--dataset", rows, "--split", "train", "--output"]
    for number, options in enumerate([[], ["--examples", "2"], ["--examples", "0"], ["--no-base"]]):
        assert main([*argv, str(tmp_path / str(number)), *options]) == 0
        facts = facts_in(tmp_path / str(number))
        assert facts["data"]["questions"] == 0
        if number < 2:
            shown = facts["models"][0]["changed"]
            assert len(shown["examples"]) == 3 - number
            assert shown["base"] == "tiny-llama (base)"
            assert {"prompt", "before", "after", "chosen"} == set(shown["examples"][0])
            kept = [json.loads(line) for line in next((tmp_path / str(number) / "answers").iterdir()).open()]
            assert len(kept) == 3 - number
        else:
            assert "changed" not in facts["models"][0]
            assert not (tmp_path / str(number) / "answers").exists()


def test_rewards_are_of_the_same_run_as_the_report_beside_them(adapters, rows, tmp_path, monkeypatch):
    def evaluated(name, folder):
        argv = ["--dataset", rows, "--split", "train", "--output", str(tmp_path), "--model", f"{name}={folder}"]
        return main(["evaluate", *argv])

    def files():
        return {file.name: file.read_bytes() for file in (tmp_path / "rewards").iterdir()}

    assert evaluated("a", adapters[0]) == 0
    first = files()
    assert list(first) == ["a.jsonl"]
    with monkeypatch.context() as patched:
        patched.setattr("trl_ulma.evaluation.run.over_runs", Mock(side_effect=ValueError("It fails at the end.")))
        with pytest.raises(ValueError, match="It fails at the end"):
            evaluated("a", adapters[1])
    assert files() == first
    assert evaluated("b", adapters[1]) == 0
    assert list(files()) == ["b.jsonl"]


def test_a_scale_that_is_not_known_is_said(tiny_llama, adapters, rows, tmp_path):
    argv = ["evaluate", "--model", adapters[0], "--dataset", rows, "--split", "train", "--output", str(tmp_path)]
    assert main(argv) == 0
    (note,) = json.loads((tmp_path / "report.json").read_text())["notes"]
    assert "has no pointwise.json, so the scale of its rewards is unknown. They are computed with β = 0.1" in note
    assert note.endswith("Set --beta and --log_z as in training.")
    assert main([*argv, "--beta", "0.2"]) == 0
    (note,) = json.loads((tmp_path / "report.json").read_text())["notes"]
    assert note.endswith("with β = 0.2 and log Z = 0. Set --log_z as in training.")


def test_ratings_have_correlations_and_log_z_moves_rewards(tiny_llama, adapters, tmp_path):
    rows = [
        {"prompt": f"The {word}", "completion": f" sat {word}.", "label": label, "log_z": log_z, "weight": label + 1}
        for word, label, log_z in (("cat", -1.0, 0.0), ("mat", 0.0, 50.0), ("week", 1.0, 100.0))
    ]
    file = tmp_path / "ratings.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    argv = ["evaluate", "--model", adapters[0], "--dataset", str(file), "--split", "train", "--output", str(tmp_path)]
    assert main([*argv, "--label_type", "continuous", "--beta", "1"]) == 0
    facts = facts_in(tmp_path)
    figures = facts["models"][0]["implicit_reward"]
    assert any(
        note.startswith("The rows have weights from 0 to 2, which only training uses.") for note in facts["notes"]
    )
    assert figures["spearman"]["value"] == pytest.approx(1)
    assert figures["mse"]["value"] > 1000
    assert "auc" not in figures


def test_a_training_with_a_column_of_log_z_needs_one_here(tiny_llama, rows, tmp_path, capsys, monkeypatch):
    SavedSettings(beta=0.1, log_z="column").write(tmp_path)
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    load_tokenizer(tiny_llama).save_pretrained(tmp_path)
    argv = ["--model", str(tmp_path), "--ref_model", tiny_llama, "--dataset", rows, "--split", "train"]
    argv += ["--output", str(tmp_path / "report")]
    assert main(["evaluate", *argv, "--log_z", "0"]) == 0
    monkeypatch.setattr("trl_ulma.evaluation.likelihoods.completion_logps", None)  # told before the scoring
    said_last = error_of(capsys, argv)
    assert f"{tmp_path}: --log_z column needs a column log_z in the scored rows," in said_last


def test_without_a_test_split_the_rows_that_training_would_hold_out_are_taken(tiny_llama, rows, tmp_path, capsys):
    argv = ["--model", tiny_llama, "--dataset", rows, "--output", str(tmp_path), "--test_split_size", "0.34"]
    assert main(["evaluate", *argv]) == 0
    said_of_rows = capsys.readouterr().err
    assert (
        "no test split, so 2 of its 6 rows are selected (0.34 of its rows, by prompt, seed 42). --split train evaluates"
        in said_of_rows
    )
    data = json.loads((tmp_path / "report.json").read_text())["data"]
    assert (data["rows"], data["split"]) == (4, "0.34 of its rows, by prompt, seed 42")


def test_the_report_names_the_rows_that_were_left_out(tiny_llama, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    lines = [
        "Why?,Because.,5",
        "Who?,Me.,",
        "Where?,,2",
        "When?,Now.,1",
        f"{'Why is it so? ' * 90},Yes.,3",
        "How?,So.,4",
    ]
    (tmp_path / "answers.csv").write_text("\n".join(["question,reply,stars", *lines, ""]))
    argv = ["evaluate", "--model", f"m={tiny_llama}", "--dataset", "answers.csv", "--output", "report"]
    argv += ["--columns", "prompt=question,completion=reply,label=stars", "--label_type", "continuous"]
    argv += ["--max_length", "64", "--truncation_mode", "keep_start", "--examples", "0"]
    assert main([*argv, "--split", "train", "--invalid_rows", "drop"]) == 0
    record = json.loads((tmp_path / "report" / "report.json").read_text())
    data, (model,) = record["data"], record["models"]
    assert [each.split(". ")[0] for each in caplog.messages if each.startswith("Left out")] == [
        "Left out 2 of 6 rows of the train dataset",
        "Left out 1 of 4 rows of the train dataset",
    ]
    assert (data["rows"], model["rows"], model["left_out"]) == (4, 3, 1)
    assert data["left_out"] == {"invalid: stars is empty": 1, "invalid: reply is empty": 1}
    text = (tmp_path / "report" / "report.md").read_text()
    for part in (
        "2 rows were left out. Reasons: invalid: stars is empty (1 row); invalid: reply is empty (1 row).",
        "- answers.csv, line 3: stars is empty; it must be a number.\n"
        "- answers.csv, line 4: reply is empty, so there is nothing to learn. Fill it in, or drop the row.",
        "m: 1 row was left out. Reason: its prompt alone fills max_length (1 row). The first: answers.csv, line 6.",
    ):
        assert f"\n\n{part}\n\n" in text
        assert part.splitlines()[0].removeprefix("- ") in (tmp_path / "report" / "report.html").read_text()


def test_a_key_goes_to_the_server_that_it_was_named_for_and_to_no_other(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", PLANTED)
    monkeypatch.setenv("JUDGE_KEY", "judge-key")
    monkeypatch.setenv("MODEL_KEY", "model-key")
    servers = [LoopbackServer(lambda messages: said("VERDICT: TIE")) for _ in range(2)]
    argv = ["evaluate", "--dataset", rows, "--split", "train", "--model", "served:m", "--server_url", servers[0].url]
    argv += ["--judge", "llm:j", "--judge_url", servers[1].url, "--num_prompts", "1"]
    named = {"neither": [], "judge": ["--key_variable", "JUDGE_KEY"], "model": ["--server_key_variable", "MODEL_KEY"]}
    sent = {}
    try:
        for case, options in named.items():
            assert main([*argv, "--output", str(tmp_path / case), *options]) == 0
            sent[case] = []
            for server in servers:
                headers = {name.lower(): value for each in server.headers for name, value in each.items()}
                sent[case].append(headers["authorization"].removeprefix("Bearer "))
                server.headers.clear()
    finally:
        for server in servers:
            server.stop()
    no = "no-key-needed"
    assert sent == {"neither": [no, no], "judge": [no, "judge-key"], "model": ["model-key", no]}


def test_help_needs_no_torch():
    code = (
        "import sys; from trl_ulma.scripts.cli import main; code = main(['evaluate', '--help']); "
        "assert not {'torch', 'transformers', 'datasets', 'matplotlib', 'scipy'} & set(sys.modules); sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    options = [action.option_strings[0] for action in make_parser()._actions]
    assert all(option in run.stdout for option in options)


NEEDED = ["--model", "m", "--dataset", "org/d", "--output", "o"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--judge", "gpt"], "'gpt' is no judge; it must be llm:MODEL, reward:CHECKPOINT or profanity"),
        (["--judge", "llm:"], "'llm:' is no judge"),
        (["--judge", "profanity", "--judge", "profanity"], "a --judge is given twice"),
        (["--model", "m"], "a --model is given twice; each run needs a folder of its own"),
        (["--model", "a=tests", "--model", "b=./tests/"], "a --model is given twice; each run needs a folder of its"),
        (["--judge_label", "good"], "--judge_label needs a reward:CHECKPOINT judge, which is not given"),
        (["--judge_url", f"http://u:{PLANTED}@h/v1"], "--judge_url needs an llm:MODEL judge, which is not given."),
        (
            ["--judge", "profanity", "--key_variable", "K"],
            "--key_variable needs an llm:MODEL judge, which is not given",
        ),
        (["--server_url", f"http://u:{PLANTED}@h/v1"], "--server_url needs a served:MODEL model, which is not given."),
        (["--server_key_variable", "K"], "--server_key_variable needs a served:MODEL model, which is not given."),
        (["--criterion", "helpful"], "--criterion needs a judge, which is not given. Leave it out."),
        (["--judge", "profanity", "--judge_max_tokens", "99"], "--judge_max_tokens needs an llm:MODEL judge"),
        (["--judge", "profanity", "--retry_refused"], "--retry_refused needs an llm:MODEL judge or a served:MODEL"),
        (["--num_prompts", "3"], "--num_prompts needs a judge, --generate or a served:MODEL model"),
        (["--no-base", "--temperature", "1"], "--temperature needs a judge, --generate, or --examples with --base"),
        (["--no-base", "--examples", "5"], "--examples needs --base"),
        (["--generate", "--top_p", "0.5"], "--top_p needs --temperature above 0"),
        (["--judge", "reward:r"], "a reward model has one criterion, which its authors say: give --criterion once"),
        (["--beta", "0"], "0 must be above 0"),
        (["--batch_size", "1.5"], "invalid int value: '1.5'"),
        (["--retries", "-1"], "-1 must be 0 or above"),
        (["--judge", "llm:m", "--judge_temperature", "-0.5"], "-0.5 must be 0 or above"),
        (["--judge", "llm:m", "--judge_temperature", "nan"], "nan must be 0 or above"),
        (["--judge", "llm:m", "--judge_temperature", "inf"], "inf must be 0 or above"),
        (["--bach_size", "3"], "--bach_size is not an option. Did you mean --batch_size?"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_loaded(capsys, options, message):
    assert message in error_of(capsys, [*NEEDED, *options], code=2)


def test_options_of_implicit_rewards_need_a_model_that_is_not_served(capsys):
    argv = ["--model", "served:m", *NEEDED[2:], "--beta", "0.2"]
    assert "--beta needs a model that is not served" in error_of(capsys, argv, code=2)
    argv = ["--model", "served:m", *NEEDED[2:], "--dtype", "bfloat16"]
    assert "--dtype needs a model that is not served, or a reward:CHECKPOINT judge" in error_of(capsys, argv, code=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "dev"], "has no split 'dev', but train. Set --split to one of them."),
        (["--temperature", "-1"], "temperature must be 0 or above; got -1.0"),
        (["--judge", "profanity", "--criterion", "helpful"], "judges harmless, not 'helpful'"),
        (["--judge", "llm:m", "--judge_url", "nowhere"], "'nowhere' is no server's URL"),
        (
            ["--judge", "llm:m", "--key_variable", "NOT_SET"],
            "variable NOT_SET holds the key of m's server and is not",
        ),
        (["--judge", "llm:m", "--judge_url", "http://127.0.0.1:9/v1", "--retries", "0"], "cannot be reached, in 1 try"),
        (["--judge", "llm:m", "--judge_url", "https://api.openai.com/v1"], "needs a key, and no variable is named"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_before_a_model_is_loaded(
    capsys, tiny_llama, rows, tmp_path, monkeypatch, options, message
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("trl_ulma.evaluation.run.load_model", None)
    argv = ["--model", tiny_llama, "--dataset", rows, "--output", str(tmp_path), *options]
    said_last = error_of(capsys, argv)
    assert said_last.startswith("trl-ulma evaluate: error: ")
    assert message in said_last


@pytest.mark.parametrize("option", ["--model", "--ref_model"])
def test_a_model_that_is_not_there_is_named_before_all_else(capsys, tiny_llama, rows, tmp_path, option):
    (tmp_path / "empty").mkdir()
    missing = ["--model", tiny_llama, option, f"{tmp_path}/typo", "--dataset", rows, "--output", str(tmp_path)]
    assert f"error: {option}: There is no file or folder {tmp_path}/typo" in error_of(capsys, missing)
    for wrong in (str(tmp_path / "empty"), "typo"):
        argv = ["--model", tiny_llama, option, wrong, "--dataset", rows, "--output", str(tmp_path / "report")]
        said_last = error_of(capsys, argv)
        assert f"{option} {wrong}: its configuration and its tokenizer cannot be loaded (" in said_last
        assert said_last.endswith("Name the folder of a checkpoint or an adapter, or a model on the hub.")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("names", [("A", "a"), ("a b", "a_b"), ("Straße", "STRASSE"), ("ulma (1)", "Ulma_1_")])
def test_runs_whose_files_would_have_one_name_are_refused_before_any_work(capsys, rows, tmp_path, names):
    models = [part for name, model in zip(names, "xy", strict=True) for part in ("--model", f"{name}=served:{model}")]
    argv = [*models, "--server_url", "http://127.0.0.1:1/v1", "--dataset", rows, "--output", str(tmp_path / "report")]
    assert error_of(capsys, argv).endswith(
        f"--model names the runs {names[0]!r}, {names[1]!r}, whose files would have the same name, at least on file "
        "systems that ignore case. Give them names that differ in letters, digits, dots or dashes."
    )
    assert not (tmp_path / "report").exists()


def test_a_missing_data_set_is_named(capsys, tiny_llama, tmp_path):
    argv = ["--model", tiny_llama, "--dataset", str(tmp_path / "x.jsonl"), "--output", str(tmp_path)]
    assert "There is no file or folder" in error_of(capsys, argv)


def test_a_missing_library_names_the_extra():
    code = (
        "import importlib.util as u, sys; find = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name == 'openai' else find(name, *a); "
        "from trl_ulma.scripts.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "evaluate", *NEEDED]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.strip() == (
        "trl-ulma evaluate: error: trl_ulma.evaluation needs openai, which is not installed. Run: pip install "
        "'trl-ulma[evaluation]'"
    )


@pytest.mark.parametrize(("log_z", "normalize"), [("learned_constant", False), (0.7, True), ("learned", False)])
def test_rewards_are_on_the_scale_of_the_training(tiny_llama, tmp_path, log_z, normalize):
    rows = make_rows(12, label=[float(i % 4 > 0) for i in range(12)])
    trainer = make_trainer(
        tiny_llama,
        rows,
        tmp_path / "trainer",
        pointwise=True,
        beta=0.4,
        log_z=log_z,
        log_z_learning_rate=0.1,
        length_normalize=normalize,
        learning_rate=1e-3,
        max_steps=6,
        peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    file = tmp_path / "rows.jsonl"
    rows.to_json(file)
    argv = ["evaluate", "--model", str(tmp_path / "model"), "--dataset", str(file), "--split", "train"]
    assert main([*argv, "--output", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / "report.json").read_text())
    found = facts["models"][0]
    assert found["reward"] == {"beta": 0.4, "length_normalize": normalize}
    predicted = trainer.predict(rows)
    brier = ((1 / (1 + np.exp(-predicted.predictions)) - predicted.label_ids) ** 2).mean()
    assert found["implicit_reward"]["brier"]["value"] == pytest.approx(brier, abs=1e-4)
    # The options come first
    assert main([*argv, "--output", str(tmp_path), "--beta", "0.1", "--log_z", "0"]) == 0
    other = json.loads((tmp_path / "report.json").read_text())["models"][0]
    assert other["implicit_reward"]["brier"]["value"] != pytest.approx(brier, abs=1e-4)


def test_labels_are_read_as_in_the_training(tiny_llama, tmp_path, capsys):
    stars = [float(1 + i % 5) for i in range(12)]
    folders = {}
    for name, transform in (("harm", "lower_is_better,standardize"), ("plain", None)):
        trainer = make_trainer(
            tiny_llama,
            make_rows(12, label=stars),
            tmp_path / "trainer",
            pointwise=True,
            label_type="continuous",
            label_transform=transform,
            learning_rate=1e-3,
            max_steps=6,
            peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        )
        trainer.train()
        folders[name] = str(tmp_path / name)
        trainer.save_model(folders[name])
        if transform:
            scored = trainer.score(make_rows(12, label=stars))
    file = tmp_path / "rows.jsonl"
    make_rows(12, label=stars).to_json(file)
    argv = ["evaluate", "--dataset", str(file), "--split", "train", "--output", str(tmp_path)]
    assert main([*argv, "--model", folders["harm"]]) == 0
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["data"]["label_type"] == "continuous"
    assert facts["data"]["label_transform"].startswith("lower_is_better:0,standardize:-2.75,")
    found = facts["models"][0]["implicit_reward"]
    transformed = (np.mean(stars) - np.array(stars)) / np.std(stars)
    assert found["spearman"]["value"] == pytest.approx(spearmanr(scored["reward"], transformed)[0])
    assert found["mse"]["value"] == pytest.approx(((scored["reward"] - transformed) ** 2).mean(), rel=1e-4)
    assert found["mse"]["value"] == pytest.approx(np.mean(scored["surprise"]), rel=1e-4)

    # Side by side they are compared with the same labels, and that is said
    capsys.readouterr()
    assert main([*argv, "--model", folders["harm"], "--model", folders["plain"]]) == 0
    notes = json.loads((tmp_path / "report.json").read_text())["notes"]
    [how_read] = json.loads((tmp_path / "report.json").read_text())["how_read"]
    assert how_read.startswith(f"Labels are read as in the training of {folders['harm']}: continuous labels after")
    begin = [
        f"{folders['plain']} was trained on continuous labels as they are, and the rows here",
        *(f"Rows whose prompt was in the training data of the model {name}: 12 of 12." for name in ("harm", "plain")),
    ]
    assert [[note.startswith(each) for note in notes].count(True) for each in begin] == [1] * len(notes)
    shown = capsys.readouterr().err
    assert [note for note in [how_read, *notes] if note not in shown] == []

    # Likes and dislikes are no stars
    make_rows(12, label=[star > 3 for star in stars]).to_json(tmp_path / "likes.jsonl")
    likes = [*argv, "--model", folders["plain"], "--dataset", str(tmp_path / "likes.jsonl")]
    assert main(likes) == 0
    assert "All labels of the rows are 0 or 1 (false or true)" in capsys.readouterr().err

    # Pairs have labels of their own, and "none" is a transform, too
    pairs = tmp_path / "pairs.jsonl"
    Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * 2).to_json(pairs)
    other = [*argv, "--model", folders["harm"]]
    other[other.index(str(file))] = str(pairs)
    assert main([*other, "--generate", "--max_new_tokens", "2"]) == 0
    facts = json.loads((tmp_path / "report.json").read_text())
    assert (facts["data"]["label_type"], facts["data"]["label_transform"]) == ("binary", None)
    assert "auc" in facts["models"][0]["implicit_reward"]
    assert main([*argv, "--model", folders["harm"], "--label_transform", "none"]) == 0
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["data"]["label_transform"] is None
    assert facts["models"][0]["implicit_reward"]["spearman"]["value"] == pytest.approx(-found["spearman"]["value"])
    assert main([*argv, "--model", folders["harm"], "--label_transform", "standardize"]) == 1
    assert "has no numbers, which a training fits on its own rows" in capsys.readouterr().err


@pytest.mark.parametrize("transform", ["quantile", "lower_is_better,standardize", None])
def test_ratings_are_split_as_in_the_trainings_evaluation_and_shown_as_they_are(tiny_llama, tmp_path, transform):
    trainer = make_trainer(
        tiny_llama,
        make_rows(12, label=[float(1 + i % 4) for i in range(12)]),
        tmp_path / "model",
        pointwise=True,
        label_type="continuous",
        label_transform=transform,
        beta=0.5,
        learning_rate=1e-2,
        max_steps=3,
        label_report=False,
    )
    trainer.train()
    trainer.save_model()
    stars = [0.0, 1, 2, 3, 4, 7, 1, 3, 2]  # 0 and 7 are beyond those of the training
    rows = make_rows(9, label=stars)
    logged = trainer.evaluate(rows)
    rows.to_json(tmp_path / "rows.jsonl")
    argv = ["evaluate", "--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "rows.jsonl")]
    assert main([*argv, "--split", "train", "--output", str(tmp_path / "report")]) == 0
    facts = json.loads((tmp_path / "report" / "report.json").read_text())
    tuned, base = facts["models"]
    assert base["is_base"]
    for name in ("chosen", "rejected", "margins", "accuracies"):
        assert tuned["split"][name]["value"] == pytest.approx(logged[f"eval_rewards/{name}"], abs=1e-4), name
        if name != "accuracies":
            assert base["split"][name]["value"] == 0
    # Its reward is at the center of standardized stars, and below that of others, as are 5 of 9 rows
    at_center = transform is not None and transform.startswith("lower")
    assert base["split"]["accuracies"]["value"] == pytest.approx(0.5 if at_center else 5 / 9)
    assert facts["data"]["label_center"] == pytest.approx(2.5)
    text = (tmp_path / "report" / "report.md").read_text()
    higher = "below" if transform and transform.startswith("lower") else "above"
    mean = f"the {'middle' if transform == 'quantile' else 'mean'} label of the training rows"
    assert f"The mean reward of rows with a label of 2.5 ({mean}) or {higher}, and of the others." in text
    # Stars are stars
    assert facts["data"]["labels"] == {"0": 1, "1": 2, "2": 2, "3": 2, "4": 1, "7": 1}
    assert [(each["label"], each["rows"]) for each in tuned["own_scale"]["by_label"]] == [
        *[(0, 1), (1, 2), (2, 2), (3, 2), (4, 1), (7, 1)]
    ]
    assert {each["row"]: each["label"] for each in tuned["surprises"]} == dict(enumerate(stars))
    rewards = (tmp_path / "report" / "rewards" / "model.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in rewards] == stars
    said = "2 of 9 labels are outside the range of the training labels, 1 to 4. The transform quantile reads them"
    assert any(note.startswith(said) for note in facts["notes"]) == (transform == "quantile")


def test_without_a_training_rows_are_split_at_their_own_mean(tiny_llama, adapters, tmp_path):
    make_rows(6, label=[0.0, 1.0, 2.0, 3.0, 4.0, 8.0]).to_json(tmp_path / "rows.jsonl")
    argv = ["evaluate", "--model", adapters[0], "--dataset", str(tmp_path / "rows.jsonl"), "--split", "train"]
    assert main([*argv, "--label_type", "continuous", "--output", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["data"]["label_center"] == 3
    assert "(the mean label of the evaluated rows) or above" in (tmp_path / "report.md").read_text()
    assert any(note.startswith("The mean of the training labels is not known, so rows") for note in facts["notes"])
    rewards = [json.loads(line) for file in (tmp_path / "rewards").iterdir() for line in file.read_text().splitlines()]
    chosen = [each["reward"] for each in rewards if each["label"] >= 3]
    # Answers are compared with those of good ratings
    assert main([*argv, "--label_type", "continuous", "--output", str(tmp_path / "all"), "--generate"]) == 0
    assert facts_in(tmp_path / "all")["data"]["questions"] == 3
    assert facts["models"][0]["split"]["chosen"]["value"] == pytest.approx(np.mean(chosen))


def test_the_training_that_is_taken_over_is_the_first_that_fits(tmp_path):
    def saved(name, **settings):
        (tmp_path / name).mkdir()
        SavedSettings(beta=0.1, **settings).write(tmp_path / name)
        return str(tmp_path / name)

    (tmp_path / "base").mkdir()
    base = str(tmp_path / "base")
    thumbs = saved("thumbs", max_length=64, truncation_mode="keep_end")
    by_rank = [
        saved(
            f"ranks-{most}",
            label_type="continuous",
            sft_threshold=0.5,
            label_transform=parse_transform("quantile", "continuous").fit(np.linspace(1, most, 9), None, None),
        )
        for most in (5, 50)
    ]
    found = as_trained([base, thumbs, *by_rank])
    assert (found.rules.label_type, found.rules.transform) == ("binary", None)
    assert (found.max_length, found.truncation_mode) == (64, "keep_end")
    found = as_trained([base, thumbs, *by_rank], label_type="continuous", max_length=32)
    assert found.rules.sft_threshold == 0.5
    assert found.rules.transform.apply(np.array([5.0]), None, None) > 0.9
    assert (found.max_length, found.truncation_mode) == (32, "keep_start")
    # Two fits of one setting are two transforms, though they are called the same
    assert found.read_as.startswith(f"Labels are read as in the training of {by_rank[0]}: continuous labels after")
    assert [note.split(" was trained")[0] for note in found.notes] == [thumbs, by_rank[1], thumbs]
    # What is not given as an option is the first fitting model's, and another one's is told
    assert "rows that were read in another way (truncation_mode keep_end, here keep_start)." in found.notes[2]
    assert as_trained([by_rank[0]], is_paired=True).max_length is None
    chats = saved("chats", label_type="continuous", max_length=9, chat="true")
    assert as_trained([chats], is_paired=True).chat == "true"  # pairs are binary, and read as any rows of this model
    found = as_trained([base, *by_rank], sft_threshold=0.9, is_paired=True)
    assert found.rules == LabelRules("binary", 0.9)
    assert (found.notes, found.read_as) == ([], None)
    assert as_trained([base]).rules == LabelRules()
    # Likes and dislikes are no stars
    said = (
        f"All labels of the rows are 0 or 1 (false or true), and {chats} was trained on continuous labels as they are"
    )
    [note] = as_trained([chats], labels=[True, False, None]).notes
    assert note.startswith(said)
    assert [as_trained([chats], labels=labels).notes for labels in ([1, 0, 3], [0.5, 1], [])] == [[], [], []]
    assert len(as_trained([thumbs], labels=[1, 0]).notes) == len(as_trained([thumbs]).notes)


def test_held_out_votes_are_rates_as_in_the_training():
    rows = make_rows(4, label=[9, 1, 0, 4]).add_column("trials", [10, 10, 3, 4])
    rules = LabelRules("binary", transform=parse_transform("votes:1,1", "binary"))
    held_out = HeldOut.of(rows, "test", rules)
    assert held_out.label.tolist() == pytest.approx([10 / 12, 2 / 12, 1 / 5, 5 / 6])
    assert held_out.rows["label"][:] == held_out.label.tolist()
    pairs = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    assert HeldOut.of(pairs, "test", LabelRules()).label.tolist() == [1, 0]
    with pytest.raises(ValueError, match="The test dataset is paired, so its labels are 1 and 0, and not on the scale"):
        HeldOut.of(pairs, "test", rules)
