"""
A model in an environment of its own, where dinosr_hf is not installed: from a folder, and through huggingface_hub from
a Hub on loopback. What comes out is what comes out here, where the package is.
"""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sysconfig
import textwrap
import venv

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoModel, AutoProcessor, AutoTokenizer, pipeline
from transformers.utils import is_torchaudio_available

import dinosr_hf
from dinosr_hf.hub import Dataset, Provenance, prepare
from dinosr_hf.hub.conversion import convert
from hub_server import hub_server
from recognisers import RECORD, save_models
from scripts import FIXTURES
from tiny import waveforms
from tolerances import SAME_ARITHMETIC

SPEECH = waveforms(1, 4_000)[0].numpy()

# Every question is asked here and there, with the package and without.
ASK = """
    def ask(models, speech, **loading):
        import torch
        from transformers import AutoModel, AutoModelForAudioClassification, AutoModelForCTC, AutoModelForPreTraining
        from transformers import AutoFeatureExtractor, AutoProcessor, pipeline

        def tensors(auto, name, attribute):
            model = auto.from_pretrained(models + name, **loading).eval()
            with torch.no_grad():
                return getattr(model(torch.from_numpy(speech)[None]), attribute).flatten()[:50].tolist()

        pretrained = AutoModelForPreTraining.from_pretrained(models + "pretrained", **loading).eval()
        units, _ = pretrained.encode_units(torch.from_numpy(speech)[None], layers=[2, 3], source="teacher")
        recogniser = pipeline("automatic-speech-recognition", model=models + "recogniser", **loading)
        classifier = pipeline("audio-classification", model=models + "classifier", **loading)
        processor = AutoProcessor.from_pretrained(models + "recogniser", **loading)
        extractor = AutoFeatureExtractor.from_pretrained(models + "pretrained", **loading)
        return {
            "features": tensors(AutoModel, "pretrained", "last_hidden_state"),
            "features of a recogniser": tensors(AutoModel, "recogniser", "last_hidden_state"),
            "pre-training": tensors(AutoModelForPreTraining, "pretrained", "last_hidden_state"),
            "units": units.flatten().tolist(),
            "labels": tensors(AutoModelForCTC, "recogniser", "logits"),
            "classes": tensors(AutoModelForAudioClassification, "classifier", "logits"),
            "processor": type(processor).__name__,
            "extracted": extractor(speech, sampling_rate=16_000, return_tensors="pt").input_values[0, :9].tolist(),
            "decoded": processor.decode([5, 5, 0, 6, 4, 8]),
            "array": recogniser(speech)["text"],
            "dictionary": recogniser({"raw": speech, "sampling_rate": 16_000})["text"],
            "batch": [found["text"] for found in recogniser([speech, speech[:1500]], batch_size=2)],
            "chunks": recogniser(speech, chunk_length_s=0.1, stride_length_s=0.02)["text"],
            "characters": str(recogniser(speech, return_timestamps="char")["chunks"]),
            "words": str(recogniser(speech, return_timestamps="word")["chunks"]),
            "classification": [found["label"] for found in classifier(speech)],
        }
"""
THERE = """
    import json, sys
    import numpy as np

    models, speech, out = sys.argv[1:]
    answers = ask(models, np.load(speech), trust_remote_code=True)
    from transformers import pipeline
    try:
        pipeline("automatic-speech-recognition", model=models + "pretrained", trust_remote_code=True)
    except Exception as error:
        answers["no recogniser"] = str(error)
    with open(out, "w") as file:
        json.dump(answers, file)
"""
exec(textwrap.dedent(ASK))

REFUSED = """
try:
    import dinosr_hf
except ModuleNotFoundError:
    pass
else:
    raise SystemExit(f"dinosr_hf is here, in {dinosr_hf.__file__}: this test would prove nothing")
"""

# Python runs it before anything else; it holds even if the package was installed into the folder the paths lead to.
REFUSER = """
    import sys

    class Refuser:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "dinosr_hf":
                raise ModuleNotFoundError("dinosr_hf is not installed here", name=name)

    sys.meta_path.insert(0, Refuser())
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder / "someone")
    return folder


@pytest.fixture(scope="module")
def other_python(tmp_path_factory):
    """A virtual environment with everything that this one has but dinosr_hf."""
    place = tmp_path_factory.mktemp("other") / "venv"
    venv.create(place, with_pip=False, symlinks=True)
    (site,) = place.glob("lib/python*/site-packages") if os.name != "nt" else [place / "Lib" / "site-packages"]
    # A folder named by a .pth file is a path like others: the .pth files in it, such as that of an editable
    # installation, are not read.
    (site / "dependencies.pth").write_text("\n".join(dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib")))))
    (site / "sitecustomize.py").write_text(textwrap.dedent(REFUSER))
    return place / ("Scripts" if os.name == "nt" else "bin") / "python"


def ask_there(other_python, models, work, **environment):
    script, speech, out = work / "there.py", work / "speech.npy", work / "answers.json"
    script.write_text(REFUSED + textwrap.dedent(ASK) + textwrap.dedent(THERE))
    np.save(speech, SPEECH)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    # A home of its own: nothing is in its cache, and no account is known.
    kept |= {"HF_HOME": str(work / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [other_python, script, models, speech, out]
    done = subprocess.run(command, env=kept | environment, cwd=work, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def here(models):
    """The answers where the package is imported."""
    return ask(f"{models / 'someone'}/", SPEECH)  # noqa: F821 # of ASK


def assert_same_answers(there, here):
    refusal = there.pop("no recogniser")  # a pre-training folder is none, whatever transformers' words for it are
    assert refusal
    assert there.keys() == here.keys()
    for name, answer in here.items():
        if isinstance(answer, list) and isinstance(answer[0], float):
            same = torch.tensor(there[name]), torch.tensor(answer)
            torch.testing.assert_close(*same, **SAME_ARITHMETIC, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert there[name] == answer, name


def test_answers_are_of_a_model_that_says_something(here):
    assert len(set(here["array"])) > 2  # or transcripts of any model would be the same
    assert here["batch"][0] == here["array"] != here["batch"][1]
    assert here["decoded"] == "AB D" and here["processor"] == "Wav2Vec2Processor"


@pytest.mark.slow
def test_hub_where_the_package_is_not(other_python, models, here, tmp_path):
    with hub_server(models) as hub:
        there = ask_there(other_python, "someone/", tmp_path, HF_ENDPOINT=hub.url)
    for name in ("modeling_dinosr.py", "model.safetensors", "vocab.json"):
        assert any(re.fullmatch(rf"GET /someone/recogniser/resolve/\w+/{name}", asked) for asked in hub.requests)
    assert_same_answers(there, here)


def use_of(readme, repo_id, folder):
    """The code that a card shows, for the folder in place of the repository; at most three lines beside imports."""
    (code,) = re.findall("```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for line in code.splitlines() if line and not line.startswith("from ")]
    assert len(lines) <= 3 and repo_id in code
    return code.replace(repo_id, str(folder))


@pytest.mark.slow
def test_the_lines_of_the_card_run_where_the_package_is_not(other_python, models, here, tmp_path):
    tasks = {
        "pretrained": "pretraining",
        "recogniser": "automatic-speech-recognition",
        "classifier": "audio-classification",
    }
    datasets = [Dataset("train", "mit"), Dataset("test", "mit")]
    script = REFUSED + "import numpy, sys\nwaveform = numpy.load(sys.argv[1])\n"
    for name, task in tasks.items():
        provenance = Provenance(f"someone/{name}", "mit", ["en"], datasets)
        record = dataclasses.replace(RECORD, task=task, base_model=None)
        folder = prepare(models / "someone" / name, tmp_path / name, provenance, record)
        script += use_of(folder / "README.md", provenance.repo_id, folder)
    show = "print(features.flatten()[:50].tolist())\n"
    convert(FIXTURES / "dev_tiny" / "checkpoint.pt", tmp_path / "converted")
    converted = use_of(tmp_path / "converted" / "README.md", "path/to/this/folder", tmp_path / "converted")
    script += show + converted + show
    np.save(tmp_path / "speech.npy", SPEECH)
    (tmp_path / "use.py").write_text(script)
    command = [other_python, tmp_path / "use.py", tmp_path / "speech.npy"]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    kept |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    text, labels, *features = map(ast.literal_eval, done.stdout.splitlines())
    assert text == {"text": here["array"]} and [found["label"] for found in labels] == here["classification"]
    for name, found in zip(("pretrained", "converted"), features, strict=True):
        extractor = AutoFeatureExtractor.from_pretrained(tmp_path / name)
        with torch.no_grad():
            inputs = extractor(SPEECH, sampling_rate=16_000, return_tensors="pt")
            expected = AutoModel.from_pretrained(tmp_path / name)(**inputs).last_hidden_state.flatten()[:50]
        torch.testing.assert_close(torch.tensor(found), expected, **SAME_ARITHMETIC)


def test_pretraining_folder_is_no_recogniser_here(models):
    folder = str(models / "someone" / "pretrained")
    with pytest.raises(ValueError, match=r"has no tokenizer: vocab.json is not there.*fine-tune the model with CTC"):
        pipeline("automatic-speech-recognition", model=folder)
    with pytest.raises(ValueError, match="has no tokenizer"):
        AutoTokenizer.from_pretrained(folder)


def test_vocabulary_alone_is_enough_for_a_tokenizer(models, tmp_path):
    recogniser = models / "someone" / "recogniser"
    for name in ("vocab.json", "config.json"):
        (tmp_path / name).write_bytes((recogniser / name).read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        type(tokenizer).__name__ == "Wav2Vec2CTCTokenizer"
        and type(tokenizer) is not dinosr_hf.utils.model_folder.FolderTokenizer
    )
    assert tokenizer.get_vocab() == AutoProcessor.from_pretrained(recogniser).tokenizer.get_vocab()


@pytest.mark.skipif(is_torchaudio_available(), reason="with torchaudio other rates are resampled")
@pytest.mark.parametrize("task", ["automatic-speech-recognition", "audio-classification"])
def test_other_rates_need_torchaudio_in_transformers_pipelines(models, task):
    folder = models / "someone" / ("recogniser" if "speech" in task else "classifier")
    pipe = pipeline(task, model=str(folder))
    with pytest.raises(ImportError, match="torchaudio is required to resample"):
        pipe({"raw": SPEECH, "sampling_rate": 8_000})
