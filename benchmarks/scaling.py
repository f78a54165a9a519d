"""
How do time and memory of a training step grow: with the batch, seconds, layers, codewords, processes?

    python benchmarks/scaling.py --size base --seconds 4 --repeats 3 --threads 2 --axes batch seconds layers codewords

Along each axis all else stays; each value is a process of its own, and they take steps in turn. Before, what
`train_step.py` checks must hold, or nothing is timed. Beside the time stand the operations, counted, both relative to
the first value: time should grow no faster. Along `processes` batch and threads are shared by all of them (gloo on
CPUs, nccl on GPUs).
"""

import argparse
import copy
import os
import socket
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from contest import choose_device, compete, contest_parser, headline, parse_contest, serve
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from train_step import complaints, make_inputs, our_step

AXES = {
    "batch": (1, 2, 4, 8),
    "seconds": (2, 4, 8, 16),
    "layers": (8, 12, 16),
    "codewords": (256, 1_024, 2_048),
    "processes": (1, 2),
}
ENVIRONMENT = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = contest_parser("Time a training step along axes.", batch=4, repeats=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each, where the axis is another")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    options = parse_contest(parser, argv, smallest_batch=2)
    if options.seconds < 0.5:
        parser.error("--seconds must be at least 0.5.")
    return options


def at(options: argparse.Namespace, axis: str, value: int) -> tuple[argparse.Namespace, dict[str, int]]:
    """Options and changes of the configuration at a value of an axis."""
    options = copy.copy(options)
    if axis in ("batch", "seconds"):
        setattr(options, axis, value)
    changes = {"layers": {"num_hidden_layers": value}, "codewords": {"codebook_size": value}}
    return options, changes.get(axis, {})


def rank_step(rank: int, world_size: int, port: int, options: argparse.Namespace) -> Callable[..., bool]:
    """A step of one of several processes, with its share of the batch, if the first is told to go on and says so."""
    os.environ |= dict(zip(ENVIRONMENT, ("127.0.0.1", str(port), str(rank), str(world_size)), strict=True))
    device = choose_device(max(1, options.threads // world_size))
    if device.type == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    share = copy.copy(options)
    share.batch = max(1, options.batch // world_size)
    step = our_step("ours", share, device, wrap=DistributedDataParallel)
    signal = torch.zeros(1, device=device)

    def step_together(go: bool = True) -> bool:
        dist.broadcast(signal.fill_(go), 0)
        if is_told := bool(signal):
            step()
        return is_told

    return step_together


def follow(rank: int, world_size: int, port: int, options: argparse.Namespace) -> None:
    """A further process: it takes a step whenever the first does."""
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
    with FlopCounterMode(display=False) as counter:
        step()
    operations = counter.get_total_flops() * world_size

    def about() -> dict[str, int]:
        if world_size > 1:
            step(False)
        return {"operations": operations}

    serve(step, device, about)


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    if options.serve:
        run_contestant(options)
        return
    device = choose_device(options.threads)
    if found := complaints(options.size, *make_inputs(options, device)):
        sys.exit("Not timed, because it is wrong: " + "; ".join(found))
    print(headline(device, options.threads, "transformers", precision="bf16" if options.bf16 else "float32"))
    print(f"{options.size}: {options.batch} x {options.seconds:g} s where not said; {options.repeats} steps in turn\n")
    print("| axis | value | median (s) | min | max | time | operations | time an operation | peak GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for axis in options.axes:
        names = {f"{axis}={value}": value for value in AXES[axis]}
        found = compete(__file__, list(names), argv, options.repeats)
        first = next(iter(found.values()))
        for name, one in found.items():
            middle = statistics.median(one["times"])
            time = middle / statistics.median(first["times"])
            operations = one["operations"] / first["operations"]
            print(
                f"| {axis} | {names[name]:,} | {middle:.3f} | {min(one['times']):.3f} | {max(one['times']):.3f} |"
                f" {time:.2f} | {operations:.2f} | {time / operations:.2f} | {one['gib']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
