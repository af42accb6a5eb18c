"""Rows with images: the checks before training, and the collator that processes images batch by batch."""

# In the type hints of transformers and datasets, a processor's parts and a column's kind have many types
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import datasets
import torch
from datasets.utils.file_utils import is_local_path
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from trl_ulma.labels import InvalidRow, shown
from trl_ulma.rows.collator import DataCollatorForPointwisePreference

COLUMNS = ("image", "images")
_EXIF_ORIENTATION = 0x0112
_PLACEHOLDERS: "WeakKeyDictionary[ProcessorMixin, str | None]" = WeakKeyDictionary()


def image_column(names: Sequence[str], where: str) -> str | None:
    """The column with the images of the rows, or None.

    Raises:
        ValueError: if there are two such columns.

    Example:
        >>> image_column(["prompt", "image"], "train")
        'image'
    """
    found = [name for name in COLUMNS if name in names]
    if len(found) > 1:
        raise ValueError(
            f"The {where} dataset has both `image` and `images`. Remove one of them. `image` has one image per row, "
            "`images` a list of images."
        )
    return found[0] if found else None


def has_images(dataset: Any) -> bool:
    """Whether raw or prepared rows have a column of images."""
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        return False
    names = dataset.column_names or next(iter(dataset), ())
    return any(name in names for name in (*COLUMNS, "prompt_images"))


def first_row(rows: datasets.Dataset | datasets.IterableDataset) -> Any:
    """The first row, or None if there is none. Images of a stream are not decoded, and those of a table are None."""
    if isinstance(rows, datasets.IterableDataset):
        return next(iter(rows if rows.features is None else rows.decode(False)), None)
    held = [name for name in COLUMNS if name in rows.column_names]
    if rows.format["type"] == "custom" or not held or not len(rows):
        return next(iter(rows), None)
    others = [name for name in rows.column_names if name not in held]
    return (rows.select_columns(others)[0] if others else {}) | dict.fromkeys(held)


def undecoded(batch: Mapping[str, Sequence[Any]], column: str) -> Sequence[Any]:
    """The images of a batch of `datasets.map`, as bytes or paths unless they are already decoded."""
    table = getattr(batch, "pa_table", None)
    return batch[column] if table is None else table[column].to_pylist()


def undecoded_column(rows: datasets.Dataset, column: str) -> Iterator[Any]:
    """The images of each raw row, as bytes or paths where nothing has decoded them yet."""
    tables: Any = rows.select_columns([column]).with_format("arrow").iter(32)
    return (value for table in tables for value in table[column].to_pylist())


def check_mode(rows: datasets.Dataset | datasets.IterableDataset, column: str, where: str) -> None:
    """Raise ValueError if a column decodes its images to a mode that processors would convert back to RGB."""
    kind = None if rows.features is None else rows.features.get(column)
    mode = getattr(getattr(kind, "feature", kind), "mode", None)
    if mode not in (None, "RGB"):
        raise ValueError(
            f"The {where} dataset decodes its column {column} to the mode {mode!r}, but the model's processor converts "
            "images to RGB. Cast the column to Image(), and let the processor convert the images."
        )


def as_images(value: Any) -> list[dict[str, Any]]:
    """A row's images, each with the `bytes` or `path` of its file.

    Args:
        value: None, an image or a list of images. An image is a PIL image, an array, a path, bytes, or a value as
            `datasets` stores it.

    Raises:
        ValueError: if a value is not an image, or if a file does not exist.

    Example:
        >>> as_images(None), as_images(b"GIF89a")
        ([], [{'path': None, 'bytes': b'GIF89a'}])
    """
    found = []
    for number, image in enumerate(value if isinstance(value, list | tuple) else [] if value is None else [value]):
        try:
            kept = datasets.Image().encode_example(image)
            if kept["bytes"] is None and is_local_path(kept["path"]):
                with open(kept["path"], "rb"):
                    pass
        except OSError as error:
            raise InvalidRow(
                f"cannot be read ({error}). Correct its path, or remove the row.",
                "an image cannot be read",
                f"image {number}",
            ) from error
        except Exception as error:  # `datasets` does not document what encoding another kind of value raises
            raise InvalidRow(
                f"is {shown(image)}; it must be a PIL image, an array, or a file's path or bytes.",
                "a value that is not an image",
                f"image {number}",
            ) from error
        found.append(kept)
    return found


def image_key(images: Sequence[Mapping[str, Any]]) -> int:
    """A number that is the same for rows with the same images. 0 for rows without images.

    Example:
        >>> image_key([]), image_key([{"bytes": b"a"}]) == image_key([{"bytes": b"a"}])
        (0, True)
    """
    if not images:
        return 0
    digest = hashlib.blake2b(digest_size=8)
    for image in images:
        digest.update(hashlib.blake2b(image.get("bytes") or str(image.get("path")).encode()).digest())
    return int.from_bytes(digest.digest(), "big", signed=True)


def with_placeholders(messages: list[dict[str, Any]], images: int) -> list[dict[str, Any]]:
    """Messages whose contents are lists of parts with a placeholder per image, as a processor's chat template needs.

    If contents are text, the images come before the text of the first user turn.

    Args:
        messages: the messages of a prompt, or, with `images` 0, of a completion.
        images: the number of images of the row.

    Raises:
        ValueError: if the numbers of placeholders and images differ.

    Example:
        >>> with_placeholders([{"role": "user", "content": "What is it?"}], 1)
        [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What is it?'}]}]
    """
    parts = [part for turn in messages if isinstance(turn.get("content"), list) for part in turn["content"]]
    if any(set(part) - {"type"} for part in parts if part.get("type") == "image"):
        raise InvalidRow(
            "contains an image. Put images into the column `images`, in their order, and keep "
            '{"type": "image"} in the message.',
            "a message contains an image",
            "a message",
        )
    places = sum(part.get("type") == "image" for part in parts)
    if any(turn["role"] == "user" and isinstance(turn.get("content"), str) for turn in messages):
        places += images
    if places != images:
        raise InvalidRow(
            f"have {places} placeholders for {images} images. Add one part "
            '{"type": "image"} per image of the prompt, in order. Or write contents as text: images then come before '
            "the first user turn.",
            "different numbers of images and placeholders",
            "its messages",
        )
    try:
        made = prepare_multimodal_messages(messages, images=["image"] * images)
    except ValueError as error:  # an unknown role
        raise InvalidRow(
            f"does not accept its messages ({error}). Correct the row, or remove it.",
            "messages that the processor does not accept",
            "the processor",
        ) from error
    return [_without_payload(turn) for turn in made]


def _without_payload(turn: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(turn.get("content"), list):
        return turn
    return {**turn, "content": [{"type": "image"} if p.get("type") == "image" else p for p in turn["content"]]}


def check_text_places(processor: ProcessorMixin, prompt: str, images: int) -> None:
    """Raise ValueError unless a prompt of plain text has a placeholder for each image."""
    token = placeholder_of(processor)
    places = images if token is None else prompt.count(token)
    if places != images:
        raise InvalidRow(
            f"has {places} placeholders {token!r} for {images} images. Write one placeholder per "
            "image where it belongs, or use messages, which get placeholders automatically.",
            "different numbers of images and placeholders",
            "its prompt",
        )


def placeholder_of(processor: ProcessorMixin) -> str | None:
    """The text that the processor replaces by the tokens of an image, or None if it has none.

    Processors name it `image_token` or `boi_token`. Some have both names for different tokens. In that case each one is
    tried with a black image, because the processor raises an error if the placeholders do not match the images.
    """
    if processor in _PLACEHOLDERS:
        return _PLACEHOLDERS[processor]
    import PIL.Image

    black = PIL.Image.new("RGB", (32, 32))
    found = list(dict.fromkeys(token for n in ("image_token", "boi_token") if (token := getattr(processor, n, None))))
    for token in found if len(found) > 1 else ():
        try:
            processor(images=[[black]], text=[token], add_special_tokens=False)
        except Exception:  # nosec B112: processors can raise any exception
            continue
        found = [token]
        break
    _PLACEHOLDERS[processor] = found[0] if found else None
    return _PLACEHOLDERS[processor]


def check_stray(
    processor: ProcessorMixin, prompt_ids: Sequence[int], completion_ids: Sequence[int], images: int
) -> None:
    """Raise ValueError if a text has a placeholder without an image, because the model would look for the image."""
    token = getattr(processor, "image_token_id", None)
    if token is not None and (token in completion_ids or (not images and token in prompt_ids)):
        raise InvalidRow(
            f"has the image placeholder {processor.tokenizer.decode([token])!r}, but there is no image. "
            "Remove the placeholder from the text.",
            "a placeholder without an image",
            "its text",
        )


@dataclass
class ImageTokens:
    """The number of tokens that an image adds to a prompt, in addition to its placeholder.

    It is measured once per image size, by running the processor on a black image.

    Args:
        processor: the model's processor.
    """

    processor: ProcessorMixin
    _known: dict[tuple[int, int], int] = field(default_factory=dict)

    def __call__(self, images: Sequence[Mapping[str, Any]]) -> int:
        """The number of tokens that `images` add to their placeholders. An image that is not a local file counts as 0.

        Raises:
            ValueError: if a file is not an image.
        """
        return sum(self._of(size) for image in images if (size := _size(image)) is not None)

    def _of(self, size: tuple[int, int]) -> int:
        if size not in self._known:
            import PIL.Image

            placeholder = placeholder_of(self.processor)
            if placeholder is None:
                return 0
            made = self.processor(images=[[PIL.Image.new("RGB", size)]], text=[placeholder], add_special_tokens=False)
            plain = self.processor.tokenizer(placeholder, add_special_tokens=False)
            self._known[size] = len(made["input_ids"][0]) - len(plain["input_ids"])
        return self._known[size]


def _size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    """The displayed (width, height) of an image, from the header of its file."""
    import PIL.Image

    source = image.get("bytes")
    if source is None and not is_local_path(image["path"]):
        return None
    try:
        with PIL.Image.open(image["path"] if source is None else io.BytesIO(source)) as opened:
            width, height = opened.size
            turned = opened.getexif().get(_EXIF_ORIENTATION, 1) >= 5
    except Exception as error:
        raise InvalidRow(
            f"cannot be read ({type(error).__name__}: {error}). Repair it, or remove the row.",
            "an image cannot be read",
            "one of its images",
        ) from error
    return (height, width) if turned else (width, height)


def check_settings(args: Any, where: str, peft_config: Any) -> None:
    """Raise ValueError if a setting does not support rows with images.

    Args:
        args: the trainer's config.
        where: the name of the dataset.
        peft_config: the config of the adapter, or None.
    """
    has = f"The {where} dataset has images"
    for name in ("padding_free", "share_prompts"):
        if getattr(args, name):
            raise ValueError(
                f"{has}, but {name}=True only supports rows of text, because the model places the tokens of images row "
                f"by row. Set {name}=False."
            )
    if args.truncation_mode == "keep_end" and args.max_length is not None:
        raise ValueError(
            f"{has}, whose tokens are in the prompt, so truncation_mode='keep_end' would cut them off. Set "
            "truncation_mode='keep_start', or max_length=None."
        )
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"{has}, but prompt-learning adapters put virtual tokens before the rows, so the model cannot find the "
            "images. Train with LoRA, or train the whole model."
        )


@dataclass
class DataCollatorForVisionPointwisePreference(DataCollatorForPointwisePreference):
    r"""Collates rows with and without images into a batch that is padded on the right, and processes the images.

    In addition to the tensors of `DataCollatorForPointwisePreference`, the batch has the processor's outputs for the
    images: `pixel_values`, and, depending on the model, `image_grid_thw`, `mm_token_type_ids` `(B, T)` and others.
    Images are in the order of the rows. A batch without images only has the outputs of shape `(B, T)`.

    Rows with images have `prompt_text` (including placeholders and special tokens), `prompt_images` (the `bytes` or
    `path` of a file, or a PIL image) and `completion_ids`. Rows without images have `prompt_ids` and `completion_ids`.

    Args:
        processor: the model's processor.

    Raises:
        ValueError: if truncation_mode is "keep_end" and there is a `max_length`, if the prompt of a row alone fills
            `max_length`, or if the processor does not accept a row.

    Example:
        >>> from transformers import AutoProcessor
        >>> processor = AutoProcessor.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct")  # doctest: +SKIP
        >>> collator = DataCollatorForVisionPointwisePreference(
        ...     processor.tokenizer.pad_token_id, processor=processor
        ... )  # doctest: +SKIP
    """

    processor: ProcessorMixin | None = None

    def __post_init__(self):
        if self.processor is None:
            raise ValueError("DataCollatorForVisionPointwisePreference needs the model's processor; got None.")

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of `examples`."""
        seen = [i for i, example in enumerate(examples) if example.get("prompt_images")]
        if seen and self.truncation_mode == "keep_end" and self.max_length is not None:
            raise ValueError(
                "truncation_mode='keep_end' would cut off the images, which are in the prompt. Set 'keep_start', or "
                "max_length=None."
            )
        made, kinds = self._process([examples[i] for i in seen])
        rows = list(examples)
        per_token: dict[str, list[torch.Tensor]] = {name: [] for name in kinds}
        prompts = iter(range(len(seen)))
        for i, example in enumerate(examples):
            prompt_ids, types = example["prompt_ids"], {}
            if example.get("prompt_images"):
                number = next(prompts)
                kept = made["attention_mask"][number].bool()
                prompt_ids = made["input_ids"][number][kept].tolist()
                types = {name: made[name][number][kept] for name in kinds}
                self._check_room(example, len(prompt_ids))
                rows[i] = {**example, "prompt_ids": prompt_ids}
            zeros = torch.zeros(len(prompt_ids) + len(example["completion_ids"]), dtype=torch.long)[: self.max_length]
            for name, values in per_token.items():
                value = zeros.clone()
                if name in types:
                    value[: len(prompt_ids)] = types[name]
                values.append(value)
        batch = super().torch_call(rows)
        for name, values in per_token.items():
            batch[name] = self._pad(values, 0)
        if "image_key" in examples[0]:
            batch["image_key"] = torch.tensor([example["image_key"] for example in examples])
        return batch | {name: v for name, v in made.items() if name not in {"input_ids", "attention_mask", *kinds}}

    def _process(self, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
        """The processor's outputs for rows with images, and the names of its outputs with one value per token."""
        if not rows:
            return {}, self._kinds_of_tokens
        try:
            made = self._processed(
                text=[row["prompt_text"] for row in rows],
                images=[[_decoded(image) for image in row["prompt_images"]] for row in rows],
            )
        except Exception as error:  # processors can raise any exception
            at = ", ".join(str(row.get("row", "?")) for row in rows)
            raise ValueError(
                f"The processor fails on a batch with the rows {at} ({type(error).__name__}: {error}). Check the "
                "images and placeholders of these rows."
            ) from error
        return made, _per_token(made)

    def _processed(self, **inputs: Any) -> dict[str, Any]:
        processor: Any = self.processor
        return dict(processor(**inputs, padding=True, return_tensors=self.return_tensors, add_special_tokens=False))

    @cached_property
    def _kinds_of_tokens(self) -> list[str]:
        return _per_token(self._processed(text=["a"]))

    def _check_room(self, example: Mapping[str, Any], tokens: int) -> None:
        if self.max_length is not None and tokens >= self.max_length:
            raise ValueError(
                f"Row {example.get('row', '?')}: its prompt has {tokens} tokens including its images, which fills "
                f"max_length={self.max_length}. Raise max_length (None does not truncate), let the processor shrink "
                "images, or remove the row."
            )


def _decoded(image: Any) -> Any:
    """Decode an image that is stored as bytes or a path. (`datasets` would decode the first of a list twice.)"""
    return datasets.Image().decode_example(image) if isinstance(image, dict) else image


def _per_token(made: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name, value in made.items()
        if name.endswith("token_type_ids") and value.shape == made["input_ids"].shape
    ]
