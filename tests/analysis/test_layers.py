"""Evaluation of layers by k-means, probe and canonical correlations: known answers, slow twins, the script."""

import csv
import io
import json
import math

import numpy as np
import pytest
import soundfile
import torch
from sklearn.linear_model import Ridge

from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.analysis import Reference, Segment
from dinosr_hf.analysis.layers import (
    REPORT,
    LayerFrames,
    Recordings,
    canonical_correlations,
    check_disjoint_speakers,
    draw_frames,
    evaluate_layer,
    probe_accuracy,
)
from dinosr_hf.data import open_recordings
from dinosr_hf.units import UnitExtractor
from dinosr_hf.utils.model_folder import save_folder
from scripts import load_command
from tiny import randomize, tiny_config
from tolerances import SAME_ARITHMETIC

# -- canonical correlations


def in_sample(features, classes, regularization=0.0):
    return canonical_correlations(features, classes, features, classes, regularization=regularization)


def test_one_dimension_and_two_classes_give_pearsons_correlation():
    # Deviations -1, 0, 0, 1 and -1/2, -1/2, 1/2, 1/2: 1 / sqrt(2 * 1).
    found = in_sample([[0.0], [1.0], [1.0], [2.0]], ["a", "a", "b", "b"])
    np.testing.assert_allclose(found.values, [1 / math.sqrt(2)])
    assert found.weights.tolist() == [1.0]
    assert found.values.mean() == found.projection_weighted == pytest.approx(1 / math.sqrt(2))


def test_features_that_determine_the_classes_correlate_perfectly():
    generator = np.random.default_rng(0)
    classes = generator.integers(0, 4, 60)
    mixed = np.eye(4)[classes] @ generator.standard_normal((4, 7)) + 3.0
    found = in_sample(mixed, classes)
    np.testing.assert_allclose(found.values, np.ones(3), atol=1e-9)  # K - 1
    # Uninformative directions change nothing.
    noisy = np.concatenate([mixed, generator.standard_normal((60, 5))], axis=1)
    np.testing.assert_allclose(in_sample(noisy, classes).values, np.ones(3), atol=1e-9)


def worked_features():
    """Two uncorrelated dimensions, each a different contrast of three classes with noise."""
    classes = np.repeat([0, 1, 2], 4)
    first = np.array([1.0, -1.0, 0.0])[classes] + np.tile([1, 1, -1, -1], 3) * 0.5
    second = np.array([1.0, 1.0, -2.0])[classes] + np.tile([1, -1, 1, -1], 3) * 2.0
    # Variances of the contrasts 2/3 and 2, of the noise 1/4 and 4.
    correlations = [math.sqrt((2 / 3) / (2 / 3 + 1 / 4)), math.sqrt(2 / (2 + 4))]
    return np.stack([first, second], axis=1), classes, correlations


def test_projection_weighting_by_hand():
    features, classes, (high, low) = worked_features()
    found = in_sample(features, classes)
    np.testing.assert_allclose(found.values, [high, low])
    np.testing.assert_allclose(found.weights, [0.5, 0.5])
    assert found.projection_weighted == pytest.approx((high + low) / 2) == found.values.mean()
    # The second dimension three times: its component weighs three times as much.
    found = in_sample(features[:, [0, 1, 1, 1]], classes)
    np.testing.assert_allclose(found.values, [high, low])
    np.testing.assert_allclose(found.weights, [0.25, 0.75])
    assert found.projection_weighted == pytest.approx((high + 3 * low) / 4) != found.values.mean()


def test_correlations_equal_cosines_between_subspaces():
    """Björck and Golub, 1973: the singular values of the product of two orthonormal bases."""
    generator = np.random.default_rng(1)
    classes = generator.integers(0, 5, 80)
    features = generator.standard_normal((80, 6)) + generator.standard_normal((5, 6))[classes]
    bases = [np.linalg.qr(view - view.mean(axis=0))[0] for view in (features, np.eye(5)[classes][:, :4])]
    expected = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    np.testing.assert_allclose(in_sample(features, classes).values, expected, atol=1e-9)
    # Invertible maps of the features change nothing; reordering the frames does.
    turned = features @ generator.standard_normal((6, 6)) - 2.0
    np.testing.assert_allclose(in_sample(turned, classes).values, expected, atol=1e-9)
    assert not np.allclose(in_sample(features[::-1], classes).values, expected, atol=1e-2)


def test_noise_correlates_only_on_the_frames_it_was_fitted_on():
    generator = np.random.default_rng(2)
    features, classes = generator.standard_normal((2, 300, 40)), generator.integers(0, 6, (2, 300))
    fitted = in_sample(features[0], classes[0]).values.mean()
    held_out = canonical_correlations(features[0], classes[0], features[1], classes[1]).values.mean()
    assert fitted > 0.25 and abs(held_out) < 0.1


def test_unknown_classes_are_left_out():
    features, classes, _ = worked_features()
    more = np.concatenate([features, [[50.0, -50.0]]])
    found = canonical_correlations(features, classes, more, [*classes, 3], regularization=0.0)
    np.testing.assert_allclose(found.values, in_sample(features, classes).values)
    nothing = canonical_correlations(features, classes, features[:2], [7, 7])
    assert nothing.values.tolist() == [0, 0]


def test_constant_dimensions_change_nothing():
    features, classes, (high, low) = worked_features()
    found = in_sample(np.concatenate([features, np.full((12, 1), 7.0)], axis=1), classes)
    np.testing.assert_allclose(found.values, [high, low])


# -- probe


def test_probe_separates_classes_linearly():
    train, test = [[0.0, 5.0], [1.0, 5.0], [3.0, 5.0], [4.0, 5.0]], [[1.9, 5.0], [2.1, 9.0], [-3.0, 5.0]]
    assert probe_accuracy(train, ["a", "a", "b", "b"], test, ["a", "b", "a"]) == 1.0
    assert probe_accuracy(train, ["a", "a", "b", "b"], test, ["a", "a", "c"]) == 1 / 3


def test_probe_equals_ridge_regression_to_one_hot_vectors():
    generator = np.random.default_rng(3)
    centers = generator.standard_normal((4, 5))
    classes = generator.integers(0, 4, (2, 200))
    features = centers[classes] + 1.5 * generator.standard_normal((2, 200, 5))
    mean, deviation = features[0].mean(axis=0), features[0].std(axis=0)
    fitted, held_out = (features - mean) / deviation
    ridge = Ridge(alpha=0.1 * 200).fit(fitted, np.eye(4)[classes[0]])
    expected = (ridge.predict(held_out).argmax(axis=1) == classes[1]).mean()
    found = probe_accuracy(features[0], classes[0], features[1], classes[1], regularization=0.1)
    assert found == pytest.approx(expected) and 0.5 < found < 0.95
    shuffled = generator.permutation(classes[0])
    assert probe_accuracy(features[0], shuffled, features[1], classes[1]) < 0.45


@pytest.mark.parametrize("metric", [probe_accuracy, canonical_correlations])
def test_probes_refuse(metric):
    with pytest.raises(ValueError, match=r"train has features of shape \(2,\).*must have \(n, D\)"):
        metric([1.0, 2.0], ["a", "b"], [[1.0]], ["a"])
    with pytest.raises(ValueError, match=r"test has features of shape \(1, 1\) and classes of shape \(2,\)"):
        metric([[1.0], [2.0]], ["a", "b"], [[1.0]], ["a", "b"])
    with pytest.raises(ValueError, match="There is one class only in train"):
        metric([[1.0], [2.0]], ["a", "a"], [[1.0]], ["a"])


# -- frames


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Eight recordings of four speakers, whose phones differ in level, and their labels of 10 ms."""
    folder = tmp_path_factory.mktemp("layers")
    generator = np.random.default_rng(0)
    for split in ("speech", "more"):
        (folder / split).mkdir()
    labels, tables = [], {"speech": [], "more": []}
    for number in range(8):
        steps = np.repeat(generator.integers(0, 3, 20), 5)
        samples = generator.standard_normal(16_000) * np.array([0.01, 0.1, 0.5])[steps].repeat(160)
        split = "speech" if number < 6 else "more"
        soundfile.write(folder / split / f"{number}.wav", np.clip(samples, -0.9, 0.9), 16_000)
        tables[split].append(f"{number}.wav,s{number // 2}")
        labels.append({"name": str(number), "phones": [["SIL", "a", "b"][step] for step in steps]})
    for split, rows in tables.items():
        (folder / split / "metadata.csv").write_text("\n".join(["file_name,speaker_id", *rows]) + "\n")
    (folder / "phones.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    return folder


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return randomize(DinoSRForPreTraining(tiny_config()))


def recordings_of(corpus):
    source = open_recordings([corpus / "speech"])
    labels = {str(number): [Segment("a", 0.0, 0.5), Segment("b", 0.5, 1.0)] for number in range(5)}
    return Recordings.with_labels(source, Reference([u.id for u in source.utterances], labels, speakers=[*"xxyyzz"]))


def test_all_frames_are_drawn_with_their_labels(corpus, model):
    recordings, extractor = recordings_of(corpus), UnitExtractor(model, layers=[3, 1])
    frames = draw_frames(extractor, recordings, max_frames=10**6)
    num_frames = model.config.num_frames(16_000)
    assert frames.features.shape == (5 * num_frames, 2, model.config.hidden_size)
    expected = dict(extractor.features(recordings.source))
    for recording, speaker in zip(("0.wav", "1.wav", "2.wav", "3.wav", "4.wav"), "xxyyz", strict=True):
        own = frames.recordings == recording
        np.testing.assert_allclose(frames.features[own], expected[recording], **SAME_ARITHMETIC)
        assert set(frames.speakers[own]) == {speaker}
        # Centres are at (20 i + 20) / 16,000: the second half is b.
        assert frames.phones[own].tolist() == ["a" if 20 * i + 20 < 8_000 else "b" for i in range(num_frames)]


def test_the_same_frames_are_drawn_for_any_layer(corpus, model):
    recordings = recordings_of(corpus)
    first = draw_frames(UnitExtractor(model, layers=[3, 1]), recordings, max_frames=400)
    second = draw_frames(UnitExtractor(model, layers=[1], batch_seconds=1.0), recordings, max_frames=400)
    assert 300 < len(first.features) < 500
    np.testing.assert_allclose(first.features[:, 1:], second.features, **SAME_ARITHMETIC)
    other = draw_frames(UnitExtractor(model, layers=[1]), recordings, max_frames=400, seed=1)
    assert first.phones.tolist() == second.phones.tolist()
    assert not np.array_equal(second.features[:50], other.features[:50])


def test_speakers_are_split_into_disjoint_sets(corpus):
    recordings = recordings_of(corpus)
    for seed in range(3):
        fit, held_out = recordings.split(seed)
        assert fit.ids | held_out.ids == recordings.ids and len(fit.speakers) == 1 and len(held_out.speakers) == 2
        check_disjoint_speakers(fit, held_out)
    with pytest.raises(ValueError, match="have 1 speakers in common, for example"):
        check_disjoint_speakers(fit, fit)
    with pytest.raises(ValueError, match=r"All recordings are of one speaker, '[xyz]'"):
        fit.split()


def test_labels_that_do_not_fit_are_named(corpus, model):
    source = open_recordings([corpus / "speech"])
    reference = Reference(["0.wav"], {"0": ["a"] * 10})
    with pytest.raises(ValueError, match=r"^0.wav: 10 labels of 0.01 s cover 0.100 s"):
        draw_frames(UnitExtractor(model, layers=[1]), Recordings.with_labels(source, reference))


# -- layers


def known_frames(seed, speakers, num_frames=400):
    """Frames whose layer 0 encodes phones, layer 1 speakers, and layer 2 nothing."""
    generator = np.random.default_rng(seed)
    phones, voices = generator.integers(0, 3, num_frames), generator.integers(0, len(speakers), num_frames)
    features = 0.1 * generator.standard_normal((num_frames, 3, 6))
    features[:, 0, :3] += 5 * np.eye(3)[phones]
    codes = np.array([sum(map(ord, speaker)) % 6 for speaker in speakers])
    features[:, 1] += np.eye(6)[codes[voices]]
    names = np.array(speakers)[voices]
    halves = np.array([f"{name}-{number % 2}" for number, name in enumerate(names)])
    return LayerFrames(features.astype(np.float32), np.array(["SIL", "a", "b"])[phones], names, halves)


def test_metrics_show_what_a_layer_knows():
    train, test = known_frames(0, ["p", "q"]), known_frames(1, ["r", "s", "t"])
    phones, voices, nothing = (evaluate_layer(train, test, layer, num_clusters=3) for layer in range(3))
    assert list(phones) == list(REPORT.metrics)
    assert (phones["num_clusters"], phones["num_frames"]) == (3, 400)
    assert phones["kmeans_phone_purity"] == phones["kmeans_pnmi"] == phones["phone_probe"] == 1.0
    assert phones["phone_cca"] > 0.99 and voices["speaker_cca"] > 0.9
    for figures in (voices, nothing):
        assert figures["phone_probe"] < 0.5 and figures["kmeans_pnmi"] < 0.1 and abs(figures["phone_cca"]) < 0.3
    assert abs(phones["speaker_cca"]) < 0.3 and abs(nothing["speaker_cca"]) < 0.3


def test_speakers_with_one_recording_have_no_correlation():
    train, test = (
        frames._replace(recordings=frames.speakers) for frames in (known_frames(0, ["p", "q"]), known_frames(1, ["r"]))
    )
    assert math.isnan(evaluate_layer(train, test, 0, num_clusters=3)["speaker_cca"])


def test_markdown_csv_and_json_agree(tmp_path):
    figures = dict(zip(REPORT.metrics, (100, 20_000, 0.5, 0.25, 0.75, 0.125, math.nan), strict=True))
    rows = [{"model": "runs/a|b", "source": "student", "layer": 2, **figures}]
    lines = REPORT.markdown(rows).splitlines()
    assert lines[2] == "| runs/a\\|b | student | 2 | 100 | 20000 | 0.500 | 0.250 | 0.750 | 0.125 | nan |"
    assert lines[0].count("|") == lines[1].count("|") == 11
    (row,) = csv.DictReader(io.StringIO(REPORT.csv(rows)))
    assert (row["model"], row["layer"], row["phone_probe"]) == ("runs/a|b", "2", "0.75")
    REPORT.write(tmp_path, "layers", rows)
    (row,) = json.loads((tmp_path / "layers.json").read_text(encoding="utf-8"))
    assert row["speaker_cca"] is None and row["phone_cca"] == 0.125


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("models") / "ours"
    save_folder(model, path)
    return path


@pytest.mark.parametrize("fit", [[], ["--fit_data"]], ids=["halves", "fit-data"])
def test_the_script_writes_table_and_plot(corpus, folder, tmp_path, capsys, fit):
    words = [str(folder), "--data", str(corpus / "speech"), "--labels", str(corpus / "phones.jsonl")]
    words += [*fit, str(corpus / "more")] if fit else []
    words += ["--output_dir", str(tmp_path), "--num_clusters", "4", "--max_frames", "500", "--sources", "student"]
    load_command("evaluate_layers").main([*words, "teacher"])
    printed = capsys.readouterr().out
    assert f"Fitted on {1} speakers, evaluated on {3 if fit else 2} others." in printed
    found = json.loads((tmp_path / "layers.json").read_text(encoding="utf-8"))
    assert [(row["source"], row["layer"]) for row in found] == [
        (s, n) for s in ("student", "teacher") for n in (1, 2, 3)
    ]
    assert (tmp_path / "layers.md").read_text(encoding="utf-8") in printed
    assert (tmp_path / "layers.png").stat().st_size > 10_000 and (tmp_path / "layers.pdf").is_file()


def test_the_script_refuses_common_speakers(corpus, folder, tmp_path):
    words = [str(folder), "--data", str(corpus / "speech"), "--labels", str(corpus / "phones.jsonl")]
    with pytest.raises(SystemExit, match=r"evaluate_layers.py: .*3 speakers in common, for example 's0'"):
        load_command("evaluate_layers").main(
            [*words, "--fit_data", str(corpus / "speech"), "--output_dir", str(tmp_path)]
        )
