"""What older releases of transformers cannot do is refused."""

import pytest
import torch

from dinosr_hf.utils import compat
from dinosr_hf.utils.command_line import ArgumentError


def test_resuming_in_several_processes_on_cpus(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: "5.17.3")
    with pytest.raises(ArgumentError, match=r"transformers 5\.17\.3 cannot resume .* Install 5\.18 or newer"):
        compat.check_resumable(torch.device("cpu", 0), 2)
    compat.check_resumable(torch.device("cpu"), 1)
    compat.check_resumable(torch.device("cuda", 0), 2)
    monkeypatch.setattr(compat, "version", lambda name: "5.18.0.dev0")
    compat.check_resumable(torch.device("cpu", 0), 2)
