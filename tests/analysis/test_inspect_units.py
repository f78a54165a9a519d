"""The script that writes a page from a checkpoint and a folder."""

import re
import shutil

import numpy as np
import pytest

from audio_files import sf
from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.utils.model_folder import save_folder
from inspections import write_recordings
from scripts import load_command
from tiny import randomize, tiny_config

SCRIPT = load_command("inspect_units")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect")
    (path / "speech").mkdir()
    write_recordings(path / "speech")
    save_folder(randomize(DinoSRForPreTraining(tiny_config(num_anchor_labels=9))), path / "model")
    words = '"words": [{"label": "ah", "start": 0, "end": 0.2}]'
    lines = ['{"name": "a", "phones": [{"label": "AA", "start": 0, "end": 0.1}], ' + words + "}"]
    (path / "phones.jsonl").write_text("\n".join(lines) + "\n")
    return path


def options(folder, *more):
    return [str(folder / "model"), str(folder / "speech"), "--output", str(folder / "new" / "page.html"), *more]


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_the_script_writes_a_page(folder, capsys, source):
    labels = ["--labels", str(folder / "phones.jsonl"), "--words", str(folder / "phones.jsonl")]
    flags = ["--layer", "2", "--source", source, "--num_moments", "2", "--audio", "ogg", "--device", "cpu"]
    SCRIPT.main(options(folder, *labels, *flags))
    html = (folder / "new" / "page.html").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    num_clips = int(re.search(r"with ([\d,]+) moments", printed)[1])
    assert num_clips == html.count('class="play"') > 0
    assert f"<td>layer 2, {source}</td>" in html and "<title>Units of model, layer 2</title>" in html
    assert {"student": "probability 0.", "teacher": "distance "}[source] in html
    assert "data:audio/ogg" in html and "data:audio/flac" not in html
    assert "AA" in html and "SIL" in html
    assert re.search(r"Spectrogram of a\.wav from .*, with its words, phones, units as boxes below", html)


@pytest.mark.parametrize("flag", ["tier", "step_seconds"])
def test_options_of_labels_need_labels(folder, flag):
    with pytest.raises(SystemExit, match=rf"inspect_units\.py: {flag}=1.* is set, but there are no "):
        SCRIPT.main(options(folder, f"--{flag}", "1"))


@pytest.mark.usefixtures("no_pictures")
def test_phones_may_be_in_another_tier(folder, tmp_path):
    tier = '"IntervalTier" "MAU" 0 0.2 1 0 0.2 "murmur"'
    (tmp_path / "a.TextGrid").write_text(f'File type = "ooTextFile"\n"TextGrid" 0 0.2 <exists> 1 {tier}\n')
    labels = ["--labels", str(tmp_path / "a.TextGrid"), "--layer", "2", "--num_moments", "1", "--device", "cpu"]
    with pytest.raises(SystemExit, match="has no interval tier 'phones'; its interval tiers: MAU"):
        SCRIPT.main(options(folder, *labels))
    SCRIPT.main(options(folder, *labels, "--tier", "MAU"))
    assert "murmur" in (folder / "new" / "page.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_pictures")
def test_labels_may_be_those_of_an_unreadable_recording(folder, tmp_path):
    speech = tmp_path / "speech"
    shutil.copytree(folder / "speech", speech / "ann")
    hidden, unreadable = (speech / name / "a.wav" for name in (".old", "bob"))
    for copy in (hidden, unreadable):
        copy.parent.mkdir()
        copy.write_bytes(b"")
    flags = ["--labels", str(folder / "phones.jsonl"), "--layer", "2", "--device", "cpu"]
    with pytest.raises(SystemExit, match=r"labels of 'a' fit two recordings, 'ann/a\.wav' and 'bob/a\.wav'"):
        SCRIPT.main([str(folder / "model"), str(speech), "--output", str(tmp_path / "page.html"), *flags])
    unreadable.unlink()
    SCRIPT.main([str(folder / "model"), str(speech), "--output", str(tmp_path / "page.html"), *flags])
    assert "AA" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_labels_of_a_recording_that_cannot_be_read_are_not_said_to_have_a_wrong_name(folder, tmp_path):
    speech = shutil.copytree(folder / "speech", tmp_path / "speech")
    sf.write(speech / "a.wav", np.full(8_000, np.nan), 16_000, subtype="FLOAT")
    flags = ["--labels", str(folder / "phones.jsonl"), "--layer", "2", "--device", "cpu"]
    with pytest.raises(SystemExit, match=r"No recording with labels, such as 'a\.wav', is as long as a frame"):
        SCRIPT.main([str(folder / "model"), str(speech), "--output", str(tmp_path / "page.html"), *flags])


def test_the_anchor_of_a_model_without_one_is_refused(folder, tmp_path):
    save_folder(DinoSRForPreTraining(tiny_config()), tmp_path / "model")
    with pytest.raises(SystemExit, match="source='anchor' is unknown to this model: it was made with num_anchor_lab"):
        SCRIPT.main([str(tmp_path / "model"), *options(folder, "--source", "anchor", "--device", "cpu")[1:]])


@pytest.mark.usefixtures("no_pictures")
def test_the_script_reports_left_out_moments(folder, capsys):
    SCRIPT.main(options(folder, "--layer", "3", "--max_megabytes", "0", "--title", "<mine>", "--device", "cpu"))
    assert re.search(r"with 0 moments.*\n[\d,]+ more had no room", capsys.readouterr().out)
    assert "<title>&lt;mine&gt;</title>" in (folder / "new" / "page.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_pictures")
def test_the_anchor_has_its_own_units_on_the_last_layer(folder, monkeypatch):
    counts = []
    render = SCRIPT.render_page
    monkeypatch.setattr(
        SCRIPT, "render_page", lambda found, *rest, **more: counts.append(found) or render(found, *rest, **more)
    )
    SCRIPT.main(options(folder, "--source", "anchor", "--num_moments", "1", "--device", "cpu"))
    html = (folder / "new" / "page.html").read_text(encoding="utf-8")
    assert "<td>layer 3, anchor</td>" in html and "probability 0." in html
    assert len(counts[0].counts) == 9  # of which a codebook has 7


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layer", "1"], "inspect_units.py: layer=1 has no codebook"),
        (["--layer", "2", "--source", "anchor"], "source='anchor' has units on the last layer alone"),
        (["--layer", "2", "--labels", "no.txt"], "no.txt does not exist"),
        (["--layer", "2", "--words", "no.txt"], "no.txt does not exist"),
        (["--layer", "2", "--num_moments", "-1"], "num_moments=-1 is out of range"),
    ],
)
def test_the_script_refuses(folder, more, message):
    with pytest.raises(SystemExit, match=message):
        SCRIPT.main(options(folder, "--device", "cpu", *more))
