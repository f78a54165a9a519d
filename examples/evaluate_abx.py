"""
ABX error of features and units of chosen layers, within and across speakers: one table.

    python examples/evaluate_abx.py runs/base --data dev-clean --labels phones.jsonl.gz --output_dir runs/abx
    python examples/evaluate_abx.py runs/base hubert --data dev-clean --labels textgrids --output_dir runs/abx \
        --layers 5 9 --distances angular cosine

Models are folders that pre-training leaves, or encoders of transformers (HuBERT, wav2vec 2.0, data2vec), of which
features are judged. Triphones are cut from the labels and written to triphones.item. Needs the extras `train` and
`abx`, the latter Python 3.12; with --items_only neither.
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dinosr_hf.analysis.abx import (
    SPEAKERS,
    abx_error,
    frame_rate,
    import_fastabx,
    items_text,
    triphone_items,
    write_unit_files,
)
from dinosr_hf.analysis.reports import write_report
from dinosr_hf.analysis.speech import open_reference
from dinosr_hf.data import SpeechSource
from dinosr_hf.inference.windowed import DTYPES
from dinosr_hf.units import FeatureFiles, UnitExtractor, has_codebooks, load_baseline, load_model
from dinosr_hf.utils.command_line import command
from dinosr_hf.utils.model_folder import open_config


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders, or names on the Hub")
    parser.add_argument("--data", required=True, help="folder, table, manifest or dataset to judge on; or: synthetic")
    parser.add_argument("--labels", help="file (.jsonl, .jsonl.gz, .ctm, .TextGrid) or folder of TextGrids")
    parser.add_argument("--tier", default="phones", help="of TextGrids (%(default)s)")
    parser.add_argument("--step_seconds", type=float, default=0.01, help="of labels one a step (%(default)s)")
    parser.add_argument("--speakers", help="column of --data with the speaker (speaker_id, if there is one)")
    parser.add_argument("--silence", nargs="+", default=["SIL"], help="labels that are no phones (%(default)s)")
    parser.add_argument("--layers", type=int, nargs="+", default=[5], help="the lowest is 1 (%(default)s)")
    parser.add_argument(
        "--sources", nargs="+", default=["student"], choices=["student", "teacher"], help="of a DinoSR (%(default)s)"
    )
    parser.add_argument(
        "--distances", nargs="+", default=["angular"], choices=["angular", "cosine", "euclidean"], help="of features"
    )
    parser.add_argument("--max_size_group", type=int, default=10, help="triphones of a kind, at most (%(default)s)")
    parser.add_argument("--max_x_across", type=int, default=5, help="other speakers, at most (%(default)s)")
    parser.add_argument("--items_only", action="store_true", help="write triphones.item, and judge nothing")
    parser.add_argument("--output_dir", required=True, help="for triphones.item, abx.md, abx.csv and abx.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of the models (%(default)s)")
    return parser.parse_args(argv)


def write_representations(
    name: str, source: SpeechSource, folder: Path, options: argparse.Namespace
) -> Iterator[tuple[str, int, str, Path]]:
    """Of one model: source, layer, distance, and the folder of files to be compared by it."""
    where = {"device": options.device, "dtype": options.dtype}
    config = open_config(name)
    is_ours = has_codebooks(config)
    model = load_model(name, **where) if is_ours else None
    for kind in options.sources if is_ours else ["student"]:
        if model is None:
            extractor = load_baseline(name, layers=options.layers, **where)
        else:
            extractor = UnitExtractor(model, layers=options.layers, source=kind)
        FeatureFiles(folder / kind, extractor, source).write()
        for layer in options.layers:
            yield from ((kind, layer, distance, folder / kind / f"layer-{layer}") for distance in options.distances)
        with_codebook = [layer for layer in options.layers if is_ours and layer in config.codebook_layers]
        if with_codebook:
            extractor = UnitExtractor(model, layers=with_codebook, source=kind)
            write_unit_files(extractor.units(source), folder / f"{kind}-units", with_codebook)
            for layer in with_codebook:
                yield kind, layer, "identical", folder / f"{kind}-units" / f"layer-{layer}"


def report(rows: Sequence[dict], out: Path) -> None:
    heads = ["model", "source", "layer", "what", "distance", *(f"{speaker} speakers, %" for speaker in SPEAKERS)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        texts = [f"{100 * value:.2f}" if name in SPEAKERS else str(value) for name, value in row.items()]
        lines.append(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in texts)} |")
    markdown, text = "\n".join(lines) + "\n", io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    print(markdown, end="")
    print(write_report(out, "abx", markdown=markdown, csv=text.getvalue(), rows=rows))


def run(options: argparse.Namespace) -> None:
    if not options.items_only:
        import_fastabx()
    place = {"tier": options.tier, "step_seconds": options.step_seconds, "speaker_column": options.speakers}
    source, reference = open_reference(options.data, labels=options.labels, **place)
    out = Path(options.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, name in enumerate(options.models):
        config = load_baseline(name, layers=[1]).config
        items = triphone_items(source, reference, config, silence=options.silence)
        if number == 0:
            (out / "triphones.item").write_text(items_text(items), encoding="utf-8")
            print(f"{len(items):,} triphones are in {out / 'triphones.item'}.")
        if options.items_only:
            return
        sizes = {"max_size_group": options.max_size_group, "max_x_across": options.max_x_across}
        with TemporaryDirectory(dir=out, prefix=".features-") as folder:
            for kind, layer, distance, files in write_representations(name, source, Path(folder), options):
                row = {"model": name, "source": kind, "layer": layer}
                row |= {"what": "units" if distance == "identical" else "features", "distance": distance}
                for speaker in SPEAKERS:
                    compare = {"speaker": speaker, "distance": distance, "device": options.device}
                    row[speaker] = abx_error(items, files, frame_rate(config), **compare, **sizes)
                rows.append(row)
    report(rows, out)


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        run(parse(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
