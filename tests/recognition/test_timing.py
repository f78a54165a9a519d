"""How late a recogniser is, from where the signal is loud."""

import numpy as np
import pytest
from test_decoding import LABELS, NAMED, TIMES, of_path, tokenizer_of

from dinosr_hf import DinoSRConfig
from dinosr_hf.data import LabelledSource, SpeechSource, Utterance
from dinosr_hf.finetuning import Recognition, RecognitionArguments
from dinosr_hf.recognition import GreedyDecoder
from dinosr_hf.recognition.timing import MIN_WORDS, emission_delay, signal_level
from tiny import tiny_config

PAUSE, WORD = 0.17, 0.31


def spoken(num_utterances=6, num_words=5, late=0.0, seed=0, noise=1e-3):
    """Bursts of noise between pauses, and their times, `late` seconds later than they are."""
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
def test_delay_of_words_that_are_late(late):
    assert emission_delay(spoken(late=late)) == pytest.approx(late, abs=0.011)


def test_words_are_found_in_noise():
    assert emission_delay(spoken(late=0.1, noise=0.05)) == pytest.approx(0.1, abs=0.011)


def test_level_is_clipped_below_the_loudest():
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
def test_no_delay_where_there_is_none_to_find(utterances):
    assert emission_delay(utterances) is None


def test_times_are_earlier_by_the_delay():
    path = ["<pad>", "<pad>", "a", "a", "<pad>", "b", "|", "|", "<pad>", "a", "<pad>", "<pad>"]

    def times(**options):
        (found,) = GreedyDecoder(LABELS, **NAMED, **TIMES, lead_seconds=0, tail_seconds=0.01, **options).decode(
            of_path(path)
        )
        return [time for _, *span in found.words for time in span]

    assert times(delay_seconds=0.03) == pytest.approx([time - 0.03 for time in times()])
    # Nothing is said before the recording begins or after it ends.
    assert min(times(delay_seconds=0.1)) == 0.0
    assert max(times(delay_seconds=-0.1)) == pytest.approx(0.245)
    for delay in (0.5, -0.5):
        assert times(delay_seconds=delay) == sorted(times(delay_seconds=delay))


def test_a_decoder_takes_the_delay_of_the_model(tmp_path):
    tokenizer = tokenizer_of(tmp_path, LABELS)
    config = tiny_config(vocab_size=5, pad_token_id=1, emission_delay=0.12)
    assert GreedyDecoder.from_tokenizer(tokenizer, config).delay_seconds == 0.12
    assert GreedyDecoder.from_tokenizer(tokenizer, config, delay_seconds=0.0).delay_seconds == 0.0


def test_a_delay_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"emission_delay=2 is out of range: it must be at least -1 and at most 1"):
        DinoSRConfig(emission_delay=2)


class Spoken(SpeechSource):
    """The waveforms of `spoken`."""

    def __init__(self, waveforms):
        self.waveforms, self.skipped = waveforms, {}
        self.utterances = [Utterance(f"u{number}", len(wave)) for number, wave in enumerate(waveforms)]

    def load(self, index, start=0, num_samples=None):
        return self.waveforms[index]


@pytest.mark.parametrize("late", [0, 6], ids=["at once", "six frames late"])
def test_fine_tuning_measures_the_delay(late):
    task = Recognition(RecognitionArguments())
    utterances = list(spoken())
    source = LabelledSource(Spoken([wave for wave, _ in utterances]), ["a a a a a"] * len(utterances))
    task.prepare(source)
    config = DinoSRConfig(**task.config_changes())
    assert config.emission_delay == 0
    letter, delimiter = (task.processor.tokenizer.convert_tokens_to_ids(label) for label in ("a", "|"))
    paths = []
    for wave, words in utterances:
        path = np.zeros(config.num_frames(len(wave)), dtype=np.int64)
        for start, end in words:
            first, last = (round((time - 0.0125) / 0.02) + late for time in (start + 0.03, end - 0.16))
            path[first : last + 1] = letter
            path[last + 1] = delimiter
        paths.append(path)
    config.emission_delay = 0.5  # of an earlier calibration: it does not count
    task.calibrate(config, source, [*paths[:-1], None])
    assert config.emission_delay == pytest.approx(late * 0.02, abs=0.021)
    task.calibrate(config, source, [None] * len(paths))
    assert config.emission_delay == pytest.approx(late * 0.02, abs=0.021)
