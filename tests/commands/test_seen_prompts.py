"""Evaluation and scores report which rows a model was trained on, and claim nothing that is not known."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig
from world import make_rows, make_trainer

from trl_ulma.data import seen_prompts
from trl_ulma.data.seen_prompts import FILE, NEW, SEEN, UNKNOWN
from trl_ulma.scripts.cli import main


def test_hashes_tell_prompts_apart_and_forms_of_one_prompt_not(tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    rows = Dataset.from_dict({"prompt": ["Hi", " Who?\n", "Not used"], "completion": ["a", "b", "c"]})
    seen_prompts.save(seen_prompts.training_hashes(rows, [1, 0, 0]), tmp_path)
    file = str(tmp_path / FILE)
    others = ["Not used", "hi", [*chat, {"role": "assistant", "content": "Yes?"}]]
    assert seen_prompts.seen(["Hi", "Who?", chat, *others], file).tolist() == [SEEN] * 3 + [NEW] * 3
    assert seen_prompts.seen(["Hi"], None).tolist() == [UNKNOWN]
    seen_prompts.save(None, tmp_path)
    assert not Path(file).exists()
    Path(file).write_text("something else")
    with pytest.raises(ValueError, match="does not contain the hashes of training prompts"):
        seen_prompts.seen(["Hi"], file)


def test_pairs_without_prompts_are_known_by_the_prompts_in_them(tmp_path):
    start = "\n\nHuman: Hi\n\nAssistant:"
    pairs = Dataset.from_dict({"chosen": [f"{start} Hello!"], "rejected": [f"{start} Go."]})
    seen_prompts.save(seen_prompts.training_hashes(pairs, [0, 0]), tmp_path)
    assert seen_prompts.seen([start, "Hi", "Ho"], str(tmp_path / FILE)).tolist() == [SEEN, SEEN, NEW]


def test_of_very_many_prompts_some_are_unknown_and_none_is_called_new(tmp_path, monkeypatch):
    monkeypatch.setattr(seen_prompts, "MOST", 100)
    prompts = [f"prompt {i}" for i in range(1000)]
    rows = Dataset.from_dict({"prompt": prompts, "completion": prompts})
    seen_prompts.save(seen_prompts.training_hashes(rows, range(1000)), tmp_path)
    found = seen_prompts.seen(prompts, str(tmp_path / FILE))
    assert [(found == kind).sum() for kind in (SEEN, NEW, UNKNOWN)] == [100, 0, 900]
    others = seen_prompts.seen([f"other {i}" for i in range(1000)], str(tmp_path / FILE))
    assert (others == SEEN).sum() == 0
    assert 50 < (others == NEW).sum() < 200
    assert seen_prompts.in_words(found, "out").endswith(": 100 of 1,000. Held out: 0. Not known: 900.")
    assert seen_prompts.in_words(np.full(3, UNKNOWN), "out") is None


def test_evaluate_and_score_say_which_rows_were_trained_on(tiny_gpt2, tmp_path, capsys, monkeypatch):
    rows = make_rows(15)
    adapter = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["c_attn"])
    trained = rows.select(range(10))
    trainer = make_trainer(tiny_gpt2, trained, tmp_path / "out", peft_config=adapter, max_steps=1)
    trainer.save_model(str(tmp_path / "untrained"))
    assert not (tmp_path / "untrained" / FILE).exists()
    trainer.train()
    trainer.save_model()
    count = sum(prompt in set(trained["prompt"][:]) for prompt in rows["prompt"][:])
    assert 0 < count < 15
    rows.to_json(tmp_path / "rows.jsonl")
    rows.filter(lambda row: row["prompt"] not in trained["prompt"][:]).to_json(tmp_path / "new.jsonl")

    model = ["--model", str(tmp_path / "out"), "--dataset"]
    said = f"Rows whose prompt was in the training data of the model {tmp_path / 'out'}: {count} of 15."
    score = ["score", *model, str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "scored.jsonl")]
    hashed, hash_of = [], seen_prompts._hash
    with monkeypatch.context() as patch:
        patch.setattr(seen_prompts, "_hash", lambda prompt: hashed.append(prompt) or hash_of(prompt))
        assert main(score) == 0
    assert f"{said} Held out: {15 - count}." in capsys.readouterr().out.splitlines()
    assert len(hashed) == 15  # each prompt once
    seen = set(trained["prompt"][:])
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [row["held_out"] for row in scored] == [row["prompt"] not in seen for row in scored]

    argv = ["evaluate", "--split", "train", "--examples", "0", "--no-base", "--output", str(tmp_path / "report")]
    for file, trained_on in (("rows.jsonl", count), ("new.jsonl", 0)):
        assert main([*argv, *model, str(tmp_path / file)]) == 0
        facts = json.loads((tmp_path / "report" / "report.json").read_text())
        assert facts["models"][0]["trained_on"] == trained_on
        # Only rows that were trained on need a reader's attention
        (note,) = facts["notes" if trained_on else "how_read"]
        assert facts["how_read" if trained_on else "notes"] == []
        total = len(Path(tmp_path / file).read_text().splitlines())
        assert note.startswith(
            f"Rows whose prompt was in the training data of the model out: {trained_on} of {total}. Held out:"
        )
        assert ("do not show what it does on new ones" in note) == (trained_on > 0)


def test_an_upload_does_not_hold_the_hashes(tiny_gpt2, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_gpt2, make_rows(6), tmp_path / "out", max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    assert (tmp_path / "out" / "checkpoint-1" / FILE).exists()
    trainer.args.push_to_hub = True
    trainer.save_model(str(tmp_path / "out" / "checkpoint-1"), _internal_call=True)
    assert not (tmp_path / "out" / "checkpoint-1" / FILE).exists()
    assert FILE.startswith("_")  # which Trainer.push_to_hub leaves out
