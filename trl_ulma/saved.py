"""A saved model: the files in its folder or on the hub, its policy, tokenizer and reference."""

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

# Beside the model's weights
SETTINGS_FILE = "pointwise.json"
# Of what a tokenizer consists of; one of them is in every folder with a tokenizer
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class SavedSettings:
    """What a score depends on besides the weights: `pointwise.json` in a saved model's folder.

    Attributes:
        beta: β.
        label_type: of rows that do not say it themselves.
        length_normalize: whether log-probabilities are divided by the completion's tokens.
        log_z: a number of nats, or the name of a choice, whose state is in `log_z.safetensors`.
        max_length: longest sequence in tokens.
        truncation_mode: "keep_start" or "keep_end".
        assistant_only_loss: whether only the assistant's turns of a completion are scored.
        chat: whether rows of text become messages, see `trl_ulma.rows.chat`.
        system_message: of conversations that have none, or None.
        label_transform: fitted, or None.
        sft_threshold: continuous labels of this and above, after the transform, are demonstrations; or None.
        dtype: of the weights while training, as "float32"; or None, if it is not known.
        mixed_precision: "no", "bf16" or "fp16"; or None, if it is not known.
        reference: what the model was compared with; or None, if it is not known.
        trl_ulma: the version that wrote it.
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
        """Write them into a folder."""
        steps = None if self.label_transform is None else self.label_transform.to_json()
        reference = None if self.reference is None else self.reference.to_json()
        text = json.dumps({**asdict(self), "label_transform": steps, "reference": reference}, indent=2)
        (Path(folder) / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Those that a file holds; all but `beta` may be left out of it.

        Raises:
            ValueError: naming the file, if it holds something else.
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
            raise ValueError(f"{path} does not hold the settings of a pointwise model ({error}).") from error


def saved_file(model: str, name: str) -> str | None:
    """Where a file is that was saved with a model, in its folder or on the hub; None if there is none."""
    return cached_file(
        model, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )


def saved_settings(model: str) -> SavedSettings | None:
    """What training wrote beside a model; None if it wrote nothing.

    Raises:
        ValueError: if the file holds something else.
    """
    file = saved_file(model, SETTINGS_FILE)
    return None if file is None else SavedSettings.read(file)


def load_model(name: str, *, dtype: str = "auto", trust_remote_code: bool = False) -> Any:
    """A causal language model in evaluation mode: a checkpoint's folder, an adapter's, or a name on the hub.

    It is put on the GPUs if there are any.

    Args:
        name: folder or name.
        dtype: of the weights; "auto" is the one that the model was trained with, or else that of the stored weights.
        trust_remote_code: run code that comes with the model.

    Raises:
        OSError: if there is no model; for an adapter also if its base model is gone.
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
            f"{name} is an adapter on {base}, and that base model could not be loaded ({error}). Put it there, or "
            f"write where it is into base_model_name_or_path of {name}/adapter_config.json."
        ) from error


def training_autocast(settings: SavedSettings | None, model: Any) -> Any:
    """A context for forwards as in a model's training: mixed precision, if that was of weights in float32 as here.

    Args:
        settings: saved with the model, or None.
        model: loaded.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get((settings and settings.mixed_precision) or "")
    if dtype is None or model.dtype != torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=dtype)


def adapter_base(name: str) -> str | None:
    """The model that an adapter was trained on; None for what is no adapter."""
    if find_adapter_config_file(name) is None:
        return None
    return PeftConfig.from_pretrained(name).base_model_name_or_path


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint or adapter; that of its base, if an adapter was saved without one."""
    base = adapter_base(name)
    has_own = not Path(name).is_dir() or any((Path(name) / file).is_file() for file in _TOKENIZER_FILES)
    source = name if base is None or has_own else base
    return tokenizer_of(own_processing_class(None, source, None, revision=None, trust_remote_code=trust_remote_code))


def positions(name: str, *, trust_remote_code: bool = False) -> int | None:
    """How many tokens a model, or an adapter's, can read at most; see `trl_ulma.likelihood.layouts.positions_of`."""
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
    """The reference that a saved model was trained against, and the proof that it is.

    Args:
        policy: the saved model, loaded.
        source: its folder or name.
        settings: what training wrote beside the model, or None.
        ref_model: a model, or where one is, in place of the one that the settings name.
        dtype: of the reference's weights.
        trust_remote_code: run code that comes with the model.

    Raises:
        ValueError: if there is no saying what the reference was, or the one that is found gives other
            log-probabilities than the one of training. For a `ref_model`, that is a warning.
        OSError: if the model that the settings name is gone.
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
        raise ValueError(f"{source} was trained without a reference, so that it has no rewards. Pass a ref_model.")
    elif is_adapter and kind in ("", "adapter", "adapter_off"):
        saved = saved_file(source, f"{ADAPTER}/adapter_config.json") is not None
        if kind == "adapter" and not saved:
            raise ValueError(
                f"{source} was trained away from another adapter, which was saved in its folder {ADAPTER!r}, and that "
                "is gone. Copy it there, or pass a ref_model."
            )
        if saved and kind != "adapter_off" and ADAPTER not in policy.peft_config:
            trained = policy.active_adapter
            policy.load_adapter(source, ADAPTER, subfolder=ADAPTER)
            policy.set_adapter(trained)
        kind = "adapter" if saved and kind != "adapter_off" else "adapter_off"
        found = Reference(kind, scorer, autocast=autocast)
    elif identity is None or not identity.name:
        raise ValueError(
            f"{source} is a full model, and a reward compares it with the model that its training began from. Name "
            "that with ref_model (on the command line --ref_model)."
            if identity is None
            else f"{source} was trained against a reference that had no name ({kind}). Pass it as ref_model."
        )
    else:
        try:
            model = load_model(identity.name, dtype=dtype, trust_remote_code=trust_remote_code)
        except OSError as error:
            raise OSError(
                f"{source} was trained against the reference {identity.name}, which could not be loaded ({error}). Put "
                "it there, or pass ref_model (on the command line --ref_model)."
            ) from error
        known = {"name": identity.name, "revision": identity.revision}
        found = Reference(kind, scorer, model, autocast=autocast, **known)
    if settings is not None and identity is not None and identity.logps:
        off = _difference(found, policy, identity, settings.mixed_precision)
        name = identity.name or "a model without a name"
        said = (
            f"{source} was trained against another reference ({identity.kind}, {name}): the one here gives "
            f"log-probabilities that differ by {off:.2g} nats a token."
        )
        if off and ref_model is not None:
            logger.warning(f"{said} Rewards are not those of the training.")
        elif off:
            raise ValueError(f"{said} Pass the model that training was compared with as ref_model.")
    return found


def _difference(reference: Reference, policy: Any, identity: ReferenceIdentity, mixed_precision: str | None) -> float:
    """Nats a token between a reference and the one that a model was trained against; 0 if it is rounding."""
    model = policy if reference.model is None else reference.model
    ids = torch.tensor(identity.input_ids, device=model.device)
    off = identity.difference(reference.fingerprint(policy, ids))
    exact = model.dtype in (torch.float32, torch.float64) and getattr(model.config, "quantization_config", None) is None
    exact = exact and mixed_precision in (None, "no")
    return 0.0 if off <= (TOLERANCE if exact else COARSE_TOLERANCE) else off


@contextlib.contextmanager
def as_reference(model: Any, source: str | None = None) -> Iterator[Any]:
    """An adapter's model as what it was trained away from: with the adapter switched off, or, if training began from
    an adapter, with that one, which was saved in the folder "ref".

    Args:
        model: with an adapter.
        source: its folder or name.

    Raises:
        ValueError: for a model without an adapter, which does not contain its reference.
    """
    if not is_peft_model(model):
        raise ValueError("The model is no adapter, so its reference is not in it. Name the model that it began as.")
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
    """Raise ValueError if a token of the rows is another one, or none, to the reference's tokenizer."""
    ids = {token for column in ("prompt_ids", "completion_ids") for row in rows[column] for token in row}
    known = set(ref_tokenizer.get_vocab().values())
    for token in sorted(ids):
        ours = tokenizer.convert_ids_to_tokens(token)
        theirs = ref_tokenizer.convert_ids_to_tokens(token) if token in known else None
        if ours != theirs:
            raise ValueError(
                f"Token {token} is {ours!r} to {name} and {theirs!r} to its reference {ref_name}, so their "
                "log-probabilities are not of the same thing. Name the model that training began with."
            )
