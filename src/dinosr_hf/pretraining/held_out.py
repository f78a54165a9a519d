"""
Evaluation on held-out speech during training: the loss with fixed masks, and how well the codes tell phones apart.

`N` codebooks, `V` codewords, `P` phones, `T` frames.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from ..analysis import UnitQuality, contingency, frame_labels, match_labels
from ..analysis.model_units import LabelledSpeech, frame_units
from ..data import SAMPLING_RATE, Crop, PretrainingCollator, SpeechSource, StepDataset, min_maskable_samples
from ..data.collator import utterance_hash
from ..data.packing import pack
from ..model.configuration_dinosr import DinoSRConfig
from ..model.modeling_dinosr import DinoSRForPreTraining
from ..utils.command_line import argument_errors
from ..utils.digests import value_digest
from .metrics import MetricSums

logger = logging.getLogger(__name__)

MAX_UNREAD = 0.5  # share of the utterances


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients; afterwards every module has the mode it had."""
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
    Held-out speech to evaluate a model on repeatedly in the same way.

    The utterances, their parts and their masks depend on the seed and the utterance ids alone: two evaluations differ
    by the model, not by chance, the number of processes or the batch size.

    Args:
        source: The speech. No audio is kept: it is read anew each time.
        config: Configuration of the model.
        batch_seconds: Seconds of audio, padding included, in a forward pass of a process; a single utterance may be
            longer.
        limit_seconds: Maximum seconds of audio used; of more, a random choice of utterances.
        max_seconds: Maximum seconds of an utterance; longer ones are cut at their end.
        labels: Phone labels by utterance id, or by file name without suffix, as `analysis.frame_labels` reads them;
            utterances without labels count for the losses only. None: no phone purity.
        step_seconds: Seconds between labels, if they are one a step; they must be of whole recordings.
        seed: Seed of choice and masks. Keep the default to compare runs of different seeds.

    Attributes:
        digest: Tells which utterances, parts of them and masks are used; only losses with the same digest compare.

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
        labels: Mapping[str, Any] | None = None,
        step_seconds: float = 0.01,
        seed: int = 0,
    ) -> None:
        self._config, self._utterances = config, source.utterances
        self._others = source.ids + source.others
        parts = self._choose(seed, int(limit_seconds * SAMPLING_RATE), int(max_seconds * SAMPLING_RATE))
        parts.sort(key=lambda part: (-part.num_samples, part.index))
        used = sorted((*source.utterances[part.index], part.num_samples) for part in parts)
        self.digest = value_digest([used, seed, config.mask_prob, config.mask_length, config.mask_min_spans])
        self._batches = list(pack(parts, lambda part: part.num_samples, int(batch_seconds * SAMPLING_RATE)))
        collator = PretrainingCollator(config, seed=seed)
        self._dataset = StepDataset(source, self._batches, collator, 0, 1, parts[0].num_samples)
        self._labels = {} if labels is None else self._frame_labels(parts, labels, step_seconds)
        self._phones = sorted({label for phones in self._labels.values() for label in phones})
        minutes = sum(part.num_samples for part in parts) / SAMPLING_RATE / 60
        labelled = f"{len(self._labels)} with labels of {len(self._phones)} phones" if self._labels else "no labels"
        logger.info(f"Held out: {len(parts)} of {len(source)} utterances, {minutes:.1f} minutes; {labelled}.")

    @property
    def num_utterances(self) -> int:
        """Number of utterances used."""
        return sum(map(len, self._batches))

    def _choose(self, seed: int, limit: int, longest: int) -> list[Crop]:
        """Choose the utterances to use, each from its beginning."""
        shortest, utterances = min_maskable_samples(self._config), self._utterances
        eligible = [index for index, utterance in enumerate(utterances) if utterance.num_samples >= shortest]
        if not eligible:
            most = max(utterance.num_samples for utterance in utterances) / SAMPLING_RATE
            raise ValueError(
                f"None of {len(utterances):,} held-out recordings is at least {shortest / SAMPLING_RATE:.3g} s long,"
                f" which mask_length={self._config.mask_length} needs; the longest has {most:.3g} s. Give longer ones,"
                " or lower mask_length."
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
        self, parts: Sequence[Crop], labels: Mapping[str, Any], step_seconds: float
    ) -> dict[str, list[str]]:
        """Return the phone of each frame, (T,), of each utterance that has labels."""
        config = self._config
        stride, field = config.inputs_to_logits_ratio, config.receptive_field
        used = [self._utterances[part.index].id for part in parts]
        names = match_labels(used, labels, others=self._others)
        phones: dict[str, list[str]] = {}
        for part in parts:
            utterance_id, num_samples = self._utterances[part.index]
            if utterance_id not in names:
                continue
            own, num_frames = labels[names[utterance_id]], config.num_frames(num_samples)
            with argument_errors(f"The labels of the held-out utterance {utterance_id!r}: "):
                whole = frame_labels(own, num_frames, step_seconds=step_seconds, stride=stride, field=field)
            phones[utterance_id] = whole[: config.num_frames(part.num_samples)]
        return phones

    def labelled_speech(self) -> Iterator[LabelledSpeech]:
        """Read the used part of each utterance with labels, always in the same order; unreadable ones are skipped."""
        for part in itertools.chain(*self._batches):
            phones = self._labels.get(self._utterances[part.index].id)
            if phones is not None:
                inputs, skipped = self._dataset.read([part])
                if not skipped:
                    yield LabelledSpeech(inputs["input_values"][0].numpy(), phones)

    def _read(self, batch: Sequence[Crop]) -> tuple[list[Crop], dict[str, torch.Tensor]]:
        """Read a batch; return the parts that can be read, and inputs with a row for each. Warn of the others."""
        inputs, skipped = self._dataset.read(batch)
        for utterance_id, message, _ in skipped:
            logger.warning("Skipped held-out utterance %s: %s", utterance_id, message)
        unread = {entry.utterance_id for entry in skipped}
        return [part for part in batch if self._utterances[part.index].id not in unread], inputs

    def _count_phones(
        self, model: DinoSRForPreTraining, part: Crop, waveform: torch.Tensor, tables: NDArray[np.int64]
    ) -> None:
        """Add to the tables (N, P, V) how often each phone of a part occurs with each code; nothing without labels."""
        if (phones := self._labels.get(self._utterances[part.index].id)) is not None:
            codes = _units(model, waveform[: part.num_samples].numpy())
            for table, row in zip(tables, codes, strict=True):
                table += contingency(phones, row, num_codes=tables.shape[-1], phones=self._phones)[0]

    def _measure(
        self, model: DinoSRForPreTraining, batches: Sequence[Sequence[Crop]], sums: MetricSums
    ) -> tuple[NDArray[np.int64], int]:
        """
        Add what the model makes of these batches to the sums.

        Returns tables of how often each phone occurs with each code, int64 (N, P, V), with one more for an anchor, and
        the number of unreadable utterances.
        """
        config, num_skipped = self._config, 0
        num_tables = config.num_codebooks + (config.num_anchor_labels > 0)
        num_codes = max(config.codebook_size, config.num_anchor_labels)
        tables = np.zeros((num_tables, len(self._phones), num_codes), dtype=np.int64)
        for batch in batches:
            parts, inputs = self._read(batch)
            num_skipped += len(batch) - len(parts)
            if not parts:
                continue
            # Not `model(...)`, which a compiled model would compile anew for each new shape.
            output = model.forward(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
            num_samples = sum(part.num_samples for part in parts)
            sums.add(output, num_samples, inputs["input_values"].numel() - num_samples)
            for part, waveform in zip(parts, inputs["input_values"], strict=True):
                self._count_phones(model, part, waveform, tables)
        return tables, num_skipped

    def evaluate(
        self, model: DinoSRForPreTraining, accelerator: Accelerator | None = None
    ) -> dict[str, float | list[float]]:
        """
        Evaluate a model. All processes must call this together; their sums are reduced once.

        The model does not change, its modes included, and no random number is drawn.

        Args:
            model: The model without wrappers, on its device.
            accelerator: For processes and precision; None: one process, float32.

        Returns:
            The figures of `MetricSums.compute` that describe the model: losses, perplexities, active codewords,
            variations; `seconds` of audio, and `skipped_files`, the number of unreadable utterances. With labels, for
            the teacher's codes of all frames, `pnmis` and `phone_purities` of each codebook, lowest layer first, and
            of the codebook with the highest PNMI `pnmi`, `phone_purity` and `best_layer`, counted from 1; with an
            anchor also `anchor_pnmi`, of the most probable labels by its head.

        Raises:
            ValueError: If more than half of the utterances could not be read.
        """
        rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        reduce = partial(accelerator.reduce, reduction="sum") if accelerator else torch.Tensor.clone
        sums = MetricSums(self._config, model.device)
        with _evaluating(model), accelerator.autocast() if accelerator else nullcontext():
            tables, num_skipped = self._measure(model, self._batches[rank::world_size], sums)
        figures = sums.compute(reduce)
        own = torch.cat([torch.from_numpy(tables).flatten(), torch.tensor([num_skipped])])
        counts = reduce(own.to(model.device)).cpu()
        figures["skipped_files"] = num_skipped = int(counts[-1])
        if num_skipped > MAX_UNREAD * self.num_utterances:  # its loss would not compare with others
            raise ValueError(f"{num_skipped:,} of {self.num_utterances:,} held-out utterances could not be read.")
        del figures["masked_frames"], figures["padded_share"]
        return figures | _phone_figures(counts[:-1].view(tables.shape), self._config)


def _units(model: DinoSRForPreTraining, waveform: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the teacher's codes of an utterance (S,), int64 (N, T); with an anchor also its labels (1, T)."""
    units = frame_units(model, waveform)
    if model.config.num_anchor_labels:
        units = torch.cat([units, frame_units(model, waveform, "anchor")])
    return units.cpu().numpy()


def _phone_figures(tables: torch.Tensor, config: DinoSRConfig) -> dict[str, float | list[float]]:
    """
    Return the quality of codes from the table (P, V) of each codebook, and of the anchor's head if there is one more.

    Nothing if no frame has a label.
    """
    if not tables.sum():
        return {}
    measured = [UnitQuality.from_table(table.numpy()) for table in tables]
    qualities, anchor = measured[: config.num_codebooks], measured[config.num_codebooks :]
    pnmis, purities = [quality.pnmi for quality in qualities], [quality.phone_purity for quality in qualities]
    best = pnmis.index(max(pnmis))
    figures: dict[str, float | list[float]] = {"pnmi": pnmis[best], "phone_purity": purities[best]}
    if anchor:
        figures["anchor_pnmi"] = anchor[0].pnmi
    return figures | {"best_layer": config.codebook_layers[best], "pnmis": pnmis, "phone_purities": purities}
