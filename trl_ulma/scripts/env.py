"""Shows installed versions, devices, and known incompatibilities.

    trl-ulma env
    trl-ulma env --json

The exit code is 1 if there is an incompatibility. Paste the output into bug reports.
"""

import argparse
import importlib
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from trl_ulma.scripts.command_line import CommandParser, add_verbose

NAME = "trl-ulma"
NEEDED = ("trl", "transformers", "torch", "accelerate", "datasets", "peft", "tokenizers", "huggingface_hub", "numpy")
OPTIONAL = ("bitsandbytes", "deepspeed", "flash-attn", "liger-kernel", "openai", "matplotlib", "tensorboard", "trackio")
# Frameworks and platforms, and how to use this package with them
FRAMEWORKS = {
    "axolotl": "use the plugin trl_ulma.integrations.axolotl.PointwisePlugin, see docs/frameworks.md",
    "ms_swift": "its YAML does not support these trainers: train with trl-ulma or in Python in this environment",
    "unsloth": "import unsloth before trl_ulma; its patched trainers have not been tested",
    "vllm": "sample answers with trl-ulma evaluate --model served:MODEL --server_url http://localhost:8000/v1",
    "google-colab": "a T4 has no bfloat16: train with --bf16 False --fp16 True",
}
# Compiled packages. Only an import shows whether they fit torch and the driver.
COMPILED = {"bitsandbytes": "bitsandbytes", "deepspeed": "deepspeed", "flash-attn": "flash_attn"}


def make_parser(prog: str = "trl-ulma env") -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = CommandParser(
        prog=prog,
        description="Show installed versions, devices, and known incompatibilities.",
    )
    add_verbose(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the environment. Returns the exit code: 1 if there is an incompatibility."""
    args = make_parser().parse_args(argv)
    facts = gather()
    found = problems(facts)
    print(
        json.dumps({**facts, "problems": found, "limits": limits(facts["packages"])}, indent=2)
        if args.json
        else render(facts, found)
    )
    return 1 if found else 0


def gather() -> dict[str, Any]:
    """The installed versions and the devices, as values for JSON."""
    import psutil
    import torch

    packages = {name: _version(name) for name in (NAME, *NEEDED, *OPTIONAL)}
    broken = {}
    for name, module in COMPILED.items():
        if packages[name] is not None:
            try:
                importlib.import_module(module)
            except Exception as problem:
                broken[name] = f"{type(problem).__name__}: {problem}".splitlines()[0]
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": packages,
        "broken": broken,
        "frameworks": {name: there for name in FRAMEWORKS if (there := _version(name)) is not None},
        "requirements": list(requires(NAME) or []),
        "torch_is_built_for": f"CUDA {torch.version.cuda}" if torch.version.cuda else torch.version.hip or "CPU",
        "has_nvidia_driver": shutil.which("nvidia-smi") is not None,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "devices": _devices(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    import torch

    if torch.backends.mps.is_available():
        return [{"name": "Apple GPU (MPS)", "memory_gib": None, "has_bf16": True}]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                # TRL's trainers use bf16 by default. Older GPUs emulate it, which is slow.
                "has_bf16": torch.version.hip is not None or properties.major >= 8,
            }
        )
    return found


def problems(facts: Mapping[str, Any]) -> list[str]:
    """Messages about incompatibilities, with what to do about each.

    Args:
        facts: the result of `gather`.

    Example:
        >>> facts = {"packages": {"trl": "0.9"}, "requirements": ["trl<2,>=1.16"], "broken": {}, "devices": [],
        ...          "has_nvidia_driver": False, "torch_is_built_for": "CPU"}
        >>> problems(facts)
        ['trl 0.9 is installed, and trl>=1.16,<2 is needed: pip install "trl>=1.16,<2"']
    """
    from packaging.requirements import Requirement

    found, packages = [], facts["packages"]
    for requirement in map(Requirement, facts["requirements"]):
        there = packages.get(requirement.name)
        if there is not None and not requirement.specifier.contains(there, prereleases=True):
            # The lower bound first
            bounds = ",".join(sorted(map(str, requirement.specifier), reverse=True))
            wanted = f"{requirement.name}{bounds}"
            found.append(f'{requirement.name} {there} is installed, and {wanted} is needed: pip install "{wanted}"')
    found += [
        f"{name} cannot be imported ({problem}): reinstall it for this torch, or pip uninstall {name}"
        for name, problem in facts["broken"].items()
    ]
    if facts["has_nvidia_driver"] and not facts["devices"]:
        found.append(
            f"There is an NVIDIA driver, but torch is built for {facts['torch_is_built_for']} and sees no GPU: install "
            "a build of torch for this driver's CUDA (https://pytorch.org/get-started/locally)"
        )
    found += [
        f"{device['name']} has no bfloat16, TRL's default: train with --bf16 False --fp16 True"
        for device in facts["devices"]
        if not device["has_bf16"]
    ]
    return found


# (package, first version without the limit, what does not work before it)
LIMITS = (
    ("transformers", "5.15", "Dbrx and Zamba2 fail in their own forward, and Qwen2-VL fails on texts after images"),
    ("transformers", "5.15", "transformers serve cannot sample from prompts that are plain text"),
    ("transformers", "5.19", "Dbrx, Doge and GraniteMoe are trained without their load-balancing loss"),
    ("transformers", "5.19", "the log-probabilities of Doge depend on padding"),
    ("peft", "0.20", "an adapter with target_parameters cannot be trained on without a ref_model"),
    ("trl", "1.15", "an adapter with target_parameters may need a ref_model to be trained on"),
    ("accelerate", "1.6", "there is no FSDP2, and accelerate launch runs FSDP1 instead"),
    ("transformers", "5.19", "a training of several processes on CPUs cannot be resumed"),
)


def limits(packages: Mapping[str, str | None]) -> list[str]:
    """What does not work with the installed versions, and which versions to install instead.

    Example:
        >>> limits({"transformers": "5.16.1", "peft": "0.21.2"})[1]
        'transformers 5.16.1: the log-probabilities of Doge depend on padding (install 5.19 or newer)'
    """
    from packaging.version import Version

    return [
        f"{name} {there}: {what} (install {first} or newer)"
        for name, first, what in LIMITS
        if (there := packages.get(name)) is not None and Version(there) < Version(first)
    ]


def render(facts: Mapping[str, Any], found: Sequence[str]) -> str:
    """The facts as text."""
    packages = facts["packages"]
    known = limits(packages)
    devices = ", ".join(_named(device) for device in facts["devices"]) or "none: training runs on the CPU"
    lines = [
        f"{NAME:<16} {packages[NAME] or 'not installed'}",
        f"{'python':<16} {facts['python']}",
        f"{'platform':<16} {facts['platform']}",
        f"{'cores, memory':<16} {facts['cores']}, {facts['memory_gib']} GiB",
        f"{'GPUs':<16} {devices}",
        *(f"{name:<16} {packages[name] or 'not installed'}" for name in (*NEEDED, *OPTIONAL)),
        *(f"{name:<16} {there}: {FRAMEWORKS[name]}" for name, there in facts["frameworks"].items()),
        f"{'torch is for':<16} {facts['torch_is_built_for']}",
        "",
        *(f"! {problem}" for problem in found),
        *(f"- {limit}" for limit in known),
    ]
    if found:
        return "\n".join(lines)
    return "\n".join([*lines, "Everything else is known to work." if known else "No known incompatibilities."])


def _named(device: Mapping[str, Any]) -> str:
    return device["name"] if device["memory_gib"] is None else f"{device['name']} ({device['memory_gib']} GiB)"


if __name__ == "__main__":
    raise SystemExit(main())
