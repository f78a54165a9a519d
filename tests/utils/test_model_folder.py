"""Folders that `from_pretrained` opens: whole, or not there."""

import pytest
import torch

from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.data import SAMPLING_RATE
from dinosr_hf.utils.files import claim_output_folder
from dinosr_hf.utils.model_folder import feature_extractor, open_config, save_folder
from tiny import tiny_config


@pytest.fixture(scope="module")
def model():
    return DinoSRForPreTraining(tiny_config())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_extractor_is_for_the_rate_that_audio_is_read_at():
    assert feature_extractor().sampling_rate == SAMPLING_RATE


def test_a_folder_of_ones_own_begins_anew(tmp_path):
    folder = claim_output_folder(tmp_path / "deep" / "runs", ".mine")
    (folder / "old").mkdir()
    assert claim_output_folder(folder, ".mine") == folder and names(folder) == [".mine"]
    with pytest.raises(ValueError, match="runs has files of something else, which stay"):
        claim_output_folder(folder, ".others")
    assert names(folder) == [".mine"]


def test_new_folder_appears_when_it_is_whole(model, tmp_path, monkeypatch):
    while_saving = []
    save = DinoSRForPreTraining.save_pretrained

    def watched(self, folder, **kwargs):
        save(self, folder, **kwargs)
        while_saving.extend(names(tmp_path / "runs"))

    monkeypatch.setattr(DinoSRForPreTraining, "save_pretrained", watched)
    assert save_folder(model, str(tmp_path / "runs" / "model")) == tmp_path / "runs" / "model"
    assert len(while_saving) == 1 and while_saving[0].startswith(".unfinished-")
    assert names(tmp_path / "runs") == ["model"]
    assert {"config.json", "model.safetensors", "modeling_dinosr.py", "preprocessor_config.json"} <= set(
        names(tmp_path / "runs" / "model")
    )


def test_new_folder_can_be_read_by_whom_the_user_lets(model, tmp_path):
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual" / "file").touch()
    save_folder(model, tmp_path / "model")
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "usual").stat().st_mode
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert modes == {(tmp_path / "usual" / "file").stat().st_mode}


def test_files_of_other_names_stay_and_a_model_is_replaced(model, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    save_folder(DinoSRForPreTraining(tiny_config()), tmp_path)
    save_folder(model, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    loaded = DinoSRForPreTraining.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("target", [".", "new"])
def test_failed_save_changes_nothing(model, tmp_path, monkeypatch, target):
    def fail(self, folder, **kwargs):
        (folder / "config.json").write_text("half")
        raise OSError("no space left on device")

    (tmp_path / "config.json").write_text("mine")
    monkeypatch.setattr(DinoSRForPreTraining, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        save_folder(model, tmp_path / target)
    assert names(tmp_path) == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "mine"


def test_a_model_that_is_not_there_is_named_with_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere cannot be opened \((.|\n)*\)\. Give a folder with a model"):
        open_config(tmp_path / "nowhere")
