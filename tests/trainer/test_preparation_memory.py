"""Preparing many rows takes no more memory than preparing few, and is not done twice."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from trl_ulma.labels import LabelRules
from trl_ulma.rows.preparation import Preparation

PREPARE = textwrap.dedent(
    """
    import sys, threading
    import psutil
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl_ulma.labels import LabelRules
    from trl_ulma.rows.preparation import Preparation

    peak, done = 0, threading.Event()

    def watch():
        global peak
        while not done.wait(0.02):
            memory = psutil.Process().memory_info()
            peak = max(peak, memory.rss - memory.shared)

    watcher = threading.Thread(target=watch)
    watcher.start()
    rows, tokenizer = Dataset.load_from_disk(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[2])
    prepared = Preparation(tokenizer, LabelRules(), 1024)(rows, "train")
    assert len(prepared) == len(rows)
    done.set()
    watcher.join()
    print(peak)
    """
)


def on_disk(folder: Path, number: int, words: int = 40) -> Dataset:
    """Rows in a file, as long as those of HH where `words` is 100."""

    def rows():
        for i in range(number):
            prompt = f"question {i} " + "why and how is it so? " * (words // 6)
            yield {"prompt": prompt, "completion": f" answer {i} " + "so it is. " * (words // 8), "label": i % 2}

    made = Dataset.from_generator(rows, cache_dir=str(folder / f"cache-{number}"))
    made.save_to_disk(folder / f"rows-{number}")
    return Dataset.load_from_disk(folder / f"rows-{number}")


def peak(folder: Path, number: int, model: str, **kwargs) -> int:
    """Bytes that a process that prepares `number` rows holds at its largest.

    Pages of the mapped Arrow files are not counted: they are the system's cache, and given back when memory is short.
    """
    on_disk(folder, number, **kwargs)
    command = [sys.executable, "-c", PREPARE, str(folder / f"rows-{number}"), model]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def test_memory_does_not_grow_with_the_rows(tiny_gpt2, tmp_path):
    few, many = peak(tmp_path, 2_000, tiny_gpt2), peak(tmp_path, 16_000, tiny_gpt2)
    assert many - few < 0.2 * few


@pytest.mark.slow
def test_memory_is_flat_to_320_000_rows(tiny_gpt2, tmp_path):
    few, many = (peak(tmp_path, n, tiny_gpt2, words=100) for n in (20_000, 320_000))
    assert many - few < 0.15 * few


def test_a_second_start_reads_what_the_first_wrote(tiny_gpt2, tmp_path):
    rows, tokenizer = on_disk(tmp_path, 4_000), AutoTokenizer.from_pretrained(tiny_gpt2)

    def cached(tokenizer=tokenizer, **kwargs) -> list[str]:
        prepared = Preparation(tokenizer, LabelRules(), **{"max_length": 256} | kwargs)(rows, "train")
        return [file["filename"] for file in prepared.cache_files]

    first = cached()
    written = [Path(file).stat().st_mtime_ns for file in first]
    # A loaded tokenizer that has been used meanwhile is the same one
    other = AutoTokenizer.from_pretrained(tiny_gpt2)
    other(["some text", "more"], padding=True, truncation=True, max_length=8)
    assert cached(other) == first
    assert [Path(file).stat().st_mtime_ns for file in first] == written
    assert cached(max_length=255) != first
    other.chat_template = "another"
    assert cached(other) != first
