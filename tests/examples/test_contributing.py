"""The worked examples of CONTRIBUTING.md: each change and its test run as they are printed."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(section: str) -> list[str]:
    """The change and the test of a section."""
    found = re.findall(r"```python\n(.*?)```", TEXT.split(f"### {section}\n")[1].split("\n### ")[0], re.S)
    assert len(found) == 2
    return found


def run_test(code: str, file: str) -> None:
    """Run the tests of a block in the module of the test file that it belongs to."""
    scope = {}
    if (ROOT / file).exists():
        spec = importlib.util.spec_from_file_location(f"copy_of_{Path(file).stem}", ROOT / file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        scope = vars(module)
    before = set(scope)
    exec(compile(code, "CONTRIBUTING.md", "exec"), scope)
    tests = [name for name in scope if name.startswith("test_") and name not in before]
    assert len(tests) == 1
    scope[tests[0]]()


def changed(name: str, monkeypatch, *, added: str = "", replaced: tuple[tuple[str, str], ...] = ()) -> ModuleType:
    """A module with code added at its end and text replaced, in the place of the real one."""
    spec = importlib.util.find_spec(name)
    source = Path(spec.origin).read_text(encoding="utf-8")
    for old, new in replaced:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    module = importlib.util.module_from_spec(spec)
    exec(compile(f"{source}\n\n{added}", name, "exec"), vars(module))
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_a_loss(monkeypatch):
    code, test = blocks("Add a loss")
    changed("trl_ulma.losses", monkeypatch, added=code)
    run_test(test, "tests/unit/test_losses.py")


def test_a_log_z_choice(monkeypatch):
    code, test = blocks("Add a log Z choice")
    changed("trl_ulma.log_partition", monkeypatch, added=code)
    run_test(test, "tests/unit/test_log_partition.py")


def test_a_dataset_family(monkeypatch):
    code, test = blocks("Add a dataset family")
    module = ModuleType("trl_ulma.data.reviews")
    exec(compile(code, "reviews.py", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, "trl_ulma.data.reviews", module)
    line = re.search(r"The line in `FAMILIES` is `(.+?)`", TEXT)[1]
    [(family, where)] = eval(f"{{{line}}}").items()
    monkeypatch.setitem(importlib.import_module("trl_ulma.data.adapters").FAMILIES, family, where)
    run_test(test, "tests/unit/test_data_families.py")


def test_a_judge(monkeypatch):
    code, test = blocks("Add a judge")
    judges = importlib.import_module("trl_ulma.evaluation.judges")
    scope = dict(vars(judges))
    exec(compile(code, "judges.py", "exec"), scope)
    monkeypatch.setattr(judges, "BrevityJudge", scope["BrevityJudge"], raising=False)
    run_test(test, "tests/unit/test_evaluation_judges.py")


def test_a_metric(monkeypatch):
    code, test = blocks("Add a metric")
    name = re.search(r'"(rewards/\w+)"', code)[1]
    figure = '        "kl": masked(log_ratio, known),\n'
    named = '    "rewards/mse",\n    "logps/chosen",\n'
    replaced = ((figure, code + figure), (named, f'    "{name}",\n{named}'))
    changed("trl_ulma.metrics", monkeypatch, replaced=replaced)
    run_test(test, "tests/unit/test_metrics.py")


def test_the_page_on_the_build_draws_and_counts_every_module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from count_lines import counts

    package = ROOT / "trl_ulma"
    assert sum(files for files, *_ in counts(package).values()) == len(list(package.rglob("*.py")))
    page = (ROOT / "docs" / "built.md").read_text(encoding="utf-8")
    drawn = page.split("## Imports")[1].split("```text")[1].split("```")[0].split()
    modules = {each.stem for each in package.iterdir() if each.suffix == ".py" or (each / "__init__.py").exists()}
    assert set(drawn) == modules - {"__init__", "__main__"}
