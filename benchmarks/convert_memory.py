"""
Measure the peak memory of converting a checkpoint, relative to the size of its file.

    python benchmarks/convert_memory.py --size base

The script writes a checkpoint of random weights in the authors' layout, with the optimizer's state if asked for. It
converts it in a separate process and reads that process's peak at its end (from /proc: Linux only); for comparison, it
measures a process that only imports the same code. The converted weights are compared with the file's before anything
is printed.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from contest import add_size, headline, model_config

from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.hub.conversion.fairseq import to_fairseq

CHILD = """
import re, sys
from dinosr_hf.hub.conversion import convert
if len(sys.argv) > 1:
    convert(sys.argv[1], sys.argv[2])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the memory of a conversion.")
    add_size(parser)
    parser.add_argument("--optimizer", action="store_true", help="add the optimizer's two moments to the file")
    return parser.parse_args(argv)


def write_checkpoint(size: str, optimizer: bool, file: Path) -> dict[str, torch.Tensor]:
    """Write random weights in the authors' layout; return them by this package's names."""
    torch.manual_seed(0)
    model = DinoSRForPreTraining(model_config(size))
    checkpoint = to_fairseq(model)
    if optimizer:
        moments = [{"exp_avg": p.detach().clone(), "exp_avg_sq": p.detach() ** 2} for p in model.dinosr.parameters()]
        checkpoint["last_optimizer_state"] = {"state": dict(enumerate(moments))}
    torch.save(checkpoint, file)
    return model.state_dict()


def peak_bytes(*arguments: str) -> int:
    """Return the peak resident memory of a process, which includes mapped pages of files."""
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    with tempfile.TemporaryDirectory() as place:
        file, out = Path(place, "checkpoint.pt"), Path(place, "out")
        weights = write_checkpoint(options.size, options.optimizer, file)
        before = peak_bytes()
        start = time.perf_counter()
        peak = peak_bytes(str(file), str(out))
        seconds = time.perf_counter() - start
        converted = DinoSRForPreTraining.from_pretrained(out).state_dict()
        if not all(torch.equal(tensor, converted[name]) for name, tensor in weights.items()):
            sys.exit("The converted weights differ from the file's, so nothing is reported.")
        size = file.stat().st_size
    print(headline(torch.device("cpu"), torch.get_num_threads(), "transformers"))
    print(f"file                              {size / 1e6:8.0f} MB" + (", with moments" if options.optimizer else ""))
    print(f"peak of a process that imports    {before / 1e6:8.0f} MB")
    print(f"peak of a process that converts   {peak / 1e6:8.0f} MB, {peak / size:.2f} times the file, {seconds:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
