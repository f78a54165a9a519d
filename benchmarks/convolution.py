"""
Time the convolutional feature encoder, forward and backward: its fast form for CPUs, compared with the plain layers.

    python benchmarks/convolution.py --size base --batch 4 --seconds 5 --repeats 5 --threads 2

Runs in float32. Both forms must give the same outputs and gradients, or nothing is timed.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from contest import SAMPLING_RATE, add_size, at_least, headline, print_times, time_in_turn, timing_parser
from train_step import make_model

from dinosr_hf import set_fast_cpu
from dinosr_hf.model.modeling_dinosr import DinoSRFeatureEncoder

# Relative to the largest value: float32 sums of some thousand products in a different order.
TOLERANCE = 2e-5


def fast(encoder: DinoSRFeatureEncoder, waveforms: torch.Tensor) -> torch.Tensor:
    """Convolve as the model does on a CPU."""
    return encoder(waveforms)


def plain(encoder: DinoSRFeatureEncoder, waveforms: torch.Tensor) -> torch.Tensor:
    """Convolve layer by layer, with a transpose before and after each layer norm."""
    before = set_fast_cpu(False)
    try:
        return encoder(waveforms)
    finally:
        set_fast_cpu(before)


FORMS = {"fast": fast, "plain": plain}
Form = Callable[[DinoSRFeatureEncoder, torch.Tensor], torch.Tensor]


def forward_backward(form: Form, encoder: DinoSRFeatureEncoder, waveforms: torch.Tensor) -> list[torch.Tensor]:
    """Return the output and the gradients of all parameters."""
    encoder.zero_grad()
    output = form(encoder, waveforms)
    output.square().sum().backward()
    return [output.detach(), *(parameter.grad for parameter in encoder.parameters() if parameter.grad is not None)]


def largest_difference(encoder: DinoSRFeatureEncoder, waveforms: torch.Tensor) -> float:
    """Return the largest difference between the forms, relative to the largest value of each tensor."""
    pairs = zip(*(forward_backward(form, encoder, waveforms) for form in FORMS.values()), strict=True)
    return max(((first - second).abs().max() / second.abs().max()).item() for first, second in pairs)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = timing_parser(__doc__, repeats=10)
    add_size(parser)
    parser.add_argument("--batch", type=at_least(1), default=4, help="number of utterances (%(default)s)")
    parser.add_argument("--seconds", type=at_least(0.1), default=5.0, help="length of each utterance (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    device = torch.device("cpu")  # the only one with a fast form
    torch.set_num_threads(options.threads)
    encoder = make_model(options.size, "sdpa", device).dinosr.feature_extractor
    waveforms = torch.randn(options.batch, int(options.seconds * SAMPLING_RATE), device=device)
    difference = largest_difference(encoder, waveforms)
    if not difference <= TOLERANCE:
        sys.exit(f"Nothing was timed: the forms differ by {difference:.1e} of the largest value.")

    forms = {name: partial(forward_backward, form, encoder, waveforms) for name, form in FORMS.items()}
    times = time_in_turn(forms, options.repeats, device)
    print(headline(device, options.threads))
    print(
        f"{options.size}: {options.batch} x {options.seconds:g} s, {options.repeats} runs of each form in turn;"
        f" outputs and gradients differ by at most {difference:.1e}\n"
    )
    print_times("form", times)
    ratio = statistics.median(times["plain"]) / statistics.median(times["fast"])
    print(f"\nplain / fast: {ratio:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
