"""
Metrics of how well the codes of a model agree with phones.

Each is a function of a table of counts (P, V) of the frames with phone `y` and code `z`; `p(y, z)` is the table
divided by its sum. Tables of parts of a corpus add up. `P` phones, `V` codewords, `T` frames.

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


def check_codes(codes: ArrayLike, num_codes: int | None = None, name: str = "codes") -> NDArray[np.int64]:
    """Convert codes to int64 (T,); `ValueError`, with their name, if they are not integers (T,) in [0, num_codes)."""
    array = np.asarray(codes)
    if array.ndim != 1:
        raise ValueError(
            f"{name} has shape {array.shape}, but must be (T,): one layer; join utterances without padded frames."
        )
    if len(array) and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} has dtype {array.dtype}, but must hold integers: the codeword index of each frame.")
    array = array.astype(np.int64)
    lowest, highest = int(array.min(initial=0)), int(array.max(initial=-1))
    if lowest < 0:
        raise ValueError(f"{name} holds {lowest}, but a code is at least 0. Drop padded frames before counting.")
    if num_codes is not None and highest >= num_codes:
        raise ValueError(f"{name} holds {highest}, but num_codes={num_codes} allows 0 to {num_codes - 1} only.")
    return array


def contingency(
    labels: Sequence[Label], codes: ArrayLike, *, num_codes: int | None = None, phones: Sequence[Label] | None = None
) -> tuple[NDArray[np.int64], list[Label]]:
    """
    Count how often each phone occurs with each code: a table int64 (P, V), and its P phones.

    Args:
        labels: Phone of each frame (T,), from `alignment.frame_labels`.
        codes: Code of each frame, integers (T,).
        num_codes: V, the size of the codebook. None: the highest code plus 1; tables of several parts of a corpus then
            differ in size and do not add up.
        phones: Phones of the table's rows; those without a frame get a row of zeros. None: the labels that occur,
            sorted.

    Raises `ValueError` if the lengths differ, codes are not integers in [0, num_codes), a phone is listed twice, or a
    label is not in `phones`.
    """
    code_array = check_codes(codes, num_codes)
    if len(code_array) != len(labels):
        raise ValueError(
            f"There are {len(labels):,} labels and {len(code_array):,} codes, but each frame needs one of both. "
            "Make the labels with the number of frames that the model gives (config.num_frames)."
        )
    num_columns = int(code_array.max(initial=-1)) + 1 if num_codes is None else num_codes
    names: list[Label] = sorted(set(labels)) if phones is None else list(phones)  # type: ignore[type-var]
    row_of = {name: row for row, name in enumerate(names)}
    if len(row_of) != len(names):
        raise ValueError("phones lists a phone twice, but each phone has one row.")
    unknown = sorted(map(str, set(labels) - row_of.keys()))
    if unknown:
        raise ValueError(
            f"labels holds {', '.join(unknown)}, which phones does not. Add to phones, or drop the frames."
        )
    rows = np.array([row_of[label] for label in labels], dtype=np.int64)
    counts = np.bincount(rows * num_columns + code_array, minlength=len(names) * num_columns)
    return counts.reshape(len(names), num_columns), names


def joint_distribution(table: ArrayLike) -> NDArray[np.float64]:
    """
    Divide a table of counts (P, V) by the number of its frames: float64 (P, V), the p(y, z) of all metrics here.

    Raises `ValueError` if the table is not (P, V), does not hold counts, or counts no frame; so do the metrics.
    """
    counts = np.asarray(table, dtype=np.float64)
    if counts.ndim != 2:
        raise ValueError(f"The table has shape {counts.shape}, but must be (P, V): phones by codes.")
    if not np.all(np.isfinite(counts)) or np.any(counts < 0):
        raise ValueError("The table holds negative or non-finite values, but must hold counts of frames.")
    total = counts.sum()
    if total == 0:
        raise ValueError("The table counts no frame, so it has no metrics. Are all labels filtered out?")
    return counts / total


def _entropy(probabilities: NDArray[np.float64]) -> float:
    """Shannon entropy in nats."""
    seen = probabilities[probabilities > 0]
    return float(-(seen * np.log(seen)).sum() + 0.0)  # + 0.0 turns the -0.0 of a certain outcome into 0.0


def phone_purity(table: ArrayLike) -> float:
    """
    Return the share of frames that are right if each code stands for its most frequent phone: sum_z max_y p(y, z).

    HuBERT, section 4.3. `table` has counts (P, V). Phone purity never falls when codes are split, so compare only
    codebooks of similar size. It is at least the share of the most frequent phone, at most 1.
    """
    return float(joint_distribution(table).max(axis=0).sum())


def cluster_purity(table: ArrayLike) -> float:
    """
    Return the share of frames that are right if each phone stands for its most frequent code: sum_y max_z p(y, z).

    HuBERT, section 4.3. `table` has counts (P, V). The counterpart of phone purity, which shows when a phone is spread
    over many codes. It is at least the share of the most frequent code, at most 1.
    """
    return float(joint_distribution(table).max(axis=1).sum())


def phone_normalized_mutual_information(table: ArrayLike) -> float:
    """
    Return the share of the uncertainty about the phone that the code removes (PNMI; HuBERT, section 4.3).

        PNMI = I(y; z) / H(y) = sum_{y,z} p(y, z) log(p(y, z) / (p(y) p(z))) / -sum_y p(y) log p(y)

    of a table of counts (P, V). Like phone purity it never falls when codes are split; with few frames per codeword it
    is biased upwards. From 0 to 1; nan if only one phone occurs, whose uncertainty is zero.
    """
    joint = joint_distribution(table)
    phone, code = joint.sum(axis=1), joint.sum(axis=0)
    if np.count_nonzero(phone) == 1:
        return float("nan")
    seen = joint > 0
    information = float((joint[seen] * np.log(joint[seen] / np.outer(phone, code)[seen])).sum())
    return min(max(information / _entropy(phone), 0.0), 1.0)  # rounding may leave the range by an ulp


def _code_shares(counts: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(counts, dtype=np.float64)
    if array.ndim not in (1, 2):
        raise ValueError(f"counts has shape {array.shape}, but must be (V,), or (P, V) with phones first.")
    return joint_distribution(np.atleast_2d(array).sum(axis=0, keepdims=True))


def code_perplexity(counts: ArrayLike) -> float:
    """
    Return the number of equally frequent codes with the same entropy, from 1 to V: 2 ^ (-sum_z p(z) log2 p(z)).

    `counts` are the frames of each code (V,), or a table (P, V), which is summed over phones.
    """
    return float(np.exp(_entropy(_code_shares(counts))))


def num_active_codes(counts: ArrayLike) -> int:
    """Return the number of codes that occur (the paper's "active codewords"); `counts` as for `code_perplexity`."""
    return int(np.count_nonzero(_code_shares(counts)))


@dataclass(frozen=True)
class UnitQuality:
    """All metrics of one table."""

    num_frames: int
    num_phones: int  # that occur
    num_active_codes: int
    code_perplexity: float
    phone_purity: float
    cluster_purity: float
    pnmi: float  # nan with a single phone

    @classmethod
    def from_table(cls, table: ArrayLike) -> UnitQuality:
        """Compute all metrics of a table of counts (P, V)."""
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
    """Evaluate codes against the phones of the same frames; arguments and errors as for `contingency`."""
    return UnitQuality.from_table(contingency(labels, codes, num_codes=num_codes)[0])
