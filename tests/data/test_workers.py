"""Worker processes and signals: they ignore those meant for the run, and exit with it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import forks
from light_imports import LIGHT_IMPORTS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")

RUN = '''
"""A run of eight quick steps, and one whose worker hangs while reading; it reports its progress on stdout."""

import multiprocessing, os, signal, sys, time

LOADER, CONTEXT = sys.argv[1:]


def say(text):
    """Write a line at once; with `print`, output of another process might come in between."""
    os.write(1, f"{text}\\n".encode())


class Steps:
    """The part of a StepDataset that a loader needs."""

    def __len__(self):
        return 9

    def micro_batches(self, step):
        return [[step]]

    def read(self, piece):
        if piece == [8]:
            say(f"reading {os.getpid()}")
            time.sleep(600)
        time.sleep(0.05)
        return piece

    def __getitem__(self, step):
        return [self.read(piece) for piece in self.micro_batches(step)]


def make_loader():
    if LOADER == "plain":
        from torch.utils.data import DataLoader

        return DataLoader(Steps(), batch_size=None, num_workers=1, multiprocessing_context=CONTEXT)
    from dinosr_hf.data import StepLoader

    return StepLoader(Steps(), num_workers=1, multiprocessing_context=CONTEXT)


def main():
    received, asked = set(), []
    signal.signal(signal.SIGUSR2, lambda number, frame: asked.append(number))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: received.add(number))
    loader = make_loader()
    say("ready")
    steps = iter(loader)
    read = [next(steps) for _ in range(8)]
    say(f"steps {len(read)} signals {len(received)}")
    while not asked:
        time.sleep(0.01)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(60)
    say(f"exit code {worker.exitcode}")
    os._exit(0)


if __name__ == "__main__":
    main()
'''


class Run(forks.Program):
    """A program in a process group of its own, whose lines are read as it prints them."""

    num_read = 0

    def line(self) -> str:
        """Wait for the next line; empty if there is none and the program has ended."""
        while True:
            was_running = self.is_running
            lines = self.stdout.read_text().splitlines(keepends=True)[self.num_read :]
            if lines and lines[0].endswith("\n"):
                self.num_read += 1
                return lines[0]
            if not was_running:
                return ""
            time.sleep(0.01)


@pytest.fixture
def start(tmp_path):
    """Return a function that starts Python code as a program; what is left of its group is killed at the end."""
    runs = []

    def begin(code: str, *words: str) -> Run:
        script = tmp_path / "run.py"
        script.write_text(code)
        runs.append(Run([script, *words], new_session=True))
        return runs[-1]

    yield begin
    for run in runs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def start_steps(start, *words: str) -> Run:
    """Start a run of steps, and wait until signals do not kill it."""
    run = start(RUN, *words)
    assert run.line() == "ready\n", run.stderr.read_text()
    return run


@contextlib.contextmanager
def send_signals(run: Run) -> Iterator[None]:
    """Send signals to all processes of a run, many times a second."""
    over = threading.Event()

    def send() -> None:
        while not over.wait(0.02):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(run.pid, number)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def stuck_worker(run: Run, num_signals: int) -> int:
    """Wait for the eight steps and `num_signals` kinds of signals; return the process id of the stuck worker."""
    lines = sorted([run.line(), run.line()])  # the worker reads ahead: in any order
    reading = re.fullmatch(r"reading (\d+)\n", lines[0])
    assert reading and lines[1] == f"steps 8 signals {num_signals}\n", lines
    return int(reading[1])


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"  # zombie or dead


def is_gone_within(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_running(pid)


@pytest.mark.parametrize(
    "context", ["fork", *(pytest.param(each, marks=pytest.mark.slow) for each in ("spawn", "forkserver"))]
)
def test_workers_ignore_signals_and_exit_with_a_killed_run(start, context):
    run = start_steps(start, "step", context)
    with send_signals(run):
        pid = stuck_worker(run, num_signals=3)
        time.sleep(0.5)
    assert is_running(pid)
    os.kill(run.pid, signal.SIGKILL)
    assert is_gone_within(pid, seconds=60)  # one second on an idle machine


def test_run_can_terminate_a_stuck_worker(start):
    run = start_steps(start, "step", "fork")
    stuck_worker(run, num_signals=0)
    os.kill(run.pid, signal.SIGUSR2)
    assert run.line() == "exit code 0\n"


def test_plain_data_loader_is_killed_by_signals(start):
    run = start_steps(start, "plain", "fork")
    with send_signals(run):
        assert run.line() == ""
    assert "DataLoader worker" in run.stderr.read_text()


def test_plain_data_loader_outlives_a_killed_run(start):
    run = start_steps(start, "plain", "fork")
    pid = stuck_worker(run, num_signals=0)
    os.kill(run.pid, signal.SIGKILL)
    try:
        assert not is_gone_within(pid, seconds=2)
    finally:
        os.kill(pid, signal.SIGKILL)


SPEAK = f"""
# Makes more speech than the test has time for, in two processes, whose ids are printed.
{LIGHT_IMPORTS}
import multiprocessing, threading, time


def print_workers():
    while len(workers := multiprocessing.active_children()) < 2:
        time.sleep(0.01)
    print(*(worker.pid for worker in workers), flush=True)


if __name__ == "__main__":
    threading.Thread(target=print_workers).start()
    SyntheticCorpus(num_utterances=100_000).to_dataset(num_proc=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 2.0], ids=["starting", "speaking"])
def test_synthesis_workers_exit_with_a_terminated_run(start, after):
    run = start(SPEAK)
    pids = [int(pid) for pid in run.line().split()]
    assert len(pids) == 2
    time.sleep(after)
    assert all(map(is_running, pids))
    os.kill(run.pid, signal.SIGTERM)
    assert run.line() == "" and run.returncode == -signal.SIGTERM
    assert all(is_gone_within(pid, seconds=60) for pid in pids)
