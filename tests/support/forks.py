"""Processes without the seconds of their imports: forks of the test's own, which has imported torch and TRL already.

They are for what is not tested for how it starts. Each has its own output, environment, working directory and settings
of libraries, and leaves nothing in the test's process.
"""

import inspect
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from subprocess import CompletedProcess

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env

import trl_ulma

# accelerate 1.6 has added it
HAS_FSDP2 = "fsdp_version" in inspect.signature(FullyShardedDataParallelPlugin).parameters
FORK = multiprocessing.get_context("fork")


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def python_path() -> str:
    """A `PYTHONPATH` on which this package comes first, and then what the tests themselves are run with."""
    return os.pathsep.join(filter(None, [str(Path(trl_ulma.__file__).parents[1]), os.environ.get("PYTHONPATH")]))


def start(function: Callable[[], None], out: Path, err: Path, environment: dict[str, str], cwd: Path | None = None):
    """A fork that calls the function."""

    def child() -> None:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ.update(environment)
        if cwd is not None:
            os.chdir(cwd)
        # A trainer before this one has noted that there is one process
        AcceleratorState._reset_state(reset_partial_state=True)
        # Threads do not outlive a fork
        torch.set_num_threads(1)
        function()

    process = FORK.Process(target=child)
    process.start()
    return process


def start_module(name: str, *arguments: str, printed: Path):
    """A fork that does what `python -m name arguments` does."""

    def run() -> None:
        sys.argv = [name, *arguments]
        runpy.run_module(name, run_name="__main__")

    return start(run, printed, printed, {})


def run_script(
    script: Path,
    *arguments: str,
    cwd: Path | None = None,
    prepare: Callable[[], None] = lambda: None,
    seconds: float = 300,
) -> CompletedProcess:
    """What `python script arguments` comes to: exit code and output. `prepare` is called before it, in its process."""

    def run() -> None:
        prepare()
        sys.argv = [str(script), *arguments]
        sys.path.insert(0, str(script.parent))
        for file in script.parent.glob("*.py"):  # another folder's module may have the name
            sys.modules.pop(file.stem, None)
        runpy.run_path(str(script), run_name="__main__")

    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start(run, out, err, {}, cwd)
        process.join(seconds)
        process.kill()
        process.join()
        return CompletedProcess(sys.argv, process.exitcode, out.read_text(), err.read_text())


def run_processes(function: Callable[[], None], launch: list[str], printed: Path, seconds: float) -> int:
    """Call the function in as many processes as `accelerate launch` would start, with the variables that it would set.

    Without options it is called in one. Returns 0, or the exit code of the first process that fails. The others are
    killed then, and so are all that have not ended after the seconds.
    """
    environments: list[dict[str, str]] = [{}]
    if launch:
        arguments = launch_command_parser().parse_args([*launch, "--num_cpu_threads_per_process", "1", "script"])
        arguments.main_process_port = free_port()  # older versions of accelerate do not find one themselves
        shared = prepare_multi_gpu_env(arguments)
        size = str(arguments.num_processes)
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(arguments.main_process_port)}
        shared |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        environments = [
            shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(arguments.num_processes))
        ]
    processes = [start(function, printed, printed, environment) for environment in environments]
    end = time.monotonic() + seconds
    while not any(process.exitcode for process in processes) and time.monotonic() < end:
        running = [process.sentinel for process in processes if process.exitcode is None]
        if not running:
            return 0
        connection.wait(running, end - time.monotonic())
    failed = next((process.exitcode for process in processes if process.exitcode), None)
    for process in processes:
        process.kill()
        process.join()
    return failed if failed is not None else processes[0].exitcode
