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
import datetime
import importlib.metadata
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.data2vec.modeling_data2vec_audio import Data2VecAudioConfig, Data2VecAudioFeatureEncoder

from dinosr_hf import DinoSRConfig, DinoSRForPreTraining
from dinosr_hf.pretraining import parse_arguments

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"
SAMPLING_RATE = 16_000
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "base"), default="tiny", help="the demo's model or the paper's")
    parser.add_argument("--batch", type=int, default=4, help="utterances, at least 2")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each, at least 0.5")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps of each contestant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile all contestants")
    parser.add_argument("--peers", nargs="+", choices=("spidr", "conv1d", "eager"), default=["eager"])
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # what a contestant's own process is told
    options = parser.parse_args(argv)
    if options.batch < 2 or options.seconds < 0.5 or options.repeats < 1 or options.threads < 1:
        parser.error("--batch must be at least 2, --seconds 0.5, --repeats and --threads 1.")
    if "spidr" in options.peers and options.size != "base":
        parser.error("--peers spidr is for --size base, the size that it has.")
    return options


def make_model(size: str, attention: str, device: torch.device) -> DinoSRForPreTraining:
    config = DinoSRConfig()
    if size == "tiny":
        config = parse_arguments([], CONFIGS / "tiny_cpu.yaml").model_config()
    torch.manual_seed(0)
    model = DinoSRForPreTraining(config).to(device)
    model.set_attn_implementation(attention)
    return model


def make_inputs(options: argparse.Namespace, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (B, S) and a mask (B, T), the same for all; each utterance has as many masked frames."""
    generator = torch.Generator().manual_seed(0)
    waveforms = torch.randn(options.batch, int(options.seconds * SAMPLING_RATE), generator=generator)
    config = make_model(options.size, "sdpa", torch.device("meta")).config
    num_frames = config.num_frames(waveforms.shape[1])
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
    name: str, options: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], None], torch.nn.Module]:
    """A function that takes a step, and the model."""
    model = make_model(options.size, "eager" if name == "eager" else "sdpa", device).train()
    if name == "conv1d":
        model.dinosr.feature_extractor = _UsualConvolutions(model.config).to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)  # as pretraining does
    waveforms, mask = make_inputs(options, device)
    forward = torch.compile(model) if options.compile else model
    taken = 0

    def step() -> None:
        nonlocal taken
        taken += 1
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            loss = forward(waveforms, mask_time_indices=mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_targets(taken)

    return step, model


def spidr_step(options: argparse.Namespace, device: torch.device) -> tuple[Callable[[], None], torch.nn.Module]:
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

    return step, model


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


def serve(options: argparse.Namespace) -> None:
    """A contestant: a step for each line it reads, and its seconds; at the end what it knows of itself."""
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = options.serve
    step, model = spidr_step(options, device) if name == "spidr" else our_step(name, options, device)
    with FlopCounterMode(display=False) if name == "ours" else contextlib.nullcontext() as counter:
        step()  # warm-up
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}), flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        since = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(json.dumps({"seconds": time.perf_counter() - since}), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    about = {"gib": peak, "operations": counter.get_total_flops() if counter else None, "parts": share_of_parts(step)}
    print(json.dumps(about), flush=True)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, at its fastest."""
    size = 8_192 if device.type == "cuda" else 2_048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(10):
        since = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - since)
    return 2 * size**3 / min(times)


def compete(names: Sequence[str], argv: Sequence[str], repeats: int) -> dict[str, dict]:
    """Run contestants in processes of their own, step by step in turn."""
    command = [sys.executable, __file__, *argv]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = {name: subprocess.Popen([*command, "--serve", name], **pipes) for name in names}
    found: dict[str, dict] = {}
    try:
        for name, process in running.items():  # one after the other is ready
            found[name] = {"times": [], **json.loads(process.stdout.readline() or '{"failed": true}')}
            if "failed" in found[name]:
                sys.exit(f"The contestant {name} did not start; its message is above.")
        for _ in range(repeats):
            for name, process in running.items():
                process.stdin.write("step\n")
                process.stdin.flush()
                found[name]["times"].append(json.loads(process.stdout.readline())["seconds"])
        for name, process in running.items():
            process.stdin.write("end\n")
            process.stdin.flush()
            found[name] |= json.loads(process.stdout.readline())
    finally:
        for process in running.values():
            process.kill()
    return found


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
    if options.serve:
        serve(options)
        return
    if "spidr" in options.peers and importlib.util.find_spec("spidr") is None:
        sys.exit("spidr is not installed: pip install spidr (Python 3.12 or newer), or leave it out of --peers.")
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if found := complaints(options.size, *make_inputs(options, device)):
        sys.exit("Not timed, because it is wrong: " + "; ".join(found))
    results = compete(["ours", *options.peers], argv, options.repeats)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if "spidr" in options.peers:
        versions += f", spidr {importlib.metadata.version('spidr')}"
    print(
        f"{datetime.date.today()}, {hardware}, {options.threads} thread(s), {'bf16' if options.bf16 else 'float32'},"
        f" Python {platform.python_version()}, {versions}"
    )
    print(f"{options.size}: {options.batch} x {options.seconds:g} s a step, {options.repeats} steps of each in turn\n")
    report(results, options, device)


if __name__ == "__main__":
    main(sys.argv[1:])
