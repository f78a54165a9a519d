"""DiscoPhon: its files, messages, published figures; and where it is installed (Python 3.12), its own evaluation."""

import importlib.util
import json
import sys
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from audio_files import sf
from dinosr_hf import DinoSRConfig, DinoSRForPreTraining
from dinosr_hf.analysis import discophon
from dinosr_hf.analysis.abx import Triphone, items_text
from dinosr_hf.analysis.alignment_files import read_alignments
from dinosr_hf.analysis.discophon import DiscoPhon, add_means, pad_units, parts_of, published_rows
from dinosr_hf.analysis.unit_evaluation import Reference
from dinosr_hf.commands import evaluate_units, extract_units
from dinosr_hf.data import open_recordings
from dinosr_hf.units import UnitCorpus, UnitExtractor, load_units
from dinosr_hf.utils.model_folder import save_folder
from tiny import randomize, tiny_config

needs_discophon = pytest.mark.skipif(
    importlib.util.find_spec("discophon") is None, reason="discophon is not installed: it needs Python 3.12"
)
PITCHES = {"SIL": 0.0, "a": 1_500.0, "e": 4_000.0, "k": 300.0, "t": 600.0}
FILES = [f"s{number // 4}-{number}" for number in range(8)]  # of two speakers


def phones_of(number):
    """Phones of a recording with their lengths in steps of 10 ms: `SIL k a t e k SIL` of 0.98 s."""
    middle = ["a", "e"][number % 2]
    lengths = [12, 13 + number % 3, 16, 14, 15 - number % 3, 12, 16]
    return list(zip(["SIL", "k", middle, "t", "e", "k", "SIL"], lengths, strict=True))


def write_part(folder, language, split="test"):
    """Write recordings of tones with their phones and triphones, as DiscoPhon has them; recordings are links."""
    audio, everything = (folder / "audio" / language / name for name in (split, "all"))
    for path in (audio, everything, folder / "alignment", folder / "item"):
        path.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(len(language))
    lines, items = ["#file onset offset #phone"], []
    for number, file in enumerate(FILES):
        phones, time, samples = phones_of(number), 0, []
        segments = []
        for phone, length in phones:
            segments.append((phone, time, time + length))
            lines.append(f"{file} {time / 100:.2f} {(time + length) / 100:.2f} {phone}")
            samples.append(0.5 * np.sin(2 * np.pi * PITCHES[phone] * np.arange(160 * length) / 16_000))
            time += length
        for (first, start, _), (middle, *_), (last, _, end) in zip(segments, segments[1:], segments[2:], strict=False):
            times = (f"{start / 100:.4f}", f"{end / 100:.4f}")
            if "SIL" not in (first, middle, last):
                items.append(Triphone(file, *times, middle, first, last, file.partition("-")[0]))
        samples = np.concatenate(samples) + 0.01 * generator.standard_normal(160 * time)
        sf.write(everything / f"{file}.wav", np.clip(samples, -0.9, 0.9), 16_000)
        (audio / f"{file}.wav").symlink_to(everything / f"{file}.wav")
    (folder / "alignment" / f"alignment-{language}-{split}.txt").write_text("\n".join(lines) + "\n")
    (folder / "item" / f"triphone-{language}-{split}.item").write_text(items_text(items))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("discophon")
    for language in ("wol", "eng"):
        write_part(folder, language)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model of 50 frames a second and 256 codewords."""
    torch.manual_seed(0)
    config = tiny_config(conv_stride=[10, 8, 4], conv_kernel=[16, 8, 4], codebook_size=256)
    model = randomize(DinoSRForPreTraining(config)).eval()
    return save_folder(model, tmp_path_factory.mktemp("model") / "pretrained")


def command(model_folder, data, out, *more):
    return [str(model_folder), "--discophon", str(data), "--output_dir", str(out), "--layers", "2", *more]


# -- files


def test_alignments_are_read(data, tmp_path):
    found = read_alignments(data / "alignment" / "alignment-eng-test.txt")
    assert list(found) == FILES
    assert [segment.label for segment in found["s0-0"]] == ["SIL", "k", "a", "t", "e", "k", "SIL"]
    assert found["s0-0"][1][1:] == (0.12, 0.25)
    shuffled = tmp_path / "a.txt"  # more columns, in another order
    shuffled.write_text("#phone #file onset offset speaker\nb f 0.5 0.6 ann\n\na f 0.0 0.5 ann\n")
    assert [tuple(segment) for segment in read_alignments(shuffled)["f"]] == [("a", 0.0, 0.5), ("b", 0.5, 0.6)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.txt has no column #file"),
        ("#file onset offset phone\n", r"a.txt has no column #phone. .* DiscoPhon's: its first line names columns"),
        ("#file onset offset #phone\nf 0 1\n", "a.txt, line 2: 'f 0 1' is not #file onset offset #phone"),
        ("#file onset offset #phone\nf 0 x a\n", "line 2: 'f 0 x a' is not .*could not convert string to float: 'x'"),
        ("#file onset offset #phone\nf 1 0 a\n", "line 2: .*ends before it starts"),
    ],
    ids=["empty", "column", "short", "number", "order"],
)
def test_malformed_alignments_are_refused(tmp_path, text, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_alignments(tmp_path / "a.txt")


@pytest.mark.parametrize("names", [["audio/eng/test"], ["audio/eng/test", "audio/wol/test"], ["."]], ids=len)
def test_the_folder_of_a_recording_says_its_language_and_split(data, monkeypatch, names):
    monkeypatch.chdir(data / names[0])
    found = parts_of(open_recordings(["."])) if names == ["audio/eng/test"] else None
    monkeypatch.chdir(data)
    if names == ["."]:
        with pytest.raises(ValueError, match=r"all/s0-0.wav is not in a folder of DiscoPhon, .* Languages are deu,"):
            parts_of(open_recordings(names))
        return
    found = found or parts_of(open_recordings(names))
    assert {part.units_file for part, _ in found.values()} == {f"units-{name[6:9]}-test.jsonl" for name in names}
    assert sorted(file for _, file in found.values()) == sorted(FILES * len(names))


def test_extraction_writes_its_files(data, model_folder, tmp_path, capsys):
    flags = ["--output_dir", str(tmp_path / "units"), "--layers", "2", "3", "--format", "discophon", "--device", "cpu"]
    arguments = [str(model_folder), str(data / "audio/eng/test"), *flags, "--shard_seconds", "2"]
    extract_units.main(arguments)
    assert "8 recordings" in capsys.readouterr().out
    source = open_recordings([data / "audio/eng/test"])
    expected = {units.id: units.codes for units in UnitExtractor(load(model_folder), layers=[2, 3]).units(source)}
    for row, layer in enumerate((2, 3)):
        file = tmp_path / "units" / f"layer-{layer}" / "units-eng-test.jsonl"
        found = [json.loads(line) for line in file.read_text().splitlines()]
        assert [list(line) for line in found] == [["file", "units"]] * 8
        assert {f"{line['file']}.wav": line["units"] for line in found} == {
            name: codes[row].tolist() for name, codes in expected.items()
        }
    summary = json.loads((tmp_path / "units" / "summary.json").read_text())
    assert summary["discophon"] == ["layer-2/units-eng-test.jsonl", "layer-3/units-eng-test.jsonl"]
    assert len(summary["files"]) > 1 and len(load_units(tmp_path / "units")) == 8
    file.unlink()  # of a run that was killed before the end
    extract_units.main(arguments)
    assert len(file.read_text().splitlines()) == 8


@pytest.mark.parametrize("front_end", ["conv", "log_mel"])
def test_units_are_as_long_as_those_of_the_papers_frames(front_end):
    config, longest_gap = DinoSRConfig(feature_encoder=front_end), 0
    for num_samples in range(560, 33_000, 40):
        units = np.arange(2 * config.num_frames(num_samples)).reshape(2, -1)
        found = pad_units(units, num_samples, 320)
        steps, num_frames = num_samples // 160, DinoSRConfig().num_frames(num_samples)
        longest_gap = max(longest_gap, steps - 2 * units.shape[1])
        assert found.shape[1] == num_frames and steps - 2 * num_frames <= 2  # as DiscoPhon allows
        assert found.tolist() == [row + row[-1:] * (num_frames - len(row)) for row in units.tolist()]
    assert longest_gap == (2 if front_end == "conv" else 3)


def test_only_one_missing_unit_is_added():
    units = np.arange(47)
    assert pad_units(units, 15_840, 320) is units
    assert pad_units(units[:0], 500, 320).tolist() == []


def test_log_mel_models_have_a_unit_for_each_frame_of_the_phones(tmp_path, monkeypatch):
    """A recording of 99 steps of 10 ms has 48 log-mel frames, which end 30 ms before its phones."""
    audio = tmp_path / "audio" / "eng" / "test"
    audio.mkdir(parents=True)
    sf.write(audio / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 99 * 160), 16_000)
    (tmp_path / "alignment").mkdir()
    alignment = tmp_path / "alignment" / "alignment-eng-test.txt"
    alignment.write_text("#file onset offset #phone\na 0.00 0.50 k\na 0.50 0.99 t\n")
    torch.manual_seed(0)
    model = randomize(DinoSRForPreTraining(tiny_config(feature_encoder="log_mel"))).eval()
    source, extractor = open_recordings([audio]), UnitExtractor(model, layers=[2, 3])
    (units,) = extractor.units(source)
    expected = {str(layer): [*row, row[-1]] for layer, row in zip((2, 3), units.codes.tolist(), strict=True)}
    assert units.codes.shape[1] == 48
    with UnitCorpus(tmp_path / "units", extractor, source, form="discophon") as corpus:
        corpus.write()
        corpus.finish()
    for layer, row in expected.items():
        line = json.loads((tmp_path / "units" / f"layer-{layer}" / "units-eng-test.jsonl").read_text())
        assert line == {"file": "a", "units": row}
    evaluated = []

    def phoneme_discovery(units, phones, **options):
        evaluated.append(units["a"])
        return {"pnmi": 0.5, "r_val": 0.5}

    fake = SimpleNamespace(
        phoneme_discovery=phoneme_discovery, read_gold_annotations=lambda path: {"a": ["k"] * 50 + ["t"] * 49}
    )
    monkeypatch.setattr(discophon, "import_discophon", lambda *module: fake)
    DiscoPhon(tmp_path).evaluate([(units.id, units.codes)], num_units=7, stride=320)
    assert evaluated == list(expected.values())


def load(folder):
    return DinoSRForPreTraining.from_pretrained(folder)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--deduplicate"], "DiscoPhon reads a unit for each frame. Leave deduplicate out"),
        ([], r"audio/\w+/all/s0-0.wav is not in a folder of DiscoPhon"),
    ],
    ids=["deduplicate", "folder"],
)
def test_extraction_refuses(data, model_folder, tmp_path, flags, message):
    inputs = [str(data / "audio" / ("eng/test" if flags else ""))]
    flags = [*flags, "--output_dir", str(tmp_path / "units"), "--layers", "2", "--format", "discophon"]
    with pytest.raises(SystemExit, match=message):
        extract_units.main([str(model_folder), *inputs, *flags, "--device", "cpu"])
    assert not list((tmp_path / "units").glob("*.jsonl"))


def test_more_units_than_it_takes_are_refused(data, tmp_path):
    config = tiny_config(codebook_size=257)
    source = open_recordings([data / "audio/eng/test"])
    extractor = UnitExtractor(DinoSRForPreTraining(config), layers=[2])
    with pytest.raises(ValueError, match=r"DiscoPhon takes at most 256 units, and there are 257. Use k-means of 256"):
        UnitCorpus(tmp_path, extractor, source, form="discophon")


# -- data


@pytest.mark.parametrize(
    ("languages", "split", "message"),
    [
        (["english"], "test", "DiscoPhon has no language 'english'. Choose among deu, swa"),
        (["eng"], "train-1h", "DiscoPhon has no split 'train-1h'. Choose among test, dev"),
        (["eng", "deu"], "test", "lacks recordings in audio/deu/test or their phones, alignment/alignment-deu-test"),
        ([], "dev", "lacks recordings in audio/LANGUAGE/dev or their phones"),
    ],
    ids=["language", "split", "absent", "nothing"],
)
def test_data_that_is_not_there_is_refused(data, languages, split, message):
    with pytest.raises(ValueError, match=message):
        DiscoPhon(data, languages, split)


def test_recordings_are_those_with_phones(tmp_path):
    write_part(tmp_path, "eng")
    alignment = tmp_path / "alignment" / "alignment-eng-test.txt"
    alignment.write_text(alignment.read_text() + "more 0.00 0.50 a\n")
    with pytest.raises(ValueError, match=r"audio/eng/test lacks 1 of 9, such as more. DiscoPhon evaluates all"):
        DiscoPhon(tmp_path)
    alignment.write_text("\n".join(line for line in alignment.read_text().splitlines() if "s0-0 " not in line))
    (tmp_path / "audio/eng/test/more.wav").symlink_to(tmp_path / "audio/eng/all/s0-0.wav")
    with pytest.raises(ValueError, match=r"has too many recordings: 1 of 8, such as s0-0"):
        DiscoPhon(tmp_path)


def test_languages_without_recordings_are_left_out(tmp_path):
    write_part(tmp_path, "eng")
    write_part(tmp_path, "swa")
    for file in (tmp_path / "audio/swa/all").iterdir():  # Common Voice's are links until they are downloaded
        file.unlink()
    assert DiscoPhon(tmp_path).languages == ["eng"]


# -- published figures


def test_published_figures_are_those_of_the_leaderboard():
    found = published_rows(discophon.LANGUAGES, with_abx=True)
    rows = {(row["model"], row["units"], row["data"]): row for row in found}
    assert len(rows) == len(found) == 4 * 2 * 12
    assert rows["SpidR VP-20", "published, adapted on 10 h", "eng-test"] == {
        "model": "SpidR VP-20",
        "layer": 6,
        "units": "published, adapted on 10 h",
        "data": "eng-test",
        "num_units": 256,
        "pnmi": 0.6293,
        "per": 0.5271,
        "f1": 0.6372,
        "r_value": 0.6284,
        "abx": 0.0869,
    }
    assert {row["data"] for row in published_rows(["wol"])} == {"wol-test"}
    assert all("abx" not in row for row in published_rows(["wol"]))


@pytest.mark.parametrize(
    ("model", "units", "pnmi", "per", "abx"),
    [
        ("SpidR VP-20", "published", 0.581, 0.645, 0.133),
        ("SpidR VP-20", "published, adapted on 10 h", 0.644, 0.617, 0.091),
        ("SpidR MMS-ulab", "published", 0.586, 0.848, 0.130),
        ("SpidR MMS-ulab", "published, adapted on 10 h", 0.646, 0.654, 0.097),
        ("HuBERT VP-20", "published", 0.495, 1.270, 0.161),
        ("HuBERT VP-20", "published, adapted on 10 h", 0.576, 0.980, 0.108),
        ("HuBERT MMS-ulab", "published", 0.510, 1.265, 0.142),
        ("HuBERT MMS-ulab", "published, adapted on 10 h", 0.544, 1.136, 0.130),
    ],
)
def test_means_over_the_test_languages_are_those_that_it_publishes(model, units, pnmi, per, abx):
    rows = add_means(published_rows(discophon.LANGUAGES[6:], with_abx=True))
    (row,) = [row for row in rows if (row["model"], row["units"], row["data"]) == (model, units, "mean of 6")]
    assert (row["pnmi"], row["per"], row["abx"]) == pytest.approx((pnmi, per, abx), abs=6e-4)


# -- the command


def test_a_missing_package_is_named_before_the_work(data, model_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "discophon", None)
    monkeypatch.setitem(sys.modules, "discophon.evaluate", None)
    message = r'DiscoPhon \(with Python 3.12 or newer\) needs discophon.evaluate: pip install "dinosr-hf\[discophon\]"'
    with pytest.raises(SystemExit, match=message):
        evaluate_units.main(command(model_folder, data, tmp_path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Give either --data with --labels, or --discophon"),
        (["--data", "a", "--discophon", "b"], "Give either --data with --labels, or --discophon"),
        (["--discophon", "b", "--labels", "c"], "labels=c is set, but DiscoPhon has labels of its own"),
        (["--discophon", "b", "--audio_column", "c"], "audio_column=c is set, but DiscoPhon has files"),
        (["--discophon", "b", "--num_samples", "9"], "num_samples=9 is set, but DiscoPhon has .*, and no intervals"),
        (["--data", "synthetic", "--languages", "eng"], r"languages=\['eng'\] is set, but --discophon is not\."),
    ],
    ids=["neither", "both", "labels", "audio_column", "num_samples", "languages"],
)
def test_options_that_exclude_each_other(flags, message):
    with pytest.raises(SystemExit, match=message):
        evaluate_units.main(["m", "--output_dir", "o", *flags])


# -- with discophon


def reference_scores(data, language, units, num_units=256):
    """What its own functions say of the units of a language."""
    from discophon.data import read_gold_annotations
    from discophon.evaluate import phoneme_discovery

    phones = read_gold_annotations(data / "alignment" / f"alignment-{language}-test.txt")
    return phoneme_discovery(units, phones, kind="many-to-one", n_units=num_units, language=language)


def fill(folder, languages):
    """Add the files of the other languages, empty: its command wants all of them to be there."""
    from discophon.languages import all_languages

    splits = ["all", "dev", "test", "train-10h", "train-10min", "train-1h"]
    (folder / "manifest").mkdir(exist_ok=True)
    (folder / "manifest" / "speakers.jsonl").touch()
    for language in (each.iso_639_3 for each in all_languages()):
        for split in splits:
            (folder / "audio" / language / split).mkdir(parents=True, exist_ok=True)
            if split != "all":
                (folder / "manifest" / f"manifest-{language}-{split}.csv").touch()
        for split in ("dev", "test"):
            (folder / "alignment" / f"alignment-{language}-{split}.txt").touch()
            for kind in ("triphone", "phoneme"):
                (folder / "item" / f"{kind}-{language}-{split}.item").touch()


@needs_discophon
@pytest.mark.parametrize("with_abx", [False, True], ids=["units", "abx"])
def test_the_command_says_what_its_own_command_says(data, model_folder, tmp_path, capsys, with_abx):
    from discophon.benchmark import benchmark_abx_discrete, benchmark_discovery

    flags = ["--sources", "student", *(["--abx"] if with_abx else [])]
    evaluate_units.main(command(model_folder, data, tmp_path / "evaluated", *flags))
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "evaluated" / "discophon.json").read_text())
    assert (tmp_path / "evaluated" / "discophon.md").read_text() in printed
    inputs = [str(data / "audio" / language / "test") for language in ("eng", "wol")]
    flags = ["--output_dir", str(tmp_path / "units"), "--layers", "2", "--format", "discophon", "--device", "cpu"]
    extract_units.main([str(model_folder), *inputs, *flags])
    fill(data, ("eng", "wol"))
    found = benchmark_discovery(data, tmp_path / "units" / "layer-2", kind="many-to-one").rows()
    theirs = {(f"{language}-{split}", metric): score for language, split, metric, score in found}
    names = {"pnmi": "pnmi", "per": "per", "f1": "f1", "r_val": "r_value"}
    if with_abx:
        found = benchmark_abx_discrete(data, tmp_path / "units" / "layer-2").rows()
        theirs |= {(f"{language}-{split}", metric): score for language, split, metric, score in found}
        names |= {f"triphone_abx_discrete_{speaker}_speaker": f"abx_{speaker}" for speaker in ("within", "across")}
    ours = {row["data"]: row for row in rows if row["units"] == "student"}
    assert list(ours) == ["eng-test", "wol-test", "mean of 2"]
    for language, (metric, name) in product(("eng-test", "wol-test"), names.items()):
        assert ours[language][name] == theirs[language, metric]
    for name in ("pnmi", "per", *(["abx"] if with_abx else [])):
        assert ours["mean of 2"][name] == pytest.approx((ours["eng-test"][name] + ours["wol-test"][name]) / 2)
    assert 0 < ours["eng-test"]["pnmi"] < 1 and ours["eng-test"]["num_units"] == 256
    # The baselines on the same languages.
    assert sum(row["units"].startswith("published") for row in rows) == 4 * 2 * 3
    assert ("abx" in rows[-1]) == with_abx


@needs_discophon
def test_baselines_are_shown_for_equal_numbers_of_units_alone(data, tmp_path):
    torch.manual_seed(0)
    config = tiny_config(conv_stride=[10, 8, 4], conv_kernel=[16, 8, 4])
    folder = save_folder(randomize(DinoSRForPreTraining(config)).eval(), tmp_path / "model")
    evaluate_units.main(command(folder, data, tmp_path / "out", "--languages", "eng"))
    rows = json.loads((tmp_path / "out" / "discophon.json").read_text())
    assert [(row["units"], row["data"], row["num_units"]) for row in rows] == [
        ("student", "eng-test", 7),
        ("teacher", "eng-test", 7),
    ]


@needs_discophon
def test_units_that_do_not_fit_are_refused(data):
    benchmark = DiscoPhon(data, ["eng"])
    units = [(name, np.zeros((1, 49), dtype=np.int64)) for name, _ in benchmark.source.utterances]
    with pytest.raises(ValueError, match="has recordings that could not be read: 1 of 8, such as s0-0"):
        benchmark.evaluate(units[1:], num_units=4, stride=320)
    with pytest.raises(ValueError, match=r"A frame has 20 samples, 1.25 ms, but DiscoPhon takes frames of a multiple"):
        benchmark.evaluate(units, num_units=4, stride=20)
    short = [(name, codes[:, :40]) for name, codes in units]
    with pytest.raises(ValueError, match=r"eng-test, s0-\d: its units last 800 ms and its phones 980 ms, but"):
        benchmark.evaluate(short, num_units=4, stride=320)
    with pytest.raises(ValueError, match=r"DiscoPhon refuses the units of eng-test: Found unit 0, but n_units is 0"):
        benchmark.evaluate(units, num_units=0, stride=320)
    ((row,),) = benchmark.evaluate(units, num_units=4, stride=320)  # a collapsed model
    assert row["pnmi"] == pytest.approx(0, abs=1e-12) and row["f1"] == 0


def own_figures(data, units, num_units):
    labels = read_alignments(data / "alignment" / "alignment-eng-test.txt")
    (counts,) = Reference(list(units), labels).count_by_speaker(
        [(name, np.array([codes])) for name, codes in units.items()], num_codes=num_units
    )
    return sum(list(counts.values())[1:], start=next(iter(counts.values()))).figures()


@needs_discophon
@pytest.mark.parametrize("shift", [0, 1], ids=["even boundaries", "odd boundaries"])
def test_its_pnmi_equals_ours_where_phones_change_between_frames(tmp_path, shift):
    # It counts both steps of 10 ms of a frame, and we the one at the frame's centre, which is the second.
    generator = np.random.default_rng(0)
    (tmp_path / "alignment").mkdir()
    lines, units, num_frames = ["#file onset offset #phone"], {}, 60
    for name in "abc":
        steps = np.repeat(generator.integers(0, 5, num_frames), 2)
        steps = np.concatenate([steps[:shift], steps])[: 2 * num_frames]
        ends = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(steps)]
        lines += [f"{name} {start / 100:.2f} {end / 100:.2f} p{steps[start]}" for start, end in pairwise(ends)]
        units[name] = np.where(generator.random(num_frames) < 0.7, steps[1::2], generator.integers(0, 9, num_frames))
    (tmp_path / "alignment" / "alignment-eng-test.txt").write_text("\n".join(lines) + "\n")
    units = {name: codes.tolist() for name, codes in units.items()}
    theirs, ours = reference_scores(tmp_path, "eng", units, 9)["pnmi"], own_figures(tmp_path, units, 9)["pnmi"]
    assert (ours == pytest.approx(theirs, abs=1e-12)) == (shift == 0)
    assert ours >= theirs - 1e-12  # the units follow the centres here


@needs_discophon
def test_its_boundaries_are_ours_of_the_phones_that_units_stand_for(data):
    from discophon.data import read_gold_annotations
    from discophon.evaluate import cooccurrence_matrix, phone_assignments

    generator, units = np.random.default_rng(0), {}
    for number, file in enumerate(FILES):
        labels, lengths = zip(*phones_of(number), strict=True)
        steps = np.repeat([sorted(PITCHES).index(phone) for phone in labels], lengths)
        codes = steps[1:96:2]
        units[file] = np.where(generator.random(48) < 0.75, codes, generator.integers(0, 9, 48)).tolist()
    phones = read_gold_annotations(data / "alignment" / "alignment-eng-test.txt")
    counts = cooccurrence_matrix(units, phones, n_units=9, language="eng")
    assigned = phone_assignments(units, counts, kind="many-to-one")
    names = sorted({phone for own in assigned.values() for phone in own})
    theirs = reference_scores(data, "eng", units, 9)
    ours = own_figures(data, {file: [names.index(phone) for phone in own] for file, own in assigned.items()}, 9)
    assert (ours["boundary_f1"], ours["r_value"]) == pytest.approx((theirs["f1"], theirs["r_val"]), abs=1e-12)
    assert own_figures(data, units, 9)["boundary_f1"] < theirs["f1"] - 0.02  # the changes of the units themselves
