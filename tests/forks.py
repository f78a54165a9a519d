"""
Run Python programs in forks of a process that has imported what takes seconds: torch, transformers, the package.

For programs that need none of it to be imported anew; what is read from the environment at import, such as
OMP_NUM_THREADS, is that of the tests. What huggingface_hub reads is read again.

This file, run as a program, is that process. All workers of a test run share it: the first that needs it starts it,
and it ends with the run. For each program it forks a keeper, which forks the program, and tells its end.
"""

import contextlib
import importlib
import os
import pickle
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

_PRELOADED = (
    *(f"dinosr_hf.{name}" for name in ("pretraining", "finetuning", "recognition", "units", "analysis", "hub.export")),
    *("datasets", "matplotlib.pyplot", "scipy.stats", "sklearn.cluster", "soundfile", "soxr"),
)


_ANSWER = struct.Struct("q")  # the number of a process, then its exit status
_MAX_SERVERS = 5  # that end at once, before something is wrong
_servers: list[subprocess.Popen] = []  # that this process has started


class _Request(NamedTuple):
    """The program that `python WORDS` would be, and its files as stdin, stdout and stderr."""

    words: list[str]
    environment: dict[str, str]
    work: str
    files: list[Path]
    is_new_session: bool


def _address(run: int) -> str:
    """Name of the socket of a test run, known to its first process, in the namespace that is no part of the disk."""
    return f"\0dinosr-forks-{run}"


def _serve(run: int) -> _Request:
    """Serve a test run; return in each fork that is to become a program, and nowhere else."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(_address(run))
    except OSError:  # another worker was first
        os._exit(0)
    listener.listen(64)
    import gc

    for name in _PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # what forks inherit is looked through by no collection, which would copy its memory
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        while not select.select([listener], [], [], 1)[0]:
            try:
                os.kill(run, 0)
            except ProcessLookupError:
                os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            break
        connection.close()
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = _Request(*pickle.load(connection.makefile("rb")))
    if (pid := os.fork()) == 0:
        connection.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return request
    with contextlib.suppress(BrokenPipeError):  # a test may end before its program
        connection.sendall(_ANSWER.pack(pid))
        connection.sendall(_ANSWER.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
    os._exit(0)


def _become(request: _Request) -> None:
    import huggingface_hub
    from transformers import dynamic_module_utils
    from transformers.utils import hub

    if request.is_new_session:
        os.setsid()
    for number, (file, flags) in enumerate(zip(request.files, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        os.dup2(os.open(file, flags), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request.environment)
    importlib.reload(huggingface_hub.constants)
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT
    if cache := request.environment.get("HF_MODULES_CACHE"):
        hub.HF_MODULES_CACHE = dynamic_module_utils.HF_MODULES_CACHE = cache
    os.chdir(request.work)
    sys.path[:0] = [path for path in request.environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    words = request.words
    sys.modules["__main__"] = ModuleType("__main__")
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    elif words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path.insert(0, os.path.dirname(words[0]))
        runpy.run_path(words[0], run_name="__main__")


def _exit_status(request: _Request) -> int:
    """Be the program, and return the status with which Python would end."""
    try:
        _become(request)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _connect() -> socket.socket:
    """Connect to the server of this test run, and start it first if there is none."""
    run = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    connection = socket.socket(socket.AF_UNIX)
    while True:
        try:
            connection.connect(_address(run))
            return connection
        except ConnectionRefusedError:
            if not _servers or _servers[-1].poll() is not None:
                if len(_servers) == _MAX_SERVERS:
                    raise
                _servers.append(subprocess.Popen([sys.executable, __file__, str(run)], stdin=subprocess.DEVNULL))
            time.sleep(0.01)


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
        environment = dict(os.environ if env is None else env)
        request = _Request([*map(str, words)], environment, str(cwd or os.getcwd()), files, new_session)
        self._connection = _connect()
        self._connection.sendall(pickle.dumps(tuple(request)))
        self._connection.shutdown(socket.SHUT_WR)
        self.pid = self._answer()
        self._exitcode: int | None = None

    def _answer(self) -> int:
        if len(answer := self._connection.recv(_ANSWER.size, socket.MSG_WAITALL)) < _ANSWER.size:
            raise RuntimeError("The process that forks programs has ended.")
        return _ANSWER.unpack(answer)[0]

    def _join(self, timeout: float) -> None:
        if self._exitcode is None and select.select([self._connection], [], [], timeout)[0]:
            self._exitcode = self._answer()
            self._connection.close()

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        self._join(0)
        return self._exitcode

    @property
    def is_running(self) -> bool:
        return self.returncode is None

    def wait(self, timeout: float = 280) -> subprocess.CompletedProcess:
        """Wait for its end, and return what it left; it is killed after so many seconds."""
        self._join(timeout)
        if self._exitcode is None:
            os.kill(self.pid, signal.SIGKILL)
            raise TimeoutError(f"The program did not end within {timeout} s: {self.stderr.read_text()[-3000:]}")
        with self._folder:
            output = [file.read_text(errors="replace") for file in (self.stdout, self.stderr)]
        return subprocess.CompletedProcess([], self._exitcode, *output)


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


if __name__ == "__main__":
    status = _exit_status(_serve(int(sys.argv[1])))
    threading._shutdown()  # waits for threads, as at the end of a program
    from multiprocessing import util

    util._exit_function()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
