"""A cache in a file of JSON lines, so that no work is done or paid for twice."""

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

from transformers.utils import logging

from trl_ulma.evaluation.refusals import Why

logger = logging.get_logger(__name__)


def digest(*parts: Any) -> str:
    """Return a key for values that JSON can hold.

    Example:
        >>> digest("model", {"a": 1, "b": 2}) == digest("model", {"b": 2, "a": 1})
        True
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class RecordFile:
    """Records by key. Each is one line of JSON, and is on disk when `add` returns.

    If a stopped run left the last line unfinished, the line is removed with a warning.

    Args:
        path: the file. It is created, with its folders, if it does not exist.
        resume: whether to read the records in the file. If not, they stay in the file, and new records override them.
        text: the key of the text, if records are replies, whose other keys are checked, too.

    Raises:
        ValueError: if a line of the file is not a record.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "records.jsonl"
        >>> RecordFile(path).add("k", {"answer": "Hello!"})
        >>> RecordFile(path).get("k")
        {'answer': 'Hello!'}
    """

    def __init__(self, path: Path, *, resume: bool = True, text: str | None = None):
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
                if text is not None and not _is_reply(record, text):
                    raise ValueError("it is no reply of this version")
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} holds no record in line {number} ({type(error).__name__}: {error}). Delete the file, or "
                    "that line; what is missing is made anew."
                ) from error

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> dict[str, Any] | None:
        """Return the record of a key, or None."""
        return self._records.get(key)

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Append a record. Threads can call this at the same time."""
        line = json.dumps({"key": key, **record}, ensure_ascii=True) + "\n"
        with self._lock:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
            self._records[key] = record


def _is_reply(record: dict[str, Any], text: str) -> bool:
    """Whether a record holds a reply, or why there is none."""
    if "refused" in record:
        return record["refused"] in list(Why)
    return isinstance(record.get(text), str) and isinstance(record.get("finished"), bool)
