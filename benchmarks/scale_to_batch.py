"""
Is a small batch better with `scale_to_batch` than without?

    python benchmarks/scale_to_batch.py --seeds 0 1 2
    python benchmarks/scale_to_batch.py --audio_seconds 60000 --output_dir runs/scaling --data my_recordings \
        --eval_data my_test_recordings --eval_labels my_phones.jsonl

Three runs of the same model, for each seed, with the same amount of audio: steps of `--reference_seconds`; steps of a
fraction of it, with the same values of all arguments; steps of this fraction, with these values scaled. They are runs
of the real command in this process, judged on held-out speech with phone labels. What is not an option of this script
goes to all of them, behind a YAML file if there is one. Without one it is examples/configs/tiny_cpu.yaml, on synthetic
speech, at values for steps of 80 s. Held-out speech is synthetic too, unless `--eval_data` says otherwise.

A run that is finished is only read, one that was interrupted goes on.

The codes of two runs have unlike numbers of codewords in use. So the frames of both are also clustered anew, into as
many clusters as there are codewords, by k-means on half of the held-out utterances, and judged on the other half: the
best of the teacher's layers, as normalised for the codebooks, and the student's top layer. `collapsed` is the share of
the runs that end with a warning of the run's own monitor.

Before the first run, the scaled values are checked, and after the last, that all had the same amount of audio.
"""

import argparse
import dataclasses
import datetime
import json
import logging
import math
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.analysis.baselines import kmeans_units
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

TINY = Path(__file__).parent.parent / "examples" / "configs" / "tiny_cpu.yaml"
# The tiny model's values are for steps of 40 s. What is counted in steps is at the same audio here.
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
    """The options of the study, and the arguments of all its runs."""
    parser = argparse.ArgumentParser(description="Compare small batches with and without scale_to_batch.")
    parser.add_argument("--reference_seconds", type=float, default=80.0, help="audio of a step of the reference")
    parser.add_argument("--fraction", type=int, default=8, help="the small step is the reference's over this")
    parser.add_argument("--audio_seconds", type=float, default=24_000.0, help="audio of each run")
    parser.add_argument("--evaluations", type=int, default=4, help="of a run, evenly spread; the last is at its end")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", choices=RUNS, nargs="+", default=list(RUNS))
    parser.add_argument("--output_dir", default="runs/scale_to_batch", help="a folder for each run in it")
    options, flags = parser.parse_known_args(argv)
    if options.fraction < 2 or options.evaluations < 1 or options.audio_seconds < 2 * options.reference_seconds:
        parser.error("--fraction must be at least 2, --evaluations 1, --audio_seconds two steps of the reference.")
    return options, flags


def arguments_of(kind: str, seed: int, options: argparse.Namespace, flags: Sequence[str]) -> PretrainingArguments:
    """What a run of the study is told."""
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
        # Scaling leaves it as it is.
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
    """The same run with synthetic speech read from files: made once for all runs of a seed, not by each of them."""
    told = arguments.data
    counts = {"train": told.synthetic_utterances, "validation": math.ceil(told.eval_seconds / 8)}
    for split, is_wanted in (("train", told.data == ["synthetic"]), ("validation", told.eval_data == "synthetic")):
        if is_wanted and not (folder / split).is_dir():
            corpus = synthetic_corpus(told, num_utterances=counts[split], seed=arguments.run.seed, split=split)
            corpus.export(folder)
    data = told
    if told.data == ["synthetic"]:
        data = dataclasses.replace(data, data=[str(folder / "train")])
    if told.eval_data == "synthetic":
        labels = str(folder / "validation" / "phones.jsonl")
        data = dataclasses.replace(data, eval_data=str(folder / "validation"), eval_labels=labels)
    return dataclasses.replace(arguments, data=data)


def complaints(arguments: dict[str, PretrainingArguments]) -> list[str]:
    """What is wrong with the study: nothing, it is hoped."""
    found = []
    audio = {kind: told.run.max_steps * told.data.step_seconds for kind, told in arguments.items()}
    if max(audio.values()) > (1 + AUDIO_TOLERANCE) * min(audio.values()):
        found.append(f"the runs have different amounts of audio, in seconds: {audio}")
    reference, small = arguments["reference"], arguments["scaled"]
    steps = small.run.max_steps / reference.run.max_steps
    for name in ("codebook_decay", "ema_decay", "ema_end_decay"):
        # The codebooks' decay counts from one of their updates to the next.
        num_updates = steps / (small.model.codebook_update_steps if name == "codebook_decay" else 1)
        kept = getattr(small.model, name) ** num_updates
        if not math.isclose(kept, getattr(reference.model, name), rel_tol=1e-6):
            found.append(f"{name} keeps {kept} of what the reference keeps {getattr(reference.model, name)} of")
    if not math.isclose(small.run.learning_rate * math.sqrt(steps), reference.run.learning_rate, rel_tol=1e-6):
        found.append(f"learning_rate={small.run.learning_rate} does not follow the square root rule")
    return found


def metrics_of(arguments: PretrainingArguments) -> list[dict[str, float]]:
    """The run's lines of metrics so far."""
    path = Path(arguments.run.output_dir) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def is_finished(arguments: PretrainingArguments) -> bool:
    """Whether there is a last line about held-out speech."""
    return any(line["step"] == arguments.run.max_steps and "eval_loss" in line for line in metrics_of(arguments))


@torch.no_grad()
def features_of(model: DinoSRForPreTraining, waveform: np.ndarray) -> list[np.ndarray]:
    """Frames (T, D) of the teacher's layers that have a codebook, lowest first, and of the student's top layer."""
    student = model.dinosr(torch.from_numpy(waveform)[None].to(model.device)).last_hidden_state
    return list(torch.cat([target_features(model, waveform), student]).cpu().numpy())


def cluster_figures(model: DinoSRForPreTraining, speech: Sequence[LabelledSpeech]) -> dict[str, float]:
    """PNMI of k-means on the model's frames: clusters of every second utterance, judged on the others."""
    model.eval()
    half, rest = ([features_of(model, waveform) for waveform, _ in speech[start::2]] for start in (0, 1))
    labels = [label for _, phones in speech[1::2] for label in phones]
    pnmis = []
    for layer in range(len(half[0])):
        units = kmeans_units(np.concatenate([frames[layer] for frames in half]), model.config.codebook_size, seed=0)
        pnmis.append(unit_quality(labels, units.predict(np.concatenate([frames[layer] for frames in rest]))).pnmi)
    return {"kmeans_pnmi_teacher": max(pnmis[:-1]), "kmeans_pnmi_student": pnmis[-1]}


def result_of(arguments: PretrainingArguments) -> dict[str, float]:
    """What is found at the end of a run; what takes time is kept in its folder."""
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
    result = {"collapsed": float(monitor.has_collapsed), **json.loads(path.read_text())}
    for line in last:
        result |= line
    return result


def show(kind: str, arguments: PretrainingArguments, results: Sequence[dict[str, float]]) -> str:
    """A row of the table: the mean over seeds, and behind it each."""
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
    told = {
        (kind, seed): scale_to_batch(arguments_of(kind, seed, options, flags))
        for kind in RUNS
        for seed in options.seeds
    }
    plain = {kind: told[kind, options.seeds[0]][0] for kind in RUNS}
    if found := complaints(plain):
        sys.exit("Not run, because it is wrong: " + "; ".join(found))
    print(changes_table(told["scaled", options.seeds[0]][1], 1 / options.fraction), flush=True)

    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in options.runs}
    for seed in options.seeds:
        for kind in options.runs:
            arguments = with_speech(told[kind, seed][0], Path(options.output_dir) / f"speech-{seed}")
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

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(
        f"\n{datetime.date.today()}, {device}, Python {platform.python_version()}, torch {torch.__version__},"
        f" transformers {transformers.__version__}; seeds {', '.join(map(str, options.seeds))}\n"
    )
    print(f"| run | step | updates | hours of audio | {' | '.join(FIGURES.values())} |")
    print("|" + "---|" * (4 + len(FIGURES)))
    for kind in options.runs:
        print(show(kind, plain[kind], results[kind]))


if __name__ == "__main__":
    main(sys.argv[1:])
