"""Anchors: labels of frames from MFCCs, files and models; their files; the arguments; runs that have one."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest
import soundfile
import torch
from transformers import BertConfig, HubertConfig, HubertModel

from audio_files import write
from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.analysis import frame_labels
from dinosr_hf.analysis.baselines import mfcc
from dinosr_hf.analysis.kmeans import KMeans
from dinosr_hf.data import FolderSource, SpeechStream, StreamWindow
from dinosr_hf.data.collator import Part
from dinosr_hf.pretraining import (
    ArgumentError,
    CheckpointError,
    RunArguments,
    anchor_making,
    parse_arguments,
    read_checkpoint,
    run,
)
from dinosr_hf.pretraining.anchor import MfccAnchor, TrackAnchor, anchor_digest, load_anchor, save_anchor
from dinosr_hf.pretraining.anchor_arguments import anchor_label_names, anchor_weights_at
from dinosr_hf.pretraining.anchor_making import make_anchor
from dinosr_hf.pretraining.scaling import scale_to_batch
from dinosr_hf.units import fit_layer_kmeans, open_extractors
from dinosr_hf.utils.model_folder import feature_extractor
from pretraining_runs import CHANCE, CONFIGS, TINY, assert_same_run, metrics_of, tiny_arguments, write_config
from tiny import white_noise

CPU = torch.device("cpu")
EMPTY = np.array([], np.uint8)  # of a recording without labels
TRACKS = {"a": np.array([3, 1, 4, 1, 5], np.uint8), "no": EMPTY, "ü/b.flac": np.array([2, 6], np.uint8), "none": EMPTY}


def track_anchor(**changes):
    grid = {"num_labels": 7, "stride": 320, "field": 400, "model_stride": 320, "model_field": 400}
    return TrackAnchor(TRACKS, **{**grid, **changes})


def part(name="a", num_samples=2_000, start=0, speed=1.0, *, field=400, at_speed=None):
    """Return a part of noise; `at_speed` is its length for the model."""
    num_frames = ((at_speed or num_samples) - field) // 320 + 1
    return Part(name, white_noise(num_samples), start, num_frames, speed)


def mfcc_anchor(seed=0):
    centroids = mfcc(white_noise(8_000))[[seed, 5, 11, 17]]
    return MfccAnchor(KMeans(centroids), field=400, is_tuned=True)


@pytest.mark.parametrize(
    ("num_samples", "start", "expected"),
    [
        (1680, 0, [3, 1, 4, 1, 5]),
        (1040, 320, [1, 4, 1]),
        (720, 320 + 159, [1, 4]),
        (720, 320 + 160, [4, 1]),
        (720, 1440, [5, 5]),
    ],
    ids=["whole", "later", "just before the middle", "from the middle on", "past the end"],
)
def test_a_frame_gets_the_label_with_the_nearest_centre(num_samples, start, expected):
    labels = track_anchor()(part(num_samples=num_samples, start=start))
    assert labels.tolist() == expected and labels.dtype == np.int64


def test_other_grids_meet_at_their_centres():
    # Labels are centred on 80, 240, ..., frames on 280, 600, ...: the nearest label is that of the centre's 10 ms.
    anchor = TrackAnchor({"a": np.arange(50, dtype=np.uint8)}, 50, 160, 160, 320, 560)
    for start in (0, 40, 100, 333):
        centres = start + 280 + 320 * np.arange(10)
        labels = anchor(part(num_samples=560 + 320 * 9, start=start, field=560))
        assert labels.tolist() == (centres // 160).tolist()


@pytest.mark.parametrize("speed", [0.7, 1.0, 1.3])
def test_labels_are_at_the_same_place_of_the_recording_at_any_speed(speed):
    # Label k is that of the samples from 160 k on.
    anchor = TrackAnchor({"a": np.arange(90, dtype=np.uint8)}, 90, 160, 160, 320, 400)
    labels = anchor(part(num_samples=int(3_000 * speed) + 1, start=333, speed=speed, at_speed=3_000))
    assert labels.tolist() == [int((333 + (200 + 320 * frame) * speed) // 160) for frame in range(9)]


def test_recordings_without_a_track_have_no_labels():
    for name in ("unknown", "no"):
        assert track_anchor()(part(name, 1040)).tolist() == [-100] * 3


@pytest.mark.parametrize("is_tuned", [True, False], ids=["tuned", "textbook"])
def test_mfcc_labels_are_the_nearest_clusters_of_the_part(is_tuned):
    features = mfcc(white_noise(8_000), field=325, tuned=is_tuned)
    anchor = MfccAnchor(KMeans(features[[3, 14, 15]]), 325, is_tuned)
    distances = ((features[:, None] - anchor.kmeans.centroids) ** 2).sum(axis=-1)
    nearest = distances.argmin(axis=1)
    labels = anchor(part("anything", 8_000, 123, field=325))
    assert labels.tolist() == nearest.tolist() and len(set(labels)) > 1
    for speed in (0.8, 1.25):
        at_speed = anchor(part("anything", 8_000, 123, speed, field=325, at_speed=int(8_000 / speed)))
        centres = (162.5 + 320 * np.arange(len(at_speed))) * speed
        recorded = abs(centres[:, None] - (162.5 + 320 * np.arange(len(nearest)))).argmin(axis=1)
        assert at_speed.tolist() == nearest[recorded].tolist() and len(at_speed) != len(nearest)


def test_a_slow_part_may_be_shorter_than_a_frame_as_recorded():
    labels = mfcc_anchor()(part(num_samples=330, speed=0.61, at_speed=540))
    assert labels.shape == (1,) and 0 <= labels[0] < 4


@pytest.mark.parametrize("anchor", [track_anchor(), mfcc_anchor()], ids=["tracks", "mfcc"])
def test_a_stored_anchor_gives_the_same_labels(tmp_path, anchor):
    save_anchor(anchor, tmp_path)
    for again in (load_anchor(tmp_path), pickle.loads(pickle.dumps(anchor))):
        assert type(again) is type(anchor) and again.num_labels == anchor.num_labels
        assert anchor_digest(again) == anchor_digest(anchor)
        for name in ("a", "ü/b.flac", "no", "none", "c"):
            assert again(part(name, start=300)).tolist() == anchor(part(name, start=300)).tolist()
    assert anchor_digest(mfcc_anchor(seed=1)) != anchor_digest(mfcc_anchor())
    assert anchor_digest(track_anchor(stride=160)) != anchor_digest(track_anchor())


def test_a_missing_or_damaged_anchor_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"anchor\.safetensors is missing: .* base_model set to"):
        load_anchor(tmp_path)
    (tmp_path / "anchor.safetensors").write_bytes(mfcc_anchor().to_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"anchor\.safetensors cannot be read as an anchor: "):
        load_anchor(tmp_path)


def test_weights_are_annealed_linearly(tmp_path, recordings):
    def weights(step, **changes):
        return anchor_weights_at(tiny_arguments(tmp_path, recordings, **changes).run, step)

    assert weights(3) is None
    assert weights(3, anchor="mfcc") == (2.0, 0.5)
    options = {"anchor": "mfcc", "anchor_weight": 4.0, "anchor_end_weight": 1.0, "anchor_end_step": 6}
    assert [weights(step, **options) for step in (0, 2, 6, 9)] == [(4.0, 0.5), (3.0, 0.5), (1.0, 0.5), (1.0, 0.5)]
    options = {"anchor": "mfcc", "anchor_end_unmasked_share": 0.0, "anchor_end_step": 4}
    assert [weights(step, **options).unmasked_share for step in (0, 1, 4)] == [0.5, 0.375, 0.0]


def test_the_end_of_annealing_scales_with_the_batch(tmp_path, recordings):
    options = {"anchor": "mfcc", "anchor_end_weight": 1.0, "anchor_end_step": 6}
    arguments = tiny_arguments(
        tmp_path, recordings, **options, scale_to_batch=True, reference_step_seconds=16.0, step_seconds=8.0
    )
    assert scale_to_batch(arguments)[0].run.anchor_end_step == 12


@pytest.fixture
def files(tmp_path, recordings):
    """Return a folder with good and bad anchors."""
    rows = [{"name": f"{number:02d}", "phones": ["x", "y", "y", "z"] * 30} for number in range(3)]
    rows = [{**row, "phones": row["phones"][: 78 + 15 * number]} for number, row in enumerate(rows)]
    rows.append({"name": "04", "phones": [{"label": "x", "start": 0.25, "end": 0.75}]})
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    others = [{"name": "elsewhere", "phones": ["x"] * 100}]
    (tmp_path / "others.jsonl").write_text("\n".join(map(json.dumps, others)))
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "hello"}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    DinoSRForPreTraining(tiny_arguments(tmp_path, recordings).model_config()).save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor_weight": 1.0}, r"anchor_weight=1\.0 is set, but anchor is not\. Leave .* out, or set --anchor\."),
        ({"anchor": "none", "anchor_layer": 1}, r"anchor_layer=1 is set, but anchor is not"),
        ({"anchor_layer": 1}, r"anchor_layer=1 is set, but anchor is not"),
        ({"anchor_features": "textbook"}, r"anchor_features=textbook is set, but anchor is not"),
        ({"num_anchor_labels": 8}, r"num_anchor_labels=8 is set, but anchor is not\. Set --anchor"),
        ({"anchor": "mfcc", "anchor_layer": 1}, r"anchor_layer=1 is set, but anchor=mfcc has no layers"),
        (
            {"anchor": "{}/labels.jsonl", "anchor_features": "textbook"},
            r"anchor_features=textbook is set, but anchor=.*labels\.jsonl has no MFCCs",
        ),
        ({"anchor": "mfcc", "anchor_weight": -1.0}, r"anchor_weight=-1\.0 is out of range: it must be at least 0"),
        ({"anchor": "mfcc", "anchor_unmasked_share": 1.5}, r"anchor_unmasked_share=1\.5 .* at least 0 and at most 1"),
        ({"anchor": "mfcc", "anchor_end_weight": 1.0}, r"anchor_end_step=0 does not fit anchor_end_weight=1\.0 and"),
        ({"anchor": "mfcc", "anchor_end_step": 3}, r"anchor_end_step=3 does not fit .*Set it and at least one"),
        (
            {"anchor": "mfcc", "conv_stride": [5, 8, 4]},
            r"anchor=mfcc labels frames every 320 samples, but the model has one every 160.*Change conv_stride",
        ),
        ({"anchor": "{}/model"}, r"model is a model: set --anchor_layer, from 1 to 2\."),
        ({"anchor": "{}/nowhere"}, r"anchor=.*nowhere is neither a folder nor a model on the Hub"),
        ({"anchor": "{}/nowhere.jsonl"}, r"no frame labels that can be read: .*nowhere\.jsonl does not exist"),
        ({"anchor": "{}/empty"}, r"empty is a folder with neither a model .* nor TextGrids\. If it is a run, let it"),
        ({"anchor": "{}/manifest.jsonl"}, r'no frame labels that can be read: .*line 1, must be .* a list "phones"'),
        (
            {"anchor": "{}/labels.jsonl", "num_anchor_labels": 9},
            r"num_anchor_labels=9, but anchor=.*labels\.jsonl has 4 different labels, with silence",
        ),
        (
            {"anchor": "{}/labels.jsonl", "streaming": True},
            r"labels all recordings before the first step, but a stream .* Use --anchor mfcc",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_do_not_fit_are_refused(files, recordings, options, message):
    options = {
        name: value.replace("{}", str(files)) if isinstance(value, str) else value for name, value in options.items()
    }
    with pytest.raises(ArgumentError, match=message):
        tiny_arguments(files, recordings, **options)


def made(folder, recordings, **options):
    arguments = tiny_arguments(folder, recordings, **options)
    return make_anchor(arguments, FolderSource(recordings), CPU)


def test_mfcc_clusters_depend_on_seed_and_features_only(tmp_path, recordings, monkeypatch):
    first = made(tmp_path, recordings, anchor="mfcc", num_anchor_labels=6)
    assert (first.num_labels, first.field, first.is_tuned) == (6, 325, True)
    assert anchor_digest(made(tmp_path, recordings, anchor="mfcc", num_anchor_labels=6)) == anchor_digest(first)
    for change in ({"seed": 1}, {"anchor_features": "textbook"}):
        other = made(tmp_path, recordings, anchor="mfcc", num_anchor_labels=6, **change)
        assert anchor_digest(other) != anchor_digest(first)
    monkeypatch.setattr(anchor_making, "MAX_MFCC_FRAMES", 100)
    assert anchor_digest(made(tmp_path, recordings, anchor="mfcc", num_anchor_labels=6)) != anchor_digest(first)
    with pytest.raises(ArgumentError, match=r"num_anchor_labels=900 is more than the \d+ frames of the recordings"):
        made(tmp_path, recordings, anchor="mfcc", num_anchor_labels=900)


def test_few_long_recordings_give_further_parts_round_by_round(tmp_path, monkeypatch):
    speech, max_samples = tmp_path / "speech", 2 * 16_000
    for name, seconds in {"a": 9, "b": 9, "c": 1}.items():
        write(speech / f"{name}.wav", seconds * 16_000)
    plain, parts = FolderSource.load, []

    def load(self, index, start=0, num_samples=None):
        parts.append((index, start, num_samples))
        return plain(self, index, start, num_samples)

    monkeypatch.setattr(FolderSource, "load", load)
    made(tmp_path, speech, anchor="mfcc", num_anchor_labels=6)
    every = parts.copy()
    assert sorted(index for index, *_ in every[:3]) == [0, 1, 2]
    for index, (_, length) in enumerate(FolderSource(speech).utterances):
        own = sorted((start, num_samples) for number, start, num_samples in every if number == index)
        if length < max_samples:
            assert own == [(0, length)]
        else:
            first, last = own[0][0], own[-1][0]
            assert own == [(start, max_samples) for start in range(first, last + 1, max_samples)]
            assert first < max_samples and length - 2 * max_samples < last <= length - max_samples
    # One part of each is enough for fewer frames; two have 198.
    parts.clear()
    monkeypatch.setattr(anchor_making, "MAX_MFCC_FRAMES", 200)
    made(tmp_path, speech, anchor="mfcc", num_anchor_labels=6)
    assert parts == every[:3]
    more = tiny_arguments(tmp_path, speech, anchor="mfcc", num_anchor_labels=300)  # than those of one part of each
    anchor_making.check_anchor(more, FolderSource(speech))


def test_mfcc_clusters_of_a_stream_are_of_its_first_window(tmp_path, recordings):
    arguments = tiny_arguments(tmp_path, recordings, anchor="mfcc", num_anchor_labels=6, streaming=True)
    closed = []

    class Stream(SpeechStream):
        def __init__(self):
            pass

        def windows(self, epoch, first=0, state=None):
            try:
                yield StreamWindow(FolderSource(recordings), 0, {})
                raise AssertionError("a second window is read")
            finally:
                closed.append(epoch)

    streamed = make_anchor(arguments, Stream(), CPU)
    assert closed == [0]
    assert anchor_digest(streamed) == anchor_digest(make_anchor(arguments, FolderSource(recordings), CPU))


def test_without_a_number_there_are_as_many_labels_as_codewords(tmp_path, recordings):
    assert tiny_arguments(tmp_path, recordings, anchor="mfcc").model.num_anchor_labels == 8
    assert tiny_arguments(tmp_path, recordings, anchor="mfcc", num_anchor_labels=3).model.num_anchor_labels == 3


def test_none_turns_an_anchor_of_the_file_off(tmp_path, recordings):
    arguments = tiny_arguments(tmp_path, recordings, anchor="none")
    assert arguments.run.anchor is None and arguments.model.num_anchor_labels == 0


def test_labels_of_a_file_are_those_of_the_frames(files, recordings):
    arguments = tiny_arguments(files, recordings, anchor=str(files / "labels.jsonl"))
    assert arguments.model.num_anchor_labels == 4
    source, config = FolderSource(recordings), arguments.model_config()
    anchor = make_anchor(arguments, source, CPU)
    names = ["SIL", "x", "y", "z"]
    found = {}
    for index, (utterance_id, num_samples) in enumerate(source.utterances):
        labels = anchor(Part(utterance_id, source.load(index), 0, config.num_frames(num_samples)))
        found[utterance_id] = [names[label] if label >= 0 else None for label in labels]
    assert {name for name in found if None not in found[name]} == {"00.wav", "01.flac", "02.ogg", "04.wav"}
    rows = {row["name"]: row["phones"] for row in map(json.loads, (files / "labels.jsonl").open())}
    for name in ("01.flac", "04.wav"):
        expected = frame_labels(rows[name[:2]], len(found[name]), field=config.receptive_field)
        assert found[name] == expected and len(set(expected)) > 1


def test_label_names_include_silence_where_segments_leave_gaps():
    assert anchor_label_names({"a": ["b", "a", "b"]}) == ["a", "b"]
    assert anchor_label_names({"a": ["b"], "c": []}) == ["SIL", "b"]


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("others.jsonl", {}, r"None of 15 recordings has labels\. They are named like"),
        ("model", {"anchor_layer": 3}, r"layer=3 does not exist\. Layers of this model: 1, 2\."),
        (
            "model",
            {"anchor_layer": 1, "num_anchor_labels": 5_000},
            r"num_anchor_labels=5000 is more than the 1,\d+ frames of the recordings\. Lower num_anchor_labels",
        ),
        ("bert", {"anchor_layer": 1}, r".*/bert is a bert; supported are hubert,"),
    ],
    ids=["other-recordings", "no-such-layer", "few-frames", "no-speech-model"],
)
def test_an_anchor_that_cannot_be_made_is_refused_by_a_dry_run_too(files, recordings, name, options, message, dry_run):
    BertConfig().save_pretrained(files / "bert")
    with pytest.raises(ArgumentError, match=f"anchor=.*{name}: {message}"):
        run(tiny_arguments(files, recordings, anchor=str(files / name), dry_run=dry_run, **options))


@pytest.mark.parametrize("dry_run", [False, True])
def test_mfccs_of_fewer_frames_than_labels_are_refused_by_a_dry_run_too(tmp_path, recordings, dry_run):
    options = {"anchor": "mfcc", "num_anchor_labels": 50_000, "dry_run": dry_run}
    with pytest.raises(ArgumentError, match=r"num_anchor_labels=50000 is more than the [\d,]+ frames of the rec"):
        run(tiny_arguments(tmp_path, recordings, **options))


def test_labels_that_do_not_fit_their_audio_name_the_recording(files, recordings):
    (files / "short.jsonl").write_text(json.dumps({"name": "03", "phones": ["x", "y"]}))
    with pytest.raises(ArgumentError, match=r"short\.jsonl: 03\.mp3: 2 labels of 0\.01 s cover"):
        made(files, recordings, anchor=str(files / "short.jsonl"))


def test_recordings_without_a_frame_leave_no_anchor(files):
    folder = files / "short"
    folder.mkdir()
    soundfile.write(folder / "a.wav", white_noise(100), 16_000)
    (files / "a.jsonl").write_text(json.dumps({"name": "a", "phones": ["x"]}))
    with pytest.raises(ArgumentError, match=r"No recording with labels is as long as a frame\. Give longer"):
        made(files, folder, anchor=str(files / "a.jsonl"))


def save_hubert(folder):
    """Save a tiny HuBERT, with twice as many frames a second as the models that are trained here."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "conv_dim", "conv_kernel")
    names += ("num_conv_pos_embeddings", "num_conv_pos_embedding_groups")
    config = HubertConfig(**{name: TINY[name] for name in names}, conv_stride=[5, 8, 4])
    HubertModel(config).save_pretrained(folder)
    feature_extractor().save_pretrained(folder)


@pytest.mark.parametrize(("model", "stride"), [("model", 320), ("hubert", 160)])
def test_labels_of_a_model_are_clusters_of_its_layer(files, recordings, model, stride):
    save_hubert(files / "hubert")
    arguments = tiny_arguments(files, recordings, anchor=str(files / model), anchor_layer=1, num_anchor_labels=5)
    source = FolderSource(recordings)
    anchor = make_anchor(arguments, source, CPU)
    assert (anchor.num_labels, anchor.stride, anchor.field) == (5, stride, 325)
    assert (anchor.model_stride, anchor.model_field) == (320, 325)
    assert set(anchor.tracks) == {utterance.id for utterance in source.utterances}
    (extractor,) = open_extractors(files / model, layers=[1], is_smoothed=True)
    features = dict(extractor.features(source))
    assert all(len(track) == len(features[name]) for name, track in anchor.tracks.items())
    # Frames of a cluster are nearer to its mean than to the others'.
    together = np.concatenate([features[name][:, 0] for name in anchor.tracks])
    labels = np.concatenate(list(anchor.tracks.values()))
    means = np.stack([together[labels == label].mean(axis=0) for label in range(5)])
    nearest = ((together[:, None] - means) ** 2).sum(axis=-1).argmin(axis=1)
    assert (nearest == labels).mean() > 0.95


@pytest.mark.parametrize(("limits", "enough"), [((100, 1), 100), ((1, 100), 500), ((10**6, 1), None)])
def test_clusters_of_a_layer_are_of_random_recordings(files, recordings, monkeypatch, limits, enough):
    fitted = []

    def fit(extractor, some, *args, **kwargs):
        fitted.append(some.ids)
        assert kwargs["max_frames"] == max(limits[0], 5 * limits[1])
        return fit_layer_kmeans(extractor, some, *args, **kwargs)

    monkeypatch.setattr(anchor_making, "fit_layer_kmeans", fit)
    monkeypatch.setattr(anchor_making, "MAX_LAYER_FRAMES", limits[0])
    monkeypatch.setattr(anchor_making, "MIN_CLUSTER_FRAMES", limits[1])
    source = FolderSource(recordings)
    for seed in (0, 0, 1):
        options = {"anchor": str(files / "model"), "anchor_layer": 1, "num_anchor_labels": 5, "seed": seed}
        anchor = make_anchor(tiny_arguments(files, recordings, **options), source, CPU)
        assert all(len(track) > 0 for track in anchor.tracks.values()) and set(anchor.tracks) == set(source.ids)
    assert fitted[0] == fitted[1] != fitted[2]
    if enough is None:
        assert set(fitted[0]) == set(source.ids)
    else:
        num_frames = [len(anchor.tracks[name]) for name in fitted[0]]
        assert sum(num_frames[:-1]) < enough <= sum(num_frames)


def test_of_long_recordings_a_part_counts(files, monkeypatch):
    for name in "abcd":
        write(files / "long" / f"{name}.wav", 6 * 16_000)
    monkeypatch.setattr(anchor_making, "MAX_LAYER_FRAMES", 250)  # less than one of them has, and three parts of 2 s
    monkeypatch.setattr(anchor_making, "MIN_CLUSTER_FRAMES", 1)
    fitted = []

    def fit(extractor, some, *args, **kwargs):
        fitted.extend(some.ids)
        return fit_layer_kmeans(extractor, some, *args, **kwargs)

    monkeypatch.setattr(anchor_making, "fit_layer_kmeans", fit)
    options = {"anchor": str(files / "model"), "anchor_layer": 1, "num_anchor_labels": 5, "max_seconds": 2.0}
    make_anchor(tiny_arguments(files, files / "long", **options), FolderSource(files / "long"), CPU)
    assert len(fitted) == len(set(fitted)) == 3


@pytest.mark.parametrize(
    ("anchor", "front_end"), [("mfcc", "log_mel"), ("labels.jsonl", "conv"), ("model", "log_mel"), ("hubert", "conv")]
)
def test_a_run_has_its_anchor_and_resumes_bit_for_bit(files, recordings, caplog, anchor, front_end):
    save_hubert(files / "hubert")
    options = {**CHANCE, "feature_encoder": front_end, "max_steps": 6, "log_steps": 3, "checkpoint_steps": 4}
    options |= {"anchor": anchor if anchor == "mfcc" else str(files / anchor)}
    options |= {"anchor_layer": 2} if anchor in ("model", "hubert") else {}
    arguments, out = tiny_arguments(files, recordings, **options), files / "out"
    model = run(arguments)
    assert model.config.num_anchor_labels == (4 if anchor == "labels.jsonl" else 8)
    last = metrics_of(out)[-1]
    num_masked, num_unmasked = last["anchor_frames"]
    assert num_unmasked > 0 and 0 < num_masked <= last["masked_frames"]
    assert (num_masked < last["masked_frames"]) == (anchor == "labels.jsonl")  # which has not all recordings
    assert all(0 <= accuracy <= 1 for accuracy in last["anchor_accuracies"])
    assert (last["anchor_weight"], last["anchor_unmasked_share"]) == (2.0, 0.5)
    whole = shutil.copytree(out, files / "whole")
    shutil.rmtree(out / "checkpoint-6")
    for name in ("finished.json", "model.safetensors"):
        (out / name).unlink()
    with caplog.at_level("INFO", "dinosr_hf"):
        run(arguments)
    assert f"Resuming from {out / 'checkpoint-4'}: step 4 of 6" in caplog.text
    assert_same_run(out, whole)


def test_a_run_learns_its_anchor(tmp_path, recordings):
    options = {"feature_encoder": "log_mel", "anchor": "mfcc", "max_steps": 60, "log_steps": 20}
    run(tiny_arguments(tmp_path, recordings, **options, num_anchor_labels=3, learning_rate=1e-2))
    first, *_, last = metrics_of(tmp_path / "out")
    assert first["anchor_accuracies"][1] < 0.5 and last["anchor_accuracies"][1] > 0.6
    assert last["anchor_losses"][1] < first["anchor_losses"][1] - 0.2
    assert last["anchor_losses"][1] < last["anchor_losses"][0]


def test_without_an_anchor_there_is_none(tmp_path, recordings):
    model = run(tiny_arguments(tmp_path, recordings, max_steps=1))
    assert model.anchor_head is None and not (tmp_path / "out" / "anchor.safetensors").exists()
    assert not any(name.startswith("anchor") for name in metrics_of(tmp_path / "out")[0])


def test_making_an_anchor_does_not_change_the_run_s_random_numbers(files, recordings):
    models = []
    for number, options in enumerate([{"anchor": "mfcc"}, {"anchor": str(files / "model"), "anchor_layer": 1}]):
        arguments = tiny_arguments(files, recordings, **options, max_steps=1, learning_rate=1e-12, weight_decay=0.0)
        arguments.run.output_dir = str(files / f"run-{number}")
        models.append(run(arguments).state_dict())
    for name in ("anchor_head.weight", "dinosr.feature_projection.projection.weight"):
        torch.testing.assert_close(models[0][name], models[1][name], rtol=0, atol=1e-6)


RESUMED = {"anchor": "mfcc", "num_anchor_labels": 5, "checkpoint_steps": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"anchor_features": "textbook"},
            r"checkpoint-4 is of a run .* another way: anchor_features is textbook and was tuned\.",
        ),
        ({"num_anchor_labels": 6}, "num_anchor_labels 5 instead of 6"),
        ({"anchor": None, "num_anchor_labels": 0}, "num_anchor_labels 5 instead of 0"),
    ],
    ids=["features", "number", "none"],
)
def test_an_anchor_stays_the_same_during_a_run(tmp_path, recordings, change, message):
    run(tiny_arguments(tmp_path, recordings, **RESUMED))
    with pytest.raises(CheckpointError, match=message):
        run(tiny_arguments(tmp_path, recordings, **{**RESUMED, **change}, max_steps=6))


def test_a_resumed_run_makes_its_anchor_again_or_refuses_another(tmp_path, recordings, monkeypatch, caplog):
    run(tiny_arguments(tmp_path, recordings, **RESUMED))
    file = tmp_path / "out" / "anchor.safetensors"
    good, other = file.read_bytes(), made(tmp_path, recordings, anchor="mfcc", num_anchor_labels=5, seed=1)
    save_anchor(other, tmp_path / "out")
    again = tiny_arguments(tmp_path, recordings, **RESUMED, max_steps=5)
    with monkeypatch.context() as patch:  # as if the recordings had changed
        patch.setattr("dinosr_hf.pretraining.anchor_making.make_anchor", lambda *_: other)
        with pytest.raises(
            CheckpointError, match=r"is not the one that checkpoint-4 was trained with\. Copy the right"
        ):
            run(again)
        file.unlink()
        with pytest.raises(CheckpointError, match=re.escape(f"{file} is missing")):
            run(again)
    assert run(again) is not None
    assert f"{file} is missing" in caplog.text and "It was made again instead" in caplog.text
    assert file.read_bytes() == good


@pytest.mark.parametrize("change", ["gone", "longer"])
def test_a_resumed_run_does_not_need_the_file_that_its_labels_came_from(files, recordings, change):
    options = {"anchor": str(files / "labels.jsonl"), "checkpoint_steps": 2}
    num_labels = run(tiny_arguments(files, recordings, **options, max_steps=2)).config.num_anchor_labels
    if change == "gone":
        (files / "labels.jsonl").unlink()
    else:
        row = json.dumps({"name": "20", "phones": ["a phone more"] * 9})
        (files / "labels.jsonl").write_text((files / "labels.jsonl").read_text() + "\n" + row)
    assert run(tiny_arguments(files, recordings, **options, max_steps=4)).config.num_anchor_labels == num_labels


@pytest.mark.filterwarnings("ignore:All .* utterances together")
def test_a_resumed_run_tells_of_recordings_that_its_anchor_does_not_know(files, recordings, caplog):
    def resumed(max_steps, data):
        caplog.clear()
        options = {"checkpoint_steps": 2, "max_steps": max_steps, "anchor": str(files / "labels.jsonl")}
        run(tiny_arguments(files, speech, data=data, **options))
        return [text for text in caplog.messages if "anchor" in text]

    speech = files / "speech"
    speech.mkdir()
    for name in ("01.flac", "02.ogg", "03.mp3"):  # the last has no labels
        shutil.copy(recordings / name, speech)
    assert resumed(2, str(speech)) == resumed(4, str(speech)) == []
    for name in ("00.wav", "04.wav"):
        shutil.copy(recordings / name, speech)
    (warning,) = resumed(6, str(speech))
    assert re.match(r"2 of 5 recordings, such as 00\.wav, are unknown to .* base_model=.*checkpoint-4\.$", warning)
    message = r"data: none of 20 recordings has labels .* like speech/00\.wav, .* like 01\.flac\. .*checkpoint-6\.$"
    with pytest.raises(ArgumentError, match=message):
        resumed(8, [str(speech), str(recordings)])
    for name in ("01.flac", "02.ogg"):
        (speech / name).unlink()
    with pytest.raises(ArgumentError, match="data: none of 3 recordings has labels"):  # and it knows one
        resumed(8, str(speech))


def test_labels_of_other_recordings_with_the_same_ids_are_not_taken(files, recordings):
    speech, options = files / "speech", {"anchor": str(files / "model"), "anchor_layer": 1, "checkpoint_steps": 2}
    speech.mkdir()
    for name in ("01.flac", "02.ogg", "04.wav"):
        shutil.copy(recordings / name, speech)
    run(tiny_arguments(files, speech, **options, max_steps=2))
    samples, rate = soundfile.read(speech / "04.wav")
    soundfile.write(speech / "04.wav", samples[: 3 * len(samples) // 4], rate)
    message = r"data: 1 of 3 recordings, such as 04\.wav, are longer or shorter .* base_model=.*checkpoint-2\.$"
    with pytest.raises(ArgumentError, match=message):
        run(tiny_arguments(files, speech, **options, max_steps=4))


def test_labels_that_a_run_made_before_its_first_checkpoint_are_not_made_again(files, recordings, monkeypatch, caplog):
    options = {"anchor": str(files / "model"), "anchor_layer": 1, "max_steps": 1, "num_anchor_labels": 5}
    run(tiny_arguments(files, recordings, **options))

    def start_again(**changes):
        for path in (files / "out").iterdir():
            if not path.name.startswith("anchor"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        with caplog.at_level("INFO", "dinosr_hf"):
            run(tiny_arguments(files, recordings, **{**options, **changes}))

    def fit(*args, **kwargs):
        raise AssertionError("the recordings are labelled again")

    monkeypatch.setattr(anchor_making, "fit_layer_kmeans", fit)
    start_again()
    assert f"the labels in {files / 'out'}, of the same layer and recordings." in caplog.text
    for changes in ({"anchor_layer": 2}, {"num_anchor_labels": 6}, {"seed": 1}, {"max_seconds": 1.5}):
        with pytest.raises(AssertionError, match="labelled again"):
            start_again(**changes)
    file = files / "out" / "anchor.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # a label
    with pytest.raises(AssertionError, match="labelled again"):
        start_again()


def test_another_spelling_of_a_path_is_the_same_anchor(files, recordings, monkeypatch):
    options = {"anchor_layer": 1, "checkpoint_steps": 2}
    run(tiny_arguments(files, recordings, **options, max_steps=2, anchor=str(files / "model")))
    monkeypatch.chdir(files)
    run(tiny_arguments(files, recordings, **options, max_steps=4, anchor="./model/"))
    shutil.copytree(files / "model", files / "other")
    with pytest.raises(CheckpointError, match=r"began in another way: anchor is other and was \./model/\."):
        run(tiny_arguments(files, recordings, **options, max_steps=6, anchor="other"))


def test_an_anchor_on_the_command_line_replaces_that_of_the_recipe(files, recordings):
    path = write_config(files, data=str(recordings), anchor=str(files / "model"), anchor_layer=1, anchor_weight=3.0)

    def parsed(*flags):
        arguments = parse_arguments([str(path), "--num_anchor_labels", "9", *flags], CONFIGS / "tiny_cpu.yaml")
        return arguments.run.anchor, arguments.run.anchor_layer, arguments.run.anchor_weight

    assert parsed() == parsed("--anchor", str(files / "model")) == (str(files / "model"), 1, 3.0)
    assert parsed("--anchor", "mfcc") == ("mfcc", None, 3.0)
    assert parsed("--anchor", "none", "--num_anchor_labels", "0") == (None, None, RunArguments.anchor_weight)
    with pytest.raises(ArgumentError, match="anchor_layer=2 is set, but anchor=mfcc has no layers"):
        parsed("--anchor", "mfcc", "--anchor_layer", "2")
    path = write_config(files, data=str(recordings), anchor="mfcc", anchor_features="textbook", num_anchor_labels=9)
    arguments = parse_arguments([str(path), "--anchor", str(files / "labels.jsonl")], CONFIGS / "tiny_cpu.yaml")
    assert (arguments.model.num_anchor_labels, arguments.run.anchor_features) == (4, RunArguments.anchor_features)


def test_labels_may_have_another_name(files, recordings):
    rows = [{"name": "04", "MAU": ["x", "y"] * 70}]
    (files / "mau.jsonl").write_text(json.dumps(rows[0]))
    options = {"anchor": str(files / "mau.jsonl"), "label_tier": "MAU"}
    anchor = made(files, recordings, **options)
    assert [name for name, track in anchor.tracks.items() if len(track)] == ["04.wav"]
    with pytest.raises(ArgumentError, match=r'line 1, must be .* a list "phones"'):
        made(files, recordings, **{**options, "label_tier": "phones"})
    with pytest.raises(ArgumentError, match="label_tier=MAU has no effect without labels"):
        tiny_arguments(files, recordings, label_tier="MAU", anchor="mfcc")


def test_a_run_from_another_folder_s_checkpoint_takes_its_anchor_along(tmp_path, recordings):
    (tmp_path / "first").mkdir()
    run(tiny_arguments(tmp_path / "first", recordings, **RESUMED))
    origin = tmp_path / "first" / "out" / "checkpoint-2"
    options = {**RESUMED, "resume": str(origin), "max_steps": 6}
    run(tiny_arguments(tmp_path, recordings, **options))
    first = load_anchor(tmp_path / "first" / "out")
    assert anchor_digest(load_anchor(tmp_path / "out")) == anchor_digest(first)
    shutil.rmtree(tmp_path / "first" / "out" / "checkpoint-4")
    (tmp_path / "first" / "out" / "anchor.safetensors").unlink()
    run(tiny_arguments(tmp_path, recordings, **{**options, "max_steps": 7}))  # from its own checkpoints
    assert read_checkpoint(tmp_path / "out" / "checkpoint-7").manifest["anchor"] == anchor_digest(first)
