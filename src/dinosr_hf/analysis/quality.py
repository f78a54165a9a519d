"""
How well the codes of a model agree with phones: metrics from a table that counts frames.

Every metric is a function of a table `counts[y, z]`: the number of frames with phone `y` and code `z`. Tables of parts
of a corpus add up, so a metric over many files, processes or speakers is the metric of the sum of their tables.

`P` phones, `V` codewords, `T` frames. `p(y, z)` is the table divided by its sum, `y` a phone, `z` a code.

References: HuBERT (arXiv 2106.07447), section 4.3, defines the purities and PNMI; DinoSR (arXiv 2305.10005) reports
them with the code perplexity and the number of active codewords for its layer 5 (codebook analysis).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Label = TypeVar("Label", bound=Hashable)


def _check_codes(codes: ArrayLike, num_labels: int, num_codes: int | None) -> tuple[NDArray[np.int64], int]:
    array = np.asarray(codes)
    if array.ndim != 1:
        raise ValueError(f"codes has shape {array.shape}, but must be (T,): join utterances and drop padded frames.")
    if len(array) != num_labels:
        raise ValueError(
            f"There are {num_labels:,} labels and {len(array):,} codes, but each frame needs one of both. "
            "Make the labels with the number of frames that the model gives (config.num_frames)."
        )
    if len(array) == 0:
        return array.astype(np.int64), num_codes or 0
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"codes has dtype {array.dtype}, but must hold integers: the index of a codeword a frame.")
    lowest, highest = int(array.min()), int(array.max())
    if lowest < 0:
        raise ValueError(f"codes holds {lowest}, but a code is at least 0. Drop padded frames before counting.")
    if num_codes is not None and highest >= num_codes:
        raise ValueError(f"codes holds {highest}, but num_codes={num_codes} allows 0 to {num_codes - 1} only.")
    return array.astype(np.int64), highest + 1 if num_codes is None else num_codes


def contingency(
    labels: Sequence[Label],
    codes: ArrayLike,
    *,
    num_codes: int | None = None,
    phones: Sequence[Label] | None = None,
) -> tuple[NDArray[np.int64], list[Label]]:
    """
    Count how often each phone meets each code.

    Args:
        labels: The phone of each frame (T,), as `alignment.frame_labels` gives it.
        codes: The code of each frame, integers (T,).
        num_codes: V, the size of the codebook. None: up to the highest code seen; tables of several parts of a corpus
            then differ in size and do not add up.
        phones: The phones in the order of the table's rows; those without a frame get a row of zeros. None: the
            labels that occur, sorted.

    Returns:
        int64 (P, V) of counts, and the P phones.

    Raises:
        ValueError: If the lengths differ, codes are not whole numbers in [0, num_codes), a phone is listed twice, or a
            label is not in `phones`.
    """
    code_array, num_columns = _check_codes(codes, len(labels), num_codes)
    names: list[Label] = sorted(set(labels)) if phones is None else list(phones)  # type: ignore[type-var]
    row_of = {name: row for row, name in enumerate(names)}
    if len(row_of) != len(names):
        raise ValueError("phones lists a phone twice, but each phone has one row.")
    unknown = sorted({str(label) for label in labels if label not in row_of})
    if unknown:
        raise ValueError(
            f"labels holds {', '.join(unknown)}, which phones does not. Add to phones, or drop the frames."
        )
    rows = np.fromiter((row_of[label] for label in labels), dtype=np.int64, count=len(labels))
    counts = np.bincount(rows * num_columns + code_array, minlength=len(names) * num_columns)
    return counts.reshape(len(names), num_columns), names


def _share(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    if not np.all(np.isfinite(counts)) or np.any(counts < 0):
        raise ValueError("The table holds negative or non-finite values, but must hold counts of frames.")
    total = counts.sum()
    if total == 0:
        raise ValueError("The table counts no frame, so nothing can be said of it. Are all labels filtered out?")
    return counts / total


def joint_distribution(table: ArrayLike) -> NDArray[np.float64]:
    """
    Divide a table by the number of its frames.

    Args:
        table: Counts (P, V).

    Returns:
        float64 (P, V), the p(y, z) of all metrics here.

    Raises:
        ValueError: If the table is not (P, V), holds what is no count, or counts no frame.
    """
    counts = np.asarray(table, dtype=np.float64)
    if counts.ndim != 2:
        raise ValueError(f"The table has shape {counts.shape}, but must be (P, V): phones by codes.")
    return _share(counts)


def _entropy(probabilities: NDArray[np.float64]) -> float:
    """Shannon entropy in nats; a probability of zero adds nothing."""
    seen = probabilities[probabilities > 0]
    # Adding 0.0 turns the -0.0 of a certain outcome into 0.0.
    return float(-(seen * np.log(seen)).sum() + 0.0)


def phone_purity(table: ArrayLike) -> float:
    """
    Share of frames that are right if each code stands for its most frequent phone.

        phone purity = E_{p(z)} [ max_y p(y | z) ] = sum_z max_y p(y, z)

    HuBERT, section 4.3. It never falls when codes are split, so compare only codebooks of like size.

    Args:
        table: Counts (P, V).

    Returns:
        A number in (0, 1], at least the share of the most frequent phone.

    Raises:
        ValueError: If the table is no table of counts, or counts no frame.
    """
    return float(joint_distribution(table).max(axis=0).sum())


def cluster_purity(table: ArrayLike) -> float:
    """
    Share of frames that are right if each phone stands for its most frequent code.

        cluster purity = E_{p(y)} [ max_z p(z | y) ] = sum_y max_z p(y, z)

    HuBERT, section 4.3: the counterpart of phone purity, which shows when a phone is spread over many codes.

    Args:
        table: Counts (P, V).

    Returns:
        A number in (0, 1], at least the share of the most frequent code.

    Raises:
        ValueError: If the table is no table of counts, or counts no frame.
    """
    return float(joint_distribution(table).max(axis=1).sum())


def phone_normalized_mutual_information(table: ArrayLike) -> float:
    """
    Share of the uncertainty about the phone that knowing the code takes away (PNMI).

        PNMI = I(y; z) / H(y) = sum_{y,z} p(y, z) log(p(y, z) / (p(y) p(z))) / -sum_y p(y) log p(y)

    HuBERT, section 4.3. Like phone purity it never falls when codes are split; from few frames a codebook it is
    biased upwards.

    Args:
        table: Counts (P, V).

    Returns:
        A number in [0, 1]; nan if only one phone occurs, whose uncertainty is zero.

    Raises:
        ValueError: If the table is no table of counts, or counts no frame.
    """
    joint = joint_distribution(table)
    phone, code = joint.sum(axis=1), joint.sum(axis=0)
    if np.count_nonzero(phone) == 1:
        return float("nan")
    seen = joint > 0
    information = float((joint[seen] * np.log(joint[seen] / np.outer(phone, code)[seen])).sum())
    # Rounding may leave the range by an ulp.
    return min(max(information / _entropy(phone), 0.0), 1.0)


def code_perplexity(counts: ArrayLike) -> float:
    """
    Number of equally frequent codes with the same entropy as the codes that occur.

        code perplexity = 2 ^ H_2(z) = 2 ^ (-sum_z p(z) log2 p(z))

    The column "code perplexity" of the codebook analysis in the DinoSR paper.

    Args:
        counts: Frames of each code (V,), or a table (P, V), whose phones are then summed over.

    Returns:
        A number from 1 (one code does all) to V (all codes equally often).

    Raises:
        ValueError: If these are no counts, or count no frame.
    """
    return float(np.exp(_entropy(_share(_code_counts(counts)))))


def num_active_codes(counts: ArrayLike) -> int:
    """
    Number of codes that occur at all.

    The column "active codewords" of the codebook analysis in the DinoSR paper.

    Args:
        counts: Frames of each code (V,), or a table (P, V), whose phones are then summed over.

    Returns:
        A number from 1 to V.

    Raises:
        ValueError: If these are no counts, or count no frame.
    """
    return int(np.count_nonzero(_share(_code_counts(counts))))


def _code_counts(counts: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(counts, dtype=np.float64)
    if array.ndim not in (1, 2):
        raise ValueError(f"counts has shape {array.shape}, but must be (V,), or (P, V) with phones first.")
    return array if array.ndim == 1 else array.sum(axis=0)


@dataclass(frozen=True)
class UnitQuality:
    """
    All metrics of one table; each field but the first two is the function of its name, `pnmi` the long one.

    Attributes:
        num_frames: Frames counted.
        num_phones: Phones that occur.
        num_active_codes: Codes that occur.
        code_perplexity: 2 ^ entropy of the codes, in codes.
        phone_purity: E over codes of max_y p(y | z).
        cluster_purity: E over phones of max_z p(z | y).
        pnmi: I(y; z) / H(y), nan with a single phone.
    """

    num_frames: int
    num_phones: int
    num_active_codes: int
    code_perplexity: float
    phone_purity: float
    cluster_purity: float
    pnmi: float

    @classmethod
    def from_table(cls, table: ArrayLike) -> UnitQuality:
        """
        Compute all metrics of a table of counts (P, V).

        Raises:
            ValueError: If the table is no table of counts, or counts no frame.
        """
        joint = joint_distribution(table)
        return cls(
            num_frames=int(np.asarray(table).sum()),
            num_phones=int(np.count_nonzero(joint.sum(axis=1))),
            num_active_codes=num_active_codes(table),
            code_perplexity=code_perplexity(table),
            phone_purity=phone_purity(table),
            cluster_purity=cluster_purity(table),
            pnmi=phone_normalized_mutual_information(table),
        )


def unit_quality(labels: Sequence[Label], codes: ArrayLike, *, num_codes: int | None = None) -> UnitQuality:
    """
    Judge codes against the phones of the same frames.

    Args:
        labels: The phone of each frame (T,).
        codes: The code of each frame, integers (T,).
        num_codes: V, to check the codes against; None: any.

    Returns:
        All metrics.

    Raises:
        ValueError: As `contingency` does, and if there is no frame.
    """
    table, _ = contingency(labels, codes, num_codes=num_codes)
    return UnitQuality.from_table(table)
