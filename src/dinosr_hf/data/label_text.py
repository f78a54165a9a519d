"""Labels as text, from what tables and datasets store."""

import math
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

_MAX_NUMBER = 2**53  # above it, a float may stand for several integers


def label_text(value: Any, where: str) -> str | None:
    """
    Return a label as text, or None for a gap: None, or NaN in a column of numbers.

    Whole floats are written as integers, since a gap makes floats of a column of integers. Raises `ValueError` with
    `where`, the row and column, for a value that is neither text nor a number.
    """
    if value is None or (isinstance(value, (float, Decimal)) and math.isnan(value)):
        return None
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{where}: {value!r} is not UTF-8. Save the table in that encoding.")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}..."
        problem = f"a label must be text or a number, but this is {shown}, of type {type(value).__name__}"
        raise ValueError(f"{where}: {problem}. Write it as text, or name another column.")
    if isinstance(value, int):
        return str(value)
    if not math.fabs(value) <= _MAX_NUMBER:
        raise ValueError(f"{where}: {value} is too large for a label. Write it as text.")
    return str(int(value)) if value == int(value) else str(float(value))


def without_fractions(labels: Iterable[str | None]) -> list[str | None]:
    """Return the labels of a column of text without `.0` if all have it, as pandas writes integers with a gap."""
    labels = list(labels)
    if not all(re.fullmatch(r"-?\d+\.0", label) for label in labels if label):
        return labels
    return [label and label.removesuffix(".0") for label in labels]
