r"""
Compare what models learn of phones from the same recordings in the same time.

    python benchmarks/learning.py --train speech/train --validation speech/validation --test speech/test \
        --labels phones.jsonl.gz --minutes 30 --threads 2 --processes 2 --spidr_python spidr_env/bin/python

The contestants train one after the other, `--minutes` of wall-clock time each, start of the program included:

- `ours`: the recipes of `--recipe`, by examples/pretrain.py: the first, then each on the model before and with its
  clusters as the anchor; they share the time in proportion to their `max_steps`;
- `ours-spidr`: the same with the objective of SpidR, as examples/configs/spidr_base.yaml has it, but for the decay;
- `paper`: the first without what is not in the paper: convolutions, no anchor, no revival of codewords, one speed;
- `spidr-dinosr` and `spidr`: Meta's package with the objectives of DinoSR and SpidR, its own optimizer and schedule;
- `mfcc-textbook` and `mfcc-tuned`: k-means on MFCCs, which take what time they need.

All have the first recipe's sizes, learning rate, dropout and number of codewords; the number of steps comes from a
short timing run, and learning-rate schedules end with it. spidr gets that recipe's crops and, where it has such a
setting, its decay of teacher and codebooks; its schedules are scaled to the number of steps, and its masks are as
dense as its defaults. The paper's convolutions have 2/3 as many channels as the model is wide, as the base model's.

Layer and kind of unit (student, teacher, k-means on the student's last layer, and of ours the anchor) are those with
the highest PNMI on the validation speakers; the table is of the test speakers. Kinds whose number of units differs
from the codebooks' are left out. On CPUs `--processes` trains ours in several processes, which is faster for small
models; spidr, fed by one process, has all threads in one. Fitting k-means to 17 minutes of speech is not counted.

Nothing is trained unless the evaluation gives the phones themselves a PNMI of 1 and a constant unit 0, and all three
parts have different speakers, as far as a column speaker_id tells. A finished run is only read; one with other data,
another recipe or another machine is replaced. So a contest can be stopped, and goes on with the same command.

spidr (`pip install spidr`; licence CC BY-NC 4.0) needs Python 3.12, which may be a separate environment:

    python3.12 -m venv spidr_env && spidr_env/bin/pip install spidr
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from contest import CONFIGS, SAMPLING_RATE, choose_device, describe_machine

from dinosr_hf import DinoSRConfig
from dinosr_hf.analysis.alignment import frame_labels
from dinosr_hf.analysis.baselines import MFCC_KINDS
from dinosr_hf.analysis.mfcc_units import fit_mfcc_kmeans, mfcc_units
from dinosr_hf.analysis.model_units import unit_layers
from dinosr_hf.analysis.speech import open_reference
from dinosr_hf.analysis.unit_evaluation import Reference, total
from dinosr_hf.data import SpeechSource, TableSource, normalize_waveform, open_recordings
from dinosr_hf.data.labelled import find_metadata
from dinosr_hf.hub.conversion import convert
from dinosr_hf.pretraining import PretrainingArguments, open_data, parse_arguments
from dinosr_hf.pretraining.feed import StepFeed
from dinosr_hf.units import LayerKMeans, UnitExtractor, fit_layer_kmeans, load_model
from dinosr_hf.utils.files import claim_output_folder
from dinosr_hf.utils.tables import markdown_table

PRETRAIN = CONFIGS.parent / "pretrain.py"
SPIDR_CONTESTANT = Path(__file__).parent / "spidr_contestant.py"
MARKER = ".learning"  # only a folder with this file is emptied
CONTESTANTS = ("ours", "ours-spidr", "paper", "spidr-dinosr", "spidr", *(f"mfcc-{kind}" for kind in MFCC_KINDS))
RECIPES = [CONFIGS / f"{name}.yaml" for name in ("small", "small_again")]
SPIDR_RECIPE = CONFIGS / "spidr_base.yaml"
# Its settings that are SpidR's objective; its decay is for 400,000 steps.
SPIDR_OBJECTIVE = ("head_input", "teacher_init", "attention_init", "qkv_bias", "layerdrop", "mask_min_spans")
# Steps of a timing run; the first third is slower.
NUM_TIMED = 30
# Recipe settings that the paper does not use, besides those with "anchor" in their names.
NOT_IN_THE_PAPER = ("feature_encoder", "codebook_revival_share", "speed_change")
# Their setting -> our field of the configuration.
SPIDR_SETTINGS = {
    "encoder_embed_dim": "hidden_size",
    "encoder_num_layers": "num_hidden_layers",
    "encoder_num_heads": "num_attention_heads",
    "encoder_ff_interm_features": "intermediate_size",
    "encoder_pos_conv_kernel": "conv_pos_kernel_size",
    "encoder_pos_conv_groups": "num_conv_pos_embedding_groups",
    "encoder_pos_conv_depth": "num_conv_pos_embeddings",
    "encoder_attention_dropout": "attention_dropout",
    "encoder_dropout": "hidden_dropout",
    "encoder_layer_drop": "layerdrop",
    "codebook_size": "codebook_size",
    "num_codebooks": "num_codebooks",
    "ema_start_decay": "ema_decay",
    "ema_final_decay": "ema_end_decay",
    "ema_final_step": "ema_anneal_steps",
}
EXACT = 1e-9
# Rounding moves few frames to another unit.
CONVERTED = 2e-3
KMEANS_FRAMES = 50_000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative difference of a contestant's wall-clock time from what it was to take.
TIME_TOLERANCE = 0.1


class Part(NamedTuple):
    """Recordings and the phones to evaluate their units against."""

    source: SpeechSource
    reference: Reference


Figures = dict[str, float]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", nargs="+", required=True, help="recordings to learn from: folders, manifests or datasets")
    add("--validation", required=True, help="recordings of other speakers, to choose layers on")
    add("--test", required=True, help="recordings of yet other speakers, to evaluate on")
    add("--labels", required=True, help="phones of validation and test (.jsonl, .jsonl.gz, .ctm, folder of TextGrids)")
    add("--recipe", nargs="+", type=Path, default=RECIPES, help="our recipes, YAML files (small, small_again)")
    add("--minutes", type=float, default=30.0, help="wall-clock time of each contestant (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run for each (0 1 2)")
    add("--threads", type=int, default=torch.get_num_threads(), help="number of CPU threads (%(default)s)")
    add("--processes", type=int, default=1, help="CPU processes of our contestants, which share the threads (1)")
    add("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="who takes part (all)")
    add("--spidr_python", default=sys.executable, help="path of the Python that has spidr (this one)")
    add("--output_dir", type=Path, default=Path("runs/learning"), help="folder for all runs (%(default)s)")
    options = parser.parse_args(argv)
    if options.minutes <= 0 or not 1 <= options.processes <= options.threads:
        parser.error("--minutes must be above 0, --processes at least 1, and --threads at least as many.")
    if options.processes > 1 and torch.cuda.is_available():
        parser.error("--processes is for CPUs only.")
    for number, recipe in enumerate(options.recipe):
        if not recipe.is_file():
            parser.error(f"--recipe={recipe} does not exist. Give YAML files for examples/pretrain.py.")
        if missing := {"max_steps", "micro_seconds", *(["anchor_layer"] if number else [])} - set(read_recipe(recipe)):
            parser.error(f"--recipe={recipe} lacks {' and '.join(sorted(missing))}. Add it to the file.")
    return options


def require_spidr(options: argparse.Namespace) -> None:
    """Exit if a contestant needs spidr and its Python cannot import it."""
    if not any(name.startswith("spidr") for name in options.contestants):
        return
    try:
        code = subprocess.run([options.spidr_python, "-c", "import spidr"], capture_output=True).returncode
    except OSError as error:
        sys.exit(f"--spidr_python={options.spidr_python} cannot be run: {error.strerror}.")
    if code:
        sys.exit(
            f"spidr is not installed for --spidr_python={options.spidr_python}: pip install spidr (Python 3.12 or"
            " newer), or leave the contestants spidr and spidr-dinosr out of --contestants."
        )


# Evaluation


def speakers_of(data: str) -> set[str]:
    """Return the known speakers of recordings, from a column `speaker_id`."""
    table = find_metadata(Path(data))
    try:
        return set(filter(None, (TableSource(table) if table else open_recordings([data])).labels("speaker_id")))
    except ValueError:  # no such column
        return set()


def own_codes(part: Part) -> Iterator[tuple[str, np.ndarray]]:
    """Yield id and codes (2, T) of recordings: the number of each frame's phone, and always 0."""
    config = DinoSRConfig()
    for utterance in part.source.utterances:
        labels = part.reference.labels.get(utterance.id)
        if labels is not None:
            num_frames = config.num_frames(utterance.num_samples)
            frames = frame_labels(labels, num_frames, step_seconds=part.reference.step_seconds)
            codes = np.array([part.reference.phones.index(phone) for phone in frames], dtype=np.int64)
            yield utterance.id, np.stack([codes, np.zeros_like(codes)])


def find_errors(parts: Mapping[str, Part], options: argparse.Namespace) -> list[str]:
    """Return what is wrong with the evaluation; an empty list if nothing is."""
    found = []
    for name, part in parts.items():
        counts = part.reference.count_by_speaker(own_codes(part), num_codes=len(part.reference.phones))
        phones, constant = (total(layer.values()).figures()["pnmi"] for layer in counts)
        if not (abs(phones - 1) <= EXACT and abs(constant) <= EXACT):
            found.append(f"{name}: the phones themselves have a PNMI of {phones:.3f}, a constant unit {constant:.3f}")
    speakers = {"train": set().union(*map(speakers_of, options.train))}
    speakers |= {name: speakers_of(getattr(options, name)) for name in parts}
    for first, second in combinations(speakers, 2):
        if both := speakers[first] & speakers[second]:
            found.append(f"{first} and {second} both have the speakers {', '.join(sorted(both))}")
    return found


def figures_by_layer(
    part: Part, names: Iterable[str], units: Iterable[tuple[str, np.ndarray]], num_codes: int, **frames: int
) -> dict[str, Figures]:
    """Return the metrics of units (L, T) of recordings, by the L names."""
    counts = part.reference.count_by_speaker(units, num_codes=num_codes, **frames)
    layers = (total(layer.values()) for layer in counts)
    return {
        name: {**layer.figures(), "num_frames": int(layer.table.sum())}
        for name, layer in zip(names, layers, strict=True)
    }


def fit_clusters(folder: Path, options: argparse.Namespace, seed: int) -> LayerKMeans:
    """Cluster the last layer of a pre-trained model of ours on the recordings that it learnt from."""
    model = load_model(folder, device=DEVICE)
    extractor = UnitExtractor(model, layers=[model.config.num_hidden_layers], is_smoothed=True)
    train = open_recordings(options.train)
    return fit_layer_kmeans(extractor, train, model.config.codebook_size, max_frames=KMEANS_FRAMES, seed=seed)


def model_figures(folder: Path, part: Part, kmeans: LayerKMeans) -> dict[str, Figures]:
    """Return the metrics of all units of a pre-trained model of ours, of kinds with as many units as codewords."""
    model = load_model(folder, device=DEVICE)
    frames = {"stride": model.config.inputs_to_logits_ratio, "field": model.config.receptive_field}
    num_codes = model.config.codebook_size
    clustered = UnitExtractor(model, layers=[kmeans.layer], is_smoothed=kmeans.is_smoothed)
    units = clustered.units(part.source, kmeans=kmeans)
    found = figures_by_layer(part, [f"k-means, layer {kmeans.layer}"], units, num_codes, **frames)
    for kind in model.config.unit_sources:
        if model.config.num_units(kind) != num_codes:  # PNMI rises with their number
            continue
        layers = unit_layers(model.config, kind)
        units = UnitExtractor(model, layers=layers, source=kind).units(part.source)
        names = [f"{kind}, layer {layer}" for layer in layers]
        found |= figures_by_layer(part, names, units, num_codes, **frames)
    return found


def choose(by_split: Mapping[str, Mapping[str, Figures]]) -> tuple[str, Figures]:
    """Return the name of the units with the highest PNMI on the validation speakers, and their test figures."""
    validation = by_split["validation"]
    best = max(validation, key=lambda name: validation[name]["pnmi"])
    return best, by_split["test"][best]


# Contestants: each returns the metrics of all its units by split, and "minutes" and "hours" of audio.


def run_pretraining(recipe: Path, options: argparse.Namespace, seed: int, folder: Path, max_steps: int) -> float:
    """Run the public command; return its wall-clock seconds."""
    words = ["--data", *options.train, "--output_dir", folder, "--seed", seed]
    words += ["--max_steps", max_steps, "--log_steps", max(1, max_steps // 30)]
    words += ["--checkpoint_steps", 0, "--save_steps", 0, "--num_threads", options.threads // options.processes]
    launch, environment = [sys.executable], dict(os.environ)
    if options.processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.processes}"]
        environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        words += ["--micro_seconds", read_recipe(recipe)["micro_seconds"] / options.processes]
    since = time.perf_counter()
    done = subprocess.run([*launch, str(PRETRAIN), str(recipe), *map(str, words)], env=environment)
    if done.returncode:
        sys.exit("The pre-training failed; its message is above.")
    return time.perf_counter() - since


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def read_recipe(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def with_spidr_objective(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe with the objective of SpidR."""
    objective = read_recipe(SPIDR_RECIPE)
    return settings | {name: objective[name] for name in SPIDR_OBJECTIVE}


def without_additions(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without what is not in the paper."""
    kept = {name: value for name, value in settings.items() if name not in NOT_IN_THE_PAPER and "anchor" not in name}
    default = DinoSRConfig()
    kept |= {"conv_kernel": list(default.conv_kernel), "conv_stride": list(default.conv_stride)}
    kept["conv_dim"] = [num_channels(settings["hidden_size"])] * len(default.conv_kernel)
    return kept


def num_channels(hidden_size: int) -> int:
    return hidden_size * 2 // 3


def run_ours(
    options: argparse.Namespace,
    seed: int,
    folder: Path,
    parts: Mapping[str, Part],
    change: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    is_single: bool = False,
) -> dict[str, Any]:
    recipes = [change(read_recipe(path)) for path in (options.recipe[:1] if is_single else options.recipe)]
    seconds, hours = 0.0, 0.0
    before: dict[str, str] = {}
    for number, settings in enumerate(recipes, 1):
        recipe, model, timing = (folder / name.format(number) for name in ("recipe-{}.yaml", "model-{}", "timing-{}"))
        recipe.write_text(yaml.safe_dump(settings | before), encoding="utf-8")
        before = dict.fromkeys(("base_model", "anchor"), str(model))
        start = partial(run_pretraining, recipe, options, seed)
        timed = start(timing, NUM_TIMED)
        elapsed = {line["step"]: line["elapsed_seconds"] for line in metrics_of(timing)}
        per_step = (elapsed[NUM_TIMED] - elapsed[NUM_TIMED // 3]) / (NUM_TIMED - NUM_TIMED // 3)
        share = settings["max_steps"] / sum(each["max_steps"] for each in recipes[number - 1 :])
        left = share * (60 * options.minutes - seconds) - (timed - NUM_TIMED * per_step)
        seconds += start(model, max(1, int(left / per_step)))
        hours += metrics_of(model)[-1]["audio_hours"]
    kmeans = fit_clusters(model, options, seed)
    found: dict[str, Any] = {"minutes": seconds / 60, "hours": hours}
    for split, part in parts.items():
        found[split] = model_figures(model, part, kmeans)
    return found


def spidr_batches(arguments: PretrainingArguments, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the recipe's crops, float32 (B, S), and masks bool (B, T) as dense as spidr's defaults, without end."""
    source, _ = open_data(arguments.data, seed)
    for step in StepFeed(source, arguments.data, DinoSRConfig(), seed=seed):
        inputs = [batch.inputs for batch in step.micro_batches]  # all of one length, by `batching="crop"`
        waveforms, masks = (
            torch.cat([one[name] for one in inputs]).numpy() for name in ("input_values", "mask_time_indices")
        )
        yield waveforms, masks


def serve_spidr(process: subprocess.Popen, arguments: PretrainingArguments, seed: int) -> dict[str, Any]:
    """Answer spidr_contestant.py until it sends its results, and return them."""
    assert process.stdin is not None and process.stdout is not None
    batches: Iterator[tuple[np.ndarray, np.ndarray]] = iter(())
    ready: tuple[np.ndarray, np.ndarray] | None = None
    for line in process.stdout:
        word = line.decode().strip()
        if word == "start":
            batches = spidr_batches(arguments, seed)
            ready = next(batches)
        elif word == "batch":
            assert ready is not None
            header = {"shapes": [part.shape for part in ready], "bytes": [part.nbytes for part in ready]}
            process.stdin.write(json.dumps(header).encode() + b"\n" + b"".join(part.tobytes() for part in ready))
            process.stdin.flush()
            ready = next(batches)  # while it computes
        else:
            return json.loads(word)
    sys.exit("The contestant spidr failed; its message is above.")


def run_spidr(
    options: argparse.Namespace, seed: int, folder: Path, parts: Mapping[str, Part], objective: str
) -> dict[str, Any]:
    words = [str(options.recipe[0]), "--data", *options.train, "--batching", "crop", "--speed_change", "0"]
    arguments = parse_arguments(words)
    config = arguments.model_config()
    recordings = {}
    for split, part in parts.items():
        recordings[split] = str(folder / f"{split}_recordings.npz")
        waveforms = (normalize_waveform(part.source.load(index)) for index in range(len(part.source)))
        np.savez(recordings[split], **{str(index): waveform for index, waveform in enumerate(waveforms)})
    kernels = zip(DinoSRConfig().conv_kernel, DinoSRConfig().conv_stride, strict=True)
    decay = config.codebook_decay if config.codebook_end_decay is None else config.codebook_end_decay
    settings = {
        "objective": objective,
        "model": {
            **{theirs: getattr(config, ours) for theirs, ours in SPIDR_SETTINGS.items()},
            "extractor_conv_layer_config": [(num_channels(config.hidden_size), *sizes) for sizes in kernels],
            "codebook_decay": decay,
        },
        "learning_rate": arguments.run.learning_rate,
        "seconds": 60 * options.minutes,
        "seed": seed,
        "threads": options.threads,
        "num_timed": NUM_TIMED,
        "sampling_rate": SAMPLING_RATE,
        "recordings": recordings,
        "output_dir": str(folder),
    }
    command = [options.spidr_python, str(SPIDR_CONTESTANT)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        process.stdin.flush()
        result = serve_spidr(process, arguments, seed)
    finally:
        process.kill()
        process.wait()
    found: dict[str, Any] = {
        "minutes": result["seconds"] / 60,
        "hours": result["audio_seconds"] / 3600,
        "versions": result["versions"],
    }
    names = [f"student, layer {layer}" for layer in config.codebook_layers]
    # Its teacher has units too, which spidr does not return.
    convert(folder / "checkpoint.pt", folder / "model", config=folder / "config.json")
    kmeans = fit_clusters(folder / "model", options, seed)
    for split, part in parts.items():
        with np.load(folder / f"{split}.npz") as codes:
            units = [(part.source.utterances[int(index)].id, codes[index]) for index in codes.files]
        found[split] = model_figures(folder / "model", part, kmeans)
        for name, own in figures_by_layer(part, names, units, config.codebook_size).items():
            if abs(own["pnmi"] - found[split][name]["pnmi"]) > CONVERTED:
                sys.exit(f"The converted model of spidr has other units: {name}, {own} and {found[split][name]}.")
        Path(recordings[split]).unlink()
    return found


def run_mfcc(
    options: argparse.Namespace, seed: int, folder: Path, parts: Mapping[str, Part], kind: str
) -> dict[str, Any]:
    num_clusters = parse_arguments([str(options.recipe[0])]).model_config().codebook_size
    since, train = time.perf_counter(), open_recordings(options.train)
    kmeans = fit_mfcc_kmeans(train, num_clusters, kind, seed=seed)
    found: dict[str, Any] = {"minutes": (time.perf_counter() - since) / 60, "hours": train.seconds / 3600}
    for split, part in parts.items():
        name = f"k-means on {kind} MFCCs"
        found[split] = figures_by_layer(part, [name], mfcc_units(part.source, kmeans, kind), num_clusters)
    return found


RUNNERS = {
    "ours": partial(run_ours, change=dict),
    "ours-spidr": partial(run_ours, change=with_spidr_objective),
    "paper": partial(run_ours, change=without_additions, is_single=True),
    "spidr-dinosr": partial(run_spidr, objective="dinosr"),
    "spidr": partial(run_spidr, objective="spidr"),
    **{f"mfcc-{kind}": partial(run_mfcc, kind=kind) for kind in MFCC_KINDS},
}


# The contest


def machine_of(options: argparse.Namespace) -> str:
    return describe_machine(choose_device(options.threads), options.threads, "transformers", "scikit-learn")


def folder_of(name: str, seed: int, options: argparse.Namespace) -> Path:
    return options.output_dir / f"{name}-{options.minutes:g}min-{seed}"


def result_of(name: str, seed: int, options: argparse.Namespace, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Return what a contestant has learnt; a finished run with the same settings is only read."""
    folder = folder_of(name, seed, options)
    path = folder / "result.json"
    kept = ("train", "validation", "test", "labels", "minutes", "threads", "processes")
    settings = {key: getattr(options, key) for key in kept} | {
        "recipes": [path.read_text(encoding="utf-8") for path in (*options.recipe, SPIDR_RECIPE)],
        "spidr_python": options.spidr_python if name.startswith("spidr") else None,
        "machine": machine_of(options),
    }
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["settings"] == settings:
            return saved["result"]
    claim_output_folder(folder, MARKER)
    result = RUNNERS[name](options, seed, folder, parts)
    path.write_text(json.dumps({"settings": settings, "result": result}, indent=2), encoding="utf-8")
    return result


def cell(values: Sequence[float], digits: int) -> str:
    """Format the mean of values, and each of several in parentheses."""
    each = f" ({', '.join(f'{value:.{digits}f}' for value in values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{each}"


COLUMNS = ("contestant", "units", "PNMI", "phone purity", "codewords in use", "hours of audio", "minutes")


def row(name: str, results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the cells of a contestant's row, from the results of all seeds."""
    chosen = [choose(result) for result in results]
    metrics = {"pnmi": 3, "phone_purity": 3, "active_codes": 0}
    figures = (cell([figures[metric] for _, figures in chosen], digits) for metric, digits in metrics.items())
    times = (cell([result[key] for result in results], digits) for key, digits in (("hours", 2), ("minutes", 1)))
    return [name, "; ".join(sorted({units for units, _ in chosen})), *figures, *times]


def unequal_times(results: Mapping[str, Sequence[Mapping[str, Any]]], options: argparse.Namespace) -> list[str]:
    """Describe the runs whose time, which k-means on MFCCs chooses itself, is not what it should be."""
    return [
        f"{folder_of(name, seed, options)} took {result['minutes']:.1f} minutes"
        for name, own in results.items()
        for seed, result in zip(options.seeds, own, strict=True)
        if not name.startswith("mfcc") and abs(result["minutes"] / options.minutes - 1) > TIME_TOLERANCE
    ]


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    require_spidr(options)
    machine = machine_of(options)
    parts = {
        split: Part(*open_reference(getattr(options, split), labels=options.labels))
        for split in ("validation", "test")
    }
    if found := find_errors(parts, options):
        sys.exit("Nothing was trained: " + "; ".join(found))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contestants}
    for seed in options.seeds:  # one seed after the other, so that what else the machine does hits all contestants
        for name, own in results.items():
            own.append(result_of(name, seed, options, parts))
            units, figures = choose(own[-1])
            print(f"{name}, seed {seed}: PNMI {figures['pnmi']:.3f} ({units})", file=sys.stderr, flush=True)
    num_frames = max(choose(own[0])[1]["num_frames"] for own in results.values())
    print(f"{datetime.date.today()}, {machine}")
    for versions in sorted({result["versions"] for own in results.values() for result in own if "versions" in result}):
        print(f"spidr's own: {versions}")
    print(
        f"{options.minutes:g} minutes each; seeds {', '.join(map(str, options.seeds))}; {num_frames:,} test frames\n"
    )
    print(markdown_table(COLUMNS, [row(name, own) for name, own in results.items()]), end="")
    if found := unequal_times(results, options):
        sys.exit(
            f"\nThis is no fair comparison: {', '.join(found)} instead of {options.minutes:g}. Repeat them on a"
            " machine that does nothing else: remove their folders and give the same command."
        )


if __name__ == "__main__":
    main(sys.argv[1:])
