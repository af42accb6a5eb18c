"""What TRL's trainers do besides their loss, done by these: mixtures of experts, tools, offloading, kernels."""

import json

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM
from world import first_step_loss, make_rows, make_trainer, weights


@pytest.fixture(scope="module")
def tiny_mixtral(tiny_llama, tmp_path_factory) -> str:
    """A folder with a two-layer Mixtral of four experts, and the tokenizer of the tiny Llama."""
    folder = str(tmp_path_factory.mktemp("checkpoints") / "tiny-mixtral")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        router_aux_loss_coef=0.3,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def balance(folder: str, batch) -> float:
    """E·Σ f·P over the real tokens of a batch (Switch Transformer, Eq. 4, for each of the experts that a token has):
    f the share of tokens that an expert gets, P its mean probability, over both layers."""
    model = MixtralForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["attention_mask"], output_router_logits=True).router_logits
    real = batch["attention_mask"].flatten().bool()
    p = torch.cat([layer[real].double().softmax(-1) for layer in logits]).numpy()
    chosen = np.argsort(-p, 1)[:, :2]
    shares = np.stack([(chosen == expert).sum(1).mean() for expert in range(4)])
    return float(4 * (shares * p.mean(0)).sum())


def test_the_auxiliary_loss_of_experts_weighs_as_the_rows_of_its_micro_batch(tiny_mixtral, tmp_path):
    rows = make_rows(5)
    settings = {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 5}
    trainer = make_trainer(tiny_mixtral, rows, tmp_path, **settings)
    assert trainer.router_aux_loss_coef == 0.3, "the coefficient is the model's where none is set"
    with_aux = first_step_loss(trainer)
    batches = list(trainer.get_train_dataloader())
    assert [len(batch["label"]) for batch in batches] == [3, 2]
    # The loader begins with another order each time, so the same batches are run without it
    losses, parts = [], []
    for enabled in (True, False):
        trainer.aux_loss_enabled = enabled
        losses.append(sum(trainer.compute_loss(trainer.model, dict(b), num_items_in_batch=5).item() for b in batches))
    parts = [len(batch["label"]) / 5 * balance(tiny_mixtral, batch) for batch in batches]
    assert losses[0] - losses[1] == pytest.approx(0.3 * sum(parts), rel=1e-4)
    assert with_aux.item() > losses[1]

    trainer.aux_loss_enabled = True
    with_aux.backward()
    gates = [p.grad for name, p in trainer.model.named_parameters() if "gate.weight" in name]
    assert len(gates) == 2
    assert all(grad.abs().max() > 0 for grad in gates)
    [batch] = trainer.get_eval_dataloader(
        trainer._prepare_dataset(rows, trainer.processing_class, trainer.args, "eval")
    )
    found = trainer.evaluate(rows)
    trainer.aux_loss_enabled = False
    assert found["eval_aux_loss"] == pytest.approx(balance(tiny_mixtral, batch), rel=1e-4)
    assert found["eval_loss"] - trainer.evaluate(rows)["eval_loss"] == pytest.approx(
        0.3 * found["eval_aux_loss"], rel=1e-4
    )


def test_the_auxiliary_loss_is_logged_where_there_is_one(tiny_mixtral, tiny_llama, tmp_path):
    logged = []
    for coef in (None, 0.1, 0.0):
        trainer = make_trainer(tiny_mixtral, make_rows(4), tmp_path, max_steps=1, router_aux_loss_coef=coef)
        trainer.train()
        logged.append(trainer.state.log_history[0])
    assert logged[0]["aux_loss"] == logged[1]["aux_loss"] > 0
    assert "aux_loss" not in logged[2]
    ends = [log["loss"] - coef * logged[0]["aux_loss"] for log, coef in zip(logged, (0.3, 0.1, 0.0), strict=True)]
    assert ends[0] == pytest.approx(ends[2], abs=1e-4)
    assert ends[1] == pytest.approx(ends[2], abs=1e-4)
    with pytest.raises(ValueError, match="LlamaForCausalLM is not a Mixture-of-Experts model"):
        make_trainer(tiny_llama, make_rows(4), tmp_path, router_aux_loss_coef=0.1)


def test_rows_of_experts_can_be_packed(tiny_mixtral, tmp_path):
    found = []
    for padding_free in (False, True):
        trainer = make_trainer(
            tiny_mixtral, make_rows(6), tmp_path, per_device_train_batch_size=6, padding_free=padding_free
        )
        found.append(first_step_loss(trainer).item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


TOOLS = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}{% if loud %}LOUD{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['tool_calls'] %}"
    "{{ message['tool_calls'] | tojson }}{% else %}{{ message['content'] }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, **properties) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}


def test_a_tool_call_is_learned_as_its_row_writes_it(tiny_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = TOOLS
    # Arrow gives all rows the keys of each: arguments, properties and settings that a row does not have are None there
    calls = [call("lamp", on=True), call("heat", degrees=21, room="hall")]
    tools = [tool("lamp", on={"type": "boolean"}), tool("heat", degrees={"type": "number"}, room={"type": "string"})]
    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "Do it"}],
                "completion": [{"role": "assistant", "tool_calls": [calls[i]]}],
                "label": 1.0 - i,
                "tools": [tools[i]],
                "chat_template_kwargs": [{"loud": True}, {"calm": True}][i],
            }
            for i in range(2)
        ]
    )
    assert rows[0]["tools"][0]["function"]["parameters"]["properties"]["degrees"] is None
    trainer = make_trainer(tiny_llama, rows, tmp_path, processing_class=tokenizer, max_steps=1, learning_rate=1e-3)
    for i, loud in enumerate(("LOUD", "")):
        row = trainer.train_dataset[i]
        asked = f"<|system|>{json.dumps([tools[i]])}<|end|>{loud}<|user|>Do it<|end|><|assistant|>"
        assert tokenizer.decode(row["prompt_ids"]) == asked
        assert tokenizer.decode(row["completion_ids"]) == f"{json.dumps([calls[i]])}<|end|>"
    trainer.train()
    assert np.isfinite(trainer.state.log_history[0]["loss"])


def test_tools_as_json_keep_their_nulls(tiny_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = TOOLS
    tools = json.dumps([tool("lamp", on={"type": "boolean", "default": None})])
    columns = {
        "prompt": [[{"role": "user", "content": "Hi"}]],
        "completion": [[{"role": "assistant", "content": "No"}]],
    }
    rows = Dataset.from_dict({**columns, "label": [1.0], "tools": [tools]})
    trainer = make_trainer(tiny_llama, rows, tmp_path, processing_class=tokenizer)
    assert tools in tokenizer.decode(trainer.train_dataset[0]["prompt_ids"])


def test_activations_are_offloaded_in_every_forward_of_the_policy(tiny_llama, tmp_path, monkeypatch):
    with pytest.raises(ValueError) as error:
        make_trainer(tiny_llama, make_rows(4), tmp_path, activation_offloading=True)
    assert str(error.value) == (
        "activation_offloading=True moves activations from an accelerator's memory to CPU memory, and this machine has "
        "no accelerator. Set it to False. gradient_checkpointing=True saves memory on any machine."
    )
    moved, ends = [], []
    for offloaded in (False, True):
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
        trainer = make_trainer(tiny_llama, make_rows(4), tmp_path, learning_rate=1e-3, **settings)
        if offloaded:  # as TRL's own context, by hooks on what autograd keeps
            pack = torch.autograd.graph.saved_tensors_hooks(lambda x: moved.append(1) or x.clone(), lambda x: x)
            monkeypatch.setattr(trainer, "maybe_activation_offload_context", pack)
        trainer.train()
        ends.append(weights(trainer.model))
    assert moved
    assert torch.equal(*ends)


def test_liger_kernels_that_are_not_there(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ulma.config_checks.is_liger_kernel_available", lambda: False)
    with pytest.raises(ImportError) as error:
        make_trainer(tiny_llama, make_rows(4), tmp_path, use_liger_kernel=True)
    assert str(error.value) == (
        "use_liger_kernel=True requires liger-kernel, which is not installed. Run `pip install liger-kernel`, or set "
        "it to False. TRL will remove this setting; model_init_kwargs={'use_kernels': True} replaces it."
    )
    if Version(trl.__version__) < Version("1.15"):  # whose DPOTrainer asks for the kernels itself
        return
    monkeypatch.setattr("trl_ulma.config_checks.is_liger_kernel_available", lambda: True)
    with (
        pytest.warns(FutureWarning),
        pytest.raises(ValueError, match="which this trainer patches with a fused LM head"),
    ):
        make_trainer(
            tiny_llama,
            make_rows(4),
            tmp_path,
            use_liger_kernel=True,
            liger_kernel_config={"fused_linear_cross_entropy": True},
        )
