"""
Compare small batches with and without `scale_to_batch`.

    python benchmarks/scale_to_batch.py --seeds 0 1 2
    python benchmarks/scale_to_batch.py --audio_seconds 60000 --output_dir runs/scaling --data my_recordings \
        --eval_data my_test_recordings --eval_labels my_phones.jsonl

For each seed it trains the same model three times on the same amount of audio: with steps of `--reference_seconds`;
with steps of a fraction of that and the same arguments; and with these small steps and scaled arguments. The runs use
the real command's code in this process and are evaluated on held-out speech with phone labels. Other options, after a
YAML file if there is one, go to all runs. The default file is examples/configs/tiny_cpu.yaml, on synthetic speech,
with values for steps of 80 s; held-out speech is synthetic too unless `--eval_data` is given.

A finished run is only read, and an interrupted one resumes; with other options give another `--output_dir`.

The codes of two runs have different numbers of codewords in use. So the frames of all runs are also clustered anew,
into as many clusters as there are codewords, by k-means on half of the held-out utterances, and evaluated on the other
half: the best of the teacher's layers, normalised as for the codebooks, and the student's top layer. `collapsed` is
the share of the runs that end with a warning of their own monitor.

The scaled values are checked before the first run, and after the last that all runs had the same amount of audio.
"""

import argparse
import dataclasses
import json
import logging
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from contest import CONFIGS, headline

from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.analysis.kmeans import fit_kmeans
from dinosr_hf.analysis.model_units import LabelledSpeech, target_features
from dinosr_hf.analysis.quality import unit_quality
from dinosr_hf.pretraining import (
    CollapseMonitor,
    PretrainingArguments,
    open_held_out,
    parse_arguments,
    run,
    synthetic_corpus,
)
from dinosr_hf.pretraining.scaling import changes_table, scale_to_batch

TINY = CONFIGS / "tiny_cpu.yaml"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The tiny model's values are for steps of 40 s: halves what is counted in steps.
TINY_AT_80_SECONDS = (
    *("--codebook_end_decay_step", "100", "--ema_anneal_steps", "200"),
    *("--max_seconds", "10", "--eval_seconds", "600"),
)
RUNS = ("reference", "unscaled", "scaled")
FIGURES = {
    "eval_loss": "loss",
    "eval_target_perplexity": "target perplexity",
    "eval_prediction_perplexity": "prediction perplexity",
    "eval_active_codewords": "active codewords",
    "eval_pnmi": "PNMI",
    "eval_phone_purity": "phone purity",
    "kmeans_pnmi_teacher": "k-means PNMI, teacher",
    "kmeans_pnmi_student": "k-means PNMI, student",
    "collapsed": "collapsed",
}
AUDIO_TOLERANCE = 0.02


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options of the study, and return the arguments for all its runs as well."""
    parser = argparse.ArgumentParser(description="Compare small batches with and without scale_to_batch.")
    parser.add_argument(
        "--reference_seconds",
        type=float,
        default=80.0,
        help="seconds of audio in a step of the reference (%(default)s)",
    )
    parser.add_argument(
        "--fraction", type=int, default=8, help="divide the step of the reference by this (%(default)s)"
    )
    parser.add_argument(
        "--audio_seconds", type=float, default=24_000.0, help="seconds of audio in each run (%(default)s)"
    )
    parser.add_argument(
        "--evaluations", type=int, default=4, help="number of evaluations, evenly spread (%(default)s)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="three runs for each (%(default)s)")
    parser.add_argument("--runs", choices=RUNS, nargs="+", default=list(RUNS), help="which of the three to do (all)")
    parser.add_argument(
        "--output_dir", default="runs/scale_to_batch", help="path to the folder for the runs (%(default)s)"
    )
    options, flags = parser.parse_known_args(argv)
    if options.fraction < 2 or options.evaluations < 1 or options.audio_seconds < 2 * options.reference_seconds:
        parser.error(
            "--fraction must be at least 2, --evaluations at least 1, and --audio_seconds two --reference_seconds."
        )
    return options, flags


def arguments_of(kind: str, seed: int, options: argparse.Namespace, flags: Sequence[str]) -> PretrainingArguments:
    """Return the arguments of a run of the study."""
    is_small = kind != "reference"
    seconds = options.reference_seconds / (options.fraction if is_small else 1)
    num_steps = round(options.audio_seconds / options.reference_seconds)
    if kind == "unscaled":
        num_steps *= options.fraction
    own = {
        "step_seconds": seconds,
        "micro_seconds": seconds,
        "max_steps": num_steps,
        "eval_steps": max(1, num_steps // options.evaluations),
        "save_steps": 0,
        # Not scaled by scale_to_batch.
        "log_steps": max(1, num_steps * (options.fraction if kind == "scaled" else 1) // 40),
        "reference_step_seconds": options.reference_seconds,
        "scale_to_batch": kind == "scaled",
        "seed": seed,
        "output_dir": f"{options.output_dir}/{kind}-{seed}",
        "eval_data": "synthetic",
    }
    words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
    if flags and not flags[0].startswith("-"):
        return parse_arguments([flags[0], *words, *flags[1:]], TINY)
    return parse_arguments([*TINY_AT_80_SECONDS, *words, *flags], TINY)


def with_speech(arguments: PretrainingArguments, folder: Path) -> PretrainingArguments:
    """Return the run with synthetic speech from files, which are made once for all runs of a seed."""
    asked = arguments.data
    counts = {"train": asked.synthetic_utterances, "validation": math.ceil(asked.eval_seconds / 8)}
    for split, is_wanted in (("train", asked.data == ["synthetic"]), ("validation", asked.eval_data == "synthetic")):
        if is_wanted and not (folder / split).is_dir():
            corpus = synthetic_corpus(asked, num_utterances=counts[split], seed=arguments.run.seed, split=split)
            corpus.export(folder)
    data = asked
    if asked.data == ["synthetic"]:
        data = dataclasses.replace(data, data=[str(folder / "train")])
    if asked.eval_data == "synthetic":
        labels = str(folder / "validation" / "phones.jsonl")
        data = dataclasses.replace(data, eval_data=str(folder / "validation"), eval_labels=labels)
    return dataclasses.replace(arguments, data=data)


def find_errors(arguments: dict[str, PretrainingArguments]) -> list[str]:
    """Check the arguments of the runs against the scaling rules; return what is wrong."""
    found = []
    audio = {kind: one.run.max_steps * one.data.step_seconds for kind, one in arguments.items()}
    if max(audio.values()) > (1 + AUDIO_TOLERANCE) * min(audio.values()):
        found.append(f"the runs have different amounts of audio, in seconds: {audio}")
    reference, small = arguments["reference"], arguments["scaled"]
    steps = small.run.max_steps / reference.run.max_steps
    for name in ("codebook_decay", "ema_decay", "ema_end_decay"):
        # The codebooks' decay is per update of theirs.
        num_updates = steps / (small.model.codebook_update_steps if name == "codebook_decay" else 1)
        kept = getattr(small.model, name) ** num_updates
        if not math.isclose(kept, getattr(reference.model, name), rel_tol=1e-6):
            found.append(f"{name} keeps {kept} where the reference keeps {getattr(reference.model, name)}")
    if not math.isclose(small.run.learning_rate * math.sqrt(steps), reference.run.learning_rate, rel_tol=1e-6):
        found.append(f"learning_rate={small.run.learning_rate} does not follow the square root rule")
    return found


def metrics_of(arguments: PretrainingArguments) -> list[dict[str, float]]:
    """Return the run's lines of metrics so far."""
    path = Path(arguments.run.output_dir) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def refuse_other_options(arguments: PretrainingArguments) -> None:
    """Exit if the folder of a run has one with other arguments."""
    path = Path(arguments.run.output_dir) / "arguments.yaml"
    if path.is_file() and path.read_text(encoding="utf-8") != arguments.to_yaml():
        sys.exit(f"{path.parent} has a run with other options. Give another --output_dir, or remove it.")


def is_finished(arguments: PretrainingArguments) -> bool:
    """Return whether the run was evaluated at its last step."""
    return any(line["step"] == arguments.run.max_steps and "eval_loss" in line for line in metrics_of(arguments))


@torch.no_grad()
def features_of(model: DinoSRForPreTraining, waveform: np.ndarray) -> list[np.ndarray]:
    """Return frames (T, D) of the teacher's layers with a codebook, lowest first, and of the student's top layer."""
    student = model.dinosr(torch.from_numpy(waveform)[None].to(model.device)).last_hidden_state
    return list(torch.cat([target_features(model, waveform), student]).cpu().numpy())


def cluster_figures(model: DinoSRForPreTraining, speech: Sequence[LabelledSpeech]) -> dict[str, float]:
    """Return the PNMI of k-means on the model's frames, fitted to every second utterance, evaluated on the others."""
    model.eval()
    half, rest = ([features_of(model, waveform) for waveform, _ in speech[start::2]] for start in (0, 1))
    labels = [label for _, phones in speech[1::2] for label in phones]
    pnmis = []
    for layer in range(len(half[0])):
        units = fit_kmeans(np.concatenate([frames[layer] for frames in half]), model.config.codebook_size, seed=0)
        pnmis.append(unit_quality(labels, units.predict(np.concatenate([frames[layer] for frames in rest]))).pnmi)
    return {"kmeans_pnmi_teacher": max(pnmis[:-1]), "kmeans_pnmi_student": pnmis[-1]}


def result_of(arguments: PretrainingArguments) -> dict[str, float]:
    """Return the results of a finished run; those that take time are cached in its folder."""
    lines = metrics_of(arguments)
    last = [line for line in lines if line["step"] == arguments.run.max_steps]
    monitor = CollapseMonitor(arguments.model_config(), arguments.run)
    for line in lines:
        monitor.check(line)
    path = Path(arguments.run.output_dir) / "clusters.json"
    if not path.is_file():
        held_out = open_held_out(arguments)
        assert held_out is not None
        model = DinoSRForPreTraining.from_pretrained(arguments.run.output_dir)
        path.write_text(json.dumps(cluster_figures(model, list(held_out.labelled_speech()))))
    result = {"collapsed": float(bool(monitor.standing())), **json.loads(path.read_text())}
    for line in last:
        result |= line
    return result


def show(kind: str, arguments: PretrainingArguments, results: Sequence[dict[str, float]]) -> str:
    """Format a row of the table: the mean over seeds, and each in parentheses."""
    cells = [kind, f"{arguments.data.step_seconds:g} s", f"{arguments.run.max_steps:,}"]
    cells.append(f"{statistics.mean(result['audio_hours'] for result in results):.2f}")
    for name in FIGURES:
        values = [result[name] for result in results]
        each = f" ({', '.join(f'{value:.3g}' for value in values)})" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.3f}{each}")
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str]) -> None:
    options, flags = parse(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    scaled = {
        (kind, seed): scale_to_batch(arguments_of(kind, seed, options, flags))
        for kind in RUNS
        for seed in options.seeds
    }
    plain = {kind: scaled[kind, options.seeds[0]][0] for kind in RUNS}
    if found := find_errors(plain):
        sys.exit("Not run, because a check failed: " + "; ".join(found))
    print(changes_table(*scaled["scaled", options.seeds[0]]), flush=True)

    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in options.runs}
    for seed in options.seeds:
        for kind in options.runs:
            arguments = with_speech(scaled[kind, seed][0], Path(options.output_dir) / f"speech-{seed}")
            refuse_other_options(arguments)
            if not is_finished(arguments):
                run(arguments)
            result = result_of(arguments)
            results[kind].append(result)
            print(
                f"{kind}, seed {seed}: " + ", ".join(f"{name} {result[key]:.3f}" for key, name in FIGURES.items()),
                flush=True,
            )
    hours = [result["audio_hours"] for each in results.values() for result in each]
    if max(hours) > (1 + AUDIO_TOLERANCE) * min(hours):
        sys.exit(f"No comparison: the runs had between {min(hours):.2f} and {max(hours):.2f} hours of audio.")

    machine = headline(torch.device(DEVICE), torch.get_num_threads(), "transformers")
    print(f"\n{machine}; seeds {', '.join(map(str, options.seeds))}\n")
    print(f"| run | step | updates | hours of audio | {' | '.join(FIGURES.values())} |")
    print("|" + "---|" * (4 + len(FIGURES)))
    for kind in options.runs:
        print(show(kind, plain[kind], results[kind]))


if __name__ == "__main__":
    main(sys.argv[1:])
