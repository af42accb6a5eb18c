"""Counts the lines of two states of the package by area: all lines, and lines of code alone.

    git archive 43daa32 trl_ulma | tar -x -C OLD
    python docs/count_lines.py OLD/trl_ulma trl_ulma

A line of code is neither blank nor a comment nor part of a docstring.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

# Area → names of its files and folders, in either state
AREAS = {
    "trainer, settings, saved models": (
        *("trainer", "starting", "steps", "evaluating", "estimating", "training_plan", "training_reference", "logged"),
        *("objective", "log_z", "callbacks", "checkpoints", "judge", "saved", "model_card", "tracking", "config"),
        *("config_checks", "config_conversion", "presets", "versions", "main_process"),
        *("late_changes", "held_rows", "saved_names"),
        *("__init__", "__main__"),
    ),
    "likelihood": ("likelihood", "forward", "probe", "scoring", "reference"),
    "rows": ("rows", "collator", "encoding", "preparation", "left_out", "dataset_labels", "vision", "sampler"),
    "losses, log Z, metrics, labels": (
        *("losses", "log_partition", "metrics", "ranking", "predictions", "bootstrap", "labels"),
    ),
    "data": ("data",),
    "evaluation": ("evaluation",),
    "commands, integrations": ("scripts", "integrations"),
}
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(text: str) -> int:
    """How many lines of a module are code."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            docstring = node.body[0]
            found.difference_update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return len(found)


def counts(package: Path) -> dict[str, tuple[int, int, int]]:
    """Area → (files, lines, lines of code) of a package."""
    area_of = {name: area for area, names in AREAS.items() for name in names}
    found: dict[str, tuple[int, int, int]] = dict.fromkeys(AREAS, (0, 0, 0))
    for file in sorted(package.rglob("*.py")):
        # Before, log-probabilities of evaluations were computed apart
        first = "likelihood" if file.name == "logps.py" else file.relative_to(package).parts[0].removesuffix(".py")
        text = file.read_text(encoding="utf-8")
        files, lines, code = found[area_of[first]]
        found[area_of[first]] = (files + 1, lines + len(text.splitlines()), code + code_lines(text))
    return found


def _sum(found: dict[str, tuple[int, int, int]]) -> tuple[int, int, int]:
    files, lines, code = map(sum, zip(*found.values(), strict=True))
    return files, lines, code


def main() -> None:
    """Print a table in Markdown."""
    before, after = (counts(Path(folder)) for folder in sys.argv[1:3])
    print("| area | files | lines | lines of code |\n|---|---|---|---|")
    rows = [(area, before[area], after[area]) for area in AREAS]
    rows.append(("**all**", _sum(before), _sum(after)))
    for area, old, new in rows:
        print(f"| {area} | " + " | ".join(f"{a:,} → {b:,}" for a, b in zip(old, new, strict=True)) + " |")


if __name__ == "__main__":
    main()
