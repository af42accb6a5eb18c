"""Before the first step, what is not exact with the user's own model is an error that gives the measured difference."""

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from world import make_rows, make_trainer, plain_logps, weights

from trl_ulma import ULMAConfig
from trl_ulma.likelihood.head import _score_chunk
from trl_ulma.likelihood.reference import plain_batch
from trl_ulma.likelihood.scorer import Scorer

QUICK = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def load(folder: str, cls: type = AutoModelForCausalLM):
    return cls.from_pretrained(folder)


def offloaded(folder: str, out, *parts: str) -> nn.Module:
    """A Llama of two layers, of which these parts are on disk until their forward runs."""
    every = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
    places: dict = {name: "disk" if name in parts else "cpu" for name in every}
    return dispatch_model(load(folder), places, main_device="cpu", offload_dir=str(out), force_hooks=True)


# The setting


def test_the_checks_are_on_unless_switched_off():
    assert ULMAConfig("out", bf16=False, report_to="none").startup_checks is True
    with pytest.raises(ValueError, match="startup_checks must be True or False"):
        ULMAConfig("out", bf16=False, report_to="none", startup_checks="no")


# Heads that are none of the known kinds


class ScaledByPosition(LlamaForCausalLM):
    """Logits that grow with the position, which no known option of a head is."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        places = torch.arange(output.logits.size(1), device=output.logits.device)
        output.logits = output.logits * (1 + 0.05 * places[None, :, None])
        return output


class LessOfWhatWasSaid(LlamaForCausalLM):
    """Logits that depend on the input's tokens."""

    def forward(self, input_ids=None, *args, **kwargs):
        output = super().forward(input_ids, *args, **kwargs)
        said = nn.functional.one_hot(input_ids, output.logits.size(-1)).cumsum(1)[:, -output.logits.size(1) :]
        output.logits = output.logits - 0.5 * said
        return output


class BiasAfterTheHead(LlamaForCausalLM):
    """Logits with a bias that is no part of the output embeddings."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(-1, 1, output.logits.size(-1), device=output.logits.device)
        return output


class ScaledAfterTheHead(LlamaForCausalLM):
    """A scale that no setting of the configuration names."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output


class MovedBeforeTheHead(LlamaForCausalLM):
    """A change between the last layer and the output embeddings."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 1.5, *args[1:]))


HEADS = [
    ScaledByPosition,
    LessOfWhatWasSaid,
    BiasAfterTheHead,
    ScaledAfterTheHead,
    MovedBeforeTheHead,
]


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("head", HEADS)
def test_an_unknown_head_is_exact_or_refused(tiny_llama, tmp_path, head, peft):
    rows = make_rows(6)
    model = load(tiny_llama, head)
    wanted, counts = plain_logps(tiny_llama, rows, model.eval())
    settings = QUICK | ({"peft_config": LORA} if peft else {})
    processing = AutoTokenizer.from_pretrained(tiny_llama)
    try:
        trainer = make_trainer(model, rows, tmp_path, processing_class=processing, **settings)
        found = trainer.evaluate(rows)
        trainer.train()
    except ValueError as refusal:
        message = str(refusal)
        assert head.__name__ in message
        assert any(character.isdigit() for character in message)
        return
    label = np.array(rows["label"][:]) == 1
    assert found["eval_logps/chosen"] == pytest.approx(wanted[label].mean(), abs=1e-4 * counts.max())
    assert found["eval_logps/rejected"] == pytest.approx(wanted[~label].mean(), abs=1e-4 * counts.max())


class ScaledMoreByStep(LlamaForCausalLM):
    """A scale after the head that grows while the model is trained."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = 1.0

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if self.training and torch.is_grad_enabled():
            self.scale *= 1.01
        output.logits = output.logits * self.scale
        return output


def test_a_scale_that_changes_in_training_is_told(tiny_llama, tmp_path):
    model = load(tiny_llama, ScaledMoreByStep)
    processing = AutoTokenizer.from_pretrained(tiny_llama)
    trainer = make_trainer(model, make_rows(6), tmp_path, processing_class=processing, **QUICK)
    with pytest.raises(ValueError, match=r"ScaledMoreByStep computes its logits in another way .*scale=1\.\d+"):
        trainer.train()


class Temperature(nn.Module):
    """A learned scale, as a module of its own after the head."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, logits):
        return logits * self.log_scale.exp()


class LearnsAfterTheHead(LlamaForCausalLM):
    """Changes its logits with parameters, which at first change nothing."""

    learns: str

    def __init__(self, config):
        super().__init__(config)
        self.temperature = Temperature() if self.learns == "temperature.log_scale" else None
        sizes = {"logit_scale": (), "softcap": (), "logit_bias": (config.vocab_size,), "mixing": (config.hidden_size,)}
        if self.learns in sizes:
            value = torch.full(sizes[self.learns], {"logit_scale": 1.0, "softcap": 30.0}.get(self.learns, 0.0))
            setattr(self, self.learns, nn.Parameter(value))

    def forward(self, *args, **kwargs):
        found = {name: getattr(self, name) * 1 for name in ("logit_scale",) if hasattr(self, name)}  # before the head
        output = super().forward(*args, **kwargs | {"output_hidden_states": True})
        logits = output.logits * found.get("logit_scale", 1.0)
        if hasattr(self, "softcap"):
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if hasattr(self, "logit_bias"):
            logits = logits + self.logit_bias
        if hasattr(self, "mixing"):
            logits = logits + (output.hidden_states[-1] @ self.mixing)[..., None]
        output.logits = logits if self.temperature is None else self.temperature(logits)
        return output


LEARNS = ["logit_scale", "softcap", "logit_bias", "mixing", "temperature.log_scale"]


def learns_after_the_head(folder: str, name: str):
    """A model that changes its logits with this parameter."""
    model = type(f"Learns_{name.split('.')[0]}", (LearnsAfterTheHead,), {"learns": name}).from_pretrained(folder)
    model.get_parameter(name).data = {"logit_scale": torch.ones(()), "softcap": torch.full((), 30.0)}.get(
        name, torch.zeros_like(model.get_parameter(name))
    )
    return model


FAST = QUICK | {"learning_rate": 0.05, "max_steps": 4, "lr_scheduler_type": "constant"}


@pytest.mark.parametrize("checks", [True, False], ids=["checks", "no-checks"])
@pytest.mark.parametrize("name", LEARNS)
def test_a_parameter_that_is_trained_after_the_head_is_refused_by_name(tiny_llama, tmp_path, name, checks):
    model = learns_after_the_head(tiny_llama, name)
    settings = FAST | {"processing_class": AutoTokenizer.from_pretrained(tiny_llama), "startup_checks": checks}
    trainer = make_trainer(model, make_rows(6), tmp_path, **settings)
    with pytest.raises(ValueError, match=rf"after the output embeddings .*\b{name}\b.*requires_grad_\(False\)"):
        trainer.train()
    assert trainer.state.global_step == 0


class PassesNoGradient(torch.nn.Linear):
    """Computes as a layer of which the inputs are quantized, too, without a gradient for them."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.detach())


def test_a_frozen_layer_that_passes_no_gradient_on_is_refused_by_name(tiny_llama, tmp_path):
    model = load(tiny_llama)
    layer = model.model.layers[1].mlp.down_proj
    layer.__class__ = PassesNoGradient
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    settings = FAST | {"processing_class": AutoTokenizer.from_pretrained(tiny_llama), "peft_config": config}
    trainer = make_trainer(model, make_rows(6), tmp_path, **settings)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj.* \(PassesNoGradient, 1 such layers in total\)"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("name", ["logit_scale", "softcap", "temperature.log_scale"])
@pytest.mark.parametrize("peft", [False, True], ids=["frozen", "lora"])
def test_a_parameter_after_the_head_that_is_not_trained_is_no_fault(tiny_llama, tmp_path, name, peft):
    model, rows = learns_after_the_head(tiny_llama, name), make_rows(6)
    model.get_parameter(name).requires_grad_(False)
    settings = FAST | {"processing_class": AutoTokenizer.from_pretrained(tiny_llama)}
    settings |= {"peft_config": LORA} if peft else {}
    trainer = make_trainer(model, rows, tmp_path, **settings)
    trainer.train()
    assert_own_logits(trainer, rows, tiny_llama)


def test_a_parameter_after_the_head_that_an_adapter_trains_is_refused_by_name(tiny_llama, tmp_path):
    model = learns_after_the_head(tiny_llama, "temperature.log_scale")
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["temperature"])
    settings = FAST | {"processing_class": AutoTokenizer.from_pretrained(tiny_llama), "peft_config": config}
    with pytest.raises(ValueError, match=r"temperature\.modules_to_save\.default\.log_scale"):
        make_trainer(model, make_rows(6), tmp_path, **settings).train()


def assert_own_logits(trainer, rows, folder: str) -> None:
    """The trainer's log-probabilities of rows are those of its model's own logits."""
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    wanted, counts = plain_logps(folder, rows, model)
    found = trainer.evaluate(rows)
    label = np.array(rows["label"][:]) == 1
    assert found["eval_logps/chosen"] == pytest.approx(wanted[label].mean(), abs=1e-4 * counts.max())
    assert found["eval_logps/rejected"] == pytest.approx(wanted[~label].mean(), abs=1e-4 * counts.max())


class WithBias(LlamaForCausalLM):
    """Output embeddings with a bias."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)


class HeadWithTemperature(nn.Linear):
    """Output embeddings that divide by a temperature that they learn."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, input):
        return super().forward(input) / self.temperature


def lora_on(*modules: str, **kwargs) -> dict:
    return {"peft_config": LoraConfig(r=4, target_modules=list(modules), task_type="CAUSAL_LM", **kwargs)}


# What of the head is trained, the settings, a part of the names of the parameters that must have moved
TRAINED_HEADS = {
    "weights": ({}, "lm_head.weight"),
    "bias": ({}, "lm_head.bias"),
    "temperature": ({}, "lm_head.temperature"),
    "lora": (lora_on("q_proj", "lm_head"), "lm_head.lora_B"),
    "saved": (lora_on("q_proj", modules_to_save=["lm_head"]), "lm_head.modules_to_save"),
}


@pytest.mark.parametrize("kind", TRAINED_HEADS)
def test_a_head_that_is_trained_fast_keeps_its_models_own_logits(tiny_llama, tmp_path, kind):
    model, rows = load(tiny_llama, WithBias if kind == "bias" else AutoModelForCausalLM), make_rows(6)
    if kind == "bias":  # the checkpoint has none, and transformers 5.2 leaves it as the memory was
        nn.init.normal_(model.lm_head.bias, std=0.1)
    if kind == "temperature":
        model.lm_head = HeadWithTemperature(model.config.hidden_size, model.config.vocab_size, bias=False)
    settings, part = TRAINED_HEADS[kind]
    processing = AutoTokenizer.from_pretrained(tiny_llama)
    trainer = make_trainer(model, rows, tmp_path, processing_class=processing, **FAST, **settings)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if part in name}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert before
    assert max(float((after[name] - value).detach().abs().max()) for name, value in before.items()) > 0.01
    assert_own_logits(trainer, rows, tiny_llama)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_on_the_head_is_scored_and_trained(tiny_llama, dora):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, use_dora=dora)
    model = get_peft_model(load(tiny_llama), config).eval()
    ids = torch.arange(5, 15)[None]
    wanted = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    found = Scorer()(model, plain_batch(ids)).log_probs[0]
    assert torch.allclose(found, wanted, atol=1e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = (torch.autograd.grad(values.sum(), trained) for values in (found, wanted))
    for one, other in zip(*gradients, strict=True):
        assert other.abs().max() > 0
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("head", [ScaledByPosition, LessOfWhatWasSaid])
def test_without_the_checks_it_trains_all_the_same(tiny_llama, tmp_path, head):
    processing = AutoTokenizer.from_pretrained(tiny_llama)
    trainer = make_trainer(
        load(tiny_llama, head), make_rows(6), tmp_path, processing_class=processing, startup_checks=False, **QUICK
    )
    try:
        trainer.train()
    except ValueError as refusal:
        if "startup_checks" in str(refusal):  # else it cannot be computed at all
            raise
        return
    assert trainer.state.global_step == 2


class WithoutTheModule(LlamaForCausalLM):
    """The output embeddings' weights without a call of their module."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return CausalLMOutputWithPast(logits=nn.functional.linear(hidden, self.lm_head.weight))


def test_output_embeddings_that_are_not_called_are_refused(tiny_llama, tmp_path):
    processing = AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(ValueError, match="WithoutTheModule does not call the output embeddings"):
        make_trainer(
            load(tiny_llama, WithoutTheModule), make_rows(6), tmp_path, processing_class=processing, **QUICK
        ).train()


class MixesRows(LlamaForCausalLM):
    """What it says of a row depends on the rows beside it."""

    def __init__(self, config):
        super().__init__(config)
        self.model.norm.register_forward_hook(lambda norm, args, output: output - 0.3 * output.mean(0, keepdim=True))


def test_rows_that_change_each_other_are_refused(tiny_llama, tmp_path):
    processing = AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(ValueError, match=r"MixesRows differ by .* depends on the other rows of the batch"):
        make_trainer(load(tiny_llama, MixesRows), make_rows(6), tmp_path, processing_class=processing, **QUICK).train()


# Noise


class NoisyAlways(LlamaForCausalLM):
    """Noise in evaluation mode, too."""

    def forward(self, *args, **kwargs):
        self.model.norm.weight.data += 0.02 * torch.randn_like(self.model.norm.weight)
        return super().forward(*args, **kwargs)


class NoisyInTraining(LlamaForCausalLM):
    """Noise that only its author knows of, in training mode."""

    def __init__(self, config):
        super().__init__(config)
        self.model.norm.register_forward_hook(self._shake)

    def _shake(self, norm, args, output):
        return output + 0.1 * torch.randn_like(output) if norm.training else output


def test_noise_in_evaluation_mode_is_refused(tiny_llama, tmp_path):
    processing = AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(ValueError, match=r"\d nats"):
        make_trainer(
            load(tiny_llama, NoisyAlways), make_rows(6), tmp_path, processing_class=processing, **QUICK
        ).train()


def test_noise_in_training_mode_is_refused_where_dropout_is_to_be_off(tiny_llama, tmp_path):
    processing = AutoTokenizer.from_pretrained(tiny_llama)
    settings = QUICK | {"processing_class": processing}
    with pytest.raises(ValueError, match=r"\d nats.*(disable_dropout|startup_checks)=False"):
        make_trainer(load(tiny_llama, NoisyInTraining), make_rows(6), tmp_path, **settings).train()
    model = load(tiny_llama, NoisyInTraining)
    trainer = make_trainer(model, make_rows(6), tmp_path, disable_dropout=False, **settings)
    trainer.train()
    assert trainer.state.global_step == 2


# What the checks must leave alone

KINDS = {
    "full": {},
    "lora": {"peft_config": LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.2)},
    "precomputed": {"precompute_ref_log_probs": True},
    "packed": {"padding_free": True},
    "shared": {"share_prompts": True},
    "sft": {"positive_loss": "sft", "negative_loss": "none"},
    "learned": {"log_z": "learned"},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("stream", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_checks_change_nothing(tiny_gpt2, tmp_path, kind, stream):
    """Dropout is on, so that one random number drawn would show; of a stream no row is taken away."""
    if stream and "precompute_ref_log_probs" in KINDS[kind]:
        pytest.skip("a stream is not known beforehand")
    found = []
    for checks in (True, False):
        rows = make_rows(12, sft_mask=[i % 4 == 0 for i in range(12)])
        rows = rows.to_iterable_dataset() if stream else rows
        settings = QUICK | KINDS[kind] | {"disable_dropout": False, "startup_checks": checks, "max_steps": 3}
        trainer = make_trainer(tiny_gpt2, rows, tmp_path / str(checks), **settings)
        trainer.train()
        found.append((weights(trainer.model), [log.get("loss") for log in trainer.state.log_history]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


class Seen(TrainerCallback):
    """Counts the tokens that a model's embeddings read before the first step's end, with and without gradients."""

    def __init__(self, embeddings: nn.Module):
        self.asked, self.learned, self.is_counting = 0, 0, True
        embeddings.register_forward_hook(self._count)

    def _count(self, module, args, output):
        if self.is_counting and torch.is_grad_enabled():
            self.learned += args[0].numel()
        elif self.is_counting:
            self.asked += args[0].numel()

    def on_step_end(self, *args, **kwargs):
        self.is_counting = False


def test_the_checks_read_less_than_a_step(tiny_gpt2, tmp_path):
    rows = make_rows(64, completion=[" on and on" * 40] * 64)
    trainer = make_trainer(
        tiny_gpt2, rows, tmp_path, max_steps=1, per_device_train_batch_size=32, precompute_ref_log_probs=True
    )
    seen = Seen(trainer.model.get_input_embeddings())
    trainer.add_callback(seen)
    trainer.train()
    assert 0 < seen.asked < seen.learned / 4


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("layout", [{}, {"padding_free": True}, {"share_prompts": True}], ids=str)
def test_few_rows_are_enough(tiny_llama, tmp_path, n, layout):
    rows = make_rows(n, completion=[" a", " b c", " d"][:n], sft_mask=[False] * n)
    trainer = make_trainer(tiny_llama, rows, tmp_path, **QUICK, **layout)
    trainer.train()
    assert trainer.state.global_step == 2


def test_half_precision_passes(tiny_llama, tmp_path):
    for kwargs in ({"bf16": True, "use_cpu": True}, {"model_init_kwargs": {"dtype": "bfloat16"}}):
        trainer = make_trainer(tiny_llama, make_rows(6), tmp_path, **QUICK | kwargs)
        trainer.train()
        assert trainer.state.global_step == 2


# A live reference is looked at again


class Changes(TrainerCallback):
    """Changes a parameter while training, as a callback that means well can."""

    def __init__(self, parameter: torch.Tensor):
        self.parameter = parameter

    def on_step_end(self, *args, **kwargs):
        with torch.no_grad():
            self.parameter.mul_(1.5)


def test_a_reference_that_moved_while_training_is_told(tiny_llama, tmp_path):
    model = load(tiny_llama)
    trainer = make_trainer(model, make_rows(6), tmp_path, peft_config=LORA, **QUICK)
    frozen = next(p for name, p in trainer.model.named_parameters() if "o_proj" in name)
    assert not frozen.requires_grad
    trainer.add_callback(Changes(frozen))
    with pytest.raises(ValueError, match=r"(?i)reference.*\d nats"):
        trainer.train()


def test_a_reference_that_moves_is_told_long_before_the_end(tiny_llama, tmp_path):
    trainer = make_trainer(load(tiny_llama), make_rows(6), tmp_path, **QUICK | {"max_steps": 50})
    trainer.add_callback(Changes(next(iter(trainer.ref_model.parameters()))))
    with pytest.raises(ValueError, match=r"(?s)reference has changed.*startup_checks=False"):
        trainer.train()
    assert trainer.state.global_step < 5


def test_a_reference_may_be_moved_on_purpose(tiny_llama, tmp_path, caplog):
    """As in TR-DPO, by a callback of one's own."""
    trainer = make_trainer(load(tiny_llama), make_rows(6), tmp_path, startup_checks=False, **QUICK)
    trainer.add_callback(Changes(next(iter(trainer.ref_model.parameters()))))
    trainer.train()
    assert caplog.text.count("The reference has changed") == 1


def test_a_resume_on_another_base_model_is_told(tiny_llama, tmp_path):
    settings = QUICK | {"peft_config": LORA, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(load(tiny_llama), make_rows(8), tmp_path, **settings).train()
    other = load(tiny_llama)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    trainer = make_trainer(other, make_rows(8), tmp_path, **settings)
    with pytest.raises(ValueError, match=r"(?i)reference.*\d nats"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_resume_against_another_precomputed_reference_is_told(tiny_llama, tmp_path):
    settings = QUICK | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "precompute_ref_log_probs": True}
    make_trainer(tiny_llama, make_rows(8), tmp_path, **settings).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    make_trainer(tiny_llama, make_rows(8), tmp_path / "again", **settings).train(resume_from_checkpoint=checkpoint)
    # The model of the checkpoint is not what it was compared with
    trainer = make_trainer(checkpoint, make_rows(8), tmp_path / "other", **settings)
    with pytest.raises(ValueError, match="The checkpoint was trained against another reference"):
        trainer.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["whole", "lora"])
def test_a_resume_that_loads_no_weights_is_told(tiny_llama, tmp_path, monkeypatch, adapter):
    """As transformers before 5.23 loaded none of a policy's adapter if the checkpoint has one of the reference too."""
    settings = QUICK | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    settings |= {"peft_config": adapter}
    make_trainer(load(tiny_llama), make_rows(8), tmp_path, **settings).train()
    monkeypatch.setattr(Trainer, "_load_from_checkpoint", lambda *_: None)
    checkpoint = str(tmp_path / "checkpoint-2")
    trainer = make_trainer(load(tiny_llama), make_rows(8), tmp_path, **settings)
    with pytest.raises(ValueError, match=r"After resuming, the model differs .* by \d.* nats per token"):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer = make_trainer(load(tiny_llama), make_rows(8), tmp_path, startup_checks=False, **settings)
    trainer.train(resume_from_checkpoint=checkpoint)


def test_a_resume_of_a_whole_model_keeps_its_reference(tiny_llama, tmp_path):
    """The checkpoint's weights are the policy's, and none of the reference's."""
    settings = QUICK | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    unbroken = make_trainer(tiny_llama, make_rows(8), tmp_path, **settings)
    unbroken.train()
    resumed = make_trainer(tiny_llama, make_rows(8), tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(unbroken.model), weights(resumed.model))
    assert unbroken.evaluate(make_rows(8))["eval_loss"] == resumed.evaluate(make_rows(8))["eval_loss"]


def test_the_rows_of_the_layout_check_fit_into_the_models_positions(tiny_gpt2, tmp_path):
    """One row's prompt and another's completion are longer than any row."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_gpt2, n_positions=80))
    rows = make_rows(4, prompt=["How are you? " * 12] * 2 + ["Why?"] * 2, completion=[" No."] * 2 + [" a mat" * 15] * 2)
    settings = {"share_prompts": True, "per_device_train_batch_size": 4, "pointwise": True, "max_steps": 1}
    trainer = make_trainer(model, rows, tmp_path, processing_class=AutoTokenizer.from_pretrained(tiny_gpt2), **settings)
    assert max(trainer.train_dataset["length"]) <= 80
    trainer.train()


# Models that a device_map spreads


@pytest.mark.parametrize("settings", [{}, {"peft_config": LORA}], ids=["full", "lora"])
def test_weights_that_are_trained_cannot_be_offloaded(tiny_llama, tmp_path, settings):
    model = offloaded(tiny_llama, tmp_path / "disk", "model.layers.1")
    with pytest.raises(ValueError, match=r"device_map offloads weights .*\(.*layers\.1.*, \d+ in total\)"):
        make_trainer(model, make_rows(8), tmp_path, **QUICK, **settings).train()


def test_an_adapter_below_offloaded_layers_trains_as_it_does_without(tiny_llama, tmp_path):
    adapter = LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0], task_type="CAUSAL_LM")
    found = []
    for parts in ((), ("model.layers.1", "lm_head")):
        model = offloaded(tiny_llama, tmp_path / "disk", *parts)
        trainer = make_trainer(model, make_rows(8), tmp_path, peft_config=adapter, **QUICK)
        trainer.train()
        found.append(weights(trainer.model))
    assert torch.equal(*found)
    with pytest.raises(ValueError, match=r"precompute_ref_log_probs=True reads all weights .*device_map offloads"):
        make_trainer(model, make_rows(8), tmp_path, precompute_ref_log_probs=True, peft_config=adapter, **QUICK)


def test_a_head_on_another_device_than_the_hidden_states():
    """What a device_map does with embeddings that are tied to the first layer."""
    head = nn.Linear(4, 7, device="meta")
    targets = torch.tensor([1, 2])
    found = _score_chunk(lambda states: head(states.to("meta")), None, torch.zeros(2, 4), targets, statistics=True)
    assert all(values.is_meta for values in found)


class Resizes(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.resize_token_embeddings(400)


def test_output_embeddings_that_are_replaced_in_training(tiny_llama, tmp_path):
    trainer = make_trainer(tiny_llama, make_rows(8), tmp_path, callbacks=[Resizes()], **QUICK)
    with pytest.raises(ValueError, match=r"output embeddings of LlamaForCausalLM were replaced .*before you create"):
        trainer.train()


def test_layers_of_8_bits_that_compute_otherwise_in_evaluation_mode(tiny_llama, tmp_path):
    pytest.importorskip("bitsandbytes")
    if torch.cuda.is_available():
        pytest.skip("on a GPU, they compute the same in both modes")
    trainer = make_trainer(
        tiny_llama,
        make_rows(4),
        tmp_path,
        pointwise=True,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        peft_config=LORA,
    )
    with pytest.raises(ValueError, match=r"On a CPU .*layers of 8 bits .*evaluation mode only.*load_in_4bit"):
        trainer.train()
