"""Settings, overrides and formats that would change a training without a word."""

import types

import pytest
import torch
from peft import LoraConfig
from torch.utils.data import WeightedRandomSampler
from transformers import AutoModelForCausalLM, TrainerCallback
from world import make_rows, make_trainer

from trl_ulma import PointwiseDPOConfig, PointwiseDPOTrainer
from trl_ulma.likelihood import number_formats, precomputed
from trl_ulma.likelihood.layouts import why_not_packed
from trl_ulma.likelihood.precomputed import input_hashes
from trl_ulma.rows.collator import DataCollatorForPointwisePreference
from trl_ulma.rows.filler import FilledSampler
from trl_ulma.scripts.options import OptionParser

ROWS = 8
SAVES = {"save_strategy": "steps", "save_steps": 1}
WORDS = ["--model", "m", "--dataset", "d", "--output", "o", "--bf16", "false"]
LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], r=2)


def parser() -> OptionParser:
    return OptionParser(PointwiseDPOConfig, "trl-ulma pointwise-dpo", "")


class OldStyle(PointwiseDPOTrainer):
    """As many scripts override it: without the number of items."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, inputs, return_outputs)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_an_overridden_loss_does_not_depend_on_the_accumulation(tiny_gpt2, tmp_path, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": ROWS // accumulation}
    args = PointwiseDPOConfig(str(tmp_path), bf16=False, report_to="none", logging_steps=1, max_steps=1, **settings)
    trainer = OldStyle(model=tiny_gpt2, args=args, train_dataset=make_rows(ROWS))
    trainer.train()
    (first, *_) = trainer.state.log_history
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize("is_scaled", [False, True])
def test_what_a_subclass_adds_to_the_loss_is_averaged_over_micro_batches(tiny_gpt2, tmp_path, is_scaled):
    class Adding(PointwiseDPOTrainer):
        loss_is_scaled_for_ga = is_scaled

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            count = self.args.gradient_accumulation_steps if is_scaled else 1
            return loss + 0.5 * model.get_input_embeddings().weight.square().mean() / count

    found = []
    for accumulation in (1, 4):
        settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": ROWS // accumulation}
        args = PointwiseDPOConfig(str(tmp_path), bf16=False, report_to="none", logging_steps=1, max_steps=1, **settings)
        trainer = Adding(model=tiny_gpt2, args=args, train_dataset=make_rows(ROWS))
        trainer.train()
        found.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[0][0] > 0.7


def test_weights_of_an_adapter_that_the_user_froze_stay_frozen(tiny_gpt2, tmp_path):
    trainer = make_trainer(tiny_gpt2, make_rows(ROWS), tmp_path, pointwise=True, peft_config=LORA, max_steps=2)
    frozen = {name: p for name, p in trainer.model.named_parameters() if "lora_A" in name}
    for p in frozen.values():
        p.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in frozen.items()}
    trained = [p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_B" in name]
    trainer.evaluate(make_rows(4))
    trainer.train()
    assert all(not p.requires_grad for p in frozen.values())
    assert all(torch.equal(p, before[name]) for name, p in frozen.items())
    now = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert not all(torch.equal(a, b) for a, b in zip(now, trained, strict=True))


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("eval_loss/preference", False),
        ("loss/sft", False),
        ("eval_rewards/mse", False),
        ("eval_kl", False),
        ("eval_other_rewards/mse", False),
        ("eval_rewards/auc", True),
        ("eval_rewards/chosen", True),
        ("eval_loss", False),
    ],
)
def test_which_value_of_a_metric_is_best(tmp_path, metric, greater):
    settings = {"metric_for_best_model": metric, "bf16": False}
    assert PointwiseDPOConfig(str(tmp_path), **settings).greater_is_better == greater
    assert PointwiseDPOConfig(str(tmp_path), greater_is_better=not greater, **settings).greater_is_better != greater


DROPPED = [("weight", "weight"), ("log_z", "log_z"), ("label_type", "continuous"), (None, "row"), (None, "group")]


@pytest.mark.parametrize(("column", "key"), DROPPED)
def test_a_collator_that_drops_what_the_loss_reads_is_refused(tiny_gpt2, tmp_path, column, key):
    class Dropping(DataCollatorForPointwisePreference):
        def __call__(self, examples):
            return {name: value for name, value in super().__call__(examples).items() if name != key}

    rows, settings = make_rows(ROWS), {}
    if column is not None:
        rows = rows.add_column(column, [{"label_type": "continuous"}.get(column, 0.5)] * ROWS)
    if key == "group":
        rows, settings = make_rows(ROWS, prompt=["Hi"] * ROWS), {"log_z": "group"}
    with pytest.raises(ValueError, match=f"data_collator is Dropping, whose batches lack {key}"):
        make_trainer(tiny_gpt2, rows, tmp_path, pointwise=True, data_collator=Dropping(pad_token_id=0), **settings)


@pytest.mark.parametrize("rows", [make_rows(ROWS), make_rows(ROWS, completion=[" Yes."] * 7 + [" Of course, Sir."])])
def test_a_collator_that_pads_on_the_left_is_refused(tiny_gpt2, tmp_path, rows):
    class Left(DataCollatorForPointwisePreference):
        def __call__(self, examples):
            batch = super().__call__(examples)
            shifts = (batch["attention_mask"] == 0).sum(1).tolist()
            for name in ("input_ids", "attention_mask", "completion_mask"):
                rolled = [torch.roll(row, by) for row, by in zip(batch[name], shifts, strict=True)]
                batch[name] = torch.stack(rolled)
            return batch

    with pytest.raises(ValueError, match=r"data_collator is Left, .*padding before tokens\. Pad on the right"):
        make_trainer(tiny_gpt2, rows, tmp_path, data_collator=Left(pad_token_id=0))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora_r", "4"], "--lora_r has no effect without --use_peft: all weights are trained"),
        (["--use_dora"], "--use_dora has no effect without --use_peft"),
        (["--bnb_4bit_quant_type", "fp4"], "--bnb_4bit_quant_type has no effect without --load_in_4bit"),
        (["--load_in_8bit"], "--load_in_8bit needs --use_peft: quantized weights cannot be trained, but an adapter"),
    ],
)
def test_options_without_their_switch_are_refused(capsys, words, message):
    with pytest.raises(SystemExit):
        parser().parse_settings([*WORDS, *words])
    assert message in " ".join(capsys.readouterr().err.split())


def test_one_target_module_is_a_name_and_not_a_pattern():
    words = [*WORDS, "--use_peft"]
    _, _, model_args, _ = parser().parse_settings([*words, "--lora_target_modules", "q_proj"])
    assert model_args.lora_target_modules == ["q_proj"]
    _, _, model_args, _ = parser().parse_settings([*words, "--lora_target_modules", ".*_proj"])
    assert model_args.lora_target_modules == ".*_proj"


def test_log_probabilities_that_trl_stored_are_not_passed_over_in_silence(tiny_gpt2, tmp_path, caplog):
    rows = make_rows(ROWS).add_column("ref_chosen_logps", [-1.0] * ROWS)
    make_trainer(tiny_gpt2, rows, tmp_path, pointwise=True)
    assert "has ref_chosen_logps, which are not read" in caplog.text


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
def test_log_probabilities_from_elsewhere_are_not_read_and_this_is_told(
    tiny_gpt2, tmp_path, caplog, prepared, precompute
):
    rows = make_rows(ROWS)
    if prepared:
        rows = make_trainer(tiny_gpt2, rows, tmp_path / "first", pointwise=True).train_dataset
    assert "ref_logps" not in caplog.text
    rows = rows.add_column("ref_logps", [-3.0] * ROWS)
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, pointwise=True, precompute_ref_log_probs=precompute, max_steps=1)
    assert "The train dataset has ref_logps, which are not read" in caplog.text
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_precomputed_log_probabilities_that_were_edited_are_counted(tiny_gpt2, tmp_path, caplog):
    rows = make_rows(ROWS)
    settings = {"pointwise": True, "precompute_ref_log_probs": True, "eval_dataset": rows, "max_steps": 1}
    trainer = make_trainer(tiny_gpt2, rows, tmp_path, **settings)
    trainer.evaluate(trainer.eval_dataset.select(range(4)))
    assert "ref_logps" not in caplog.text
    edited = trainer.train_dataset.map(lambda row: {"ref_logps": -3.0} if row["row"] in (2, 5) else {})
    trainer.train_dataset = edited
    trainer.train()
    assert f"In 2 of {ROWS} rows, such as row 2, the column ref_logps differs" in caplog.text
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_rows_with_known_log_probabilities_are_hashed_once(tiny_gpt2, tmp_path, monkeypatch):
    settings = {"pointwise": True, "precompute_ref_log_probs": True, "eval_dataset": make_rows(ROWS + 1)}
    trainer = make_trainer(tiny_gpt2, make_rows(ROWS), tmp_path, **settings)
    hashed = []
    monkeypatch.setattr(precomputed, "input_hashes", lambda rows: hashed.append(len(rows)) or input_hashes(rows))
    trainer.evaluate(trainer.eval_dataset.select(range(4)))
    assert sorted(hashed) == [4, ROWS, ROWS + 1]


class WithRefLogps(DataCollatorForPointwisePreference):
    """Puts log-probabilities of its own into the batches."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        batch["ref_logps"] = torch.full_like(batch["label"], -3.0)
        return batch


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("precompute", [False, True])
def test_a_collator_that_adds_log_probabilities_of_a_reference_is_refused(tiny_gpt2, tmp_path, precompute, given):
    settings = {"pointwise": True, "precompute_ref_log_probs": precompute, "max_steps": 1}
    if given:
        settings["ref_model"] = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    trainer = make_trainer(tiny_gpt2, make_rows(ROWS), tmp_path, data_collator=WithRefLogps(pad_token_id=0), **settings)
    wanted = "data_collator changes ref_logps" if precompute else "The batch has ref_logps"
    with pytest.raises(ValueError, match=wanted):
        trainer.train()


def test_a_transform_cannot_bring_along_the_log_probabilities_of_another_reference(tiny_gpt2, tmp_path):
    settings = {"pointwise": True, "precompute_ref_log_probs": True}
    rows = make_trainer(tiny_gpt2, make_rows(ROWS), tmp_path, **settings).train_dataset
    with pytest.raises(ValueError, match="The train dataset has a transform and a column ref_logps"):
        make_trainer(tiny_gpt2, rows.with_transform(lambda batch: batch), tmp_path, **settings)


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
def test_a_transform_that_is_set_on_rows_that_were_checked_is_refused(tiny_gpt2, tmp_path, which):
    trainer = make_trainer(tiny_gpt2, make_rows(ROWS), tmp_path, eval_dataset=make_rows(ROWS), max_steps=1)
    getattr(trainer, which).set_transform(lambda batch: batch | {"label": [1 - label for label in batch["label"]]})
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=r"A transform was set on rows .* Set it on the raw rows"):
            run()


class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("stopped")


def test_noise_of_embeddings_ends_with_a_training_that_fails(tiny_gpt2, tmp_path):
    """Otherwise the next training of this model has it twice, and one without `neftune_noise_alpha` has it, too."""
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    settings = {"neftune_noise_alpha": 5.0, "max_steps": 2, "callbacks": [Fails()]}
    trainer = make_trainer(model, make_rows(ROWS), tmp_path, pointwise=True, **settings)
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.train()
    assert not model.get_input_embeddings()._forward_hooks


def test_attention_that_depends_on_the_place_in_a_packed_sequence_is_not_packed():
    text = types.SimpleNamespace(attn_temperature_tuning=True)
    reason = why_not_packed(types.SimpleNamespace(get_text_config=lambda: text))
    assert reason is not None
    assert "attn_temperature_tuning" in reason
    text.attn_temperature_tuning = False
    assert why_not_packed(types.SimpleNamespace(get_text_config=lambda: text)) is None


def test_number_formats_in_which_little_is_learned_are_told(tiny_gpt2, tmp_path, caplog):
    half = AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype=torch.bfloat16)
    make_trainer(half, make_rows(ROWS), tmp_path, pointwise=True, learning_rate=1e-7)
    assert "too large to be moved by the learning rate of 1e-07" in caplog.text
    caplog.clear()
    make_trainer(tiny_gpt2, make_rows(ROWS), tmp_path, pointwise=True, learning_rate=1e-7, ref_model=half)
    assert "The model computes in float32 and its reference in bfloat16" in caplog.text
    caplog.clear()
    make_trainer(tiny_gpt2, make_rows(ROWS), tmp_path, pointwise=True, learning_rate=1e-7)
    assert not [record for record in caplog.records if "dtype" in record.message]


def test_an_optimizer_step_moves_what_the_note_says():
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64).bfloat16()
    before = layer.weight.detach().clone()
    args = types.SimpleNamespace(learning_rate=1e-4)
    (said,) = number_formats.notes(layer, None, args, keeps_float32=False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-4, weight_decay=0)
    layer(torch.randn(8, 64).bfloat16()).sum().backward()
    optimizer.step()
    still = (layer.weight == before).float().mean().item()
    share = int(said.split("%")[0].split()[-1]) / 100
    assert 0.5 < share <= still < 0.9  # it counts what certainly stays: between 2⁻⁹ and 2⁻⁸ of a weight, it depends
    args.learning_rate = 1.0
    assert number_formats.notes(layer, None, args, keeps_float32=False) == []


@pytest.mark.parametrize("setting", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_does_not_convert_the_model(tiny_gpt2, tmp_path, setting):
    with pytest.raises(ValueError, match="convert the model itself before an evaluation"):
        PointwiseDPOConfig(str(tmp_path), bf16=False, **{setting: True})
    trainer = make_trainer(tiny_gpt2, make_rows(ROWS), tmp_path, pointwise=True)
    setattr(trainer.args, setting, True)
    with pytest.raises(ValueError, match=f"{setting} from False to True"):
        trainer.evaluate(make_rows(ROWS))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({}, {"binary_loss": "squared_error"}),
        ({}, {"lr_scheduler_type": "constant"}),
        ({}, {"max_grad_norm": 0.1}),
        ({}, {"max_steps": 3}),
        ({}, {"lr_scheduler_kwargs": {"lr_end": 1e-8}, "lr_scheduler_type": "polynomial"}),
        ({"weight": [1.0] * ROWS}, {"weight": [0.5] * ROWS}),
    ],
)
def test_a_resume_with_another_loss_is_told(tiny_gpt2, tmp_path, caplog, first, then):
    def trainer(changes):
        rows = make_rows(ROWS)
        changes = dict(changes)
        if "weight" in changes:
            rows = rows.add_column("weight", changes.pop("weight"))
        return make_trainer(tiny_gpt2, rows, tmp_path, pointwise=True, **{"max_steps": 2} | SAVES | changes)

    trainer(first).train()
    trainer(first).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "was written with other settings" not in caplog.text
    trainer(then).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "was written with other settings" in caplog.text
    assert next(iter(then)) in caplog.text


def test_a_constant_rate_may_go_on_for_longer(tiny_gpt2, tmp_path, caplog):
    settings = {"lr_scheduler_type": "constant"} | SAVES
    make_trainer(tiny_gpt2, make_rows(ROWS), tmp_path, max_steps=1, **settings).train()
    longer = make_trainer(tiny_gpt2, make_rows(ROWS), tmp_path, max_steps=2, **settings)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 2
    assert "was written with other settings" not in caplog.text


@pytest.mark.parametrize(("first", "then"), [("adamw_torch", "sgd"), ("sgd", "adamw_torch"), ("adafactor", "rmsprop")])
def test_the_state_of_another_optimizer_is_refused(tiny_gpt2, tmp_path, first, then):
    def trainer(optim):
        return make_trainer(tiny_gpt2, make_rows(ROWS), tmp_path, pointwise=True, max_steps=2, optim=optim, **SAVES)

    trainer(first).train()
    resumed = trainer(then)
    with pytest.raises(ValueError, match=f"has the state of another optimizer than optim='{then}': it lacks"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("settings", [{"max_steps": 3}, {"num_train_epochs": 1}], ids=str)
def test_logs_at_the_end_of_epochs_have_rewards_also_if_the_last_epoch_ends_early(tiny_gpt2, tmp_path, settings):
    settings = {"logging_strategy": "epoch", "per_device_train_batch_size": 4} | settings
    trainer = make_trainer(tiny_gpt2, make_rows(16), tmp_path, **settings)
    trainer.train()
    (logged,) = [log for log in trainer.state.log_history if "loss" in log]
    assert {"rewards/chosen", "rewards/rejected", "kl", "log_z"} <= set(logged)


@pytest.mark.parametrize("drawn", [5, 8, 11])
def test_a_sampler_of_another_length_than_the_table_is_filled_up_with_fillers(drawn):
    """Such as that of a subclass, with several processes."""
    sampler = FilledSampler(WeightedRandomSampler([1.0] * 8, drawn), rows=8, size=4, seed=0)
    order = list(sampler)
    assert len(order) == len(sampler) == drawn + -drawn % 4
    assert [index >= 8 for index in order] == [False] * drawn + [True] * (-drawn % 4)
