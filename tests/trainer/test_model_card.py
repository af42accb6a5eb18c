"""The model card: what it says is true of the run, and what it tells people to do works."""

import json
import re
import shlex

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig
from world import make_rows, make_trainer

from trl_ulma.losses import NEGATIVE_LOSSES, POSITIVE_LOSSES, check_cell
from trl_ulma.model_card import METHODS, formulas
from trl_ulma.scripts.cli import main


def card_of(trainer, **kwargs) -> str:
    trainer.create_model_card(**kwargs)
    return ModelCard.load(f"{trainer.args.output_dir}/README.md").content


@pytest.mark.parametrize("is_adapter", [False, True])
@pytest.mark.parametrize("model", ["tiny_gpt2", "tiny_llama"])
def test_what_the_card_tells_people_to_do_works(model, is_adapter, tmp_path, request, capsys, monkeypatch):
    model = request.getfixturevalue(model)
    rows = make_rows(8)
    peft_config = LoraConfig(task_type="CAUSAL_LM") if is_adapter else None
    trainer = make_trainer(
        model, rows, tmp_path / "tuned", eval_dataset=rows, peft_config=peft_config, max_steps=2, beta=0.25
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    card = card_of(trainer, dataset_name="thumbs.jsonl")
    monkeypatch.chdir(tmp_path)
    # The tiny models know few positions, and no one wants to read more of them
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("max_new_tokens=128", "max_new_tokens=3")
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.strip()

    command = re.search(r"```bash\ntrl-ulma (.*?)\n```", card, re.DOTALL)[1]
    assert ("--ref_model" in command) == (not is_adapter)
    rows.to_json("answers.jsonl")
    command = command.replace("THE-MODEL-THAT-TRAINING-BEGAN-FROM", model)
    assert main(shlex.split(command)) == 0
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert len(scored) == 8


@pytest.mark.parametrize("is_adapter", [False, True])
def test_the_card_of_a_model_that_takes_images_loads_it(is_adapter, tiny_llava, tmp_path, capsys, monkeypatch):
    said = [[{"role": "assistant", "content": text}] for text in ("Yes.", "No.")]
    rows = make_rows(2, prompt=[[{"role": "user", "content": "Is it red?"}]] * 2, completion=said)
    peft_config = LoraConfig(target_modules=["q_proj"]) if is_adapter else None
    trainer = make_trainer(tiny_llava, rows, tmp_path / "tuned", peft_config=peft_config, max_steps=1)
    trainer.save_model()
    code = re.search(r"```python\n(.*?)```", card_of(trainer), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(code.replace("max_new_tokens=128", "max_new_tokens=3"), {})
    assert capsys.readouterr().out.strip()


def test_the_card_says_what_was_done(tiny_gpt2, tmp_path):
    trainer = make_trainer(
        tiny_gpt2,
        make_rows(12),
        tmp_path / "out",
        eval_dataset=make_rows(6),
        peft_config=LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM"),
        beta=0.25,
        sft_weight=0.5,
        max_steps=1,
        gradient_accumulation_steps=3,
        per_device_train_batch_size=2,
    )
    card = card_of(trainer, model_name="tuned", dataset_name="my-thumbs")
    assert "## Metrics" not in card
    trainer.train()
    trained = card_of(trainer)
    assert "Of the last logged steps, to step 1." in trained
    loss = trainer.evaluate()["eval_loss"]
    card = card_of(trainer, model_name="tuned", dataset_name="my-thumbs")
    head = ModelCard(card).data
    assert head.datasets == "my-thumbs"
    assert {"trl", "trl-ulma", "ulma"} <= set(head.tags)
    for said in (
        "# Model Card for tuned",
        "trained with ULMA",
        "12 rows of one answer each; evaluated on 6 others.",
        "Labels of the train dataset: 12 rows",
        "Of the last evaluation, step 1.",
        f"| `eval_loss` | {loss:.4g} |",
        "| `beta` | 0.25 |",
        "| `sft_weight` | 0.5 |",
        "| `rows per step` | 6 |",
        "| `r` | 4 |",
        "| `lora_alpha` | 12 |",
        "@article{cai2023ulma",
        "@software{vonwerra2020trl",
    ):
        assert said in card


def test_every_method_of_the_grid_has_its_name_and_its_formulas():
    def is_method(cell):
        try:
            check_cell(*cell)
        except ValueError:
            return False
        return True

    cells = [cell for p in POSITIVE_LOSSES for n in NEGATIVE_LOSSES if is_method(cell := (p, n))]
    assert sorted(METHODS) == sorted(cells)
    for positive, negative in cells:
        text = formulas((positive, negative))
        assert ("log σ(r)" in text) == ("pointwise_dpo" in (positive, negative))
        assert ("−sft_weight · log π_θ" in text) == (positive == "sft")
        assert ("+log π_θ" in text) == (negative == "unlearning")
        assert ("bad answers: nothing" in text) == (negative == "none")
        assert ("good answers: nothing" in text) == (positive == "none")


def test_a_run_without_compared_rows_is_no_judge(tiny_gpt2, tmp_path):
    card = card_of(make_trainer(tiny_gpt2, make_rows(4), tmp_path / "out", negative_loss="none"))
    assert "trl-ulma score" not in card
    assert "implicit reward" not in card
