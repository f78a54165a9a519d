"""ABX: items from alignments, files of units, and with fastabx (Python 3.12) errors computed by hand."""

import json
from decimal import Decimal
from typing import NamedTuple

import numpy as np
import pytest
import torch

from dinosr_hf import DinoSRConfig, DinoSRForPreTraining
from dinosr_hf.analysis import Reference, Segment
from dinosr_hf.analysis import abx as abx_module
from dinosr_hf.analysis.abx import (
    Triphone,
    abx_error,
    abx_errors,
    cosine_distance,
    frame_rate,
    items_text,
    triphone_items,
    write_unit_files,
)
from dinosr_hf.data import open_recordings
from dinosr_hf.units import FeatureFiles, UnitExtractor
from dinosr_hf.utils.model_folder import save_folder
from scripts import load_command
from tiny import randomize, tiny_config


def is_installed(module):
    try:
        __import__(module)
    except ImportError:
        return False
    return True


needs_fastabx = pytest.mark.skipif(not is_installed("fastabx"), reason="fastabx needs Python 3.12")

pytestmark = pytest.mark.usefixtures("no_pictures")


class Utterances(NamedTuple):
    """The part of a source that items need."""

    utterances: list


# 49 frames.
RECORDINGS = Utterances([("ann/1.wav", 16_000), ("bob 2.flac", 16_000), ("eve.wav", 16_000)])
LABELS = {
    "ann/1.wav": [Segment("k", 0.1, 0.2), Segment("a", 0.2, 0.3), Segment("t", 0.3, 0.4), Segment("s", 0.9, 1.0)],
    "bob 2.flac": ["k"] * 10 + ["a"] * 10 + ["t"] * 10 + ["s"] * 60 + ["SIL"] * 9,
}


def reference():
    return Reference([name for name, _ in RECORDINGS.utterances], LABELS, speakers=["ann", None, "eve"])


def test_items_are_triphones_between_silences():
    assert triphone_items(RECORDINGS, reference(), DinoSRConfig()) == [
        Triphone("ann/1", "0.1000", "0.4000", "a", "k", "t", "ann"),
        Triphone("bob 2", "0.0000", "0.3000", "a", "k", "t", "bob 2.flac"),
        Triphone("bob 2", "0.1000", "0.9000", "t", "a", "s", "bob 2.flac"),
    ]
    with pytest.raises(ValueError, match=r"no triphone in 2 recordings.* without SIL, a between"):
        triphone_items(RECORDINGS, reference(), DinoSRConfig(), silence=["SIL", "a"])


@pytest.mark.parametrize(("end", "is_kept"), [(0.989, True), (0.99, False)])
def test_items_after_the_last_frame_are_left_out(end, is_kept):
    # Of 15,760 samples the 49th frame is the last; cut by (i + 1/2) / 50, it is at 0.97, and the 50th at 0.99.
    recordings = Utterances([("u", 15_760)])
    labels = {"u": [Segment("k", 0.1, 0.2), Segment("a", 0.2, 0.3), Segment("t", 0.3, end)]}
    known = Reference(["u", "v"], labels | {"v": LABELS["ann/1.wav"]})
    more = Utterances([*recordings.utterances, ("v", 16_000)])
    found = [item.file for item in triphone_items(more, known, DinoSRConfig())]
    assert found == (["u", "v"] if is_kept else ["v"])


def test_items_without_a_frame_are_left_out():
    # Between the times of two frames, 0.11 and 0.13 s.
    short = [Segment("k", 0.111, 0.117), Segment("a", 0.117, 0.123), Segment("t", 0.123, 0.129)]
    known = Reference(["u", "v"], {"u": short, "v": LABELS["ann/1.wav"]})
    found = triphone_items(Utterances([("u", 16_000), ("v", 16_000)]), known, DinoSRConfig())
    assert [item.file for item in found] == ["v"]


def test_item_file():
    text = items_text(triphone_items(RECORDINGS, reference(), DinoSRConfig()))
    assert text.splitlines() == [
        "#file onset offset #phone prev-phone next-phone speaker",
        "ann/1 0.1000 0.4000 a k t ann",
        '"bob 2" 0.0000 0.3000 a k t "bob 2.flac"',
        '"bob 2" 0.1000 0.9000 t a s "bob 2.flac"',
    ]


def test_frame_rate_is_exact():
    assert frame_rate(DinoSRConfig()) == Decimal(50)
    assert frame_rate(tiny_config()) == Decimal(16_000) / 20
    with pytest.raises(ValueError, match="conv_stride multiplies to 30 samples per frame"):
        frame_rate(tiny_config(conv_stride=[5, 3, 2]))


def test_cosine_distance_by_hand():
    first, second = torch.tensor([[[1.0, 0.0], [2.0, 2.0]]]), torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]], [[-1.0, 0.0]]])
    half = 1 - 2**-0.5
    expected = torch.tensor([[[[0.0], [half]], [[1.0], [half]], [[2.0], [2 - half]]]])
    torch.testing.assert_close(cosine_distance(first, second), expected)


def test_unit_files_have_the_layout_of_feature_files(tmp_path):
    codes = np.array([[1, 2, 2], [4, 4, 0]])
    write_unit_files([("ann/1.wav", codes)], tmp_path, [2, 3])
    for layer, row in zip((2, 3), codes, strict=True):
        found = np.load(tmp_path / f"layer-{layer}" / "ann" / "1.npy")
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, row[:, None])


ITEM = Triphone("u", "0.0000", "0.0800", "a", "k", "t", "ann")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speaker": "any"}, "speaker='any' is unknown. Choose one of within, across"),
        ({"distance": "dtw"}, "distance='dtw' is unknown. Choose one of angular, cosine, euclidean, identical"),
        ({}, r"has no .npy file of any of 1 items"),
    ],
)
def test_abx_error_refuses(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        abx_error([ITEM], tmp_path, Decimal(50), **options)


def test_a_missing_fastabx_names_the_extra(tmp_path, monkeypatch):
    np.save(tmp_path / "u.npy", np.zeros((4, 1)))
    monkeypatch.setitem(__import__("sys").modules, "fastabx", None)
    with pytest.raises(ImportError, match=r'Python 3.12 or newer.* needs fastabx: pip install "dinosr-hf\[abx\]"'):
        abx_error([ITEM], tmp_path, Decimal(50))


# -- with fastabx


def save_tokens(folder, tokens):
    """Write a recording of four frames for each (phone, speaker, frames), all between the same neighbours."""
    items = []
    for number, (phone, speaker, frames) in enumerate(tokens):
        np.save(folder / f"u{number}.npy", np.asarray(frames))
        items.append(Triphone(f"u{number}", "0.0000", "0.0800", phone, "k", "t", speaker))
    return items


def units(*codes):
    return np.array(codes, dtype=np.int64)[:, None]


@needs_fastabx
def test_error_of_units_by_hand(tmp_path):
    one, two = units(1, 1, 1, 1), units(2, 2, 2, 2)
    items = save_tokens(tmp_path, [("a", "ann", one), ("a", "ann", two), ("b", "ann", two)])
    # X = u0: as far from u1 as from u2, a half; X = u1: far from u0, equal to u2, wrong. No second b can be X.
    assert abx_error(items, tmp_path, Decimal(50), distance="identical") == pytest.approx(0.75)
    # A second a that is right, and a second speaker who is always right.
    items = save_tokens(
        tmp_path, [("a", "ann", one), ("a", "ann", one), ("b", "ann", two), ("a", "bob", one), ("b", "bob", two)]
    )
    assert abx_error(items, tmp_path, Decimal(50), distance="identical") == 0.0
    assert abx_error(items, tmp_path, Decimal(50), distance="identical", speaker="across") == 0.0
    # The speaker decides, and not the phone.
    items = save_tokens(
        tmp_path, [("a", "ann", one), ("b", "ann", one), ("a", "bob", two), ("b", "bob", two), ("a", "bob", two)]
    )
    assert abx_error(items, tmp_path, Decimal(50), distance="identical", speaker="across") == pytest.approx(0.5)


@needs_fastabx
def test_units_equal_one_hot_vectors(tmp_path):
    generator = np.random.default_rng(0)
    tokens = [("ab"[number % 2], "xy"[number // 10], generator.integers(number % 2, 3, 4)) for number in range(20)]
    (tmp_path / "units").mkdir()
    (tmp_path / "vectors").mkdir()
    items = save_tokens(tmp_path / "units", [(phone, speaker, units(*codes)) for phone, speaker, codes in tokens])
    vectors = np.eye(3, dtype=np.float32)
    save_tokens(tmp_path / "vectors", [(phone, speaker, vectors[codes]) for phone, speaker, codes in tokens])
    for speaker in ("within", "across"):
        by_units = abx_error(items, tmp_path / "units", Decimal(50), distance="identical", speaker=speaker)
        for distance in ("angular", "cosine", "euclidean"):
            found = abx_error(items, tmp_path / "vectors", Decimal(50), distance=distance, speaker=speaker)
            assert found == pytest.approx(by_units, abs=1e-6)
        assert 0.1 < by_units < 0.6


def warped(first, second, distance):
    """Dynamic time warping: the least sum of distances along a path, over the path's length."""

    def best_path(i, j):
        """Sum and length of the best path to (i, j)."""
        before = [best_path(*place) for place in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if min(place) >= 0]
        total, steps = min(before, key=lambda path: path[0], default=(0.0, 0))
        return total + distance(first[i], second[j]), steps + 1

    total, steps = best_path(len(first) - 1, len(second) - 1)
    return total / steps


@needs_fastabx
@pytest.mark.parametrize("name", ["angular", "cosine", "euclidean"])
def test_error_of_features_equals_slow_twin_over_all_triples(tmp_path, name):
    generator = np.random.default_rng(1)
    frames = generator.standard_normal((6, 4, 5)).astype(np.float32)
    frames[:3] += 0.5
    items = save_tokens(tmp_path, [("aaabbb"[number], "ann", row) for number, row in enumerate(frames)])

    def distance(one, other):
        if name == "euclidean":
            return np.linalg.norm(one - other)
        cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        return 1 - cosine if name == "cosine" else np.arccos(cosine) / np.pi

    wrong = []
    for phone, others in ((range(3), range(3, 6)), (range(3, 6), range(3))):
        triples = [(a, b, x) for x in phone for a in phone if a != x for b in others]
        near = [
            (warped(frames[x], frames[a], distance), warped(frames[x], frames[b], distance)) for a, b, x in triples
        ]
        wrong.append(np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in near]))
    found = abx_error(items, tmp_path, Decimal(50), distance=name)
    assert found == pytest.approx(np.mean(wrong), abs=1e-6) and 0 < found < 1


@needs_fastabx
def test_nothing_to_compare_is_refused(tmp_path):
    items = save_tokens(tmp_path, [("a", "ann", units(1, 1, 1, 1)), ("b", "ann", units(2, 2, 2, 2))])
    assert np.isnan([*abx_errors(items, tmp_path, Decimal(50), distance="identical").values()]).all()
    with pytest.raises(ValueError, match=r"No two of 2 triphones can be compared across speakers: .*by two speakers"):
        abx_error(items, tmp_path, Decimal(50), distance="identical", speaker="across")


# -- from a model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twelve recordings of two speakers, in which each phone has its own pitch."""
    import soundfile  # an optional package

    folder = tmp_path_factory.mktemp("abx")
    (folder / "speech").mkdir()
    generator = np.random.default_rng(0)
    table, labels = ["file_name,speaker_id"], []
    for number in range(12):
        phone = "ae"[number % 2]
        pitch = {"k": 300.0, "a": 1_500.0, "e": 4_000.0, "t": 600.0}
        names = ["k", phone, "t", phone, "k"]
        tones = [np.sin(2 * np.pi * pitch[name] * np.arange(1_600) / 16_000) for name in names]
        samples = 0.5 * np.concatenate(tones) + 0.01 * generator.standard_normal(8_000)
        soundfile.write(folder / "speech" / f"{number}.wav", np.clip(samples, -0.9, 0.9), 16_000)
        table.append(f"{number}.wav,s{number // 6}")
        labels.append({"name": str(number), "phones": [name for name in names for _ in range(10)]})
    (folder / "speech" / "metadata.csv").write_text("\n".join(table) + "\n")
    (folder / "phones.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    torch.manual_seed(0)
    save_folder(randomize(DinoSRForPreTraining(tiny_config())), folder / "model")
    return folder


def arguments_of(corpus, output):
    labels = str(corpus / "phones.jsonl")
    model, data = str(corpus / "model"), str(corpus / "speech")
    return [model, "--data", data, "--labels", labels, "--output_dir", str(output), "--layers", "2", "3"]


def test_the_script_writes_only_items(corpus, tmp_path, capsys):
    load_command("evaluate_abx").main([*arguments_of(corpus, tmp_path)[:-3], "--items_only"])
    assert "24 triphones" in capsys.readouterr().out
    assert len((tmp_path / "triphones.item").read_text(encoding="utf-8").splitlines()) == 25
    assert [path.name for path in tmp_path.iterdir()] == ["triphones.item"]


def test_where_nothing_compares_the_error_is_nan(tmp_path, caplog, monkeypatch):
    """One speaker has an error within, and none across."""

    def error_of(items, features, rate, *, speaker):
        if speaker == "across":
            raise abx_module.NothingToCompareError("No two of 9 triphones can be compared across speakers")
        return 0.25

    monkeypatch.setattr(abx_module, "abx_error", error_of)
    within, across = abx_errors([ITEM], tmp_path, Decimal(50)).values()
    assert within == 0.25 and np.isnan(across)
    assert "ABX across speakers is nan: No two of 9 triphones" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distances", "cosine"], r"distances=.* is set, but nothing is evaluated\..* or leave out --items_only"),
        ([], "writes the triphones of one model, but there are several"),
    ],
)
def test_items_alone_refuse_what_has_no_effect(corpus, tmp_path, flags, message):
    words = [word for word in arguments_of(corpus, tmp_path) if word not in ("--layers", "2", "3")]
    words = [*words, *flags] if flags else ["other", *words]
    with pytest.raises(SystemExit, match=message):
        load_command("evaluate_abx").main([*words, "--items_only"])


def test_the_script_checks_for_fastabx_first(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fastabx", None)
    with pytest.raises(SystemExit, match=r"evaluate_abx.py: ABX .* needs fastabx"):
        load_command("evaluate_abx").main(arguments_of(corpus, tmp_path))


def test_the_script_writes_a_table(corpus, tmp_path, capsys, monkeypatch):
    script = load_command("evaluate_abx")
    calls = []

    def error_of(items, features, rate, *, speaker, distance, **options):
        calls.append((speaker, distance, np.load(features / "0.npy").shape[1]))
        return 0.25 if speaker == "within" else 0.5

    if not is_installed("fastabx"):
        monkeypatch.setattr(script, "import_fastabx", lambda: None)
        monkeypatch.setattr(abx_module, "abx_error", error_of)
    script.main(
        [*arguments_of(corpus, tmp_path), "--sources", "student", "teacher", "--distances", "angular", "cosine"]
    )
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "abx.json").read_text(encoding="utf-8"))
    kinds = [(row["source"], row["layer"], row["distance"]) for row in rows]
    distances = ("angular", "cosine", "identical")
    assert sorted(kinds) == sorted((s, n, d) for s in ("student", "teacher") for n in (2, 3) for d in distances)
    assert all(0 <= row[speaker] <= 1 for row in rows for speaker in ("within", "across"))
    assert (tmp_path / "abx.md").read_text(encoding="utf-8") in printed
    assert len((tmp_path / "abx.csv").read_text(encoding="utf-8").splitlines()) == 13
    assert sorted(path.name for path in tmp_path.iterdir()) == ["abx.csv", "abx.json", "abx.md", "triphones.item"]
    assert all((size == 1) == (distance == "identical") for _, distance, size in calls)
    *words, _, _, _ = arguments_of(corpus, tmp_path)  # without layers: the last of three
    script.main(words)
    assert {row["layer"] for row in json.loads((tmp_path / "abx.json").read_text(encoding="utf-8"))} == {3}


@pytest.mark.parametrize("num_samples", [20, 0], ids=["intervals", "no intervals"])
def test_units_are_evaluated_with_the_same_error(corpus, tmp_path, capsys, monkeypatch, num_samples):
    """`dinosr evaluate --abx` says of units what `dinosr abx` says, from one extraction."""
    evaluate, evaluate_abx = load_command("evaluate_units"), load_command("evaluate_abx")
    if not is_installed("fastabx"):

        def spread(_, folder, *rate, **options):
            return float(np.load(folder / "0.npy").std())

        for script in (evaluate, evaluate_abx):
            monkeypatch.setattr(script, "import_fastabx", lambda: None)
        monkeypatch.setattr(abx_module, "abx_error", spread)
    evaluate_abx.main([*arguments_of(corpus, tmp_path / "abx"), "--sources", "student", "teacher"])
    evaluate.main([*arguments_of(corpus, tmp_path / "units"), "--abx", "--num_samples", str(num_samples)])
    table = capsys.readouterr().out
    assert "| ABX within speakers, % | ABX across speakers, % |" in table
    rows = json.loads((tmp_path / "abx" / "abx.json").read_text())
    rows = [row for row in rows if row["what"] == "units"]
    expected = {(row["source"], row["layer"]): (row["within"], row["across"]) for row in rows}
    rows = json.loads((tmp_path / "units" / "units.json").read_text())
    assert {(row["units"], row["layer"]): (row["abx_within"], row["abx_across"]) for row in rows} == expected
    assert all(f"| {100 * within:.2f} | {100 * across:.2f} |" in table for within, across in expected.values())
    assert len(expected) == 4 and all(0 <= row["pnmi"] <= 1 for row in rows)
    names = sorted(path.name for path in (tmp_path / "units").iterdir())
    assert names == [f"units.{suffix}" for suffix in ("csv", "json", "md", "pdf", "png")]


def test_evaluation_checks_for_fastabx_first(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fastabx", None)
    with pytest.raises(SystemExit, match=r"ABX .* needs fastabx"):
        load_command("evaluate_units").main([*arguments_of(corpus, tmp_path), "--abx"])


@needs_fastabx
def test_audible_phones_have_a_low_error(corpus, tmp_path):
    source, known = open_recordings([corpus / "speech"]), json.loads
    labels = {row["name"]: row["phones"] for row in map(known, (corpus / "phones.jsonl").read_text().splitlines())}
    ids = [utterance.id for utterance in source.utterances]
    right = Reference(ids, labels, speakers=["ann"] * 12)
    model = DinoSRForPreTraining.from_pretrained(corpus / "model")
    FeatureFiles(tmp_path, UnitExtractor(model, layers=[1]), source).write()
    rate = frame_rate(model.config)
    error = abx_error(triphone_items(source, right, model.config), tmp_path / "layer-1", rate)
    # The same recordings with labels that have nothing to do with them.
    wrong = {str(number): labels[str((number * 5 + number // 4) % 12)] for number in range(12)}
    items = triphone_items(source, Reference(ids, wrong, speakers=["ann"] * 12), model.config)
    assert error < 0.1 < 0.3 < abx_error(items, tmp_path / "layer-1", rate)
    assert abx_module.DISTANCES[0] == "angular"


def test_units_of_two_recordings_in_one_file_are_refused(tmp_path):
    units = ((name, np.zeros((1, 3), dtype=np.int64)) for name in ("a.wav", "/b.wav", "a.flac"))
    with pytest.raises(ValueError, match=r"a\.wav and a\.flac would be written to the same file\. Rename one"):
        write_unit_files(units, tmp_path, [5])
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.npy")} == {
        "layer-5/a.npy",
        "layer-5/b.npy",
    }
