"""
The optimizer steps of a run, epoch after epoch, and the place in them that a checkpoint remembers.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..data import (
    SAMPLING_RATE,
    Crop,
    MicroBatch,
    MixedSource,
    PlanSummary,
    PretrainingCollator,
    SpeechSource,
    SpeechStream,
    StepDataset,
    StepLoader,
    StreamChangedError,
    plan_epoch,
    summarize_plan,
)
from ..model.configuration_dinosr import DinoSRConfig
from .pretraining_arguments import DataArguments

logger = logging.getLogger(__name__)


class Step(NamedTuple):
    """This process's share of an optimizer step: the epoch it belongs to, and its micro-batches."""

    epoch: int
    micro_batches: list[MicroBatch]


def fingerprint(source: SpeechSource | SpeechStream) -> str:
    """Names the utterances and lengths of a source, by which a resumed run knows its data again; "stream" for one."""
    if isinstance(source, SpeechStream):
        return "stream"
    digest = hashlib.sha256()
    for utterance in source.utterances:
        digest.update(f"{utterance.id}\x1f{utterance.num_samples}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


class StepFeed:
    """
    Iterates over optimizer steps without end. Whatever the number of processes and workers, step k is the same one.

    Args:
        source: The recordings, or a stream of them.
        data: How they are cut into steps.
        config: Of the model; says how masks are drawn.
        seed: Of the run.
        rank: Of this process.
        world_size: Number of processes.
        pin_memory: As for `DataLoader`.

    Attributes:
        fingerprint: Names the recordings; see the function of this name.
    """

    def __init__(
        self,
        source: SpeechSource | SpeechStream,
        data: DataArguments,
        config: DinoSRConfig,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self._source = source
        self._data = data
        self._seed = seed
        self._rank, self._world_size, self._pin_memory = rank, world_size, pin_memory
        self._collator = PretrainingCollator(config, seed=seed)
        self.fingerprint = fingerprint(source)
        # The step that comes next, and in a stream what its window is read again from.
        self._epoch, self._window, self._step = 0, 0, 0
        self._stream_state: dict | None = None

    def state_dict(self) -> dict[str, Any]:
        """The place of the next step; values that JSON can hold."""
        return {
            "epoch": self._epoch,
            "window": self._window,
            "step": self._step,
            "stream_state": self._stream_state,
            "fingerprint": self.fingerprint,
            "plan": self._plan_options(),
        }

    def put_back(self) -> None:
        """Make the step that was just taken the next one again, for a checkpoint before it."""
        self._step -= 1

    def take_again(self) -> None:
        """Undo `put_back`."""
        self._step += 1

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on where a `state_dict` was taken.

        If data or budget are not what they were, there is no such place: then the next epoch begins, with a warning.
        """
        self._epoch, self._window, self._step = state["epoch"], state["window"], state["step"]
        self._stream_state = state["stream_state"]
        changed = [] if state["fingerprint"] == self.fingerprint else ["the recordings"]
        options = self._plan_options()
        changed += [name for name, value in options.items() if state["plan"].get(name) != value]
        if changed:
            self._epoch, self._window, self._step, self._stream_state = self._epoch + 1, 0, 0, None
            logger.warning(
                "The place in the data is lost, because %s changed since the checkpoint: epoch %d begins now.",
                ", ".join(changed),
                self._epoch,
            )

    def _plan_options(self) -> dict[str, Any]:
        """What the steps of an epoch depend on, besides the recordings."""
        data = self._data
        names = ["batching", "step_seconds", "min_seconds", "max_seconds", "num_buckets"]
        names += ["data_weights", "data_temperature"] if len(data.data) > 1 else []
        names += ["window_seconds"] if isinstance(self._source, SpeechStream) else []
        return {"seed": self._seed} | {name: getattr(data, name) for name in names}

    def _windows(self) -> Iterator[SpeechSource]:
        """What is planned as a whole, from the place on: all of a source in each epoch, or windows of a stream."""
        while True:
            if isinstance(self._source, SpeechStream):
                yield from self._stream_windows(self._source)
            else:
                yield self._source
            self._epoch, self._window, self._stream_state = self._epoch + 1, 0, None

    def _stream_windows(self, stream: SpeechStream) -> Iterator[SpeechSource]:
        """The windows of an epoch that is begun or gone on with; none if the stream has changed under it."""
        logger.info("Epoch %d of the stream: reading %.2g hours first.", self._epoch, self._data.window_seconds / 3600)
        try:
            windows = stream.windows(self._epoch, self._window, self._stream_state)
            for window in windows:
                self._window, self._stream_state = window.index, window.state
                if self._has_any_long_enough(window.source):
                    yield window.source
        except StreamChangedError as error:
            self._step = 0
            logger.warning("The place in the stream is lost: %s Epoch %d begins now.", error, self._epoch + 1)

    def _has_any_long_enough(self, window: SpeechSource) -> bool:
        """Said, not an error: the next window of a stream may be another matter."""
        longest = max(utterance.num_samples for utterance in window.utterances)
        if longest >= int(self._data.min_seconds * SAMPLING_RATE):
            return True
        logger.warning(
            "Window %d of epoch %d is left out: its longest utterance has %.2f s, less than min_seconds=%g.",
            self._window,
            self._epoch,
            longest / SAMPLING_RATE,
            self._data.min_seconds,
        )
        return False

    def summarize(self) -> PlanSummary | None:
        """What the current epoch comes to, over all processes; None for a stream, which is not known in advance."""
        return None if isinstance(self._source, SpeechStream) else self._plan(self._source)[1]

    def _plan(self, source: SpeechSource) -> tuple[Sequence[Sequence[Crop]], PlanSummary]:
        data = self._data
        num_samples = [utterance.num_samples for utterance in source.utterances]
        min_samples, max_samples = int(data.min_seconds * SAMPLING_RATE), int(data.max_seconds * SAMPLING_RATE)
        members = None
        if isinstance(source, MixedSource):
            members = source.epoch_members(
                self._epoch, seed=self._seed, min_samples=min_samples, max_samples=max_samples
            )
        plan = plan_epoch(
            num_samples,
            seed=self._seed,
            epoch=self._epoch,
            step_samples=int(data.step_seconds * SAMPLING_RATE),
            min_samples=min_samples,
            max_samples=max_samples,
            mode="pad" if data.batching == "pad" else "crop",
            num_buckets=data.num_buckets,
            ids=[utterance.id for utterance in source.utterances],
            members=members,
            window=self._window,
        )
        too_small = sum(len(step) < self._world_size for step in plan)
        if too_small == len(plan):
            raise ValueError(
                f"No step has an utterance for each of {self._world_size} processes: step_seconds="
                f"{data.step_seconds:g} is too little for them. Raise it, lower max_seconds, or use fewer processes."
            )
        if too_small:
            logger.warning(
                "Epoch %d: %d of %d steps are left out, as they have fewer utterances than there are processes (%d)."
                " Raise step_seconds, or lower max_seconds.",
                self._epoch,
                too_small,
                len(plan),
                self._world_size,
            )
            plan = [step for step in plan if len(step) >= self._world_size]
        summary = summarize_plan(
            plan,
            num_samples,
            min_samples=min_samples,
            world_size=self._world_size,
            micro_samples=int(data.micro_seconds * SAMPLING_RATE),
            members=members,
        )
        return plan, summary

    def __iter__(self) -> Iterator[Step]:
        is_first = True
        for source in self._windows():
            plan, summary = self._plan(source)
            if is_first:
                is_first = False
                logger.info("%s: %s", "Window" if isinstance(self._source, SpeechStream) else "Epoch", summary)
            dataset = StepDataset(
                source,
                plan,
                self._collator,
                self._rank,
                self._world_size,
                int(self._data.micro_seconds * SAMPLING_RATE),
            )
            loader = StepLoader(
                dataset, num_workers=self._data.num_workers, pin_memory=self._pin_memory, first_step=self._step
            )
            for micro_batches in loader:
                self._step += 1
                yield Step(self._epoch, micro_batches)
            self._step = 0
