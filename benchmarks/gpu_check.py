"""
Check on one GPU, within eight minutes, the most important of what the benchmarks and the tests check on a CPU.

    python benchmarks/gpu_check.py --output runs/gpu.md
    python benchmarks/gpu_check.py --spidr_python spidr_env/bin/python --parts step compile
    python benchmarks/gpu_check.py --size tiny --minutes 20                # on a CPU, to try the script

Each part runs in a process of its own with a time limit, and may fail alone: the table at the end has its error, and
the exit status is 1. Times, memory and shares of the matrix rate are in bfloat16; audio s/s are hours of audio an
hour.

- parity: forward pass and training against the authors' code (tests/fixtures), in float32 without TF32
- paths: padding with each form of attention, autocast, fused AdamW, waiting for the device
- step, extract, ctc: train_step.py, extract.py, ctc.py; `step` also against spidr, if `--spidr_python` is given
- pretrain: a short run of a recipe by examples/pretrain.py, in float16 on a GPU, stopped by SIGTERM and resumed
- compile: the step compiled with `torch.compile`, ours and spidr's
"""

import argparse
import contextlib
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from contest import CONFIGS, SAMPLING_RATE, SIZES, choose_device, headline
from extract import make_batch, num_samples
from safetensors.torch import load_file
from train_step import disable_dropout, make_inputs, make_model

from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.hub.conversion import convert
from dinosr_hf.utils.files import claim_output_file

ROOT = Path(__file__).parent.parent
# Name of a part -> its seconds at most, of eight minutes. What takes longest comes last and gets what is left.
LIMITS = {"parity": 60, "paths": 60, "step": 100, "extract": 60, "ctc": 60, "pretrain": 120, "compile": 240}
SPREAD = ("min", "max")  # columns that are left out
FLOAT32_TOLERANCE = 1e-3  # of features, which are about 1; as in extract.py
LOW_TOLERANCE = 0.05  # of features and losses in bfloat16 and float16, relative to those in float32
ADAM_TOLERANCE = 1e-5  # of weights after three updates of 1e-3 each


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base", help="the paper's model or the demo's (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS), help="parts to run (all)")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of all parts together (%(default)s)")
    parser.add_argument("--data", nargs="+", default=["synthetic"], help="recordings of `pretrain` (synthetic speech)")
    parser.add_argument("--spidr_python", help="Python in which spidr and this package are installed, to compare with")
    parser.add_argument("--output", type=claim_output_file, help="file to write the table to")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # the part that a process is
    options = parser.parse_args(argv)
    if options.minutes <= 0:
        parser.error(f"--minutes={options.minutes:g} must be above 0.")
    if options.spidr_python and options.size != "base":
        parser.error("--spidr_python needs --size base, the only size that spidr has.")
    if options.spidr_python and not shutil.which(options.spidr_python):
        parser.error(f"--spidr_python={options.spidr_python} cannot be run.")
    return options


def sizes_of_batch(size: str, device: torch.device) -> argparse.Namespace:
    """Return the options of the other benchmarks; four contestants share the GPU, 16 x 15 s each on one of 139 GiB."""
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else 0
    if size == "tiny":
        return argparse.Namespace(size=size, batch=2, repeats=2, seconds=1.0, shortest=0.5, longest=1.0)
    batch = max(2, min(16, int(gib // 8)))
    return argparse.Namespace(size=size, batch=batch, repeats=20, seconds=15.0, shortest=3.0, longest=15.0)


def command_of(part: str, options: argparse.Namespace, device: torch.device) -> list[str]:
    """Return the command of a part, which prints its figures as Markdown tables."""
    if part in SERVED:
        words = ["--size", options.size, "--data", *options.data, "--serve", part]
        return [sys.executable, __file__, *words]
    sizes, python = sizes_of_batch(options.size, device), sys.executable
    script, words = "train_step.py", ["--seconds", f"{sizes.seconds}", "--peers"]
    if part in ("step", "compile"):
        words.append("eager" if part == "step" else "ours compiled")
        if options.spidr_python:
            words.append("spidr" if part == "step" else "spidr compiled")
            python = options.spidr_python
    else:
        script, words = f"{part}.py", ["--shortest", f"{sizes.shortest}", "--longest", f"{sizes.longest}"]
        sizes.batch *= 2 if part == "extract" and options.size == "base" else 1
    both = ["--size", sizes.size, "--batch", f"{sizes.batch}", "--repeats", f"{sizes.repeats}", "--bf16"]
    return [python, str(Path(__file__).with_name(script)), *both, *words]


def rows_of(printed: str) -> list[tuple[str, str]]:
    """Return the rows of the printed tables as their first cell and the others, each with the name of its column."""
    rows, header = [], None
    for line in printed.splitlines():
        if not line.startswith("|"):
            header = None
            continue
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if header is None:
            header = cells
        elif not name.startswith("---") and len(cells) == len(header):  # a part that was killed leaves half a row
            named = [f"{column} {cell}" for column, cell in zip(header, cells, strict=True) if column not in SPREAD]
            rows.append((name, ", ".join(named if len(cells) > 1 else cells)))
    return rows


def run_part(command: Sequence[str], limit: float) -> tuple[list[tuple[str, str]], str | None]:
    """Run the command of a part; return the rows that it printed, and its error if it failed."""
    if limit <= 0:
        return [], "not started: the time of --minutes is over"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with tempfile.TemporaryDirectory() as folder:
        environment["TMPDIR"] = folder  # what a killed process leaves behind
        process = subprocess.Popen(command, **pipes, env=environment, start_new_session=True)
        try:
            printed, messages = process.communicate(timeout=limit)
            error = None if process.returncode == 0 else f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, messages = process.communicate()
            error = f"stopped after its limit of {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # the processes that it started
                os.killpg(process.pid, signal.SIGKILL)
    if error:
        print(messages, file=sys.stderr)
        error = ": ".join([error, *messages.strip().splitlines()[-1:]])
    return rows_of(printed), error


# The parts that this file has itself: each prints a table.


def check_all(checks: Mapping[str, Callable[[], str]]) -> None:
    """Run checks, each of which may fail alone, and print a row for each; exit if any failed."""
    failed = []
    print("| what | figure |\n|---|---|")
    for name, check in checks.items():
        try:
            figure = check()
        except Exception as error:  # whatever it is belongs in the table
            failed.append(name)
            figure = f"FAILED: {type(error).__name__}: {error}"
        print(f"| {name} | {' '.join(figure.split()).replace('|', '/')} |", flush=True)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}.")


def within(**found: tuple[float, float]) -> str:
    """Return differences as text; raise `AssertionError` if one is above what is allowed."""
    text = ", ".join(f"{name} {figure:.1e} ({allowed:.0e} allowed)" for name, (figure, allowed) in found.items())
    if not all(figure <= allowed for figure, allowed in found.values()):
        raise AssertionError(text)
    return text


def check_parity(options: argparse.Namespace, device: torch.device) -> None:
    """Compare with what the authors' code and package spidr computed, as the tests of parity do."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "model")]
    import test_parity
    import test_parity_spidr

    from tolerances import ACTIVATIONS, LOSSES

    def tensors(case: Path, name: str) -> dict[str, torch.Tensor]:
        return load_file(case / f"{name}.safetensors", device=str(device))

    inputs, outputs = (tensors(test_parity.CASE, name) for name in ("inputs", "outputs"))

    @torch.no_grad()
    def forward(folder: Path, case: str) -> str:
        model = DinoSRForPreTraining.from_pretrained(folder, reference_padding=True).to(device).eval()
        source, mask = inputs[f"{case}.source"], inputs[f"{case}.mask_indices"]
        attention_mask = test_parity.attention_mask_of(inputs, case)
        got, student = model(source, attention_mask, mask), model.dinosr(source, attention_mask)
        targets = model.compute_targets(source, student.extract_features, attention_mask)[:, mask]
        want = {name.removeprefix(f"{case}."): tensor for name, tensor in outputs.items() if name.startswith(case)}
        losses = want["pretrain.loss_per_codebook"] / want["pretrain.sample_size"]
        assert torch.equal(got.codes, want["pretrain.assign"].long()), "other codes"
        return "codes equal, " + within(
            features=(float((student.last_hidden_state - want["x"]).abs().max()), ACTIVATIONS["atol"]),
            targets=(float((targets - want["pretrain.targets"]).abs().max()), ACTIVATIONS["atol"]),
            losses=(float((got.codebook_losses / losses - 1).abs().max()), LOSSES["rtol"]),
        )

    def train(folder: Path) -> str:
        trajectory = tensors(test_parity.CASE, "trajectory")
        model = test_parity.start_of_trajectory(folder, trajectory, freeze_mode="shared").to(device)
        test_parity.run_trajectory(model, trajectory, check_first_step=True)
        test_parity.assert_codebooks_match(model, trajectory, "final")
        test_parity.assert_weights_match(model, trajectory, "final")
        test_parity.assert_teacher_matches(model, trajectory, "final.teacher_next")
        return "codes equal; losses, gradients, student, teacher and codebooks within the tolerances"

    def train_spidr(folder: Path) -> str:
        trajectory = tensors(test_parity_spidr.CASE, "trajectory")
        model = test_parity_spidr.start_of_trajectory(folder, trajectory).to(device)
        test_parity_spidr.run_trajectory(model, trajectory)
        return "the same"

    with tempfile.TemporaryDirectory() as folder:
        ours, spidr = Path(folder) / "ours", Path(folder) / "spidr"
        convert(test_parity.CASE / "checkpoint.pt", ours)
        convert(test_parity_spidr.CASE / "checkpoint.pt", spidr, config=test_parity_spidr.CASE / "config.json")
        check_all(
            {
                "forward pass": lambda: forward(ours, "nopad"),
                "forward pass with padding": lambda: forward(ours, "pad"),
                "eight training steps": lambda: train(ours),
                "eight training steps of SpidR's objective": lambda: train_spidr(spidr),
            }
        )


def check_paths(options: argparse.Namespace, device: torch.device) -> None:
    """Check what runs on a GPU by other code than on a CPU."""
    sizes = sizes_of_batch(options.size, device)
    sizes.batch = 2
    (waveforms, mask), (padded, attention_mask) = make_inputs(sizes, device), make_batch(sizes, device)
    masked_frames = mask.flatten().nonzero()[:, 0]

    def train(model: DinoSRForPreTraining, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(waveforms, mask_time_indices=mask, masked_frames=masked_frames).loss

    def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
        return float((found.detach().float() - expected).norm() / expected.norm())

    @torch.no_grad()
    def padding(attention: str) -> str:
        model = make_model(options.size, attention, device).dinosr.eval()
        together = model(padded, attention_mask).last_hidden_state
        alone = model(padded[:1, : num_samples(sizes)[0]]).last_hidden_state
        with torch.autocast(device.type, torch.bfloat16):
            low = model(padded, attention_mask).last_hidden_state
        length = alone.shape[1]
        return within(
            float32=(float((together[:1, :length] - alone).abs().max()), FLOAT32_TOLERANCE),
            bfloat16=(relative(low[:1, :length], alone), LOW_TOLERANCE),
        )

    def autocast(dtype: torch.dtype) -> str:
        model = disable_dropout(make_model(options.size, "sdpa", device))
        expected, loss = train(model).detach(), train(model, dtype)
        loss.backward()
        model.update_targets(1)
        tensors = [tensor for one in model.parameters() for tensor in (one, one.grad) if tensor is not None]
        assert all(one.dtype == torch.float32 and one.isfinite().all() for one in tensors), "weights or gradients"
        return within(loss=(relative(loss, expected), LOW_TOLERANCE))

    def fused_adam() -> str:
        fused = disable_dropout(make_model(options.size, "sdpa", device))
        plain = copy.deepcopy(fused)
        pairs = [pair for pair in zip(fused.parameters(), plain.parameters(), strict=True) if pair[0].requires_grad]
        optimizers = [torch.optim.AdamW(part, lr=1e-3, fused=not i) for i, part in enumerate(zip(*pairs, strict=True))]
        for _ in range(3):
            train(fused).backward()
            for one, other in pairs:
                other.grad = None if one.grad is None else one.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        return within(weights=(max(float((one - other).detach().abs().max()) for one, other in pairs), ADAM_TOLERANCE))

    def waiting() -> str:
        if device.type != "cuda":
            return "only on a GPU"
        model = make_model(options.size, "sdpa", device).train()
        for number, mode in enumerate(("default", "error"), start=1):  # the first step may wait
            torch.cuda.set_sync_debug_mode(mode)
            try:
                train(model, torch.bfloat16).backward()
                model.update_targets(number)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return "never"

    check_all(
        {
            "padding, sdpa attention": lambda: padding("sdpa"),
            "padding, eager attention": lambda: padding("eager"),
            "bfloat16 autocast": lambda: autocast(torch.bfloat16),
            "float16 autocast": lambda: autocast(torch.float16),
            "fused AdamW": fused_adam,
            "forward, backward and update wait for the device": waiting,
        }
    )


def check_pretraining(options: argparse.Namespace, device: torch.device) -> None:
    """Stop a run of the real command at its first checkpoint, resume it by the same command, and use its model."""
    recipe, steps = ("small.yaml", 400) if options.size == "base" else ("tiny_cpu.yaml", 40)
    logged = steps // 8
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = ["--data", *options.data, "--synthetic_utterances", 200, "--output_dir", run, "--max_steps", steps]
        words += ["--checkpoint_steps", 2 * logged, "--log_steps", logged]
        words += ["--num_workers", 6 if device.type == "cuda" else 1]  # a step takes a worker longer than a GPU
        words += ["--mixed_precision", "fp16" if device.type == "cuda" else "bf16"]
        command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), str(CONFIGS / recipe), *map(str, words)]
        first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while first.poll() is None and not (run / f"checkpoint-{2 * logged}").exists():
            time.sleep(0.05)
        first.terminate()
        if (status := first.wait()) != 128 + signal.SIGTERM:
            sys.exit(f"The run ended with status {status} instead of {128 + signal.SIGTERM} for SIGTERM.")
        stopped = max(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))
        print(f"| what | figure |\n|---|---|\n| {recipe}, stopped by SIGTERM | after step {stopped} of {steps} |")
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        model = DinoSRForPreTraining.from_pretrained(run).to(device)
    noise = torch.randn(1, SAMPLING_RATE, device=device)
    codes, _ = model.encode_units(noise, layer=model.config.codebook_layers[0])
    start, end = metrics[0], metrics[-1]
    print(f"| resumed by the same command | to step {end['step']}, {end['audio_seconds_per_second']:.0f} audio s/s |")
    print(f"| loss | from {start['loss']:.3f} to {end['loss']:.3f} |\n| memory | {end['memory_gib']:.2f} GiB |")
    print(f"| units of 1 s by the model | {codes.shape[1]} frames |")
    if [line["step"] for line in metrics] != [1, *range(logged, steps + 1, logged)]:
        sys.exit("metrics.jsonl has other steps than those of a run that was not stopped.")
    if not end["loss"] < start["loss"]:
        sys.exit("The loss did not fall.")


SERVED: dict[str, Callable[[argparse.Namespace, torch.device], None]] = {
    "parity": check_parity,
    "paths": check_paths,
    "pretrain": check_pretraining,
}


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    device = choose_device(torch.get_num_threads())
    if options.serve:
        SERVED[options.serve](options, device)
        return
    rows, failed, until = [], [], time.monotonic() + 60 * options.minutes
    for part in options.parts:
        since = time.monotonic()
        limit = min(LIMITS[part] * options.minutes / 8, until - since)
        found, error = run_part(command_of(part, options, device), limit)
        failed += [part] if error else []
        outcome = f"FAILED: {error.replace('|', '/')}" if error else "passed"
        rows += [(part, outcome, f"{time.monotonic() - since:.0f} s"), *(("", *row) for row in found)]
        print(f"{part}: {outcome}", file=sys.stderr)
    if not options.spidr_python and {"step", "compile"} & {*options.parts}:
        rows.append(("", "spidr", "not compared: --spidr_python was not given"))
    lines = [headline(device, torch.get_num_threads(), "transformers", precision=f"size {options.size}"), ""]
    lines += [f"| {' | '.join(row)} |" for row in [("part", "what", "figures"), ("---",) * 3, *rows]]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main(sys.argv[1:])
