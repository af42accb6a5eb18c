r"""Chat with a trained model, in the format that it was trained on.

    trl-ulma chat --model out
    trl-ulma chat --model out --compare --prompt "How do I boil an egg?"
    trl-ulma chat --model out < questions.txt > answers.txt

The model is what training saved, an adapter or a whole model, or any model on the Hub. A model that was trained on
conversations reads the whole conversation again in each turn. A model that was trained on bare text continues each
prompt by itself. The answers are printed to stdout, and everything else to stderr.
"""

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_ulma.scripts.command_line import CommandParser, add_verbose, as_options, attempt, is_verbose, quiet_libraries

if TYPE_CHECKING:
    from trl_ulma.evaluation.generation import Sampling, TransformersGenerator
    from trl_ulma.rows.rendering import Encoder

CLEAR = "/clear"
DTYPES = ("auto", "float32", "bfloat16", "float16")


class TooLongError(ValueError):
    """A message that does not fit the model's context, even without the earlier turns."""


def make_parser(prog: str = "trl-ulma chat") -> argparse.ArgumentParser:
    """The command's options."""
    parser = CommandParser(
        prog=prog,
        usage=f"{prog} --model MODEL [options]",
        description="Chat with a trained model, in the format that it was trained on. Without a terminal, each line "
        "of stdin is a message.",
    )
    parser.add_argument("--model", required=True, help="trained model or adapter: a folder, or a name on the Hub")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this prompt, and end")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="after each answer, also show that of the model before training, to the same conversation",
    )
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer in tokens (default: 256)")
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="sampling temperature; 0 is the likeliest token (default: 0.7)"
    )
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus sampling (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the answers (default: 0)")
    parser.add_argument(
        "--allow_repetition",
        action="store_true",
        help="do not stop an answer that repeats the same words without end",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="number format of the weights (default: that of training; float32 if it is not known)",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add_verbose(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Chat, and return the exit code: 2 for wrong options, 1 for what is wrong with what they name."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty.")
    if args.temperature == 0 and args.top_p != parser.get_default("top_p"):
        parser.error("--top_p needs --temperature above 0. Leave it out.")
    from trl_ulma.evaluation.generation import Sampling

    try:
        sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    except ValueError as problem:
        parser.error(as_options(str(problem), parser._option_string_actions))
    with contextlib.nullcontext() if is_verbose() else quiet_libraries():
        return attempt(parser, lambda: run(args, sampling))


def run(args: argparse.Namespace, sampling: "Sampling") -> None:
    """Load the model, say what it is, and answer: `--prompt`, or what is typed, or the lines of stdin."""
    if args.prompt is None and sys.stdin is None:
        raise ValueError("stdin is closed, so there is no message. Give one with --prompt.")
    for stream in filter(None, (sys.stdout, sys.stderr)):  # an answer can have any character
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    chat = load(args, sampling)
    is_typed = args.prompt is None and sys.stdin.isatty()
    for line in chat.description:
        _note(line)
    if is_typed:
        clears = f", and {CLEAR} starts it again" if chat.is_chat else ""
        _note(f"An empty line or Ctrl-D ends the chat{clears}. Ctrl-C stops an answer.\n")
        _answer_typed(chat)
    elif args.prompt is not None:
        chat.answer(args.prompt)
    else:
        _answer_lines(chat)


@dataclass
class Model:
    """A model that answers.

    Attributes:
        name: its name beside its answers.
        generator: generates them.
        activated: returns a context in which the generator's model is this one.
    """

    name: str
    generator: "TransformersGenerator"
    activated: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


@dataclass
class Chat:
    """A conversation with a model.

    Attributes:
        models: the trained model, whose answers are kept in the conversation, and those that are compared with it.
        encoder: renders prompts as in training.
        sampling: how answers are sampled.
        context: the largest number of tokens of prompt and answer, or None.
        system_message: of the training, or None.
        description: lines that say what is loaded.
        allow_repetition: whether not to stop an answer that repeats itself.
        turns: the conversation so far. For bare text it remains empty.
        count: how many messages were answered. Each has a seed of its own.
    """

    models: list[Model]
    encoder: "Encoder"
    sampling: "Sampling"
    context: int | None
    system_message: str | None
    description: list[str]
    allow_repetition: bool = False
    turns: list[dict[str, Any]] = field(default_factory=list)
    count: int = 0

    @property
    def is_chat(self) -> bool:
        """Whether prompts are conversations, and not bare text."""
        return not self.encoder.is_text

    def answer(self, text: str, heading: str = "") -> None:
        """Print the answer of each model to stdout, while it is generated.

        Args:
            text: the message or prompt.
            heading: is printed before the answer of a single model. The answers of several have headings of their own.

        Raises:
            TooLongError: if the message does not fit the model's context.
        """
        from trl_ulma.evaluation.generation import AnswerPrinter

        turns, ids = self._fitted(text)
        seed = self.sampling.seed + self.count
        self.count += 1
        first = None
        for place, model in enumerate(self.models):
            if len(self.models) > 1:
                heading = "\n" * (place > 0) + f"{model.name}:\n"
            print(heading, end="", flush=True)
            printer = AnswerPrinter(model.generator, allow_repetition=self.allow_repetition)
            try:
                with model.activated():
                    reply = model.generator.reply(ids, self.sampling, seed, printer)
            except KeyboardInterrupt:
                printer.end()  # prints what was held back, because it repeated earlier tokens
                raise
            if printer.kept is not None:
                _note("[stopped here, because the answer repeats itself; --allow_repetition shows all of it]")
            elif not reply.finished:
                _note(f"[cut at {self.sampling.max_new_tokens} tokens; see --max_new_tokens]")
            elif not reply.text.strip():
                _note("[an empty answer]")
            if place == 0:
                first = reply
                self.turns = [*turns, {"role": "assistant", "content": reply.text}] if self.is_chat else []
            elif reply == first:
                _note("[the same answer]")

    def _fitted(self, text: str) -> tuple[list[dict[str, Any]], list[int]]:
        """The turns up to this message, without the oldest ones if they do not fit, and the tokens of the prompt."""
        from trl_ulma.rows.chat import with_system_message

        turns = [*self.turns, {"role": "user", "content": text.strip()}]
        most = None if self.context is None else self.context - self.sampling.max_new_tokens
        while True:
            prompt: Any = text
            if self.is_chat:
                prompt = turns if self.system_message is None else with_system_message(turns, self.system_message)
            ids = self.encoder.prompt_ids(prompt)
            if most is None or len(ids) <= most:
                break
            if len(turns) == 1 or not self.is_chat:
                raise TooLongError(
                    f"The prompt has {len(ids):,} tokens, which with an answer of {self.sampling.max_new_tokens:,} is "
                    f"more than the model's {self.context:,}. Shorten it, or lower max_new_tokens."
                )
            turns = turns[2:]
        if dropped := (len(self.turns) + 1 - len(turns)) // 2:
            oldest = "oldest turn is" if dropped == 1 else f"{dropped} oldest turns are"
            _note(f"[The conversation no longer fits the model's {self.context:,} tokens: its {oldest} left out now.]")
        return turns, ids


def load(args: argparse.Namespace, sampling: "Sampling") -> Chat:
    """Load the model, its tokenizer, and with `--compare` the model before training.

    Raises:
        OSError, ValueError: if one of them is missing, or does not generate text.
    """
    from accelerate.utils import is_peft_model

    from trl_ulma.evaluation.generation import TransformersGenerator
    from trl_ulma.rows.rendering import Encoder, processor_of, tokenizer_of
    from trl_ulma.saved import (
        adapter_base,
        as_reference,
        check_source,
        load_model,
        load_processing_class,
        saved_settings,
    )

    source, loading = args.model, {"trust_remote_code": args.trust_remote_code}
    check_source("--model", source, **loading)
    settings = saved_settings(source)
    processing_class = load_processing_class(source, **loading)
    trained_on = "auto" if settings is None else settings.chat
    has_template = processing_class.chat_template is not None
    if trained_on == "true" and not has_template:
        raise ValueError(
            f"{source} was trained on conversations, but its tokenizer has no chat template. Copy the tokenizer from "
            "the folder that training wrote, or set tokenizer.chat_template and save the tokenizer."
        )
    is_chat = has_template if trained_on == "auto" else trained_on == "true"
    before = _name_before(source) if args.compare else None  # before the slow part starts

    model = load_model(source, dtype=args.dtype, **loading)
    context = _context(model.config)
    if context is not None and sampling.max_new_tokens >= context:
        raise ValueError(
            f"max_new_tokens must be below the {context:,} tokens of the model; got {sampling.max_new_tokens}."
        )
    tokenizer = tokenizer_of(processing_class)
    name = Path(source).resolve().name if Path(source).exists() else source
    models = [Model(name, TransformersGenerator(model, tokenizer, source, context))]
    if before is not None:
        generator, activated = models[0].generator, lambda: as_reference(model, source)
        if not is_peft_model(model):
            other = _load_before(source, before, model, len(tokenizer), loading)
            generator, activated = TransformersGenerator(other, tokenizer, before, context), contextlib.nullcontext
        models[0].name = f"After training ({name})"
        models.append(Model(f"Before training ({_short(before)})", generator, activated))

    base = adapter_base(source)
    device = {"cpu": "the CPU", "cuda": "the GPU"}.get(model.device.type, model.device.type)
    why = "as in training" if trained_on != "auto" else f"because the tokenizer has {'a' if is_chat else 'no'} template"
    description = [
        f"Model: {source}{f', an adapter on {base}' if base else ''}, in {_format(model)} on {device}",
        f"Format: {'chat' if is_chat else 'bare text'}, {why}{'' if is_chat else '. Each prompt stands alone.'}",
    ]
    system_message = None if settings is None or not is_chat else settings.system_message
    if system_message is not None:
        description.append(f"System message: {system_message}")
    if processor_of(processing_class) is not None:
        description.append("The model also takes images, but a chat here is text only.")
    if before is not None:
        description.append(f"Compared with the model before training: {before}")
    encoder = Encoder(processing_class, not is_chat, False, None, "keep_start")
    return Chat(models, encoder, sampling, context, system_message, description, args.allow_repetition)


def _name_before(source: str) -> str:
    """The name of the model before training: the adapter that training began with, the adapter's base, or a model.

    Raises:
        ValueError: if it is not known.
    """
    from trl_ulma.evaluation.before import model_before
    from trl_ulma.likelihood.reference import ADAPTER
    from trl_ulma.saved import adapter_base, saved_file

    if base := adapter_base(source):
        return base if saved_file(source, f"{ADAPTER}/adapter_config.json") is None else f"{source}/{ADAPTER}"
    before = model_before(source, None)
    if before is None:
        raise ValueError(
            f"--compare needs the model before training, but {source} is a whole model that does not name it. Leave "
            "out --compare."
        )
    return before


def _load_before(source: str, before: str, model: Any, tokens: int, loading: dict[str, Any]) -> Any:
    """Load the model before the training of a whole model.

    Raises:
        OSError: if it is missing.
        ValueError: if it has fewer embeddings than the tokenizer has tokens.
    """
    from trl_ulma.evaluation.before import revision_before
    from trl_ulma.saved import load_model

    try:
        other = load_model(before, dtype=_format(model), revision=revision_before(source, None), **loading)
    except OSError as error:
        raise OSError(
            f"{source} was trained from {before}, which could not be loaded ({' '.join(str(error).split())[:300]}). "
            "Put it there, or leave out --compare."
        ) from error
    size = other.get_input_embeddings().weight.shape[0]
    if size < tokens:
        raise ValueError(
            f"{source} was trained from {before}, which has {size:,} embeddings, but the tokenizer has {tokens:,} "
            "tokens, so it cannot read all prompts. Leave out --compare."
        )
    return other


def _context(config: Any) -> int | None:
    """The number of tokens that a model can read, or with rotary positions was made for. None if it is not known."""
    from trl_ulma.likelihood.layouts import positions_of

    return positions_of(config) or getattr(config.get_text_config(), "max_position_embeddings", None)


def _format(model: Any) -> str:
    """The number format of a model's weights, such as "float32"."""
    return str(model.dtype).removeprefix("torch.")


def _short(name: str) -> str:
    """The last part of the name of a model; of an adapter that training began with, the last two.

    Example:
        >>> _short("org/model"), _short("runs/out/ref")
        ('model', 'out/ref')
    """
    parts = Path(name).parts
    return "/".join(parts[-2:] if parts[-1] == "ref" else parts[-1:])


def _answer_typed(chat: Chat) -> None:
    """Answer messages from a terminal until an empty line, Ctrl-D, or Ctrl-C at the prompt."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # with it, `input` has a history and can be edited
    while True:
        try:
            text = _typed("You: ")
        except (EOFError, KeyboardInterrupt):
            _note("")
            return
        if not text.strip():
            return
        if _is_clear(chat, text):
            continue
        turns = chat.turns
        try:
            chat.answer(text, f"{chat.models[0].name}: ")
        except KeyboardInterrupt:
            is_left_out = chat.is_chat and chat.turns is turns
            _note(f"[stopped{', and left out of the conversation' if is_left_out else ''}]")
        except TooLongError as problem:
            _note(as_options(str(problem), ["--max_new_tokens"]))
        print(flush=True)


def _typed(prompt: str) -> str:
    """A line from the terminal. The prompt is not written into a file that takes the answers."""
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def _answer_lines(chat: Chat) -> None:
    """Answer each line of stdin, with an empty line between two answers."""
    is_first = True
    for number, text in enumerate(_lines(), 1):
        if not text.strip() or _is_clear(chat, text):
            continue
        if not is_first:
            print(flush=True)
        is_first = False
        _note(f"You: {text.strip()}")
        try:
            chat.answer(text)
        except TooLongError as problem:
            raise TooLongError(f"Line {number} of stdin: {problem}") from problem


def _lines() -> Iterator[str]:
    try:
        for number, line in enumerate(sys.stdin):
            # PowerShell begins what it pipes with a byte order mark
            yield (line if number else line.removeprefix("\ufeff")).rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"A line of stdin is not {sys.stdin.encoding} ({error}). Convert it.") from error


def _is_clear(chat: Chat, text: str) -> bool:
    """Whether a message starts the conversation again, which is then done. Bare text has no conversation."""
    if not chat.is_chat or text.strip() != CLEAR:
        return False
    chat.turns = []
    _note("[a new conversation]\n")
    return True


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
