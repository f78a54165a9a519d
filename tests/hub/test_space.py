"""The page to try models: what it shows of a recording, and what it says about one that it cannot use."""

import base64
import re
import sys

import numpy as np
import pytest
import soundfile as sf

from audio_files import noise
from dinosr_hf.data import open_recordings
from dinosr_hf.hub.space import Heard, Listener, build_page
from dinosr_hf.recognition import Transcriber
from dinosr_hf.units import UnitExtractor, load_model
from recognisers import save_models
from scripts import load_command

PICTURE = r'overflow-x: auto.*"width: (\d+)px.* with words and units as boxes below.*base64,(.+)">'


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def listener(models):
    return Listener([models / "recogniser", models / "pretrained"], max_seconds=2)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A stereo recording of 0.3 s at another rate."""
    file = tmp_path_factory.mktemp("recordings") / "speech.flac"
    sf.write(file, np.stack([noise(6_615), noise(6_615, seed=1)], axis=1), 22_050)
    return file


def test_words_and_units_are_those_of_the_commands(models, listener, recording):
    heard, source = listener.hear(recording, 3), open_recordings([recording])
    (transcript,) = Transcriber.from_folder(models / "recogniser").transcribe(source)
    (units,) = UnitExtractor(load_model(models / "pretrained"), layers=[3]).units(source)
    assert len(heard.samples) == 4_800
    assert heard.words == transcript.words and len(heard.words) > 0
    assert heard.units.tolist() == units.codes[0].tolist() and len(set(heard.units)) > 1


def test_the_lowest_layer_with_units_is_the_default(listener, recording):
    assert listener.layers == [2, 3]
    default, lowest, other = (listener.hear(recording, layer).units.tolist() for layer in (None, 2, 3))
    assert default == lowest != other


@pytest.mark.parametrize(
    ("name", "shown"), [("recogniser", "words"), ("pretrained", "units")], ids=["recogniser", "pretrained"]
)
def test_a_model_alone_shows_what_it_has(models, recording, name, shown):
    alone = Listener([str(models / name)])
    heard = alone.hear(recording)
    assert (heard.words is None, heard.units is None) == (shown == "units", shown == "words")
    assert alone.is_recogniser is (shown == "words") and bool(alone.layers) is (shown == "units")
    assert f'alt="Spectrogram of 0.3 s with {shown} as boxes below."' in alone.picture(heard)


def test_the_picture_scrolls_and_grows_with_the_recording(listener, recording):
    heard = listener.hear(recording)
    longer = Heard(np.tile(heard.samples, 10), heard.words, heard.units)
    widths = []
    for each in (heard, longer):
        found = re.search(PICTURE, listener.picture(each))
        assert base64.b64decode(found[2]).startswith(b"\x89PNG")
        widths.append(int(found[1]))
    assert widths == [326, 720]  # the first fits a telephone


def test_there_is_no_picture_of_nothing(listener):
    assert listener.picture(Heard(noise(4_800), [], None)) == ""


def write_nothing(file):
    file.touch()


def write_text(file):
    file.write_text("hello")


def write_mp4(file):
    file.write_bytes(b"\0\0\0 ftypM4A " + bytes(200))


def write_samples(samples):
    return lambda file: sf.write(file, samples, 16_000)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (None, "There is no recording. Record one, or choose a file"),
        (write_nothing, "The recording cannot be read as audio"),
        (write_text, "The recording cannot be read as audio: .* Convert the file"),
        (write_mp4, r"The recording cannot be read: libsndfile cannot read \.mp4. Convert it"),
        (write_samples(np.empty(0)), "The recording has no samples"),
        (write_samples(noise(30)), r"The recording has 0.002 s, but a frame takes 0.003 s. Record for longer"),
        (write_samples(noise(32_100)), r"The recording has 2.01 s, but may have 2. Cut it"),
        (write_samples(np.full(8_000, 0.1)), "The recording is silent. Check that the microphone is on"),
    ],
    ids=["none", "empty", "text", "mp4", "no_samples", "too_short", "too_long", "silent"],
)
def test_a_recording_that_cannot_be_used(listener, tmp_path, write, message):
    file = None if write is None else tmp_path / "x.wav"
    if write is not None:
        write(file)
    with pytest.raises(ValueError, match=message) as error:
        listener.hear(file)
    assert str(tmp_path) not in str(error.value)


def test_a_layer_without_units_is_refused(listener, recording):
    with pytest.raises(ValueError, match="layer=1 has no codebook"):
        listener.hear(recording, 1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["classifier"],
            r"classifier is a DinoSRForSequenceClassification. Give a recogniser \(DinoSRForCTC\)",
        ),
        (["recogniser", "recogniser"], "recogniser is a second DinoSRForCTC. Give .* one of each"),
        (["pretrained", "pretrained"], "pretrained is a second DinoSRForPreTraining"),
        ([], "There is no model"),
        (["nothing"], "nothing is neither a folder nor a model on the Hub|nothing is not a folder"),
    ],
    ids=["classifier", "two_recognisers", "two_pretrained", "none", "missing"],
)
def test_models_that_the_page_cannot_show(models, names, message):
    with pytest.raises(ValueError, match=message):
        Listener([models / name for name in names])


def test_the_longest_recording_must_have_a_length(models):
    with pytest.raises(ValueError, match="max_seconds=0 is out of range"):
        Listener([models / "pretrained"], max_seconds=0)


def test_without_gradio_the_command_says_what_to_install(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r'The page needs gradio: pip install "dinosr-hf\[app\]"'):
        load_command("app").main([str(models / "missing")])


@pytest.fixture(scope="module")
def client(listener):
    """Client of a page on loopback. Gradio is no part of `dev`: `make test-app` runs these tests."""
    gradio_client = pytest.importorskip("gradio_client", reason="gradio is not installed")
    page = build_page(listener, "A <b> and C")
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield gradio_client, gradio_client.Client(url, verbose=False)
    page.close()


def test_the_page_shows_words_times_and_units(listener, recording, client):
    gradio_client, page = client
    picture, transcript, times, units = page.predict(gradio_client.handle_file(str(recording)), 3, api_name="/hear")
    heard = listener.hear(recording, 3)
    assert picture == listener.picture(heard)
    assert transcript == " ".join(word.word for word in heard.words)
    assert times["headers"] == ["word", "start (s)", "end (s)"]
    assert [row[0] for row in times["data"]] == [word.word for word in heard.words]
    assert units == " ".join(map(str, heard.units))


def test_the_page_shows_errors_in_our_words(tmp_path, client):
    gradio_client, page = client
    write_text(tmp_path / "x.wav")
    with pytest.raises(gradio_client.exceptions.AppError, match="The recording cannot be read as audio"):
        page.predict(gradio_client.handle_file(str(tmp_path / "x.wav")), 3, api_name="/hear")
