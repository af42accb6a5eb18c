"""A saved model: its files in a folder or on the Hub, and its policy, tokenizer and reference."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import transformers
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import cached_file, logging
from transformers.utils.peft_utils import find_adapter_config_file

from trl_ulma.labels import LabelRules, LabelTransform
from trl_ulma.likelihood.layouts import positions_of
from trl_ulma.likelihood.noise import evaluation_mode
from trl_ulma.likelihood.reference import (
    ADAPTER,
    COARSE_TOLERANCE,
    TOLERANCE,
    Reference,
    ReferenceIdentity,
    plain_batch,
)
from trl_ulma.likelihood.scorer import Scorer, bare_model, is_exact, rounds_float32
from trl_ulma.rows.rendering import own_processing_class, tokenizer_of

logger = logging.get_logger(__name__)

# Nats a token by which log-ratios in float32 may differ on another device
LOG_RATIO_TOLERANCE = 1e-5
# By how much rewards may differ without a warning
REWARD_TOLERANCE = 1e-4

# Beside the model's weights
SETTINGS_FILE = "pointwise.json"
# Architectures of models that `AutoModelForCausalLM` loads, with a new head instead of their own
_NO_LANGUAGE_MODEL = re.compile(r"For(\w*Classification|\w*QuestionAnswering|MaskedLM|\w*RewardModel)$")
_STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Of what a tokenizer consists of; one of them is in every folder with a tokenizer
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class SavedSettings:
    """Everything besides the weights that scores depend on: `pointwise.json` in a saved model's folder.

    Attributes:
        label_type: the label type of rows that have no column `label_type`.
        length_normalize: whether log-probabilities are divided by the number of completion tokens.
        log_z: a number in nats, or the name of a choice. Its state is in `log_z.safetensors`.
        max_length: the maximum length of a sequence in tokens.
        assistant_only_loss: whether only the assistant's turns of a completion are scored.
        chat: whether rows of text become messages, see `trl_ulma.rows.chat`.
        system_message: of conversations that have none, or None.
        label_transform: fitted, or None.
        label_center: the mean of the continuous labels of the training set, after the transform, by which figures tell
            chosen rows from rejected ones; or None, if it is not known.
        sft_threshold: continuous labels of this and above, after the transform, are demonstrations; or None.
        dtype: of the weights while training, as "float32"; or None, if it is not known.
        mixed_precision: "no", "bf16" or "fp16"; or None, if it is not known.
        rounds_float32: whether the device rounded the factors of float32 products in training, such as to TF32.
        quantization: of the model that an adapter was trained on, as its config has it; or None.
        policy_logps: log-probabilities of the reference's `input_ids` under this model, one sum per sequence, in nats.
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
    label_center: float | None = None
    sft_threshold: float | None = None
    dtype: str | None = None
    mixed_precision: str | None = None
    rounds_float32: bool = False
    quantization: Mapping[str, Any] | None = None
    policy_logps: Sequence[float] = ()
    reference: ReferenceIdentity | None = None
    trl_ulma: str = ""

    @classmethod
    def of_training(
        cls,
        args: Any,
        rules: LabelRules,
        model: Any,
        *,
        label_center: float | None,
        is_chat: bool,
        mixed_precision: str,
        policy_logps: Sequence[float],
        reference: ReferenceIdentity,
    ) -> Self:
        """The settings of a training.

        Args:
            rules: how labels are read, with the fitted transform.
            label_center: where evaluation splits continuous labels.
            is_chat: whether it was trained on conversations.
        """
        names = ("beta", "label_type", "length_normalize", "log_z", "max_length", "truncation_mode")
        return cls(
            **{name: getattr(args, name) for name in (*names, "assistant_only_loss", "system_message")},
            chat=str(is_chat).lower(),
            label_transform=rules.transform,
            label_center=label_center,
            sft_threshold=rules.sft_threshold,
            dtype=str(bare_model(model).dtype).removeprefix("torch."),
            mixed_precision=mixed_precision,
            rounds_float32=rounds_float32(bare_model(model).device.type),
            quantization=quantization_of(model),
            policy_logps=policy_logps,
            reference=reference,
            trl_ulma=version("trl-ulma"),
        )

    def write(self, folder: str | Path) -> None:
        """Write the settings to a folder."""
        steps = None if self.label_transform is None else self.label_transform.to_json()
        text = json.dumps({**asdict(self), "label_transform": steps}, indent=2)
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


def identity_in(checkpoint: str | Path) -> ReferenceIdentity | None:
    """The identity of a checkpoint's reference. None if it has no reference, or if the checkpoint lacks it."""
    file = Path(checkpoint) / SETTINGS_FILE
    found = SavedSettings.read(file).reference if file.exists() else None
    return found if found is not None and found.logps else None


def policy_logps_in(checkpoint: str | Path) -> Sequence[float]:
    """log π_θ of the reference's `input_ids` when a checkpoint was written. () if the checkpoint lacks them."""
    file = Path(checkpoint) / SETTINGS_FILE
    return SavedSettings.read(file).policy_logps if file.exists() else ()


def check_source(option: str, name: str, *, trust_remote_code: bool = False) -> None:
    """Raise ValueError if the configuration or the tokenizer of a model cannot be loaded, or if it generates no text.

    Args:
        option: that names the model, such as "--model".
        name: where the model is.
    """
    try:
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers makes an empty one
            raise ValueError("its tokenizer has no tokens, because its files are missing")
        config = AutoConfig.from_pretrained(adapter_base(name) or name, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{option} {name}: its configuration and its tokenizer cannot be loaded "
            f"({' '.join(str(error).split())[:300]}). Name the folder of a checkpoint or an adapter, or a model on the "
            "hub."
        ) from error
    if adapter_base(name) is not None:
        kind = str(PeftConfig.from_pretrained(name).task_type or "CAUSAL_LM")
        kind = "" if kind.endswith("CAUSAL_LM") else f"an adapter for {kind.rpartition('.')[2]}"
    else:
        kind = (config.architectures or [""])[0]
        kind = f"a {kind}" if getattr(config, "is_encoder_decoder", False) or _NO_LANGUAGE_MODEL.search(kind) else ""
    if kind:
        raise ValueError(f"{option} {name} is {kind}, and not a causal language model. Name one that is.")


def load_model(name: str, *, dtype: str = "auto", revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A causal language model in evaluation mode: a checkpoint's folder, an adapter's, or a name on the hub.

    It is put on the GPUs if there are any. The base model of an adapter is quantized as in training.

    Args:
        dtype: of the weights; "auto" is the one that the model was trained with, and float32 if that is not known,
            because log-probabilities are not precise enough for rewards in the formats that weights are stored in.

    Raises:
        OSError: if there is no model, or if the base model of an adapter is missing.
    """
    settings = saved_settings(name)
    if dtype == "auto":
        dtype = (settings and settings.dtype) or "float32"
    config = None if find_adapter_config_file(name) is None else PeftConfig.from_pretrained(name)
    if config is None:
        return _load_full(name, revision, {"dtype": dtype, "trust_remote_code": trust_remote_code}).eval()
    base: Any = config.base_model_name_or_path
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if settings is not None and settings.quantization is not None:
        options["quantization_config"] = dict(settings.quantization)
    try:
        loaded = _load_full(base, config.revision, options)
    except OSError as error:
        raise OSError(
            f"{name} is an adapter on {base}, but this base model could not be loaded ({error}). Put it there, or set "
            f"base_model_name_or_path in {name}/adapter_config.json to its location."
        ) from error
    embeddings = loaded.get_input_embeddings().weight.shape[0]
    size = _stored_embeddings(loaded, name)
    if size is None and _has_tokenizer(name):  # which may have grown for the training
        size = max(len(load_tokenizer(name, trust_remote_code=trust_remote_code)), embeddings)
    if size is not None and size != embeddings:
        loaded.resize_token_embeddings(size)
    model = PeftModel.from_pretrained(loaded, name)
    _use_stored_dtype(model, name)
    return model.eval()


def _stored_embeddings(base: Any, name: str) -> int | None:
    """The number of embeddings that an adapter was saved with. None if it was saved without them.

    PEFT saves them if they were resized for the training, for example to a multiple of 64.
    """
    file = saved_file(name, SAFETENSORS_WEIGHTS_NAME)
    if file is None:
        return None
    embeddings = base.get_input_embeddings()
    place = next(place for place, module in base.named_modules() if module is embeddings)
    with safe_open(file, "pt") as stored:
        keys = [key for key in stored.keys() if f".{place}." in key and key.endswith(".weight")]  # noqa: SIM118
        shapes = [stored.get_slice(key).get_shape() for key in keys]
    return next((shape[0] for shape in shapes if shape[1:] == list(embeddings.weight.shape[1:])), None)


def _use_stored_dtype(model: Any, name: str) -> None:
    """Put an adapter's weights into the format that they are stored in, which is that of training; PEFT makes them
    float32."""
    file = saved_file(name, SAFETENSORS_WEIGHTS_NAME)
    if file is None:
        return
    with safe_open(file, "pt") as stored:
        known = set(stored.keys())
        for full, parameter in model.named_parameters():
            key = ".".join(part for part in full.split(".") if part != model.active_adapter)
            if key != full and key in known:
                dtype = _STORED_DTYPES.get(stored.get_slice(key).get_dtype(), parameter.dtype)
                parameter.data = parameter.data.to(dtype)


def _load_full(name: str, revision: str | None, options: dict[str, Any]) -> Any:
    """A model that is no adapter, of the class that TRL trains it as."""
    placed = {"device_map": "auto"} if torch.cuda.is_available() else {}
    known = {"revision": revision, "trust_remote_code": options["trust_remote_code"]}
    config = AutoConfig.from_pretrained(name, **known)
    if getattr(config, "quantization_config", None) is not None:  # as it is stored
        options = {key: value for key, value in options.items() if key != "quantization_config"}
    architecture = (config.architectures or [""])[0]
    sees = architecture.endswith("ForConditionalGeneration")  # images
    loader: Any = getattr(transformers, architecture, None) if sees else None
    return (loader or AutoModelForCausalLM).from_pretrained(name, revision=revision, **options, **placed)


def quantization_of(model: Any) -> dict[str, Any] | None:
    """How a model's weights are quantized, as plain values; None if they are not."""
    found = getattr(bare_model(model).config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def training_autocast(settings: SavedSettings | None, model: Any) -> Any:
    """A context for forwards as in training: mixed precision, if the weights are in the format of training."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get((settings and settings.mixed_precision) or "")
    trained = (settings and settings.dtype) or "float32"
    if dtype is None or str(model.dtype).removeprefix("torch.") != trained:
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=dtype)


def adapter_base(name: str) -> str | None:
    """The model that an adapter was trained on. None if `name` is not an adapter."""
    if find_adapter_config_file(name) is None:
        return None
    return PeftConfig.from_pretrained(name).base_model_name_or_path


def load_processing_class(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | ProcessorMixin:
    """The tokenizer of a checkpoint or adapter, or the processor of one that takes images; that of its base, if an
    adapter was saved without one."""
    base = adapter_base(name)
    source = name if base is None or _has_tokenizer(name) else base
    return own_processing_class(None, source, None, revision=None, trust_remote_code=trust_remote_code)


def _has_tokenizer(name: str) -> bool:
    """Whether a folder has a tokenizer; of a name on the hub it is assumed."""
    return not Path(name).is_dir() or any((Path(name) / file).is_file() for file in _TOKENIZER_FILES)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer alone, see `load_processing_class`."""
    return tokenizer_of(load_processing_class(name, trust_remote_code=trust_remote_code))


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
        ref_model: a model, or where one is, in place of the one that the settings name.
        dtype: of the reference's weights; "auto" is the one of training.

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
    resized = ""
    if dtype == "auto":
        dtype = (identity and identity.dtype) or str(policy.dtype).removeprefix("torch.")
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
            options: Any = {"dtype": dtype, "trust_remote_code": trust_remote_code}
            model = load_model(identity.name, revision=identity.revision, **options)
        except OSError as error:
            raise OSError(
                f"{source} was trained against the reference {identity.name}, which could not be loaded ({error}). Put "
                "it there, or pass a ref_model (on the command line --ref_model)."
            ) from error
        ours, theirs = (each.get_input_embeddings().weight.shape[0] for each in (policy, model))
        if kind != "given" and ours != theirs:
            resized = (
                f"{source} has {ours:,} embeddings, but {identity.name}, which it was trained from, has {theirs:,}: "
                "they were resized in memory before the training, and the reference was not saved. Resize "
                f"{identity.name} in the same way, save it, and pass the result as ref_model (on the command line "
                "--ref_model). Before another training, save the resized model and load it from there."
            )
            if theirs < len(load_tokenizer(source, trust_remote_code=trust_remote_code)):
                raise ValueError(resized)  # it cannot read the tokens that were added
        # An adapter may have been merged since
        known = {"name": identity.name, "revision": identity.revision}
        found = Reference("copy" if kind == "copy" else "given", scorer, model, autocast=autocast, **known)
    if settings is not None and identity is not None and identity.logps:
        off = _difference(found, policy, identity, settings)
        name = identity.name or "a model without a name"
        said = (
            f"{source} was trained against another reference ({identity.kind}, {name}): the log-probabilities of the "
            f"reference found here differ by {off:.2g} nats per token."
        )
        if off and ref_model is not None:
            logger.warning(f"{said} The rewards are not those of the training.")
        elif off:
            remedy = "Pass the reference of the training as ref_model."
            if kind in ("adapter_off", "adapter"):
                remedy = (
                    "Its base is loaded with other weights or settings than in the training, such as another revision, "
                    "so that the policy is another one, too. Load the base as it was, save it, and name its folder in "
                    "base_model_name_or_path of adapter_config.json."
                )
            now = str(bare_model(policy).dtype).removeprefix("torch.")
            if settings.dtype not in (None, now):
                remedy = f"The model was trained in {settings.dtype}, and is loaded in {now}: leave out dtype."
            raise ValueError(resized or f"{said} {remedy}")
    return found


@torch.no_grad()
def differs_from_training(
    policy: Any,
    reference: Reference | None,
    source: str,
    settings: SavedSettings | None,
    tokens: int,
    beta: float | None = None,
) -> str | None:
    """What is to be said if rewards are not those of the training, with the effect; None if they are.

    The log-probabilities of a few sequences under the model and its reference were saved with the model. How much their
    log-ratios differ now is measured. From that follows by how much rewards differ at most, see `reward_difference`.

    Args:
        policy: the saved model, loaded.
        reference: what it is compared with; None if that is known to be the same as in training.
        source: the model's folder or name.
        settings: what training wrote beside the model, or None.
        tokens: of the longest completion that is scored.
        beta: of the rewards; by default that of training.
    """
    identity = None if settings is None else settings.reference
    if settings is None or identity is None or not settings.policy_logps or not identity.input_ids:
        return None
    ids = torch.tensor(identity.input_ids, device=policy.device)
    with evaluation_mode(policy), training_autocast(settings, policy):
        off = Scorer()(policy, plain_batch(ids)).logps.double().cpu().numpy() - np.asarray(settings.policy_logps)
    if reference is not None and identity.logps:
        model = policy if reference.model is None else reference.model
        off = off - (np.array(reference.fingerprint(policy, ids.to(model.device))) - np.asarray(identity.logps))
    each = len(identity.input_ids[0]) - 1
    # Means over tokens differ most in the shortest completions
    difference = reward_difference(off, each, 1 if settings.length_normalize else tokens)
    effect = (settings.beta if beta is None else beta) * difference
    largest = float(np.abs(off).max())  # NaN if one is
    if largest / each <= LOG_RATIO_TOLERANCE or effect <= REWARD_TOLERANCE:
        return None
    return (
        f"{source} is not computed as when it was saved: its log-ratios of {len(off)} sequences of {each} tokens "
        f"differ by up to {largest:.2g} nats from those in training. Rewards of the rows here, whose completions have "
        f"up to {tokens} tokens, differ from those of the training by up to about {effect:.2g}. Possible causes: "
        "another number format or quantization, an adapter that was merged into rounded weights, another reference, or "
        "another kind of device."
    )


def reward_difference(off: np.ndarray, each: int, tokens: int) -> float:
    """By how many nats the log-probability of a completion differs at most, judging by sequences that were measured.

    A difference has a part that all tokens share, which grows with their number n, and a random one, which grows with
    √n. The largest measured difference is taken for the first part, and six standard deviations for the second.

    Args:
        off: `(N,)` measured differences, nats per sequence.
        each: tokens of a sequence.
        tokens: of the completion.

    Example:
        >>> round(reward_difference(np.array([0.1, -0.1]), 7, 28), 9)
        1.6
    """
    times = tokens / each
    return float(np.abs(off).max() * times + 6 * np.sqrt((off**2).mean() * times))


def batching_note(source: str, settings: SavedSettings | None, model: Any, beta: float, off: float) -> str | None:
    """What is to be said if log-probabilities depend on which rows are computed together; None if they hardly do.

    Args:
        off: by how many nats the log-probability of a row differs by itself.
    """
    if beta * off <= REWARD_TOLERANCE:
        return None
    mixed = isinstance(training_autocast(settings, model), torch.autocast)
    how = settings.mixed_precision if mixed and settings is not None else str(model.dtype).removeprefix("torch.")
    # In float32 it is the model, such as one whose rotary positions depend on the longest row
    remedy = " With --dtype float32 they hardly do." if mixed or model.dtype != torch.float32 else ""
    if quantization_of(model) is not None:
        how, remedy = f"{how} with quantized weights", ""
    return (
        f"{source} is computed in {how}, in which rewards depend on the rows that are computed together: those of the "
        f"first rows by up to {beta * off:.2g}. Rewards in training's evaluation differ as much if its batches are "
        f"others.{remedy}"
    )


def _difference(reference: Reference, policy: Any, identity: ReferenceIdentity, settings: SavedSettings) -> float:
    """The difference between a reference and the one in training, in nats per token. 0 if rounding explains it."""
    model = policy if reference.model is None else reference.model
    ids = torch.tensor(identity.input_ids, device=model.device)
    off = identity.difference(reference.fingerprint(policy, ids))
    exact = is_exact(model, settings.mixed_precision) and not settings.rounds_float32
    return 0.0 if off <= (TOLERANCE if exact else COARSE_TOLERANCE) else off


@contextlib.contextmanager
def as_reference(model: Any, source: str | None = None) -> Iterator[Any]:
    """A context in which a model with an adapter is its own reference.

    The adapter is switched off. If training started from an adapter, which is saved in the folder "ref", that adapter
    is active instead.

    Args:
        model: a model with an adapter.

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
