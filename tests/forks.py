"""
Run Python programs in forks of a process that has imported what takes seconds: torch, transformers, the package.

For programs that need none of it to be imported anew; what is read from the environment at import, such as
OMP_NUM_THREADS, is that of the tests. What huggingface_hub reads is read again.
"""

import gc
import importlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *(
            f"dinosr_hf.{room}"
            for room in ("pretraining", "finetuning", "recognition", "units", "analysis", "hub.export")
        ),
        *("datasets", "matplotlib.pyplot", "scipy.stats", "sklearn.cluster", "soundfile", "soxr"),
    ]
)


def _become(
    words: Sequence[str], environment: Mapping[str, str], work: str, files: Sequence[Path], is_new_session: bool
) -> None:
    """Be the program that `python WORDS` would be, with these files as stdin, stdout and stderr."""
    gc.freeze()  # what the fork inherits is looked through by no collection, which would copy its memory
    multiprocessing.set_start_method(None, force=True)  # that of Python, not the one that this fork was made by
    if is_new_session:
        os.setsid()
    for number, (file, flags) in enumerate(zip(files, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        os.dup2(os.open(file, flags), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(huggingface_hub.constants)
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT
    os.chdir(work)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path.insert(0, os.path.dirname(words[0]))
        runpy.run_path(words[0], run_name="__main__")


class Program:
    """
    A running program, as `subprocess.Popen` has them.

    Attributes:
        pid: Its process.
        stdout, stderr: Files that it writes to.
    """

    def __init__(
        self,
        words: Sequence[Any],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Any = None,
        text: str = "",
        new_session: bool = False,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        files = [Path(self._folder.name, name) for name in ("stdin", "stdout", "stderr")]
        for file in files:
            file.write_text(text if file.name == "stdin" else "")
        self.stdout, self.stderr = files[1:]
        arguments = ([*map(str, words)], dict(os.environ if env is None else env), str(cwd or os.getcwd()), files)
        self._process = _CONTEXT.Process(target=_become, args=(*arguments, new_session))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    @property
    def is_running(self) -> bool:
        return self.returncode is None

    def wait(self, timeout: float = 280) -> subprocess.CompletedProcess:
        """Wait for its end, and return what it left; it is killed after so many seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"The program did not end within {timeout} s: {self.stderr.read_text()[-3000:]}")
        with self._folder:
            output = [file.read_text(errors="replace") for file in (self.stdout, self.stderr)]
        return subprocess.CompletedProcess([], self._process.exitcode, *output)


def run_in_processes(
    num_processes: int, words: Sequence[Any], *, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """
    Run a program in several processes on the CPU, told of each other as torchrun and `accelerate launch` tell them.

    Returns the exit status of the first that failed, or 0, and the output of all.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**(os.environ if env is None else env), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": str(num_processes)}
    shared["LOCAL_WORLD_SIZE"] = shared["WORLD_SIZE"]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
    programs = [Program(words, env=shared | rank) for rank in ranks]
    ends = [program.wait() for program in programs]
    output = ["".join(getattr(end, name) for end in ends) for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess([], next((end.returncode for end in ends if end.returncode), 0), *output)


def run(words: Sequence[Any], *, timeout: float = 280, **options: Any) -> subprocess.CompletedProcess:
    """Run `python WORDS`, with the options of `Program`, and return its exit status and output."""
    return Program(words, **options).wait(timeout)
