"""Every layout, number format, attention and way to train gives the log-probabilities of float64 on the CPU.

CUDA_VISIBLE_DEVICES=0 pytest tests/gpu     # on a machine with a GPU: all members
pytest tests/gpu                            # elsewhere: the members that a CPU has
"""

import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from trl_ulma import DataCollatorForPointwisePreference
from trl_ulma.likelihood.head import CompactHead
from trl_ulma.likelihood.scorer import Scorer

HAS_GPU = torch.cuda.is_available()
HAS_FLASH = HAS_GPU and importlib.util.find_spec("flash_attn") is not None
# Nats a token by which a number format may be off from float64
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.08, torch.float16: 0.02}
gpu = pytest.mark.gpu


def members():
    """(layout, dtype, attention, way to train), those that need a GPU marked."""
    for layout in ("padded", "packed", "shared"):
        for dtype in TOLERANCE:
            for attention in ("eager", "sdpa", "flash_attention_2"):
                for how in ("full", "lora", "4bit"):
                    if layout == "shared" and attention == "flash_attention_2":
                        continue  # takes no mask of its own: rows are padded
                    if attention == "flash_attention_2" and dtype == torch.float32:
                        continue
                    marks = []
                    if attention == "flash_attention_2":
                        marks = [gpu, pytest.mark.skipif(not HAS_FLASH, reason="needs a GPU and flash-attn")]
                    elif dtype == torch.float16:
                        marks = [gpu, pytest.mark.skipif(not HAS_GPU, reason="float16 is for GPUs")]
                    yield pytest.param(layout, dtype, attention, how, marks=marks)


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    """Rows of two prompts, of different lengths."""
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 384, (n,), generator=draw).tolist() for n in (17, 30)]
    rows = [
        {
            "prompt_ids": prompts[i % 2],
            "completion_ids": torch.randint(3, 384, (5 + 9 * i,), generator=draw).tolist(),
            "label": 1.0,
        }
        for i in range(4)
    ]
    made = DataCollatorForPointwisePreference(pad_token_id=0)(rows)
    return {name: made[name] for name in ("input_ids", "attention_mask", "completion_mask")}


def load(folder, dtype, attention, how, device):
    """The model in a number format, and what float64 on the CPU is to be compared with it."""
    quantization = {}
    if how == "4bit":
        quantization["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, device_map=device, **quantization
    )
    if how != "full":
        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
    return model.eval()


def exact(model, folder, how, batch) -> torch.Tensor:
    """`(B,)` log π in float64 on the CPU, with the same adapter; of 4-bit weights, what they are dequantized to."""
    plain = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    if how == "4bit":
        import bitsandbytes

        dense = dict(plain.named_modules())
        for name, module in model.get_base_model().named_modules():
            if type(module) is bitsandbytes.nn.Linear4bit:
                weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                dense[name.removesuffix(".base_layer")].weight.data.copy_(weight.double().cpu())
    if how != "full":
        merged = {n: p for n, p in model.named_parameters() if "lora_" in n}
        plain = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                if name in merged:
                    parameter.data = merged[name].detach().double().cpu()
    ids = batch["input_ids"]
    with torch.no_grad():
        logits = plain(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    per_token = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (per_token * batch["completion_mask"][:, 1:]).sum(1)


@pytest.mark.parametrize(("layout", "dtype", "attention", "how"), list(members()))
def test_a_row_has_the_log_probability_of_float64(folder, batch, device, layout, dtype, attention, how):
    model = load(folder, dtype, attention, how, device)
    wanted = exact(model, folder, how, batch)
    with torch.no_grad():
        found = Scorer(layout)(model, {name: value.to(device) for name, value in batch.items()}).logps
    tokens = batch["completion_mask"][:, 1:].sum(1)
    off = ((found.double().cpu() - wanted).abs() / tokens).max().item()
    # Products with 4-bit weights are rounded to the compute format, whatever that is
    assert off <= (max(TOLERANCE[dtype], 0.02) if how == "4bit" else TOLERANCE[dtype])


@pytest.mark.parametrize("chunks", [1, 5])
def test_the_gradient_is_that_of_the_models_own_logits(folder, batch, device, monkeypatch, chunks):
    model = load(folder, torch.float32, "sdpa", "full", device)
    here = {name: value.to(device) for name, value in batch.items()}
    if chunks > 1:
        tokens = int(batch["completion_mask"][:, 1:].sum())
        monkeypatch.setattr("trl_ulma.likelihood.head.CHUNK_BYTES", 4 * 384 * (tokens // chunks))
    Scorer()(model, here).logps.sum().backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    logits = model(input_ids=here["input_ids"], attention_mask=here["attention_mask"]).logits[:, :-1]
    per_token = logits.log_softmax(-1).gather(2, here["input_ids"][:, 1:, None])[..., 0]
    (per_token * here["completion_mask"][:, 1:]).sum().backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()


def test_the_head_leaves_the_model_as_it_was(folder, batch, device):
    model = load(folder, torch.float32, "sdpa", "full", device)
    before = model.generate(input_ids=batch["input_ids"][:1, :5].to(device), max_new_tokens=5, do_sample=False)
    for _ in range(3):
        Scorer()(model, {name: value.to(device) for name, value in batch.items()})
    head = model.get_output_embeddings()
    assert "forward" not in vars(head)
    assert not head._forward_hooks
    assert not model._forward_hooks
    after = model.generate(input_ids=batch["input_ids"][:1, :5].to(device), max_new_tokens=5, do_sample=False)
    assert torch.equal(before, after)
    assert CompactHead(model).model is model
