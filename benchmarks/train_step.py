"""
Time an optimizer step of pre-training: student, teacher, loss, backward pass, AdamW, codebooks and EMA.

    python benchmarks/train_step.py --size base --batch 4 --seconds 5 --repeats 5 --threads 2 --peers spidr

Nothing is timed unless eager and sdpa attention give the same loss, and two halves of a batch the same codebooks as
the whole batch. Each contestant runs in its own process, and they take steps in turn. Baselines: `spidr`, Meta's
package (`pip install spidr`, Python 3.12; its licence is CC BY-NC 4.0), with its own optimizer; `conv1d`, our model
with transformers' Data2VecAudio convolutions; `eager`, our model with eager attention. `ours compiled` and `spidr
compiled` are forms compiled with `torch.compile`.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from contest import (
    SAMPLING_RATE,
    CountOperations,
    at_least,
    choose_device,
    compete,
    contest_parser,
    headline,
    model_config,
    print_contest,
    require_spidr,
    serve,
    wait_for,
)
from transformers.models.data2vec.modeling_data2vec_audio import Data2VecAudioConfig, Data2VecAudioFeatureEncoder

from dinosr_hf import DinoSRConfig, DinoSRForPreTraining

# Losses are a few nats; kernels differ by about 1e-5 (tests/tolerances.py).
LOSS_TOLERANCE = 1e-4
# Relative to the norm. Rounding may move a frame between two codewords; a wrong update moves many.
CODEBOOK_TOLERANCE = 1e-2
MASKED_SHARE = 0.57
# Name of a part -> words in the names of torch's operations. The first part that matches counts.
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
    parser = contest_parser(__doc__, batch=4, repeats=10, smallest_batch=2)
    parser.add_argument("--seconds", type=at_least(0.5), default=4.0, help="length of an utterance (%(default)s)")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=("spidr", "conv1d", "eager", "ours compiled", "spidr compiled"),
        default=["eager"],
        help="baselines to compare with (%(default)s)",
    )
    return parser.parse_args(argv)


def make_model(size: str, attention: str, device: torch.device, **changes: Any) -> DinoSRForPreTraining:
    torch.manual_seed(0)
    config = model_config(size)
    model = DinoSRForPreTraining(type(config)(**{**config.to_diff_dict(), **changes})).to(device)
    model.set_attn_implementation(attention)
    return model


def make_inputs(options: argparse.Namespace, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise (B, S) and a mask (B, T) with equally many masked frames per utterance, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    waveforms = torch.randn(options.batch, int(options.seconds * SAMPLING_RATE), generator=generator)
    num_frames = model_config(options.size).num_frames(waveforms.shape[1])
    order = torch.rand(options.batch, num_frames, generator=generator).argsort(dim=1)
    mask = order < round(MASKED_SHARE * num_frames)
    return waveforms.to(device), mask.to(device)


def disable_dropout(model: DinoSRForPreTraining) -> DinoSRForPreTraining:
    """Set training mode, so that codebooks are updated, without dropout and layerdrop."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def find_errors(size: str, waveforms: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """Return what is wrong with the step; an empty list if nothing is."""
    losses, models = {}, {}
    for attention in ("eager", "sdpa"):
        models[attention] = disable_dropout(make_model(size, attention, waveforms.device))
        losses[attention] = models[attention](waveforms, mask_time_indices=mask).loss.item()
    halves = disable_dropout(make_model(size, "sdpa", waveforms.device))
    for half, half_mask in zip(waveforms.tensor_split(2), mask.tensor_split(2), strict=True):
        halves(half, mask_time_indices=half_mask)
    whole = models["sdpa"]
    whole.update_targets(1)
    halves.update_targets(1)
    errors = []
    if not abs(losses["eager"] - losses["sdpa"]) <= LOSS_TOLERANCE:
        errors.append(f"eager and sdpa attention give different losses: {losses}")
    for name, expected in whole.codebooks.named_parameters():
        difference = (expected - halves.codebooks.get_parameter(name)).norm() / expected.norm()
        if not difference <= CODEBOOK_TOLERANCE:
            errors.append(f"two halves of a batch give other codebooks than the whole: {name} by {difference:.1e}")
    return errors


class _Data2VecConvolutions(torch.nn.Module):
    """Wrap transformers' convolutions, whose layers take (B, C, T), in our interface."""

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
    """
    Return a function that takes one optimizer step of our model.

    `wrap` is applied to the model, for example by DistributedDataParallel; `changes` override its configuration.
    """
    model = make_model(options.size, "eager" if name == "eager" else "sdpa", device, **changes).train()
    if name == "conv1d":
        model.dinosr.feature_extractor = _Data2VecConvolutions(model.config).to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)  # as in pre-training
    waveforms, mask = make_inputs(options, device)
    masked_frames = mask.flatten().nonzero()[:, 0]
    wrapped = wrap(model)
    forward = torch.compile(wrapped) if name.endswith("compiled") else wrapped
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


def spidr_step(name: str, options: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """Return a function that takes one step of spidr's model, by its public interface and with its own optimizer."""
    from spidr.config import DinoSRConfig as SpidrConfig  # type: ignore[import-not-found]
    from spidr.config import OptimizerConfig
    from spidr.models import DinoSR
    from spidr.optimizer import build_optimizer

    torch.manual_seed(0)
    model = DinoSR(SpidrConfig()).to(device).train()
    settings = OptimizerConfig(dtype="bfloat16" if options.bf16 else "float32")
    optimizer, _, _ = build_optimizer(model, settings)
    waveforms, mask = make_inputs(options, device)
    indices = mask.nonzero()[:, 1].view(options.batch, -1)  # spidr takes the indices of the masked frames
    forward = torch.compile(model) if name.endswith("compiled") else model
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


def profile_parts(step: Callable[[], None]) -> dict[str, float]:
    """Return the share of a step's time that each part takes, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    is_cuda = torch.cuda.is_available()
    if is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
    times: dict[str, float] = dict.fromkeys([*PARTS, "other"], 0.0)
    for event in profile.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel, whose time its operator has too
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
    """Serve one contestant in its own process; ours also reports its operations and the time per part."""
    name = options.serve
    step = (spidr_step if name.startswith("spidr") else our_step)(name, options, device)
    with CountOperations() if name == "ours" else contextlib.nullcontext() as counter:
        step()

    def about() -> Mapping[str, Any]:
        return {"operations": counter.total, "parts": profile_parts(step)} if counter else {}

    serve(step, device, about)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of the fastest of ten large matrix products."""
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
    rate = matrix_rate(device, torch.bfloat16 if options.bf16 else torch.float32)

    def speed(median: float) -> dict[str, str]:
        # All do the same work, so our count of operations is used for all.
        operations = found["ours"]["operations"] / median
        return {"TFLOP/s": f"{operations / 1e12:.2f}", "of matrix rate": f"{operations / rate:.0%}"}

    print_contest(found, options.batch * options.seconds, speed)
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
    packages = {"transformers", *(name.split()[0] for name in options.peers)} & {"transformers", "spidr"}
    require_spidr(packages, options.size)
    if errors := find_errors(options.size, *make_inputs(options, device)):
        sys.exit("Nothing was timed: " + "; ".join(errors))
    results = compete(__file__, ["ours", *options.peers], argv, options.repeats)
    print(headline(device, options.threads, *sorted(packages), precision="bf16" if options.bf16 else "float32"))
    print(f"{options.size}: {options.batch} x {options.seconds:g} s a step, {options.repeats} steps of each in turn\n")
    report(results, options, device)


if __name__ == "__main__":
    main(sys.argv[1:])
