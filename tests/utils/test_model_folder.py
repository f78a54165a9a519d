"""Model folders: what is in them, and that they are written completely or not at all."""

import json
import os

import pytest
import torch
from transformers.utils import logging as transformers_logging

import forks
from dinosr_hf import DinoSRForCTC, DinoSRForPreTraining
from dinosr_hf.data import SAMPLING_RATE
from dinosr_hf.hub.conversion.layout import read_settings
from dinosr_hf.utils.model_folder import feature_extractor, open_config, open_weights, save_folder
from disk import names
from hub_server import hub_server
from tiny import tiny_config


@pytest.fixture(scope="module")
def model():
    return DinoSRForPreTraining(tiny_config())


def test_feature_extractor_has_the_rate_that_audio_is_read_at():
    assert feature_extractor().sampling_rate == SAMPLING_RATE


def test_a_new_folder_appears_when_it_is_complete(model, tmp_path, monkeypatch):
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


def test_a_model_is_replaced_and_other_files_stay(model, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    save_folder(DinoSRForPreTraining(tiny_config()), tmp_path)
    save_folder(model, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    loaded = DinoSRForPreTraining.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("target", [".", "new"])
def test_a_failed_save_changes_nothing(model, tmp_path, monkeypatch, target):
    def fail(self, folder, **kwargs):
        (folder / "config.json").write_text("half")
        raise OSError("no space left on device")

    (tmp_path / "config.json").write_text("mine")
    monkeypatch.setattr(DinoSRForPreTraining, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        save_folder(model, tmp_path / target)
    assert names(tmp_path) == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("somewhere/runs/nothing", "is neither a folder nor a model on the Hub"),
        ("runs/nothing", "is not a folder, and the Hub cannot be reached to look for a model of this name"),
    ],
)
def test_a_missing_model_is_named(name, problem, capfd):
    with pytest.raises(ValueError, match=rf"^{name} {problem}\. Give a folder with a model, or a name on the Hub\.$"):
        open_config(name)
    assert capfd.readouterr().err == ""


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^\S+ cannot be opened: .*config\.json\. Give a folder with a model"):
        open_config(tmp_path)


@pytest.mark.slow
def test_a_name_that_is_no_folder_is_looked_up_on_the_hub(tmp_path):
    tiny_config().save_pretrained(tmp_path / "runs" / "tiny")
    code = "import sys; from dinosr_hf.utils.model_folder import open_config; [*map(open_config, sys.argv[1:])]"
    with hub_server(tmp_path) as hub:
        places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        # the first opens, the second does not
        done = forks.run(["-c", code, "runs/tiny", "runs/nothing"], env={**os.environ, **places})
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError: runs/nothing is neither a folder nor a model on the Hub. Give a folder")


def test_saving_leaves_progress_bars_as_they_were(model, tmp_path, monkeypatch):
    while_saving = []
    save = DinoSRForPreTraining.save_pretrained

    def watched(self, folder, **kwargs):
        while_saving.append(transformers_logging.is_progress_bar_enabled())
        save(self, folder, **kwargs)

    monkeypatch.setattr(DinoSRForPreTraining, "save_pretrained", watched)
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
    save_folder(model, tmp_path / "model")
    assert while_saving == [False] and transformers_logging.is_progress_bar_enabled()


def test_all_weights_are_loaded(model, tmp_path):
    save_folder(model, tmp_path)
    loaded = open_weights(DinoSRForPreTraining, tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_weights_that_would_be_random_are_refused_but_for_those_that_may_be(model, tmp_path, caplog):
    save_folder(model, tmp_path)
    with pytest.raises(ValueError, match=rf"^{tmp_path} lacks 2 weights of a DinoSRForCTC, .* lm_head\.bias\. It is"):
        open_weights(DinoSRForCTC, tmp_path)
    assert isinstance(open_weights(DinoSRForCTC, tmp_path, may_lack=r"lm_head\."), DinoSRForCTC)
    DinoSRForCTC(tiny_config(vocab_size=9)).save_pretrained(tmp_path)
    options = {"ignore_mismatched_sizes": True, "vocab_size": 8}
    with pytest.raises(ValueError, match="lacks 2 weights of a DinoSRForCTC, or has them in another shape"):
        open_weights(DinoSRForCTC, tmp_path, **options)
    assert open_weights(DinoSRForCTC, tmp_path, may_lack=r"lm_head\.", **options).config.vocab_size == 8
    assert "has lm_head.bias, lm_head.weight in another shape: they start anew, at random." in caplog.text


def test_a_configuration_of_another_model_takes_no_memory(model, tmp_path, monkeypatch):
    save_folder(model, tmp_path)
    tiny_config(num_hidden_layers=900).save_pretrained(tmp_path)
    monkeypatch.setattr(DinoSRForPreTraining, "from_pretrained", lambda *_, **__: pytest.fail("memory is taken"))
    message = r"config\.json describes an encoder of [\d,]+ weights, but the folder's files have [\d,]+: they are of"
    with pytest.raises(ValueError, match=message):
        open_weights(DinoSRForPreTraining, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "config.json is not valid JSON"),
        ("[]", "cannot be opened"),
        ("5", "cannot be opened"),
        ('{"model_type": "dinosr", "hidden_size": "wide"}', "Field 'hidden_size' expected int, got str"),
        ('{"model_type": "dinosr", "id2label": 5}', "cannot be opened"),
        ('{"model_type": "dinosr", "dtype": "float33"}', "cannot be opened: .*float33"),
        ('{"model_type": "dinosr", "layer_norm_eps": NaN}', "layer_norm_eps=nan is out of range"),
        ('{"model_type": "dinosr", "num_labels": 1000000000}', "num_labels=1000000000 is out of range"),
    ],
    ids=["nested", "list", "number", "text for a number", "no labels", "no dtype", "NaN", "many labels"],
)
def test_a_configuration_that_is_none_is_one_line(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        open_config(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_a_configuration_that_takes_minutes_to_read_is_refused(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert open_config(tmp_path).model_type == "dinosr"  # negative control
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {f"key_{number}": 0 for number in range(100_000)}))
    for opened in (open_config, lambda folder: open_weights(DinoSRForPreTraining, folder), read_settings):
        path = tmp_path / "config.json" if opened is read_settings else tmp_path
        with pytest.raises(
            ValueError, match=r"config\.json .*has [\d,]+ bytes; a configuration has at most 1,048,576"
        ):
            opened(path)
