"""Each attempt of torchrun on one machine has a port of its own; tests/pretraining/test_resume.py runs torchrun."""

import os

import pytest

from dinosr_hf.training.restarts import separate_restarts

RESTARTED = {
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "GROUP_WORLD_SIZE": "1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, ("29502", "False"), id="restarted"),
        pytest.param({"MASTER_PORT": "65534"}, ("65532", "False"), id="port-at-the-end"),
        pytest.param({"TORCHELASTIC_RESTART_COUNT": "0"}, ("29500", "True"), id="first"),
        pytest.param({"GROUP_WORLD_SIZE": "2"}, ("29500", "True"), id="two-machines"),
        pytest.param({"TORCHELASTIC_USE_AGENT_STORE": "False"}, ("29500", "False"), id="not-shared"),
    ],
)
def test_ports(monkeypatch, changes, expected):
    for name, value in {**RESTARTED, **changes}.items():
        monkeypatch.setenv(name, value)
    separate_restarts()
    assert (os.environ["MASTER_PORT"], os.environ["TORCHELASTIC_USE_AGENT_STORE"]) == expected


def test_without_torchrun_nothing_changes(monkeypatch):
    for name in RESTARTED:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    separate_restarts()
    assert dict(os.environ) == before
