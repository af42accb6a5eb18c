"""Flip the sign of each term of each loss, one at a time, and name the test that notices.

    python tests/support/flip_signs.py

Every flip is made in a copy of the package in a temporary folder and tried with `test_losses.py`: the first test that
fails is printed beside it. Exit status 1 if some flip survives. The terms are found in the syntax tree of `losses.py`:

- a unary minus is dropped;
- a binary + becomes −, and a binary − becomes +;
- the argument of a `logsigmoid` or `sigmoid` is negated;
- an arithmetic expression is negated at its start, which flips the first term of a sum and the only one of a product.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "trl_ulma"
TESTS = HERE.parent / "unit" / "test_losses.py"

# Flips that cannot change any result, with the reason: (source before, source after) -> why. There are none.
EQUIVALENT: dict[tuple[str, str], str] = {}

# Fails the run unless the package under test is the copy next to it.
CONFTEST = """
from pathlib import Path
import trl_ulma.losses
assert Path(trl_ulma.losses.__file__).resolve().parent.parent == Path(__file__).resolve().parent
"""


class Flip(NamedTuple):
    function: str
    line: int
    start: int
    """Byte offset in the file of what is replaced."""
    stop: int
    replacement: bytes


def find_flips(source: bytes) -> list[Flip]:
    """Every sign of every function, in the order of the file; two ways to the same new source count once."""
    starts = [0]
    for row in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(row))

    def span(node: ast.expr) -> tuple[int, int]:
        stop = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        return starts[node.lineno - 1] + node.col_offset, stop

    def flips_of(function: ast.FunctionDef) -> Iterator[Flip]:
        inner = set()  # expressions whose first term belongs to the expression around them
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
                inner |= {node.left, node.right}
                between = source[span(node.left)[1] : span(node.right)[0]]
                old, new = (b"+", b"-") if isinstance(node.op, ast.Add) else (b"-", b"+")
                at = span(node.left)[1] + between.index(old)
                yield Flip(function.name, node.lineno, at, at + 1, new)
                first = node.left
                if not (isinstance(first, ast.BinOp) and isinstance(first.op, ast.Add | ast.Sub)):
                    yield from negated(function, first)
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Div | ast.Pow):
                inner |= {node.left, node.right}
                if node not in inner:
                    yield from negated(function, node)
            elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
                start = span(node)[0]
                yield Flip(function.name, node.lineno, start, start + 1, b"")
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("sigmoid"):
                yield from negated(function, node.args[0])

    def negated(function: ast.FunctionDef, node: ast.expr) -> Iterator[Flip]:
        start, stop = span(node)
        if not source[start:stop].startswith(b"-"):  # there, dropping the minus is the same flip
            a_sum = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub)
            left, right = (b"(-(", b"))") if a_sum else (b"(-", b")")
            yield Flip(function.name, node.lineno, start, stop, left + source[start:stop] + right)

    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    flips = {(flip.start, flip.stop): flip for function in functions for flip in flips_of(function)}
    return [flips[key] for key in sorted(flips)]


def first_failure(losses: bytes) -> str | None:
    """The first test that fails where `losses.py` reads `losses`, or None if all pass."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(PACKAGE, folder / "trl_ulma", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "trl_ulma" / "losses.py").write_bytes(losses)
        (folder / "conftest.py").write_text(CONFTEST)
        (folder / "pytest.ini").write_text("[pytest]\n")  # not the project's own, which may point at the original
        for test in (HERE / "oracle.py", TESTS):
            shutil.copy(test, folder)
        command = [sys.executable, "-m", "pytest", "test_losses.py", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
        settings = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        settings |= {"TRL_ULMA_FEW_EXAMPLES": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
        run = subprocess.run(command, cwd=folder, env=os.environ | settings, capture_output=True, text=True)
    if run.returncode == 0:
        return None
    failed = re.search(r"^FAILED test_losses\.py::(\S+)", run.stdout, re.MULTILINE)
    if run.returncode != 1 or failed is None:
        sys.exit(f"pytest did not run as it should (exit status {run.returncode}):\n{run.stdout}{run.stderr}")
    return failed[1]


def main() -> None:
    source = (PACKAGE / "losses.py").read_bytes()
    failure = first_failure(source)
    if failure is not None:
        sys.exit(f"{failure} fails on the losses as they are: flips would tell nothing.")
    survivors, flips = 0, find_flips(source)
    for flip in flips:
        mutant = source[: flip.start] + flip.replacement + source[flip.stop :]
        ast.parse(mutant)
        before, after = source.decode().splitlines()[flip.line - 1], mutant.decode().splitlines()[flip.line - 1]
        before, after = before.strip(), after.strip()
        if (before, after) in EQUIVALENT:
            verdict = f"left out: {EQUIVALENT[before, after]}"
        else:
            failure = first_failure(mutant)
            survivors += failure is None
            verdict = failure or "SURVIVES"
        print(f"{flip.function}, line {flip.line}\n    {before}\n  → {after}\n    {verdict}", flush=True)
    print(f"{len(flips)} flips, {survivors} not noticed")
    sys.exit(1 if survivors or not flips else 0)


if __name__ == "__main__":
    main()
