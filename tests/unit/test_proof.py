"""What the probe takes for exact, with forwards whose errors are known."""

import pytest
import torch

from trl_ulma.likelihood.proof import prove_packed

BATCH = {
    "input_ids": torch.arange(1, 37).view(3, 12),
    "attention_mask": torch.ones(3, 12, dtype=torch.long),
    "completion_mask": torch.cat([torch.zeros(3, 4), torch.ones(3, 8)], 1).long(),
}


def forward(*, noise=0.0, packed=0.0, contaminated=2.0):
    """Log-probabilities that are off by `noise` in every forward, by more where rows are packed."""
    generator = torch.Generator().manual_seed(0)

    def scores(layout, batch):
        positions = layout.inputs.get("position_ids")
        off = 0.0
        if positions is not None:
            off = packed if (positions == 0).sum() > 1 else contaminated
        values = -3.0 + (noise + off) * torch.randn(batch["input_ids"][:, 1:].shape, generator=generator).double()
        return torch.where(batch["completion_mask"][:, 1:] == 1, values, 0.0)

    return scores


@pytest.mark.parametrize(
    ("exact", "errors"),
    [
        (True, {"packed": 1e-6}),
        # Half precision: single differences can be larger than any between paddings
        *[(False, {"noise": noise}) for noise in (1e-3, 0.02, 0.06)],
    ],
)
def test_an_exact_forward_passes(exact, errors):
    prove_packed(forward(**errors), BATCH, exact=exact)


@pytest.mark.parametrize(
    ("exact", "errors"),
    [
        (True, {"packed": 1e-3}),
        # Below the bound, and still as far off as rows that see one another: a model that hardly attends
        (True, {"packed": 1e-5, "contaminated": 1e-4}),
        (True, {"packed": float("nan")}),
        (False, {"noise": 0.02, "packed": 0.2}),
        (False, {"noise": 0.06, "contaminated": 0.1}),
        (False, {"noise": float("nan")}),
    ],
)
def test_one_that_is_not_is_refused(exact, errors):
    with pytest.raises(ValueError, match=r"padding_free=True is not exact with this model: log-probabilities differ"):
        prove_packed(forward(**errors), BATCH, exact=exact)
