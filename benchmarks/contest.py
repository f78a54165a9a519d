"""What the benchmarks share: sizes of models, contestants that take turns, and the line about machine and versions."""

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dinosr_hf import DinoSRConfig
from dinosr_hf.pretraining import parse_arguments

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"
SAMPLING_RATE = 16_000
SIZES = ("tiny", "base")


def model_config(size: str) -> DinoSRConfig:
    """Of the paper's model, "base", or of the demo's, "tiny"."""
    return DinoSRConfig() if size == "base" else parse_arguments([], CONFIGS / "tiny_cpu.yaml").model_config()


def contest_parser(description: str | None, *, batch: int, repeats: int) -> argparse.ArgumentParser:
    """What every benchmark takes whose contestants are processes of their own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="the demo's model or the paper's")
    parser.add_argument("--batch", type=int, default=batch, help="utterances")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed steps of each contestant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # what a contestant's own process is told
    return parser


def parse_contest(parser: argparse.ArgumentParser, argv: Sequence[str], *, smallest_batch: int) -> argparse.Namespace:
    """The options, checked as far as all have them."""
    options = parser.parse_args(argv)
    if options.batch < smallest_batch or options.repeats < 1 or options.threads < 1:
        parser.error(f"--batch must be at least {smallest_batch}, --repeats and --threads 1.")
    return options


def choose_device(threads: int) -> torch.device:
    """A GPU if there is one, else so many threads of the CPU."""
    torch.set_num_threads(threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def headline(device: torch.device, threads: int, *packages: str, precision: str = "float32") -> str:
    """Date, hardware and versions: of Python, torch and further packages."""
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    versions += [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return f"{datetime.date.today()}, {hardware}, {threads} thread(s), {precision}, {', '.join(versions)}"


def require_spidr(peers: Sequence[str], size: str) -> None:
    """End the program, with what to do, where spidr is a peer and cannot be one."""
    if "spidr" in peers and size != "base":
        sys.exit("--peers spidr is for --size base, the size that it has.")
    if "spidr" in peers and importlib.util.find_spec("spidr") is None:
        sys.exit("spidr is not installed: pip install spidr (Python 3.12 or newer), or leave it out of --peers.")


def time_in_turn(forms: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run of each form, in this process: A B A B."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            since = time.perf_counter()
            form()
            wait_for(device)
            times[name].append(time.perf_counter() - since)
    return times


def serve(step: Callable[[], Any], device: torch.device, about: Callable[[], Mapping[str, Any]] = dict) -> None:
    """
    A contestant in a process of its own: it takes a step for each line it reads and answers with the seconds.

    Args:
        step: Taken once before for warming up.
        device: Where it runs.
        about: What else is told at the end, beside the peak of memory.
    """
    step()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        since = time.perf_counter()
        step()
        wait_for(device)
        print(json.dumps({"seconds": time.perf_counter() - since}), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps({"gib": peak, **about()}), flush=True)


def compete(script: str, names: Sequence[str], argv: Sequence[str], repeats: int) -> dict[str, dict[str, Any]]:
    """
    Run contestants, each the script in a process of its own with `--serve NAME`, step by step in turn.

    Returns:
        What each told: `times` of its steps in seconds, `gib` of memory at its peak, and what else it says.
    """
    gc.collect()
    command = [sys.executable, script, *argv]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = {name: subprocess.Popen([*command, "--serve", name], **pipes) for name in names}
    found: dict[str, dict[str, Any]] = {name: {"times": []} for name in names}
    try:
        for name, process in running.items():  # one after the other is ready
            if not process.stdout.readline():
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


def print_times(found: Mapping[str, Mapping[str, Any]], audio: float) -> None:
    """A table of what `compete` found, with `audio` seconds a step; all are set beside the contestant "ours"."""
    ours = statistics.median(found["ours"]["times"])
    print("| contestant | median (s) | min | max | audio s/s | peak GiB | ours / it |")
    print("|---|---|---|---|---|---|---|")
    for name, one in found.items():
        middle = statistics.median(one["times"])
        print(
            f"| {name} | {middle:.3f} | {min(one['times']):.3f} | {max(one['times']):.3f} | {audio / middle:.1f}"
            f" | {one['gib']:.2f} | {ours / middle:.2f} |"
        )
