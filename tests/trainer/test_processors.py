"""Vision-language processors: token ids, masks and pixels are those of TRL's own processing for DPO."""

import copy
import importlib
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import make_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlavaProcessor
from transformers.processing_utils import ProcessorMixin
from trl import prepare_multimodal_messages
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from vlm import TEMPLATE, StillsProcessor, picture, with_images

from trl_ulma.labels import LabelRules
from trl_ulma.rows.images import DataCollatorForVisionPointwisePreference, placeholder_of
from trl_ulma.rows.preparation import Preparation


def of(model: str, name: str) -> Any:
    """A class of a model's module in transformers."""
    if not name.endswith("Pil"):
        return getattr(importlib.import_module(f"transformers.models.{model}.processing_{model}"), name)
    try:
        module = importlib.import_module(f"transformers.models.{model}.image_processing_pil_{model}")
    except ModuleNotFoundError:  # older versions of transformers have their own for PIL under the plain name
        name = name.removesuffix("Pil")
        module = importlib.import_module(f"transformers.models.{model}.image_processing_{model}")
    return getattr(module, name)


def tokenizer_with(*names: str, **special: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*names, *special.values()]})
    for name, token in special.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def llava(template: str = TEMPLATE.format("<image>")) -> Any:
    tokenizer = tokenizer_with("<image>")
    images = of("clip", "CLIPImageProcessorPil")(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    how = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(images, tokenizer, chat_template=template, **how)


def llava_next() -> Any:
    images = of("llava_next", "LlavaNextImageProcessorPil")(
        size={"shortest_edge": 8},
        crop_size={"height": 8, "width": 8},
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
    )
    how = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    make = of("llava_next", "LlavaNextProcessor")
    return make(images, tokenizer_with("<image>"), chat_template=TEMPLATE.format("<image>"), **how)


def qwen() -> Any:
    names = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    images = of("qwen2_vl", "Qwen2VLImageProcessorPil")(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024
    )
    template = TEMPLATE.format("<|vision_start|><|image_pad|><|vision_end|>")
    return StillsProcessor(images, tokenizer_with(*names), template)


def gemma3() -> Any:
    special = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    images = of("gemma3", "Gemma3ImageProcessorPil")(size={"height": 8, "width": 8}, image_seq_length=4)
    make = of("gemma3", "Gemma3Processor")
    return make(images, tokenizer_with(**special), TEMPLATE.format("<start_of_image>"), image_seq_length=4)


def gemma4() -> Any:
    try:
        base = of("gemma4", "Gemma4Processor")
    except ModuleNotFoundError as error:  # of older versions of transformers, without torchvision
        pytest.skip(str(error))

    class Gemma4Stills(base):
        """Gemma 4's processor without its parts for sound and videos, which need more than pictures do."""

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            self.image_seq_length = 4
            for name in ("image_token_id", "image_token", "boi_token", "eoi_token"):
                setattr(self, name, getattr(tokenizer, name))
            self.boa_token = self.eoa_token = self.audio_token = "<|audio|>"
            self.video_token, self.video_token_id, self.audio_token_id = "<|video|>", None, None
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

    special = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    images = of("gemma4", "Gemma4ImageProcessorPil")(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
    return Gemma4Stills(images, tokenizer_with("<|video|>", "<|audio|>", **special), TEMPLATE.format("<|image|>"))


def idefics3() -> Any:
    names = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    images = of("idefics3", "Idefics3ImageProcessorPil")(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 8}, do_image_splitting=True
    )
    make = of("idefics3", "Idefics3Processor")
    return make(images, tokenizer_with(*names), image_seq_len=2, chat_template=TEMPLATE.format("<image>"))


def pixtral() -> Any:
    pytest.importorskip("torchvision", reason="Pixtral's processor imports it")
    names = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    images = of("pixtral", "PixtralImageProcessorPil")(size={"longest_edge": 16}, patch_size={"height": 4, "width": 4})
    make = of("pixtral", "PixtralProcessor")
    return make(images, tokenizer_with(*names), patch_size=4, chat_template=TEMPLATE.format("[IMG]"))


def aya() -> Any:
    names = [
        "<image>",
        "<|START_OF_IMG|>",
        "<|END_OF_IMG|>",
        "<|IMG_PATCH|>",
        "<|IMG_LINE_BREAK|>",
        "TILE",
        "TILE_GLOBAL",
    ]
    images = of("got_ocr2", "GotOcr2ImageProcessorPil")(size={"height": 8, "width": 8}, crop_to_patches=True)
    make = of("aya_vision", "AyaVisionProcessor")
    return make(images, tokenizer_with(*names), patch_size=4, img_size=8, chat_template=TEMPLATE.format("<image>"))


PROCESSORS = {each.__name__: each for each in (llava, llava_next, qwen, gemma3, gemma4, idefics3, pixtral, aya)}
PAIR = {
    "prompt": [{"role": "user", "content": "What is this?"}],
    "chosen": [{"role": "assistant", "content": "The cat."}],
    "rejected": [{"role": "assistant", "content": "I am fine, thank you!"}],
}


@pytest.fixture(params=PROCESSORS)
def processor(request):
    return PROCESSORS[request.param]()


def prepared(processor: Any, rows: Dataset) -> Dataset:
    return Preparation(processor, LabelRules())(rows, "train")


@pytest.mark.parametrize("sizes", [[(16, 24)], [(8, 16), (24, 8)]], ids=["one image", "two images"])
def test_rows_with_images_are_processed_as_trl_does(processor, sizes):
    pictures = [picture(i, size) for i, size in enumerate(sizes)]
    theirs = DataCollatorForVisionPreference(processor)([copy.deepcopy(PAIR) | {"images": pictures}])
    rows = prepared(processor, with_images({name: [value] for name, value in PAIR.items()} | {"images": [pictures]}))
    pad = processor.tokenizer.pad_token_id
    ours = DataCollatorForVisionPointwisePreference(pad, processor=processor)(list(rows))
    theirs["input_ids"] *= theirs["attention_mask"]  # TRL takes EOS for padding where the pad token's id is 0
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(ours[name], theirs[name]), name
    made = set(theirs) - {"input_ids", "attention_mask", "completion_mask"}
    assert "pixel_values" in made
    for name in made:
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])), name
    # What is said of the length before the images are processed is true
    assert rows["length"][:] == theirs["attention_mask"].sum(1).tolist()


@pytest.mark.parametrize("how", ["its template writes BOS", "its tokenizer adds BOS", "no BOS"])
def test_a_conversation_without_images_has_trls_ids(processor, how):
    tokenizer = processor.tokenizer
    if how != "no BOS":
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        post = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = post
    if how == "its template writes BOS":
        processor.chat_template = "<s>" + processor.chat_template
    rows = prepared(processor, Dataset.from_list([PAIR]))

    def ids(messages: list, **how: Any) -> list[int]:
        messages = prepare_multimodal_messages(messages, images=[])
        return list(processor.apply_chat_template(messages, tokenize=True, return_dict=True, **how)["input_ids"][0])

    prompt = ids(PAIR["prompt"], add_generation_prompt=True)
    for row, half in zip(rows, ("chosen", "rejected"), strict=True):
        whole = ids(PAIR["prompt"] + PAIR[half])
        cut = next(i for i, token in enumerate(whole) if [token] != prompt[i : i + 1])
        assert (row["prompt_ids"], row["completion_ids"]) == (whole[:cut], whole[cut:])
        assert (tokenizer.bos_token_id == row["prompt_ids"][0]) is (how != "no BOS")


def test_turns_of_users_in_an_answer_about_images_are_not_scored(processor):
    answer = [*PAIR["chosen"], {"role": "user", "content": "How are you today?"}, *PAIR["rejected"]]
    columns = {"prompt": [PAIR["prompt"]], "completion": [answer], "label": [1.0], "images": [[picture(1)]]}
    rows = prepared(processor, with_images(columns))
    pad = processor.tokenizer.pad_token_id
    batch = DataCollatorForVisionPointwisePreference(pad, processor=processor)(list(rows))
    scored = batch["input_ids"][batch["completion_mask"].bool()]
    assert processor.tokenizer.decode(scored) == "The cat.<|end|>I am fine, thank you!<|end|>"
    assert "How are you today?" in processor.tokenizer.decode(batch["input_ids"][0])


def test_what_stands_for_an_image_is_found_out(processor):
    found = placeholder_of(processor)
    made = processor(images=[[picture(1)]], text=[found], add_special_tokens=False)
    assert len(made["input_ids"][0]) > 1
