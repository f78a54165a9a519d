"""Transcription of recordings of any length: windows, pauses, batches, unreadable files, the script."""

import io
import json
import os
import shutil
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

import forks
from audio_files import noise, sf
from dinosr_hf import DinoSRForCTC
from dinosr_hf.data import FileSource, normalize_waveform, open_recordings
from dinosr_hf.inference import windowed
from dinosr_hf.inference.windowed import RunningMoments, plan_windows
from dinosr_hf.recognition import TextNormalization, Transcriber
from dinosr_hf.recognition.decoding import DecodingOptions, GreedyDecoder
from dinosr_hf.recognition.transcription import (
    cut_at_pauses,
    decode_in_pieces,
    pauses,
    split_words_at_pauses,
)
from hub_server import hub_server
from language_models import write_arpa
from recognisers import LABELS, save_models
from scripts import load_command
from tiny import without_attention
from tolerances import SAME_ARITHMETIC

LENGTHS = {"short": 30, "a": 1_234, "b": 2_345, "long": 9_871}

# Frames of context that a frame of the tiny model sees without attention: three convolutions with a kernel of 5.
REACH = 6


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder / "recogniser"


@pytest.fixture
def recordings(tmp_path):
    """Noise that gets louder, so that normalising each window by itself would show."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for seed, (name, length) in enumerate(LENGTHS.items()):
        sf.write(folder / f"{name}.wav", noise(length, seed) * np.linspace(0.1, 3, length), 16_000, subtype="FLOAT")
    return folder


class RecordingDecoder(GreedyDecoder):
    """A greedy decoder that keeps the emissions it is given."""

    def decode(self, log_probs, num_best=1):
        self.emissions = np.array(log_probs)
        return super().decode(log_probs, num_best)


def transcriber(folder, model=None, **seconds):
    model = model or DinoSRForCTC.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    decoder = RecordingDecoder.from_tokenizer(processor.tokenizer, model.config)
    return Transcriber(model, processor, decoder, **seconds)


def emissions_of(folder, path, model=None, **seconds):
    reader = transcriber(folder, model, **seconds)
    (transcript,) = reader.transcribe(FileSource([path]))
    return reader.decoder.emissions, transcript


@torch.no_grad()
def in_one_pass(model, path):
    samples, _ = sf.read(path, dtype="float32")
    return model(torch.from_numpy(normalize_waveform(samples))[None]).logits.log_softmax(-1)[0].numpy()


@pytest.mark.parametrize(
    ("num_frames", "window", "context"), [(0, 9, 2), (9, 9, 2), (10, 9, 2), (101, 9, 4), (77, 9, 0)]
)
def test_windows_cover_the_recording(num_frames, window, context):
    windows = plan_windows(num_frames, window, context)
    assert [frame for w in windows for frame in range(w.first, w.last)] == list(range(num_frames))
    for w in windows:
        assert w.end - w.begin <= window
        assert w.begin == (0 if len(windows) == 1 else max(0, w.first - context))
        assert w.end == (num_frames if len(windows) == 1 else min(num_frames, w.last + context))
    assert (len(windows) == 1) == (num_frames <= window)


def test_mean_and_variance_over_parts():
    samples = noise(1_001).astype(np.float64) * 3 + 100
    moments = RunningMoments(parts=np.split(samples, [1, 7, 500]))
    assert moments.mean == pytest.approx(samples.mean(), rel=1e-12)
    assert moments.variance == pytest.approx(samples.var(), rel=1e-9)


@pytest.mark.parametrize(
    ("pattern", "pieces"),
    [
        ("aaa", ["aaa"]),
        ("aaaaaa.aaa", ["aaaaaa.", "aaa"]),  # at the only pause
        ("aaaa...a.aaaa", ["aaaa..", ".a.aaaa"]),  # at the longest pause of the second half
        ("..a.aaaaaaaaa", ["..a.", "aaaaaaaa", "a"]),  # at the last pause of the first half
        ("aaaaaaaaaaa", ["aaaaaaaa", "aaa"]),  # no pause
        ("..........", ["......", "...."]),
        ("", [""]),
    ],
)
def test_pieces_are_cut_at_pauses(pattern, pieces):
    cuts = cut_at_pauses(np.array([letter == "." for letter in pattern], dtype=bool), 8)
    assert [pattern[start:stop] for start, stop in cuts] == pieces


@pytest.mark.parametrize("max_frames", [2, 3, 8, 50])
def test_pieces_cover_the_recording(max_frames):
    for seed in range(20):
        is_pause = np.random.default_rng(seed).random(97) < 0.4
        cuts = cut_at_pauses(is_pause, max_frames)
        assert cuts[0][0] == 0 and cuts[-1][1] == 97
        assert all(left[1] == right[0] for left, right in pairwise(cuts))
        assert all(0 < stop - start <= max_frames for start, stop in cuts)


def path_emissions(labels):
    rows = np.full((len(labels), len(LABELS)), -20.0, dtype=np.float32)
    rows[np.arange(len(labels)), [LABELS.index(label) for label in labels]] = 0.0
    return rows


def test_pauses_are_runs_of_blanks_with_a_delimiter():
    decoder = GreedyDecoder(LABELS, blank_id=0, word_delimiter_id=4, special_ids=[1, 2, 3])
    blank, line = "<pad>", "|"
    found = pauses(path_emissions([blank, "A", blank, "B", blank, line, blank, "C", line, line, "D"]), decoder)
    assert found.tolist() == [c == "." for c in "aaaa...a..a"]
    phones = GreedyDecoder(LABELS, blank_id=0, special_ids=[1, 2, 3])
    assert pauses(path_emissions([blank, "A", blank, "B"]), phones).tolist() == [True, False, True, False]


def test_words_are_split_at_long_pauses():
    decoder = GreedyDecoder(LABELS, blank_id=0, word_delimiter_id=4, special_ids=[1, 2, 3])
    blank = "<pad>"
    labels = [*[blank] * 5, "A", "B", *[blank] * 2, "A", *[blank] * 3, "C", "|", *[blank] * 4, "D", *[blank] * 9]
    before = path_emissions(labels)

    def text(pause_frames):
        changed = split_words_at_pauses(before.copy(), decoder, pause_frames)
        np.testing.assert_allclose(np.exp(changed).sum(axis=1), 1, atol=1e-4)
        return decoder.decode(changed)[0].text, np.flatnonzero((changed != before).any(axis=1)).tolist()

    assert text(5) == ("ABAC D", [])
    assert text(4) == ("ABAC D", [16])  # next to a delimiter
    assert text(3) == ("ABA C D", [11, 16])
    assert text(2) == ("AB A C D", [7, 11, 16])
    np.testing.assert_array_equal(before, path_emissions(labels))
    phones = GreedyDecoder(LABELS, blank_id=0, special_ids=[1, 2, 3])
    np.testing.assert_array_equal(split_words_at_pauses(before.copy(), phones, 2), before)


def test_transcriber_splits_words_at_pauses(recogniser, recordings):
    options = {"window_seconds": 1.0, "context_seconds": 0.0}
    _, calm = emissions_of(recogniser, recordings / "long.wav", **options)
    _, hasty = emissions_of(recogniser, recordings / "long.wav", pause_seconds=0.0025, **options)
    assert calm.text.replace(" ", "") == hasty.text.replace(" ", "")
    assert len(calm.words) < len(hasty.words)


def test_decoding_in_pieces_equals_decoding_the_whole():
    generator = np.random.default_rng(3)
    labels = [str(label) for label in generator.choice(["<pad>", "<pad>", "|", "A", "B"], 400)]
    decoder = GreedyDecoder(LABELS, blank_id=0, word_delimiter_id=4, special_ids=[1, 2, 3], tail_seconds=0.0)
    log_probs = path_emissions(labels)
    whole, found = decoder.decode(log_probs)[0], decode_in_pieces(decoder, log_probs, 60)
    assert found.text == whole.text and found.score == pytest.approx(whole.score)
    for left, right in zip(found.words, whole.words, strict=True):
        assert left.end == pytest.approx(right.end)
        assert left.start == pytest.approx(right.start, abs=decoder.lead_seconds)  # clipped at the start of the piece
    blind = [decoder.decode(log_probs[at : at + 60])[0].text for at in range(0, 400, 60)]
    assert " ".join(blind) != whole.text


def test_recording_of_one_window_equals_the_model(recogniser, recordings):
    model = DinoSRForCTC.from_pretrained(recogniser).eval()
    found, transcript = emissions_of(recogniser, recordings / "b.wav", model)
    expected = in_one_pass(model, recordings / "b.wav")
    np.testing.assert_array_equal(found, expected)
    tokenizer = AutoProcessor.from_pretrained(recogniser).tokenizer
    assert transcript.text == " ".join(tokenizer.decode(expected.argmax(-1)).split()) != ""
    assert transcript.id == "b.wav" and transcript.seconds == 2_345 / 16_000
    assert " ".join(word.word for word in transcript.words) == transcript.text


@pytest.mark.parametrize("window_seconds", [0.051, 0.1])
def test_joined_windows_equal_one_pass(recogniser, recordings, window_seconds):
    model = without_attention(DinoSRForCTC.from_pretrained(recogniser))
    expected = in_one_pass(model, recordings / "long.wav")

    def found(context_frames):
        seconds = {"window_seconds": window_seconds, "context_seconds": context_frames * 20 / 16_000}
        return emissions_of(recogniser, recordings / "long.wav", model, **seconds)

    emissions, transcript = found(REACH)
    np.testing.assert_allclose(np.exp(emissions), np.exp(expected), **SAME_ARITHMETIC)
    assert transcript == emissions_of(recogniser, recordings / "long.wav", model)[1]._replace(score=transcript.score)
    without, other = found(0)
    assert np.abs(np.exp(without) - np.exp(expected)).max() > 0.1 and other.text != transcript.text


def test_more_context_is_closer_to_one_pass(recogniser, recordings):
    # With attention, windows cannot equal one pass.
    model = DinoSRForCTC.from_pretrained(recogniser).eval()
    expected = in_one_pass(model, recordings / "long.wav")
    errors = []
    for context_seconds in (0.0, 0.02, 0.1):
        found, _ = emissions_of(
            recogniser, recordings / "long.wav", model, window_seconds=0.3, context_seconds=context_seconds
        )
        errors.append(np.abs(np.exp(found) - np.exp(expected)).mean())
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.9 * errors[0]


def test_audio_is_read_in_parts(recogniser, recordings, monkeypatch):
    monkeypatch.setattr(windowed, "_PART_SAMPLES", 960)
    source, sizes = open_recordings([recordings]), []
    load = source.load
    source.load = lambda index, start=0, num_samples=None: sizes.append(num_samples) or load(index, start, num_samples)
    list(transcriber(recogniser, window_seconds=0.05, context_seconds=0.01, batch_seconds=0.06).transcribe(source))
    assert max(sizes) <= 0.06 * 16_000 < max(LENGTHS.values())


def test_transcripts_do_not_depend_on_the_batch(recogniser, recordings):
    source, seconds = open_recordings([recordings]), []
    options = {"window_seconds": 0.2, "context_seconds": 0.02}
    alone = list(transcriber(recogniser, batch_seconds=0.01, **options).transcribe(source))
    together = list(
        transcriber(recogniser, batch_seconds=5.0, **options).transcribe(source, on_progress=seconds.append)
    )
    assert [found.id for found in alone] == ["long.wav", "b.wav", "a.wav", "short.wav"]
    for left, right in zip(alone, together, strict=True):
        assert left._replace(score=0) == right._replace(score=0)
        assert left.score == pytest.approx(right.score, abs=1e-2)
    assert sum(seconds) == pytest.approx(sum(LENGTHS.values()) / 16_000)
    assert alone[-1].text == "" and alone[-1].words == []  # shorter than a frame


def test_unreadable_recordings_are_skipped(recogniser, recordings, caplog):
    source = open_recordings([recordings])
    (recordings / "long.wav").write_bytes(b"gone")
    reader = transcriber(recogniser, window_seconds=0.1, context_seconds=0.01)
    assert [found.id for found in reader.transcribe(source)] == ["b.wav", "a.wav", "short.wav"]
    assert list(reader.unreadable) == ["long.wav"] and "cannot be read" in reader.unreadable["long.wav"]
    assert caplog.text.count("long.wav is left out") == 1


def test_invalid_arguments_raise(recogniser):
    with pytest.raises(ValueError, match=r"window_seconds=10.* must be more than twice context_seconds=5\.0"):
        transcriber(recogniser, window_seconds=10.0)
    with pytest.raises(ValueError, match="context_seconds=-1"):
        transcriber(recogniser, context_seconds=-1)
    with pytest.raises(ValueError, match=r"batch_seconds=0.* must be at least .*two frames"):
        transcriber(recogniser, batch_seconds=0)
    with pytest.raises(ValueError, match=r"pause_seconds=0.* must be at least"):
        transcriber(recogniser, pause_seconds=0)
    with pytest.raises(ValueError, match=r"dtype='int8' is unknown. Choose one of float32"):
        Transcriber.from_folder(recogniser, dtype="int8")
    with pytest.raises(ValueError, match=r"decoding=x.json is for beam search, but greedy"):
        Transcriber.from_folder(recogniser, decoding="x.json", greedy=True)
    with pytest.raises(ValueError, match=r"x.json is not a file"):
        Transcriber.from_folder(recogniser, decoding="x.json")


def test_half_precision_is_close(recogniser, recordings):
    source = FileSource([recordings / "b.wav"])
    (exact,) = Transcriber.from_folder(recogniser).transcribe(source)
    (half,) = Transcriber.from_folder(recogniser, dtype="bfloat16").transcribe(source)
    assert half.text and half.score != exact.score
    assert half.score == pytest.approx(exact.score, rel=0.1)


def test_decoding_json_of_the_folder_is_used(recogniser, recordings, tmp_path):
    pytest.importorskip("flashlight")
    source = FileSource([recordings / "b.wav"])
    words = tmp_path / "words.txt"
    words.write_text("a\nb\n" if AutoProcessor.from_pretrained(recogniser).tokenizer.do_lower_case else "A\nB\n")
    options = DecodingOptions(lexicon=str(words), beam_size=20).save(recogniser / "decoding.json")
    try:
        (beam,) = Transcriber.from_folder(recogniser, search_seconds=0.05).transcribe(source)
        (greedy,) = Transcriber.from_folder(recogniser, greedy=True).transcribe(source)
    finally:
        options.unlink()
    assert set(beam.text.split()) <= {"A", "B"} and beam.text != greedy.text
    assert greedy == next(Transcriber.from_folder(recogniser).transcribe(source))


@pytest.mark.slow
def test_a_recogniser_on_the_hub_brings_its_text_rules_and_its_decoding(recogniser, tmp_path):
    pytest.importorskip("flashlight")
    shutil.copytree(recogniser, tmp_path / "someone" / "plain")
    folder = shutil.copytree(recogniser, tmp_path / "someone" / "whole")
    TextNormalization(case="upper", keep="-").save(folder)
    (folder / "lm").mkdir()
    model = write_arpa(folder / "lm" / "words.arpa", ["A B", "B"], order=2)
    DecodingOptions(str(model), str(model), beam_size=7).save(folder / "decoding.json")
    code = """if True:
        from dinosr_hf.recognition import Transcriber, load_processor
        for name in ("someone/plain", "someone/whole"):
            decoder = Transcriber.from_folder(name).decoder
            print(load_processor(name)[1], type(decoder).__name__, getattr(decoder, "options", None), sep="; ")
    """
    with hub_server(tmp_path) as hub:
        places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        done = forks.run(["-c", code], env={**os.environ, **places})
    assert done.returncode == 0, done.stderr
    offline = {**os.environ, **places, "HF_HUB_OFFLINE": "1"}
    again = forks.run(["-c", code], env=offline)
    assert (again.stdout, again.returncode) == (done.stdout, 0) and "not in the cache" not in again.stderr
    next((tmp_path / "home" / "hub" / "models--someone--whole").glob("snapshots/*/decoding.json")).unlink()
    unknown = forks.run(["-c", code], env=offline)
    assert "; GreedyDecoder; None" in unknown.stdout.splitlines()[1]
    assert "The Hub cannot be reached, and decoding.json is not in the cache: going on as if" in unknown.stderr
    plain, whole = done.stdout.splitlines()
    assert plain == "None; GreedyDecoder; None"
    assert whole.startswith(f"{TextNormalization(case='upper', keep='-')}; BeamSearchDecoder; DecodingOptions(")
    assert "snapshots" in whole and "lm/words.arpa" in whole and "beam_size=7" in whole


@pytest.fixture(scope="module")
def main():
    return load_command("transcribe").main


def test_script_prints_in_order(main, recogniser, recordings, capsys):
    main([str(recogniser), str(recordings)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["a.wav", "b.wav", "long.wav", "short.wav"]
    main([str(recogniser), str(recordings / "b.wav"), "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == lines[1].split("\t")[1]


def test_several_transcripts_in_json_are_a_line_each(main, recogniser, recordings, capsys):
    main([str(recogniser), str(recordings), "--format", "json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["id"] for row in found] == ["a.wav", "b.wav", "long.wav", "short.wav"]


def test_what_was_transcribed_is_printed_if_the_script_is_interrupted(
    main, recogniser, recordings, capsys, monkeypatch
):
    whole = Transcriber.transcribe

    def interrupted(self, source, **options):
        for number, found in enumerate(whole(self, source, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(Transcriber, "transcribe", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main([str(recogniser), str(recordings)])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_script_writes_files(main, recogniser, recordings, tmp_path, capsys):
    (recordings / "deep").mkdir()
    (recordings / "a.wav").rename(recordings / "deep" / "a.wav")
    out = tmp_path / "out"
    command = [str(recogniser), str(recordings), "--format", "srt", "--output_dir", str(out)]
    main(command)
    files = {path.relative_to(out).as_posix() for path in out.rglob("[!.]*.*")}
    assert files == {"deep/a.srt", "b.srt", "long.srt", "short.srt"}
    assert (out / "b.srt").read_text().startswith("1\n00:00:00,")
    assert capsys.readouterr().out == ""


def test_script_says_what_it_leaves_out(main, recogniser, recordings, capsys, caplog):
    for name in ("talk.m4a", "more.m4a", "call.amr"):
        (recordings / name).write_bytes(b"\0\0\0\x20ftypM4A " if name.endswith("4a") else b"#!AMR\n")
    sf.write(recordings / "apple.aiff", noise(1_000), 16_000)
    (recordings / "._a.wav").write_bytes(b"\0\5")
    reasons = r"\(1 unsupported \.amr, 2 unsupported \.m4a\)"
    with pytest.raises(SystemExit, match=rf"^transcribe\.py: 3 recordings could not be .* skipped {reasons}\.$"):
        main([str(recogniser), str(recordings)])
    names = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["a.wav", "apple.aiff", "b.wav", "long.wav", "short.wav"]
    assert "ffmpeg -i call.amr call.flac" in caplog.text
    with pytest.raises(SystemExit, match=r"^transcribe\.py: .*talk\.m4a cannot be .* ffmpeg -i talk\.m4a talk\.flac$"):
        main([str(recogniser), str(recordings / "talk.m4a")])


def test_script_reports_errors(main, recogniser, recordings, tmp_path):
    (recordings / "bad.wav").write_text("no audio")
    with pytest.raises(SystemExit, match=r"transcribe.py: 1 recordings could not be read"):
        main([str(recogniser), str(recordings)])
    with pytest.raises(SystemExit, match=r"--format vtt writes one file per recording, and there are 4: give --out"):
        main([str(recogniser), str(recordings), "--format", "vtt"])
    sf.write(recordings / "b.flac", noise(1_000), 16_000)
    with pytest.raises(SystemExit, match=r"b.flac, b.wav would all be written to"):
        main([str(recogniser), str(recordings), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"^transcribe.py: \S+pretrained has no tokenizer: vocab\.json"):
        main([str(recogniser.parent / "pretrained"), str(recordings)])


LATIN = "caf\udce9.wav"  # a name in Latin-1, as old zips have it


def test_script_writes_names_that_are_not_utf8(main, recogniser, recordings, tmp_path, capsys):
    (recordings / "b.wav").rename(recordings / LATIN)
    (recordings / "a.wav").rename(recordings / "a\nb\tc.wav")
    main([str(recogniser), str(recordings)])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == [r"a\nb\tc.wav", r"caf\xe9.wav", "long.wav", "short.wav"]
    for form in ("txt", "json", "srt", "vtt"):
        out = tmp_path / form
        main([str(recogniser), str(recordings), "--format", form, "--output_dir", str(out)])
        names = [rf"a\nb\tc.{form}", rf"caf\xe9.{form}", f"long.{form}", f"short.{form}"]
        assert sorted(path.name for path in out.glob("[!.]*")) == names
    found = json.loads((tmp_path / "json" / r"caf\xe9.json").read_text("utf-8"))
    assert (found["id"], found["text"]) == (r"caf\xe9.wav", lines[1][1])


def write_table(path, names):
    path.write_text("".join(json.dumps({"audio_filepath": str(name)}) + "\n" for name in names))
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_script_writes_below_the_folder_whatever_the_paths_of_a_manifest(
    main, recogniser, recordings, tmp_path, kind, caplog
):
    (tmp_path / "lists").mkdir()
    table = tmp_path / "lists" / f"all.{kind}"
    paths = [str(recordings / "a.wav"), "../recordings/b.wav"]
    if kind == "jsonl":  # as NeMo writes them
        write_table(table, paths)
    else:
        lines = {"csv": ["path", *paths], "tsv": [".", *(f"{path}\t{LENGTHS[path[-5]]}" for path in paths)]}
        table.write_text("\n".join([*lines[kind], ""]))
    out = tmp_path / "out"
    main([str(recogniser), str(table), "--output_dir", str(out)])
    written = {path.relative_to(out).as_posix() for path in out.rglob("*.txt")}
    assert written == {f"{str(recordings)[1:]}/a.txt", "_up/recordings/b.txt"}
    assert "2 of 2 recordings have names that are no possible names below" in caplog.text


def test_script_checks_names_before_it_loads_the_model(main, recordings, tmp_path):
    sf.write(recordings / "a.flac", noise(1_000), 16_000)
    (recordings / "b.txt").mkdir()
    sf.write(recordings / "b.txt" / "x.wav", noise(1_000), 16_000)
    out = str(tmp_path / "out")
    with pytest.raises(SystemExit, match=r"^transcribe\.py: a\.flac, a\.wav would all be written to \S+/a\.txt\. Re"):
        main(["no model", str(recordings), "--output_dir", out])
    (recordings / "a.flac").unlink()
    with pytest.raises(
        SystemExit, match=r"^transcribe\.py: b\.wav would be written to \S+/b\.txt, which is the folder"
    ):
        main(["no model", str(recordings), "--output_dir", out])
    with pytest.raises(SystemExit, match=r"^transcribe\.py: b\.wav would be written to \S+/b\.txt, which is a folder"):
        main(["no model", str(recordings / "b.wav"), "--output_dir", str(recordings), "--overwrite"])
    with pytest.raises(SystemExit, match="overwrite=True is set, but nothing is written"):
        main(["no model", str(recordings / "b.wav"), "--overwrite"])


def test_script_shortens_names_that_are_too_long(main, recogniser, recordings, tmp_path, caplog):
    long = "x" * 251
    (recordings / "b.wav").rename(recordings / f"{long}.wav")
    out = tmp_path / "out"
    main([str(recogniser), str(recordings / f"{long}.wav"), "--output_dir", str(out), "--format", "json"])
    main([str(recogniser), str(recordings / f"{long}.wav"), "--output_dir", str(out)])
    text, found = sorted(out.glob("[!.]*"), key=lambda path: path.suffix, reverse=True)
    assert text.name == f"{long}.txt" and found.name.startswith(long[:200]) and len(found.name) == 255
    assert json.loads(found.read_text())["id"] == f"{long}.wav"
    assert "1 of 1 recordings have names that are no possible names" in caplog.text


@pytest.fixture
def foreign(recogniser, tmp_path):
    """A recogniser whose letters an ASCII terminal cannot show."""
    folder = shutil.copytree(recogniser, tmp_path / "foreign")
    vocabulary = json.loads((folder / "vocab.json").read_text())
    letters = dict(zip("ABCD", "é日😀ß", strict=True))
    vocabulary = {letters.get(label, label): number for label, number in vocabulary.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    return folder


def ascii_stdout(monkeypatch):
    """Replace stdout as PYTHONIOENCODING=ascii does, and return what is written to it."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    return written


@pytest.mark.parametrize("form", ["txt", "json"])
def test_terminal_that_cannot_show_a_transcript(main, foreign, recordings, monkeypatch, form):
    (recordings / "b.wav").rename(recordings / "日.wav")
    arguments = [str(foreign), str(recordings / "日.wav"), str(recordings / "a.wav"), "--format", form]
    expected = {
        found.id: found.text for found in Transcriber.from_folder(foreign).transcribe(open_recordings([recordings]))
    }
    assert set("é日😀ß") & set(expected["日.wav"])
    written = ascii_stdout(monkeypatch)
    main(arguments)
    text = written.getvalue().decode("ascii")
    if form == "txt":
        rows = (line.split("\t") for line in text.splitlines())
        found = {json.loads(f'"{name}"'): json.loads(f'"{said}"') for name, said in rows}
    else:
        parts = text.replace("}\n{", "}\0{").split("\0")
        found = {row["id"]: row["text"] for row in map(json.loads, parts)}
    assert found == {name: expected[name] for name in ("a.wav", "日.wav")}
