"""The Auto classes find every model; a saved folder brings its code, for processes that have no dinosr_hf."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

import dinosr_hf
from dinosr_hf import DinoSRConfig, DinoSRForCTC, DinoSRForPreTraining, DinoSRModel
from tiny import randomize, tiny_config, waveforms
from tolerances import SAME_ARITHMETIC

AUTO_CLASSES = {
    "AutoModel": "DinoSRModel",
    "AutoModelForPreTraining": "DinoSRForPreTraining",
    "AutoModelForCTC": "DinoSRForCTC",
    "AutoModelForAudioClassification": "DinoSRForSequenceClassification",
    "AutoModelForAudioFrameClassification": "DinoSRForAudioFrameClassification",
    "AutoModelForAudioXVector": "DinoSRForXVector",
}
CODE = {
    "configuration_dinosr.py",
    "codebook_dinosr.py",
    "fast_cpu_dinosr.py",
    "masking_dinosr.py",
    "modeling_dinosr.py",
}
NUM_SAMPLES = 5_011


FRONT_ENDS = ["conv", "log_mel"]


def make_model(front_end):
    torch.manual_seed(0)
    changes = {"feature_encoder": front_end, "num_anchor_labels": 3 if front_end == "log_mel" else 0}
    return randomize(DinoSRForPreTraining(tiny_config(**changes))).eval()


@pytest.fixture(scope="module", params=FRONT_ENDS)
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("auto") / "saved-from-pretraining"
    model.save_pretrained(path)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(path)
    return path


def test_every_head_is_in_the_table():
    heads = {name for name in dinosr_hf.__all__ if name.startswith("DinoSRFor") and not name.endswith("Output")}
    assert set(AUTO_CLASSES.values()) == heads | {"DinoSRModel"}


def test_auto_config(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    assert type(config) is DinoSRConfig
    assert config.hidden_size == 36
    assert type(transformers.AutoConfig.for_model("dinosr")) is DinoSRConfig


def test_auto_feature_extractor(folder):
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    batch = extractor([waveforms(1, 500)[0].numpy(), waveforms(1, 300)[0].numpy()], sampling_rate=16_000, padding=True)
    assert sum(batch["attention_mask"][1]) == 300


@pytest.mark.parametrize(("auto", "name"), AUTO_CLASSES.items(), ids=AUTO_CLASSES.keys())
def test_auto_classes_from_a_pretraining_folder(folder, model, auto, name):
    loaded = getattr(transformers, auto).from_pretrained(folder).eval()
    assert type(loaded) is getattr(dinosr_hf, name)
    encoder = loaded if isinstance(loaded, DinoSRModel) else loaded.dinosr
    x = waveforms(2, NUM_SAMPLES)
    torch.testing.assert_close(encoder(x).last_hidden_state, model.dinosr(x).last_hidden_state, **SAME_ARITHMETIC)


@pytest.mark.parametrize(("auto", "name"), AUTO_CLASSES.items(), ids=AUTO_CLASSES.keys())
def test_folders_of_every_head_bring_all_code_and_name_all_heads(tmp_path, auto, name):
    getattr(dinosr_hf, name)(tiny_config()).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == CODE
    config = json.loads((tmp_path / "config.json").read_text())
    wanted = {other: f"modeling_dinosr.{class_name}" for other, class_name in AUTO_CLASSES.items()}
    assert config["auto_map"] == {"AutoConfig": "configuration_dinosr.DinoSRConfig", **wanted}
    assert config["architectures"] == [name]
    assert type(getattr(transformers, auto).from_pretrained(tmp_path)).__name__ == name


class Subclass(DinoSRForCTC):
    """Of somebody else."""


def test_a_subclass_does_not_name_code_that_is_not_in_its_folder(tmp_path):
    DinoSRForCTC(tiny_config()).save_pretrained(tmp_path / "ours")
    Subclass.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["architectures"] == ["Subclass"]
    named = {name.partition(".")[0] for name in config.get("auto_map", {}).values()}
    assert named <= {path.stem for path in (tmp_path / "theirs").glob("*.py")}
    assert isinstance(transformers.AutoModelForCTC.from_pretrained(tmp_path / "theirs"), DinoSRForCTC)


ALONE = """
    import sys

    class Refuser:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "dinosr_hf":
                raise ModuleNotFoundError("dinosr_hf is not installed here", name=name)

    sys.meta_path.insert(0, Refuser())
    try:
        import dinosr_hf
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("dinosr_hf can be imported: this test would prove nothing")

    import torch
    from transformers import AutoModel, AutoModelForCTC, AutoModelForPreTraining

    def open_all(folder):
        opened = {}
        for auto in (AutoModel, AutoModelForCTC, AutoModelForPreTraining):
            model = auto.from_pretrained(folder, trust_remote_code=True).eval()
            assert type(model).__module__.startswith("transformers_modules."), type(model)
            opened[auto.__name__] = model
        return opened

    def outputs(models, x, mask):
        with torch.no_grad():
            scored = models["AutoModelForPreTraining"](x, mask_time_indices=mask)
            return {
                "AutoModel": models["AutoModel"](x).last_hidden_state,
                "AutoModelForCTC": models["AutoModelForCTC"].dinosr(x).last_hidden_state,
                "loss": scored.loss,
                "codes": scored.codes,
            }

    for work in sys.argv[1:]:
        x, mask = torch.load(f"{work}/x.pt"), torch.load(f"{work}/mask.pt")
        first = open_all(f"{work}/saved")
        first["AutoModelForPreTraining"].save_pretrained(f"{work}/again")
        found = {"first": outputs(first, x, mask), "again": outputs(open_all(f"{work}/again"), x, mask)}
        torch.save(found, f"{work}/outputs.pt")

        first["AutoModelForCTC"].save_pretrained(f"{work}/ctc")
        ctc = AutoModelForCTC.from_pretrained(f"{work}/ctc", trust_remote_code=True).eval()
        torch.testing.assert_close(ctc(x).logits, first["AutoModelForCTC"](x).logits, atol=1e-5, rtol=0.0)
        first["AutoModelForPreTraining"].train()(x).loss.backward()
        first["AutoModelForPreTraining"].update_targets(1)
"""


def test_remote_code_where_dinosr_hf_cannot_be_imported(tmp_path):
    x, models = waveforms(2, NUM_SAMPLES), {name: make_model(name) for name in FRONT_ENDS}
    masks = {name: torch.zeros(2, model.config.num_frames(NUM_SAMPLES)).bool() for name, model in models.items()}
    for name, model in models.items():
        masks[name][:, 4:11] = True
        model.save_pretrained(tmp_path / name / "saved")
        torch.save(x, tmp_path / name / "x.pt")
        torch.save(masks[name], tmp_path / name / "mask.pt")
    script = tmp_path / "alone.py"
    script.write_text(textwrap.dedent(ALONE))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [sys.executable, script, *(tmp_path / name for name in FRONT_ENDS)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name, model in models.items():
        with torch.no_grad():
            scored = model(x, mask_time_indices=masks[name])
            hidden = model.dinosr(x).last_hidden_state
        for when, got in torch.load(tmp_path / name / "outputs.pt").items():
            torch.testing.assert_close(got["AutoModel"], hidden, **SAME_ARITHMETIC, msg=when)
            torch.testing.assert_close(got["AutoModelForCTC"], hidden, **SAME_ARITHMETIC, msg=when)
            torch.testing.assert_close(got["loss"], scored.loss, **SAME_ARITHMETIC, msg=when)
            assert torch.equal(got["codes"], scored.codes), when
        # the folder that was saved there opens here, and is whole
        again = tmp_path / name / "again"
        assert {path.name for path in again.glob("*.py")} == CODE
        assert set(json.loads((again / "config.json").read_text())["auto_map"]) == {"AutoConfig", *AUTO_CLASSES}
        state = DinoSRForPreTraining.from_pretrained(again).state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_ctc_pipeline_parts_are_registered():
    config = tiny_config()
    assert transformers.AutoModelForCTC.from_config(config).__class__.__name__ == "DinoSRForCTC"
    assert PROCESSOR_MAPPING[DinoSRConfig] is transformers.Wav2Vec2Processor
