"""Metrics of units against phones: examples by hand, a slow twin, and errors."""

import math
from collections import Counter

import numpy as np
import pytest

from dinosr_hf.analysis.quality import (
    UnitQuality,
    cluster_purity,
    code_perplexity,
    contingency,
    joint_distribution,
    num_active_codes,
    phone_normalized_mutual_information,
    phone_purity,
    unit_quality,
)

# Eight frames each, so that all probabilities are powers of two.
CODE_SHARED_BY_PHONES = [
    [2, 0],
    [2, 0],
    [0, 4],
]
PHONE_SPLIT_OVER_CODES = [
    [2, 2, 0],
    [0, 0, 4],
]
BOTH = [
    [2, 1, 1, 0],
    [0, 1, 1, 2],
]


def slow_metrics(labels: list[str], codes: list[int]) -> dict[str, float]:
    """The definitions, frame by frame: no table, but conditional probabilities and entropies."""
    pairs = list(zip(labels, codes, strict=True))
    phones_of = {code: Counter(y for y, z in pairs if z == code) for code in codes}
    codes_of = {label: Counter(z for y, z in pairs if y == label) for label in labels}

    def bits(counts: Counter) -> float:
        return -sum(n / counts.total() * math.log2(n / counts.total()) for n in counts.values())

    def expectation(of: dict, value) -> float:
        return sum(counts.total() / len(pairs) * value(counts) for counts in of.values())

    uncertainty = bits(Counter(labels))
    return {
        "phone_purity": expectation(phones_of, lambda counts: max(counts.values()) / counts.total()),
        "cluster_purity": expectation(codes_of, lambda counts: max(counts.values()) / counts.total()),
        "pnmi": (uncertainty - expectation(phones_of, bits)) / uncertainty,
        "code_perplexity": 2 ** bits(Counter(codes)),
        "num_active_codes": len(set(codes)),
        "num_phones": len(set(labels)),
        "num_frames": len(pairs),
    }


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        # Code 0: 2 of 4 frames right, code 1: 4 of 4, so 6/8. Every phone has one code only: 8/8.
        (CODE_SHARED_BY_PHONES, 6 / 8),
        # Each code has one phone only: 8/8.
        (PHONE_SPLIT_OVER_CODES, 1.0),
        # Columns: max 2, 1, 1, 2, so 6/8.
        (BOTH, 6 / 8),
    ],
    ids=["code-shared", "phone-split", "both"],
)
def test_phone_purity_by_hand(table, expected):
    assert phone_purity(table) == expected


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (CODE_SHARED_BY_PHONES, 1.0),  # rows: max 2, 2, 4
        (PHONE_SPLIT_OVER_CODES, 6 / 8),  # rows: max 2, 4
        (BOTH, 4 / 8),  # rows: max 2, 2
    ],
    ids=["code-shared", "phone-split", "both"],
)
def test_cluster_purity_by_hand(table, expected):
    assert cluster_purity(table) == expected


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        # H(y) = 1/4 * 2 + 1/4 * 2 + 1/2 * 1 = 1.5 bits; H(y|z) = 1/2 * 1 + 1/2 * 0 = 0.5; (1.5 - 0.5) / 1.5.
        (CODE_SHARED_BY_PHONES, 2 / 3),
        # The code tells the phone: H(y|z) = 0.
        (PHONE_SPLIT_OVER_CODES, 1.0),
        # H(y) = 1 bit; codes 1 and 2, half of the frames, leave 1 bit, the others none: (1 - 0.5) / 1.
        (BOTH, 0.5),
        # Independent: the code says nothing.
        (np.outer([1, 3], [2, 5, 1]), 0.0),
    ],
    ids=["code-shared", "phone-split", "both", "independent"],
)
def test_pnmi_by_hand(table, expected):
    assert phone_normalized_mutual_information(table) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("counts", "perplexity", "active"),
    [
        ([4, 4], 2.0, 2),
        ([2, 2, 4], 2**1.5, 3),  # 1/4 * 2 + 1/4 * 2 + 1/2 * 1 = 1.5 bits
        ([7, 0, 0], 1.0, 1),
        (np.ones(256), 256.0, 256),
        (PHONE_SPLIT_OVER_CODES, 2**1.5, 3),  # a table: phones are summed over
    ],
    ids=["two-equal", "unequal", "one", "all-equal", "table"],
)
def test_code_usage_by_hand(counts, perplexity, active):
    assert code_perplexity(counts) == pytest.approx(perplexity, rel=1e-12)
    assert num_active_codes(counts) == active


@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_their_definitions_frame_by_frame(seed):
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 13, size=301).tolist()
    labels = ["abcde"[(code + shift) % 5] for code, shift in zip(codes, generator.geometric(0.6, 301), strict=True)]

    quality = unit_quality(labels, codes)

    assert vars(quality) == pytest.approx(slow_metrics(labels, codes), rel=1e-12)


def test_unused_codes_and_phones_change_nothing():
    table = np.array(BOTH)
    wider = np.zeros((4, 9), dtype=int)
    wider[np.ix_([1, 3], [0, 3, 4, 8])] = table
    assert UnitQuality.from_table(wider) == UnitQuality.from_table(table)


def test_order_of_phones_and_codes_does_not_matter():
    table = np.array([[3, 1, 0], [2, 2, 5]])
    shuffled = UnitQuality.from_table(table[::-1][:, [2, 0, 1]])
    assert vars(shuffled) == pytest.approx(vars(UnitQuality.from_table(table)), rel=1e-12)


def test_splitting_a_code_never_lowers_phone_metrics():
    whole, split = [[3, 1], [2, 4]], [[3, 1, 0], [2, 1, 3]]
    assert phone_purity(split) >= phone_purity(whole)
    assert phone_normalized_mutual_information(split) >= phone_normalized_mutual_information(whole)
    assert cluster_purity(split) < cluster_purity(whole)


def test_one_phone_is_pure_and_has_no_pnmi():
    quality = UnitQuality.from_table([[3, 1]])
    assert (quality.num_phones, quality.phone_purity, quality.cluster_purity) == (1, 1.0, 0.75)
    assert math.isnan(quality.pnmi)


def test_one_code_carries_no_information():
    quality = UnitQuality.from_table([[3], [1]])
    assert (quality.phone_purity, quality.cluster_purity, quality.pnmi) == (0.75, 1.0, 0.0)
    assert (quality.code_perplexity, quality.num_active_codes) == (1.0, 1)


def test_contingency_counts_pairs():
    table, phones = contingency(["b", "a", "b", "b"], np.array([2, 0, 2, 1]), num_codes=4)
    assert phones == ["a", "b"]
    np.testing.assert_array_equal(table, [[1, 0, 0, 0], [0, 1, 2, 0]])


def test_contingency_keeps_the_given_order_of_phones():
    table, phones = contingency(["b", "a"], [0, 1], phones=["b", "silence", "a"])
    assert phones == ["b", "silence", "a"]
    np.testing.assert_array_equal(table, [[1, 0], [0, 0], [0, 1]])


def test_tables_of_parts_add_up():
    labels, codes = ["a", "b", "b", "a", "c"], [0, 1, 1, 3, 0]
    whole, phones = contingency(labels, codes, num_codes=4)
    parts = [contingency(labels[s], codes[s], num_codes=4, phones=phones)[0] for s in (slice(2), slice(2, 5))]
    np.testing.assert_array_equal(sum(parts), whole)


def test_an_empty_part_counts_nothing():
    table, _ = contingency([], [], num_codes=3, phones=["a"])
    np.testing.assert_array_equal(table, [[0, 0, 0]])


def test_joint_distribution_sums_to_one():
    np.testing.assert_array_equal(joint_distribution([[1, 0], [1, 2]]), [[0.25, 0], [0.25, 0.5]])


@pytest.mark.parametrize(
    ("labels", "codes", "options", "message"),
    [
        (["a"], [0, 1], {}, "1 labels and 2 codes.*num_frames"),
        (["a", "b"], [[0, 1]], {}, r"shape \(1, 2\).*must be \(T,\)"),
        (["a", "b"], [0.0, 1.0], {}, "float64.*integers"),
        (["a", "b"], [0, -1], {}, "holds -1.*Drop padded frames"),
        (["a", "b"], [0, 8], {"num_codes": 8}, "holds 8.*num_codes=8 allows 0 to 7"),
        (["a", "b"], [0, 1], {"phones": ["a"]}, "holds b, which phones does not"),
        (["a", "b"], [0, 1], {"phones": ["a", "b", "a"]}, "lists a phone twice"),
    ],
    ids=["lengths", "shape", "dtype", "negative", "too-high", "unknown-phone", "phone-twice"],
)
def test_contingency_refuses(labels, codes, options, message):
    with pytest.raises(ValueError, match=message):
        contingency(labels, codes, **options)


@pytest.mark.parametrize("metric", [phone_purity, cluster_purity, phone_normalized_mutual_information])
@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[0, 0]], "counts no frame"),
        (np.zeros((0, 4)), "counts no frame"),
        ([1, 2], r"shape \(2,\).*\(P, V\)"),
        ([[1, -1]], "negative or non-finite"),
        ([[1, np.nan]], "negative or non-finite"),
    ],
    ids=["zero", "no-phone", "one-axis", "negative", "nan"],
)
def test_metrics_refuse_malformed_tables(metric, table, message):
    with pytest.raises(ValueError, match=message):
        metric(table)


@pytest.mark.parametrize("metric", [code_perplexity, num_active_codes])
def test_code_usage_refuses_malformed_counts(metric):
    with pytest.raises(ValueError, match="counts no frame"):
        metric([0, 0])
    with pytest.raises(ValueError, match=r"shape \(1, 1, 1\)"):
        metric([[[1]]])


def test_unit_quality_refuses_no_frames():
    with pytest.raises(ValueError, match="counts no frame"):
        unit_quality([], [])
