"""What is measured of a cell's model on the held-out rows, and what a judge says of its answers."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trl.trainer.utils import hash_module

from trl_ulma.data.files import load_rows
from trl_ulma.evaluation.as_trained import reward_scale
from trl_ulma.evaluation.generation import Sampling, TransformersGenerator, generate
from trl_ulma.evaluation.held_out import HeldOut, Question, known_comparisons
from trl_ulma.evaluation.implicit_reward import binary_figures, continuous_figures, implicit_reward
from trl_ulma.evaluation.judges import Comparison, Judge, ProfanityJudge, RewardModelJudge, Verdict
from trl_ulma.evaluation.llm_judge import LLMJudge
from trl_ulma.evaluation.perplexity import perplexity
from trl_ulma.evaluation.rates import mean_points
from trl_ulma.evaluation.records import digest
from trl_ulma.evaluation.server import Server
from trl_ulma.labels import LabelRules
from trl_ulma.likelihood.table import completion_logps, prompt_states
from trl_ulma.rows.preparation import Preparation
from trl_ulma.saved import load_model, load_tokenizer, positions

JUDGES = "llm:MODEL, reward:CHECKPOINT or profanity"


def held_out(file: Path, label_type: str) -> tuple[HeldOut, list[Question]]:
    """The held-out rows, and their prompts with an answer to compare with."""
    rows: Dataset = load_rows(file)["train"]
    found = HeldOut.of(rows, "test", LabelRules(label_type))
    return found, found.questions(None, 0)


def measure(
    source: str, test: Path, settings: Mapping[str, Any], answers: Path, reference: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Log-probabilities of the held-out rows, the figures that follow from them, and answers to their prompts.

    Args:
        source: the folder of the model or its adapters, or its name on the hub.
        test: the file of held-out rows.
        settings: of the cell.
        answers: a file of answers, gone on with where it is there.
        reference: what this function returned of the untrained model; None for that model itself.

    Returns:
        `logps`, `tokens`, `demonstration` and `prompt` (of each row), `perplexity`, `perplexity_others`,
        `implicit_reward`, `answers` (`row`, `answer`, `finished`), `seconds`.
    """
    started = time.perf_counter()
    rows, questions = held_out(test, settings["rows"]["label_type"])
    tokenizer, most = load_tokenizer(source), positions(source)
    how = Preparation(tokenizer, LabelRules(settings["rows"]["label_type"]), None, "keep_start", most, False)
    prepared: Any = how(rows.rows, "test")
    if len(prepared) != len(rows.rows):
        raise ValueError(
            f"{len(rows.rows) - len(prepared)} of {len(rows.rows)} held-out rows of {test} cannot be scored."
        )
    scoring = load_model(source, dtype="float32")
    with torch.autocast(scoring.device.type, torch.bfloat16, enabled=settings["bf16"]):
        logps, tokens = completion_logps(scoring, prepared, batch_size=settings["scoring_batch_size"])
        states = partial(prompt_states, scoring, prepared, batch_size=settings["scoring_batch_size"])
        figures = _figures(rows, logps, tokens, reference, source, settings["beta"], states)
    del scoring, states
    _free()
    scored = time.perf_counter()
    found: dict[str, Any] = {
        "logps": logps.tolist(),
        "tokens": tokens.tolist(),
        "demonstration": rows.sft_mask.tolist(),
        "prompt": rows.prompt.tolist(),
        **figures,
    }
    generating = load_model(source, dtype="bfloat16" if settings["bf16"] else "float32")
    generator = TransformersGenerator(generating, tokenizer, source, most)
    ids = dict(zip(prepared["row"], prepared["prompt_ids"], strict=True))
    sampling = Sampling(settings["answers"]["max_new_tokens"])
    prompts = [ids[each.row] for each in questions]
    replies = generate(generator, prompts, answers, sampling, batch_size=settings["answers"]["batch_size"])
    found["answers"] = [
        {"row": question.row, "answer": reply.text, "finished": reply.finished}
        for question, reply in zip(questions, replies, strict=True)
    ]
    del generating, generator
    _free()
    found["seconds"] = {"scoring": scored - started, "answering": time.perf_counter() - scored}
    return found


def _figures(
    rows: HeldOut,
    logps: np.ndarray,
    tokens: np.ndarray,
    reference: Mapping[str, Any] | None,
    source: str,
    beta: float,
    states: Callable[[], torch.Tensor],
) -> dict[str, Any]:
    mask = rows.sft_mask
    found: dict[str, Any] = {
        name: perplexity(logps[which], tokens[which], rows.prompt[which])
        for name, which in (("perplexity", mask), ("perplexity_others", ~mask))
        if which.any()
    }
    if reference is None:
        return found
    ref_logps = np.array(reference["logps"])
    if reference["tokens"] != tokens.tolist():
        raise ValueError("The untrained model was measured on other rows. Choose another --output.")
    # The log Z that it was trained with, and means over tokens where it was trained with means
    scale = reward_scale(source, rows.continuous, beta=beta, log_z=None, prompt_states=states)
    per = tokens if scale.length_normalize else 1
    rewards = implicit_reward(logps / per, ref_logps / per, scale.beta, scale.log_z)
    figures = continuous_figures if rows.continuous.all() else binary_figures
    return found | {"implicit_reward": figures(rewards, rows.label, rows.prompt)}


def make_judge(spec: str, criterion: str, cache: Path, options: Mapping[str, Any]) -> Judge:
    """A judge by its name on the command line.

    Args:
        spec: `llm:MODEL`, `reward:CHECKPOINT` or `profanity`.
        criterion: that it is to judge by.
        cache: a file for the verdicts of a language model.
        options: `judge_url` and `key_variable` of a language model's server.

    Raises:
        ValueError: for another name.
    """
    kind, _, name = spec.partition(":")
    if spec == "profanity":
        return ProfanityJudge()
    if kind == "reward" and name:
        return RewardModelJudge(name, criterion)
    if kind == "llm" and name:
        server = Server(name, options.get("judge_url"), key_variable=options.get("key_variable"))
        server.check()
        return LLMJudge(server, cache)
    raise ValueError(f"{spec!r} is no judge; it must be {JUDGES}.")


def identity(judge: Judge) -> str:
    """What tells a judge from another of the same name: what it says of itself before it is asked, and its weights."""
    weights = hash_module(judge.model) if isinstance(judge, RewardModelJudge) else None
    return digest(judge.facts(), weights)


def agreement(judge: Judge, criterion: str, questions: Sequence[Question]) -> dict[str, Any]:
    """How far a judge agrees with the data's own labels on good and bad answers to the same prompts."""
    known = known_comparisons(questions)
    verdicts = judge(known, criterion) if known else []
    return {
        "judge": judge.name,
        "criterion": criterion,
        "facts": judge.facts(),
        "verdicts": list(verdicts),
        "agreement": mean_points(verdicts),
    }


def judged(judge: Judge, criterion: str, questions: Sequence[Question], answers: Sequence[Mapping]) -> dict[str, Any]:
    """The judge's verdicts on a model's answers against the data's chosen ones.

    Raises:
        ValueError: where the answers are to other prompts.
    """
    if [each.row for each in questions] != [each["row"] for each in answers]:
        raise ValueError(
            "The stored answers are to other prompts than the held-out rows have. Choose another --output."
        )
    comparisons = [
        Comparison(question.prompt, each["answer"], question.chosen)
        for question, each in zip(questions, answers, strict=True)
    ]
    verdicts: list[Verdict] = judge(comparisons, criterion)
    return {"criterion": criterion, "verdicts": [verdict.value for verdict in verdicts]}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
