"""Rows with images: what is checked before training, and the collator that processes images batch by batch."""

# transformers declares a processor's parts, and datasets a column's kind, to be of many kinds
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
    """The column that holds the rows' images, or None.

    Raises:
        ValueError: where there are two.

    Example:
        >>> image_column(["prompt", "image"], "train")
        'image'
    """
    found = [name for name in COLUMNS if name in names]
    if len(found) > 1:
        raise ValueError(
            f"The {where} dataset has both `image` and `images`. Remove one: `image` holds one image a row, `images` "
            "a list of them."
        )
    return found[0] if found else None


def has_images(dataset: Any) -> bool:
    """Whether rows, raw or prepared, have a column of images."""
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        return False
    names = dataset.column_names or next(iter(dataset), ())
    return any(name in names for name in (*COLUMNS, "prompt_images"))


def first_row(rows: datasets.Dataset | datasets.IterableDataset) -> Any:
    """The first row, None where there is none; an image of it is not decoded, and of a column of images is None."""
    if isinstance(rows, datasets.IterableDataset):
        return next(iter(rows if rows.features is None else rows.decode(False)), None)
    held = [name for name in COLUMNS if name in rows.column_names]
    if rows.format["type"] == "custom" or not held or not len(rows):
        return next(iter(rows), None)
    others = [name for name in rows.column_names if name not in held]
    return (rows.select_columns(others)[0] if others else {}) | dict.fromkeys(held)


def undecoded(batch: Mapping[str, Sequence[Any]], column: str) -> Sequence[Any]:
    """The images of a batch that `datasets.map` hands on, as bytes or paths where nothing has decoded them yet."""
    table = getattr(batch, "pa_table", None)
    return batch[column] if table is None else table[column].to_pylist()


def undecoded_column(rows: datasets.Dataset, column: str) -> Iterator[Any]:
    """The images of each raw row, as bytes or paths where nothing has decoded them yet."""
    tables: Any = rows.select_columns([column]).with_format("arrow").iter(32)
    return (value for table in tables for value in table[column].to_pylist())


def check_mode(rows: datasets.Dataset | datasets.IterableDataset, column: str, where: str) -> None:
    """Raise ValueError where a column has its images decoded to a mode that processors make RGB of again."""
    kind = None if rows.features is None else rows.features.get(column)
    mode = getattr(getattr(kind, "feature", kind), "mode", None)
    if mode not in (None, "RGB"):
        raise ValueError(
            f"The {where} dataset has its column {column} decoded to the mode {mode!r}, which the model's processor "
            "does not keep. Cast the column to Image(), and have the processor do it."
        )


def as_images(value: Any, at: str) -> list[dict[str, Any]]:
    """A row's images, each as its file's `bytes` or `path`.

    Args:
        value: None, an image or a list of images, each a PIL image, an array, a path, bytes, or what `datasets` stores.
        at: the row's name, for errors.

    Raises:
        ValueError: for what is no image, or a file that is not there.

    Example:
        >>> as_images(None, "Row 0"), as_images(b"GIF89a", "Row 1")
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
                f"{at}: image {number} can not be read ({error}). Mend its path, or drop the row.",
                "an image cannot be read",
            ) from error
        except Exception as error:  # what encoding a value of another kind ends in is not said
            raise InvalidRow(
                f"{at}: image {number} is {shown(image)}; it must be a PIL image, an array, or a file's path or bytes.",
                "an image is no image",
            ) from error
        found.append(kept)
    return found


def image_key(images: Sequence[Mapping[str, Any]]) -> int:
    """A number by which rows with the same images are known; 0 for none.

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


def with_placeholders(messages: list[dict[str, Any]], images: int, at: str) -> list[dict[str, Any]]:
    """Messages whose contents are lists of parts, with a place for each image, as a processor's chat template wants.

    Where contents are text, images come before the first user turn's.

    Args:
        messages: of a prompt, or with `images` 0 of a completion.
        images: how many the row has.
        at: the row's name, for errors.

    Raises:
        ValueError: where places and images differ in number.

    Example:
        >>> with_placeholders([{"role": "user", "content": "What is it?"}], 1, "Row 0")
        [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What is it?'}]}]
    """
    parts = [part for turn in messages if isinstance(turn.get("content"), list) for part in turn["content"]]
    if any(set(part) - {"type"} for part in parts if part.get("type") == "image"):
        raise InvalidRow(
            f"{at}: a message holds an image itself. Put images into the column `images`, in their order, and leave "
            '{"type": "image"} in the message.',
            "a message holds an image itself",
        )
    places = sum(part.get("type") == "image" for part in parts)
    if any(turn["role"] == "user" and isinstance(turn.get("content"), str) for turn in messages):
        places += images
    if places != images:
        raise InvalidRow(
            f"{at}: {places} places for images in its messages, and {images} images. Give each image of the prompt one "
            'part {"type": "image"}, in order; or write contents as text: images then come before the first user turn.',
            "images and their places differ in number",
        )
    try:
        made = prepare_multimodal_messages(messages, images=["image"] * images)
    except ValueError as error:  # a role that is not known
        raise InvalidRow(
            f"{at}: its messages cannot be given to the processor ({error}).", "messages that a processor refuses"
        ) from error
    return [_without_payload(turn) for turn in made]


def _without_payload(turn: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(turn.get("content"), list):
        return turn
    return {**turn, "content": [{"type": "image"} if p.get("type") == "image" else p for p in turn["content"]]}


def check_text_places(processor: ProcessorMixin, prompt: str, images: int, at: str) -> None:
    """Raise ValueError unless a prompt of text has a placeholder for each image."""
    token = placeholder_of(processor)
    places = images if token is None else prompt.count(token)
    if places != images:
        raise InvalidRow(
            f"{at}: {places} of the placeholder {token!r} in its prompt, and {images} images. Write one for each "
            "image where it belongs, or use messages, into which they are put.",
            "images and their places differ in number",
        )


def placeholder_of(processor: ProcessorMixin) -> str | None:
    """The text that the processor replaces by an image's tokens, or None if it has none.

    Processors name it `image_token` or `boi_token`, and some have both names for different tokens. The processor is
    asked with a black image: it raises an error for a text whose placeholders do not match the images.
    """
    if processor in _PLACEHOLDERS:
        return _PLACEHOLDERS[processor]
    import PIL.Image

    black = PIL.Image.new("RGB", (32, 32))
    found = list(dict.fromkeys(token for n in ("image_token", "boi_token") if (token := getattr(processor, n, None))))
    for token in found if len(found) > 1 else ():
        try:
            processor(images=[[black]], text=[token], add_special_tokens=False)
        except Exception:  # nosec B112: a processor is a program, and each refuses in its own way
            continue
        found = [token]
        break
    _PLACEHOLDERS[processor] = found[0] if found else None
    return _PLACEHOLDERS[processor]


def check_stray(
    processor: ProcessorMixin, prompt_ids: Sequence[int], completion_ids: Sequence[int], images: int, at: str
) -> None:
    """Raise ValueError where a text has what stands for an image, and no image: the model would look for one."""
    token = getattr(processor, "image_token_id", None)
    if token is not None and (token in completion_ids or (not images and token in prompt_ids)):
        raise InvalidRow(
            f"{at}: its text has {processor.tokenizer.decode([token])!r}, which stands for an image, where there is "
            "none. Take it out of the text.",
            "a placeholder without an image",
        )


@dataclass
class ImageTokens:
    """How many tokens an image adds to a prompt, of which its processor makes one placeholder's more.

    The processor is asked once for each size, with a black image.

    Args:
        processor: of the model.
    """

    processor: ProcessorMixin
    _known: dict[tuple[int, int], int] = field(default_factory=dict)

    def __call__(self, images: Sequence[Mapping[str, Any]], at: str) -> int:
        """Tokens that `images` add, besides their placeholders; 0 for an image that is not on this machine.

        Raises:
            ValueError: for a file that is no image.
        """
        return sum(self._of(size) for image in images if (size := _size(image, at)) is not None)

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


def _size(image: Mapping[str, Any], at: str) -> tuple[int, int] | None:
    """(width, height) as it is shown, from the file's header."""
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
            f"{at}: an image of it can not be read ({type(error).__name__}: {error}). Mend it, or drop the row.",
            "an image cannot be read",
        ) from error
    return (height, width) if turned else (width, height)


def check_settings(args: Any, where: str, peft_config: Any) -> None:
    """Raise ValueError on a setting that rows with images can not be learned from with.

    Args:
        args: the trainer's config.
        where: the data set's name.
        peft_config: of the adapter, or None.
    """
    has = f"The {where} dataset has images"
    for name in ("padding_free", "share_prompts"):
        if getattr(args, name):
            raise ValueError(
                f"{has}, and {name}=True lays out rows of text only: where an image's tokens go, the model decides row "
                f"by row. Set {name}=False."
            )
    if args.truncation_mode == "keep_end" and args.max_length is not None:
        raise ValueError(
            f"{has}, whose tokens stand in the prompt, and truncation_mode='keep_end' would cut them off. Set "
            "truncation_mode='keep_start', or max_length=None."
        )
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"{has}, and adapters that put virtual tokens before the rows hide from the model where they are. Train "
            "with LoRA, or the whole model."
        )


@dataclass
class DataCollatorForVisionPointwisePreference(DataCollatorForPointwisePreference):
    r"""Collates rows with images and rows without into a batch, padded on the right; images are processed here.

    Besides what `DataCollatorForPointwisePreference` returns, the batch has what the processor makes of the images:
    `pixel_values`, and by model `image_grid_thw`, `mm_token_type_ids` `(B, T)` and others. Images stand in the order of
    the rows. A batch without an image has none of them but those of shape `(B, T)`.

    Rows with images have `prompt_text` (with placeholders, special tokens included), `prompt_images` (each a file's
    `bytes` or `path`, or a PIL image) and `completion_ids`; rows without have `prompt_ids` and `completion_ids`.

    Args:
        processor: of the model.

    Raises:
        ValueError: for truncation_mode="keep_end" with a `max_length`; for a row whose prompt alone fills `max_length`,
            or that the processor can not take.

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
                "truncation_mode='keep_end' would cut off the images, which stand in the prompt. Use 'keep_start', or "
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
        """(what the processor makes of rows with images, the names of what it says of each token)."""
        if not rows:
            return {}, self._kinds_of_tokens
        try:
            made = self._processed(
                text=[row["prompt_text"] for row in rows],
                images=[[_decoded(image) for image in row["prompt_images"]] for row in rows],
            )
        except Exception as error:  # a processor is a program
            at = ", ".join(str(row.get("row", "?")) for row in rows)
            raise ValueError(
                f"The processor fails on a batch with the rows {at} ({type(error).__name__}: {error}). Look at their "
                "images and placeholders."
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
                f"Row {example.get('row', '?')}: its prompt has {tokens} tokens with its images', which fills "
                f"max_length={self.max_length}. Raise max_length (None cuts nothing), let the processor make images "
                "smaller, or drop the row."
            )


def _decoded(image: Any) -> Any:
    """An image that is stored as bytes or a path; `datasets` itself decodes the first of a list twice."""
    return datasets.Image().decode_example(image) if isinstance(image, dict) else image


def _per_token(made: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name, value in made.items()
        if name.endswith("token_type_ids") and value.shape == made["input_ids"].shape
    ]
