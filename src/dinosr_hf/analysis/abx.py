"""
ABX: is a phone nearer to the same phone than to another one, between the same neighbours?

Items are triphones cut from alignments, in ZeroSpeech's `.item` files; the distances and the error are computed by
fastabx (https://docs.cognitive-ml.fr/fastabx), an extra for Python 3.12 and newer. `T` frames, `D` dimensions.

References: Schatz et al., "Evaluating speech features with the minimal-pair ABX task", Interspeech 2013; ZeroSpeech
2021 (arXiv 2011.11588), section 3.1.
"""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Iterable, Sequence
from decimal import Decimal, Inexact, localcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..data import SAMPLING_RATE, SpeechSource
from ..inference.windowed import output_path
from ..model.configuration_dinosr import DinoSRConfig
from .alignment import SILENCE, label_segments
from .unit_evaluation import Reference

SPEAKERS = ("within", "across")
DISTANCES = ("angular", "cosine", "euclidean", "identical")

COLUMNS = ("#file", "onset", "offset", "#phone", "prev-phone", "next-phone", "speaker")


class Item(NamedTuple):
    """
    A phone between two others.

    Attributes:
        file: Of its features, below their folder, without suffix.
        onset: Seconds, with four digits: begin of the phone before.
        offset: Seconds: end of the phone behind.
        phone: What it is.
        previous: The phone before.
        following: The phone behind.
        speaker: Who says it.
    """

    file: str
    onset: str
    offset: str
    phone: str
    previous: str
    following: str
    speaker: str


def frame_rate(config: DinoSRConfig) -> Decimal:
    """
    Frames a second, exactly: 50 for the base model.

    Raises:
        ValueError: If decimal numbers cannot say it.
    """
    with localcontext() as context:
        context.traps[Inexact] = True
        try:
            return Decimal(SAMPLING_RATE) / Decimal(config.inputs_to_logits_ratio)
        except Inexact:
            raise ValueError(
                f"16,000 samples a second in steps of {config.inputs_to_logits_ratio} are no whole number of frames,"
                " nor a decimal one, which items are cut by. ABX is for models with another conv_stride."
            ) from None


def _frames_of_item(onset: str, offset: str, rate: Decimal) -> tuple[int, int]:
    """First frame and the one behind the last whose centres, at (i + 1/2) / rate, are in the item, as fastabx cuts."""
    half = Decimal("0.5")
    first = (Decimal(onset) * rate - half).to_integral_value("ROUND_CEILING")
    last = (Decimal(offset) * rate - half).to_integral_value("ROUND_FLOOR")
    return int(first), int(last) + 1


def triphone_items(
    recordings: SpeechSource, reference: Reference, config: DinoSRConfig, *, silence: Sequence[str] = (SILENCE,)
) -> list[Item]:
    """
    All triphones of recordings, as ZeroSpeech cuts them: three phones that follow each other, from the begin of the
    first to the end of the third.

    Args:
        recordings: Whose features are judged.
        reference: Their phones and speakers. Runs of a label are one phone.
        config: For the frames: items that end behind the last frame, or hold none, are left out.
        silence: Labels that are no phones: triphones with one of them are left out.

    Returns:
        Items in the order of recordings and time.

    Raises:
        ValueError: If there is none, or frames a second are no decimal number.
    """
    rate, items = frame_rate(config), []
    judged = set(reference.ids)
    for name, num_samples in recordings.utterances:
        if name not in judged:
            continue
        file = output_path("", name, "npy").with_suffix("").as_posix()
        num_frames = int(config.num_frames(num_samples))
        segments = label_segments(reference.labels_of(name), step_seconds=reference.step_seconds)
        for first, middle, last in zip(segments, segments[1:], segments[2:], strict=False):
            if {first.label, middle.label, last.label} & set(silence):
                continue
            onset, offset = f"{first.start:.4f}", f"{last.end:.4f}"
            begin, end = _frames_of_item(onset, offset, rate)
            if 0 <= begin < end <= num_frames:
                labels = (middle.label, first.label, last.label)
                items.append(Item(file, onset, offset, *labels, reference.speaker_of(name)))
    if not items:
        raise ValueError(
            f"There is no triphone in {len(judged):,} recordings with labels: none has three phones in a row without"
            f" {', '.join(silence)} between them."
        )
    return items


def items_text(items: Iterable[Item]) -> str:
    """A `.item` file: a line of column names, a line an item; a space between words, which have quotes if need be."""
    text = io.StringIO()
    table = csv.writer(text, delimiter=" ", lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows(items)
    return text.getvalue()


def write_unit_files(
    units: Iterable[tuple[str, NDArray[np.integer]]], folder: str | Path, layers: Sequence[int]
) -> None:
    """
    Write units as `units.FeatureFiles` writes features: `layer-5/recording.npy`, int64 (T, 1), for `abx_error` with
    the distance "identical".

    Args:
        units: Id and codes (L, T) of each recording, as `UnitExtractor.units` gives them.
        folder: Made if it does not exist.
        layers: The L layers.
    """
    for name, codes in units:
        for layer, row in zip(layers, codes, strict=True):
            file = output_path(Path(folder, f"layer-{layer}"), name, "npy")
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, np.asarray(row, dtype=np.int64)[:, None])


def cosine_distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """
    1 - cos of the angle between frames.

    Args:
        first: (A, S, D), A sequences.
        second: (B, T, D).

    Returns:
        (A, B, S, T).
    """
    a, b = (torch.nn.functional.normalize(frames, dim=-1) for frames in (first, second))
    return 1 - torch.einsum("asd,btd->abst", a, b)


def _read(path: str | Path) -> torch.Tensor:
    return torch.from_numpy(np.load(path))


def import_fastabx() -> Any:
    """
    The library.

    Raises:
        ImportError: If it is not installed; the message has the command that installs it.
    """
    try:
        import fastabx
    except ImportError as error:
        raise ImportError(
            'fastabx is needed here: pip install "dinosr-hf[abx]", with Python 3.12 or newer, where there is one.'
        ) from error
    return fastabx


def abx_error(
    items: Sequence[Item],
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
    How often X, the same phone as A, is nearer to B, another phone between the same neighbours: ZeroSpeech's error.

    Sequences are compared by dynamic time warping: the sum of the distances on the best way, over the number of its
    steps. Errors are averaged over contexts, then over speakers, then over pairs of phones.

    Args:
        items: As `triphone_items` gives them; of recordings without features they are left out.
        features: Folder of `.npy` files (T, D), as `units.FeatureFiles` writes them for a layer, or (T, 1) for units.
        rate: Frames a second, `frame_rate(config)`. Frame i is taken to be at (i + 1/2) / rate; those of DinoSR are
            2.5 ms later.
        speaker: "within": A, B and X of one speaker. "across": A and B of one, X of another.
        distance: "angular" (the angle over pi, which fastabx calls cosine too), "cosine" (1 - cos) or "euclidean" of
            frames; "identical" of units: 0 if they are the same and 1 if not, which is as good as an angular distance
            of one-hot vectors.
        max_size_group: Items of a kind that are compared at most, drawn by the seed; None: all. 10 is ZeroSpeech's.
        max_x_across: Speakers of X that are compared at most; None: all. 5 is ZeroSpeech's.
        seed: Of the draw.
        device: Where distances are computed.

    Returns:
        From 0 to 1; 0.5 is chance, less is better.

    Raises:
        ValueError: For other names, or if there is nothing to compare.
        ImportError: Without fastabx.
    """
    if speaker not in SPEAKERS:
        raise ValueError(f"speaker={speaker!r} is unknown. Choose one of {', '.join(SPEAKERS)}.")
    if distance not in DISTANCES:
        raise ValueError(f"distance={distance!r} is unknown. Choose one of {', '.join(DISTANCES)}.")
    found = [item for item in items if Path(features, f"{item.file}.npy").is_file()]
    if not found:
        raise ValueError(f"{features} has no .npy file of any of {len(items):,} items. Is it the folder of a layer?")
    fastabx = import_fastabx()
    compare: Any = cosine_distance if distance == "cosine" else distance
    options = {"frequency": str(rate), "feature_maker": _read, "extension": ".npy", "device": device, "seed": seed}
    options |= {"max_size_group": max_size_group, "max_x_across": max_x_across, "progress": False}
    judge = partial(fastabx.zerospeech_abx, root=features, speaker=speaker, distance=compare, **options)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "triphones.item")
        file.write_text(items_text(found), encoding="utf-8")
        try:
            return float(judge(file))
        except fastabx.EmptyTaskError as error:
            raise ValueError(
                f"No two of {len(found):,} triphones can be compared {speaker} speakers: some context must be around"
                " two different phones, one of them twice" + (", by two speakers." if speaker == "across" else ".")
            ) from error
