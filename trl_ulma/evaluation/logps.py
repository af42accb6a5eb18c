"""A checkpoint or adapter loaded, and the log-probabilities that it gives to completions."""

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftConfig
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from trl_ulma.judge import saved_file
from trl_ulma.likelihood.layouts import positions_of
from trl_ulma.rows.rendering import own_processing_class, tokenizer_of

# Of what a tokenizer consists of; one of them is in every folder with a tokenizer
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
# Of a prepared row
_IDS = ["prompt_ids", "completion_ids"]


def load_model(name: str, *, dtype: str = "auto", trust_remote_code: bool = False) -> Any:
    """A causal language model in evaluation mode: a checkpoint's folder, an adapter's, or a name on the hub.

    It is put on the GPUs where there are any.
    """
    is_adapter = adapter_base(name) is not None
    loader: Any = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
    placed = {"device_map": "auto"} if torch.cuda.is_available() else {}
    return loader.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code, **placed).eval()


def adapter_base(name: str) -> str | None:
    """The model that an adapter was trained on; None for what is no adapter."""
    if find_adapter_config_file(name) is None:
        return None
    return PeftConfig.from_pretrained(name).base_model_name_or_path


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint or adapter, that of its base where an adapter was saved without one."""
    base = adapter_base(name)
    has_own = not Path(name).is_dir() or any((Path(name) / file).is_file() for file in _TOKENIZER_FILES)
    source = name if base is None or has_own else base
    return tokenizer_of(own_processing_class(None, source, None, revision=None, trust_remote_code=trust_remote_code))


def positions(name: str, *, trust_remote_code: bool = False) -> int | None:
    """How many tokens a model, or an adapter's, can read at most; see `trl_ulma.likelihood.layouts.positions_of`."""
    return positions_of(AutoConfig.from_pretrained(adapter_base(name) or name, trust_remote_code=trust_remote_code))


@contextlib.contextmanager
def as_reference(model: Any, source: str | None = None) -> Iterator[Any]:
    """An adapter's model as what it was trained away from: with the adapter switched off, or, where training began from
    an adapter, with that one, which was saved in the folder "ref".

    Args:
        model: with an adapter.
        source: its folder or name.

    Raises:
        ValueError: for a model without an adapter, which does not contain its reference.
    """
    if not is_peft_model(model):
        raise ValueError("The model is no adapter, so its reference is not in it. Name the model that it began as.")
    if source is None or saved_file(source, "ref/adapter_config.json") is None:
        with model.disable_adapter():
            yield model
        return
    trained = model.active_adapter
    model.load_adapter(source, "ref", subfolder="ref")
    model.set_adapter("ref")
    try:
        yield model
    finally:
        model.set_adapter(trained)
        model.delete_adapter("ref")


def check_same_tokens(
    tokenizer: PreTrainedTokenizerBase, ref_tokenizer: PreTrainedTokenizerBase, rows: Dataset, name: str, ref_name: str
) -> None:
    """Raise ValueError where a token of the rows is another one, or none, to the reference's tokenizer."""
    ids = {token for column in _IDS for row in rows[column] for token in row}
    known = set(ref_tokenizer.get_vocab().values())
    for token in sorted(ids):
        ours = tokenizer.convert_ids_to_tokens(token)
        theirs = ref_tokenizer.convert_ids_to_tokens(token) if token in known else None
        if ours != theirs:
            raise ValueError(
                f"Token {token} is {ours!r} to {name} and {theirs!r} to its reference {ref_name}, so their "
                "log-probabilities are not of the same thing. Name the model that training began with."
            )


def completion_logps(
    model: Any, rows: Dataset, *, batch_size: int = 8, what: str = "Scoring"
) -> tuple[np.ndarray, np.ndarray]:
    """(`(N,)` log π(y|x) in nats, summed over completion tokens, EOS included; `(N,)` the numbers of these tokens).

    The first token of a sequence is predicted by nothing: where a prompt is empty, it is not scored.

    Args:
        model: a causal language model, or an adapter on one.
        rows: prepared rows, with `prompt_ids` and `completion_ids`.
        batch_size: rows a forward.
        what: on the progress bar.

    Raises:
        ValueError: where a log-probability is not finite, naming the row.

    Example:
        >>> logps, tokens = completion_logps(model, rows)  # doctest: +SKIP
    """
    (prompts, completions), numbers = (rows[name][:] for name in _IDS), rows["row"][:]
    logps, tokens = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    masks: Any = rows["completion_mask"][:] if "completion_mask" in rows.column_names else [None] * len(rows)
    takes_slice = _takes_slice(model)
    by_length = sorted(range(len(rows)), key=lambda i: len(prompts[i]) + len(completions[i]), reverse=True)
    with torch.inference_mode(), tqdm(total=len(rows), desc=what, unit="row") as bar:
        for start in range(0, len(rows), batch_size):
            batch = by_length[start : start + batch_size]
            whole = [torch.tensor([*prompts[i], *completions[i]]) for i in batch]
            ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in whole], batch_first=True)
            first = [max(len(prompts[i]), 1) for i in batch]
            # The head is as wide as the vocabulary: positions before all completions are spared it
            skipped = min(first) - 1
            keep = {"logits_to_keep": ids.size(1) - skipped} if takes_slice else {}
            output = model(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False, **keep
            )
            # Counted from the end, since an adapter can put virtual tokens before the row's
            logits = output.logits[:, -(ids.size(1) - skipped) :]
            for place, i in enumerate(batch):
                end = len(whole[place])
                target = whole[place][first[place] : end].to(logits.device)
                scored = logits[place, first[place] - 1 - skipped : end - 1 - skipped].float()
                is_scored = torch.tensor((masks[i] or [1] * len(completions[i]))[-len(target) :], device=target.device)
                losses = torch.nn.functional.cross_entropy(scored, target, reduction="none").double()
                logps[i] = -(losses * is_scored).sum().item()
                tokens[i] = is_scored.sum().item()
            bar.update(len(batch))
    broken = np.flatnonzero(~np.isfinite(logps))
    if len(broken):
        raise ValueError(
            f"The log-probability of row {numbers[broken[0]]} is {logps[broken[0]]} ({len(broken)} rows in all are "
            'not finite). Load the model with dtype="float32", or look at its weights.'
        )
    return logps, tokens


def prompt_states(model: Any, rows: Dataset, *, batch_size: int = 8) -> torch.Tensor:
    """`(N, H)`, the last hidden state at the token before each completion, which a learned log Z reads.

    Args:
        model: a causal language model, or an adapter on one.
        rows: prepared rows; where a prompt is empty, it is the state of the completion's first token.
        batch_size: rows a forward.

    Example:
        >>> prompt_states(model, rows)  # doctest: +SKIP
    """
    both = zip(*(rows[name][:] for name in _IDS), strict=True)
    prompts = [prompt or completion[:1] for prompt, completion in both]
    backbone = (model.get_base_model() if is_peft_model(model) else model).base_model
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    states = []
    with torch.inference_mode(), tqdm(total=len(prompts), desc="Reading prompts", unit="row") as bar:
        for start in range(0, len(prompts), batch_size):
            batch = [torch.tensor(prompts[i]) for i in by_length[start : start + batch_size]]
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(model.device)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in batch], batch_first=True)
            hidden = backbone(input_ids=ids, attention_mask=mask.to(ids), use_cache=False).last_hidden_state
            states.append(hidden[torch.arange(len(batch)), mask.sum(1) - 1].float().cpu())
            bar.update(len(batch))
    return torch.cat(states)[np.argsort(by_length)]


def _takes_slice(model: Any) -> bool:
    bare = model.get_base_model() if is_peft_model(model) else model
    return "logits_to_keep" in inspect.signature(bare.forward).parameters
