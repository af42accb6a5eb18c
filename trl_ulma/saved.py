"""A saved model: its files in a folder or on the Hub, and its policy, tokenizer and reference."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import cached_file, logging
from transformers.utils.peft_utils import find_adapter_config_file

from trl_ulma.labels import LabelTransform
from trl_ulma.likelihood.layouts import positions_of
from trl_ulma.likelihood.reference import ADAPTER, COARSE_TOLERANCE, TOLERANCE, Reference, ReferenceIdentity
from trl_ulma.likelihood.scorer import Scorer
from trl_ulma.rows.rendering import own_processing_class, tokenizer_of

logger = logging.get_logger(__name__)

# The file beside the model's weights
SETTINGS_FILE = "pointwise.json"
# Every folder with a tokenizer contains at least one of these files
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class SavedSettings:
    """Everything besides the weights that scores depend on: `pointwise.json` in a saved model's folder.

    Attributes:
        beta: β.
        label_type: the label type of rows that have no column `label_type`.
        length_normalize: whether log-probabilities are divided by the number of completion tokens.
        log_z: a number in nats, or the name of a choice. Its state is in `log_z.safetensors`.
        max_length: the maximum length of a sequence in tokens.
        truncation_mode: "keep_start" or "keep_end".
        assistant_only_loss: whether only the assistant's turns of a completion are scored.
        chat: whether rows of plain text become messages, see `trl_ulma.rows.chat`.
        system_message: the system message added to conversations that have none, or None.
        label_transform: the fitted transform, or None.
        sft_threshold: the continuous label, after the transform, from which on a row is a demonstration, or None.
        dtype: the dtype of the weights in training, such as "float32". None if unknown.
        mixed_precision: "no", "bf16" or "fp16". None if unknown.
        reference: the reference that the model was trained against. None if unknown.
        trl_ulma: the version that wrote the file.
    """

    beta: float
    label_type: str = "binary"
    length_normalize: bool = False
    log_z: float | str = 0.0
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    assistant_only_loss: bool = True
    chat: str = "auto"
    system_message: str | None = None
    label_transform: LabelTransform | None = None
    sft_threshold: float | None = None
    dtype: str | None = None
    mixed_precision: str | None = None
    reference: ReferenceIdentity | None = None
    trl_ulma: str = ""

    def write(self, folder: str | Path) -> None:
        """Write the settings to a folder."""
        steps = None if self.label_transform is None else self.label_transform.to_json()
        reference = None if self.reference is None else self.reference.to_json()
        text = json.dumps({**asdict(self), "label_transform": steps, "reference": reference}, indent=2)
        (Path(folder) / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read the settings from a file. Only `beta` is required.

        Raises:
            ValueError: if the file contains something else. The message names the file.
        """
        try:
            found: Mapping[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            made = {name: found[name] for name in found if found[name] is not None}
            unknown = set(made) - {f.name for f in fields(cls)}
            if unknown:
                raise ValueError(f"unknown {', '.join(sorted(unknown))}")
            if "label_transform" in made:
                made["label_transform"] = LabelTransform.from_json(made["label_transform"])
            if "reference" in made:
                made["reference"] = ReferenceIdentity.from_json(made["reference"])
            return cls(**made)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} does not contain the settings of a pointwise model ({error}). Copy the file from the folder "
                "that training wrote."
            ) from error


def saved_file(model: str, name: str) -> str | None:
    """The path of a file that was saved with a model, in its folder or on the Hub. None if there is no such file."""
    return cached_file(
        model, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )


def saved_settings(model: str) -> SavedSettings | None:
    """The settings that training saved with a model. None if there are none.

    Raises:
        ValueError: if the file contains something else.
    """
    file = saved_file(model, SETTINGS_FILE)
    return None if file is None else SavedSettings.read(file)


def load_model(name: str, *, dtype: str = "auto", trust_remote_code: bool = False) -> Any:
    """Load a causal language model in evaluation mode, from the folder of a checkpoint or adapter, or from the Hub.

    If there are GPUs, the model is placed on them.

    Args:
        name: the folder, or the name on the Hub.
        dtype: the dtype of the weights. "auto" uses the dtype of the training, or else that of the stored weights.
        trust_remote_code: whether to run code that comes with the model.

    Raises:
        OSError: if there is no model, or if the base model of an adapter is missing.
    """
    if dtype == "auto":
        settings = saved_settings(name)
        dtype = (settings and settings.dtype) or "auto"
    base = adapter_base(name)
    loader: Any = AutoModelForCausalLM if base is None else AutoPeftModelForCausalLM
    placed = {"device_map": "auto"} if torch.cuda.is_available() else {}
    try:
        return loader.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code, **placed).eval()
    except OSError as error:
        if base is None:
            raise
        raise OSError(
            f"{name} is an adapter on {base}, but this base model could not be loaded ({error}). Put it there, or set "
            f"base_model_name_or_path in {name}/adapter_config.json to its location."
        ) from error


def training_autocast(settings: SavedSettings | None, model: Any) -> Any:
    """A context for forward passes with the precision of the model's training.

    It uses mixed precision if training did and if the weights are in float32.

    Args:
        settings: the settings saved with the model, or None.
        model: the loaded model.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get((settings and settings.mixed_precision) or "")
    if dtype is None or model.dtype != torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=dtype)


def adapter_base(name: str) -> str | None:
    """The model that an adapter was trained on. None if `name` is not an adapter."""
    if find_adapter_config_file(name) is None:
        return None
    return PeftConfig.from_pretrained(name).base_model_name_or_path


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint or adapter. An adapter without its own tokenizer has that of its base model."""
    base = adapter_base(name)
    has_own = not Path(name).is_dir() or any((Path(name) / file).is_file() for file in _TOKENIZER_FILES)
    source = name if base is None or has_own else base
    return tokenizer_of(own_processing_class(None, source, None, revision=None, trust_remote_code=trust_remote_code))


def positions(name: str, *, trust_remote_code: bool = False) -> int | None:
    """The maximum number of tokens that a model, or an adapter's base model, can read, see
    `trl_ulma.likelihood.layouts.positions_of`."""
    return positions_of(AutoConfig.from_pretrained(adapter_base(name) or name, trust_remote_code=trust_remote_code))


def load_reference(
    policy: Any,
    source: str,
    settings: SavedSettings | None,
    ref_model: Any = None,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Reference:
    """Load the reference that a saved model was trained against, and check that it is the same one.

    Args:
        policy: the loaded model.
        source: the folder or name of the model.
        settings: the settings saved with the model, or None.
        ref_model: a model, or its folder or name, to use instead of the reference that the settings name.
        dtype: the dtype of the reference's weights.
        trust_remote_code: whether to run code that comes with the model.

    Raises:
        ValueError: if the reference is unknown, or if its log-probabilities differ from those in training. If you
            passed a `ref_model`, a difference is only logged as a warning.
        OSError: if the model that the settings name is missing.
    """
    scorer = Scorer()
    identity = None if settings is None else settings.reference
    autocast = partial(training_autocast, settings, policy)
    is_adapter = is_peft_model(policy)
    kind = identity.kind if identity is not None else ""
    if ref_model is not None:
        name = ref_model if isinstance(ref_model, str) else ""
        model = load_model(ref_model, dtype=dtype, trust_remote_code=trust_remote_code) if name else ref_model
        found = Reference("given", scorer, model, name=name, autocast=autocast)
    elif kind == "none":
        raise ValueError(f"{source} was trained without a reference, so it has no rewards. Pass a ref_model.")
    elif is_adapter and kind in ("", "adapter", "adapter_off"):
        saved = saved_file(source, f"{ADAPTER}/adapter_config.json") is not None
        if kind == "adapter" and not saved:
            raise ValueError(
                f"{source} was trained from another adapter, which was saved in its folder {ADAPTER!r}, but this "
                "folder is missing. Copy it from the folder that training wrote, or pass a ref_model."
            )
        if saved and kind != "adapter_off" and ADAPTER not in policy.peft_config:
            trained = policy.active_adapter
            policy.load_adapter(source, ADAPTER, subfolder=ADAPTER)
            policy.set_adapter(trained)
        kind = "adapter" if saved and kind != "adapter_off" else "adapter_off"
        found = Reference(kind, scorer, autocast=autocast)
    elif identity is None or not identity.name:
        raise ValueError(
            f"{source} is a full model without information on its reference. A reward compares it with the model that "
            "training started from. Pass that model as ref_model (on the command line --ref_model)."
            if identity is None
            else f"{source} was trained against a reference that had no name ({kind}). Pass it as ref_model."
        )
    else:
        try:
            model = load_model(identity.name, dtype=dtype, trust_remote_code=trust_remote_code)
        except OSError as error:
            raise OSError(
                f"{source} was trained against the reference {identity.name}, which could not be loaded ({error}). Put "
                "it there, or pass a ref_model (on the command line --ref_model)."
            ) from error
        known = {"name": identity.name, "revision": identity.revision}
        found = Reference(kind, scorer, model, autocast=autocast, **known)
    if settings is not None and identity is not None and identity.logps:
        off = _difference(found, policy, identity, settings.mixed_precision)
        name = identity.name or "a model without a name"
        said = (
            f"{source} was trained against another reference ({identity.kind}, {name}): the log-probabilities of the "
            f"reference found here differ by {off:.2g} nats per token."
        )
        if off and ref_model is not None:
            logger.warning(f"{said} The rewards are not those of the training.")
        elif off:
            raise ValueError(f"{said} Pass the reference of the training as ref_model.")
    return found


def _difference(reference: Reference, policy: Any, identity: ReferenceIdentity, mixed_precision: str | None) -> float:
    """The difference between a reference and the one in training, in nats per token. 0 if rounding explains it."""
    model = policy if reference.model is None else reference.model
    ids = torch.tensor(identity.input_ids, device=model.device)
    off = identity.difference(reference.fingerprint(policy, ids))
    exact = model.dtype in (torch.float32, torch.float64) and getattr(model.config, "quantization_config", None) is None
    exact = exact and mixed_precision in (None, "no")
    return 0.0 if off <= (TOLERANCE if exact else COARSE_TOLERANCE) else off


@contextlib.contextmanager
def as_reference(model: Any, source: str | None = None) -> Iterator[Any]:
    """A context in which a model with an adapter is its own reference.

    The adapter is switched off. If training started from an adapter, which is saved in the folder "ref", that adapter
    is active instead.

    Args:
        model: a model with an adapter.
        source: the folder or name of the model.

    Raises:
        ValueError: if the model has no adapter, because then it does not contain its reference.
    """
    if not is_peft_model(model):
        raise ValueError(
            "The model has no adapter, so it does not contain its reference. Pass the model that training started from."
        )
    if source is None or saved_file(source, f"{ADAPTER}/adapter_config.json") is None:
        with model.disable_adapter():
            yield model
        return
    trained = model.active_adapter
    model.load_adapter(source, ADAPTER, subfolder=ADAPTER)
    model.set_adapter(ADAPTER)
    try:
        yield model
    finally:
        model.set_adapter(trained)
        model.delete_adapter(ADAPTER)


def check_same_tokens(
    tokenizer: PreTrainedTokenizerBase, ref_tokenizer: PreTrainedTokenizerBase, rows: Dataset, name: str, ref_name: str
) -> None:
    """Raise ValueError if the reference's tokenizer has another token, or none, for a token id of the rows."""
    ids = {token for column in ("prompt_ids", "completion_ids") for row in rows[column] for token in row}
    known = set(ref_tokenizer.get_vocab().values())
    for token in sorted(ids):
        ours = tokenizer.convert_ids_to_tokens(token)
        theirs = ref_tokenizer.convert_ids_to_tokens(token) if token in known else None
        if ours != theirs:
            raise ValueError(
                f"Token {token} is {ours!r} for {name}, but {theirs!r} for its reference {ref_name}, so their "
                "log-probabilities are not comparable. Pass the model that training started from."
            )
