"""Flags, data and checks of the commands that evaluate against phones."""

import argparse
from collections.abc import Sequence

from ..analysis.speech import open_reference
from ..analysis.unit_evaluation import Reference
from ..data import SpeechSource
from ..data.mixture import PartialSource
from ..model.modeling_dinosr import check_layers
from ..units.baseline_models import baseline_config, open_feature_extractor
from ..utils.command_line import Parser, argument_errors, refuse_unused
from ..utils.model_folder import has_codebooks, open_config
from ._shared import add_dataset_options, dataset_options, describe_labelled

SpeechWithReference = tuple[SpeechSource, Reference]


def add_labels(parser: Parser) -> None:
    """Add the flags of `open_labelled_speech`."""
    add = parser.add_argument
    add("--labels", help="phones: file (.jsonl, .jsonl.gz, .ctm, .txt), TextGrid, or folder of TextGrids")
    add("--tier", default="phones", help="tier of TextGrids (%(default)s)")
    add("--step_seconds", type=float, default=0.01, help="step of fixed-rate labels (%(default)s)")
    fold = "take ARPABET without stress (AH0: AH) and Kaldi's place in the word (AH_B: AH), and any silence as SIL"
    add("--fold_stress", action="store_true", help=fold)
    speakers = "column of the data with the speaker (speaker_id, if it exists); or: folder, the first one of a path"
    add("--speakers", help=speakers)
    add_dataset_options(parser)


def add_networks(parser: Parser) -> None:
    """Add --sources, for features."""
    networks = ["student", "teacher"]
    text = "networks of a DinoSR whose features to evaluate (student)"
    parser.add_argument("--sources", nargs="+", default=["student"], choices=networks, help=text)


def check_sources(options: argparse.Namespace, parser: Parser, names: Sequence[str] = ("sources",)) -> None:
    """Refuse options that have an effect on a DinoSR alone, if no model is one."""
    if not any(has_codebooks(open_config(name)) for name in options.models):
        refuse_unused(options, parser.get_default, names, "no model is a DinoSR with codebooks", "add one")


def open_labelled_speech(name: str, options: argparse.Namespace, split: str | None = None) -> SpeechWithReference:
    """Open the recordings that have labels, and their phones, by the flags of `add_labels`."""
    labels = {name: getattr(options, name) for name in ("labels", "tier", "step_seconds", "fold_stress")}
    opened = {**dataset_options(options, name), "split": split, "speaker_column": options.speakers}
    source, reference = open_reference(name, **labels, **opened)
    with_labels = [index for index, recording in enumerate(source.ids) if recording in reference.labels]
    return PartialSource(source, with_labels), reference


def check_inputs(
    models: Sequence[str], layers: Sequence[int] | None, labelled: SpeechWithReference | None = None
) -> None:
    """
    Raise `ValueError` now for what would stop the run hours later.

    That is a model that cannot be opened, has no such layer or lacks its feature extractor, or labels that do not fit
    its frames.
    """
    checked = set()
    for name in models:
        config = baseline_config(name)
        with argument_errors(f"{name}: "):
            check_layers(config, layers or [1], with_codebooks=False)
        if not has_codebooks(open_config(name)):
            open_feature_extractor(name)
        frames = config.inputs_to_logits_ratio, config.receptive_field
        if labelled is not None and frames not in checked:
            source, reference = labelled
            reference.check_lengths(source, config)
            checked.add(frames)


def describe_features(name: str, layers: Sequence[int], sources: Sequence[str]) -> str:
    """Say which features of a model are evaluated, for a dry run; `sources` are those of a DinoSR."""
    networks = sources if has_codebooks(open_config(name)) else ["encoder"]
    return f"{name}: layers {list(layers)} of the {' and the '.join(networks)}"


def describe_speech(source: SpeechSource, reference: Reference) -> str:
    """Say what `open_labelled_speech` has opened, for a dry run."""
    return describe_labelled(source, len(reference.speakers) - len(source))


def require_speakers(reference: Reference, what: str) -> None:
    """Raise `ValueError` if the speaker of no recording is known."""
    if not reference.has_speakers:
        raise ValueError(
            f"{what} needs speakers, but the data names none. Give --speakers: the column that has them, or folder, if"
            " the first folder of a recording's path is its speaker, as in LibriSpeech."
        )
