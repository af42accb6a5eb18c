"""Rows with images: what is computed of them, held to the oracle, and what is refused."""

import json

import numpy as np
import oracle
import pytest
import torch
import transformers
from datasets import Dataset, Image, List
from packaging.version import Version
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlm import image_rows, make_qwen, picture, with_images
from world import first_step_loss, make_rows, make_trainer, weights

from trl_ulma.labels import LabelRules
from trl_ulma.log_z import mismatched
from trl_ulma.rows.images import DataCollatorForVisionPointwisePreference, as_images, with_placeholders
from trl_ulma.rows.preparation import Preparation

OLD = Version(transformers.__version__) < Version("5.15")


@pytest.fixture(scope="module")
def tiny_qwen(tmp_path_factory):
    """(folder with a tiny Qwen2-VL, its processor)."""
    if OLD:
        pytest.skip(f"Qwen2-VL of transformers {transformers.__version__} fails on texts after images")
    folder = str(tmp_path_factory.mktemp("checkpoints") / "tiny-qwen2-vl")
    return folder, make_qwen(folder)


@pytest.fixture(params=["llava", "qwen"])
def vlm(request, tiny_llava):
    """(folder, processor, what stands for an image in its text) of either model."""
    if request.param == "llava":
        return tiny_llava, AutoProcessor.from_pretrained(tiny_llava), "<image>"
    return *request.getfixturevalue("tiny_qwen"), "<|vision_start|><|image_pad|><|vision_end|>"


def load(folder: str, shift: float = 0.0) -> torch.nn.Module:
    """The model, with other weights where `shift` is not 0."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(shift * torch.randn_like(parameter))
    return model


def plain_logps(model, processor, place, rows) -> np.ndarray:
    """log π(completion|prompt, images) of each row: one at a time, its text written by hand, full logits in float64."""
    model = model.double().eval()
    logps = []
    for row in rows:
        prompt = f"<|user|>{place * len(row['images'])}{row['prompt'][0]['content']}<|end|><|assistant|>"
        answer = processor.tokenizer(row["completion"][0]["content"] + "<|end|>")["input_ids"]
        made = dict(processor(text=[prompt], images=[row["images"]] if row["images"] else None, return_tensors="pt"))
        ids = torch.cat([made.pop("input_ids"), torch.tensor([answer])], 1)
        if "mm_token_type_ids" in made:
            made["mm_token_type_ids"] = torch.nn.functional.pad(made["mm_token_type_ids"], (0, len(answer)))
        made["attention_mask"] = torch.ones_like(ids)
        if "pixel_values" in made:
            made["pixel_values"] = made["pixel_values"].double()
        with torch.no_grad():
            logits = model(input_ids=ids, **made).logits[0].double()
        scored = logits[-len(answer) - 1 : -1].log_softmax(-1)
        logps.append(scored.gather(1, torch.tensor(answer)[:, None]).sum().item())
    return np.array(logps)


def kinds(n: int) -> dict[str, list]:
    """Demonstrations, likes, soft labels and dislikes in turn, with weights."""
    label = [(1.0, 1.0, 0.3, 0.0)[i % 4] for i in range(n)]
    return {"label": label, "sft_mask": [i % 4 == 0 for i in range(n)], "weight": [0.5 + i % 3 for i in range(n)]}


def expected(rows, policy, reference) -> float:
    losses, gradients = oracle.grid(policy, reference, rows["label"][:], rows["sft_mask"][:], beta=0.5)
    return oracle.step_loss(losses, gradients, weight=rows["weight"][:])[0]


def test_a_step_has_the_oracles_loss_and_gradient(vlm, tmp_path):
    folder, processor, place = vlm
    rows = image_rows(7, **kinds(7))
    reference = plain_logps(load(folder), processor, place, rows)
    settings = {"beta": 0.5, "per_device_train_batch_size": 3, "processing_class": processor}
    trainer = make_trainer(load(folder, 0.02), rows, tmp_path, ref_model=load(folder), **settings)
    loss = first_step_loss(trainer)
    loss.backward()
    wanted = expected(rows, plain_logps(load(folder, 0.02), processor, place, rows), reference)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)

    # A small step along the gradient must change the oracle's loss by its squared length
    gradient = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in trainer.model.parameters()]
    seen = [name for name, p in trainer.model.named_parameters() if "vision" in name or "visual" in name]
    assert seen
    assert any(trainer.model.get_parameter(name).grad.abs().max() > 0 for name in seen[:2]), "images are not learned of"
    squared = sum(g.double().pow(2).sum().item() for g in gradient)
    shift, ends = 2e-5 / squared**0.5, []  # parts of these models compute in fp32
    for sign in (1, -1):
        moved = load(folder).double()
        with torch.no_grad():
            for p, start, g in zip(moved.parameters(), trainer.model.parameters(), gradient, strict=True):
                p.copy_(start.double() + sign * shift * g.double())
        ends.append(expected(rows, plain_logps(moved, processor, place, rows), reference))
    assert (ends[0] - ends[1]) / (2 * shift) == pytest.approx(squared, rel=1e-3)


def made(folder, processor, rows, tmp_path, **kwargs):
    """A trainer with plain SGD; all rows in a step unless told otherwise."""
    settings = {"optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 0.0, "num_train_epochs": 2, "beta": 0.5}
    settings |= {"per_device_train_batch_size": 8, "label_report": False, "logging_steps": 100}
    return make_trainer(load(folder), rows, tmp_path, processing_class=processor, **settings | kwargs)


def trained(*args, **kwargs):
    """(such a trainer after its epochs, its weights)."""
    trainer = made(*args, **kwargs)
    trainer.train()
    return trainer, weights(trainer.model)


def test_how_rows_fall_into_micro_batches_changes_nothing(tiny_qwen, tmp_path):
    rows = image_rows(6, **kinds(6))
    before = weights(load(tiny_qwen[0]))
    ends = []
    for size, steps in ((6, 1), (2, 3), (1, 6)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        ends.append(trained(*tiny_qwen, rows, tmp_path, **settings)[1])
    assert (ends[0] - before).abs().max() > 1e-4
    assert torch.allclose(ends[0], ends[1], atol=2e-6)
    assert torch.allclose(ends[0], ends[2], atol=2e-6)


def test_the_reference_is_the_model_before_training_and_is_asked_only_where_needed(vlm, tmp_path):
    folder, processor, place = vlm
    rows = image_rows(8, **kinds(8))
    trainer, after = trained(folder, processor, rows, tmp_path)
    logged, same = trained(folder, processor, rows, tmp_path, logging_steps=1)
    assert torch.equal(after, same), "that a step is logged changes what is learned"
    assert logged.state.log_history[0]["rewards/margins"] == 0
    policy, reference = (plain_logps(model, processor, place, rows) for model in (trainer.model, load(folder)))
    assert np.abs(policy - reference).min() > 1e-4
    trainer.model.float()
    assert trainer.score(rows)["reward"][:] == pytest.approx(0.5 * (policy - reference), rel=1e-3, abs=1e-5)


def test_demonstrations_ask_the_reference_nothing(tiny_llava, tmp_path, monkeypatch):
    rows = image_rows(4, counts=(1,), label=[1.0] * 4, sft_mask=[True, True, True, False])
    trainer = made(tiny_llava, None, rows, tmp_path, num_train_epochs=1, per_device_train_batch_size=1)
    asked = []
    ask = trainer._reference.logps
    monkeypatch.setattr(
        trainer._reference, "logps", lambda p, batch: asked.append(len(batch["input_ids"])) or ask(p, batch)
    )
    trainer.train()
    # The startup checks are of two rows, and of four that have no images
    assert [rows for rows in asked if rows == 1] == [1]


def test_a_precomputed_reference_is_the_live_one(vlm, tmp_path):
    folder, processor, _ = vlm
    rows = image_rows(5, **kinds(5))
    live = trained(folder, processor, rows, tmp_path)[1]
    trainer, before = trained(folder, processor, rows, tmp_path, precompute_ref_log_probs=True, eval_dataset=rows)
    assert trainer.ref_model is None
    assert torch.allclose(live, before, atol=1e-7)
    assert np.isfinite(trainer.evaluate()["eval_rewards/chosen"])


def test_an_adapter_is_compared_with_its_base(tiny_qwen, tmp_path):
    rows = image_rows(4, **kinds(4))
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer, after = trained(*tiny_qwen, rows, tmp_path, peft_config=lora, learning_rate=0.05, logging_steps=1)
    assert trainer.ref_model is None
    assert trainer.state.log_history[0]["kl"] == 0
    assert after.abs().sum() > 0
    assert abs(trainer.state.log_history[1]["kl"]) > 1e-4


def test_another_image_makes_another_log_probability(vlm, tmp_path):
    folder, processor, _ = vlm
    rows = image_rows(3)
    trainer, _ = trained(folder, processor, rows, tmp_path, max_steps=1, negative_loss="none")
    changed = [[picture(99, (16, 24))], rows[1]["images"], []]
    columns = {name: rows[name][:] for name in ("prompt", "completion", "label")}
    other = trainer.predict(with_images(columns | {"images": changed})).predictions
    found = trainer.predict(rows).predictions
    assert abs(other[0] - found[0]) > 1e-3
    assert other[1:] == pytest.approx(found[1:], abs=1e-5)


def test_pairs_with_images_are_two_rows_each(tiny_llava, tmp_path):
    rows = image_rows(3)
    columns = {"prompt": rows["prompt"][:], "chosen": [], "rejected": [], "images": rows["images"][:]}
    columns["chosen"] = [[{"role": "assistant", "content": "Paris."}]] * 3
    columns["rejected"] = [[{"role": "assistant", "content": "No. Go away."}]] * 3
    answers = [answer for both in zip(columns["chosen"], columns["rejected"], strict=True) for answer in both]
    double = {"prompt": columns["prompt"], "images": columns["images"]}
    double = {name: [value for value in values for _ in "ab"] for name, values in double.items()}
    apart = with_images({**double, "completion": answers, "label": [1.0, 0.0] * 3})
    ends = [trained(tiny_llava, None, data, tmp_path)[1] for data in (with_images(columns), apart)]
    assert torch.allclose(*ends, atol=1e-7)


def prepared(processor, rows, **kwargs):
    return Preparation(processor, LabelRules(), **kwargs)(rows, "train")


def collated(processor, rows, **kwargs):
    collator = DataCollatorForVisionPointwisePreference(processor.tokenizer.pad_token_id, processor=processor, **kwargs)
    return collator(list(rows))


def test_a_batch_has_what_its_images_make(vlm):
    _, processor, _ = vlm
    rows = prepared(processor, image_rows(6))
    batch = collated(processor, rows, pad_to_multiple_of=16)
    assert batch["input_ids"].size(1) % 16 == 0
    assert batch["attention_mask"].sum(1).tolist() == rows["length"][:], "the length that preparation told is another"
    images = batch["input_ids"] == processor.image_token_id
    assert not (images & batch["completion_mask"].bool()).any()
    assert (images.sum(1) > 0).tolist() == [True, True, False] * 2
    if "mm_token_type_ids" in batch:
        assert torch.equal(batch["mm_token_type_ids"], images.long())
        assert len(batch["image_grid_thw"]) == 6
    ends = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
    assert ends == rows["completion_ids"][:]
    text = collated(processor, rows.select([2, 5]))
    assert "pixel_values" not in text
    assert set(text) - {"mm_token_type_ids"} == {
        *("input_ids", "attention_mask", "completion_mask", "label", "sft_mask", "row", "image_key")
    }


def test_an_image_is_a_picture_a_path_or_bytes_in_either_column(tiny_llava, tmp_path):
    processor = AutoProcessor.from_pretrained(tiny_llava)
    path = str(tmp_path / "a.png")
    picture(3).save(path)
    with open(path, "rb") as file:
        content = file.read()
    columns = {"prompt": ["<image>What?"], "completion": [" The cat."], "label": [1.0]}
    forms = {
        "images": [[picture(3)], [path], [{"bytes": content, "path": None}], [np.asarray(picture(3))]],
        "image": [picture(3), path],
    }
    batches = []
    for column, values in forms.items():
        for value in values:
            rows = Dataset.from_dict(columns)
            kind = None if isinstance(value, str | list) and isinstance(value[0], str) else Image()
            if kind is not None and column == "images":
                kind, value = List(kind), [Image().encode_example(each) for each in value]
            elif kind is not None:
                value = Image().encode_example(value)
            rows = rows.add_column(column, [value], feature=kind)
            batches.append(collated(processor, prepared(processor, rows)))
    for batch in batches[1:]:
        assert torch.equal(batch["pixel_values"], batches[0]["pixel_values"])
        assert torch.equal(batch["input_ids"], batches[0]["input_ids"])
    assert processor.tokenizer.decode(batches[0]["input_ids"][0]) == "<image>" * 4 + "What? The cat.<|end|>"


def test_images_are_decoded_when_their_batch_is_made_and_once(tiny_llava, tmp_path, monkeypatch):
    rows = image_rows(6, counts=(1,))
    decoded = []
    decode = Image.decode_example
    monkeypatch.setattr(Image, "decode_example", lambda *args, **kwargs: decoded.append(1) or decode(*args, **kwargs))
    trainer = made(tiny_llava, None, rows, tmp_path, label_report=True)
    assert len(decoded) == 2, "only the rows that the processor is tried on are decoded beforehand"
    assert len(list(trainer.get_train_dataloader())) == 1
    assert len(decoded) == 2 + 6


def test_a_stream_gives_the_same_batches(vlm):
    _, processor, _ = vlm
    rows = image_rows(5)
    wanted = collated(processor, prepared(processor, rows))
    found = collated(processor, prepared(processor, rows.to_iterable_dataset()))
    assert set(wanted) == set(found)
    for name, value in wanted.items():
        assert torch.equal(value, found[name]), name


def test_rows_of_text_train_as_in_a_mixture(tiny_llava, tmp_path):
    rows = image_rows(4, counts=(0,))
    mixed = trained(tiny_llava, None, rows, tmp_path)[1]
    text, after = trained(tiny_llava, None, rows.remove_columns("images"), tmp_path)
    assert torch.allclose(mixed, after, atol=1e-7)
    assert len(text.predict(image_rows(3)).predictions) == 3, "images after training on text"
    plain, _ = trained(tiny_llava, None, make_rows(4), tmp_path)
    assert len(plain.predict(make_rows(2)).predictions) == 2


@pytest.mark.parametrize("log_z", ["learned", "learned_constant", "batch_kl", "prior", "running_mean"])
def test_every_log_z_trains_on_images(tiny_qwen, tmp_path, log_z):
    rows = image_rows(6, **kinds(6))
    trainer, _ = trained(*tiny_qwen, rows, tmp_path, log_z=log_z, logging_steps=1, num_train_epochs=3)
    assert all(np.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    if log_z != "batch_kl":
        assert trainer.state.log_history[2]["log_z"] != 0


def test_one_question_about_two_images_is_two_prompts(tiny_llava, tmp_path):
    columns = {
        "prompt": [[{"role": "user", "content": "What is this?"}]] * 3,
        "completion": [[{"role": "assistant", "content": "Paris."}]] * 3,
        "label": [1.0, 0.0, 0.0],
        "images": [[picture(1)], [picture(2)], [picture(1)]],
    }
    made(tiny_llava, None, with_images(dict(columns)), tmp_path, label_report=True)
    report = json.loads((tmp_path / "label_report.json").read_text())
    assert (report["rows"], report["prompts"]["count"]) == (3, 2)

    # Among the answers about its own image the first has the better label, the second is alone
    settings = {"label_type": "continuous", "label_transform": "prompt_quantile", "sft_threshold": 2.0}
    trainer = made(tiny_llava, None, with_images(dict(columns)), tmp_path, **settings)
    assert trainer.train_dataset["label"][:] == [0.75, 0.5, 0.25]

    batch = collated(
        AutoProcessor.from_pretrained(tiny_llava),
        prepared(AutoProcessor.from_pretrained(tiny_llava), with_images(dict(columns))),
    )
    three = {name: batch[name] for name in ("input_ids", "attention_mask", "completion_mask")}
    real = torch.ones(3, dtype=torch.bool)
    assert mismatched(three, real)[1].tolist() == [False] * 3
    assert mismatched(three, real, batch["image_key"])[1].tolist() == [True] * 3


def test_long_rows_are_cut_or_left_out_with_their_images_counted(vlm, caplog):
    _, processor, _ = vlm
    rows = image_rows(3, counts=(1, 1, 0), prompt=[[{"role": "user", "content": "0"}]] * 3)
    whole = prepared(processor, rows)
    lengths, prompts = (
        whole["length"][:],
        [n - len(c) for n, c in zip(whole["length"], whole["completion_ids"], strict=True)],
    )
    most = max(prompts)
    caplog.set_level("WARNING", logger="trl_ulma")
    kept = prepared(processor, rows, max_length=most)
    left = [row for row in range(3) if prompts[row] < most]
    assert kept["row"][:] == left
    assert [n <= most for n in kept["length"][:]] == [True] * len(left)
    batch = collated(processor, kept, max_length=most)
    assert batch["attention_mask"].sum(1).tolist() == [min(lengths[row], most) for row in left]
    message = (
        f"Row {prompts.index(most)}: its prompt has {most} tokens including its images, which fills max_length={most}"
    )
    with pytest.raises(ValueError, match=message):
        collated(processor, whole, max_length=most)
    with pytest.raises(ValueError, match=r"has .* tokens, but the model only has 5 positions"):
        prepared(processor, rows, positions=5)


def test_a_saved_model_scores_as_the_trained_one(tiny_llava, tmp_path):
    rows = image_rows(4, **kinds(4))
    trainer, _ = trained(tiny_llava, None, rows, tmp_path / "a")
    trainer.save_model(str(tmp_path / "saved"))
    again = make_trainer(str(tmp_path / "saved"), rows, tmp_path / "b", ref_model=load(tiny_llava), beta=0.5)
    assert again.score(rows)["reward"][:] == pytest.approx(trainer.score(rows)["reward"][:], abs=1e-5)
    ones, fours = (trainer.evaluate(rows) for trainer.args.per_device_eval_batch_size in (1, 4))
    for name in ("eval_loss", "eval_rewards/chosen", "eval_logps/rejected"):
        assert ones[name] == pytest.approx(fours[name], rel=1e-4, abs=1e-5)


HAS = "The train dataset has images"
AT = "Row 0 of the train dataset"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"padding_free": True},
            f"{HAS}, but padding_free=True only supports rows of text, because the model places the tokens of images "
            "row by row. Set padding_free=False.",
        ),
        (
            {"share_prompts": True},
            f"{HAS}, but share_prompts=True only supports rows of text, because the model places the tokens of images "
            "row by row. Set share_prompts=False.",
        ),
        (
            {"truncation_mode": "keep_end", "max_length": 64},
            f"{HAS}, whose tokens are in the prompt, so truncation_mode='keep_end' would cut them off. Set "
            "truncation_mode='keep_start', or max_length=None.",
        ),
        (
            {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)},
            f"{HAS}, but prompt-learning adapters put virtual tokens before the rows, so the model cannot find the "
            "images. Train with LoRA, or train the whole model.",
        ),
    ],
)
def test_a_setting_that_images_can_not_have(tiny_llava, tmp_path, settings, message):
    with pytest.raises(ValueError) as error:
        make_trainer(tiny_llava, image_rows(2), tmp_path, **settings)
    assert str(error.value) == message


def one(prompt, images, completion=None) -> Dataset:
    columns = {"prompt": [prompt], "completion": [completion or [{"role": "assistant", "content": "Paris."}]]}
    return with_images({**columns, "label": [1.0], "images": [images]})


def asks(*parts) -> list:
    return [{"role": "user", "content": list(parts)}]


PLACE, TEXT = {"type": "image"}, {"type": "text", "text": "What is this?"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            one(asks(PLACE, PLACE, TEXT), [picture(1)]),
            f"{AT}: its messages have 2 placeholders for 1 images. Add one part "
            '{"type": "image"} per image of the prompt, in order. Or write contents as text: images then come before '
            "the first user turn.",
        ),
        (
            one(asks(TEXT), [picture(1)]),
            f"{AT}: its messages have 0 placeholders for 1 images. Add one part "
            '{"type": "image"} per image of the prompt, in order. Or write contents as text: images then come before '
            "the first user turn.",
        ),
        (
            one(asks({"type": "image", "image": "a.png"}, TEXT), [picture(1)]),
            f"{AT}: a message contains an image. Put images into the column `images`, in their order, and keep "
            '{"type": "image"} in the message.',
        ),
        (
            one(asks(TEXT), [], [{"role": "assistant", "content": [PLACE]}]),
            f"{AT}: completion has a message with 'image' in it; images of a row belong to its prompt.",
        ),
        (
            one(asks({"type": "video"}, TEXT), []),
            f"{AT}: prompt has a message with 'video' in it, which is not supported.",
        ),
        (
            one("What is this?", [picture(1)], " Paris."),
            f"{AT}: its prompt has 0 placeholders '<image>' for 1 images. Write one placeholder per image where it "
            "belongs, or use messages, which get placeholders automatically.",
        ),
        (
            one(asks(PLACE, TEXT), [picture(1)], [{"role": "assistant", "content": "An <image>."}]),
            f"{AT}: its text has the image placeholder '<image>', but there is no image. Remove the placeholder from "
            "the text.",
        ),
        (
            one("What is <image>?", [], " Paris.").remove_columns("images"),
            f"{AT}: its text has the image placeholder '<image>', but there is no image. Remove the placeholder from "
            "the text.",
        ),
        (
            one(asks(PLACE), [picture(1)]).cast_column("images", List(Image(mode="L"))),
            "The train dataset decodes its column images to the mode 'L', but the model's processor converts images to "
            "RGB. Cast the column to Image(), and let the processor convert the images.",
        ),
        (
            one(asks(PLACE), [picture(1)]).rename_column("images", "image").add_column("images", [["a.png"]]),
            "The train dataset has both `image` and `images`. Remove one of them. `image` has one image per row, "
            "`images` a list of images.",
        ),
        (
            one(asks(PLACE), [picture(1)]).remove_columns("images").add_column("images", [["/nowhere/a.png"]]),
            f"{AT}: image 0 cannot be read ([Errno 2] No such file or directory: '/nowhere/a.png'). Correct its path, "
            "or remove the row.",
        ),
        (
            one(asks(PLACE), [picture(1)]).remove_columns("images").add_column("images", [[3]]),
            f"{AT}: image 0 is 3; it must be a PIL image, an array, or a file's path or bytes.",
        ),
    ],
)
def test_a_row_that_can_not_be_learned_from(tiny_llava, tmp_path, rows, message):
    with pytest.raises(ValueError) as error:
        make_trainer(tiny_llava, rows, tmp_path)
    assert str(error.value).splitlines()[0] == message


def test_a_file_that_is_no_image(tiny_llava, tmp_path):
    rows = one(asks(PLACE), [picture(1)]).remove_columns("images")
    rows = rows.add_column("images", [[{"bytes": b"no image", "path": None}]], feature=List(Image()))
    with pytest.raises(ValueError, match=r"Row 0 of the train dataset: one of its images cannot be read .*Repair it"):
        prepared(AutoProcessor.from_pretrained(tiny_llava), rows.to_iterable_dataset())


@pytest.mark.skipif(
    OLD, reason=f"the processor of transformers {transformers.__version__} does not compare images with placeholders"
)
@pytest.mark.parametrize("invalid_rows", ["error", "drop"])
def test_unreadable_images_are_listed_together_if_answers_to_a_prompt_are_compared(tiny_llava, tmp_path, invalid_rows):
    picture(1).save(tmp_path / "a.png")
    files = [tmp_path / "a.png"] * 6
    files[1] = files[4] = tmp_path / "lost.png"
    rows = [
        {
            "prompt": asks(PLACE),
            "completion": [{"role": "assistant", "content": f"No {i}"}],
            "label": i,
            "image": str(file),
        }
        for i, file in enumerate(files)
    ]
    settings = {"label_transform": "prompt_quantile", "invalid_rows": invalid_rows}
    if invalid_rows == "error":
        with pytest.raises(ValueError, match=r"(?s)2 of 6 rows.*Row 1 of.*image 0 cannot.*Row 4 of.*image 0 cannot"):
            make_trainer(tiny_llava, Dataset.from_list(rows), tmp_path, **settings)
    else:
        assert len(make_trainer(tiny_llava, Dataset.from_list(rows), tmp_path, **settings).train_dataset) == 4


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason=f"the processor of transformers {transformers.__version__} does not compare images with placeholders",
)
def test_what_a_processor_can_not_take_is_told_before_training(tiny_llava, tmp_path):
    processor = AutoProcessor.from_pretrained(tiny_llava)
    rows = image_rows(2)
    made = prepared(processor, rows).map(lambda row: {"prompt_text": row["prompt_text"].replace("<image>", "")})
    with pytest.raises(
        ValueError, match=r"The processor fails on a batch with the rows 0, 1 \(.*\)\. Check the images"
    ):
        make_trainer(tiny_llava, made, tmp_path)


def test_a_processor_needs_a_chat_template_and_a_collator_its_processor(tiny_llava):
    processor = AutoProcessor.from_pretrained(tiny_llava)
    processor.chat_template = None
    with pytest.raises(ValueError, match=r"the processor has no chat template\. Set processor\.chat_template"):
        prepared(processor, image_rows(2))
    with pytest.raises(ValueError, match="needs the model's processor; got None"):
        DataCollatorForVisionPointwisePreference(0)


def test_images_need_a_processor(tiny_llava, tmp_path):
    tokenizer = AutoProcessor.from_pretrained(tiny_llava).tokenizer
    with pytest.raises(ValueError, match="Pass the processor as processing_class, or remove the column"):
        make_trainer(tiny_llava, image_rows(2), tmp_path, processing_class=tokenizer)


def test_places_go_before_the_first_user_turns_text():
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "A"},
        {"role": "user", "content": "B"},
    ]
    made = with_placeholders(turns, 2)
    assert [[part["type"] for part in turn["content"]] for turn in made] == [
        ["text"],
        ["image", "image", "text"],
        ["text"],
    ]
    assert as_images((picture(1), picture(2)))[1]["bytes"]
