"""Worker processes under signals: they serve on while the run decides, and are gone when it is."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")

RUN = '''
"""A run: eight quick steps, and one that its worker is stuck in reading; it says what it is at on stdout."""

import multiprocessing, os, signal, sys, time

LOADER, CONTEXT = sys.argv[1:]


def say(text):
    """In one piece, where `print` may write several, and those of another process in between."""
    os.write(1, f"{text}\\n".encode())


class Steps:
    """As much of a StepDataset as a loader needs."""

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
    received = set()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: received.add(number))
    loader = make_loader()
    say("ready")
    steps = iter(loader)
    read = [next(steps) for _ in range(8)]
    say(f"steps {len(read)} signals {len(received)}")
    if input() == "terminate":
        (worker,) = multiprocessing.active_children()
        worker.terminate()
        worker.join(60)
        say(f"exit code {worker.exitcode}")
        os._exit(0)


if __name__ == "__main__":
    main()
'''


@pytest.fixture
def errors(tmp_path):
    """What a run and its workers say of their troubles: a file, as a pipe would be open until the last has ended."""
    return tmp_path / "stderr.txt"


@pytest.fixture
def start(tmp_path, errors):
    """Starts a run, in a process group of its own, and waits until signals do not kill it; ends what is left of it."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    runs = []

    def begin(loader_type: str, context: str) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, str(script), loader_type, context]
        pipe = subprocess.PIPE
        with open(errors, "w") as stderr:
            run = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=stderr, text=True, env=environment, start_new_session=True
            )
        runs.append(run)
        assert run.stdout.readline() == "ready\n", errors.read_text()
        return run

    yield begin
    for run in runs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()


@contextlib.contextmanager
def hail(run: subprocess.Popen[str]) -> Iterator[None]:
    """Signals to all processes of a run, many times a second."""
    over = threading.Event()

    def throw() -> None:
        while not over.wait(0.02) and run.poll() is None:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(run.pid, number)

    thread = threading.Thread(target=throw)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def stuck_worker(run: subprocess.Popen[str], num_signals: int) -> int:
    """Waits for the eight steps, during which so many kinds of signals came, and for the worker to be stuck."""
    lines = sorted([run.stdout.readline(), run.stdout.readline()])  # the worker reads ahead: in any order
    reading = re.fullmatch(r"reading (\d+)\n", lines[0])
    assert reading and lines[1] == f"steps 8 signals {num_signals}\n", lines
    return int(reading[1])


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"  # a dead one that nobody has asked for yet


def is_gone_within(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_running(pid)


@pytest.mark.parametrize(
    "context", ["fork", *(pytest.param(each, marks=pytest.mark.slow) for each in ("spawn", "forkserver"))]
)
def test_workers_serve_on_under_signals_and_do_not_outlive_a_killed_run(start, context):
    run = start("step", context)
    with hail(run):
        pid = stuck_worker(run, num_signals=3)
        time.sleep(0.5)
    assert is_running(pid)
    os.kill(run.pid, signal.SIGKILL)
    assert is_gone_within(pid, seconds=60)  # it takes one, on a machine with nothing else to do


def test_run_can_end_a_worker_that_is_stuck(start):
    run = start("step", "fork")
    stuck_worker(run, num_signals=0)
    print("terminate", file=run.stdin, flush=True)
    assert run.stdout.readline() == "exit code 0\n"


def test_plain_data_loader_dies_of_signals(start, errors):
    run = start("plain", "fork")
    with hail(run):
        assert run.stdout.readline() == ""
    assert "DataLoader worker" in errors.read_text()


def test_plain_data_loader_outlives_a_killed_run(start):
    run = start("plain", "fork")
    pid = stuck_worker(run, num_signals=0)
    os.kill(run.pid, signal.SIGKILL)
    try:
        assert not is_gone_within(pid, seconds=2)
    finally:
        os.kill(pid, signal.SIGKILL)


SPEAK = '''
"""Makes more speech than the test has time for, in two processes, which it names on stdout."""

import multiprocessing, threading, time

from dinosr_hf.data.synthetic import SyntheticCorpus


def name_workers():
    while len(workers := multiprocessing.active_children()) < 2:
        time.sleep(0.01)
    print(*(worker.pid for worker in workers), flush=True)


if __name__ == "__main__":
    threading.Thread(target=name_workers).start()
    SyntheticCorpus(num_utterances=100_000).to_dataset(num_proc=2)
'''


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 5.0], ids=["starting", "speaking"])
def test_speaking_processes_do_not_outlive_a_run_that_is_ended(tmp_path, after):
    script = tmp_path / "speak.py"
    script.write_text(SPEAK)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        pids = [int(pid) for pid in run.stdout.readline().split()]
        assert len(pids) == 2
        time.sleep(after)
        assert all(map(is_running, pids))
        run.terminate()
        assert run.wait(60) == -signal.SIGTERM
        assert all(is_gone_within(pid, seconds=60) for pid in pids)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
