"""
ABX: is a phone nearer to the same phone than to another one, between the same neighbours?

Items are triphones cut from alignments, in ZeroSpeech's `.item` files; the error is computed by fastabx
(https://docs.cognitive-ml.fr/fastabx), an extra for Python 3.12 and newer. `T` frames, `D` dimensions.

References: Schatz et al., "Evaluating speech features with the minimal-pair ABX task", Interspeech 2013; ZeroSpeech
2021 (arXiv 2011.11588), section 3.1.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..data import SAMPLING_RATE, SpeechSource
from ..data.output_names import output_path
from ..model.configuration_dinosr import DinoSRConfig
from ..utils.command_line import check_choice
from ..utils.extras import import_extra
from ..utils.tables import csv_table
from .alignment import SILENCE, label_segments
from .unit_evaluation import Reference

logger = logging.getLogger(__name__)

SPEAKERS = ("within", "across")
DISTANCES = ("angular", "cosine", "euclidean", "identical")
COLUMNS = ("#file", "onset", "offset", "#phone", "prev-phone", "next-phone", "speaker")


class NothingToCompareError(ValueError):
    """There are no two triphones that an ABX error can compare."""


class Triphone(NamedTuple):
    """A phone between two others."""

    file: str  # path of its features below their folder, without suffix
    onset: str  # start of the previous phone in seconds, with four digits
    offset: str  # end of the following phone
    phone: str
    previous: str
    following: str
    speaker: str


def frame_rate(config: DinoSRConfig) -> Decimal:
    """Return the frames per second, 50 for the base model; `ValueError` if that is not exact as a decimal number."""
    ratio = config.inputs_to_logits_ratio
    if 10**20 * SAMPLING_RATE % ratio:
        raise ValueError(
            f"conv_stride multiplies to {ratio} samples per frame, and 16,000 samples a second divided by that is not"
            " a finite decimal number, which ABX items need. Use a model with another conv_stride."
        )
    return Decimal(SAMPLING_RATE) / ratio


def _frames_of_item(onset: str, offset: str, rate: Decimal) -> tuple[int, int]:
    """First frame, and the one behind the last, with centres (i + 1/2) / rate within the item, as fastabx cuts."""
    half = Decimal("0.5")
    first = (Decimal(onset) * rate - half).to_integral_value("ROUND_CEILING")
    last = (Decimal(offset) * rate - half).to_integral_value("ROUND_FLOOR")
    return int(first), int(last) + 1


def triphone_items(
    recordings: SpeechSource, reference: Reference, config: DinoSRConfig, *, silence: Sequence[str] = (SILENCE,)
) -> list[Triphone]:
    """
    Cut all triphones of recordings, as ZeroSpeech does: from the start of a phone to the end of the second after it.

    Consecutive equal labels are one phone. Triphones with a label of `silence` are left out, and so are those that
    contain no frame of the model that `config` describes, or end behind the last. Raises `ValueError` if none is left,
    or as `frame_rate`.
    """
    rate, items = frame_rate(config), []
    for name, num_samples in recordings.utterances:
        if name not in reference.labels:
            continue
        file = output_path("", name, "npy").with_suffix("").as_posix()
        num_frames = int(config.num_frames(num_samples))
        segments = label_segments(reference.labels[name], step_seconds=reference.step_seconds)
        for first, middle, last in zip(segments, segments[1:], segments[2:], strict=False):
            labels = (middle.label, first.label, last.label)
            onset, offset = f"{first.start:.4f}", f"{last.end:.4f}"
            begin, end = _frames_of_item(onset, offset, rate)
            if 0 <= begin < end <= num_frames and not set(silence) & set(labels):
                items.append(Triphone(file, onset, offset, *labels, reference.speakers[name]))
    if not items:
        raise ValueError(
            f"There is no triphone in {len(reference.labels):,} recordings with labels: none has three phones in a row"
            f" without {', '.join(silence)} between them."
        )
    return items


def items_text(items: Iterable[Triphone]) -> str:
    """Format a `.item` file: column names and items, separated by spaces, quoted where needed."""
    return csv_table(COLUMNS, items, delimiter=" ")


def write_unit_files(
    units: Iterable[tuple[str, NDArray[np.integer]]], folder: str | Path, layers: Sequence[int]
) -> None:
    """
    Write ids and codes (L, T) of recordings as `units.FeatureFiles` does: `layer-5/id.npy`, int64 (T, 1).

    Raises `ValueError` if two recordings have the same file.
    """
    owners: dict[Path, str] = {}
    for name, codes in units:
        if (other := owners.setdefault(output_path("", name, "npy"), name)) != name:
            raise ValueError(f"{other} and {name} would be written to the same file. Rename one of them.")
        for layer, row in zip(layers, codes, strict=True):
            file = output_path(Path(folder, f"layer-{layer}"), name, "npy")
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, np.asarray(row, dtype=np.int64)[:, None])


def cosine_distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return 1 minus the cosine between the frames of sequences (A, S, D) and (B, T, D): (A, B, S, T)."""
    a, b = (torch.nn.functional.normalize(frames, dim=-1) for frames in (first, second))
    return 1 - torch.einsum("asd,btd->abst", a, b)


def _load_features(path: str | Path) -> torch.Tensor:
    return torch.from_numpy(np.load(path))


def import_fastabx() -> Any:
    """Import fastabx; if it is not installed, `ImportError` says how to install it."""
    return import_extra("fastabx", "abx", "ABX (with Python 3.12 or newer)")


def abx_error(
    items: Sequence[Triphone],
    features: str | Path,
    rate: Decimal,
    *,
    speaker: str = "within",
    distance: str = "angular",
    max_size_group: int | None = 10,
    max_x_across: int | None = 5,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> float:
    """
    Return how often X, the same phone as A, is nearer to B, another phone between the same neighbours: 0 to 1.

    0.5 is chance; lower is better. This is ZeroSpeech's error: sequences are compared by dynamic time warping (the sum
    of the distances along the best path, divided by its length), and errors are averaged over contexts, then over
    speakers, then over pairs of phones.

    Args:
        items: Items from `triphone_items`; those of recordings without features are left out.
        features: Folder of `.npy` files (T, D) of a layer, as `units.FeatureFiles` writes them, or (T, 1) of units.
        rate: Frames per second, `frame_rate(config)`. Frame i is taken to be at (i + 1/2) / rate; those of DinoSR are
            2.5 ms later, and with log-mel frames 7.5 ms.
        speaker: "within": A, B and X of one speaker. "across": A and B of one, X of another.
        distance: "angular" (the angle over pi, which fastabx calls cosine too), "cosine" (1 - cos) or "euclidean" for
            features; "identical" for units: 0 if they are the same and 1 if not, equivalent to an angular distance of
            one-hot vectors.
        max_size_group: Largest number of items per context, phone and speaker, drawn at random; None: all.
        max_x_across: Largest number of speakers of X; None: all. Both defaults are ZeroSpeech's.
        device: Where distances are computed.

    Raises `ValueError` for an unknown `speaker` or `distance`, or if there is nothing to compare (then it is a
    `NothingToCompareError`).
    """
    check_choice("speaker", speaker, SPEAKERS)
    check_choice("distance", distance, DISTANCES)
    found = [item for item in items if Path(features, f"{item.file}.npy").is_file()]
    if not found:
        raise ValueError(f"{features} has no .npy file of any of {len(items):,} items. Is it the folder of a layer?")
    fastabx = import_fastabx()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "triphones.item")
        file.write_text(items_text(found), encoding="utf-8")
        try:
            error = fastabx.zerospeech_abx(
                file,
                root=features,
                speaker=speaker,
                distance=cosine_distance if distance == "cosine" else distance,
                frequency=str(rate),
                feature_maker=_load_features,
                extension=".npy",
                device=device,
                seed=seed,
                max_size_group=max_size_group,
                max_x_across=max_x_across,
                progress=False,
            )
        except fastabx.EmptyTaskError as empty:
            raise NothingToCompareError(
                f"No two of {len(found):,} triphones can be compared {speaker} speakers: some context must be around"
                " two different phones, one of them twice" + (", by two speakers." if speaker == "across" else ".")
            ) from empty
    return float(error)


def abx_errors(items: Sequence[Triphone], features: str | Path, rate: Decimal, **options: Any) -> dict[str, float]:
    """Return `abx_error`, with its arguments, within and across speakers; nan, and a warning, if nothing compares."""
    errors = {}
    for speaker in SPEAKERS:
        try:
            errors[speaker] = abx_error(items, features, rate, speaker=speaker, **options)
        except NothingToCompareError as error:
            logger.warning("ABX %s speakers is nan: %s", speaker, error)
            errors[speaker] = math.nan
    return errors
