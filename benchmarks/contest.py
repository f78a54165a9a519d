"""Code that benchmarks share: model sizes, contestants that take turns, and a headline of hardware and versions."""

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dinosr_hf import DinoSRConfig
from dinosr_hf.pretraining import parse_arguments
from dinosr_hf.utils.tables import markdown_table

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"
SAMPLING_RATE = 16_000
SIZES = ("tiny", "base")


# Five convolutions with longer strides, half the work of the paper's seven.
TINY_AS_IN_THE_PAPER = {
    "feature_encoder": "conv",
    "num_anchor_labels": 0,
    "conv_dim": [64, 64, 96, 128, 128],
    "conv_kernel": [20, 8, 4, 4, 4],
    "conv_stride": [10, 4, 2, 2, 2],
    "codebook_revival_share": 0.0,
}


def model_config(size: str) -> DinoSRConfig:
    """Return the configuration of the paper's model, "base", or "tiny": the demo's size, with the paper's parts."""
    if size == "base":
        return DinoSRConfig()
    return DinoSRConfig(
        **{**parse_arguments([], CONFIGS / "tiny_cpu.yaml").model_config().to_dict(), **TINY_AS_IN_THE_PAPER}
    )


def at_least(least: float) -> Callable[[str], float]:
    """Return a type of options: numbers of at least so much, whole ones if `least` is an int."""

    def number(text: str) -> float:
        if not (value := type(least)(text)) >= least:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}.")
        return value

    return number


def timing_parser(description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """Return a parser of the options of all benchmarks that time forms in turn."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=at_least(1), default=repeats, help="number of timed runs (%(default)s)")
    parser.add_argument(
        "--threads", type=at_least(1), default=torch.get_num_threads(), help="number of CPU threads (%(default)s)"
    )
    return parser


def add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="tiny", help="the demo's model or the paper's (%(default)s)")


def contest_parser(
    description: str | None, *, batch: int, repeats: int, smallest_batch: int = 1
) -> argparse.ArgumentParser:
    """Return a parser of the options that all benchmarks with contestants in processes of their own have."""
    parser = timing_parser(description, repeats=repeats)
    add_size(parser)
    parser.add_argument(
        "--batch", type=at_least(smallest_batch), default=batch, help="number of utterances (%(default)s)"
    )
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # the contestant that a process is
    return parser


def choose_device(threads: int) -> torch.device:
    """Return a GPU if there is one, otherwise the CPU; set the number of its threads, and float32 without TF32."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # else the checks fail: it moves frames to other codewords
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def processor() -> str:
    """Return the name of the CPU, the fastest matrix instructions that it has, and the variables that forbid some."""
    name, flags = platform.processor() or platform.machine(), set()
    if (info := Path("/proc/cpuinfo")).exists():  # Linux
        found = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        found = {key.strip(): value.strip() for key, value in found.items()}
        name, flags = found.get("model name", name), set(found.get("flags", "").split())
    fastest = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags), "")
    limits = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")
    return " ".join([name, *filter(None, [fastest]), *(f"{n}={os.environ[n]}" for n in limits if n in os.environ)])


def headline(device: torch.device, threads: int, *packages: str, precision: str = "float32") -> str:
    """Return date, hardware, precision, and versions of Python, torch and further packages."""
    return f"{datetime.date.today()}, {describe_machine(device, threads, *packages, precision=precision)}"


def describe_machine(device: torch.device, threads: int, *packages: str, precision: str = "float32") -> str:
    """Return the headline without its date."""
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    versions += [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return f"{hardware}, {threads} thread(s), {precision}, {', '.join(versions)}"


def require_spidr(peers: Collection[str], size: str) -> None:
    """Exit if spidr is asked for as a baseline and cannot be one."""
    if "spidr" in peers and size != "base":
        sys.exit("--peers spidr needs --size base, the only size that spidr has.")
    if "spidr" in peers and importlib.util.find_spec("spidr") is None:
        sys.exit("spidr is not installed: pip install spidr (Python 3.12 or newer), or remove it from --peers.")


_ATEN = torch.ops.aten
_FORMULAS = {
    **flop_registry,
    # Which torch's registry lacks: the product in place, and attention on CPUs.
    _ATEN.addmm_: flop_registry[_ATEN.addmm],
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}


class CountOperations(TorchDispatchMode):
    """`FlopCounterMode` without its hooks on all modules, which switch the model's fast forms off."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if count := _FORMULAS.get(function._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=output)
        return output


def time_in_turn(forms: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Run functions in turn in this process, A B A B; return the seconds of each run."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            since = time.perf_counter()
            form()
            wait_for(device)
            times[name].append(time.perf_counter() - since)
    return times


def peak_gib(device: torch.device) -> float:
    """Return the peak memory of this process on the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
    # On Linux, ru_maxrss is at least what the process had that started this one.
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def serve(step: Callable[[], Any], device: torch.device, summarize: Callable[[], Mapping[str, Any]] = dict) -> None:
    """
    Serve as a contestant in a process of its own: take a step for each line of stdin, and answer with the seconds.

    Args:
        step: Function that takes a step; it is called once before, for warming up.
        device: Device that it runs on.
        summarize: Function that returns what to report at the end besides peak memory.
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
    print(json.dumps({"gib": peak_gib(device), **summarize()}), flush=True)


def compete(script: str, names: Sequence[str], argv: Sequence[str], repeats: int) -> dict[str, dict[str, Any]]:
    """
    Run contestants step by step in turn, each the script in a process of its own with `--serve NAME`.

    Returns:
        For each, the `times` of its steps in seconds, its peak memory `gib`, and what its `summarize` returned.
    """
    gc.collect()
    torch.cuda.empty_cache()  # memory of the check, for the contestants
    command = [sys.executable, script, *argv]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = {name: subprocess.Popen([*command, "--serve", name], **pipes) for name in names}
    found: dict[str, dict[str, Any]] = {name: {"times": []} for name in names}
    try:
        for name, process in running.items():
            if not process.stdout.readline():
                sys.exit(f"The contestant {name} did not start; its message is above.")
        for _ in range(repeats):
            for name, process in running.items():
                process.stdin.write("step\n")
                process.stdin.flush()
                if not (line := process.stdout.readline()):
                    sys.exit(f"The contestant {name} failed; its message is above.")
                found[name]["times"].append(json.loads(line)["seconds"])
        for name, process in running.items():
            process.stdin.write("end\n")
            process.stdin.flush()
            found[name] |= json.loads(process.stdout.readline())
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return found


def print_times(
    heading: str,
    times: Mapping[str, Sequence[float]],
    others: Callable[[str, float], Mapping[str, str]] = lambda name, median: {},
) -> None:
    """Print a table of the seconds of runs by name; `others` returns a row's further cells from name and median."""
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        spread = {"median (s)": median, "min": min(seconds), "max": max(seconds)}
        cells = {column: f"{value:.3f}" for column, value in spread.items()}
        rows.append({heading: name, **cells, **others(name, median)})
    print(markdown_table([*rows[0]], [[*row.values()] for row in rows]), end="", flush=True)


def print_contest(
    found: Mapping[str, Mapping[str, Any]],
    audio: float,
    others: Callable[[float], Mapping[str, str]] = lambda median: {},
    compared: Mapping[str, str] = {},
) -> None:
    """Print a table of the results of `compete`, for steps of `audio` seconds, with ratios to "ours" or `compared`."""
    times = {name: one["times"] for name, one in found.items()}

    def cells(name: str, median: float) -> dict[str, str]:
        ours = statistics.median(times[compared.get(name, "ours")])
        own = {"audio s/s": f"{audio / median:.1f}", "peak GiB": f"{found[name]['gib']:.2f}"}
        return {**own, **others(median), "ours / it": f"{ours / median:.2f}"}

    print_times("contestant", times, cells)
