"""A batch in parts is the whole batch: the same tokens, the same scores, in the least time that the costs allow."""

import itertools
import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from trl_ulma.likelihood import parts as parts_module
from trl_ulma.likelihood.layouts import packed, padded, shared
from trl_ulma.likelihood.parts import cost_of_a_pass, parts
from trl_ulma.likelihood.reference import Reference
from trl_ulma.likelihood.scorer import Scorer

VOCABULARY = 23
LENGTHS = [9, 4, 12, 5, 4, 11, 3]
PROMPT = 2


def make_batch(lengths=LENGTHS, *, same_prompts=False, left=False):
    generator = torch.Generator().manual_seed(0)
    width = max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), width), generator=generator)
    if same_prompts:
        ids[:, :PROMPT] = ids[torch.arange(len(lengths)) % 3, :PROMPT]
    places = torch.arange(width)[None]
    mask = (places < torch.tensor(lengths)[:, None]).long()
    completion = mask * (places >= PROMPT).long()
    if left:
        mask, completion = mask.flip(1), completion.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask, "completion_mask": completion}


def make_llama(**changed):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes | changed)).double().eval()


@pytest.fixture
def cheap_passes(monkeypatch):
    """Every batch that can be divided is divided at each length."""
    monkeypatch.setattr(parts_module, "_TOKENS", 0)
    monkeypatch.setattr(parts_module, "_TOKENS_IN_HALF_PRECISION", 0)
    monkeypatch.setattr(parts_module, "_PARAMETERS", 0)


def least(lengths, cost):
    """The least cost by trying all divisions of the sorted lengths."""
    ordered = sorted(lengths, reverse=True)
    found = []
    for cuts in itertools.product([False, True], repeat=len(ordered) - 1):
        total, begin = 0.0, 0
        for end in [i + 1 for i, cut in enumerate(cuts) if cut] + [len(ordered)]:
            total += (end - begin) * ordered[begin] + cost
            begin = end
        found.append(total)
    return min(found)


@pytest.mark.parametrize("cost", [0, 1, 3, 7, 20, 1000])
@pytest.mark.parametrize("lengths", [LENGTHS, [5, 5, 5], [30, 2, 2, 2, 2, 2], [3, 9], [8]], ids=str)
def test_the_division_is_the_cheapest(lengths, cost):
    found = parts(padded(make_batch(lengths)), cost)
    shapes = [part.inputs["input_ids"].shape for part, _ in found]
    assert sum(rows * width + cost for rows, width in shapes) == least(lengths, cost)


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_every_position_is_in_one_part_before_the_same_tokens(layout):
    batch = make_batch(same_prompts=True)
    whole = {"padded": padded, "shared": shared}[layout](batch)
    found = parts(whole, 0)
    assert len(found) > 1
    order = torch.cat([own for _, own in found])
    assert order.sort().values.tolist() == list(range(len(whole.positions)))
    for part, own in found:
        tokens = part.inputs["input_ids"].flatten()[part.positions]
        assert torch.equal(tokens, whole.inputs["input_ids"].flatten()[whole.positions[own]])


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize("make_model", [make_llama, lambda: make_gpt2()], ids=["llama", "gpt2"])
def test_scores_states_and_gradients_are_those_of_the_whole_batch(cheap_passes, layout, make_model):
    model, batch = make_model(), make_batch(same_prompts=True)
    widths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    found, gradients = [], []
    for pass_cost in (math.inf, None):
        scorer = Scorer(layout)
        scorer(model, batch)  # measures the head's map
        widths.clear()
        found.append(scorer(model, batch, statistics=True, prompt_states=True, pass_cost=pass_cost))
        weights = torch.arange(1.0, len(LENGTHS) + 1)
        gradients.append(torch.autograd.grad((found[-1].logps * weights).sum(), list(model.parameters())))
    assert len(widths) > 2  # of the second time
    whole, divided = found
    for name in ("log_probs", "entropy", "mean_logits", "is_top1", "prompt_states"):
        assert torch.allclose(getattr(whole, name), getattr(divided, name), atol=1e-12), name
    assert whole.log_probs.abs().sum() > 1
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def make_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).double().eval()


def test_a_row_without_a_completion_has_no_score(cheap_passes):
    model, batch = make_llama(), make_batch()
    batch["completion_mask"][1] = 0
    whole, divided = (Scorer()(model, batch, pass_cost=cost, prompt_states=True) for cost in (math.inf, None))
    assert divided.logps[1] == 0
    assert torch.allclose(whole.log_probs, divided.log_probs, atol=1e-12)
    assert torch.allclose(whole.prompt_states, divided.prompt_states, atol=1e-12)


@pytest.mark.parametrize("make_model", [make_llama, make_gpt2], ids=["llama", "gpt2"])
def test_rows_of_padding_alone_change_nothing(cheap_passes, make_model):
    model, batch = make_model(), make_batch([9, 0, 4, 0])
    found = []
    for cost in (math.inf, None):
        model.zero_grad()
        found.append(Scorer()(model, batch, pass_cost=cost))
        found[-1].logps.sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    whole, expected, divided, gradients = found
    assert torch.allclose(whole.log_probs, divided.log_probs, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(expected, gradients, strict=True))


def test_rows_that_are_padded_on_the_left_or_packed_stay_together():
    assert len(parts(padded(make_batch(left=True)), 0)) == 1
    assert len(parts(packed(make_batch()), 0)) == 1


def test_inputs_that_are_not_tokens_stay_together():
    layout = padded({**make_batch(), "pixel_values": torch.zeros(2, 3)})
    assert len(parts(layout, 0)) == 1


def test_one_more_pass_costs_a_small_model_more_tokens():
    model = make_llama()
    small = cost_of_a_pass(model, model)
    wide = make_llama(hidden_size=256)
    assert math.inf > small > cost_of_a_pass(wide, wide) > parts_module._TOKENS
    # Tokens are faster in half precision, but a pass is not
    half = make_llama().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cost_of_a_pass(half, half) == cost_of_a_pass(model, model) > small
    assert cost_of_a_pass(half, half) > small
    # With lengths as of HH, a tiny model is not divided
    assert len(parts(padded(make_batch([200, 40, 90, 30])), small)) == 1


def test_wrapped_models_are_not_divided(tmp_path):
    model = make_llama()
    assert cost_of_a_pass(torch.compile(model), model) == math.inf
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert cost_of_a_pass(DistributedDataParallel(model), model) == math.inf
    finally:
        torch.distributed.destroy_process_group()


def test_the_reference_of_a_wrapped_policy_is_not_divided(cheap_passes, tmp_path):
    # In bfloat16, narrower rows are rounded otherwise
    policy, reference = make_llama().bfloat16(), make_llama().bfloat16()
    batch, scorer = make_batch(), Scorer()
    rows = []
    reference.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    asked = Reference("copy", scorer, reference)
    asked.logps(policy, batch)
    assert rows[-1] < len(LENGTHS)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(policy)
        logps = asked.logps(wrapped, batch)
        assert rows[-1] == len(LENGTHS)
        assert torch.equal(logps, scorer(wrapped, batch).logps)
    finally:
        torch.distributed.destroy_process_group()


def test_models_whose_rows_belong_together_are_not_divided():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    dynamic = make_llama(rope_parameters=rope, max_position_embeddings=64)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "num_local_experts": 2, "output_router_logits": True}
    mixture = MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, **sizes, **experts))
    elsewhere = make_llama().to("meta")
    quantized = make_llama()
    quantized.config.quantization_config = {"load_in_4bit": True}
    placed = make_llama()
    placed.hf_device_map = {"": "cpu"}
    for model in (dynamic, mixture, elsewhere, quantized, placed):
        assert cost_of_a_pass(model, model) == math.inf
    assert cost_of_a_pass(make_llama(), make_llama()) == math.inf  # as if the first were a wrapper


def test_an_auxiliary_loss_is_of_the_whole_batch(cheap_passes):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=VOCABULARY, **sizes, num_key_value_heads=2, num_local_experts=2)
    model = MixtralForCausalLM(config).eval()
    assert cost_of_a_pass(model, model) == 0
    rows = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = Scorer()(model, make_batch(), output_router_logits=True)
    assert found.aux_loss is not None
    assert rows[-1] == len(LENGTHS)
