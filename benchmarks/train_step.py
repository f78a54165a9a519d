"""
How long does an optimizer step of pre-training take: student, teacher, loss, backward, AdamW, codebooks, average?

    python benchmarks/train_step.py --size base --batch 4 --seconds 5 --repeats 5 --threads 2 --peers spidr

Before anything is timed, eager and sdpa attention must give the same loss, and two halves of a batch the same
codebooks as the whole. Then each contestant is a process of its own, and they take steps in turn. Peers: `spidr`,
Meta's package (`pip install spidr`, Python 3.12; its licence is CC BY-NC 4.0), with its own optimizer; `conv1d`, our
model with transformers' Data2VecAudio convolutions in place of ours; `eager`, ours with eager attention.
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from contest import (
    SAMPLING_RATE,
    choose_device,
    compete,
    contest_parser,
    headline,
    model_config,
    parse_contest,
    require_spidr,
    serve,
    wait_for,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.data2vec.modeling_data2vec_audio import Data2VecAudioConfig, Data2VecAudioFeatureEncoder

from dinosr_hf import DinoSRConfig, DinoSRForPreTraining

# Losses are a few nats; kernels differ by about 1e-5 (tests/tolerances.py).
LOSS_TOLERANCE = 1e-4
# Of the norm. A frame between two codewords may change sides by rounding, a wrong update moves many.
CODEBOOK_TOLERANCE = 1e-2
MASKED_SHARE = 0.57
# Names of torch's operations, by what they do; the first that fits counts.
PARTS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear"),
    "attention": ("attention", "softmax"),
    "convolutions": ("conv",),
    "norms": ("norm",),
    "activations": ("gelu",),
    "dropout": ("bernoulli", "dropout", "native_dropout"),
    "optimizer": ("adam", "lerp", "addcdiv", "addcmul"),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = contest_parser(__doc__, batch=4, repeats=10)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each, at least 0.5")
    parser.add_argument("--compile", action="store_true", help="torch.compile all contestants")
    parser.add_argument("--peers", nargs="+", choices=("spidr", "conv1d", "eager"), default=["eager"])
    options = parse_contest(parser, argv, smallest_batch=2)
    if options.seconds < 0.5:
        parser.error("--seconds must be at least 0.5.")
    return options


def make_model(size: str, attention: str, device: torch.device, **changes: Any) -> DinoSRForPreTraining:
    torch.manual_seed(0)
    config = model_config(size)
    model = DinoSRForPreTraining(type(config)(**{**config.to_diff_dict(), **changes})).to(device)
    model.set_attn_implementation(attention)
    return model


def make_inputs(options: argparse.Namespace, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (B, S) and a mask (B, T), the same for all; each utterance has as many masked frames."""
    generator = torch.Generator().manual_seed(0)
    waveforms = torch.randn(options.batch, int(options.seconds * SAMPLING_RATE), generator=generator)
    num_frames = model_config(options.size).num_frames(waveforms.shape[1])
    order = torch.rand(options.batch, num_frames, generator=generator).argsort(dim=1)
    mask = order < round(MASKED_SHARE * num_frames)
    return waveforms.to(device), mask.to(device)


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
    for attention in ("eager", "sdpa"):
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


class _UsualConvolutions(torch.nn.Module):
    """transformers' convolutions under our names: the input of each layer is (B, C, T)."""

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__()
        sizes = {name: getattr(config, name) for name in ("conv_dim", "conv_kernel", "conv_stride", "conv_bias")}
        self.encoder = Data2VecAudioFeatureEncoder(Data2VecAudioConfig(**sizes))

    def forward(self, input_values: torch.Tensor, *_, **__) -> torch.Tensor:
        return self.encoder(input_values)


def our_step(
    name: str,
    options: argparse.Namespace,
    device: torch.device,
    *,
    wrap: Callable[[torch.nn.Module], torch.nn.Module] = lambda model: model,
    **changes: Any,
) -> Callable[[], None]:
    """A function that takes a step, of a model with changes to its configuration, in what may be wrapped around it."""
    model = make_model(options.size, "eager" if name == "eager" else "sdpa", device, **changes).train()
    if name == "conv1d":
        model.dinosr.feature_extractor = _UsualConvolutions(model.config).to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)  # as pretraining does
    waveforms, mask = make_inputs(options, device)
    masked_frames = mask.flatten().nonzero()[:, 0]
    wrapped = wrap(model)
    forward = torch.compile(wrapped) if options.compile else wrapped
    taken = 0

    def step() -> None:
        nonlocal taken
        taken += 1
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            loss = forward(waveforms, mask_time_indices=mask, masked_frames=masked_frames).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_targets(taken)

    return step


def spidr_step(options: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """The same of package spidr, by its public interface, with the optimizer that it builds itself."""
    from spidr.config import DinoSRConfig as PeerConfig  # type: ignore[import-not-found]
    from spidr.config import OptimizerConfig
    from spidr.models import DinoSR
    from spidr.optimizer import build_optimizer

    torch.manual_seed(0)
    model = DinoSR(PeerConfig()).to(device).train()
    settings = OptimizerConfig(dtype="bfloat16" if options.bf16 else "float32")
    optimizer, _, _ = build_optimizer(model, settings)
    waveforms, mask = make_inputs(options, device)
    indices = mask.nonzero()[:, 1].view(options.batch, -1)  # it takes the numbers of the masked frames
    forward = torch.compile(model) if options.compile else model
    taken = 0

    def step() -> None:
        nonlocal taken
        taken += 1
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            losses, _ = forward(waveforms, mask_indices=indices)
            loss = losses.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_ema(taken)

    return step


def share_of_parts(step: Callable[[], None]) -> dict[str, float]:
    """Of the time of a step, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    is_cuda = torch.cuda.is_available()
    if is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
    times: dict[str, float] = dict.fromkeys([*PARTS, "other"], 0.0)
    for event in profile.key_averages():
        own = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        words = event.key.lower().removeprefix("aten::").strip("_")
        part = next(
            (
                name
                for name, keys in PARTS.items()
                if any(key == words or (len(key) > 3 and key in words) for key in keys)
            ),
            "other",
        )
        times[part] += own
    total = sum(times.values())
    return {name: spent / total for name, spent in times.items()}


def run_contestant(options: argparse.Namespace, device: torch.device) -> None:
    """In a process of its own; ours also tells where the time goes."""
    name = options.serve
    step = spidr_step(options, device) if name == "spidr" else our_step(name, options, device)
    with FlopCounterMode(display=False) if name == "ours" else contextlib.nullcontext() as counter:
        step()

    def about() -> Mapping[str, Any]:
        return {"operations": counter.get_total_flops(), "parts": share_of_parts(step)} if counter else {}

    serve(step, device, about)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, at its fastest."""
    size = 8_192 if device.type == "cuda" else 2_048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(10):
        since = time.perf_counter()
        left @ right
        wait_for(device)
        times.append(time.perf_counter() - since)
    return 2 * size**3 / min(times)


def report(found: dict[str, dict], options: argparse.Namespace, device: torch.device) -> None:
    audio = options.batch * options.seconds
    rate = matrix_rate(device, torch.bfloat16 if options.bf16 else torch.float32)
    ours = statistics.median(found["ours"]["times"])
    print("| contestant | median (s) | min | max | audio s/s | peak GiB | TFLOP/s | of matrix rate | ours / it |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, one in found.items():
        middle = statistics.median(one["times"])
        # Each has the same work to do; what ours counts is taken for all.
        speed = found["ours"]["operations"] / middle
        print(
            f"| {name} | {middle:.3f} | {min(one['times']):.3f} | {max(one['times']):.3f} | {audio / middle:.1f}"
            f" | {one['gib']:.2f} | {speed / 1e12:.2f} | {speed / rate:.0%} | {ours / middle:.2f} |"
        )
    memory = {name: found["ours"]["gib"] / one["gib"] for name, one in found.items() if name != "ours"}
    print("\nmemory, ours / it: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in memory.items()))
    parts = sorted(found["ours"]["parts"].items(), key=lambda part: -part[1])
    print("ours spends: " + ", ".join(f"{name} {share:.0%}" for name, share in parts))


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    device = choose_device(options.threads)
    if options.serve:
        run_contestant(options, device)
        return
    require_spidr(options.peers, options.size)
    if found := complaints(options.size, *make_inputs(options, device)):
        sys.exit("Not timed, because it is wrong: " + "; ".join(found))
    results = compete(__file__, ["ours", *options.peers], argv, options.repeats)
    packages = ["transformers", *(["spidr"] if "spidr" in options.peers else [])]
    print(headline(device, options.threads, *packages, precision="bf16" if options.bf16 else "float32"))
    print(f"{options.size}: {options.batch} x {options.seconds:g} s a step, {options.repeats} steps of each in turn\n")
    report(results, options, device)


if __name__ == "__main__":
    main(sys.argv[1:])
