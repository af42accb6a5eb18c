"""Files that are there as a whole or not at all, and settings as they are kept in them."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any


def write(file: Path, value: Any) -> None:
    """JSON in a file that is there as a whole or not at all.

    Raises:
        ValueError: for a number that is not finite.
    """
    part = file.with_name(f"{file.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=asdict)
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, file)


def load(file: Path) -> Any:
    """What `write` has written."""
    return json.loads(file.read_text(encoding="utf-8"))


def public(value: Any) -> Any:
    """Settings as they are stored: files and folders of this machine by their names alone."""
    if isinstance(value, dict):
        return {name: public(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [public(each) for each in value]
    is_here = isinstance(value, str) and os.sep in value and Path(value).expanduser().exists()
    return Path(value).name if is_here else value


def differing(stored: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """The settings that are others than the stored ones; one that is None is as one that was not there yet."""
    before, now = _set(public(stored)), _set(public(settings))
    return [name for name in before | now if before.get(name) != now.get(name)]


def as_number(value: Any) -> Any:
    """A text that is a number as that number, since YAML reads 3e-4 as a text; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _set(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _set(each) for name, each in value.items() if each is not None}
    return [_set(each) for each in value] if isinstance(value, list) else as_number(value)
