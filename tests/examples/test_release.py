"""What is released holds what it needs, and says of itself what is true."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import trl_ulma
from trl_ulma import __version__

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist, made of a copy of the files that belong to the project."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", out, ROOT], check=True, capture_output=True)
    return out


def files(*names: str) -> set[str]:
    return {
        str(file.relative_to(ROOT))
        for name in names
        for file in (ROOT / name).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_the_wheel_holds_the_package_whole_and_nothing_else(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == files("trl_ulma")


def test_the_sdist_holds_what_its_tests_need(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        held = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert files("trl_ulma", "tests", "examples") <= held
    assert {"README.md", "constraints.txt", "setup.cfg", ".ci/run", "LICENSE"} <= held


def test_the_citation_names_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__
    assert len(cited["preferred-citation"]["authors"]) == 6
    assert re.search(rf"^## {re.escape(__version__)} ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_workflows_run_what_the_checkout_runs():
    runs = {}
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(file.read_text())["jobs"].values()
        runs[file.stem] = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    assert runs["ci"] == [".ci/run"]
    for commands in runs.values():
        for command in commands:
            script = ROOT / command.removeprefix("pip install uv && ").split()[0]
            assert script.stat().st_mode & 0o111, f"{script} cannot be run"


def test_the_contributors_page_names_files_that_are_there():
    for place in re.findall(r"`(trl_ulma/[\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text()):
        assert (Path(trl_ulma.__file__).parents[1] / place).exists(), place
