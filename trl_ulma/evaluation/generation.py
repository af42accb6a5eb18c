"""Generates answers to prompts with a local model or a server, and caches them in a file."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import is_peft_model
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from trl_ulma.evaluation.records import RecordFile, digest
from trl_ulma.evaluation.refusals import PASSING, Why
from trl_ulma.evaluation.repetition import Repetition
from trl_ulma.evaluation.server import Refusal, Reply, Server
from trl_ulma.evaluation.turns import opens_reasoning, show_calls, split_reasoning
from trl_ulma.rows.turns import ends_of_answers

_WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.gguf", "*.jinja")


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        max_new_tokens: length limit of an answer in tokens.
        temperature: 0 always takes the most likely token.
        top_p: sampling uses the most likely tokens with this total probability.
        seed: seed of the sampling.

    Raises:
        ValueError: if a value is out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or above; got {self.max_new_tokens}.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or above; got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1; got {self.top_p}.")
        if not -(2**62) <= self.seed <= 2**62:  # of a generator, which takes 64 bits, with room for later seeds
            raise ValueError(f"seed must be within ±2**62; got {self.seed}.")


class Generator(Protocol):
    """The interface of `TransformersGenerator` and `ServerGenerator`.

    Attributes:
        identity: identifies all that an answer depends on, except the prompt and the sampling.
    """

    identity: str

    def text_of(self, prompt: Any) -> str | list[dict[str, Any]]:
        """Return a prompt in readable form."""
        ...

    def __call__(
        self,
        prompts: Sequence[Any],
        wanted: Sequence[int],
        sampling: Sampling,
        seed: int,
        done: Callable[[int, Reply], None],
    ) -> None:
        """Answer prompts of a batch, and call `done` with the position of each prompt and its answer.

        Args:
            prompts: all prompts of the batch. With the seed, they decide what is sampled.
            wanted: the positions of the prompts whose answers are missing.
            sampling: how answers are sampled.
            seed: the seed of the batch.
            done: called with each answer.
        """
        ...


class TransformersGenerator:
    """Generates answers with a causal language model, in batches padded on the left.

    Prompts are token ids, from `prompt_ids` of `Preparation`, so the model reads them as in training.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer, with a pad token.
        name: where the model was loaded from. The keys of answers contain the sizes and times of its files, the base
            model of an adapter and its files, the commit on the Hub, the dtype and quantization of the weights, and
            the tokens that end an answer. A model that was trained again in the same place is therefore asked again.
        positions: the largest number of tokens that the model can read, or None.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, name: str, positions: int | None = None):
        self.model, self.tokenizer, self.positions = model, tokenizer, positions
        base = model.peft_config[model.active_adapter].base_model_name_or_path if is_peft_model(model) else None
        files = [_files(Path(each)) for each in (name, base) if each]
        commit, quantized = (getattr(model.config, key, None) for key in ("_commit_hash", "quantization_config"))
        self.ends = ends_of_answers(model, tokenizer)
        loaded = (str(model.dtype), commit, quantized and str(quantized), self.ends)
        self.identity = digest(name, base, files, *loaded)

    def text_of(self, prompt: Sequence[int]) -> str:
        """Return the tokens of a prompt as text."""
        return str(self.tokenizer.decode(list(prompt)))

    def check(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Raise ValueError if a prompt is empty, or if prompt and answer are longer than the model can read."""
        for number, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"Prompt {number} has no tokens, and there is no answer to nothing. Drop its row.")
            if self.positions is not None and len(prompt) + sampling.max_new_tokens > self.positions:
                raise ValueError(
                    f"Prompt {number} has {len(prompt)} tokens, which with an answer of {sampling.max_new_tokens} is "
                    f"more than the model's {self.positions:,} positions. Set max_length="
                    f"{self.positions - sampling.max_new_tokens}: rows with longer prompts are left out then, and "
                    "counted. Or lower max_new_tokens."
                )

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        wanted: Sequence[int],
        sampling: Sampling,
        seed: int,
        done: Callable[[int, Reply], None],
        printer: "AnswerPrinter | None" = None,
    ) -> None:
        """Answer prompts of a batch. The whole batch is generated, because its rows draw from one random state.

        Args:
            prompts, wanted, sampling, seed, done: see `Generator`.
            printer: prints the answer to a single prompt. It can stop the answer.

        Raises:
            ValueError: if a prompt is empty or too long.
        """
        self.check(prompts, sampling)
        inputs = self.tokenizer.pad(
            {"input_ids": [list(prompt) for prompt in prompts]}, padding_side="left", return_tensors="pt"
        ).to(self.model.device)
        drawn = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature > 0:
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.inference_mode(), _plain(self.model):
            torch.manual_seed(seed)
            generated = self.model.generate(
                **inputs,
                **drawn,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=self.ends or None,
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=printer,
                stopping_criteria=None if printer is None else StoppingCriteriaList([_Stop(printer)]),
            )
        answers = generated[:, inputs["input_ids"].size(1) :].tolist()
        for place in wanted:
            ids = answers[place] if printer is None else answers[place][: printer.kept]
            end = next((i for i, token in enumerate(ids) if token in self.ends), None)
            is_open = opens_reasoning(self.text_of(prompts[place][-8:]))
            reasoning, text = self._split(ids[:end], is_open=is_open, is_cut=end is None)
            done(place, Reply(show_calls(text), end is not None, reasoning))

    def reply(self, prompt: Sequence[int], sampling: Sampling, seed: int, printer: "AnswerPrinter") -> Reply:
        """Return the answer to one prompt, which is printed while it is generated."""
        found: list[Reply] = []
        self([prompt], [0], sampling, seed, lambda _, reply: found.append(reply), printer)
        return found[0]

    def _split(self, ids: list[int], *, is_open: bool, is_cut: bool) -> tuple[str, str]:
        """(reasoning, answer) of generated tokens. Special tokens can separate the two, and are removed from both."""
        reasoning, text = split_reasoning(str(self.tokenizer.decode(ids)), is_open=is_open, is_cut=is_cut)
        if not reasoning:
            written = str(self.tokenizer.decode(ids, skip_special_tokens=True))
            return split_reasoning(written, is_open=is_open, is_cut=is_cut)
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        without = re.compile("|".join(map(re.escape, special)) or "(?!)")
        return without.sub("", reasoning).strip(), without.sub("", text).strip()


class AnswerPrinter(TextStreamer):
    """Prints an answer to stdout while it is generated, without the tokens that end it, which may be no special ones.

    Tokens that repeat the ones before them are printed when something else follows. If they go on, the answer is
    stopped, and they are left out.

    Args:
        generator: generates the answer.
        allow_repetition: whether to print all tokens at once, and not to stop the answer.
    """

    def __init__(self, generator: TransformersGenerator, *, allow_repetition: bool = False):
        super().__init__(generator.tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self.ends = generator.ends
        self.allow_repetition = allow_repetition
        self._repetition = Repetition(lambda ids: str(self.tokenizer.decode(list(ids), skip_special_tokens=True)))
        self._printed = 0

    @property
    def kept(self) -> int | None:
        """How many tokens of an answer that repeats itself are printed. None if the answer is not stopped."""
        return None if self.allow_repetition else self._repetition.kept

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and then each token."""
        token = int(value.flatten()[-1])
        if self.allow_repetition or self.next_tokens_are_prompt:
            if self.next_tokens_are_prompt or token not in self.ends:
                super().put(value)
        elif token not in self.ends:
            self._repetition.add(token)
            self._print(len(self._repetition.tokens) - self._repetition.undecided)

    def end(self) -> None:
        """Print what is left of the answer."""
        self._print(self.kept)
        super().end()

    def _print(self, stop: int | None) -> None:
        """Print the tokens up to a place; with None all."""
        for token in self._repetition.tokens[self._printed : stop]:
            super().put(torch.tensor([token]))
            self._printed += 1


class _Stop(StoppingCriteria):
    """Stops an answer that repeats itself."""

    def __init__(self, printer: AnswerPrinter):
        self.printer = printer

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        """Whether each row of the batch, which is one, is stopped."""
        return torch.full((len(input_ids),), self.printer.kept is not None, device=input_ids.device)


class ServerGenerator:
    """Gets answers from a model on a server. Prompts are messages, or text to continue.

    The keys of answers contain the URL of the server and the name of the model. If a server now has another model under
    the same name, use another file for its answers.
    """

    def __init__(self, server: Server):
        self.server = server
        self.identity = digest("server", server.base_url, server.model)

    def text_of(self, prompt: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        """Return the prompt itself."""
        return prompt

    def __call__(
        self,
        prompts: Sequence[Any],
        wanted: Sequence[int],
        sampling: Sampling,
        seed: int,
        done: Callable[[int, Reply], None],
    ) -> None:
        """Answer prompts of a batch. If the server refuses a prompt, the reply says why.

        Raises:
            ServerError: if the server does not answer. Earlier answers are kept.
        """

        def answer(place: int) -> None:
            drawn: dict[str, Any] = {"temperature": sampling.temperature}
            if sampling.temperature > 0:  # otherwise nothing is sampled, and strict servers refuse these parameters
                drawn |= {"top_p": sampling.top_p, "seed": (seed + place) % 2**31}
            try:
                reply = self.server.ask(prompts[place], max_tokens=sampling.max_new_tokens, **drawn)
            except Refusal as refusal:
                reply = Reply("", True, refused=refusal.why)
            done(place, reply)

        self.server.each(answer, wanted)


def generate(
    generator: Generator,
    prompts: Sequence[Any],
    path: Path,
    sampling: Sampling,
    *,
    batch_size: int = 8,
    resume: bool = True,
    retry_refused: bool = False,
) -> list[Reply]:
    """Return an answer to each prompt, in order. Answers in the file are used again, and new ones are added to it.

    Repeated prompts are answered once. All prompts together determine the batches and their seeds, so a run that was
    stopped and resumed gives the same answers as an uninterrupted one. The key of an answer depends on the model, the
    prompt and the sampling, so one file can hold the answers of several models.

    Args:
        generator: the generator.
        prompts: prompts in the form that the generator accepts.
        path: the file, JSON lines with `prompt`, `answer` and `finished`.
        sampling: how answers are sampled.
        batch_size: prompts per batch.
        resume: whether to use answers of earlier runs.
        retry_refused: whether to ask again if a server refused in an earlier run.

    Example:
        >>> replies = generate(generator, rows["prompt_ids"], Path("answers.jsonl"), Sampling())  # doctest: +SKIP
    """
    if isinstance(generator, TransformersGenerator):
        generator.check(prompts, sampling)  # all of them, before the slow part starts
    kept = RecordFile(path, resume=resume, text="answer")
    keys = [digest(generator.identity, asdict(sampling), prompt) for prompt in prompts]
    by_key = dict(zip(keys, prompts, strict=True))
    order = sorted(by_key, key=lambda key: (-len(by_key[key]), key))
    missing = {key for key in order if (record := kept.get(key)) is None or (retry_refused and "refused" in record)}
    passing: dict[str, Reply] = {}
    with tqdm(total=len(missing), desc="Generating", unit="answer") as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            wanted = [place for place, key in enumerate(batch) if key in missing]
            if not wanted:
                continue

            def done(place: int, reply: Reply, batch: list[str] = batch) -> None:
                if reply.refused in PASSING:
                    passing[batch[place]] = reply
                else:
                    prompt = generator.text_of(by_key[batch[place]])
                    record = {"prompt": prompt, "answer": reply.text, "finished": reply.finished}
                    more = {"reasoning": reply.reasoning, "refused": reply.refused, "changes": list(reply.changes)}
                    more["answered_by"] = reply.answered_by
                    kept.add(batch[place], record | {name: value for name, value in more.items() if value})
                bar.update()

            seed = int(digest(sampling.seed, batch)[:8], 16)
            generator([by_key[key] for key in batch], wanted, sampling, seed, done)
    return [passing.get(key) or _reply(kept.get(key) or {}) for key in keys]


@contextmanager
def _plain(model: Any) -> Iterator[None]:
    """A context without the model's own settings of `generate`, such as a penalty on repetitions.

    Compared models would differ by them. `generate` takes from them whatever it is not given.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _reply(record: Mapping[str, Any]) -> Reply:
    """Return the reply that a record holds."""
    refused = Why(record["refused"]) if "refused" in record else None
    return Reply(
        record.get("answer", ""),
        record.get("finished", True),
        record.get("reasoning", ""),
        refused,
        changes=tuple(record.get("changes", ())),
        answered_by=record.get("answered_by", ""),
    )


def _files(folder: Path) -> list[list[Any]]:
    """Return names, sizes and times of files, which distinguish a checkpoint from an earlier one in the same place."""
    files = sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern)) if folder.is_dir() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
