"""From a checked row to its token ids: renders, tokenizes and truncates."""

# In the type hints of transformers, a tokenizer's tokens have many types
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportAssignmentType=false

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

from transformers import AutoProcessor, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from trl_ulma.data.sharegpt import ROLES
from trl_ulma.labels import InvalidRow, shown
from trl_ulma.rows.images import check_text_places, with_placeholders
from trl_ulma.rows.messages import decoded, encoded, joined, left_out_by_template, prints_python, without_nones
from trl_ulma.rows.turns import Span, has_generation_markers, marked_spans, rendered_spans

logger = logging.get_logger(__name__)

NO_TOKENS = "its completion has no tokens, for example because the chat template drops it"
PROMPT_FILLS = "its prompt alone fills max_length"
NO_TURNS = "its assistant turns cannot be found in the output of the chat template; see assistant_only_loss"
CUT_OFF = "max_length cuts off all of its assistant tokens"
# What can be odd about a row that is kept
REPEATED, SPECIAL, NO_TOOLS, ESCAPED, UNUSED = "repeated", "special", "no_tools", "escaped", "unused"
NOTHING_TO_SCORE = "it has no token to score: the prompt is empty and the completion is a single token"

# Roles that chat templates know by convention. A template names any other one that it supports.
_USUAL = frozenset(("system", "developer", "user", "assistant", "tool", "function", "ipython"))
# Characters of a prompt that a completion does not begin with by chance
_REPEATED = 20
# A text in the quotes of JSON or Python, or bytes
_PRINTED = re.compile(r"""b?(?:"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')""")
# Columns that only chat templates read
OF_TEMPLATES = ("tools", "chat_template_kwargs")
_OURS = {"tokenize", "add_generation_prompt", "continue_final_message"}


def own_processing_class(
    processing_class: Any, source: str, pad_token: str | None, *, revision: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The tokenizer, or the processor of a vision-language model, that prepares rows. It has a padding token.

    If `processing_class` is None, that of the model at `source` is loaded.

    Raises:
        TypeError: if `processing_class` is neither a tokenizer nor a processor.
        ValueError: if there is no padding token.
    """
    if processing_class is None:
        processing_class = AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    tokenizer = tokenizer_of(processing_class)
    pad_token = pad_token or tokenizer.pad_token or tokenizer.eos_token
    if pad_token is None:
        raise ValueError("The tokenizer has neither a padding nor an EOS token. Set tokenizer.pad_token.")
    if pad_token not in tokenizer.get_vocab():
        raise ValueError(f"The pad_token {pad_token!r} is not in the tokenizer's vocabulary. Set one that is.")
    tokenizer.pad_token = pad_token
    # save_pretrained writes what a tokenizer was made with, and not what was set since
    tokenizer.init_kwargs["split_special_tokens"] = tokenizer.split_special_tokens
    return processing_class


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the tokenizer of a processor of images and text.

    Raises:
        TypeError: if `processing_class` is neither of them.
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
    """The processor itself, or None for a tokenizer."""
    return processing_class if isinstance(processing_class, ProcessorMixin) else None


class Rendered(NamedTuple):
    """A row as text.

    Attributes:
        prompt: the prompt. For conversations it includes special tokens.
        whole: prompt and completion. If prompts can have images, only the completion.
        spans: the scored characters of `whole`. None scores the whole completion.
        left_out: the reason to leave out the row, or None.
        is_ended: whether the answer ends with a special token.
        odd: what is odd about the row, see `trl_ulma.rows.dropped`.
    """

    prompt: str
    whole: str
    spans: tuple[Span, ...] | None = None
    left_out: str | None = None
    is_ended: bool = True
    odd: tuple[str, ...] = ()


class Tokenized(NamedTuple):
    """A row as token ids. `mask` marks the completion tokens that are scored. None scores all of them."""

    prompt: list[int]
    completion: list[int]
    mask: list[int] | None = None


@dataclass(frozen=True)
class Encoder:
    """Converts the rows of one dataset to token ids.

    Attributes:
        processing_class: the policy's tokenizer or processor.
        is_text: whether prompts and completions are plain text. If not, they are messages.
        has_images: whether prompts can have images. If so, prompts and completions are tokenized separately, because
            the tokens of a prompt depend on its images.
        max_length: the maximum length of a sequence in tokens, or None.
        truncation_mode: "keep_start" or "keep_end".
        assistant_only: whether only the assistant's turns of a completion are scored.
    """

    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    is_text: bool
    has_images: bool
    max_length: int | None
    truncation_mode: str
    assistant_only: bool = True

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        return tokenizer_of(self.processing_class)

    @cached_property
    def processor(self) -> ProcessorMixin | None:
        """The processor of a policy that takes images, or None."""
        return processor_of(self.processing_class)

    def render(self, columns: Mapping[str, list], i: int, images: int) -> Rendered:
        """Render row `i`, which has this number of images, for `tokenize`.

        Raises:
            InvalidRow: if the row cannot be rendered.
        """
        prompt, completion = columns["prompt"][i], columns["completion"][i]
        processor = self.processor
        if isinstance(prompt, str) != self.is_text:
            kind = (
                "a list of messages, but that of the first row is text"
                if self.is_text
                else "text, but that of the first row is a list of messages"
            )
            raise InvalidRow(
                f"is {kind}. Use the same kind for all rows, or write messages as text.",
                "a mix of text and conversations",
                "prompt",
            )
        ends = columns["eos"][i] if "eos" in columns else None
        if not isinstance(ends, bool | None) or (ends is False and not self.is_text):
            remedy = "it must be True or False" if self.is_text else "the chat template ends conversations"
            raise InvalidRow(f"is {shown(ends)}; {remedy}. Remove the column eos.", "eos that is not valid", "eos")
        if not self.is_text:
            return self._render_messages(columns, i, images)
        if processor is not None and images:
            check_text_places(processor, prompt, images)
        whole = prompt + completion
        if ends is not False and not whole.endswith(self._end):
            whole += self._end
        if not _is_unicode(whole):
            raise _no_unicode()
        odd = (*([REPEATED] if _repeats(prompt, completion) else []), *([ESCAPED] if _is_escaped(completion) else []))
        unused = (columns[name][i] for name in OF_TEMPLATES if name in columns)
        if any(isinstance(value, str | list | dict) and value for value in unused):  # an array has no truth value
            odd = (*odd, UNUSED)
        return Rendered(*(self._apart(prompt, whole) if self.has_images else (prompt, whole)), odd=odd)

    def _render_messages(self, columns: Mapping[str, list], i: int, images: int) -> Rendered:
        prompt, completion = columns["prompt"][i], columns["completion"][i]
        kwargs = self._template_kwargs(columns, i)
        prompt, completion = without_nones(prompt), without_nones(completion)
        if self.processor is None:
            prompt, completion = [joined(turn) for turn in prompt], [joined(turn) for turn in completion]
        else:
            prompt, completion = with_placeholders(prompt, images), with_placeholders(completion, 0)
        messages = [decoded(turn) for turn in prompt + completion]
        self._check_roles(messages)
        first = len(prompt)
        render = partial(self.processing_class.apply_chat_template, tokenize=False, **kwargs)
        try:
            whole = str(render(messages))
        except Exception:  # templates can raise any exception; the messages as text are tried next
            whole = None
        as_text = [encoded(turn) for turn in messages]
        if as_text != messages and (whole is None or prints_python(messages, whole)):
            messages, whole = as_text, None  # the template only accepts arguments of tool calls as text
        try:
            whole = str(render(messages)) if whole is None else whole
            begin = str(render(messages[:first], add_generation_prompt=True))
        except Exception as error:  # templates can raise any exception
            raise InvalidRow(
                f"fails on it ({type(error).__name__}: {error}). Correct the row, or set "
                "another tokenizer.chat_template.",
                "the chat template fails",
                "the chat template",
            ) from error
        if not (_is_unicode(begin) and _is_unicode(whole)):
            raise _no_unicode()
        left_out = left_out_by_template(messages, first, whole)
        spans = None
        if left_out is None and self.assistant_only and len(completion) > 1:
            spans = self._spans(messages, first, begin, whole, kwargs)
            left_out = None if spans else NO_TURNS
        is_ended = self._endings.search(whole) is not None
        odd = tuple(self._odd(render, messages, first, whole, bool(kwargs["tools"])))
        if not self.has_images:
            return Rendered(begin, whole, spans, left_out, is_ended, odd)
        begin, answer = self._apart(begin, whole)
        shift = len(whole) - len(answer)
        spans = None if spans is None else tuple((max(a - shift, 0), b - shift) for a, b in spans if b > shift)
        return Rendered(begin, answer, spans, left_out, is_ended, odd)

    def _odd(
        self, render: Any, messages: Sequence[Mapping[str, Any]], first: int, whole: str, has_tools: bool
    ) -> Iterator[str]:
        """What is odd about a conversation that is rendered as `whole`."""
        contents = [turn.get("content") for turn in messages]
        if first and _repeats(contents[first - 1], contents[first]):
            yield REPEATED
        if _is_escaped(contents[first]):
            yield ESCAPED
        is_read = self.processor is None and not self.tokenizer.split_special_tokens
        if is_read and any(self._special.search(content) for content in contents if isinstance(content, str)):
            yield SPECIAL
        if has_tools:
            try:
                is_same = str(render(messages, tools=None)) == whole
            except Exception:  # templates can raise any exception
                is_same = False
            if is_same:
                yield NO_TOOLS

    def _check_roles(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raise InvalidRow for a role such as "human", which many templates print as if it were one of theirs."""
        for role in dict.fromkeys(turn["role"] for turn in messages):
            if role in _USUAL or re.search(rf"""['"]{re.escape(role)}\b""", str(self.processing_class.chat_template)):
                continue
            usual = role.strip().lower()
            meant = ROLES.get(usual, usual if usual in _USUAL else None)
            raise InvalidRow(
                f"has a message of the role {shown(role)}, which the chat template does not name. "
                + (f"Did you mean {meant!r}? " if meant else "")
                + "Rename the role, or name it in tokenizer.chat_template.",
                f"the unknown role {shown(role)}",
            )

    def _spans(self, messages: list, first: int, begin: str, whole: str, kwargs: dict) -> tuple[Span, ...] | None:
        """The spans of `whole` that the assistant wrote in the messages from index `first` on. None if unknown."""
        found = None
        template = self.processing_class.chat_template
        if self.processor is None:
            template = self.tokenizer.get_chat_template(kwargs.get("chat_template"), kwargs.get("tools"))
        if isinstance(template, str) and has_generation_markers(template):

            def marked() -> tuple[str, list[Span]]:
                settings = {**self.tokenizer.special_tokens_map, **kwargs, "chat_template": template}
                made: Any = render_jinja_template([messages], return_assistant_tokens_mask=True, **settings)
                return made[0][0], [(begin, end) for begin, end in made[1][0]]

            start = next((i for i, (a, b) in enumerate(zip(begin, whole, strict=False)) if a != b), len(begin))
            found = marked_spans(marked, start, whole)
        if found is None:
            render = partial(self.processing_class.apply_chat_template, tokenize=False, **kwargs)
            found = rendered_spans(lambda *a, **k: str(render(*a, **k)), messages, first, whole, self._tokens_that_end)
        return None if found is None else tuple(found)

    @cached_property
    def _tokens_that_end(self) -> re.Pattern:
        """Matches a token that can end a turn: one that the tokenizer never creates from other text."""
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        names = sorted({*added, *self.tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    @cached_property
    def _special(self) -> re.Pattern:
        """Matches the special tokens. Other added tokens, such as `<think>`, may be part of a message."""
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        names = sorted({*added, *self.tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    @cached_property
    def _endings(self) -> re.Pattern:
        return re.compile(rf"(?:{self._tokens_that_end.pattern})\s*\Z")

    @staticmethod
    def _template_kwargs(columns: Mapping[str, list], i: int) -> dict[str, Any]:
        tools = columns["tools"][i] if "tools" in columns else None
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except ValueError as error:
                raise InvalidRow(
                    f"is text that is not JSON ({error}). Pass a list of JSON schemas.",
                    "tools that are not a list",
                    "tools",
                ) from error
        else:
            tools = without_nones(tools)
        are_tools = isinstance(tools, list) and all(isinstance(tool, dict) or callable(tool) for tool in tools)
        if tools is not None and not are_tools:
            raise InvalidRow(
                f"is {shown(tools)}; it must be a list of JSON schemas, or such a list as JSON text.",
                "tools that are not a list",
                "tools",
            )
        kwargs = without_nones(columns["chat_template_kwargs"][i]) if "chat_template_kwargs" in columns else None
        if not isinstance(kwargs, dict | None):
            raise InvalidRow(
                f"is {shown(kwargs)}; it must be a dict.",
                "chat_template_kwargs that are not a dict",
                "chat_template_kwargs",
            )
        set_by_us = sorted(_OURS.intersection(kwargs or {}))
        if set_by_us:
            raise InvalidRow(
                f"sets {', '.join(set_by_us)}, which only the trainer can set. Remove it.",
                "chat_template_kwargs that only the trainer can set",
                "chat_template_kwargs",
            )
        return {"tools": tools, **(kwargs or {})}

    def prompt_ids(self, prompt: Any) -> list[int]:
        """The token ids of a prompt that is to be answered, as training had them.

        Args:
            prompt: text, or messages without images.

        Raises:
            ValueError: if the chat template fails, or if the prompt contains half of a surrogate pair.
        """
        if not self.is_text:
            messages = prompt if self.processor is None else with_placeholders(prompt, 0)
            try:
                prompt = self.processing_class.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # templates can raise any exception
                raise ValueError(
                    f"The chat template fails on the conversation ({type(error).__name__}: {error})."
                ) from error
        if not _is_unicode(str(prompt)):
            raise ValueError("The prompt contains half of a surrogate pair, which is not a character. Write it anew.")
        return self.tokenize([Rendered(str(prompt), str(prompt))])[0].prompt

    def tokenize(self, rows: Sequence[Rendered]) -> list[Tokenized]:
        """The token ids of each row. All texts of a batch are tokenized together, and each different text once."""
        unique = list(dict.fromkeys(text for row in rows for text in row[:2]))
        if not unique:
            return []
        # Chat templates write the special tokens themselves, and `_apart` writes those of plain text
        special = [text for text in unique if self._takes_special(text)]
        other = [text for text in unique if not self._takes_special(text)] if len(special) < len(unique) else []
        bos, adds_eos = self._added if special else ("", False)
        # The tokenizer must not add tokens that a text already has
        ids = self._ids([text.removeprefix(bos) for text in special], True)
        ids_of = dict(zip(special, [each[:-1] for each in ids] if adds_eos else ids, strict=True))
        ids_of |= zip(other, self._ids(other, False), strict=True)
        found = []
        for row in rows:
            prompt, whole = ids_of[row.prompt], ids_of[row.whole]
            prompt, completion = (prompt, whole) if self.has_images else self._split(prompt, whole)
            if row.spans is None:
                found.append(Tokenized(prompt, completion))
                continue
            scored = self._scored(row.whole, row.spans, ids_of[row.whole])
            mask = scored[len(scored) - len(completion) :]
            # All tokens before the first scored one belong to the prompt
            start = mask.index(1) if 1 in mask and not self.has_images else 0
            found.append(Tokenized(prompt + completion[:start], completion[start:], mask[start:]))
        return found

    def _takes_special(self, text: str) -> bool:
        """Whether the tokenizer adds its special tokens to a text.

        As in TRL, it does not add them to conversations, unless a processor's template does not write the first one.
        """
        if self.has_images or (not self.is_text and self.processor is None):
            return False
        return self.is_text or not text.startswith(self._added[0])

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        tokenizer = self.tokenizer
        if not texts:
            return []
        if not self._is_plain_fast:
            made = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
            return made["input_ids"]
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
        return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=special)]

    def _scored(self, text: str, spans: Sequence[Span], ids: list[int]) -> list[int]:
        """1 for each token of the text with a character in a span, else 0."""
        special = self._takes_special(text)
        if self.tokenizer.is_fast:
            made = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
            offsets = made["offset_mapping"][: len(ids)]
            return [int(any(a < end and b > begin and a < b for begin, end in spans)) for a, b in offsets]
        scored = [0] * len(ids)
        for begin, end in spans:
            first, last = (self._tokens_before(text[:place], special, ids) for place in (begin, end))
            scored[first:last] = [1] * (last - first)
        return scored

    def _tokens_before(self, text: str, special: bool, ids: list[int]) -> int:
        """The number of tokens in `ids` that belong to the beginning `text`."""
        start = self._ids([text], special)[0]
        return next((i for i, (a, b) in enumerate(zip(start, ids, strict=False)) if a != b), min(len(start), len(ids)))

    def _apart(self, prompt: str, whole: str) -> tuple[str, str]:
        """The (prompt, completion) of a row that can have images, with the BOS token of plain text."""
        differ = (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b)
        begin = prompt[: next(differ, min(len(prompt), len(whole)))]
        if begin != prompt:
            logger.warning_once(
                "The chat template renders a prompt alone differently than with its completion. The completion starts "
                f"where the two renderings differ, so {prompt[len(begin) :]!r} is not part of the prompt in training. "
                "(This warning is shown once; it may apply to other rows.)"
            )
        bos = self._added[0] if self.is_text else ""
        return (begin if begin.startswith(bos) else bos + begin), whole[len(begin) :]

    @cached_property
    def _end(self) -> str:
        """The token that ends plain text."""
        return str(self.tokenizer.eos_token)

    @cached_property
    def _added(self) -> tuple[str, bool]:
        """The token that the tokenizer adds at the beginning of texts, or "", and whether it adds EOS at the end."""
        tokenizer = self.tokenizer
        ids = tokenizer("a")["input_ids"]
        bos = str(tokenizer.bos_token) if ids[:1] == [tokenizer.bos_token_id] else ""
        return bos, ids[-1:] == [tokenizer.eos_token_id]

    @cached_property
    def _is_plain_fast(self) -> bool:
        """Whether the tokenizer only calls its backend. If so, calling the backend directly is faster."""
        own = type(self.tokenizer)
        return bool(self.tokenizer.is_fast) and all(
            getattr(own, name, None) is getattr(PreTrainedTokenizerFast, name, None)
            for name in ("__call__", "_encode_plus", "_batch_encode_plus")
        )

    def _split(self, prompt: list[int], whole: list[int]) -> tuple[list[int], list[int]]:
        """`whole`, split where it first differs from the prompt's own tokens. This can be before the prompt's end."""
        cut = len(prompt)
        if whole[:cut] == prompt:
            return prompt, whole[cut:]
        cut = next(i for i, (a, b) in enumerate(zip([*prompt, -1], [*whole, -2], strict=False)) if a != b)
        logger.warning_once(
            "The tokens of a prompt alone differ from its tokens with the completion, because the chat template "
            "renders the prompt alone differently, or because tokens merge across the boundary. The completion starts "
            f"where they differ, so {self.tokenizer.decode(prompt[cut:])!r} is not part of the prompt in training. End "
            "prompts on a token boundary to avoid this. (This warning is shown once; it may apply to other rows.)"
        )
        return whole[:cut], whole[cut:]

    def truncate(self, row: Tokenized, added: int) -> tuple[Tokenized, bool, str | None]:
        """The truncated row, whether anything was cut, and the reason to leave out the row or None.

        Images add `added` tokens to the prompt.
        """
        prompt, completion, mask = row
        if not completion:
            return _NONE, False, NO_TOKENS
        excess = 0
        if self.max_length is not None:
            excess = len(prompt) + added + len(completion) - self.max_length
        if excess > 0:
            kept = slice(None)
            if self.truncation_mode == "keep_end":
                kept, prompt = slice(max(excess - len(prompt), 0), None), prompt[excess:]
            else:
                kept = slice(max(len(completion) - excess, 0))
            completion, mask = completion[kept], mask[kept] if mask is not None else None
        if not completion:
            return _NONE, False, PROMPT_FILLS
        if mask is not None and not any(mask if prompt else mask[1:]):
            return _NONE, False, CUT_OFF
        if not prompt and len(completion) == 1:
            return _NONE, False, NOTHING_TO_SCORE
        if mask is not None and all(mask):
            mask = None
        return Tokenized(prompt, completion, mask), excess > 0, None


_NONE = Tokenized([], [])


def _repeats(prompt: Any, completion: Any) -> bool:
    """Whether a completion begins with its prompt, unless that is so short that it can be by chance."""
    if not isinstance(prompt, str) or not isinstance(completion, str):
        return False
    return len(prompt.strip()) >= _REPEATED and completion.lstrip().startswith(prompt.strip())


def _is_escaped(completion: Any) -> bool:
    r"""Whether a text looks like the output of `json.dumps`, `repr` or `str(bytes)`: in quotes, or with \n for lines.

    Example:
        >>> [_is_escaped(text) for text in ('"Yes."', "b'Yes.'", r"One\nTwo", '"Yes," he said. "Now."')]
        [True, True, True, False]
    """
    if not isinstance(completion, str):
        return False
    return ("\\n" in completion and "\n" not in completion) or _PRINTED.fullmatch(completion.strip()) is not None


def _no_unicode() -> InvalidRow:
    return InvalidRow(
        "contains half of a surrogate pair, which is not a character. Remove the row, or repair the "
        'text with text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").',
        "half of a surrogate pair",
        "its text",
    )


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded. A text with half of a surrogate pair cannot."""
    if text.isascii():  # known without reading the text
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
