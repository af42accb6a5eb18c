"""log π of a row is the sum of the log softmax of the model's own logits, whatever the architecture."""

import pytest
import torch
from architectures import ARCHITECTURES, VOCABULARY, is_known, skip_unless_it_works, tiny_model

from trl_ulma import DataCollatorForPointwisePreference

# Nats a token
TOLERANCE = 1e-4
# Architectures that may be refused, with the measured difference; none needs to be
MAY_BE_REFUSED: set[str] = set()


def row_logps(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """`(B,)` log π of the rows of a batch, in nats, as the trainers compute it."""
    from trl_ulma.likelihood.scorer import Scorer

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "completion_mask")}
    return Scorer(layout="padded")(model, inputs).log_probs.sum(1)


def make_batch() -> dict[str, torch.Tensor]:
    """Four rows of random tokens, of different lengths, prompts of one token and more."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        {
            "prompt_ids": torch.randint(3, VOCABULARY, (prompt,), generator=generator).tolist(),
            "completion_ids": torch.randint(3, VOCABULARY, (completion,), generator=generator).tolist(),
            "label": 1.0,
        }
        for prompt, completion in ((5, 9), (8, 2), (1, 6), (3, 4))
    ]
    return DataCollatorForPointwisePreference(pad_token_id=0)(rows)


def per_token(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """`(B, T − 1)` log-probabilities of the completion tokens by the model's own logits, 0 elsewhere."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    log_probs = logits[:, :-1].double().log_softmax(-1)
    return log_probs.gather(2, batch["input_ids"][:, 1:, None])[..., 0] * batch["completion_mask"][:, 1:]


def padded_rows(batch: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """(number, length) of the rows that have padding."""
    lengths = batch["attention_mask"].sum(1).tolist()
    return [(row, length) for row, length in enumerate(lengths) if length < max(lengths)]


@torch.no_grad()
def alone(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """`(B,)` log π of the rows that are padded, by the model's own logits, one row at a time without padding."""
    found = []
    for row, length in padded_rows(batch):
        single = {name: value[row : row + 1, :length] for name, value in batch.items() if value.dim() == 2}
        found.append(per_token(model, single).sum(1))
    return torch.cat(found)


def gradients(model: torch.nn.Module, logps: torch.Tensor) -> torch.Tensor:
    """The gradient of a weighted sum of rows' log π, with respect to all weights, as one vector."""
    model.zero_grad()
    (logps.double() * torch.tensor([1.0, -0.5, 0.3, 2.0], dtype=torch.float64)).sum().backward()
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return torch.cat([gradient.double().flatten() for gradient in found])


def table(names: tuple[str, ...], *columns: torch.Tensor) -> str:
    """Figures row by row, for a failure's message."""
    lines = ["  row" + "".join(f"{name:>16}" for name in names)]
    for row, values in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        lines.append(f"{row:5d}" + "".join(f"{value:16.6f}" for value in values))
    return "\n" + "\n".join(lines)


def test_there_are_enough_architectures():
    assert sum(is_known(model_type) for model_type, _ in ARCHITECTURES.values()) >= 100


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_rows_log_probability_is_that_of_the_models_own_logits(name):
    model_type, settings = ARCHITECTURES[name]
    skip_unless_it_works(name)
    model, batch = tiny_model(model_type, settings), make_batch()
    tokens = batch["completion_mask"].sum(1)
    own = per_token(model, batch)
    # Uniform logits would agree whatever was left out
    scored = own[batch["completion_mask"][:, 1:].bool()]
    assert scored.std() > 0.3, f"{name} is too close to uniform to show anything"
    if name in MAY_BE_REFUSED:
        with pytest.raises(ValueError, match=r"\d nats"):
            row_logps(model, batch)
        return
    found = row_logps(model, batch)
    wanted = own.sum(1).detach()
    padless = wanted.index_copy(0, torch.tensor([row for row, _ in padded_rows(batch)]), alone(model, batch))
    shown = table(
        ("tokens", "found", "own logits", "without padding", "off per token"),
        *(tokens, found.detach(), wanted, padless, (found.detach() - wanted) / tokens),
    )
    assert ((found.double() - wanted).abs() <= TOLERANCE * tokens).all(), name + shown
    assert ((found.double() - padless).abs() <= TOLERANCE * tokens).all(), name + shown
    expected = gradients(model, own.sum(1))
    assert expected.norm() > 0
    off = (gradients(model, found) - expected).norm() / expected.norm()
    assert off < 1e-3, f"{name}: the gradient is off by {off:.2g} of its length"
