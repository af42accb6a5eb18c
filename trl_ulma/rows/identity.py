"""What prepared rows depend on besides the raw rows."""

# In the type hints of transformers, a tokenizer's backend has many types
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

import datetime
import hashlib
import json
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase
from transformers import __version__ as transformers_version

from trl_ulma.rows.rendering import processor_of, tokenizer_of

if TYPE_CHECKING:
    from trl_ulma.rows.preparation import Preparation

# Attributes of a tokenizer that are part of its serialized backend, or that do not affect tokens
_NOT_READ = {"_tokenizer", "name_or_path", "deprecation_warnings", "init_kwargs", "_processor_class", "padding_side"}
_PLAIN = str | int | float | bool | None | tuple | list | dict


def token_rules(how: "Preparation", is_text: bool) -> dict[str, Any]:
    """What the token ids of prepared rows depend on, except for their length."""
    tokenizer = tokenizer_of(how.processing_class)
    vocabulary = json.dumps(_tokens_of(tokenizer))
    found = {"vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest()}
    if is_text:
        return found | {"EOS token": str(tokenizer.eos_token)}
    template = json.dumps(how.processing_class.chat_template)
    return found | {
        "chat template": hashlib.sha256(template.encode()).hexdigest(),
        "system_message": how.system_message,
        "assistant_only_loss": how.assistant_only_loss,
    }


def cache_key(how: "Preparation") -> str:
    """A hash of everything that a cached result depends on besides the rows."""
    own, processor = tokenizer_of(how.processing_class), processor_of(how.processing_class)
    state: dict[str, Any] = {name: value for name, value in vars(own).items() if name not in _NOT_READ}
    state["type"] = f"{type(own).__module__}.{type(own).__qualname__}"
    # Chat templates print the special tokens
    state["special_tokens"] = own.special_tokens_map
    state["added_tokens"] = {str(i): repr(token) for i, token in own.added_tokens_decoder.items()}
    if own.is_fast:
        # Each call of the tokenizer sets these again, so the values of the last call must not matter
        own.backend_tokenizer.no_padding()
        own.backend_tokenizer.no_truncation()
        state["backend"] = own.backend_tokenizer.to_str()
    else:
        state["vocabulary"] = sorted(own.get_vocab().items())
    template = how.processing_class.chat_template
    if processor is not None:
        state["processor"] = (type(processor).__name__, processor.to_json_string())
        state["processor's"] = {n: v for n, v in vars(processor).items() if isinstance(v, _PLAIN)}
    if "strftime_now" in str(template):
        state["date"] = datetime.date.today().isoformat()  # the template prints the date
    how = replace(how, processing_class=None)  # type: ignore[arg-type]
    versions = (version("trl-ulma"), transformers_version)
    return Hasher.hash((sorted(state), [state[name] for name in sorted(state)], str(template), how, versions))


def _tokens_of(tokenizer: PreTrainedTokenizerBase) -> list:
    """All tokens in the order of their ids, with the ids if these do not run from 0 without a gap."""
    if tokenizer.is_fast:
        # Several times as fast as the vocabulary as a dict
        backend = tokenizer.backend_tokenizer
        tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
        if None not in tokens:
            return tokens
    pairs = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    has_gap = any(place != i for place, (i, _) in enumerate(pairs))
    return pairs if has_gap else [token for _, token in pairs]
