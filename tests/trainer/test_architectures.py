"""log π of a row is the sum of the log softmax of the model's own logits, whatever the architecture."""

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, NOT_CAUSAL, VOCABULARY, is_known, tiny_model
from tiny import make_tokenizer
from world import make_rows, make_trainer, plain_logps

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


@torch.no_grad()
def alone(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """`(B,)` log π by the model's own logits, one row at a time and without padding."""
    found = []
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
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
    if not is_known(model_type):
        pytest.skip(f"this version of transformers has no {model_type}")
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
    wanted, padless = own.sum(1).detach(), alone(model, batch)
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


# What the trainers once computed wrongly or not at all, and others of their kind
IN_A_TRAINER = (
    "modernbert-decoder",
    "recurrent_gemma-softcap",
    "gemma2-softcap",
    "granite-scaling",
    "falcon_h1",
    "opt-projected",
)
ROUTERS = ("granitemoe-router", "mixtral-router", "gpt_oss-router", "jamba-router")


def tokenizer_and_model(name: str):
    """A tokenizer, and a small model of an architecture with its vocabulary."""
    tokenizer = make_tokenizer()
    model_type, settings = ARCHITECTURES[name]
    sizes = {"vocab_size": len(tokenizer)}
    if name.startswith("gemma3n"):
        sizes["vocab_size_per_layer_input"] = len(tokenizer)
    return tokenizer, tiny_model(model_type, settings | sizes)


def saved(tokenizer, folder) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", IN_A_TRAINER)
def test_a_trainer_takes_it_and_starts_at_log_2(tmp_path, name):
    tokenizer, model = tokenizer_and_model(name)
    rows = make_rows(4)
    model.config.use_cache = False  # recurrent layers alone do not fill a cache
    logps, _ = plain_logps(saved(tokenizer, tmp_path / "tokenizer"), rows, model)
    trainer = make_trainer(
        model,
        rows,
        tmp_path,
        processing_class=tokenizer,
        pointwise=True,
        max_steps=2,
        learning_rate=1e-12,
        per_device_train_batch_size=4,
    )
    found = trainer.evaluate(rows)
    label = np.array(rows["label"][:])
    assert found["eval_logps/chosen"] == pytest.approx(logps[label == 1].mean(), rel=1e-4)
    assert found["eval_logps/rejected"] == pytest.approx(logps[label == 0].mean(), rel=1e-4)
    trainer.train()
    logged = [log["loss/preference"] for log in trainer.state.log_history if "loss/preference" in log]
    assert logged == pytest.approx([np.log(2)] * len(logged), abs=1e-4)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_mixture_of_experts_starts_at_log_2_with_its_own_auxiliary_loss(tmp_path, name):
    tokenizer, model = tokenizer_and_model(name)
    trainer = make_trainer(
        model,
        make_rows(4),
        tmp_path,
        processing_class=tokenizer,
        pointwise=True,
        max_steps=1,
        learning_rate=1e-12,
        per_device_train_batch_size=4,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        own = model.eval()(**inputs, output_router_logits=True, use_cache=False).aux_loss.item()
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss/preference" in log]
    assert log["loss/preference"] == pytest.approx(np.log(2), abs=1e-4)
    assert log["aux_loss"] == pytest.approx(own, rel=1e-4)
    assert log["loss"] == pytest.approx(log["loss/preference"] + 0.5 * own, rel=1e-4)


def test_experts_that_are_drawn_at_random_need_dropout_allowed(tmp_path):
    """PhiMoE draws its experts in training mode, and its router's "jitter" is a threshold in evaluation mode, too."""
    tokenizer, model = tokenizer_and_model("phimoe-router")
    rows = make_rows(4)
    logps, _ = plain_logps(saved(tokenizer, tmp_path / "tokenizer"), rows, model)
    settings = {"processing_class": tokenizer, "pointwise": True, "max_steps": 1, "per_device_train_batch_size": 4}
    trainer = make_trainer(model, rows, tmp_path, **settings)
    chosen = np.array(rows["label"][:]) == 1
    assert trainer.evaluate(rows)["eval_logps/chosen"] == pytest.approx(logps[chosen].mean(), rel=1e-4)
    with pytest.raises(ValueError, match=r"\d nats.*disable_dropout=False"):
        trainer.train()
    trainer = make_trainer(model, rows, tmp_path, disable_dropout=False, **settings)
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss/preference" in log]
    assert log["aux_loss"] > 0
    assert trainer.evaluate(rows)["eval_loss"] > 0


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_a_model_whose_tokens_see_later_ones_is_refused(tmp_path, name):
    tokenizer = make_tokenizer()
    model_type, settings = NOT_CAUSAL[name]
    model = tiny_model(model_type, settings | {"vocab_size": len(tokenizer)})
    with pytest.raises(ValueError, match=r"later tokens.*\d"):
        make_trainer(model, make_rows(4), tmp_path, processing_class=tokenizer, max_steps=1).train()


def test_a_model_that_scores_several_tokens_at_a_position_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    sizes = {"num_encoder_layers": 1, "num_decoder_layers": 2, "num_hidden_layers": None}
    model = tiny_model("prophetnet", sizes | {"vocab_size": len(tokenizer)})
    with pytest.raises(ValueError, match="ProphetNet"):
        make_trainer(model, make_rows(4), tmp_path, processing_class=tokenizer, max_steps=1).train()
