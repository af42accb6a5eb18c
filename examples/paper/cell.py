"""python examples/paper/cell.py FOLDER train measure

Does one cell whose settings are in FOLDER/settings.json: trains its stages, each from its last whole checkpoint on, and
measures the model that came out. `reproduce.py` calls it; on several GPUs, trains by `accelerate launch`.
"""

import os
import sys
from pathlib import Path
from typing import Any

import measuring
import stages
from stored import differing, load, public, write

from trl_ulma.evaluation.report import commit


def train(folder: Path) -> None:
    """Train the stages that are not trained yet; each leaves its model in a folder and its log in a file."""
    job = load(folder / "settings.json")
    scorer = None
    for number, stage in enumerate(job["settings"]["stages"], start=1):
        name = f"{number}-{stage['trainer']}"
        if not (folder / f"{name}.json").exists():
            found = stages.run(stage["trainer"], folder / f"{name}.yaml", scorer)
            if int(os.environ.get("RANK", "0")) == 0:
                write(folder / f"{name}.json", found)
        scorer = folder / name


def measure(folder: Path) -> None:
    """Measure the last stage's model, or the untrained one, and write the cell's record."""
    job = load(folder / "settings.json")
    settings, record = job["settings"], Path(job["record"])
    names = [f"{number}-{stage['trainer']}" for number, stage in enumerate(settings["stages"], start=1)]
    source = str(folder / names[-1]) if names else settings["model"]
    reference = load(Path(job["reference"]))["measured"] if job["reference"] else None
    measured = measuring.measure(source, Path(job["test"]), settings, folder / "answers.jsonl", reference)
    trained = [load(folder / f"{name}.json") for name in names]
    write(
        record,
        {
            "cell": settings["cell"],
            "settings": public(settings),
            "rows": public(job["rows"]),
            "trained": trained,
            "measured": measured,
            "judged": {},
            "versions": stages.versions(),
            "commit": commit(),
            "hardware": stages.hardware(),
        },
    )


def prepare(folder: Path, job: dict[str, Any], rows: Path) -> None:
    """Write a cell's settings, and its stages' as YAML files, which are parsed at once.

    Raises:
        ValueError: where the folder holds another cell's.
    """
    file = folder / "settings.json"
    if file.exists() and differing(load(file)["settings"], job["settings"]):
        differ = differing(load(file)["settings"], job["settings"])
        raise ValueError(f"{folder} was begun with other settings ({', '.join(differ)}). Choose another --output.")
    for number, stage in enumerate(job["settings"]["stages"], start=1):
        name = f"{number}-{stage['trainer']}"
        stages.write_options(stage, folder / f"{name}.yaml", rows, folder / name)
        stages.parse(stage["trainer"], folder / f"{name}.yaml")
    write(file, job)


if __name__ == "__main__":
    try:
        for what in sys.argv[2:]:
            {"train": train, "measure": measure}[what](Path(sys.argv[1]))
    except stages.Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)
