"""
Held-out speech during training: its loss with fixed masks, and how well the codes tell phones apart.

`N` codebooks, `V` codewords, `P` phones, `T` frames.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from ..analysis.alignment import Labels, Segment, align_labels, match_labels
from ..analysis.model_units import LabelledSpeech, frame_units
from ..analysis.quality import UnitQuality, contingency
from ..data import (
    SAMPLING_RATE,
    Crop,
    PretrainingCollator,
    SpeechSource,
    StepDataset,
    min_maskable_samples,
)
from ..data.collator import utterance_hash
from ..model.configuration_dinosr import DinoSRConfig
from ..model.modeling_dinosr import DinoSRForPreTraining
from .metrics import MetricSums

logger = logging.getLogger(__name__)

Reduce = Callable[[torch.Tensor], torch.Tensor]


def row_labels(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Segment]]:
    """
    Take the phone labels out of rows that have their own, as those of `SyntheticCorpus.to_dataset` do.

    Args:
        rows: With `id` and `phones`, a list of `{"label", "start", "end"}` in seconds. Of a dataset, select these two
            columns first: `dataset.select_columns(["id", "phones"])` decodes no audio.

    Returns:
        For each id its segments, ready for `HeldOut`.
    """
    return {
        str(row["id"]): [Segment(phone["label"], phone["start"], phone["end"]) for phone in row["phones"]]
        for row in rows
    }


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; then every module is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class HeldOut:
    """
    Held-out speech to judge a model on, again and again in the same way.

    Which utterances, from where to where, and which of their frames are masked is decided by the seed and their ids
    alone. So two evaluations differ by the model, and not by chance, the number of processes or the size of a batch.

    Args:
        source: The speech. No audio is kept: it is read anew each time.
        config: Of the model.
        batch_seconds: Audio of a forward pass of a process, padding included; an utterance alone may be longer.
        limit_seconds: Audio that is used, at most; of more, a random choice of utterances.
        max_seconds: Longer utterances are cut to their first so many seconds.
        labels: Phone labels by utterance id, or by file name without suffix, as `analysis.read_labels` or `row_labels`
            give them; utterances without labels count for the losses alone. None: no phone purity.
        step_seconds: Length of a step, for labels that are one a step; they must be of whole recordings.
        seed: Of the choice and the masks. Leave it, to compare runs of different seeds.

    Attributes:
        seconds_taken: How long the last evaluation took, by the clock.

    Raises:
        ValueError: If no utterance is long enough to be masked, none has labels, or labels do not fit their audio.
    """

    def __init__(
        self,
        source: SpeechSource,
        config: DinoSRConfig,
        *,
        batch_seconds: float,
        limit_seconds: float,
        max_seconds: float,
        labels: Mapping[str, Labels] | None = None,
        step_seconds: float = 0.01,
        seed: int = 0,
    ) -> None:
        self._config = config
        self._source = source
        self.seconds_taken = 0.0
        parts = self._choose(seed, int(limit_seconds * SAMPLING_RATE), int(max_seconds * SAMPLING_RATE))
        self._batches = _fill_batches(parts, int(batch_seconds * SAMPLING_RATE))
        longest = max(part.num_samples for part in parts)
        self._dataset = StepDataset(source, self._batches, PretrainingCollator(config, seed=seed), 0, 1, longest)
        self._labels: dict[str, list[str]] = {}
        if labels is not None:
            self._labels = self._frame_labels(parts, labels, step_seconds)
        self._phones = sorted({label for phones in self._labels.values() for label in phones})
        logger.info(
            "Held out: %d of %d utterances, %.1f minutes; %s.",
            len(parts),
            len(source),
            sum(part.num_samples for part in parts) / SAMPLING_RATE / 60,
            f"{len(self._labels)} with labels of {len(self._phones)} phones" if labels is not None else "no labels",
        )

    @property
    def num_utterances(self) -> int:
        """How many utterances are used."""
        return sum(map(len, self._batches))

    def _choose(self, seed: int, limit: int, longest: int) -> list[Crop]:
        """The utterances to use, from their beginnings."""
        shortest = min_maskable_samples(self._config)
        utterances = self._source.utterances
        eligible = [index for index, utterance in enumerate(utterances) if utterance.num_samples >= shortest]
        if not eligible:
            raise ValueError(
                f"None of {len(utterances):,} held-out utterances can be masked: each needs {shortest:,} samples"
                f" ({shortest / SAMPLING_RATE:.2f} s). Give longer ones, or lower mask_length."
            )
        eligible.sort(key=lambda index: utterance_hash(seed, 0, utterances[index].id, "held out"))
        parts: list[Crop] = []
        for index in eligible:
            length = min(utterances[index].num_samples, max(longest, shortest))
            if not parts or length <= limit:
                parts.append(Crop(index, 0, length))
                limit -= length
        return parts

    def _frame_labels(
        self, parts: Sequence[Crop], labels: Mapping[str, Labels], step_seconds: float
    ) -> dict[str, list[str]]:
        """The phone of each frame, (T,), of each utterance that has labels."""
        utterances, config = self._source.utterances, self._config
        names = match_labels([utterances[part.index].id for part in parts], labels)
        phones: dict[str, list[str]] = {}
        for part in parts:
            utterance_id, num_samples = utterances[part.index]
            if utterance_id not in names:
                continue
            try:
                whole = align_labels(
                    labels[names[utterance_id]],
                    config.num_frames(num_samples),
                    step_seconds=step_seconds,
                    stride=config.inputs_to_logits_ratio,
                    field=config.receptive_field,
                )
            except ValueError as error:
                raise ValueError(f"The labels of the held-out utterance {utterance_id!r}: {error}") from error
            phones[utterance_id] = whole[: config.num_frames(part.num_samples)]
        return phones

    def labelled_speech(self) -> Iterator[LabelledSpeech]:
        """
        Read what is judged, to judge it in another way.

        Yields:
            Each utterance that has labels, as far as it is used, in the same order each time. Those that cannot be
            read are left out.
        """
        for part in (part for batch in self._batches for part in batch):
            phones = self._labels.get(self._source.utterances[part.index].id)
            if phones is None:
                continue
            inputs, skipped = self._dataset.read([part])
            if not skipped:
                yield LabelledSpeech(inputs["input_values"][0].numpy(), phones)

    def evaluate(
        self, model: DinoSRForPreTraining, accelerator: Accelerator | None = None
    ) -> dict[str, float | list[float]]:
        """
        Judge a model. All processes must call this together; what each adds up is reduced once.

        Nothing of the model changes, its modes included, and no random number is drawn.

        Args:
            model: Without wrappers, on its device.
            accelerator: Of the run, for its processes and precision; None: one process, float32.

        Returns:
            Of `MetricSums.compute`, all that is about the model: losses, perplexities, codewords in use, variations;
            `seconds` of audio, `skipped_files`: utterances that could not be read. With labels, of the teacher's codes
            of all frames, `pnmis` and `phone_purities` of each codebook, lowest layer first, and of the one with the
            highest PNMI `pnmi`, `phone_purity` and `best_layer`, counted from 1.

        Raises:
            ValueError: If no utterance at all could be read.
        """
        started = time.perf_counter()
        rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        reduce: Reduce = partial(accelerator.reduce, reduction="sum") if accelerator else torch.Tensor.clone
        config, device = self._config, model.device
        sums = MetricSums(config.num_codebooks, config.codebook_size, device)
        tables = torch.zeros(config.num_codebooks, len(self._phones), config.codebook_size, dtype=torch.int64)
        num_skipped = 0
        with _evaluating(model), accelerator.autocast() if accelerator else nullcontext():
            for batch in self._batches[rank::world_size]:
                inputs, skipped = self._dataset.read(batch)
                for utterance_id, message in skipped:
                    logger.warning("Held-out utterance %s is left out: %s", utterance_id, message)
                num_skipped += len(skipped)
                if len(skipped) == len(batch):
                    continue
                unread = {utterance_id for utterance_id, _ in skipped}
                kept = [part for part in batch if self._source.utterances[part.index].id not in unread]
                num_samples = sum(part.num_samples for part in kept)
                # Not `model(...)`: of a compiled model that is the graph of training, made anew for each new shape.
                output = model.forward(**{name: tensor.to(device) for name, tensor in inputs.items()})
                sums.add(output, num_samples, inputs["input_values"].numel() - num_samples)
                tables += self._count(model, kept, inputs["input_values"])
        figures = sums.compute(reduce)
        counts = reduce(torch.cat([tables.flatten(), torch.tensor([num_skipped])]).to(device)).cpu()
        self.seconds_taken = time.perf_counter() - started
        if not figures["masked_frames"]:
            raise ValueError(f"None of {sum(map(len, self._batches)):,} held-out utterances could be read.")
        del figures["masked_frames"], figures["padded_share"]
        figures["skipped_files"] = int(counts[-1])
        return figures | _phone_figures(counts[:-1].view_as(tables), config)

    def _count(self, model: DinoSRForPreTraining, parts: Sequence[Crop], input_values: torch.Tensor) -> torch.Tensor:
        """How often each phone meets each codeword in a batch: int64 (N, P, V)."""
        config = self._config
        tables = torch.zeros(config.num_codebooks, len(self._phones), config.codebook_size, dtype=torch.int64)
        for part, waveform in zip(parts, input_values, strict=True):
            phones = self._labels.get(self._source.utterances[part.index].id)
            if phones is None:
                continue
            units = frame_units(model, waveform[: part.num_samples].numpy()).cpu().numpy()  # (N, T)
            for table, codes in zip(tables, units, strict=True):
                counted, _ = contingency(phones, codes, num_codes=config.codebook_size, phones=self._phones)
                table += torch.from_numpy(counted)
        return tables


def _fill_batches(parts: Sequence[Crop], batch_samples: int) -> list[list[Crop]]:
    """Parts of similar length together, longest first, so many that they fit with their padding."""
    batches: list[list[Crop]] = []
    for part in sorted(parts, key=lambda part: (-part.num_samples, part.index)):
        if batches and (len(batches[-1]) + 1) * batches[-1][0].num_samples <= batch_samples:
            batches[-1].append(part)
        else:
            batches.append([part])
    return batches


def _phone_figures(tables: torch.Tensor, config: DinoSRConfig) -> dict[str, float | list[float]]:
    """Quality of each codebook's codes, from its table (P, V); nothing where no frame has a label."""
    if not tables.sum():
        return {}
    qualities = [UnitQuality.from_table(table.numpy()) for table in tables]
    best = max(range(len(qualities)), key=lambda number: qualities[number].pnmi)
    return {
        "pnmi": qualities[best].pnmi,
        "phone_purity": qualities[best].phone_purity,
        "best_layer": config.num_hidden_layers - config.num_codebooks + 1 + best,
        "pnmis": [quality.pnmi for quality in qualities],
        "phone_purities": [quality.phone_purity for quality in qualities],
    }
