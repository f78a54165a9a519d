"""Reading processes under signals: they serve on while the run decides, and are gone when it is."""

from __future__ import annotations

import contextlib
import os
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
"""A run: first an epoch, then another whose worker is stuck in reading; it says what it is at on stdout."""

import multiprocessing, os, signal, sys, threading, time
import numpy as np
from torch.utils.data import DataLoader
from dinosr_hf import DinoSRConfig
from dinosr_hf.data import PretrainingCollator, SpeechSource, StepDataset, StepLoader, Utterance, plan_epoch


class Noise(SpeechSource):
    def __init__(self, seconds):
        self.utterances = [Utterance(str(k), 8_000) for k in range(16)]
        self.seconds = seconds

    def load(self, index, start=0, num_samples=None):
        time.sleep(self.seconds)
        return np.random.default_rng(index).normal(size=num_samples).astype(np.float32)


def make_loader(loader_type, context, seconds):
    source = Noise(seconds)
    plan = plan_epoch([8_000] * 16, seed=0, epoch=0, step_samples=16_000, min_samples=1, max_samples=8_000)
    dataset = StepDataset(source, plan, PretrainingCollator(DinoSRConfig(), seed=0), 0, 1, 16_000)
    if loader_type == "plain":
        return DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context=context)
    return StepLoader(dataset, num_workers=1, multiprocessing_context=context)


def main(loader_type, context):
    received = set()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: received.add(number))
    print("ready", flush=True)
    steps = list(make_loader(loader_type, context, 0.05))
    print("steps", len(steps), "signals", len(received), flush=True)

    stuck = iter(make_loader(loader_type, context, 600))
    threading.Thread(target=next, args=(stuck,), daemon=True).start()
    while not multiprocessing.active_children():
        time.sleep(0.01)
    print("workers", *(child.pid for child in multiprocessing.active_children()), flush=True)
    if input() == "terminate":
        (worker,) = multiprocessing.active_children()
        worker.terminate()
        worker.join(20)
        print("exit code", worker.exitcode, flush=True)
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
'''


@pytest.fixture
def start(tmp_path):
    """Starts a run, in a process group of its own, and waits until signals do not kill it; ends what is left of it."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    runs = []

    def begin(loader_type: str, context: str) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, str(script), loader_type, context]
        pipe = subprocess.PIPE
        runs.append(
            subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True
            )
        )
        assert runs[-1].stdout.readline() == "ready\n", runs[-1].stderr.read()[-2_000:]
        return runs[-1]

    yield begin
    for run in runs:
        if run.returncode is None:
            run.kill()
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


def worker_pids(run: subprocess.Popen[str]) -> list[int]:
    words = run.stdout.readline().split()
    assert words[:1] == ["workers"], run.stderr.read()[-2_000:]
    return [int(word) for word in words[1:]]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"  # a dead one that nobody has asked for yet


def wait_until_gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(is_running, pids))


@pytest.mark.parametrize(
    "context", ["fork", *(pytest.param(each, marks=pytest.mark.slow) for each in ("spawn", "forkserver"))]
)
def test_workers_serve_on_under_signals_and_do_not_outlive_a_killed_run(start, context):
    run = start("step", context)
    with hail(run):
        assert run.stdout.readline() == "steps 8 signals 3\n", run.stderr.read()[-2_000:]
        pids = worker_pids(run)
        time.sleep(2)
    assert pids
    assert all(map(is_running, pids))
    os.kill(run.pid, signal.SIGKILL)
    assert wait_until_gone(pids, seconds=10)


def test_run_can_end_a_worker_that_is_stuck(start):
    run = start("step", "fork")
    assert run.stdout.readline() == "steps 8 signals 0\n", run.stderr.read()[-2_000:]
    assert worker_pids(run)
    print("terminate", file=run.stdin, flush=True)
    assert run.stdout.readline() == "exit code 0\n"


def test_plain_data_loader_dies_of_signals(start):
    run = start("plain", "fork")
    with hail(run):
        assert run.stdout.readline() == ""
    assert "DataLoader worker" in run.stderr.read()


def test_plain_data_loader_outlives_a_killed_run(start):
    run = start("plain", "fork")
    assert run.stdout.readline() == "steps 8 signals 0\n", run.stderr.read()[-2_000:]
    pids = worker_pids(run)
    time.sleep(0.5)  # until it is reading
    os.kill(run.pid, signal.SIGKILL)
    try:
        assert not wait_until_gone(pids, seconds=3)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
