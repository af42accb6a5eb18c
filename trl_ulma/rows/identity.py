"""What prepared rows depend on besides the raw rows."""

# In the type hints of transformers, a tokenizer's backend has many types
# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

import datetime
import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datasets.fingerprint import Hasher
from transformers import __version__ as transformers_version

from trl_ulma.data.read_files import code_hash
from trl_ulma.rows.chat import TODAY
from trl_ulma.rows.rendering import processor_of, tokenizer_of

if TYPE_CHECKING:
    from trl_ulma.rows.preparation import Preparation

# Attributes of a tokenizer that are part of its serialized backend, or that do not affect tokens
_NOT_READ = {"_tokenizer", "name_or_path", "deprecation_warnings", "init_kwargs", "_processor_class", "padding_side"}
_PLAIN = str | int | float | bool | None | tuple | list | dict


def serialized(how: "Preparation") -> str:
    """The vocabulary of the tokenizer, and for a fast one how it splits text, as JSON.

    This takes long for large vocabularies, so `token_rules` and `cache_key` share it.
    """
    own = tokenizer_of(how.processing_class)
    if not own.is_fast:
        return json.dumps(sorted(own.get_vocab().items()))
    # Each call of the tokenizer sets these again, so the values of the last call must not matter
    own.backend_tokenizer.no_padding()
    own.backend_tokenizer.no_truncation()
    return own.backend_tokenizer.to_str()


def token_rules(how: "Preparation", is_text: bool, tokenizer: str) -> dict[str, Any]:
    """What the token ids of prepared rows depend on, except for their length.

    Args:
        how: the preparation.
        is_text: whether the rows are plain text, so that the chat template does not matter.
        tokenizer: `serialized(how)`.
    """
    own = tokenizer_of(how.processing_class)
    # What is before the model in a fast tokenizer can change when it is saved and loaded
    vocabulary = tokenizer[tokenizer.index('"model":{') :] if own.is_fast else tokenizer
    added = json.dumps([(i, str(token)) for i, token in sorted(own.added_tokens_decoder.items())])
    found = {"vocabulary": hashlib.sha256((vocabulary + added).encode()).hexdigest()}
    if is_text:
        return found | {"EOS token": str(own.eos_token)}
    template = json.dumps(how.processing_class.chat_template)
    return found | {
        "chat template": hashlib.sha256(template.encode()).hexdigest(),
        "system_message": how.system_message,
        "assistant_only_loss": how.assistant_only_loss,
    }


def cache_key(how: "Preparation", tokenizer: str) -> str:
    """A hash of everything that a cached result depends on besides the rows.

    Args:
        how: the preparation.
        tokenizer: `serialized(how)`.
    """
    own, processor = tokenizer_of(how.processing_class), processor_of(how.processing_class)
    state: dict[str, Any] = {name: value for name, value in vars(own).items() if name not in _NOT_READ}
    state["type"] = f"{type(own).__module__}.{type(own).__qualname__}"
    # Chat templates print the special tokens
    state["special_tokens"] = own.special_tokens_map
    state["added_tokens"] = {str(i): repr(token) for i, token in own.added_tokens_decoder.items()}
    state["tokenizer"] = hashlib.sha256(tokenizer.encode()).hexdigest()
    template = how.processing_class.chat_template
    if processor is not None:
        state["processor"] = (type(processor).__name__, processor.to_json_string())
        state["processor's"] = {n: v for n, v in vars(processor).items() if isinstance(v, _PLAIN)}
    if TODAY in str(template):
        state["date"] = datetime.date.today().isoformat()  # the template prints the date
    # Invalid rows are marked in the cached result, and dropped or listed after that
    how = replace(how, processing_class=None, invalid_rows="error")  # type: ignore[arg-type]
    versions = (code_hash(), transformers_version)
    return Hasher.hash((sorted(state), [state[name] for name in sorted(state)], str(template), how, versions))
