"""
Write an HTML page to look at and listen to the units of a checkpoint, with plots and sounds in it.

    dinosr inspect runs/base my_speech --output page.html
    dinosr inspect runs/base my_speech --labels phones.jsonl --output page.html --layer 9

DATA is a folder, a manifest, an archive or a dataset; --labels has its phones (docs/evaluating-units.md). The page has
tables and plots, and for each codeword its phones, its neighbours and its most typical moments.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..analysis import read_alignments
from ..analysis.inspection import AUDIO_FORMATS, CodewordInspector, render_page
from ..data import SAMPLING_RATE, open_recordings
from ..data.name_matching import match_names
from ..model.modeling_dinosr import check_unit_layers
from ..units import load_model, scored_units
from ..utils.command_line import Parser, command, parse_options, refuse_unused
from ..utils.files import write_atomically
from ._shared import (
    AudioBar,
    add_dataset_options,
    add_device,
    add_dry_run,
    add_dtype,
    claim_output,
    dataset_options,
    describe_labelled,
    print_plan,
)

# Meaning of a unit's score, by source.
SCORES = {"student": "probability", "teacher": "distance", "anchor": "probability"}


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="folder of a pre-trained model, or its name on the Hub")
    parser.add_argument("data", metavar="DATA", help="folder or file of recordings, manifest, archive or dataset")
    parser.add_argument("--output", required=True, help="path of the page, .html")
    add_dataset_options(parser)
    parser.add_argument("--labels", help="phones, as for dinosr evaluate (none: a page without phones)")
    parser.add_argument("--tier", default="phones", help="tier of TextGrids with the phones (%(default)s)")
    parser.add_argument("--words", help="words to draw with the units; may be the --labels file, if that has both")
    parser.add_argument("--step_seconds", type=float, default=0.01, help="step of fixed-rate labels (%(default)s)")
    parser.add_argument("--layer", type=int, help="layer, counted from 1 (5, or the last without units there)")
    parser.add_argument("--source", default="teacher", choices=list(SCORES), help="what gives units (%(default)s)")
    parser.add_argument("--num_moments", type=int, default=5, help="moments to hear of each codeword (%(default)s)")
    parser.add_argument(
        "--context_seconds", type=float, default=0.3, help="seconds of sound before and after a moment (%(default)s)"
    )
    parser.add_argument(
        "--audio", default="flac", choices=list(AUDIO_FORMATS), help="format of the sounds (%(default)s)"
    )
    parser.add_argument(
        "--max_megabytes", type=float, default=20.0, help="limit of the size of all sounds (%(default)s)"
    )
    parser.add_argument("--title", help="title of the page")
    parser.add_argument("--batch_seconds", type=float, default=120.0, help="seconds of audio in a batch (%(default)s)")
    add_device(parser)
    add_dtype(parser)
    add_dry_run(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    options = parse_options(make_parser(), argv, layer=1, num_moments=0)
    unused = partial(refuse_unused, options, make_parser().get_default)
    if not options.labels:
        unused(["tier"], "there are no phones", "give --labels")
        if not options.words:
            unused(["step_seconds"], "there are no labels", "give --labels")
    return options


def run(options: argparse.Namespace) -> None:
    output = claim_output(options.output, options)
    recordings = open_recordings([options.data], **dataset_options(options))
    labels = read_alignments(options.labels, tier=options.tier) if options.labels else None
    words = read_alignments(options.words, tier="words") if options.words else None
    model = load_model(options.model, device=options.device, dtype=options.dtype)
    layer = options.layer or model.config.default_layer(options.source)
    check_unit_layers(model.config, [layer], options.source)
    frames = {"stride": model.config.inputs_to_logits_ratio, "field": model.config.receptive_field}
    inspector = CodewordInspector(
        model.config.num_units(options.source),
        labels=labels,
        words=words,
        recordings=recordings.ids + recordings.others,
        step_seconds=options.step_seconds,
        num_moments=options.num_moments,
        **frames,
    )
    if options.dry_run:
        labelled, _ = match_names(recordings.ids + recordings.others, labels or {})
        num_without = sum(name not in labelled for name in recordings.ids)
        rows = [
            ("model", f"{options.model}: layers [{layer}] of the {options.source}"),
            ("recordings", describe_labelled(recordings, num_without)),
            ("results", str(output)),
        ]
        print_plan(rows)
        return
    with AudioBar(recordings.seconds) as bar:
        for units in scored_units(
            model,
            recordings,
            layer=layer,
            source=options.source,
            batch_seconds=options.batch_seconds,
            on_progress=bar.advance,
        ):
            inspector.add(*units)
    facts = {
        "model": options.model,
        "data": " ".join(filter(None, [options.data, options.split])),
        "labels": options.labels or "none",
        "hours": f"{recordings.seconds / 3600:.2f}",
        "frames a second": f"{SAMPLING_RATE / frames['stride']:g}",
    }
    page = render_page(
        inspector.result(),
        recordings,
        title=options.title or f"Units of {Path(options.model).resolve().name}, layer {layer}",
        name=f"layer {layer}, {options.source}",
        facts=facts,
        score_name=SCORES[options.source],
        audio=options.audio,
        context_seconds=options.context_seconds,
        max_megabytes=options.max_megabytes,
        **frames,
    )
    write_atomically(output, page.html)
    print(f"The page is {output}: {output.stat().st_size / 1e6:.1f} MB with {page.num_clips:,} moments to listen to.")
    if page.num_left_out:
        print(f"{page.num_left_out:,} more had no room; --max_megabytes or --audio ogg makes some.")


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        run(parse(argv))
