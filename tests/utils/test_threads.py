"""Threads of a training process on a CPU."""

import os

import pytest
import torch

from dinosr_hf.utils.command_line import ArgumentError
from dinosr_hf.utils.threads import set_cpu_threads, threads_of_all_processes
from finetuning_runs import recognise, write_corpus, write_model


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("OMP_NUM_THREADS", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)


@pytest.mark.parametrize(
    ("num_threads", "num_processes", "expected"), [(0, 1, 8), (0, 3, 2), (0, 9, 1), (3, 1, 3), (3, 8, 3)]
)
def test_a_process_gets_its_share_of_the_cores_or_what_is_asked_for(eight_cores, num_threads, num_processes, expected):
    assert set_cpu_threads(num_threads, num_processes) == torch.get_num_threads() == expected


@pytest.mark.parametrize(("local", "expected"), [("1", 8), ("2", 4), ("x", 2), ("0", 8)])
def test_processes_of_other_machines_take_no_cores(eight_cores, monkeypatch, local, expected):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert set_cpu_threads(0, 4) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [("3", 3), ("1", 1), (" 2 ", 2), ("5,2", 5), ("", 8), ("0", 8), ("-1", 8), ("many", 8)]
)
def test_omp_num_threads_takes_precedence_over_the_cores(eight_cores, monkeypatch, value, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert set_cpu_threads(0) == expected
    assert set_cpu_threads(4) == 4  # and the option over it


@pytest.mark.parametrize("launcher", ["LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"])
def test_the_single_thread_that_launchers_set_does_not_count(eight_cores, monkeypatch, launcher):
    monkeypatch.setenv(launcher, "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert set_cpu_threads(0, 2) == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert set_cpu_threads(0, 2) == 2


@pytest.mark.parametrize(("local", "expected"), [("", 8), ("2", 4)])
def test_the_process_that_the_others_wait_for_has_the_threads_of_all(eight_cores, monkeypatch, local, expected):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    set_cpu_threads(2, 4)
    with threads_of_all_processes(4):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 2


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match=r"num_threads=-2 must be at least 0, where 0 is the process's share"):
        set_cpu_threads(-2)


def test_without_affinity_all_cores_are_counted(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert set_cpu_threads(0, 2) == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert set_cpu_threads(0) == 1


def test_fine_tuning_uses_the_threads_asked_for_or_all_cores(tmp_path):
    model, corpus = write_model(tmp_path / "model"), write_corpus(tmp_path / "corpus", 4, seed=0)
    recognise(model, corpus, tmp_path / "one", max_steps=1, num_threads=1)
    assert torch.get_num_threads() == 1
    recognise(model, corpus, tmp_path / "all", max_steps=1, num_threads=0)
    assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    with pytest.raises(ArgumentError, match=r"num_threads=-1 is out of range: .*share of the cores"):
        recognise(model, corpus, tmp_path / "none", num_threads=-1)
