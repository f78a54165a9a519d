"""
Measure how time and memory of a training step grow with batch, seconds, layers, codewords and processes.

    python benchmarks/scaling.py --size base --seconds 4 --repeats 3 --threads 2 --axes batch seconds layers codewords

One axis changes at a time. Each value runs in its own process, and they take steps in turn. Nothing is timed unless
the checks of `train_step.py` hold. The table of an axis has the time and the counted operations relative to the first
value: time should grow no faster. Along `processes`, all processes share batch and threads (gloo on CPUs, nccl on
GPUs), and the memory is that of the first.
"""

import argparse
import copy
import os
import socket
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from contest import CountOperations, at_least, choose_device, compete, contest_parser, headline, print_times, serve
from torch.nn.parallel import DistributedDataParallel
from train_step import find_errors, make_inputs, our_step

AXES = {
    "batch": (1, 2, 4, 8),
    "seconds": (2, 4, 8, 16),
    "layers": (8, 12, 16),
    "codewords": (256, 1_024, 2_048),
    "processes": (1, 2),
}
ENVIRONMENT = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = contest_parser(__doc__, batch=4, repeats=5, smallest_batch=2)
    parser.add_argument(
        "--seconds", type=at_least(0.5), default=4.0, help="length of an utterance along the other axes (%(default)s)"
    )
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="what to vary (all)")
    return parser.parse_args(argv)


def at(options: argparse.Namespace, axis: str, value: int) -> tuple[argparse.Namespace, dict[str, int]]:
    """Return the options and the changes of the configuration at a value of an axis."""
    options = copy.copy(options)
    if axis in ("batch", "seconds"):
        setattr(options, axis, value)
    changes = {"layers": {"num_hidden_layers": value}, "codewords": {"codebook_size": value}}
    return options, changes.get(axis, {})


def rank_step(rank: int, world_size: int, port: int, options: argparse.Namespace) -> Callable[..., bool]:
    """Return a function that takes a step of one of several processes, or ends, as the first process decides."""
    os.environ |= dict(zip(ENVIRONMENT, ("127.0.0.1", str(port), str(rank), str(world_size)), strict=True))
    device = choose_device(max(1, options.threads // world_size))
    if device.type == "cuda":
        if torch.cuda.device_count() < world_size:
            sys.exit(f"{world_size} processes need as many GPUs. Leave the axis processes out of --axes.")
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    share = copy.copy(options)
    share.batch = max(1, options.batch // world_size)
    step = our_step("ours", share, device, wrap=DistributedDataParallel)
    signal = torch.zeros(1, device=device)

    def step_together(go: bool = True) -> bool:
        dist.broadcast(signal.fill_(go), 0)
        if goes_on := bool(signal):
            step()
        return goes_on

    return step_together


def follow(rank: int, world_size: int, port: int, options: argparse.Namespace) -> None:
    """Take a step in a further process whenever the first process does."""
    step = rank_step(rank, world_size, port, options)
    while step():
        pass


def run_contestant(options: argparse.Namespace) -> None:
    axis, number = options.serve.split("=")
    here, changes = at(options, axis, int(number))
    world_size = int(number) if axis == "processes" else 1
    if world_size == 1:
        device = choose_device(options.threads)
        step = our_step("ours", here, device, **changes)
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start = torch.multiprocessing.get_context("spawn").Process
        for rank in range(1, world_size):
            start(target=follow, args=(rank, world_size, port, here), daemon=True).start()
        step = rank_step(0, world_size, port, here)
        device = choose_device(max(1, options.threads // world_size))
    with CountOperations() as counter:
        step()
    operations = counter.total * world_size

    def summarize() -> dict[str, int]:
        if world_size > 1:
            step(False)
        return {"operations": operations}

    serve(step, device, summarize)


def print_axis(axis: str, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table of an axis from what `compete` returned for its values."""
    first = next(iter(found))
    base = statistics.median(found[first]["times"])
    memory = "peak GiB of the first process" if axis == "processes" else "peak GiB"

    def growth(name: str, median: float) -> dict[str, str]:
        time, operations = median / base, found[name]["operations"] / found[first]["operations"]
        return {
            "time": f"{time:.2f}",
            "operations": f"{operations:.2f}",
            "time per operation": f"{time / operations:.2f}",
            memory: f"{found[name]['gib']:.2f}",
        }

    print_times(axis, {name: one["times"] for name, one in found.items()}, growth)
    print()


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    if options.serve:
        run_contestant(options)
        return
    device = choose_device(options.threads)
    if found := find_errors(options.size, *make_inputs(options, device)):
        sys.exit("Nothing was timed: " + "; ".join(found))
    print(headline(device, options.threads, "transformers", precision="bf16" if options.bf16 else "float32"))
    print(f"{options.size}: {options.batch} x {options.seconds:g} s unless varied; {options.repeats} steps in turn\n")
    for axis in options.axes:
        found = compete(__file__, [f"{axis}={value}" for value in AXES[axis]], argv, options.repeats)
        print_axis(axis, {f"{value:,}": one for value, one in zip(AXES[axis], found.values(), strict=True)})


if __name__ == "__main__":
    main(sys.argv[1:])
