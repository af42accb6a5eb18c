"""Tiny vision-language models and rows with images, made on the spot."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image, List
from PIL import Image as PILImage
from tiny import make_tokenizer
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.processing_utils import ProcessorMixin

try:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
except ImportError:  # older versions of transformers
    from transformers.models.clip.image_processing_clip import CLIPImageProcessor as CLIPImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as Qwen2VLImageProcessorPil

TEMPLATE = (
    "{{% for message in messages %}}<|{{{{ message['role'] }}}}|>{{% for part in message['content'] %}}"
    "{{% if part['type'] == 'image' %}}{0}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}<|end|>"
    "{{% endfor %}}{{% if add_generation_prompt %}}<|assistant|>{{% endif %}}"
)
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


class StillsProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor without its part for videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def make_llava(folder: str) -> str:
    """A folder with a two-layer Llava, whose images are 4 tokens each, and its processor."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.format("<image>"),
    )
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "projection_dim": 32, "initializer_range": 0.2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "initializer_factor": 10.0, **vision},
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        initializer_range=0.2,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_qwen(folder: str) -> StillsProcessor:
    """The processor of a two-layer Qwen2-VL in `folder`, whose images have as many tokens as their size makes."""
    tokenizer = make_tokenizer()
    named = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": named})
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024)
    processor = StillsProcessor(images, tokenizer, TEMPLATE.format("<|vision_start|><|image_pad|><|vision_end|>"))
    start, end, image, video = (tokenizer.convert_tokens_to_ids(name) for name in named)
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = Qwen2VLConfig(
        text_config={"vocab_size": len(tokenizer), "rope_parameters": rope, **TEXT},
        vision_config={**vision, "initializer_range": 0.2},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    return processor


def picture(seed: int, size: tuple[int, int] = (16, 24)) -> PILImage.Image:
    """Noise of (height, width)."""
    return PILImage.fromarray(np.random.RandomState(seed).randint(0, 255, (*size, 3), dtype=np.uint8))


QUESTIONS = ("What is this?", "How are you today?", "Please write a short letter.")
REPLIES = ("The cat.", "I am fine, thank you!", "No.", "Paris.", "Of course, here it is.")
SIZES = ((16, 24), (8, 16), (24, 8))


def image_rows(n: int, *, counts: tuple[int, ...] = (1, 2, 0), **columns: list) -> Dataset:
    """`n` conversations with `counts` images in turn, labels 1 and 0 in turn; `columns` come on top."""
    rows: dict[str, list] = {
        "prompt": [[{"role": "user", "content": QUESTIONS[i % 3]}] for i in range(n)],
        "completion": [[{"role": "assistant", "content": REPLIES[(2 * i) % 5]}] for i in range(n)],
        "label": [float(i % 2 == 0) for i in range(n)],
        "images": [[picture(10 * i + k, SIZES[(i + k) % 3]) for k in range(counts[i % len(counts)])] for i in range(n)],
    }
    return with_images(rows | columns)


def with_images(columns: dict[str, list]) -> Dataset:
    """A dataset whose `images` are images, also where the first rows have none."""
    images = columns.pop("images")
    made = Dataset.from_dict(columns)
    encoded = [[Image().encode_example(image) for image in row] for row in images]
    return made.add_column("images", encoded, feature=List(Image()))
