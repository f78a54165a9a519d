"""
Time one step of the codebooks: assignment and update by index, compared with one-hot matrices.

    python benchmarks/codebook.py --frames 2000 --sizes 256 2048 --repeats 9 --threads 2

Uses the base model's codebooks (8 of 768 dimensions) and random frames in float32, on a GPU if there is one. Both
implementations must give the same codes and codewords, or nothing is timed.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial

import torch
from contest import at_least, choose_device, headline, time_in_turn, timing_parser

from dinosr_hf.model.codebook_dinosr import OnlineCodebooks

NUM_CODEBOOKS, HIDDEN_SIZE, DECAY = 8, 768, 0.9
# Relative to the largest value: sums of some thousand frames in a different order.
TOLERANCE = 2e-5


def update_by_index(codebooks: OnlineCodebooks, targets: torch.Tensor) -> torch.Tensor:
    """Assign, accumulate and commit as the model does."""
    codes = codebooks.assign(targets)
    codebooks.accumulate(targets, codes)
    codebooks.commit(DECAY)
    return codes


@torch.no_grad()
def update_by_one_hot(codebooks: OnlineCodebooks, targets: torch.Tensor) -> torch.Tensor:
    """Assign by `cdist`; compute sums as the product of a one-hot matrix (N, V, M) with the frames."""
    codes = torch.cdist(targets, codebooks.codewords).argmin(dim=-1)
    assigned = torch.nn.functional.one_hot(codes, codebooks.sums.shape[1]).to(targets.dtype).mT
    counts = assigned.sum(dim=-1)
    weight = torch.where(counts > 0, 1 - DECAY, 0.0)
    codebooks.sums.lerp_(assigned @ targets, weight[..., None])
    codebooks.counts.lerp_(counts, weight)
    return codes


FORMS = {"by index": update_by_index, "one-hot": update_by_one_hot}


def make_codebooks(size: int, device: torch.device) -> OnlineCodebooks:
    """Return codebooks with the same initial codewords at each call."""
    torch.manual_seed(0)
    codebooks = OnlineCodebooks(NUM_CODEBOOKS, size, HIDDEN_SIZE).to(device)
    codebooks.sums.copy_(codebooks.initial_sums())
    return codebooks


def largest_difference(size: int, targets: torch.Tensor) -> float:
    """Return the relative difference of the codewords after one step of each form, or infinity if codes differ."""
    first, second = (make_codebooks(size, targets.device) for _ in FORMS)
    if not torch.equal(update_by_index(first, targets), update_by_one_hot(second, targets)):
        return float("inf")
    return ((first.codewords - second.codewords).abs().max() / second.codewords.abs().max()).item()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = timing_parser(__doc__, repeats=9)
    parser.add_argument("--frames", type=at_least(1), default=2_000, help="masked frames per step (%(default)s)")
    parser.add_argument(
        "--sizes", type=at_least(1), nargs="+", default=[256, 512, 1_024, 2_048], help="codebook sizes (%(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    device = choose_device(options.threads)
    targets = torch.randn(NUM_CODEBOOKS, options.frames, HIDDEN_SIZE, device=device)
    print(headline(device, options.threads))
    print(
        f"{NUM_CODEBOOKS} codebooks of {HIDDEN_SIZE} dimensions, {options.frames:,} frames; {options.repeats} steps of"
        " each form in turn\n"
    )
    print("| codewords | by index, median (s) | one-hot, median (s) | one-hot / by index | difference |")
    print("|---" * 5 + "|")
    for size in options.sizes:
        difference = largest_difference(size, targets)
        if not difference <= TOLERANCE:
            sys.exit(f"Nothing was timed: with {size} codewords the two forms differ by {difference:.1e}.")
        codebooks = make_codebooks(size, device)
        forms = {name: partial(form, codebooks, targets) for name, form in FORMS.items()}
        times = time_in_turn(forms, options.repeats, device)
        ours, theirs = (statistics.median(times[name]) for name in FORMS)
        print(f"| {size:,} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.2f} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
