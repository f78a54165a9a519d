"""
How long does an optimizer step take: forward of student and teacher, backward, AdamW, codebooks and teacher?

    python benchmarks/train_step.py --size tiny --batch 4 --seconds 4 --repeats 5 --threads 1

Runs on a GPU if there is one, in float32. Eager and sdpa attention are timed in turn; before, both must give the same
loss, and two halves of a batch the same codebooks as the whole, or nothing is timed.
"""

import argparse
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

from dinosr_hf import DinoSRConfig, DinoSRForPreTraining
from dinosr_hf.pretraining import parse_arguments

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"
SAMPLING_RATE = 16_000
ATTENTIONS = ("eager", "sdpa")
# Losses are a few nats; kernels differ by about 1e-5 (tests/tolerances.py).
LOSS_TOLERANCE = 1e-4
# Of the norm. A frame between two codewords may change sides by rounding, a wrong update moves many.
CODEBOOK_TOLERANCE = 1e-2


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time one optimizer step.")
    parser.add_argument("--size", choices=("tiny", "base"), default="tiny", help="the demo's model or the paper's")
    parser.add_argument("--batch", type=int, default=4, help="utterances, at least 2")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each, at least 0.5")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps of each kind")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    options = parser.parse_args(argv)
    if options.batch < 2 or options.seconds < 0.5 or options.repeats < 1 or options.threads < 1:
        parser.error("--batch must be at least 2, --seconds 0.5, --repeats and --threads 1.")
    return options


def make_model(size: str, attention: str, device: torch.device) -> DinoSRForPreTraining:
    config = DinoSRConfig()
    if size == "tiny":
        config = parse_arguments([], CONFIGS / "tiny_cpu.yaml").model_config()
    torch.manual_seed(0)
    model = DinoSRForPreTraining(config).to(device)
    model.set_attn_implementation(attention)
    return model


def without_noise(model: DinoSRForPreTraining) -> DinoSRForPreTraining:
    """In training mode, so that the codebooks learn, but with neither dropout nor layerdrop."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def complaints(size: str, waveforms: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """What is wrong with the step: nothing, it is hoped."""
    losses, models = {}, {}
    for attention in ATTENTIONS:
        models[attention] = without_noise(make_model(size, attention, waveforms.device))
        losses[attention] = models[attention](waveforms, mask_time_indices=mask).loss.item()
    halves = without_noise(make_model(size, "sdpa", waveforms.device))
    for half, half_mask in zip(waveforms.tensor_split(2), mask.tensor_split(2), strict=True):
        halves(half, mask_time_indices=half_mask)
    whole = models["sdpa"]
    whole.update_targets(1)
    halves.update_targets(1)
    found = []
    if not abs(losses["eager"] - losses["sdpa"]) <= LOSS_TOLERANCE:
        found.append(f"eager and sdpa attention give different losses: {losses}")
    for name, right in whole.codebooks.named_parameters():
        difference = (right - halves.codebooks.get_parameter(name)).norm() / right.norm()
        if not difference <= CODEBOOK_TOLERANCE:
            found.append(f"two halves of a batch give other codebooks than the whole: {name} by {difference:.1e}")
    return found


def make_step(model: DinoSRForPreTraining, waveforms: torch.Tensor, mask: torch.Tensor) -> Callable[[], float]:
    """A function that takes a step and returns its seconds."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    taken = 0

    def step() -> float:
        nonlocal taken
        taken += 1
        since = time.perf_counter()
        model(waveforms, mask_time_indices=mask).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_targets(taken)
        if waveforms.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - since

    return step


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    waveforms = torch.randn(options.batch, int(options.seconds * SAMPLING_RATE), generator=generator).to(device)
    config = make_model(options.size, "sdpa", torch.device("meta")).config
    mask = torch.rand(options.batch, config.num_frames(waveforms.shape[1]), generator=generator) < 0.57
    mask = mask.to(device)
    if found := complaints(options.size, waveforms, mask):
        sys.exit("Not timed, because it is wrong: " + "; ".join(found))

    steps = {name: make_step(make_model(options.size, name, device), waveforms, mask) for name in ATTENTIONS}
    for step in steps.values():  # warm-up
        step()
    times: dict[str, list[float]] = {name: [] for name in ATTENTIONS}
    for _ in range(options.repeats):
        for name, step in steps.items():
            times[name].append(step())

    hardware = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(
        f"{datetime.date.today()}, {hardware}, {options.threads} thread(s), float32, Python"
        f" {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(f"{options.size}: {options.batch} x {options.seconds:g} s a step, {options.repeats} steps of each in turn\n")
    print("| attention | median (s) | min | max | seconds of audio a second |\n|---|---|---|---|---|")
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        speed = options.batch * options.seconds / middle
        print(f"| {name} | {middle:.3f} | {min(seconds):.3f} | {max(seconds):.3f} | {speed:.1f} |")
    ratio = statistics.median(times["eager"]) / statistics.median(times["sdpa"])
    print(f"\neager / sdpa: {ratio:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
