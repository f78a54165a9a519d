"""Steps of any number of processes, and of the windows of a stream, some of which have nothing that can be used."""

from itertools import islice

import numpy as np
import pytest

from dinosr_hf.data import SpeechSource, SpeechStream, StreamWindow, Utterance
from dinosr_hf.pretraining import ArgumentError
from dinosr_hf.pretraining.feed import StepFeed
from pretraining_runs import tiny_arguments

SHORT, LONG = 19_200, 56_000  # three and one in a step of four seconds


class Noise(SpeechSource):
    """Recordings of these lengths."""

    def __init__(self, *num_samples):
        self.utterances = [Utterance(str(number), length) for number, length in enumerate(num_samples)]
        self.skipped = {}

    def load(self, index, start=0, num_samples=None):
        return np.random.default_rng(index).normal(size=num_samples).astype(np.float32)


class Windows(SpeechStream):
    """A stream of windows with recordings of these lengths."""

    def __init__(self, *windows):
        self.lengths = windows

    def windows(self, epoch, first=0, state=None):
        for number, lengths in enumerate(self.lengths):
            if number >= first:
                yield StreamWindow(Noise(*lengths), number, {})


@pytest.mark.filterwarnings("ignore:All .* utterances together")
@pytest.mark.parametrize("speed_change", [0.0, 0.1], ids=["as recorded", "perturbed"])
def test_windows_that_may_be_too_short_at_the_highest_speed_are_skipped(tmp_path, recordings, caplog, speed_change):
    arguments = tiny_arguments(tmp_path, recordings, min_seconds=1.0, speed_change=speed_change)
    windows = Windows([16_800] * 2, [24_000] * 2)
    steps = iter(StepFeed(windows, arguments.data, arguments.model_config(), seed=0))
    lengths = [next(steps).micro_batches[0].inputs["input_values"].shape[1] for _ in range(2)]
    message = (
        "Skipping window 0 of epoch 0: its longest utterance has 0.95 s at the highest speed, less than min_seconds=1."
    )
    assert (message in caplog.text) == (speed_change > 0)
    if speed_change:  # the second window of this epoch, and of the next one
        assert all(24_000 * 0.9 < length < 24_000 * 1.11 for length in lengths)
    else:
        assert lengths == [16_800, 24_000]


@pytest.fixture
def feeds_of(tmp_path, recordings):
    """Make the feeds of so many processes, from a state on."""
    arguments = tiny_arguments(
        tmp_path, recordings, step_seconds=4.0, micro_seconds=4.0, max_seconds=4.0, num_buckets=1
    )

    def make(source, world_size, state=None):
        options = {"seed": 0, "world_size": world_size}
        config = arguments.model_config()
        feeds = [StepFeed(source, arguments.data, config, rank=rank, **options) for rank in range(world_size)]
        for feed in feeds if state else ():
            feed.load_state_dict(state)
        return feeds

    return make


def take(feeds, count):
    """Take steps of all processes together; return the epoch of each, and the first samples of its waveforms."""
    taken = []
    for steps in islice(zip(*feeds, strict=True), count):
        for feed in feeds:
            feed.advance()
        batches = [batch.inputs["input_values"] for step in steps for batch in step.micro_batches]
        taken.append((steps[0].epoch, {row[0].item() for batch in batches for row in batch}))
    return taken


def test_a_position_is_the_same_for_any_number_of_processes(feeds_of):
    source = Noise(*[SHORT, LONG] * 7)
    whole = take(feeds_of(source, 1), 20)
    of_two = [(epoch, waveforms) for epoch, waveforms in whole if len(waveforms) > 1]
    num_steps = sum(epoch == 0 for epoch, _ in whole)
    assert num_steps == 10 and {epoch for epoch, _ in of_two} == {0, 1}
    for position in range(num_steps + 1):
        take(feeds := feeds_of(source, 1), position)
        expected = [step for step in of_two if step in whole[position:]]
        assert take(feeds_of(source, 2, feeds[0].state_dict()), 2) == expected[:2]
    for position in range(1, 4):
        take(feeds := feeds_of(source, 2), position)
        after = whole.index(of_two[position - 1]) + 1
        assert take(feeds_of(source, 1, feeds[1].state_dict()), 2) == whole[after : after + 2]


def test_a_window_with_too_few_utterances_for_the_processes_is_skipped(feeds_of, caplog):
    stream = Windows([SHORT] * 6, [LONG] * 3, [SHORT] * 6)
    whole = take(feeds_of(stream, 1), 7)
    assert take(feeds_of(stream, 2), 4) == whole[:2] + whole[5:]
    assert "Skipping window 1 of epoch 0: No step has an utterance for each of 2 processes" in caplog.text
    take(feeds := feeds_of(stream, 1), 4)  # in the middle of the window that is skipped
    assert take(feeds_of(stream, 2, feeds[0].state_dict()), 2) == whole[5:]
    with pytest.raises(ArgumentError, match=r"No step has .* step_seconds=4 is too small\. Raise it, lower max_sec"):
        take(feeds_of(Windows([LONG] * 3, [LONG] * 2, [4_000] * 5), 2), 1)
