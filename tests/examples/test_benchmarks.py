"""The benchmarks run, and write what they measure."""

import json
from pathlib import Path

import torch
from forks import run_script
from transformers import AutoModelForCausalLM
from world import trains_with_trl

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


def run(script: str, *options: str, folder: Path) -> str:
    done = run_script(SCRIPTS / script, *options, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@trains_with_trl
def test_methods_take_turns_and_the_report_has_their_ratios(tiny_gpt2, tmp_path):
    methods = ["dpo", "kto", "ulma", "pointwise-dpo-shared", "ulma-shared-precomputed", "floor", "floor-shared"]
    options = ["--model", tiny_gpt2, "--method", ",".join(methods), "--rows", "8", "--rounds", "2", "--no_memory"]
    options += ["--prompt_tokens", "20", "--completion_tokens", "8", "--preparation_rows", "0"]
    run("throughput.py", *options, "--output", "out", folder=tmp_path)
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["laps"]) == methods
    # Forwards outside of the loss, such as the check of the reference after step 1, are not subtracted
    assert min(lap["around"] for name in methods if "floor" not in name for lap in result["laps"][name]) > 0
    # ULMA asks the reference for half of the rows, DPO for all
    lap = {name: result["laps"][name][-1] for name in methods}
    assert lap["ulma"]["reference"] < lap["dpo"]["reference"]
    assert lap["pointwise-dpo-shared"]["policy"] < lap["dpo"]["policy"]
    assert (tmp_path / "out.png").stat().st_size > 10_000
    page = run("report.py", str(tmp_path / "out.json"), folder=tmp_path)
    assert "ULMA, half demonstrations, LoRA : TRL KTO" in page


def test_scaling_has_a_point_for_each_value(tiny_gpt2, tmp_path):
    options = ["--model", tiny_gpt2, "--lengths", "16,32", "--batch_sizes", "2", "--shares", "0,1", "--method", "ulma"]
    run("scaling.py", *options, "--rounds", "1", "--no_memory", "--output", "curve", folder=tmp_path)
    assert json.loads((tmp_path / "curve.json").read_text())["benchmark"] == "scaling"
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_a_model_of_a_shape_is_made_once(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import shapes

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    monkeypatch.setitem(shapes.SHAPES, "llama-1b", shapes.SHAPES["llama-1b"] | small)
    monkeypatch.setattr(shapes, "VOCABULARY", 500)
    folder = shapes.random_checkpoint("llama-1b", Path(tiny_llama), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (32, 8)
    assert model.config.tie_word_embeddings
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert shapes.random_checkpoint("llama-1b", Path(tiny_llama), tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
