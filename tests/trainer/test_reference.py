"""The reference is the model as it is before training: at the start, while training, and after it."""

import copy
import math
import shutil

import numpy as np
import peft
import pytest
import torch
import trl
from architectures import ARCHITECTURES, skip_unless_it_works, tiny_model
from packaging.version import Version
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from references import MOVING, ROUNDING, STILL, hold, in_memory, load, lora, losses, own_logps
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from world import has_own_adapters, make_rows, make_trainer, weights

from trl_ulma.judge import Judge
from trl_ulma.likelihood.reference import Reference, plain_batch
from trl_ulma.likelihood.scorer import Scorer

# Dropout

# Of each kind: `nn.Dropout`, a rate passed to `functional.dropout`, a rate passed to attention, layers that are skipped
WITH_DROPOUT = (
    "opt",  # functional, also of embeddings
    "gpt2",  # modules, and attention
    "llama",  # attention alone
    "bart",  # functional, attention, skipped layers
    "whisper",
    "biogpt",
    "xglm",
    "blenderbot",
    "bloom",  # functional, by name hidden_dropout
    "gpt_neox",
    "gpt_bigcode",
    "gptj",
    "phi",
    "mpt",
    "ctrl",
    "bert",
    "roformer",
    "starcoder2",
    "granitemoe",
    "jetmoe",
    "dbrx",
    "modernbert-decoder",
    "stablelm",
    "openai-gpt",
    "pegasus",
    "moshi",
    "doge",
    "falcon",  # read from the config in each forward
    "persimmon",
)


def with_dropout(name: str):
    """(tokenizer, model): a small model of the architecture with all its dropout rates at 0.3, in training mode."""
    tokenizer = make_tokenizer()
    model_type, settings = ARCHITECTURES[name]
    return tokenizer, tiny_model(model_type, settings | {"vocab_size": len(tokenizer)}, dropout=0.3).train()


def test_the_config_that_is_saved_keeps_its_rates(tmp_path):
    tokenizer, model = with_dropout("falcon")
    trainer = make_trainer(model, make_rows(4), tmp_path, processing_class=tokenizer, max_steps=1)
    assert model.config.attention_dropout == model.config.hidden_dropout == 0.3
    assert trainer.model.transformer.h[0].self_attention.config.attention_dropout == 0.0


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_without_dropout_the_first_losses_are_log_2(tmp_path, name):
    skip_unless_it_works(name)
    tokenizer, model = with_dropout(name)
    ids = torch.arange(5, 25)[None]
    one, other = (model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for _ in range(2))
    if torch.equal(one, other):
        pytest.skip(f"{name} has no dropout")
    trainer = make_trainer(model, make_rows(6), tmp_path, processing_class=tokenizer, **STILL)
    trainer.train()
    assert losses(trainer) == pytest.approx([math.log(2)] * 3, abs=1e-5)


def live_and_precomputed(make, rows, tmp_path, **kwargs):
    """Two runs that differ in when the reference is asked: (losses, weights) of each."""
    found = []
    for precompute in (False, True):
        trainer = make(rows, tmp_path / str(precompute), precompute_ref_log_probs=precompute, **MOVING | kwargs)
        trainer.train()
        found.append((losses(trainer), weights(trainer.model)))
    return found


def ways_with_dropout(gpt2: str, llama: str):
    """Name → (rows, folder, settings → trainer), each with dropout or noise that is meant to stay on for the policy."""

    def from_memory(folder, config=None, training=True):
        def make(rows, folder_out, **kwargs):
            model = load(folder) if config is None else in_memory(folder, config)
            return make_trainer(model.train(training), rows, folder_out, **kwargs)

        return make

    def from_folder(folder, config=None, **more):
        def make(rows, folder_out, **kwargs):
            peft = {} if config is None else {"peft_config": copy.deepcopy(config)}
            return make_trainer(folder, rows, folder_out, **kwargs | peft | more)

        return make

    def given(rows, folder_out, **kwargs):
        return make_trainer(load(gpt2), rows, folder_out, ref_model=load(gpt2).train(), **kwargs)

    attention = {"target_modules": ["c_attn"]}
    return {
        "folder": from_folder(gpt2),
        "memory-in-training-mode": from_memory(gpt2),
        "memory-in-evaluation-mode": from_memory(gpt2, training=False),
        "lora": from_folder(gpt2, lora(**attention)),
        "lora-with-dropout": from_folder(llama, lora(lora_dropout=0.5)),
        "adapter-with-dropout": from_memory(llama, lora(lora_dropout=0.5)),
        "adapter-in-training-mode": from_memory(gpt2, lora(**attention)),
        "given-in-training-mode": given,
        "neftune": from_folder(llama, neftune_noise_alpha=5.0),
        "neftune-lora": from_folder(llama, lora(), neftune_noise_alpha=5.0),
        "neftune-adapter": lambda rows, out, **kwargs: from_memory(llama, lora())(
            rows, out, neftune_noise_alpha=5.0, **kwargs
        ),
    }


@pytest.mark.parametrize("way", ways_with_dropout("", ""))
def test_with_dropout_the_reference_has_none(tiny_gpt2, tiny_llama, tmp_path, way):
    """The policy draws the same noise in both runs, as long as a live reference draws none."""
    make = ways_with_dropout(tiny_gpt2, tiny_llama)[way]
    rows = make_rows(6)
    trainer = make(rows, tmp_path / "asked", disable_dropout=False, **MOVING)
    first, again = (trainer.predict(rows).predictions for _ in range(2))
    assert np.array_equal(first, again)
    assert np.abs(first).max() < ROUNDING
    live, precomputed = live_and_precomputed(make, rows, tmp_path, disable_dropout=False)
    assert live[0] == pytest.approx(precomputed[0], abs=1e-4)
    assert (live[1] - precomputed[1]).abs().max() < 1e-4
    if way != "lora-with-dropout":  # whose noise is multiplied by 0 at first
        assert live[0][0] != pytest.approx(math.log(2), abs=1e-4), "there is no noise to leave out"


# Adapters

ADAPTERS = {
    "lora": lora(),
    "lora-embeddings": lora(target_modules=["q_proj", "v_proj", "embed_tokens"]),
    "lora-saved-head": lora(modules_to_save=["lm_head"]),
    "lora-saved-embeddings": lora(modules_to_save=["embed_tokens"]),
    "lora-saved-norms": lora(modules_to_save=["norm", "input_layernorm"]),
    "lora-tokens": lora(trainable_token_indices=[5, 6, 7, 40, 41, 42]),
    "lora-parameters": lora(target_modules=[], target_parameters=["mlp.down_proj.weight"]),
    "lora-dropout": lora(lora_dropout=0.5),
    "lora-all-linear": lora(target_modules="all-linear"),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "adalora": AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], total_step=100, init_r=4),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=8),
    "loha": LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4),
    "oft": OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=0, oft_block_size=16),
    "ln-tuning": LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm", "norm"]),
    "prompt-tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix-tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
# Without adapter the model is the policy at its start; adapters that begin elsewhere are below
BEGIN_AT_NOTHING = [name for name in ADAPTERS if name not in ("prompt-tuning", "p-tuning", "prefix-tuning")]


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_reference_of_a_trained_adapter_is_the_adapter_at_the_start(tiny_llama, tmp_path, name):
    """Saved and loaded, as one goes on with an adapter; PEFT loads no virtual tokens to be trained on."""
    model = in_memory(tiny_llama, copy.deepcopy(ADAPTERS[name]))
    if not model.active_peft_config.is_prompt_learning:
        model.save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(load(tiny_llama), tmp_path / "adapter", is_trainable=True)
    rows = make_rows(6)
    try:
        trainer = make_trainer(model, rows, tmp_path, **MOVING)
        trainer.predict(rows)
    except ValueError as error:
        # Right only if it says what to do instead
        message = str(error)
        assert "ref_model" in message, message
        assert any(word in message for word in ("reference", "adapter")), message
        assert name in MAY_BE_REFUSED, f"{name} is refused: {message}"
        return
    hold(trainer, rows, tiny_llama)


# Kinds of adapters of which PEFT makes no second one with the same base model
MAY_BE_REFUSED = {"adalora", "vera", "oft", "prompt-tuning", "p-tuning", "prefix-tuning", "lora-tokens"}
# TRL before 1.15 adds no second one to an adapter with `target_parameters`, and PEFT before 0.20 cannot
if Version(peft.__version__) < Version("0.20") or Version("0.29") < Version(trl.__version__) < Version("1.15"):
    MAY_BE_REFUSED.add("lora-parameters")


@pytest.mark.parametrize("name", BEGIN_AT_NOTHING)
def test_the_reference_of_a_new_adapter_is_the_model_without_it(tiny_llama, tmp_path, name):
    rows = make_rows(6)
    trainer = make_trainer(load(tiny_llama), rows, tmp_path, peft_config=copy.deepcopy(ADAPTERS[name]), **MOVING)
    hold(trainer, rows, tiny_llama)


@pytest.mark.parametrize("start", [False, "pissa", "olora", "pissa_niter_4"])
def test_an_adapter_that_does_not_begin_at_nothing_is_right_or_refused(tiny_llama, tmp_path, start):
    """Without adapter, the model is not what training starts from."""
    rows = make_rows(6)
    torch.manual_seed(0)
    config = lora(init_lora_weights=start)
    try:
        trainer = make_trainer(load(tiny_llama), rows, tmp_path, peft_config=config, **MOVING)
        trainer.predict(rows)
    except ValueError as error:
        assert "init_lora_weights" in str(error)  # noqa: PT017
        assert "ref_model" in str(error)  # noqa: PT017
        return
    hold(trainer, rows, tiny_llama)


@pytest.mark.parametrize("name", ["lora-embeddings", "ia3", "dora", "lora-saved-head", "lora-dropout"])
def test_live_and_precomputed_references_of_a_trained_adapter_agree(tiny_llama, tmp_path, name):
    def make(rows, out, **kwargs):
        return make_trainer(in_memory(tiny_llama, copy.deepcopy(ADAPTERS[name])), rows, out, **kwargs)

    live, precomputed = live_and_precomputed(make, make_rows(6), tmp_path)
    assert live[0][0] == pytest.approx(math.log(2), abs=1e-4)
    assert live[0] == pytest.approx(precomputed[0], abs=1e-3)
    assert (live[1] - precomputed[1]).abs().max() < 1e-3


# What is trained outside the adapter


def unfrozen(model: PeftModel, part: str) -> PeftModel:
    """The model with base parameters trained besides the adapter."""
    for name, parameter in model.named_parameters():
        if part in name and "lora" not in name:
            parameter.requires_grad_(True)
    return model


def outside_the_adapter(folder: str, case: str) -> PeftModel:
    """A GPT-2 with an adapter, and with parameters that are trained besides it."""
    config = lora(target_modules=["c_attn"], bias=case if case in ("all", "lora_only") else "none")
    torch.manual_seed(1)
    model = get_peft_model(load(folder), config)
    return model if config.bias != "none" else unfrozen(model, case)


OUTSIDE = {"all": r"bias", "lora_only": r"c_attn\S*bias", "ln_f": r"ln_f", "wpe": r"wpe", "h.1.mlp.c_fc": r"c_fc"}


@pytest.mark.parametrize("case", OUTSIDE)
def test_parameters_outside_the_adapter_that_would_move_the_reference_are_refused(tiny_gpt2, tmp_path, case):
    rows = make_rows(6)
    wanted = rf"(?s)(?=.*{OUTSIDE[case]})(?=.*precompute_ref_log_probs=True)(?=.*ref_model)"
    with pytest.raises(ValueError, match=wanted):
        make_trainer(outside_the_adapter(tiny_gpt2, case), rows, tmp_path, **MOVING).train()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_a_new_adapter_are_refused_too(tiny_gpt2, tmp_path, bias):
    config = lora(target_modules=["c_attn"], bias=bias)
    with pytest.raises(ValueError, match=r"(?s)(?=.*bias)(?=.*precompute_ref_log_probs=True)(?=.*ref_model)"):
        make_trainer(tiny_gpt2, make_rows(6), tmp_path, peft_config=config, **MOVING).train()


@pytest.mark.parametrize("case", OUTSIDE)
def test_parameters_outside_the_adapter_are_trained_against_a_reference_that_stays(tiny_gpt2, tmp_path, case):
    """Precomputed, or a model of its own: the same losses and weights."""
    rows = make_rows(6)
    found = []
    for own in (False, True):
        model = outside_the_adapter(tiny_gpt2, case)
        given = {"ref_model": load(tiny_gpt2)} if own else {"precompute_ref_log_probs": True}
        trainer = make_trainer(model, rows, tmp_path / str(own), **given, **MOVING)
        before = weights(trainer.model)
        trainer.train()
        found.append((losses(trainer), weights(trainer.model)))
        assert (found[-1][1] - before).norm() > 0.01
    assert found[0][0][0] == pytest.approx(math.log(2), abs=1e-5)
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)
    assert (found[0][1] - found[1][1]).abs().max() < 1e-4


@pytest.mark.parametrize(("unsaved", "settings"), [(True, {}), (False, {}), (False, {"bias": "all"})], ids=str)
def test_trained_parameters_that_an_adapter_is_saved_without_are_told(tiny_gpt2, tmp_path, caplog, unsaved, settings):
    config = lora(target_modules=["c_attn"], **settings)
    options = {"peft_config": config, "precompute_ref_log_probs": True}
    trainer = make_trainer(tiny_gpt2, make_rows(6), tmp_path, **options, **MOVING)
    norm = trainer.model.get_base_model().transformer.ln_f
    norm.weight.requires_grad_(unsaved)
    trainer.train()
    trainer.save_model()
    told = [message for message in caplog.messages if "nor the saved adapter contain them: " in message]
    assert len(told) == unsaved
    assert not told or "ln_f.weight. Name" in told[0]
    loaded = PeftModel.from_pretrained(load(tiny_gpt2), tmp_path).get_base_model().transformer.ln_f
    assert torch.equal(loaded.weight, norm.weight) != unsaved
    assert torch.equal(loaded.bias, norm.bias)


def with_other_prompts(rows):
    return rows.map(lambda row: {"prompt": f"New: {row['prompt']}"})


@pytest.mark.parametrize("case", ["all", "ln_f", "adapter"])
def test_new_rows_are_not_compared_with_a_reference_that_training_has_moved(tiny_gpt2, tmp_path, case):
    rows = make_rows(6)
    precomputed = {"precompute_ref_log_probs": True, "eval_dataset": rows}
    model = tiny_gpt2 if case == "all" else outside_the_adapter(tiny_gpt2, case)
    config = lora(target_modules=["c_attn"], bias="all") if case == "all" else None
    trainer = make_trainer(model, rows, tmp_path, peft_config=config, **precomputed, **MOVING)
    assert trainer.evaluate(rows)["eval_loss"] == trainer.evaluate()["eval_loss"]
    trainer.train()
    own = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(own, abs=1e-5)  # known from before the training
    new = with_other_prompts(rows)
    for ask in (trainer.evaluate, trainer.predict, trainer.score):
        if case == "adapter":  # nothing outside it is trained
            ask(new)
            continue
        with pytest.raises(ValueError, match=r"reference has changed by .* for the \w+ dataset: .* as an eval_dataset"):
            ask(new)


def test_a_training_of_biases_resumes_with_the_reference_that_was_precomputed(tiny_gpt2, tmp_path):
    def make():
        config = lora(target_modules=["c_attn"], bias="all")
        settings = {"precompute_ref_log_probs": True, "save_strategy": "steps", "save_steps": 1}
        return make_trainer(tiny_gpt2, make_rows(6), tmp_path, peft_config=config, **settings, **MOVING)

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(resumed.model), weights(whole.model))


def test_other_code_trains_the_model_whose_reference_is_precomputed(tiny_gpt2, tmp_path):
    rows, model = make_rows(6), load(tiny_gpt2)
    trainer = make_trainer(model, rows, tmp_path, precompute_ref_log_probs=True, **MOVING)
    trainer.evaluate(rows)
    make_trainer(model, rows, tmp_path / "other", **MOVING).train()
    with pytest.raises(ValueError, match="reference has changed by"):
        trainer.evaluate(with_other_prompts(rows))


def test_the_copy_of_an_adapter_has_its_number_format(tiny_llama, tmp_path):
    """Otherwise the reference of an adapter in bfloat16 would be rounded otherwise than the policy."""
    model = get_peft_model(load(tiny_llama), lora(init_lora_weights=False)).to(torch.bfloat16)
    trainer = make_trainer(model, make_rows(6), tmp_path, **MOVING)
    assert not trainer.predict(make_rows(6)).predictions.any()


# A reference that is given


def sharing(kind: str, folder: str):
    """(model, ref_model) that share parameters which are trained."""
    if kind == "two-adapters":
        base = load(folder)
        return tuple(get_peft_model(base, lora(init_lora_weights=False)) for _ in range(2))
    if kind == "below-the-adapter":
        model = get_peft_model(load(folder), lora(init_lora_weights=False))
        return model, model.get_base_model()
    model, other = load(folder), load(folder)
    if kind == "modules":
        other.model = model.model
    elif kind == "storage":
        other.load_state_dict(model.state_dict(), assign=True)
    else:
        other = copy.copy(model)
    return model, other


@pytest.mark.parametrize("kind", ["two-adapters", "below-the-adapter", "modules", "storage", "shallow-copy"])
def test_a_reference_that_would_be_trained_is_refused(tiny_llama, tmp_path, kind):
    model, ref_model = sharing(kind, tiny_llama)
    with pytest.raises(ValueError, match=r"(?s)share parameters that are trained .*copy\.deepcopy"):
        make_trainer(model, make_rows(6), tmp_path, ref_model=ref_model, **MOVING)


def test_a_reference_may_share_weights_that_are_frozen(tiny_llama, tmp_path):
    model, ref_model = load(tiny_llama), load(tiny_llama)
    model.model.embed_tokens.requires_grad_(False)
    ref_model.model.embed_tokens = model.model.embed_tokens
    hold(make_trainer(model, make_rows(6), tmp_path, ref_model=ref_model, **MOVING), make_rows(6), tiny_llama)


def moved(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


# Name → folder → a reference that is not the policy
GIVEN = {
    "evaluation-mode": lambda folder: moved(load(folder)).eval(),
    "training-mode": lambda folder: moved(load(folder)).train(),
    "adapter": lambda folder: in_memory(folder, lora(lora_dropout=0.5)),
    "adapter-in-training-mode": lambda folder: in_memory(folder, lora(lora_dropout=0.5)).train(),
    "saved-head": lambda folder: in_memory(folder, lora(modules_to_save=["lm_head"])),
    "merged": lambda folder: in_memory(folder, lora()).merge_and_unload(),
    "virtual-tokens": lambda folder: in_memory(folder, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
}


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", GIVEN)
def test_a_given_reference_is_asked_as_it_is(tiny_llama, tmp_path, kind, peft):
    reference = GIVEN[kind](tiny_llama)
    tokenizer, rows = AutoTokenizer.from_pretrained(tiny_llama), make_rows(6)
    ref_logps = own_logps(reference, tokenizer, rows)
    frozen = {name: value.clone() for name, value in reference.state_dict().items()}
    kwargs = {"peft_config": lora()} if peft else {}
    trainer = make_trainer(tiny_llama, rows, tmp_path, ref_model=reference, disable_dropout=False, **MOVING, **kwargs)
    for _ in range(2):
        policy = own_logps(trainer.accelerator.unwrap_model(trainer.model), tokenizer, rows)
        assert trainer.predict(rows).predictions == pytest.approx(policy - ref_logps, abs=ROUNDING)
        trainer.train()
    after = reference.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())


# Two adapters


def test_an_adapter_of_another_name_is_refused_or_right(tiny_llama, tmp_path):
    rows = make_rows(6)
    model = get_peft_model(load(tiny_llama), lora(), adapter_name="mine")
    try:
        trainer = make_trainer(model, rows, tmp_path, **MOVING)
    except ValueError as error:
        assert "mine" in str(error)  # noqa: PT017
        return
    hold(trainer, rows, tiny_llama)


@pytest.mark.parametrize("active", ["default", "other"])
def test_of_two_adapters_the_active_one_is_trained(tiny_llama, tmp_path, active):
    """The one that is not active changes nothing."""
    rows = make_rows(6)
    model = in_memory(tiny_llama, lora())
    model.add_adapter("other", lora(init_lora_weights=False, target_modules=["o_proj"]))
    model.set_adapter(active)
    if active == "other":
        with pytest.raises(ValueError, match="other"):
            make_trainer(model, rows, tmp_path, **MOVING).train()
        return
    idle = {name: value.clone() for name, value in model.state_dict().items() if ".other." in name}
    assert idle
    trainer = make_trainer(model, rows, tmp_path, **MOVING)
    hold(trainer, rows, tiny_llama)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in idle.items())


def test_an_adapter_that_is_called_as_the_reference_would_be(tiny_llama, tmp_path):
    """It is the user's own, or an earlier DPOTrainer left it: it is not overwritten, and the error says what to do."""
    model = in_memory(tiny_llama, lora())
    model.add_adapter("ref", lora(init_lora_weights=False))
    model.set_adapter("default")
    mine = {name: value.clone() for name, value in model.state_dict().items() if ".ref." in name}
    with pytest.raises(ValueError, match=r"an adapter named 'ref'.* model\.delete_adapter\('ref'\)"):
        make_trainer(model, make_rows(6), tmp_path, **MOVING)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in mine.items())
    model.delete_adapter("ref")
    hold(make_trainer(model, make_rows(6), tmp_path, **MOVING), make_rows(6), tiny_llama)


# A whole model


@pytest.mark.parametrize("training", [False, True], ids=["evaluation-mode", "training-mode"])
@pytest.mark.parametrize("changed", [False, True], ids=["as-saved", "changed-in-memory"])
def test_a_whole_models_reference_is_the_model_before_training(tiny_gpt2, tmp_path, changed, training):
    model = moved(load(tiny_gpt2)) if changed else load(tiny_gpt2)
    rows = make_rows(6)
    hold(make_trainer(model.train(training), rows, tmp_path, **MOVING | {"learning_rate": 1e-3}), rows, tiny_gpt2)


def test_after_a_resume_the_reference_is_the_model_before_training(tiny_gpt2, tmp_path):
    rows = make_rows(12)
    settings = MOVING | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, **settings)
    before = own_logps(trainer.model, AutoTokenizer.from_pretrained(tiny_gpt2), rows)
    trainer.train()
    again = make_trainer(tiny_gpt2, rows, tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    after = own_logps(again.model, AutoTokenizer.from_pretrained(tiny_gpt2), rows)
    assert again.predict(rows).predictions == pytest.approx(after - before, abs=ROUNDING)


@pytest.mark.parametrize("name", ["lora", "lora-embeddings", "ia3"])
def test_after_a_resume_the_reference_is_the_adapter_at_the_start(tiny_llama, tmp_path, name):
    """The checkpoint holds the trained adapter, and the reference is still the one that training began with."""
    rows = make_rows(12)
    in_memory(tiny_llama, copy.deepcopy(ADAPTERS[name])).save_pretrained(tmp_path / "adapter")
    settings = MOVING | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def make():
        model = PeftModel.from_pretrained(load(tiny_llama), tmp_path / "adapter", is_trainable=True)
        return make_trainer(model, rows, tmp_path / "out", **settings)

    trainer = make()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    before = own_logps(trainer.model, tokenizer, rows)
    trainer.train()
    again = make()
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert (weights(trainer.model) - weights(again.model)).abs().max() == 0
    after = own_logps(again.model, tokenizer, rows)
    assert again.predict(rows).predictions == pytest.approx(after - before, abs=ROUNDING)


# Weights below an adapter, and code that was set on a model


@pytest.mark.parametrize("saved", [False, True], ids=["in-memory", "saved"])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adding_the_reference_leaves_the_policy_as_it_is(tiny_llama, tmp_path, start, saved):
    """PEFT subtracts what such an adapter begins with from the weights below it."""
    torch.manual_seed(0)
    model = get_peft_model(load(tiny_llama), lora(init_lora_weights=start))
    if saved:
        model.save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(load(tiny_llama), tmp_path / "adapter", is_trainable=True)
    ids = torch.arange(5, 25)[None]
    before = model.eval()(ids).logits
    rows = make_rows(6)
    trainer = make_trainer(model, rows, tmp_path / "out", **MOVING)
    assert torch.equal(model.eval()(ids).logits, before)
    assert model.peft_config["default"].init_lora_weights == start
    hold(trainer, rows, tiny_llama)


@pytest.mark.skipif(Version(peft.__version__) < Version("0.19"), reason=f"PEFT {peft.__version__} can add it twice")
def test_an_adapter_that_peft_cannot_add_twice_is_refused_with_what_to_do(tmp_path):
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes))
    tied = lora(target_modules=["lm_head", "q_proj"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match=r"ensure_weight_tying=True .* Merge the adapter into the model and pass a"):
        make_trainer(get_peft_model(model, tied), make_rows(4), tmp_path, processing_class=tokenizer)


def set_on(model, how: str):
    """The model with code that calls its own layers, which a copy of the model would call, too."""
    layer = model.model.layers[0].mlp
    forward = layer.forward
    if how == "forward":
        layer.forward = lambda x: 0.9 * forward(x)
    else:
        model.model.norm.register_forward_hook(lambda module, args, output: output + 0.1 * forward(output))
    return model


@pytest.mark.parametrize("how", ["forward", "hook"])
@pytest.mark.parametrize("given", [False, True], ids=["copied", "given"])
def test_a_copy_that_computes_with_the_originals_weights_is_refused(tiny_llama, tmp_path, how, given):
    model = set_on(load(tiny_llama), how)
    reference = {"ref_model": copy.deepcopy(model)} if given else {}
    trainer = make_trainer(model, make_rows(6), tmp_path, **MOVING, **reference)
    with pytest.raises(ValueError, match=r"(?s)reference computes with parameters that are trained.*ref_model"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("how", ["forward", "hook"])
def test_code_that_was_set_on_a_model_is_trained_against_a_reference_of_its_own(tiny_llama, tmp_path, how):
    found = []
    for settings in ({"ref_model": set_on(load(tiny_llama), how)}, {"precompute_ref_log_probs": True}):
        trainer = make_trainer(set_on(load(tiny_llama), how), make_rows(6), tmp_path, **MOVING, **settings)
        trainer.train()
        found.append(losses(trainer))
    assert found[0][0] == pytest.approx(math.log(2), abs=1e-5)
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_a_trainer_whose_reference_another_one_has_replaced(tiny_llama, tmp_path):
    """Both trainers of one model with an adapter have its adapter "ref"."""
    rows = make_rows(6)
    model = in_memory(tiny_llama, lora())
    first = make_trainer(model, rows, tmp_path / "first", **MOVING)
    first.train()
    first.evaluate(rows)
    second = make_trainer(model, rows, tmp_path / "second", **MOVING)
    second.train()
    with pytest.raises(ValueError, match=r"(?s)reference has changed since.*another trainer"):
        first.evaluate(rows)
    with pytest.raises(ValueError, match=r"(?s)reference has changed since.*another trainer"):
        first.train()
    second.evaluate(rows)


@pytest.mark.parametrize("off", [0, 1, None], ids=["on", "one-layer-off", "off"])
def test_an_adapter_is_switched_as_by_peft(tiny_llama, off):
    config = lora(modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)]
    assert len(layers) > 2
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)  # by the user
    for layer in layers[:off]:
        layer.enable_adapters(False)
    trainable = [p.requires_grad for p in model.parameters()]
    batch = plain_batch(torch.arange(8).reshape(2, 4))
    with model.disable_adapter():
        expected = Scorer()(model, batch).logps
    is_off = [layer.disable_adapters for layer in layers]
    assert is_off == [off is None] * len(layers)
    for layer in layers[:off]:
        layer.enable_adapters(False)
    for p, required in zip(model.parameters(), trainable, strict=True):
        p.requires_grad_(required)
    assert torch.equal(Reference("adapter_off", Scorer()).logps(model, batch), expected.detach())
    assert [layer.disable_adapters for layer in layers] == is_off
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert "get_model_status" not in vars(model)
    assert model.get_model_status().available_adapters == ["default"]


def test_an_adapter_that_was_merged_leaves_no_reference(tiny_llama, tmp_path):
    trainer = make_trainer(load(tiny_llama), make_rows(6), tmp_path, peft_config=lora(), **MOVING)
    trainer.train()
    trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()
    with pytest.raises(ValueError, match="the model has no adapter any more, for example because of merge_and_unload"):
        trainer.evaluate(make_rows(6))


def test_a_given_reference_that_other_code_trains_before_training(tiny_gpt2, tmp_path):
    rows, ref_model = make_rows(6), load(tiny_gpt2)
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, ref_model=ref_model, **MOVING)
    trainer.evaluate(rows)
    make_trainer(ref_model, rows, tmp_path / "other", **MOVING).train()
    with pytest.raises(ValueError, match="reference has changed since the trainer first used it"):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["new", "trained", "trained on demonstrations", "full", "given"])
@pytest.mark.parametrize("is_merged", [False, True])
def test_weights_that_are_saved_nowhere_are_told(tiny_llama, tmp_path, caplog, is_merged, kind, dtype):
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype).float()
    if is_merged:
        model = get_peft_model(model, adapter).merge_and_unload().requires_grad_(True)
    settings = {"processing_class": AutoTokenizer.from_pretrained(tiny_llama)}
    if kind == "new":
        settings["peft_config"] = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"])
    elif kind.startswith("trained"):
        model = get_peft_model(model, adapter)
    if kind == "given":
        model, settings["ref_model"] = tiny_llama, model
    if kind.endswith("demonstrations"):
        settings |= {"positive_loss": "sft", "negative_loss": "none"}
    make_trainer(model, make_rows(4), tmp_path, **settings)
    told = [message for message in caplog.messages if "The model in memory has other weights than" in message]
    assert len(told) == is_merged
    assert not told or "q_proj.weight and 1 others" in told[0]


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2"])
def test_a_start_that_peft_cannot_repeat_when_it_loads_the_adapter_is_told(tiny_llama, tmp_path, caplog, start):
    model = get_peft_model(load(tiny_llama), lora(init_lora_weights=start))
    trainer = make_trainer(model, make_rows(4), tmp_path / "out", **MOVING)
    told = [message for message in caplog.messages if f"init_lora_weights='{start}' has moved a part" in message]
    assert len(told) == (start != "pissa")
    assert not told or "trainer.model.merge_and_unload().save_pretrained" in told[0]
    trainer.train()
    trainer.save_model()
    ids = torch.arange(5, 25)[None]
    trained = trainer.model.eval()(ids).logits
    saved = PeftModel.from_pretrained(load(tiny_llama), tmp_path / "out")
    assert torch.allclose(saved(ids).logits, trained, atol=1e-4) == (start == "pissa")
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert torch.allclose(load(str(tmp_path / "merged"))(ids).logits, trained, atol=1e-4)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal"])
def test_a_merged_base_below_an_adapter_that_begins_otherwise_is_told(tiny_llama, tmp_path, caplog, start):
    base = get_peft_model(load(tiny_llama), lora(init_lora_weights=False)).merge_and_unload()
    make_trainer(get_peft_model(base, lora(init_lora_weights=start)), make_rows(4), tmp_path / "out", **MOVING)
    assert caplog.text.count("The model in memory has other weights than") == 1


@has_own_adapters
@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
@pytest.mark.parametrize("kind", ["model", "given", "new", "PeftModel"])
def test_an_adapter_that_transformers_has_loaded_is_told(tiny_llama, tmp_path, caplog, kind, target):
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=[target], init_lora_weights=kind == "new")
    trained = str(tmp_path / "trained")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), adapter).save_pretrained(trained)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    if kind == "PeftModel":
        model = PeftModel.from_pretrained(model, trained, is_trainable=True)
    else:
        model.load_adapter(trained, is_trainable=True)
    settings = {"processing_class": AutoTokenizer.from_pretrained(tiny_llama), "learning_rate": 0.02}
    model, ref_model = (tiny_llama, model) if kind == "given" else (model, None)
    trainer = make_trainer(model, make_rows(4), tmp_path / "out", ref_model=ref_model, **settings)
    told = [message for message in caplog.messages if "PeftModel.from_pretrained(model, adapter" in message]
    assert len(told) == (kind in ("model", "given"))
    assert not told or f"names {tiny_llama} alone" in told[0]
    trainer.train()
    trainer.save_model()
    if told:
        with pytest.raises(ValueError, match="was trained against another reference"):
            Judge.from_pretrained(trainer.args.output_dir)
    else:
        found = Judge.from_pretrained(trainer.args.output_dir).score(make_rows(4))["reward"][:]
        assert found == pytest.approx(trainer.score(make_rows(4))["reward"][:], abs=1e-5)
        assert np.ptp(found) > 1e-3


# What a saved model refers to


def test_settings_that_are_saved_nowhere_are_told(tiny_llama, tmp_path, caplog):
    linear = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}}
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    make_trainer(tiny_llama, make_rows(4), tmp_path / "as-saved", peft_config=adapter)
    make_trainer(tiny_llama, make_rows(4), tmp_path / "not-named", model_init_kwargs=linear, **IMITATES)
    assert "other settings than" not in caplog.text
    for settings in ({"peft_config": adapter}, {}):
        make_trainer(tiny_llama, make_rows(4), tmp_path / "changed", model_init_kwargs=linear, **settings)
        assert caplog.text.count(f"other settings than {tiny_llama}, which it was loaded from: rope_parameters") == 1
        caplog.clear()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, **linear)
    make_trainer(tiny_llama, make_rows(4), tmp_path / "given", ref_model=model)
    assert caplog.text.count("rope_parameters.rope_type is 'linear' instead of 'default'") == 1


IMITATES = {"positive_loss": "sft", "negative_loss": "none"}


def test_rows_of_added_tokens_that_are_saved_nowhere_are_told(tiny_llama, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(len(tokenizer) + 8)  # in reserve
    model.save_pretrained(tmp_path / "reserve")
    tokenizer.save_pretrained(tmp_path / "reserve")
    for shift in (0.0, 1.0):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "reserve")
        with torch.no_grad():
            model.get_input_embeddings().weight[len(tokenizer)] += shift
        adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
        make_trainer(model, make_rows(4), tmp_path / "out", peft_config=adapter, processing_class=tokenizer)
        assert ("other weights than" in caplog.text) == bool(shift)


def test_a_trained_model_is_not_saved_over_its_reference(tiny_llama, tmp_path):
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    before = (folder / "model.safetensors").read_bytes()
    overwrites = "is the folder of its reference"
    with pytest.raises(ValueError, match=overwrites):
        make_trainer(str(folder), make_rows(4), folder)
    with pytest.raises(ValueError, match=overwrites):
        make_trainer(tiny_llama, make_rows(4), folder, ref_model=AutoModelForCausalLM.from_pretrained(folder))
    trainer = make_trainer(str(folder), make_rows(4), tmp_path / "out")
    with pytest.raises(ValueError, match=overwrites):
        trainer.save_model(str(folder / ".." / "model"))
    assert (folder / "model.safetensors").read_bytes() == before
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    make_trainer(str(folder), make_rows(4), folder, peft_config=adapter).save_model()
    assert (folder / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match=r"holds an adapter of another training.*adapter_config\.json"):
        make_trainer(tiny_llama, make_rows(4), tmp_path / "other").save_model(str(folder))
    shutil.copytree(tiny_llama, own := tmp_path / "imitates")
    make_trainer(str(own), make_rows(4), own, **IMITATES).save_model()  # it has no reference


def test_a_full_model_is_not_saved_beside_an_old_adapter(tiny_llama, tmp_path):
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    make_trainer(tiny_llama, make_rows(4), tmp_path, peft_config=adapter).save_model()
    with pytest.raises(ValueError, match=r"holds an adapter of another training.*Choose another output_dir"):
        make_trainer(tiny_llama, make_rows(4), tmp_path)


def test_adapters_that_a_judge_would_not_find_are_told(tiny_llama, tmp_path, caplog):
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    named = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), adapter, adapter_name="mine")
    settings = {"processing_class": AutoTokenizer.from_pretrained(tiny_llama)}
    ref_model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    make_trainer(named, make_rows(4), tmp_path, ref_model=ref_model, **settings)
    assert "trains the adapter mine. PEFT saves it in a subfolder" in caplog.text
    assert "ref_model is a PeftModel" not in caplog.text
    make_trainer(tiny_llama, make_rows(4), tmp_path, ref_model=named, **settings)
    assert f"names its base {tiny_llama} alone as the reference" in caplog.text


def test_the_configuration_of_an_adapter_stays_as_it_was(tiny_llama, tmp_path):
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    before = copy.deepcopy(adapter)
    trainer = make_trainer(tiny_llama, make_rows(4), tmp_path, peft_config=adapter)
    assert adapter == before
    assert trainer.model.peft_config["default"].target_modules != "all-linear"
    trainer = make_trainer(
        tiny_llama, make_rows(4), tmp_path, peft_config=adapter, model_init_kwargs={"revision": "v2"}
    )
    assert trainer.model.peft_config["default"].revision == "v2"
    assert adapter == before
