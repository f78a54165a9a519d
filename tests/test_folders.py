"""Folders that `from_pretrained` opens: whole, or not there."""

import os

import pytest
import torch
from tiny import tiny_config

from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.data import SAMPLING_RATE
from dinosr_hf.folders import feature_extractor, save_folder


@pytest.fixture(scope="module")
def model():
    return DinoSRForPreTraining(tiny_config())


def test_extractor_is_for_the_rate_that_data_are_read_at():
    assert feature_extractor().sampling_rate == SAMPLING_RATE


def test_new_folder_appears_as_a_whole(model, tmp_path, monkeypatch):
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual" / "file").touch()
    seen = []
    save = DinoSRForPreTraining.save_pretrained

    def watched(self, folder, **kwargs):
        save(self, folder, **kwargs)
        seen.append((tmp_path / "new").exists())

    monkeypatch.setattr(DinoSRForPreTraining, "save_pretrained", watched)
    assert save_folder(model, str(tmp_path / "new" / "model")) == tmp_path / "new" / "model"
    assert save_folder(model, tmp_path / "other") == tmp_path / "other"
    assert seen == [True, True]  # the first made the folder above
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "other", "usual"]
    modes = {path.stat().st_mode for path in (tmp_path / "other").iterdir()}
    assert modes == {(tmp_path / "usual" / "file").stat().st_mode}
    assert (tmp_path / "other").stat().st_mode == (tmp_path / "usual").stat().st_mode
