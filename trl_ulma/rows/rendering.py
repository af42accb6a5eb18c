"""From a checked row to its token ids: rendered, tokenised and cut."""

# transformers declares a tokenizer's tokens to be of many kinds
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportAssignmentType=false

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from trl_ulma.labels import shown
from trl_ulma.rows.images import check_text_places, with_placeholders

logger = logging.get_logger(__name__)

NO_TOKENS = "nothing of its completion is left in its tokens, as where a chat template leaves it out"
PROMPT_FILLS = "its prompt alone fills max_length"
NOTHING_TO_SCORE = "it has no token to score: the prompt is empty and the completion a single token"

_OURS = {"tokenize", "add_generation_prompt", "continue_final_message"}


def own_processing_class(
    processing_class: Any, source: str, pad_token: str | None, *, revision: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The tokenizer, or a vision-language model's processor, to prepare rows with, that of the model at `source` where
    none is given; it has a pad token.

    Raises:
        TypeError: for what is neither.
        ValueError: where no pad token can be found.
    """
    if processing_class is None:
        processing_class = AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    tokenizer = tokenizer_of(processing_class)
    pad_token = pad_token or tokenizer.pad_token or tokenizer.eos_token
    if pad_token is None:
        raise ValueError("The tokenizer has neither a pad nor an EOS token. Set tokenizer.pad_token.")
    if pad_token not in tokenizer.get_vocab():
        raise ValueError(f"The pad_token {pad_token!r} is not in the tokenizer's vocabulary. Choose one that is.")
    tokenizer.pad_token = pad_token
    return processing_class


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or that of a processor of images and text.

    Raises:
        TypeError: for what is neither.
    """
    if isinstance(processing_class, ProcessorMixin) and hasattr(processing_class, "image_processor"):
        processing_class = processing_class.tokenizer
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            "processing_class must be a tokenizer, or a processor of images and text; got "
            f"{type(processing_class).__name__}. To train on text alone, pass the processor's `tokenizer`."
        )
    return processing_class


def processor_of(processing_class: Any) -> ProcessorMixin | None:
    """The processor itself, of a policy that takes images; None for a tokenizer."""
    return processing_class if isinstance(processing_class, ProcessorMixin) else None


@dataclass(frozen=True)
class Encoder:
    """What makes token ids of the rows of one data set.

    Attributes:
        processing_class: the policy's tokenizer, or its processor.
        is_text: whether prompts and completions are text; else they are messages.
        has_images: whether prompts may have images. They are tokenised apart from their completions then, since their
            tokens are not known before their images are.
        max_length: longest sequence in tokens, or None.
        truncation_mode: "keep_start" or "keep_end".
    """

    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    is_text: bool
    has_images: bool
    max_length: int | None
    truncation_mode: str

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the policy."""
        return tokenizer_of(self.processing_class)

    @property
    def processor(self) -> ProcessorMixin | None:
        """Of a policy that takes images, or None."""
        return processor_of(self.processing_class)

    def render(self, columns: Mapping[str, list], i: int, images: int, at: str) -> tuple[str, str]:
        """What `tokenise` takes of row `i`, which has so many images: (prompt, prompt and completion) as text, the
        special tokens of a conversation included; where there may be images, (prompt, completion).

        Raises:
            ValueError: naming the row.
        """
        prompt, completion = columns["prompt"][i], columns["completion"][i]
        tokenizer, processor = self.tokenizer, self.processor
        if isinstance(prompt, str) != self.is_text:
            kind = (
                "a list of messages and the first row's is text" if self.is_text else "text and the first row's is not"
            )
            raise ValueError(f"{at}: prompt is {kind}. Train on one kind, or write the messages out as text.")
        if self.is_text:
            eos = "" if completion.endswith(tokenizer.eos_token) else tokenizer.eos_token
            texts = prompt, prompt + completion + eos
            if processor is not None and self.has_images:
                check_text_places(processor, prompt, images, at)
        else:
            render = partial(
                self.processing_class.apply_chat_template, tokenize=False, **self._template_kwargs(columns, i, at)
            )
            prompt, completion = _without_nones(prompt), _without_nones(completion)
            if processor is not None:
                prompt, completion = with_placeholders(prompt, images, at), with_placeholders(completion, 0, at)
            try:
                texts = str(render(prompt, add_generation_prompt=True)), str(render(prompt + completion))
            except Exception as error:  # a template is a program
                raise ValueError(
                    f"{at}: the chat template fails on it ({type(error).__name__}: {error}). Mend the row, or set "
                    "another tokenizer.chat_template."
                ) from error
        for text in texts:
            if not _is_unicode(text):
                raise ValueError(
                    f"{at}: its text holds half of a surrogate pair, which is no character. Drop the row, or mend the "
                    'text: text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").'
                )
        return self._apart(*texts) if self.has_images else texts

    @staticmethod
    def _template_kwargs(columns: Mapping[str, list], i: int, at: str) -> dict[str, Any]:
        tools = columns["tools"][i] if "tools" in columns else None
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except ValueError as error:
                raise ValueError(f"{at}: tools is text that is not JSON ({error}).") from error
        else:
            tools = _without_nones(tools)
        are_tools = isinstance(tools, list) and all(isinstance(tool, dict) or callable(tool) for tool in tools)
        if tools is not None and not are_tools:
            raise ValueError(f"{at}: tools is {shown(tools)}; it must be a list of JSON schemas, or that list as JSON.")
        kwargs = _without_nones(columns["chat_template_kwargs"][i]) if "chat_template_kwargs" in columns else None
        if not isinstance(kwargs, dict | None):
            raise ValueError(f"{at}: chat_template_kwargs is {shown(kwargs)}; it must be a dict.")
        set_by_us = sorted(_OURS.intersection(kwargs or {}))
        if set_by_us:
            raise ValueError(f"{at}: chat_template_kwargs sets {', '.join(set_by_us)}, as only the trainer may.")
        return {"tools": tools, **(kwargs or {})}

    def tokenise(self, texts: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, completion ids) of each row; a batch's texts are tokenised together, each once."""
        unique = list(dict.fromkeys(text for both in texts for text in both))
        if not unique:
            return []
        # A chat template writes the special tokens itself, and `_apart` those of texts
        special = self.is_text and not self.has_images
        bos, adds_eos = self._added() if special else ("", False)
        # What the tokenizer adds is not added to what a text has of it already
        plain = [text.removeprefix(bos) for text in unique]
        ids = self.tokenizer(plain, add_special_tokens=special, return_attention_mask=False, verbose=False)
        ids_of = {text: each[:-1] if adds_eos else each for text, each in zip(unique, ids["input_ids"], strict=True)}
        if self.has_images:
            return [(ids_of[prompt], ids_of[completion]) for prompt, completion in texts]
        return [self._split(ids_of[prompt], ids_of[whole]) for prompt, whole in texts]

    def _apart(self, prompt: str, whole: str) -> tuple[str, str]:
        """(prompt, completion) of a row that may have images, with the token that begins a text."""
        differ = (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b)
        begin = prompt[: next(differ, min(len(prompt), len(whole)))]
        if begin != prompt:
            logger.warning_once(
                "The chat template renders a prompt alone in another way than with its completion. The completion "
                f"starts where the two part, and {prompt[len(begin) :]!r} is no part of the prompt that is trained on. "
                "(Said once; other rows may be alike.)"
            )
        bos = self._added()[0] if self.is_text else ""
        return (begin if begin.startswith(bos) else bos + begin), whole[len(begin) :]

    def _added(self) -> tuple[str, bool]:
        """(the token that the tokenizer begins texts with by itself, or "", whether it ends them with EOS)."""
        tokenizer = self.tokenizer
        ids = tokenizer("a")["input_ids"]
        bos = str(tokenizer.bos_token) if ids[:1] == [tokenizer.bos_token_id] else ""
        return bos, ids[-1:] == [tokenizer.eos_token_id]

    def _split(self, prompt: list[int], whole: list[int]) -> tuple[list[int], list[int]]:
        """`whole` cut where it and the prompt's own tokens part, which can be before the prompt's end."""
        cut = len(prompt)
        if whole[:cut] != prompt:
            cut = next(i for i, (a, b) in enumerate(zip([*prompt, -1], [*whole, -2], strict=False)) if a != b)
            logger.warning_once(
                "A tokenized prompt is not how its tokenized prompt and completion begin, since the chat template "
                "renders the prompt alone in another way or tokens merge across the boundary. The completion starts "
                f"where the two part, and {self.tokenizer.decode(prompt[cut:])!r} is no part of the prompt that is "
                "trained on. End prompts on a token boundary to avoid it. (Said once; other rows may be alike.)"
            )
        return whole[:cut], whole[cut:]

    def truncate(
        self, prompt: list[int], completion: list[int], added: int
    ) -> tuple[list[int], list[int], bool, str | None]:
        """(prompt, completion, whether anything was cut, why the row is to be left out or None); images add `added`
        tokens to the prompt."""
        if not completion:
            return [], [], False, NO_TOKENS
        excess = 0
        if self.max_length is not None:
            excess = len(prompt) + added + len(completion) - self.max_length
        if excess > 0 and self.truncation_mode == "keep_end":
            completion = completion[max(excess - len(prompt), 0) :]
            prompt = prompt[excess:]
        elif excess > 0:
            completion = completion[:-excess] if excess < len(completion) else []
        if not completion:
            return [], [], False, PROMPT_FILLS
        if not prompt and len(completion) == 1:
            return [], [], False, NOTHING_TO_SCORE
        return prompt, completion, excess > 0, None


def _without_nones(value: Any) -> Any:
    """Messages, tools or settings without the keys that Arrow fills with None because those of other rows have them, as
    the arguments of another tool."""
    if isinstance(value, dict):
        return {key: _without_nones(each) for key, each in value.items() if each is not None}
    return [_without_nones(each) for each in value] if isinstance(value, list) else value


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded, which one with half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
