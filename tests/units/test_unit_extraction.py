"""Extraction of units and features: windows, normalisation, k-means, feature files, unreadable recordings."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from audio_files import noise, sf
from dinosr_hf import DinoSRConfig, DinoSRForPreTraining
from dinosr_hf.data import normalize_waveform, open_recordings
from dinosr_hf.units import FeatureFiles, LayerKMeans, UnitCorpus, UnitExtractor, fit_layer_kmeans, load_model
from dinosr_hf.utils.model_folder import save_folder
from tiny import randomize, tiny_config, vary_anchor, without_attention
from tolerances import SAME_ARITHMETIC

LENGTHS = {"deep/short": 30, "a": 1_234, "b": 2_345, "long": 9_871}
SOURCES = ("student", "teacher")

# Seconds of context that a frame of the tiny model sees without attention: three convolutions with a kernel of 5.
REACH = 6 * 20 / 16_000


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return vary_anchor(randomize(DinoSRForPreTraining(tiny_config(num_hidden_layers=3, num_anchor_labels=6))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise that gets louder, so that normalising each window by itself would show."""
    path = tmp_path_factory.mktemp("recordings")
    (path / "deep").mkdir()
    for seed, (name, length) in enumerate(LENGTHS.items()):
        sf.write(path / f"{name}.wav", noise(length, seed) * np.linspace(0.1, 3, length), 16_000, subtype="FLOAT")
    return path


@pytest.fixture
def recordings(folder):
    return open_recordings([folder])


def units_in_one_pass(model, path, layers, source):
    samples, _ = sf.read(path, dtype="float32")
    return model.encode_units(torch.from_numpy(normalize_waveform(samples))[None], layers=layers, source=source)[0][
        :, 0
    ].numpy()


@pytest.mark.parametrize("source", SOURCES)
def test_reference_padding_does_not_mix_recordings(model, folder, recordings, source):
    config = DinoSRConfig(**{**model.config.to_diff_dict(), "reference_padding": True})
    padded = DinoSRForPreTraining(config).eval()
    padded.load_state_dict(model.state_dict())
    for units in UnitExtractor(padded, layers=[3, 2], source=source).units(recordings):
        if units.codes.shape[1]:
            wanted = units_in_one_pass(padded, folder / units.id, [3, 2], source)
            assert np.array_equal(units.codes, wanted), units.id


@pytest.mark.parametrize("source", SOURCES)
def test_units_equal_encode_units(model, folder, recordings, source):
    seconds = []
    extractor = UnitExtractor(model, layers=[3, 2], source=source)
    found = list(extractor.units(recordings, on_progress=seconds.append))
    assert [units.id for units in found] == ["long.wav", "b.wav", "a.wav", "deep/short.wav"]
    for units in found[:-1]:
        np.testing.assert_array_equal(units.codes, units_in_one_pass(model, folder / units.id, [3, 2], source))
    assert found[-1].codes.shape == (2, 0)  # shorter than a frame
    assert sum(seconds) == pytest.approx(sum(LENGTHS.values()) / 16_000)
    assert extractor.frame_seconds == 20 / 16_000


@pytest.mark.parametrize("source", SOURCES)
def test_units_of_windows_equal_one_pass(model, folder, recordings, source):
    plain = without_attention(model)
    expected = units_in_one_pass(plain, folder / "long.wav", [2, 3], source)

    def found(context_seconds):
        seconds = {"window_seconds": 0.051, "context_seconds": context_seconds, "batch_seconds": 0.2}
        extractor = UnitExtractor(plain, layers=[2, 3], source=source, **seconds)
        return next(extractor.units(recordings, indices=[recordings_index(recordings, "long.wav")])).codes

    np.testing.assert_array_equal(found(REACH), expected)
    assert (found(0.0) != expected).mean() > 0.01


def recordings_index(recordings, name):
    return [utterance.id for utterance in recordings.utterances].index(name)


def test_features_of_windows_equal_one_pass(model, folder, recordings):
    plain = without_attention(model)
    samples, _ = sf.read(folder / "long.wav", dtype="float32")
    values = torch.from_numpy(normalize_waveform(samples))[None]
    index = [recordings_index(recordings, "long.wav")]
    short = {"window_seconds": 0.051, "context_seconds": REACH}
    ((_, student),) = UnitExtractor(plain, layers=[1], **short).features(recordings, indices=index)
    np.testing.assert_allclose(student[:, 0], plain.layer_features(values, layers=[1])[0, 0], **SAME_ARITHMETIC)
    ((_, teacher),) = UnitExtractor(plain, layers=[3], source="teacher", **short).features(recordings, indices=index)
    targets = plain.compute_targets(values, plain.dinosr(values).extract_features)[1, 0]
    np.testing.assert_allclose(teacher[:, 0], targets, **SAME_ARITHMETIC)


def test_units_of_the_anchor(model, folder, recordings):
    extractor = UnitExtractor(model, layers=[3], source="anchor")
    for units in list(extractor.units(recordings))[:-1]:
        np.testing.assert_array_equal(units.codes, units_in_one_pass(model, folder / units.id, [3], "anchor"))
        assert len(np.unique(units.codes)) > 3 and units.codes.max() < 6
    student = next(UnitExtractor(model, layers=[3]).units(recordings))
    assert not np.array_equal(next(extractor.units(recordings)).codes, student.codes)
    with pytest.raises(ValueError, match=r"source=anchor has units, but no features\. Give student, teacher or"):
        next(extractor.features(recordings))
    with pytest.raises(ValueError, match="is_smoothed applies to features, and source='anchor' has none"):
        UnitExtractor(model, layers=[3], source="anchor", is_smoothed=True)
    with pytest.raises(ValueError, match=r"k-means is of layer 3 of the student .* layers \[3\] of the anchor"):
        next(extractor.units(recordings, kmeans=LayerKMeans(np.zeros((4, 36), np.float32), 3, "student")))
    with pytest.raises(
        ValueError, match=r"source='anchor' has units on the last layer alone, but layers=\[2\]. Give 3"
    ):
        UnitExtractor(model, layers=[2], source="anchor")
    with pytest.raises(ValueError, match=r"source='pupil' is unknown. Choose one of student, teacher, anchor"):
        UnitExtractor(model, layers=[2], source="pupil")


@pytest.mark.parametrize("front_end", ["conv", "log_mel"])
def test_waveforms_of_low_precision_models(folder, recordings, front_end):
    torch.manual_seed(0)
    model = randomize(DinoSRForPreTraining(tiny_config(feature_encoder=front_end))).eval().to(torch.bfloat16)
    index = [recordings_index(recordings, "long.wav")]
    ((name, features),) = UnitExtractor(model, layers=[2]).features(recordings, indices=index)
    samples, _ = sf.read(folder / name, dtype="float32")
    values = torch.from_numpy(normalize_waveform(samples))[None]
    exact, rounded = (
        model.layer_features(given, torch.ones_like(values), layers=[2])[0, 0].float()
        for given in (values, values.bfloat16())
    )
    np.testing.assert_array_equal(features[:, 0], exact)
    assert torch.equal(exact, rounded) == (front_end == "conv")  # convolutions round the waveform themselves


def test_unreadable_recordings_are_skipped(model, folder, tmp_path, caplog):
    for name in ("good", "bad"):
        sf.write(tmp_path / f"{name}.wav", noise(2_000), 16_000)
    recordings = open_recordings([tmp_path])
    (tmp_path / "bad.wav").write_bytes(b"gone")
    extractor = UnitExtractor(model, layers=[2])
    assert [units.id for units in extractor.units(recordings)] == ["good.wav"]
    assert "cannot be read" in extractor.unreadable["bad.wav"] and "bad.wav is left out" in caplog.text


@pytest.mark.parametrize("source", SOURCES)
def test_kmeans_of_a_layer(model, recordings, source, tmp_path):
    extractor = UnitExtractor(model, layers=[1], source=source)
    fitted = fit_layer_kmeans(extractor, recordings, 9)
    assert fitted.centroids.shape == (9, 36) and fitted.centroids.dtype == np.float32
    loaded = LayerKMeans.load(fitted.save(tmp_path / "deep" / "kmeans.safetensors"))
    np.testing.assert_array_equal(loaded.centroids, fitted.centroids)
    assert (loaded.layer, loaded.source) == (1, source)
    features = dict(extractor.features(recordings))
    for units in extractor.units(recordings, kmeans=loaded):
        rows = features[units.id][:, 0].astype(np.float64)
        distances = ((rows[:, None] - loaded.centroids) ** 2).sum(-1)
        np.testing.assert_array_equal(units.codes[0], distances.argmin(1))
    again, other = (fit_layer_kmeans(extractor, recordings, 9, max_frames=300, seed=seed) for seed in (0, 1))
    assert not np.array_equal(again.centroids, other.centroids)


def test_smoothed_features_are_normalised_averages_of_three_frames(model, recordings):
    plain = dict(UnitExtractor(model, layers=[1, 2]).features(recordings))
    for name, rows in UnitExtractor(model, layers=[1, 2], is_smoothed=True).features(recordings):
        assert len(rows) == len(plain[name])
        if len(rows):
            normalised = (plain[name] - plain[name].mean(axis=0)) / np.sqrt(plain[name].var(axis=0) + 1e-5)
            padded = np.concatenate([normalised[:1], normalised, normalised[-1:]])
            np.testing.assert_allclose(rows, (padded[:-2] + padded[1:-1] + padded[2:]) / 3, atol=1e-4)


def test_smoothing_is_for_the_student(model, recordings):
    kinds = [UnitExtractor(model, source="teacher", layers=[2], is_smoothed=on) for on in (False, True)]
    plain, smoothed = (dict(extractor.features(recordings)) for extractor in kinds)
    assert all(np.array_equal(plain[name], smoothed[name]) for name in plain)


def test_kmeans_of_another_layer_or_file_raises(model, recordings, tmp_path):
    kmeans = LayerKMeans(np.zeros((4, 36), np.float32), 1, "student")
    with pytest.raises(ValueError, match=r"k-means is of layer 1 of the student .* layers \[2\] of the teacher"):
        next(UnitExtractor(model, layers=[2], source="teacher").units(recordings, kmeans=kmeans))
    with pytest.raises(ValueError, match=r"was fitted with is_smoothed=False, but the extractor has .*=True. Use"):
        next(UnitExtractor(model, layers=[1], is_smoothed=True).units(recordings, kmeans=kmeans))
    with pytest.raises(ValueError, match="k-means clusters a single layer"):
        fit_layer_kmeans(UnitExtractor(model, layers=[2, 3]), recordings)
    with pytest.raises(ValueError, match=r"num_clusters=5000, but must be .* at most the number of frames, \d+\."):
        fit_layer_kmeans(UnitExtractor(model, layers=[2]), recordings, 5_000)
    with pytest.raises(ValueError, match="is not a k-means file"):
        LayerKMeans.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "student_feed_forward"}, "source=student_feed_forward has features and no units of its own"),
        ({"is_smoothed": True}, "is_smoothed applies to features and k-means, not to codewords"),
        ({"layers": [1]}, "layer=1 has no codebook"),
    ],
)
def test_options_without_effect_on_units_are_refused(model, recordings, options, message):
    extractor = UnitExtractor(model, **{"layers": [3], **options})
    with pytest.raises(ValueError, match=message):
        next(extractor.units(recordings))


def test_the_model_is_hashed_once_and_only_if_its_digest_decides(model, recordings, monkeypatch):
    hashed = []
    monkeypatch.setattr("dinosr_hf.units.extraction.model_digest", lambda model: hashed.append(model) or "abc")
    extractor = UnitExtractor(model, layers=[1])
    for dtype, times in (("bfloat16", 0), ("float32", 1)):
        kmeans = LayerKMeans(np.zeros((4, 36), np.float32), 1, "student", dtype=dtype, model_sha256="abc")
        next(extractor.units(recordings, kmeans=kmeans))
        assert len(hashed) == times


def test_files_of_earlier_releases_load(tmp_path):
    centroids = np.arange(12, dtype=np.float32).reshape(3, 4)
    file = tmp_path / "kmeans.safetensors"
    save_file({"centroids": centroids}, file, metadata={"kmeans": '{"layer": 9, "source": "teacher"}'})
    loaded = LayerKMeans.load(file)
    np.testing.assert_array_equal(loaded.centroids, centroids)
    assert (loaded.layer, loaded.source) == (9, "teacher")
    assert loaded.predict(centroids + 0.1).tolist() == [0, 1, 2]


def test_kmeans_of_another_model_is_refused(model, recordings, tmp_path):
    fitted = fit_layer_kmeans(UnitExtractor(model, layers=[1]), recordings, 4)
    kmeans = LayerKMeans.load(fitted.save(tmp_path / "kmeans.safetensors"))
    torch.manual_seed(1)
    other = DinoSRForPreTraining(model.config)
    message = rf"another model: its digest is {kmeans.model_sha256}, and that of this one"
    with pytest.raises(ValueError, match=message):
        next(UnitExtractor(other, layers=[1]).units(recordings, kmeans=kmeans))
    with pytest.raises(ValueError, match=message):  # before anything is written
        UnitCorpus(tmp_path / "units", UnitExtractor(other, layers=[1]), recordings, kmeans=kmeans)
    unknown = LayerKMeans(kmeans.centroids, 1, "student")  # as of a file of an earlier release
    assert unknown.digest == kmeans.digest  # a folder of units that it began is continued
    next(UnitExtractor(other, layers=[1]).units(recordings, kmeans=unknown))
    other.load_state_dict(model.state_dict())
    next(UnitExtractor(other, layers=[1]).units(recordings, kmeans=kmeans))
    next(UnitExtractor(other.to(torch.bfloat16), layers=[1]).units(recordings, kmeans=kmeans))


def test_kmeans_without_scikit_learn_raises(model, recordings, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r"needs sklearn.cluster: pip install .dinosr-hf\[analysis\]"):
        fit_layer_kmeans(UnitExtractor(model, layers=[2]), recordings)


@pytest.mark.parametrize("form", ["npy", "safetensors"])
def test_feature_files_have_the_features(model, folder, recordings, tmp_path, form):
    extractor = UnitExtractor(model, layers=[3, 1])
    files = FeatureFiles(tmp_path, extractor, recordings, form=form)
    assert files.write() == 4 and files.todo() == [] and files.write() == 0
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(f"*.{form}")}
    assert names == {f"layer-{layer}/{name}.{form}" for layer in (1, 3) for name in LENGTHS}
    for name, expected in extractor.features(recordings):
        path = tmp_path / "layer-1" / f"{name.removesuffix('.wav')}.{form}"
        found = np.load(path) if form == "npy" else load_file(path)["features"]
        np.testing.assert_array_equal(found, expected[:, 1])
        assert found.dtype == np.float32 and found.shape[1] == 36
    (tmp_path / "layer-3" / f"a.{form}").unlink()
    assert [recordings.utterances[index].id for index in files.todo()] == ["a.wav"]


def test_invalid_feature_files_raise(model, recordings, tmp_path):
    extractor = UnitExtractor(model, layers=[1])
    with pytest.raises(ValueError, match=r"form='txt' is unknown. Choose one of npy, safetensors"):
        FeatureFiles(tmp_path, extractor, recordings, form="txt")
    with pytest.raises(ValueError, match=r"source=anchor has units, but no features\. Give student, teacher or"):
        FeatureFiles(tmp_path, UnitExtractor(model, layers=[3], source="anchor"), recordings)
    for suffix in ("wav", "flac"):
        sf.write(tmp_path / f"same.{suffix}", noise(500), 16_000)
    with pytest.raises(ValueError, match=r"same\.flac, same\.wav would all be written to .*same\.npy"):
        FeatureFiles(tmp_path, extractor, open_recordings([tmp_path]))


def test_load_model_needs_a_pretraining_checkpoint(model, tmp_path):
    save_folder(model, tmp_path / "pretrained")
    loaded = load_model(tmp_path / "pretrained", dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16 and not loaded.training
    save_folder(model.dinosr, tmp_path / "encoder")
    with pytest.raises(ValueError, match="has DinoSRModel, but units come from a DinoSRForPreTraining"):
        load_model(tmp_path / "encoder")
    with pytest.raises(ValueError, match="nowhere is neither a folder nor a model"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="dtype='int8' is unknown"):
        load_model(tmp_path / "pretrained", dtype="int8")


def test_half_precision_changes_few_units(model, recordings):
    half = DinoSRForPreTraining(model.config)
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    for source in SOURCES:
        exact, rough = (
            np.concatenate([u.codes[0] for u in UnitExtractor(m, layers=[2], source=source).units(recordings)])
            for m in (model, half)
        )
        assert 0.7 < (exact == rough).mean() < 1


def test_invalid_arguments_raise(model, recordings):
    with pytest.raises(ValueError, match="layer=1 has no codebook"):
        next(UnitExtractor(model, layers=[1]).units(recordings))
    with pytest.raises(ValueError, match="layer=4 does not exist"):
        UnitExtractor(model, layers=[4])
    with pytest.raises(ValueError, match="source='both' is unknown"):
        UnitExtractor(model, layers=[2], source="both")
    with pytest.raises(ValueError, match=r"window_seconds=1.* must be more than twice context_seconds="):
        UnitExtractor(model, layers=[2], window_seconds=1.0)


@pytest.mark.parametrize(
    ("centroids", "about", "message"),
    [
        (np.zeros(4), {}, r"its centroids have shape \(4,\); expected \(clusters, hidden size\)"),
        (np.zeros((0, 4)), {}, r"its centroids have shape \(0, 4\)"),
        (np.full((2, 4), np.nan), {}, "its centroids are not all finite: fit them again"),
        (np.zeros((2, 4)), {"layer": 0}, "it has layer=0, .*expected a number from 1"),
        (np.zeros((2, 4)), {"layer": "5"}, "it has layer='5'"),
        (np.zeros((2, 4)), {"source": "anchor"}, "source='anchor' .*student or teacher"),
        (np.zeros((2, 4)), {"is_smoothed": 1}, "is_smoothed=1; expected .* true or false"),
        (np.zeros((2, 4)), {"colour": 1}, "unexpected keyword argument 'colour'"),
    ],
)
def test_centroids_that_are_none_are_refused(tmp_path, centroids, about, message):
    metadata = {"kmeans": json.dumps({"layer": 2, "source": "student", "is_smoothed": False, **about})}
    file = tmp_path / "kmeans.safetensors"
    save_file({"centroids": centroids.astype(np.float32)}, file, metadata=metadata)
    with pytest.raises(ValueError, match=rf"^{file} is not a k-means file: .*{message}.*`dinosr kmeans` wrote\.$"):
        LayerKMeans.load(file)


@pytest.mark.parametrize("num_lost", [10, 10_000])
def test_a_cut_kmeans_file_is_named(tmp_path, num_lost):
    file = LayerKMeans(np.zeros((2, 4), np.float32), 2, "student").save(tmp_path / "kmeans.safetensors")
    assert LayerKMeans.load(file).layer == 2
    file.write_bytes(file.read_bytes()[: max(3, file.stat().st_size - num_lost)])
    with pytest.raises(ValueError, match=rf"^{file} .*bytes.* Download it again\. Give a file that `dinosr kmeans`"):
        LayerKMeans.load(file)
