"""An exported network equals torch for any batch and length; int8 and compiled models; invalid input."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import soundfile
import torch
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Processor

import dinosr_hf
from dinosr_hf import DinoSRForCTC, DinoSRForPreTraining, DinoSRModel
from dinosr_hf.hub import export
from dinosr_hf.hub.export import OUTPUTS, ExportError, OnnxModel, TorchModel, compare, export_onnx, quantize_onnx
from dinosr_hf.model.modeling_dinosr import AUTO_CLASSES
from dinosr_hf.utils.model_folder import feature_extractor, save_folder
from documents import blocks
from recognisers import VOCABULARY, letters_processor, save_recogniser
from scripts import ROOT, load_command, load_script
from tiny import deterministic_config, padded, randomize, tiny_config, waveforms
from tolerances import ACTIVATIONS, SAME_ARITHMETIC

# Few layers, since exporting time grows with their number.
CHANGES = {"num_hidden_layers": 1, "num_codebooks": 1, "num_conv_pos_embeddings": 1}
ONE_CONVOLUTION = {"conv_dim": [11], "conv_stride": [20], "conv_kernel": [40]}  # frames as with the tiny model's three
TEXTS = ["a cab", "dad fed", "be a bad cafe", "fade"]
PITCHES = dict(zip("abcdef ", (700, 1100, 1700, 2600, 4000, 6100, 300), strict=True))  # Hz
FRAMES = 6  # of a letter and of the silence after it; 20 samples each


def synthesize(text, seed=0):
    """Return a tone for each letter with silence between them, (S,) at 16 kHz, and the label of each frame."""
    generator = np.random.default_rng(seed)
    time = np.arange(FRAMES * 20) / 16_000
    parts = [np.concatenate([np.sin(2 * np.pi * PITCHES[letter] * time), np.zeros(len(time))]) for letter in text]
    wave = np.concatenate(parts) + 0.05 * generator.standard_normal(2 * FRAMES * 20 * len(text))
    spelled = [VOCABULARY.index("|" if letter == " " else letter) for letter in text]
    labels = np.repeat(np.stack([spelled, np.zeros(len(text), dtype=int)], axis=1).reshape(-1), FRAMES)
    return wave.astype(np.float32), labels


def train(model, num_steps=300):
    """Train a model on the frames of random texts."""
    generator, extractor = np.random.default_rng(0), feature_extractor()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(num_steps):
        text = "".join(generator.choice(list(PITCHES), 8))
        wave, labels = synthesize(text, seed=step + 100)
        wave = extractor(wave, sampling_rate=16_000, return_tensors="pt").input_values
        logits = model(wave).logits[0]
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[: len(logits)])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders torch, onnx and int8 of a recogniser of tones."""
    path = tmp_path_factory.mktemp("export")
    letters_processor(path / "torch")
    torch.manual_seed(0)
    config = deterministic_config(vocab_size=len(VOCABULARY), **CHANGES, **ONE_CONVOLUTION)
    train(DinoSRForCTC(config)).save_pretrained(path / "torch")
    assert export_onnx(path / "torch", path / "onnx") == path / "onnx"
    assert quantize_onnx(path / "onnx", path / "int8") == path / "int8"
    return path


@pytest.fixture(scope="module")
def speech():
    return [synthesize(text)[0] for text in TEXTS]


def outputs(model, lengths, seed=3):
    """Return the outputs for a batch of noise, without padding frames."""
    waves, mask = padded([waveforms(1, length, seed + length)[0] for length in lengths])
    output = model.forward(waves.numpy(), mask.numpy())
    return [row[: model.config.num_frames(length)] for row, length in zip(output, lengths, strict=True)]


@pytest.mark.parametrize(
    "lengths",
    [[40], [59], [60], [1231], [4007], [999, 999], [1500, 777, 40], [61, 60, 79, 80, 41]],
    ids=lambda lengths: "_".join(map(str, lengths)),
)
def test_output_equals_torch_for_any_batch_and_length(folders, lengths):
    right, exported = TorchModel(folders / "torch"), OnnxModel(folders / "onnx", num_threads=1)
    for a, b in zip(outputs(right, lengths), outputs(exported, lengths), strict=True):
        np.testing.assert_allclose(b, a, **ACTIVATIONS)
    other = outputs(exported, lengths, seed=4)
    assert max(np.abs(a - b).max() for a, b in zip(outputs(right, lengths), other, strict=True)) > 1e-2


def test_output_does_not_depend_on_padding(folders, speech):
    exported = OnnxModel(folders / "onnx", num_threads=1)
    alone, together = exported.run(speech), exported.run(speech, batch_size=3)
    assert len({len(row) for row in alone}) == len(speech)
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(b, a, **ACTIVATIONS)
    waves, _ = padded([torch.from_numpy(wave) for wave in speech[:2]])
    unmasked = exported.forward(waves.numpy(), np.ones(waves.shape, dtype=np.int64))[0]
    assert np.abs(unmasked[: len(alone[0])] - alone[0]).max() > 1e-2


def test_transcripts_are_equal(folders, speech):
    models = [TorchModel(folders / "torch"), OnnxModel(folders / "onnx"), OnnxModel(folders / "int8")]
    assert [model.transcribe(speech) for model in models] == [TEXTS] * 3
    assert models[1].transcribe(speech, batch_size=4) == TEXTS


def test_int8_is_smaller_and_its_difference_is_measured(folders, speech):
    right, exported, small = TorchModel(folders / "torch"), OnnxModel(folders / "onnx"), OnnxModel(folders / "int8")
    assert small.num_bytes < exported.num_bytes
    same, lossy = compare(right, exported, speech, TEXTS), compare(exported, small, speech, TEXTS)
    assert same.max_difference < 1e-4 < 1e-2 < lossy.max_difference < 3
    assert same.changed_transcripts == same.changed_decisions == 0.0
    assert lossy.changed_decisions < 0.1 and lossy.word_error_rates == (0.0, 0.0)
    assert same.num_bytes == (right.num_bytes, exported.num_bytes)
    for words in ("4 utterances", "MiB ->", "another best label", "another transcript: 0.00%", "0.00% -> 0.00%"):
        assert words in str(lossy)


def test_comparison_equals_a_slow_count(folders, tmp_path, speech):
    save_recogniser(tmp_path / "other", **CHANGES, **ONE_CONVOLUTION)
    right, other = TorchModel(folders / "torch"), TorchModel(tmp_path / "other")
    found = compare(right, other, [*speech, speech[0]], [*TEXTS, "a cat"])
    differences, changed, frames = [], 0, 0
    for wave in [*speech, speech[0]]:
        (a,), (b,) = right.run([wave]), other.run([wave])
        for frame_a, frame_b in zip(a, b, strict=True):
            differences += [abs(float(x) - float(y)) for x, y in zip(frame_a, frame_b, strict=True)]
            changed += frame_a.argmax() != frame_b.argmax()
            frames += 1
    assert found.max_difference == pytest.approx(max(differences))
    assert found.mean_difference == pytest.approx(sum(differences) / len(differences), rel=1e-5)
    assert found.changed_decisions == pytest.approx(changed / frames) and 0 < changed < frames
    assert found.changed_transcripts == 1.0
    num_words = sum(len(text.split()) for text in [*TEXTS, "a cat"])
    assert found.word_error_rates[0] == pytest.approx(1 / num_words)
    assert found.word_error_rates[1] > found.word_error_rates[0]


def test_exported_folder_is_complete(folders):
    names = {file.name for file in (folders / "onnx").iterdir()}
    assert names == {"model.onnx", "config.json", "processor_config.json", "tokenizer_config.json", "vocab.json"}
    config = json.loads((folders / "onnx" / "config.json").read_text())
    assert config["architectures"] == ["DinoSRForCTC"] and "auto_map" not in config
    assert os.fsencode(ROOT) not in (folders / "onnx" / "model.onnx").read_bytes()


WITHOUT_TORCH = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("torch", "dinosr_hf")
        return None if hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
exec(sys.stdin.read())
print("transcript:", transcript)
"""


def test_code_of_the_docs_runs_without_torch(folders, tmp_path):
    shutil.copytree(folders / "onnx", tmp_path / "runs" / "onnx")
    soundfile.write(tmp_path / "speech.wav", synthesize(TEXTS[0])[0] * 0.5, 16_000)
    (code,) = [text for _, text in blocks("docs/deploying.md", "python") if "InferenceSession" in text]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], input=code, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"transcript: {TEXTS[0]}" in done.stdout


def test_python_of_the_docs_runs(folders, tmp_path, monkeypatch):
    network = folders / "onnx" / "model.onnx"
    monkeypatch.setattr(export, "_export_network", lambda model, output, file: shutil.copy(network, file))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders / "torch", "runs/recogniser")
    soundfile.write("speech.wav", synthesize(TEXTS[0])[0] * 0.5, 16_000)
    namespace = {}
    for _, code in blocks("docs/deploying.md", "python"):
        exec(code, namespace)
    assert namespace["transcript"] == TEXTS[0]


def test_wrong_network_is_not_written(folders, tmp_path, monkeypatch):
    save_recogniser(tmp_path / "other", **CHANGES, **ONE_CONVOLUTION)
    network = folders / "onnx" / "model.onnx"
    monkeypatch.setattr(export, "_export_network", lambda model, output, file: shutil.copy(network, file))
    with pytest.raises(ExportError, match=r"exported network is wrong: .* Nothing was written"):
        export_onnx(tmp_path / "other", tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    export_onnx(folders / "torch", tmp_path / "onnx")  # whose network it is
    assert (tmp_path / "onnx" / "model.onnx").exists()


def test_export_does_not_change_the_model(folders, tmp_path, monkeypatch):
    network = folders / "onnx" / "model.onnx"
    monkeypatch.setattr(export, "_export_network", lambda model, output, file: shutil.copy(network, file))
    model = DinoSRForCTC.from_pretrained(folders / "torch").train()
    processor = Wav2Vec2Processor.from_pretrained(folders / "torch")
    before, config = {name: value.clone() for name, value in model.state_dict().items()}, model.config.to_dict()
    export_onnx(model, tmp_path / "onnx", processor=processor)
    assert model.training and model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


PAPERS_CONVOLUTIONS = {"conv_dim": [9] * 7, "conv_stride": [5] + [2] * 6, "conv_kernel": [10, 3, 3, 3, 3, 2, 2]}
# An export takes long, so some have another front end as well. With it: lengths of batches, and the fewest samples.
SHORT = [[1301, 601, 777]]
LOG_MEL = [[560], [879], [880], [16_007], [7_003, 11_111, 720]], 560
EXPORTED = {
    "DinoSRForAudioFrameClassification": ({"feature_encoder": "log_mel", "use_weighted_layer_sum": True}, *LOG_MEL),
    "DinoSRForSequenceClassification": ({"feature_encoder": "log_mel", "use_weighted_layer_sum": True}, *LOG_MEL),
    "DinoSRForXVector": ({"num_conv_pos_embeddings": 2, **ONE_CONVOLUTION}, SHORT, 200),
    "DinoSRModel": (PAPERS_CONVOLUTIONS, [[400], [16_001], [7_003, 11_111, 720]], 400),
}


def test_all_models_but_the_pretraining_model_can_be_exported():
    assert {*OUTPUTS, "DinoSRForPreTraining"} == set(AUTO_CLASSES.values())
    assert {*EXPORTED, "DinoSRForCTC"} == {*OUTPUTS}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_other_models_are_exported(tmp_path, name):
    changes, batches, fewest = EXPORTED[name]
    model = randomize(getattr(dinosr_hf, name)(tiny_config(**{**CHANGES, **changes})))
    if name == "DinoSRModel":  # a folder in half precision
        save_folder(model.to(torch.bfloat16), tmp_path / "torch")
        export_onnx(tmp_path / "torch", tmp_path / "onnx")
    else:
        save_folder(model, tmp_path / "torch")
        export_onnx(model, tmp_path / "onnx", processor=feature_extractor())
    exported = OnnxModel(tmp_path / "onnx", num_threads=1)
    assert isinstance(exported.processor, Wav2Vec2FeatureExtractor)
    right = TorchModel(tmp_path / "torch")
    for lengths in batches:
        waves = [waveforms(1, length, length)[0].numpy() for length in lengths]
        for a, b in zip(right.run(waves), exported.run(waves, batch_size=3), strict=True):
            assert a.ndim == (1 if name in ("DinoSRForSequenceClassification", "DinoSRForXVector") else 2)
            np.testing.assert_allclose(b, a, **ACTIVATIONS)
    quiet = [synthesize(text * 5)[0] * np.float32(1e-3) for text in TEXTS]
    found = compare(right, exported, quiet)
    assert found.changed_decisions == 0 and found.changed_transcripts is None
    with pytest.raises(ValueError, match=rf"Waveform 0 has shape \({fewest - 1},\).* at least {fewest} samples"):
        exported.run([np.zeros(fewest - 1)])
    with pytest.raises(ValueError, match=f"is a {name}, which has no transcripts"):
        exported.transcribe(waves)


def test_pretraining_model_is_refused(tmp_path):
    save_folder(DinoSRForPreTraining(tiny_config()), tmp_path / "tiny")
    with pytest.raises(ValueError, match=r"DinoSRForPreTraining, which cannot be exported.*fine-tune it first"):
        export_onnx(tmp_path / "tiny", tmp_path / "onnx")
    with pytest.raises(ValueError, match="The model is a DinoSRForPreTraining"):
        export_onnx(DinoSRForPreTraining(tiny_config()), tmp_path / "onnx", processor=feature_extractor())


def test_other_folders_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        export_onnx(tmp_path / "nothing", tmp_path / "onnx")
    (tmp_path / "config.json").write_text('{"model_type": "wav2vec2"}')
    with pytest.raises(ValueError, match="is a wav2vec2, not a DinoSR"):
        export_onnx(tmp_path, tmp_path / "onnx")
    with pytest.raises(ValueError, match=r"torch has no model\.onnx. Give a folder that export_onnx wrote"):
        OnnxModel(folders / "torch")
    with pytest.raises(ValueError, match=r"torch has no model\.onnx"):
        quantize_onnx(folders / "torch", tmp_path / "int8")


def test_missing_processor_is_refused(folders, tmp_path):
    shutil.copytree(folders / "torch", tmp_path / "torch")
    (tmp_path / "torch" / "vocab.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer \(vocab\.json\).*processor\.save_pretrained"):
        export_onnx(tmp_path / "torch", tmp_path / "onnx")
    (tmp_path / "torch" / "processor_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no feature extractor .*processor\.save_pretrained"):
        export_onnx(tmp_path / "torch", tmp_path / "onnx")
    model = DinoSRForCTC.from_pretrained(folders / "torch")
    with pytest.raises(ValueError, match="processor is missing"):
        export_onnx(model, tmp_path / "onnx")
    with pytest.raises(ValueError, match="a feature extractor without the tokenizer that a recogniser needs"):
        export_onnx(model, tmp_path / "onnx", processor=feature_extractor())


def test_only_an_exported_model_is_overwritten_and_only_on_request(folders, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file\\. Give the path of a folder"):
        quantize_onnx(folders / "onnx", tmp_path / "file")
    for make, source in ((quantize_onnx, "onnx"), (export_onnx, "torch")):
        with pytest.raises(ValueError, match="has files that are not of an exported model"):
            make(folders / source, tmp_path, overwrite=True)
        with pytest.raises(ValueError, match=r"int8 has an exported model already.*set overwrite"):
            make(folders / source, folders / "int8")
    (tmp_path / "int8").mkdir()
    quantize_onnx(folders / "onnx", tmp_path / "int8")
    for name in ("model.onnx", "model.onnx.data", "added_tokens.json", "notes.txt"):  # the second is of a larger model
        (tmp_path / "int8" / name).write_text("old")
    quantize_onnx(folders / "onnx", tmp_path / "int8", overwrite=True)
    assert (tmp_path / "int8" / "model.onnx").read_bytes() == (folders / "int8" / "model.onnx").read_bytes()
    found = {file.name for file in (tmp_path / "int8").iterdir()}
    assert found == {file.name for file in (folders / "int8").iterdir()} | {"notes.txt"}


def test_wrapped_models_are_refused_with_the_way_out(folders, tmp_path):
    model = torch.compile(DinoSRForCTC.from_pretrained(folders / "torch"))
    with pytest.raises(
        ValueError, match=r"class is OptimizedModule, and not one of .*merge_and_unload.*before `torch.compile`"
    ):
        export_onnx(model, tmp_path / "onnx", processor=feature_extractor())


def test_int8_twice_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="int8 is already in int8"):
        quantize_onnx(folders / "int8", tmp_path / "again")


def test_invalid_waveforms_are_refused(folders):
    exported = OnnxModel(folders / "onnx")
    with pytest.raises(ValueError, match=r"Waveform 1 has shape \(39,\).* at least 40 samples"):
        exported.run([np.zeros(40), np.zeros(39)])
    with pytest.raises(ValueError, match=r"Waveform 0 has shape \(2, 400\)"):
        exported.run([np.zeros((2, 400))])
    with pytest.raises(ValueError, match="batch_size=0 is out of range"):
        exported.run([np.zeros(400)], batch_size=0)


def test_folders_whose_names_are_not_utf8_are_refused(folders, tmp_path):
    shutil.copytree(folders / "onnx", tmp_path / "caf\udce9")
    for open_or_write in (OnnxModel, lambda folder: export_onnx(folders / "torch", folder / "new")):
        with pytest.raises(ValueError, match=r"caf\\xe9(/new)? is not UTF-8 text, which onnxruntime needs\. Give the"):
            open_or_write(tmp_path / "caf\udce9")


def test_invalid_comparisons_are_refused(folders, tmp_path, speech):
    exported = OnnxModel(folders / "onnx")
    with pytest.raises(ValueError, match="There are no waveforms to compare on"):
        compare(exported, exported, [])
    with pytest.raises(ValueError, match="There are 1 texts and 4 waveforms"):
        compare(exported, exported, speech, ["a cab"])
    save_folder(DinoSRModel(tiny_config()), tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"outputs of the shapes \(59, 31\) and \(59, 36\).*own export"):
        compare(exported, TorchModel(tmp_path / "encoder"), speech)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_missing_package_is_named(folders, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'ONNX needs {package}: pip install "dinosr-hf\[onnx\]"'):
        export_onnx(folders / "torch", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_compiled_recogniser_has_the_same_output():
    model = randomize(DinoSRForCTC(tiny_config(**CHANGES, **ONE_CONVOLUTION))).eval()
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters
    graphs.clear()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "certain side effects": the hooks that record hidden states
        for lengths in ([1231, 801, 460], [999, 400], [1777, 1602, 60, 333]):
            inputs = padded([waveforms(1, length, length)[0] for length in lengths])
            right = model(*inputs).logits
            torch.testing.assert_close(compiled(*inputs).logits, right, **SAME_ARITHMETIC)
            assert (compiled(inputs[0].flip(0), inputs[1]).logits - right).abs().max() > 1e-2
    assert graphs["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_benchmark_prints_a_table_and_refuses_a_wrong_network(folders, tmp_path, capsys, monkeypatch):
    benchmark = load_script("benchmarks/deploy.py")
    benchmark.save_model("tiny", tmp_path / "tiny")
    own = TorchModel(tmp_path / "tiny")
    assert own.processor.tokenizer.vocab_size == own.config.vocab_size == 32
    # another model, which is exported already
    monkeypatch.setattr(benchmark, "save_model", lambda size, folder: shutil.copytree(folders / "torch", folder))
    monkeypatch.setattr(benchmark, "export_onnx", lambda model, folder: shutil.copytree(folders / "onnx", folder))
    quick = ["--seconds", "0.5", "--repeats", "1"]
    benchmark.main(quick)
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert re.search(r"^\| onnx int8 \|( [\d.]+ \|){5} [\d.e+-]+ \| [\d.]+% \|$", printed, re.MULTILINE)
    monkeypatch.setattr(benchmark, "TOLERANCE", -1.0)
    with pytest.raises(SystemExit, match=r"Nothing was timed: .* differs from torch's by"):
        benchmark.main(quick)
    assert capsys.readouterr().out == ""


def test_script_writes_both_folders_and_compares(folders, tmp_path, capsys, speech, monkeypatch):
    network = folders / "onnx" / "model.onnx"
    monkeypatch.setattr(export, "_export_network", lambda model, output, file: shutil.copy(network, file))
    for number, wave in enumerate(speech[:2]):
        soundfile.write(tmp_path / f"{number}.wav", wave * 0.5, 16_000)
    script, files = load_command("export_onnx"), [str(tmp_path / f"{number}.wav") for number in range(2)]
    onnx, int8 = str(tmp_path / "onnx"), str(tmp_path / "int8")
    with pytest.raises(SystemExit, match=r"export_onnx\.py: none\.wav is not a file"):  # before the work
        script.main([str(folders / "torch"), onnx, "--verify", files[0], "none.wav"])
    assert not (tmp_path / "onnx").exists()
    script.main([str(folders / "torch"), onnx, "--int8", int8, "--verify", *files])
    printed = capsys.readouterr().out
    assert len(re.findall(rf"^ *(?:torch|onnx|int8) +{TEXTS[0]}$", printed, re.MULTILINE)) == 3
    assert printed.count("another transcript: 0.00%") == 2
    with pytest.raises(SystemExit, match=r"export_onnx\.py: .*exported model already"):
        script.main([str(folders / "torch"), onnx])
