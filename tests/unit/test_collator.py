"""The collator's tensors, and the metrics' arithmetic."""

import pytest
import torch

from trl_ulma import DataCollatorForPointwisePreference
from trl_ulma.metrics import ROW_FIGURES, RatioSums, figures, masked, reward_ratios

ROW = {"prompt_ids": [1, 2, 3], "completion_ids": [4, 5], "label": 1.0}


def collate(*rows, **kwargs):
    return DataCollatorForPointwisePreference(pad_token_id=0, **kwargs)([ROW | row for row in rows])


def test_kinds_and_shapes():
    batch = collate({}, {"completion_ids": [4]}, {"label": False})
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "input_ids": ((3, 5), torch.int64),
        "attention_mask": ((3, 5), torch.int64),
        "completion_mask": ((3, 5), torch.int64),
        "label": ((3,), torch.float32),
        "sft_mask": ((3,), torch.bool),
    }


def test_optional_columns_come_where_rows_have_them():
    more = {"log_z": 0.5, "weight": 2.0, "ref_logps": -3.25, "label_type": "continuous", "row": 7}
    batch = collate(more, more | {"label_type": "binary"})
    assert batch["log_z"].tolist() == [0.5, 0.5]
    assert batch["weight"].tolist() == [2.0, 2.0]
    assert batch["ref_logps"].tolist() == [-3.25, -3.25]
    assert batch["continuous"].tolist() == [True, False]
    assert batch["row"].tolist() == [7, 7]


@pytest.mark.parametrize(
    ("label", "rules", "demonstration"),
    [
        (1.0, {}, True),
        (0.99, {}, False),
        (0.0, {}, False),
        (1.0, {"label_type": "continuous"}, False),
        (0.5, {"label_type": "continuous", "sft_threshold": 0.5}, True),
        (0.4, {"label_type": "continuous", "sft_threshold": 0.5}, False),
    ],
)
def test_rows_without_a_mask_are_demonstrations_by_their_label(label, rules, demonstration):
    assert collate({"label": label}, **rules)["sft_mask"].tolist() == [demonstration]
    assert collate({"label": label, "sft_mask": not demonstration}, **rules)["sft_mask"].tolist() == [not demonstration]


@pytest.mark.parametrize(
    ("mode", "ids", "mask"), [("keep_start", [1, 2, 3, 4], [0, 0, 0, 1]), ("keep_end", [2, 3, 4, 5], [0, 0, 1, 1])]
)
def test_long_rows_are_cut_before_padding(mode, ids, mask):
    batch = collate({}, max_length=4, truncation_mode=mode)
    assert batch["input_ids"].tolist() == [ids]
    assert batch["completion_mask"].tolist() == [mask]


def test_an_unknown_truncation_mode_is_refused():
    with pytest.raises(ValueError, match="truncation_mode must be 'keep_start' or 'keep_end'; got 'middle'"):
        collate({}, max_length=4, truncation_mode="middle")


def test_lengths_are_padded_to_a_multiple():
    assert collate({}, pad_to_multiple_of=8)["input_ids"].shape == (1, 8)


def test_figures_are_ratios_of_sums_however_the_rows_are_split():
    values, mask = torch.randn(12), torch.arange(12) % 3 > 0
    whole, parts = RatioSums(torch.device("cpu")), RatioSums(torch.device("cpu"))
    whole.add({"loss/sft": masked(values, mask)}, torch.ones(12, dtype=torch.bool))
    for part, of in zip(values.split([1, 4, 7]), mask.split([1, 4, 7]), strict=True):
        parts.add({"loss/sft": masked(part, of)}, torch.ones(len(part), dtype=torch.bool))
    assert figures(whole.totals()) == pytest.approx({"loss/sft": values[mask].mean().item()})
    assert figures(parts.totals()) == pytest.approx(figures(whole.totals()))


def test_repeated_rows_count_for_nothing():
    sums = RatioSums(torch.device("cpu"))
    sums.add({"loss": (torch.tensor([1.0, torch.nan]), torch.ones(2))}, torch.tensor([True, False]))
    assert figures(sums.totals()) == {"loss": 1.0}


def test_a_figure_over_no_row_is_left_out():
    sums = RatioSums(torch.device("cpu"))
    sums.add({"rewards/chosen": masked(torch.ones(2), torch.zeros(2, dtype=torch.bool))}, torch.ones(2).bool())
    assert figures(sums.totals()) == {}
    assert "rewards/margins" not in ROW_FIGURES  # made of two others


def test_rewards_that_are_not_known_are_in_no_figure():
    rewards = torch.tensor([0.5, torch.nan, -0.25])
    label = torch.tensor([1.0, 1.0, 0.0])
    found = reward_ratios(rewards, rewards, torch.zeros(3), label, label >= 0.5, torch.zeros(3, dtype=torch.bool))
    sums = RatioSums(torch.device("cpu"))
    sums.add(found, torch.ones(3, dtype=torch.bool))
    wanted = {"rewards/chosen": 0.5, "rewards/rejected": -0.25, "rewards/margins": 0.75}
    assert figures(sums.totals()) == pytest.approx(wanted | {"rewards/accuracies": 1.0, "kl": 0.125, "log_z": 0.0})
