"""
How long do the convolutions take, forward and backward: as matrix products of pieces, and in the usual form?

    python benchmarks/convolution.py --size base --batch 4 --seconds 5 --repeats 5 --threads 2

Runs on a GPU if there is one, in float32. Outputs and gradients of the two must be the same, or nothing is timed.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from contest import SAMPLING_RATE, SIZES, choose_device, headline, time_in_turn
from train_step import make_model

from dinosr_hf.model.encoder_dinosr import DinoSRFeatureEncoder

# Relative to the largest value: float32 sums of some thousand products in another order.
TOLERANCE = 2e-5


def pieces(encoder: DinoSRFeatureEncoder, waveforms: torch.Tensor) -> torch.Tensor:
    """What the model does."""
    return encoder(waveforms)


def usual(encoder: DinoSRFeatureEncoder, waveforms: torch.Tensor) -> torch.Tensor:
    """`torch.nn.Conv1d` on (B, C, T), with a transpose before and after each layer norm."""
    signal = waveforms[..., None]
    for layer in encoder.conv_layers:
        signal = layer(signal)
    return signal.transpose(1, 2)


FORMS = {"pieces": pieces, "usual": usual}
Form = Callable[[DinoSRFeatureEncoder, torch.Tensor], torch.Tensor]


def forward_backward(form: Form, encoder: DinoSRFeatureEncoder, waveforms: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of all parameters."""
    encoder.zero_grad()
    output = form(encoder, waveforms)
    output.square().sum().backward()
    return [output.detach(), *(parameter.grad for parameter in encoder.parameters() if parameter.grad is not None)]


def largest_difference(encoder: DinoSRFeatureEncoder, waveforms: torch.Tensor) -> float:
    """Between the forms, relative to the largest value of each tensor."""
    pairs = zip(*(forward_backward(form, encoder, waveforms) for form in FORMS.values()), strict=True)
    return max(((mine - theirs).abs().max() / theirs.abs().max()).item() for mine, theirs in pairs)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the convolutional feature encoder.")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="the demo's model or the paper's")
    parser.add_argument("--batch", type=int, default=4, help="utterances")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each form")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    device = choose_device(options.threads)
    encoder = make_model(options.size, "sdpa", device).dinosr.feature_extractor
    waveforms = torch.randn(options.batch, int(options.seconds * SAMPLING_RATE), device=device)
    difference = largest_difference(encoder, waveforms)
    if not difference <= TOLERANCE:
        sys.exit(f"Not timed, because it is wrong: the forms differ by {difference:.1e} of the largest value.")

    forms = {name: partial(forward_backward, form, encoder, waveforms) for name, form in FORMS.items()}
    times = time_in_turn(forms, options.repeats, device)
    print(headline(device, options.threads))
    print(
        f"{options.size}: {options.batch} x {options.seconds:g} s, {options.repeats} runs of each form in turn;"
        f" outputs and gradients differ by at most {difference:.1e}\n"
    )
    print("| form | median (s) | min | max |\n|---|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {statistics.median(seconds):.3f} | {min(seconds):.3f} | {max(seconds):.3f} |")
    ratio = statistics.median(times["usual"]) / statistics.median(times["pieces"])
    print(f"\nusual / pieces: {ratio:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
