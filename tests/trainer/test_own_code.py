"""Models with code of their own, as the Hub has them: their forward lacks parameters, or returns tuples."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from world import make_rows, make_trainer, plain_logps

QUICK = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


class OwnCode(LlamaForCausalLM):
    """The base of the models below."""

    def logits(self, input_ids, attention_mask=None, position_ids=None):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return self.lm_head(self.model(**inputs, use_cache=False).last_hidden_state)


class WithoutCache(OwnCode):
    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return CausalLMOutputWithPast(logits=self.logits(input_ids, attention_mask, position_ids))


class WithoutPositions(OwnCode):
    def forward(self, input_ids, attention_mask=None):
        return CausalLMOutputWithPast(logits=self.logits(input_ids, attention_mask))


class OnlyIds(OwnCode):
    def forward(self, input_ids):
        return CausalLMOutputWithPast(logits=self.logits(input_ids))


class Tuple(OwnCode):
    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        return (self.logits(input_ids, attention_mask, position_ids),)


class TupleAfterLoss(OwnCode):
    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        logits = self.logits(input_ids, attention_mask, position_ids)
        return logits.sum(), logits, None


class Dict(OwnCode):
    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        return {"loss": None, "logits": self.logits(input_ids, attention_mask, position_ids)}


class Bare(OwnCode):
    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        return self.logits(input_ids, attention_mask, position_ids)


class PassesOn(OwnCode):
    """Takes everything, and hands it to something that does not."""

    def forward(self, input_ids, **kwargs):
        return CausalLMOutputWithPast(logits=self.logits(input_ids, **kwargs))


class OtherNames(OwnCode):
    def forward(self, tokens, mask=None):
        return CausalLMOutputWithPast(logits=self.logits(tokens, mask))


class WithoutLogits(OwnCode):
    def forward(self, input_ids, attention_mask=None, **kwargs):
        return {"scores": self.logits(input_ids, attention_mask)}


TRAINED = [WithoutCache, WithoutPositions, OnlyIds, Tuple, TupleAfterLoss, Dict, Bare]
REFUSED = {
    PassesOn: r"PassesOn fails with input_ids, use_cache \(TypeError: .*use_cache",
    OtherNames: "OtherNames takes no input_ids",
    WithoutLogits: r"WithoutLogits fails with .*returns a dict without logits",
}


def make(folder: str, cls: type, rows, out, **settings):
    model = cls.from_pretrained(folder)
    return make_trainer(model, rows, out, processing_class=AutoTokenizer.from_pretrained(folder), **QUICK | settings)


def assert_trains_on_its_own_logits(trainer, rows, folder: str) -> None:
    """Trains, and then evaluates to the log-probabilities of a plain Llama with the trained weights."""
    trainer.train()
    plain = LlamaForCausalLM.from_pretrained(folder).eval()
    trained = trainer.model
    if hasattr(trained, "merge_and_unload"):
        trained = copy.deepcopy(trained).merge_and_unload()
    plain.load_state_dict(trained.state_dict())
    wanted, counts = plain_logps(folder, rows, plain)
    found, label = trainer.evaluate(rows), np.array(rows["label"][:]) == 1
    assert found["eval_logps/chosen"] == pytest.approx(wanted[label].mean(), abs=1e-4 * counts.max())
    assert found["eval_logps/rejected"] == pytest.approx(wanted[~label].mean(), abs=1e-4 * counts.max())


@pytest.mark.parametrize("cls", TRAINED)
def test_a_forward_that_lacks_parameters_or_returns_a_tuple(tiny_llama, tmp_path, cls):
    rows = make_rows(6)
    assert_trains_on_its_own_logits(make(tiny_llama, cls, rows, tmp_path), rows, tiny_llama)


@pytest.mark.parametrize("cls", [Tuple, Dict])
def test_the_same_with_an_adapter(tiny_llama, tmp_path, cls):
    rows = make_rows(6)
    assert_trains_on_its_own_logits(make(tiny_llama, cls, rows, tmp_path, peft_config=LORA), rows, tiny_llama)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_config_that_asks_for_tuples(tiny_llama, tiny_gpt2, tmp_path, architecture, peft):
    """Some of transformers' own models fail with it in their own forward."""
    folder = tiny_llama if architecture == "llama" else tiny_gpt2
    rows, model = make_rows(6), AutoModelForCausalLM.from_pretrained(folder)
    model.config.return_dict = False
    targets = {"target_modules": ["q_proj"] if architecture == "llama" else ["c_attn"]}
    settings = {"peft_config": LoraConfig(r=4, task_type="CAUSAL_LM", **targets)} if peft else {}
    trainer = make_trainer(model, rows, tmp_path, **QUICK, **settings)
    try:
        trainer.train()
    except ValueError as refusal:
        assert str(refusal).endswith("Set model.config.return_dict=True.")  # noqa: PT017
        with pytest.raises(AttributeError):
            model(torch.ones(1, 2, dtype=torch.long))
        return
    assert model.config.return_dict is False
    found = trainer.evaluate(rows)
    trainer.accelerator.unwrap_model(trainer.model).config.return_dict = True
    wanted, counts = plain_logps(folder, rows, trainer.model.eval())
    label = np.array(rows["label"][:]) == 1
    assert found["eval_logps/chosen"] == pytest.approx(wanted[label].mean(), abs=1e-4 * counts.max())


@pytest.mark.parametrize("layout", ["padding_free", "share_prompts"])
@pytest.mark.parametrize("cls", [WithoutPositions, OnlyIds])
def test_a_layout_that_needs_positions_is_padded_instead_with_a_warning(tiny_llama, tmp_path, caplog, cls, layout):
    rows = make_rows(6)
    trainer = make(tiny_llama, cls, rows, tmp_path, **{layout: True})
    trainer.train()
    assert f"the forward of {cls.__name__} takes no position_ids" in caplog.text


@pytest.mark.parametrize("precompute", [False, True], ids=["live", "precomputed"])
@pytest.mark.parametrize("cls", REFUSED)
def test_a_forward_that_cannot_be_called_is_refused_in_one_line(tiny_llama, tmp_path, cls, precompute):
    with pytest.raises(ValueError, match=REFUSED[cls]) as error:
        make(tiny_llama, cls, make_rows(6), tmp_path, precompute_ref_log_probs=precompute).train()
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("cls", [WithoutCache, OnlyIds])
def test_an_adapter_on_a_forward_that_peft_cannot_call_is_refused_in_one_line(tiny_llama, tmp_path, cls):
    with pytest.raises(ValueError, match=rf"The forward of {cls.__name__} fails with .*TypeError.*inputs_embeds"):
        make(tiny_llama, cls, make_rows(6), tmp_path, peft_config=LORA).train()


def test_padding_on_the_left_without_an_attention_mask_is_refused(tiny_llama):
    from trl_ulma.likelihood.head import forward_arguments

    model = OnlyIds.from_pretrained(tiny_llama)
    ids = torch.ones(2, 3, dtype=torch.long)
    right, left = torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    assert set(forward_arguments(model, {"input_ids": ids, "attention_mask": right})) == {"input_ids"}
    with pytest.raises(ValueError, match="takes no attention_mask"):
        forward_arguments(model, {"input_ids": ids, "attention_mask": left})


class Plain(PreTrainedConfig):
    model_type = "plain"

    def __init__(self, dim=16, vocab_size=384, **kwargs):
        super().__init__(**kwargs)
        self.dim, self.vocab_size = dim, vocab_size


class Recurrent(PreTrainedModel, GenerationMixin):
    """Its config has no hidden_size."""

    config_class = Plain
    _tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = torch.nn.Embedding(config.vocab_size, config.dim)
        self.layer = torch.nn.GRU(config.dim, config.dim, batch_first=True)
        self.head = torch.nn.Linear(config.dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return CausalLMOutputWithPast(logits=self.head(self.layer(self.embeddings(input_ids))[0]))


@pytest.mark.parametrize("log_z", [0.0, "learned"])
def test_a_config_without_a_hidden_size(tiny_gpt2, tmp_path, log_z):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    model = Recurrent(Plain(vocab_size=len(tokenizer)))
    settings = QUICK | {"pointwise": True, "processing_class": tokenizer, "log_z": log_z}
    trainer = make_trainer(model, make_rows(8), tmp_path, **settings)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
