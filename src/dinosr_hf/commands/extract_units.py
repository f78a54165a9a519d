"""
Turn recordings into acoustic units, or into the continuous features of layers.

    dinosr units runs/base my_speech --output_dir units
    dinosr units runs/base my_speech --output_dir units --deduplicate --dtype bfloat16
    dinosr units runs/base my_speech --output_dir features --features npy --layers 5 9

Inputs are audio files (wav, flac, mp3, aiff, ...) and folders of them, or one manifest, archive or dataset. Run the
same command again to resume after an interruption, or to add recordings. Unreadable ones are skipped and listed.
With several GPUs, start it by `accelerate launch -m dinosr_hf.cli units`.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ..model.modeling_dinosr import UNIT_SOURCES
from ..training.restarts import check_connected, separate_restarts
from ..units import FEATURE_FORMATS, FeatureFiles, LayerKMeans, UnitCorpus, UnitExtractor, load_model
from ..units.corpus import FORMATS
from ..utils.command_line import Parser, command, parse_options, program, refuse_unused
from ..utils.threads import set_cpu_threads
from ._shared import AudioBar, add_dtype, add_inputs, add_windows, open_inputs, windows_of


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder that pre-training wrote, or name on the Hub")
    add_inputs(parser)
    add("--output_dir", required=True, help="folder to write units or features to")
    add("--layers", type=int, nargs="+", help="layers, counted from 1 (5, or the last without units there)")
    sources = (*UNIT_SOURCES, "student_feed_forward")
    add("--source", choices=sources, help="what gives units or features (student)")
    add("--kmeans", help="file of dinosr kmeans, to use its clusters, layer and source")
    add("--deduplicate", action="store_true", help="merge runs of a unit, and write durations in frames")
    add("--format", default="jsonl", choices=FORMATS, help="format of units (%(default)s)")
    add("--features", choices=FEATURE_FORMATS, help="write features in this format instead of units")
    add_windows(parser)
    shard = "seconds of audio per shard of units; a kill costs at most one per process (%(default)s)"
    add("--shard_seconds", type=float, default=3600.0, help=shard)
    add("--device", help="device of the model (the GPU of the process if there is one, else the CPU)")
    add_dtype(parser)
    add("--dry_run", action="store_true", help="open model and inputs, say what would be written, and end")
    add("--num_threads", type=int, default=0, help="CPU threads per process; 0: its share of the cores")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    return parse_options(make_parser(), argv, num_threads=0)


def use_kmeans(options: argparse.Namespace) -> LayerKMeans | None:
    """Load the k-means file, if there is one, and take layer and source from it; `ValueError` if others are given."""
    if not options.kmeans:
        return None
    kmeans = LayerKMeans.load(options.kmeans)
    for name, value in (("layers", [kmeans.layer]), ("source", kmeans.source)):
        if (given := getattr(options, name)) not in (None, value):
            fitted = f"{options.kmeans} is of layer {kmeans.layer} of the {kmeans.source}"
            raise ValueError(f"{name}={given} is set, but {fitted}. Leave {name} out, or give another file.")
        setattr(options, name, value)
    return kmeans


@torch.no_grad()
def run(options: argparse.Namespace, state: PartialState) -> int:
    """Extract units or features; return the number of recordings that could not be read."""
    if options.features:
        for_units = ("kmeans", "deduplicate", "format", "shard_seconds")
        refuse_unused(options, make_parser().get_default, for_units, "--features writes no units", "omit --features")
    source = open_inputs(options)
    kmeans = use_kmeans(options)
    options.source = options.source or "student"
    model = load_model(options.model, device=options.device or state.device, dtype=options.dtype)
    if model.device.type == "cpu":
        set_cpu_threads(options.num_threads, state.num_processes)
    options.layers = options.layers or [model.config.default_layer(options.source)]
    extractor = UnitExtractor(
        model,
        layers=options.layers,
        source=options.source,
        is_smoothed=kmeans is not None and kmeans.is_smoothed,
        **windows_of(options),
    )
    place = {"process": state.process_index, "num_processes": state.num_processes}
    files: FeatureFiles | UnitCorpus
    if options.features:
        files = FeatureFiles(options.output_dir, extractor, source, form=options.features, **place)
    else:
        form = {"form": options.format, "deduplicate": options.deduplicate, "shard_seconds": options.shard_seconds}
        files = UnitCorpus(options.output_dir, extractor, source, kmeans=kmeans, **form, **place)
    if options.dry_run:
        if state.is_main_process:
            print(files.plan(), f"They are of layers {options.layers} of the {options.source}. Nothing was written.")
        return 0
    if state.is_main_process:
        files.open()
    state.wait_for_everyone()
    with files:
        to_do = source.seconds_of(files.todo())
        with AudioBar(to_do, num_processes=state.num_processes, is_shown=state.is_main_process) as bar:
            files.write(on_progress=bar.advance)
        state.wait_for_everyone()
        if not state.is_main_process:
            return 0
        if isinstance(files, FeatureFiles):
            number = f"{files.num_complete:,} recordings, with {len(extractor.layers)} file(s) each"
            print(f"{number}, are in {options.output_dir}; {bar}")
            return len(files.left_out)
        summary = files.finish()
    print(
        f"{summary['num_recordings']:,} recordings, {summary['hours']:,.2f} hours, layers {options.layers} of the"
        f" {options.source}, in {len(summary['files'])} files of {options.output_dir}; {bar}"
    )
    return len(summary["left_out"])


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    cpu = options.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    separate_restarts()
    # A process that is done waits for all others, however long they take.
    state = PartialState(cpu=cpu, timeout=timedelta(days=30))
    try:
        with command(__file__):
            check_connected(state.num_processes)
            num_left_out = run(options, state)
    finally:
        state.destroy_process_group()
    if num_left_out:
        print(f"{program(__file__)}: {num_left_out:,} recordings could not be read and were skipped.", file=sys.stderr)
