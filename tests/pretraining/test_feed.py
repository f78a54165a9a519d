"""Steps from the windows of a stream, some of which have nothing that is long enough."""

import numpy as np
import pytest

from dinosr_hf.data import SpeechSource, SpeechStream, StreamWindow, Utterance
from dinosr_hf.pretraining.feed import StepFeed
from pretraining_runs import tiny_arguments


class Noise(SpeechSource):
    """Two recordings of the same length."""

    def __init__(self, num_samples):
        self.utterances, self.skipped = [Utterance("a", num_samples), Utterance("b", num_samples)], {}

    def load(self, index, start=0, num_samples=None):
        return np.random.default_rng(index).normal(size=num_samples).astype(np.float32)


class Windows(SpeechStream):
    """A stream of short, then of longer recordings."""

    def __init__(self):
        pass

    def windows(self, epoch, first=0, state=None):
        for number, num_samples in enumerate([16_800, 24_000]):
            yield StreamWindow(Noise(num_samples), number, {})


@pytest.mark.filterwarnings("ignore:All .* utterances together")
@pytest.mark.parametrize("speed_change", [0.0, 0.1], ids=["as recorded", "perturbed"])
def test_windows_that_may_be_too_short_at_the_highest_speed_are_skipped(tmp_path, recordings, caplog, speed_change):
    arguments = tiny_arguments(tmp_path, recordings, min_seconds=1.0, speed_change=speed_change)
    steps = iter(StepFeed(Windows(), arguments.data, arguments.model_config(), seed=0))
    lengths = [next(steps).micro_batches[0].inputs["input_values"].shape[1] for _ in range(2)]
    message = (
        "Skipping window 0 of epoch 0: its longest utterance has 0.95 s at the highest speed, less than min_seconds=1."
    )
    assert (message in caplog.text) == (speed_change > 0)
    if speed_change:  # the second window of this epoch, and of the next one
        assert all(24_000 * 0.9 < length < 24_000 * 1.11 for length in lengths)
    else:
        assert lengths == [16_800, 24_000]
