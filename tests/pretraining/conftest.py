"""A model to start from."""

import pytest
import torch

from dinosr_hf import DinoSRConfig, DinoSRForPreTraining
from dinosr_hf.utils.model_folder import save_folder
from pretraining_runs import SIZES


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pre-training checkpoint whose teacher differs from its student, and whose codebooks are not initial."""
    torch.manual_seed(0)
    model = DinoSRForPreTraining(DinoSRConfig(**SIZES))
    with torch.no_grad():
        for weights in (*model.teacher.parameters(), model.codebooks.sums, model.codebooks.counts):
            weights.add_(torch.rand_like(weights))
    return save_folder(model, tmp_path_factory.mktemp("base") / "model")
