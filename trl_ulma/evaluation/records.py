"""Records under keys in a file of JSON lines, so that what is done once is not done, or paid for, again."""

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)


def digest(*parts: Any) -> str:
    """A key that follows from values that JSON can hold.

    Example:
        >>> digest("model", {"a": 1, "b": 2}) == digest("model", {"b": 2, "a": 1})
        True
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class RecordFile:
    """Records by key, each a line of JSON that is on disk when `add` returns.

    A last line that a stopped run left unfinished is cut off, with a warning.

    Args:
        path: the file; made, with its folders, where it is not there.
        resume: whether the records that it holds are read. Without, they stay in the file, and records that are added
            take their place.

    Raises:
        ValueError: where the file holds something else than such lines.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "records.jsonl"
        >>> RecordFile(path).add("k", {"answer": "Hello!"})
        >>> RecordFile(path).get("k")
        {'answer': 'Hello!'}
    """

    def __init__(self, path: Path, *, resume: bool = True):
        self.path = path
        self._lock = threading.Lock()
        self._records: dict[str, dict[str, Any]] = {}
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            return
        content = path.read_bytes()
        whole, _, torn = content.rpartition(b"\n")
        if torn:
            logger.warning(f"The last line of {path} is unfinished, as a stopped run leaves it, and is cut off.")
            with open(path, "r+b") as file:
                file.truncate(len(content) - len(torn))
        for number, line in enumerate(whole.splitlines() if resume else (), start=1):
            try:
                record = json.loads(line)
                self._records[record.pop("key")] = record
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} holds no record in line {number} ({type(error).__name__}: {error}). Delete the file, or "
                    "that line; what is missing is made anew."
                ) from error

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of a key, or None."""
        return self._records.get(key)

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Append a record; several threads may."""
        line = json.dumps({"key": key, **record}, ensure_ascii=True) + "\n"
        with self._lock:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
            self._records[key] = record
