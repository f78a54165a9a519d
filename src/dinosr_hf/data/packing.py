"""Cut a sequence of recordings, windows or utterances into batches by their lengths."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

Item = TypeVar("Item")


def pack(
    items: Iterable[Item], length_of: Callable[[Item], int], max_samples: float, *, padded: bool = True
) -> Iterator[list[Item]]:
    """
    Cut items, in their order, into batches of at most `max_samples`; each takes items until the next does not fit.

    A batch's size is its number of items times the longest, or without `padded` the sum of their lengths. An item
    longer than `max_samples` is a batch of its own.
    """
    batch: list[Item] = []
    longest = total = 0
    for item in items:
        length = length_of(item)
        longest, total = max(longest, length), total + length
        if batch and (longest * (len(batch) + 1) if padded else total) > max_samples:
            yield batch
            batch, longest, total = [], length, length
        batch.append(item)
    if batch:
        yield batch


def pack_evenly(items: Sequence[Item], length_of: Callable[[Item], int], num_batches: int) -> list[list[Item]]:
    """
    Cut items into exactly `num_batches` batches, the longest items first, so that the largest is as small as possible.

    The size of a batch is the number of its items times the longest. Trailing batches may be empty.
    """
    ordered = sorted(items, key=length_of, reverse=True)
    if not ordered:
        return [[] for _ in range(num_batches)]

    def fits(size: int) -> bool:
        return sum(1 for _ in pack(ordered, length_of, size)) <= num_batches

    size = 1 + bisect_left(range(1, length_of(ordered[0]) * len(ordered)), True, key=fits)
    batches = list(pack(ordered, length_of, size))
    return batches + [[] for _ in range(num_batches - len(batches))]


def equal_parts(total: int, num_parts: int) -> list[tuple[int, int]]:
    """Return the first and last (exclusive) index of `num_parts` consecutive parts whose sizes differ by at most 1."""
    return list(pairwise(total * part // num_parts for part in range(num_parts + 1)))
