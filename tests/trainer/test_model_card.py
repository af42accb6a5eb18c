"""The model card: what it says is true of the run, and what it tells people to do works."""

import json
import re
import shlex
import shutil

import numpy as np
import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import make_rows, make_trainer

from trl_ulma.evaluation.held_out import HeldOut
from trl_ulma.evaluation.implicit_reward import continuous_figures
from trl_ulma.labels import LabelRules
from trl_ulma.losses import NEGATIVE_LOSSES, POSITIVE_LOSSES, check_cell
from trl_ulma.model_card import METHODS, bootstrap_intervals, formulas, trained_on_chat
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
def test_a_checkpoint_has_the_card_and_no_empty_form(tiny_gpt2, tmp_path, monkeypatch, capsys, is_adapter):
    peft_config = LoraConfig(task_type="CAUSAL_LM") if is_adapter else None
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "peft_config": peft_config}
    make_trainer(tiny_gpt2, make_rows(8), tmp_path / "tuned", **settings).train()
    card = (tmp_path / "tuned" / "checkpoint-2" / "README.md").read_text()
    assert "after step 2 of 4" in card
    assert "More Information Needed" not in card
    assert "after step" not in (tmp_path / "tuned" / "checkpoint-4" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("max_new_tokens=128", "max_new_tokens=3")
    assert '"tuned/checkpoint-2"' in code
    exec(code, {})


def test_a_saved_adapter_has_the_card_and_no_empty_form(tiny_gpt2, tmp_path):
    trainer = make_trainer(
        tiny_gpt2, make_rows(8), tmp_path / "tuned", max_steps=2, peft_config=LoraConfig(task_type="CAUSAL_LM")
    )
    trainer.train()
    trainer.save_model()
    trainer.save_model(str(tmp_path / "copy"))
    for folder in ("tuned", "copy"):
        card = ModelCard.load(tmp_path / folder / "README.md")
        assert "More Information Needed" not in card.content
        assert "The loss is a sum over these kinds of rows" in card.content
        assert card.data.library_name == "peft"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("My own words.")
    trainer.save_model(str(mine))
    assert "My own words." in (mine / "README.md").read_text()


def test_the_card_claims_no_license(tiny_gpt2, tmp_path):
    trainer = make_trainer(tiny_gpt2, make_rows(4), tmp_path)
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert not [name for name in card.data.to_dict() if "licen" in name]


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
    assert "## Results" not in card
    trainer.train()
    trained = card_of(trainer)
    assert "These are the figures of the last logged steps, to step 1." in trained
    loss = trainer.evaluate()["eval_loss"]
    card = card_of(trainer, model_name="tuned", dataset_name="my-thumbs")
    head = ModelCard(card).data
    assert head.datasets == "my-thumbs"
    assert {"trl", "trl-ulma", "ulma"} <= set(head.tags)
    for said in (
        "# Model Card for tuned",
        "trained with ULMA",
        "12 rows of one answer each; evaluated on 6 rows.",
        "Labels of the train dataset: 12 rows",
        "These are the figures of the last evaluation, step 1.",
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


def test_names_with_spaces_are_quoted_in_the_commands_of_the_card(tiny_gpt2, tmp_path):
    shutil.copytree(tiny_gpt2, tmp_path / "my base")
    card = card_of(make_trainer(str(tmp_path / "my base"), make_rows(4), tmp_path / "my out"))
    commands = re.findall(r"trl-ulma (?:chat|score)[^`\n]*", card)
    words = [shlex.split(command) for command in commands]
    assert [each[2:4] for each in words] == [["--model", "my out"]] * 2
    assert words[1][4:6] == ["--ref_model", str(tmp_path / "my base")]


def test_a_run_without_compared_rows_is_no_judge(tiny_gpt2, tmp_path):
    card = card_of(make_trainer(tiny_gpt2, make_rows(4), tmp_path / "out", negative_loss="none"))
    assert "trl-ulma score" not in card
    assert "implicit reward" not in card


def snippet_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("max_new_tokens=128", "max_new_tokens=3")


def prompt_of(code: str, tmp_path, monkeypatch, capsys) -> str:
    """What the snippet gives the model to read, when it is run."""
    seen = {}
    monkeypatch.chdir(tmp_path)
    exec(code, seen)
    assert capsys.readouterr().out.strip()
    return seen["tokenizer"].decode(seen["prompt"]["input_ids"][0])


@pytest.mark.parametrize(
    ("settings", "said", "prompt"),
    [
        (
            {"chat": "false"},
            "trained on plain text: a prompt is followed by its answer, without a chat template",
            "How do I boil an egg?",
        ),
        (
            {"chat": "true"},
            "trained on conversations, rendered by the tokenizer's chat template.\n",
            "<|user|>How do I boil an egg?<|end|><|assistant|>",
        ),
        (
            {"chat": "true", "system_message": 'Say "please".'},
            'were given this one: “Say "please".”',
            '<|system|>Say "please".<|end|><|user|>How do I boil an egg?<|end|><|assistant|>',
        ),
    ],
)
def test_the_snippet_prompts_the_model_as_it_was_trained(
    settings, said, prompt, tiny_llama, tmp_path, monkeypatch, capsys
):
    trainer = make_trainer(tiny_llama, make_rows(4), tmp_path / "tuned", max_steps=1, **settings)
    trainer.train()
    trainer.save_model()
    card = card_of(trainer)
    assert said in card
    capsys.readouterr()
    assert prompt_of(snippet_of(card), tmp_path, monkeypatch, capsys) == prompt


def test_the_snippet_ends_answers_with_the_turn_also_if_the_eos_token_is_another(tiny_llama, tmp_path):
    # As of base models with a chat template, whose EOS token ends documents
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for eos, said in (("<|pad|>", f", eos_token_id={sorted([tokenizer.pad_token_id, end])})"), ("<|end|>", "0.7)\n")):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        tokenizer.eos_token, model.generation_config.eos_token_id = eos, tokenizer.convert_tokens_to_ids(eos)
        settings = {"processing_class": tokenizer, "chat": "true"}
        trainer = make_trainer(model, make_rows(2), tmp_path / eos.strip("<|>"), max_steps=1, **settings)
        assert said in snippet_of(card_of(trainer))


def test_messages_are_a_chat_without_being_asked(tiny_llama, tmp_path):
    asked = [[{"role": "user", "content": "Is it red?"}]] * 2
    said = [[{"role": "assistant", "content": text}] for text in ("Yes.", "No.")]
    trainer = make_trainer(tiny_llama, make_rows(2, prompt=asked, completion=said), tmp_path / "out")
    assert trained_on_chat(trainer._plan)
    assert "The model was trained on conversations" in card_of(trainer)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "The reference is the model as it was before training, `{model}`."),
        ({"precompute_ref_log_probs": True}, "`{model}`. It was asked once, before training."),
        ({"sync_ref_model": True, "ref_model_sync_steps": 7}, "It was moved towards the policy every 7 steps."),
        ({"peft_config": LoraConfig(task_type="CAUSAL_LM")}, "The reference is the base model without the adapter"),
        ({"ref_model": True}, "The reference is a model of its own, `{model}`."),
        ({"negative_loss": "none"}, "No row was compared with a reference."),
    ],
)
def test_the_card_says_what_the_reference_was(settings, said, tiny_gpt2, tmp_path):
    if "ref_model" in settings:
        settings = {"ref_model": AutoModelForCausalLM.from_pretrained(tiny_gpt2)}
    card = card_of(make_trainer(tiny_gpt2, make_rows(4), tmp_path / "out", **settings))
    assert said.format(model=tiny_gpt2) in card


def test_a_fitted_transform_is_in_the_settings_with_its_numbers(tiny_gpt2, tmp_path):
    rows = make_rows(4, label=[1.0, 2.0, 4.0, 5.0])
    settings = {"label_type": "continuous", "label_transform": "min_max", "sft_threshold": 0.5}
    card = card_of(make_trainer(tiny_gpt2, rows, tmp_path / "out", **settings))
    assert "| `label_transform` | min_max:1,5 |" in card
    assert "4 → +0.75" in card


def test_results_have_intervals_from_the_rows_of_the_last_evaluation(tiny_gpt2, tmp_path):
    rows = make_rows(40)
    trainer = make_trainer(tiny_gpt2, rows, tmp_path / "out", eval_dataset=rows, max_steps=1)
    assert "interval" not in card_of(trainer)
    trainer.train()
    assert "interval" not in card_of(trainer)  # of training steps
    area = trainer.evaluate()["eval_rewards/auc"]
    card = card_of(trainer)
    assert "Intervals are 95% intervals from a bootstrap over prompts." in card
    assert "| figure | value | 95% interval |\n|---|---|---|\n| `eval_loss` | " in card
    low, high = map(float, re.search(r"`eval_rewards/auc` \| \S+ \| (\S+) to (\S+) \|", card).groups())
    assert 0 <= low < area < high <= 1
    # Wider, as sampling says, with a quarter of the prompts
    few = make_rows(10)
    trainer.evaluate(few)
    assert "interval" not in card_of(trainer)  # those rows are not the trainer's evaluation set


def test_intervals_are_of_whole_prompts():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 200).astype(float)
    evaluated = np.stack([label + rng.normal(size=200), label, np.zeros(200)], axis=1)

    def width(rows, group) -> float:
        low, high = map(float, bootstrap_intervals(rows, group)["rewards/auc"].split(" to "))
        return high - low

    single = width(evaluated, np.arange(200))
    repeated = np.repeat(evaluated, 4, axis=0)
    assert width(repeated, np.repeat(np.arange(200), 4)) == pytest.approx(single, rel=0.15)
    assert width(repeated, np.arange(800)) == pytest.approx(single / 2, rel=0.15)
    assert bootstrap_intervals(evaluated[label == 1], np.arange(int(label.sum()))) == {}
    assert bootstrap_intervals(evaluated[:1], np.zeros(1)) == {}


def test_intervals_are_those_of_the_evaluation_report():
    rng = np.random.default_rng(1)
    label = rng.integers(1, 6, 60).astype(float)
    reward, prompt = label + rng.normal(size=60), rng.integers(0, 20, 60)
    card = bootstrap_intervals(np.stack([reward, label, np.ones(60)], axis=1), prompt)
    report = continuous_figures(reward, label, prompt)
    assert card == {
        f"rewards/{name}": f"{report[name].low:.3g} to {report[name].high:.3g}" for name in ("pearson", "spearman")
    }
    rows = Dataset.from_list([{"prompt": each, "completion": " x", "label": 1} for each in "bab"])
    assert HeldOut.of(rows, "test", LabelRules()).prompt.tolist() == [0, 1, 0]  # as the card numbers them


def test_a_card_counts_one_row_as_one(tiny_gpt2, tmp_path):
    rows = make_rows(1, label=[1.0])
    assert "\n1 row of one answer each.\n" in card_of(make_trainer(tiny_gpt2, rows, tmp_path / "out"))
