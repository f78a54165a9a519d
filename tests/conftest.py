"""What all tests share: no network, one thread (also in the processes they start), and where the fixtures are."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

FIXTURES = Path(__file__).parent / "fixtures"
