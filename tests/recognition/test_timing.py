"""Emission delay: measured from the level of the signal, stored with the tokenizer, subtracted from times of words."""

import json

import numpy as np
import pytest
from transformers import AutoProcessor, AutoTokenizer, pipeline

from dinosr_hf import DinoSRConfig
from dinosr_hf.data import LabelledSource, SpeechSource, Utterance
from dinosr_hf.finetuning import Recognition, RecognitionArguments
from dinosr_hf.recognition import GreedyDecoder, SpeechRecognitionPipeline, Transcriber, make_processor
from dinosr_hf.recognition.timing import (
    MIN_WORDS,
    measure_emission_delay,
    signal_level,
    store_emission_delay,
    stored_emission_delay,
)
from emissions import LABELS, NAMED, PATH, TIMES, of_path, tokenizer_of
from recognisers import save_models
from tiny import tiny_config

PAUSE, WORD = 0.17, 0.31


def spoken(num_utterances=6, num_words=5, late=0.0, seed=0, noise=1e-3):
    """Utterances of noise bursts between pauses, and the times of the bursts, shifted by `late` seconds."""
    generator = np.random.default_rng(seed)
    for _ in range(num_utterances):
        lengths = generator.uniform(0.6, 1.4, (num_words, 2)) * (PAUSE, WORD)
        ends = lengths.cumsum()[1::2]
        waveform = generator.standard_normal(int((ends[-1] + PAUSE) * 16_000)) * noise
        words = [(end - length, end) for end, length in zip(ends, lengths[:, 1], strict=True)]
        for start, end in words:
            waveform[int(start * 16_000) : int(end * 16_000)] *= 0.1 / noise
        yield waveform.astype(np.float32), [(start + late, end + late) for start, end in words]


@pytest.mark.parametrize("late", [-0.12, 0.0, 0.05, 0.23])
def test_measured_delay(late):
    assert measure_emission_delay(spoken(late=late)) == pytest.approx(late, abs=0.011)


def test_measured_delay_in_noise():
    assert measure_emission_delay(spoken(late=0.1, noise=0.05)) == pytest.approx(0.1, abs=0.011)


def test_level_is_clipped_40_db_below_the_loudest_step():
    level = signal_level(np.concatenate([np.zeros(333), np.full(333, 0.1), np.zeros(1)]).astype(np.float32))
    assert level.shape == (4,)
    assert level.max() == pytest.approx(-20, abs=0.1)
    assert level.min() == pytest.approx(-60, abs=0.1)
    assert signal_level(np.zeros(5, dtype=np.float32)).shape == (0,)


@pytest.mark.parametrize(
    "utterances",
    [
        pytest.param([], id="nothing"),
        pytest.param(list(spoken(num_utterances=MIN_WORDS // 5 - 1)), id="too few words"),
        pytest.param([(np.zeros(16_000, dtype=np.float32), [(0.1, 0.3)] * 5)] * 9, id="silence"),
        pytest.param(list(spoken(late=0.7, num_words=1, num_utterances=40)), id="out of reach"),
        pytest.param([(wave[:4_000], words) for wave, words in spoken(num_utterances=9)], id="too short"),
    ],
)
def test_no_delay_is_measured(utterances):
    assert measure_emission_delay(utterances) is None


def test_delay_is_subtracted_from_times():
    def times(**options):
        (found,) = GreedyDecoder(LABELS, **NAMED, **TIMES, lead_seconds=0, tail_seconds=0.01, **options).decode(
            of_path(PATH)
        )
        return [time for _, *span in found.words for time in span]

    assert times(delay_seconds=0.03) == pytest.approx([time - 0.03 for time in times()])
    # Times stay within the recording.
    assert min(times(delay_seconds=0.1)) == 0.0
    assert max(times(delay_seconds=-0.1)) == pytest.approx(0.245)
    for delay in (0.5, -0.5):
        assert times(delay_seconds=delay) == sorted(times(delay_seconds=delay))


@pytest.mark.parametrize("units", ["characters", "phonemes"])
def test_delay_is_saved_with_the_processor(tmp_path, units):
    processor = make_processor({label: index for index, label in enumerate(["<pad>", "a", "|", "<unk>"])}, units)
    config = tiny_config(vocab_size=4, pad_token_id=0)
    assert GreedyDecoder.from_tokenizer(processor.tokenizer, config).delay_seconds == 0.0
    store_emission_delay(processor.tokenizer, 0.12)
    processor.save_pretrained(tmp_path / "first")
    AutoProcessor.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")  # as an export does
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "second")
    assert GreedyDecoder.from_tokenizer(tokenizer, config).delay_seconds == 0.12
    assert GreedyDecoder.from_tokenizer(tokenizer, config, delay_seconds=0.0).delay_seconds == 0.0


def test_delay_out_of_range_raises(tmp_path):
    tokenizer = tokenizer_of(tmp_path, LABELS)
    store_emission_delay(tokenizer, 2.0)
    with pytest.raises(ValueError, match=r"emission_delay=2.0 in .* must be at least -1 and at most 1"):
        stored_emission_delay(tokenizer)


def test_transcriber_and_pipeline_subtract_the_stored_delay(tmp_path):
    save_models(tmp_path)
    wave = np.random.default_rng(0).standard_normal(8_000).astype(np.float32)

    def starts():
        (transcript,) = Transcriber.from_folder(tmp_path / "recogniser").transcribe(WaveformSource([wave]))
        recognise = pipeline(
            "automatic-speech-recognition",
            model=str(tmp_path / "recogniser"),
            pipeline_class=SpeechRecognitionPipeline,
        )
        chunks = recognise(wave, return_timestamps="word")["chunks"]
        return [word.start for word in transcript.words], [chunk["timestamp"][0] for chunk in chunks]

    before = starts()
    file = tmp_path / "recogniser" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "emission_delay": 0.02}))
    for late, early in zip(before, starts(), strict=True):
        inside = [number for number, start in enumerate(late) if 0.05 < start < 0.4]
        assert len(inside) > 2
        assert [early[number] for number in inside] == pytest.approx([late[number] - 0.02 for number in inside])


class WaveformSource(SpeechSource):
    """Waveforms in memory."""

    def __init__(self, waveforms):
        self.waveforms, self.skipped = waveforms, {}
        self.utterances = [Utterance(f"u{number}", len(wave)) for number, wave in enumerate(waveforms)]

    def load(self, index, start=0, num_samples=None):
        return self.waveforms[index]


@pytest.mark.parametrize("late", [0, 6], ids=["no delay", "six frames"])
def test_fine_tuning_measures_the_delay(late):
    task = Recognition(RecognitionArguments())
    utterances = list(spoken())
    source = LabelledSource(WaveformSource([wave for wave, _ in utterances]), ["a a a a a"] * len(utterances))
    task.prepare(source)
    config = DinoSRConfig(**task.config_changes())

    def delay():
        return stored_emission_delay(task.processor.tokenizer)

    assert delay() == 0
    letter, delimiter = (task.processor.tokenizer.convert_tokens_to_ids(label) for label in ("a", "|"))
    paths = []
    for wave, words in utterances:
        path = np.zeros(config.num_frames(len(wave)), dtype=np.int64)
        for start, end in words:
            first, last = (round((time - 0.0125) / 0.02) + late for time in (start + 0.03, end - 0.16))
            path[first : last + 1] = letter
            path[last + 1] = delimiter
        paths.append(path)
    store_emission_delay(task.processor.tokenizer, 0.5)  # of an earlier calibration, to be ignored
    task.calibrate(config, source, [*paths[:-1], None])
    assert delay() == pytest.approx(late * 0.02, abs=0.021)
    task.calibrate(config, source, [None] * len(paths))
    assert delay() == pytest.approx(late * 0.02, abs=0.021)
