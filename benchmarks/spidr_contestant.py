"""
Train a model of spidr on batches from stdin, and write its units: a contestant of learning.py, which starts this.

It runs in the Python of `--spidr_python`, so it imports torch, numpy and spidr only, by spidr's public interface. The
first line of stdin has the settings, in JSON. From then on this process asks by lines of stdout: "start" for the
batches from the first one on, "batch" for the next. A batch is a line with its shapes in JSON, then the waveforms,
float32 (B, S), and the mask, bool (B, T). The last line of stdout is a JSON object with the results.
"""

import time

STARTED = time.perf_counter()

import importlib.metadata  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import sys  # noqa: E402
from dataclasses import asdict, replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from spidr.config import DinoSRConfig, OptimizerConfig, SpidRConfig  # type: ignore[import-not-found] # noqa: E402
from spidr.models import DinoSR, SpidR  # type: ignore[import-not-found] # noqa: E402
from spidr.optimizer import build_optimizer  # type: ignore[import-not-found] # noqa: E402

OBJECTIVES: dict[str, Any] = {"dinosr": (DinoSR, DinoSRConfig), "spidr": (SpidR, SpidRConfig)}
PAPER_STEPS = OptimizerConfig().max_steps
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ask(what: str) -> None:
    print(what, flush=True)


def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return waveforms (B, S), and indices (B, M) of masked frames: as in the paper, equally many in each row."""
    ask("batch")
    shapes = json.loads(sys.stdin.buffer.readline())
    parts = [
        np.frombuffer(sys.stdin.buffer.read(size), kind)
        for size, kind in zip(shapes["bytes"], ("f4", "?"), strict=True)
    ]
    waveforms, mask = (torch.tensor(part).view(shape) for part, shape in zip(parts, shapes["shapes"], strict=True))
    fewest = int(mask.sum(dim=1).min())
    rows = [row.nonzero()[:, 0] for row in mask]
    indices = [row[torch.randperm(len(row))[:fewest]].sort().values for row in rows]
    return waveforms.to(DEVICE), torch.stack(indices).to(DEVICE)


def scaled(steps: int, num_steps: int) -> int:
    """Scale a number of steps of spidr's defaults to a run of so many."""
    return max(1, round(steps * num_steps / PAPER_STEPS))


def train(
    settings: dict[str, Any], num_steps: int, stop_after: int, **changes: int
) -> tuple[Any, Any, float, list[float]]:
    """Train a new model; return it and its configuration, the seconds of audio, and the time after each step."""
    torch.manual_seed(settings["seed"])
    ask("start")
    make, make_config = OBJECTIVES[settings["objective"]]
    config = make_config(**settings["model"])
    counted = ["freeze_step", *(["ema_timescale"] if settings["objective"] == "spidr" else [])]
    config = replace(config, **{name: scaled(getattr(config, name), num_steps) for name in counted} | changes)
    default = OptimizerConfig()
    stages = {name: scaled(getattr(default, name), num_steps) for name in ("warmup_steps", "hold_steps")}
    stages["decay_steps"] = max(1, num_steps - sum(stages.values()))
    model = make(config).to(DEVICE).train()
    recipe = OptimizerConfig(lr=settings["learning_rate"], dtype="float32", max_steps=num_steps, **stages)
    optimizer, _, schedule = build_optimizer(model, recipe)
    audio, since, times = 0.0, time.perf_counter(), []
    for step in range(1, stop_after + 1):
        waveforms, indices = next_batch()
        losses, _ = model(waveforms, mask_indices=indices)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        model.update_ema(step)
        if step == config.freeze_step:
            model.freeze_extractor()
        audio += waveforms.numel() / settings["sampling_rate"]
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - since)
    return model, config, audio, times


@torch.no_grad()
def write_units(model: Any, recordings: Path, file: Path) -> None:
    """Write the units (N, T) of each recording (S,), the most probable codewords by the student's heads."""
    with np.load(recordings) as waveforms:
        codes = {}
        for name in waveforms.files:
            found = model.get_codebooks(torch.from_numpy(waveforms[name])[None].to(DEVICE))
            codes[name] = torch.stack([layer.argmax(dim=-1).flatten() for layer in found if layer is not None]).numpy(
                force=True
            )
    np.savez(file, **codes)


def seconds_per_step(settings: dict[str, Any], **changes: int) -> float:
    """Return how long a step takes, measured in a few of them."""
    num_timed = settings["num_timed"]
    *_, times = train(settings, PAPER_STEPS, num_timed, **changes)
    return (times[-1] - times[num_timed // 3]) / (num_timed - num_timed // 3 - 1)


def main() -> None:
    settings = json.loads(sys.stdin.buffer.readline())
    torch.set_num_threads(settings["threads"])
    startup = time.perf_counter() - STARTED
    # From `freeze_step` on, steps are faster.
    share = OBJECTIVES[settings["objective"]][1]().freeze_step / PAPER_STEPS
    per_step = share * seconds_per_step(settings) + (1 - share) * seconds_per_step(settings, freeze_step=1)
    num_steps = max(1, int((settings["seconds"] - startup) / per_step))
    model, config, audio, times = train(settings, num_steps, num_steps)
    model.eval()
    folder = Path(settings["output_dir"])
    torch.save({"model": model.state_dict()}, folder / "checkpoint.pt")
    (folder / "config.json").write_text(json.dumps({"model": asdict(config)}), encoding="utf-8")
    for split, file in settings["recordings"].items():
        write_units(model, Path(file), folder / f"{split}.npz")
    versions = (
        f"spidr {importlib.metadata.version('spidr')}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    result = {"seconds": startup + times[-1], "audio_seconds": audio, "num_steps": num_steps, "versions": versions}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
