"""Make the anchor of a run, or read the one that a checkpoint was trained with."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from ..analysis import Labels, frame_labels, match_labels
from ..analysis.baselines import MFCC_KINDS, mfcc
from ..analysis.kmeans import fit_kmeans
from ..data import SAMPLING_RATE, AudioFileError, SpeechSource, SpeechStream
from ..data.collator import utterance_hash
from ..data.mixture import PartialSource
from ..model.configuration_dinosr import DinoSRConfig
from ..model.modeling_dinosr import check_layers
from ..training.resume import CheckpointError
from ..units import fit_layer_kmeans, open_extractors
from ..units.baseline_models import baseline_config
from ..utils.command_line import ArgumentError, argument_errors
from ..utils.digests import file_digest, value_digest
from ..utils.files import write_atomically
from ..utils.model_folder import open_config
from ..utils.text_files import read_json
from ..utils.threads import threads_of_all_processes
from .anchor import Anchor, MfccAnchor, TrackAnchor, anchor_digest, load_anchor, save_anchor
from .anchor_arguments import anchor_kind, anchor_label_names, read_anchor_labels
from .checkpoint import Checkpoint
from .pretraining_arguments import PretrainingArguments

logger = logging.getLogger(__name__)

# Of MFCCs that k-means is fitted on: 17 minutes of speech, 4 s of a core with 128 clusters. Twice as many take twice
# the time, and 20,000 frames have clusters that are only 1 % wider.
MAX_MFCC_FRAMES = 50_000
# Of a layer likewise, but so many for each cluster if that is more: with 500 clusters, 100,000 frames take three times
# as long for labels that tell no more about phones (docs/experiments.md).
MAX_LAYER_FRAMES, MIN_CLUSTER_FRAMES = 50_000, 100
ORIGIN_FILE = "anchor_origin.json"
# Labels by which a recording may be longer or shorter than before: durations in tables are rounded.
_MAX_ROUNDING = 3
# Samples from one label of a file to the next.
_LABEL_STRIDE = 160


def open_anchor(
    arguments: PretrainingArguments,
    source: SpeechSource | SpeechStream,
    accelerator: Accelerator,
    checkpoint: Checkpoint | None,
) -> Anchor | None:
    """
    Return the anchor of a run, from the file in its folder, which the main process writes first; None if it has none.

    Warns of recordings that came after it was made.

    Raises:
        ArgumentError: If an anchor cannot be made of the arguments and recordings, or that of a resumed run has labels
            of none of them.
        CheckpointError: If the anchor that a checkpoint was trained with is another one, or is missing and cannot be
            made again.
    """
    output_dir = Path(arguments.run.output_dir)
    if arguments.run.anchor is None:
        return None
    # Loading a model draws random numbers, which are the run's in the main process only.
    with accelerator.main_process_first(), torch.random.fork_rng(devices=[]):
        if accelerator.is_main_process:
            with threads_of_all_processes(accelerator.num_processes):
                if checkpoint is None:
                    made = _left_anchor(arguments, source) or _newly_made(arguments, source, accelerator.device)
                else:
                    made = _anchor_of(checkpoint, arguments, source, accelerator.device)
            save_anchor(made, output_dir)
            if checkpoint is None and (origin := _origin(arguments, source)) is not None:
                left = {"origin": origin, "anchor": anchor_digest(made)}
                write_atomically(output_dir / ORIGIN_FILE, json.dumps(left) + "\n")
        anchor = load_anchor(output_dir)
    if checkpoint is not None and isinstance(anchor, TrackAnchor) and isinstance(source, SpeechSource):
        _compare_recordings(anchor, source, checkpoint)
    return anchor


def _newly_made(arguments: PretrainingArguments, source: SpeechSource | SpeechStream, device: torch.device) -> Anchor:
    started = time.perf_counter()
    made = make_anchor(arguments, source, device)
    seconds = time.perf_counter() - started
    logger.info(f"Anchor {arguments.run.anchor}: {made.num_labels} labels, made in {seconds:.1f} s.")
    return made


def _origin(arguments: PretrainingArguments, source: SpeechSource | SpeechStream) -> str | None:
    """Return a digest of what labels of a model are made from; None for other anchors, which are made in seconds."""
    options = arguments.run
    if options.anchor is None or anchor_kind(options.anchor) != "model":
        return None
    assert isinstance(source, SpeechSource)
    found = (Path(options.anchor).glob(name) for name in ("*.json", "model*.safetensors", "pytorch_model*.bin"))
    model = [file_digest(file) for file in sorted(itertools.chain.from_iterable(found))]
    if not model:
        model = [options.anchor, str(getattr(open_config(options.anchor), "_commit_hash", None))]
    drawn = (arguments.model.num_anchor_labels, options.anchor_layer, options.seed, arguments.data.max_seconds)
    return value_digest([model, *drawn, source.utterances])


def _left_anchor(arguments: PretrainingArguments, source: SpeechSource | SpeechStream) -> Anchor | None:
    """Return the anchor that a run left in the folder before its first checkpoint, if it was made from the same."""
    folder = Path(arguments.run.output_dir)
    try:
        left, anchor = read_json(folder / ORIGIN_FILE), load_anchor(folder)
    except (OSError, ValueError, CheckpointError):
        return None
    if left != {"origin": _origin(arguments, source), "anchor": anchor_digest(anchor)}:
        return None
    logger.info(f"Anchor {arguments.run.anchor}: the labels in {folder}, of the same layer and recordings.")
    return anchor


def _anchor_of(
    checkpoint: Checkpoint, arguments: PretrainingArguments, source: SpeechSource | SpeechStream, device: torch.device
) -> Anchor:
    """
    Read the anchor beside a checkpoint; if it is missing or damaged, make it again.

    Raises `CheckpointError` if neither gives the one that the checkpoint was trained with.
    """
    wanted = checkpoint.manifest["anchor"]
    try:
        anchor = load_anchor(checkpoint.path.parent)
        if anchor_digest(anchor) == wanted:
            return anchor
        raise CheckpointError(
            f"The anchor in {checkpoint.path.parent} is not the one that {checkpoint.path.name} was trained with. Copy"
            f" the right file back, or start another run in another output_dir with base_model={checkpoint.path}."
        )
    except CheckpointError as error:
        with contextlib.suppress(ValueError, OSError):
            made = make_anchor(arguments, source, device)
            if anchor_digest(made) == wanted:
                logger.warning(f"{error} It was made again instead, from the same recordings, with the same labels.")
                return made
        raise


def _compare_recordings(anchor: TrackAnchor, source: SpeechSource, checkpoint: Checkpoint) -> None:
    """
    Warn of recordings that the anchor does not know.

    Raises `ArgumentError` if it has labels of none, or knows other recordings by their ids.
    """
    ids = source.ids
    advice = f"start another run in another output_dir with base_model={checkpoint.path}."
    if not any(len(anchor.tracks.get(utterance_id, ())) for utterance_id in ids):
        known = next(utterance_id for utterance_id, track in anchor.tracks.items() if len(track))
        raise ArgumentError(
            f"data: none of {len(ids):,} recordings has labels of the anchor, which was made when the run began: their"
            f" ids are like {ids[0]}, those with labels like {known}. Give the data of then (of several, the name of"
            f" each is part of the ids), or {advice}"
        )
    others = [
        utterance_id
        for utterance_id, num_samples in source.utterances
        if (track := anchor.tracks.get(utterance_id)) is not None
        and len(track)
        and abs(len(track) - (num_samples - anchor.field) // anchor.stride - 1) > _MAX_ROUNDING
    ]
    if others:
        raise ArgumentError(
            f"data: {len(others):,} of {len(ids):,} recordings, such as {others[0]}, are longer or shorter than those"
            " of the same ids were when the anchor was made: its labels are of other recordings. Give the data of"
            f" then, or {advice}"
        )
    if new := [utterance_id for utterance_id in ids if utterance_id not in anchor.tracks]:
        logger.warning(
            f"{len(new):,} of {len(ids):,} recordings, such as {new[0]}, are unknown to the anchor, which was made"
            f" when the run began: they are trained on without its labels. To have them labelled, {advice}"
        )


def make_anchor(arguments: PretrainingArguments, source: SpeechSource | SpeechStream, device: torch.device) -> Anchor:
    """Make the anchor that the arguments ask for; the device is for a model. Raises `ArgumentError` if it cannot."""
    name = arguments.run.anchor
    assert name is not None
    kind = anchor_kind(name)
    if kind == "mfcc":
        return _mfcc_anchor(arguments, source)
    assert isinstance(source, SpeechSource)  # `settle_anchor` refuses streams
    with argument_errors(f"anchor={name}: ", (OSError, ValueError)):
        if kind == "labels":
            return _label_anchor(arguments, source)
        return _model_anchor(arguments, source, device)


def check_anchor(arguments: PretrainingArguments, source: SpeechSource | SpeechStream) -> None:
    """Raise `ArgumentError` where `make_anchor` would, as far as labels, configuration and lengths tell."""
    name = arguments.run.anchor
    if name is None:
        return
    kind = anchor_kind(name)
    if kind == "mfcc":
        if isinstance(source, SpeechSource):
            _check_mfccs(arguments, source)
        return
    assert isinstance(source, SpeechSource)  # `settle_anchor` refuses streams
    with argument_errors(f"anchor={name}: ", (OSError, ValueError)):
        if kind == "labels":
            _match_labels(read_anchor_labels(name, arguments.data.label_tier), source)
        else:
            _check_model(arguments, source)


def _mfcc_lengths(arguments: PretrainingArguments) -> tuple[int, int]:
    """Return the number of samples that a recording must have to be clustered, and that of it at most are."""
    min_samples = max(int(arguments.data.min_seconds * SAMPLING_RATE), arguments.model_config().receptive_field)
    return min_samples, int(arguments.data.max_seconds * SAMPLING_RATE)


def _check_mfccs(arguments: PretrainingArguments, source: SpeechSource) -> None:
    config, (min_samples, max_samples) = arguments.model_config(), _mfcc_lengths(arguments)
    lengths = [utterance.num_samples for utterance in source.utterances if utterance.num_samples >= min_samples]
    num_frames = sum(
        int(config.num_frames(min(length, max_samples))) * max(1, length // max_samples) for length in lengths
    )
    _check_num_frames(num_frames, arguments.model.num_anchor_labels)


def _crops_in_rounds(
    source: SpeechSource, min_samples: int, max_samples: int, seed: int
) -> Iterator[tuple[int, int, int]]:
    """Yield index, start and length of a random part of each recording, then of further parts of long ones."""
    left = _in_random_order(source, min_samples, seed)
    for number in itertools.count():
        in_round, left = left, []
        for index in in_round:
            utterance_id, length = source.utterances[index]
            num_samples = min(length, max_samples)
            first = utterance_hash(seed, 0, utterance_id, "anchor crop") * (length - num_samples + 1) >> 128
            starts = [
                *range(first, length - num_samples + 1, num_samples),
                *range(first % num_samples, first, num_samples),
            ]
            yield index, starts[number], num_samples
            if number + 1 < len(starts):
                left.append(index)
        if not left:
            return


def _mfcc_anchor(arguments: PretrainingArguments, source: SpeechSource | SpeechStream) -> MfccAnchor:
    """Cluster the MFCCs of random recordings, of a stream's first window, cropped as for training."""
    num_labels, seed = arguments.model.num_anchor_labels, arguments.run.seed
    config, is_tuned = arguments.model_config(), MFCC_KINDS[arguments.run.anchor_features]
    if isinstance(source, SpeechStream):
        windows = source.windows(0)
        source = next(windows).source
        windows.close()
    min_samples, max_samples = _mfcc_lengths(arguments)
    features: list[NDArray[np.float32]] = []
    num_frames = 0
    for index, start, num_samples in _crops_in_rounds(source, min_samples, max_samples, seed):
        try:
            waveform = source.load(index, start, num_samples)
        except (AudioFileError, OSError):  # training counts and reports it
            continue
        if np.isfinite(waveform).all() and waveform.min() < waveform.max():
            features.append(mfcc(waveform, field=config.receptive_field, tuned=is_tuned))
            num_frames += len(features[-1])
        if num_frames >= MAX_MFCC_FRAMES:
            break
    _check_num_frames(num_frames, num_labels)
    kmeans = fit_kmeans(np.concatenate(features)[:MAX_MFCC_FRAMES], num_labels, seed)
    return MfccAnchor(kmeans, config.receptive_field, is_tuned)


def _check_num_frames(num_frames: int, num_labels: int) -> None:
    if num_frames < num_labels:
        raise ArgumentError(
            f"num_anchor_labels={num_labels} is more than the {num_frames:,} frames of the recordings. Lower"
            " num_anchor_labels, or give more speech."
        )


def _in_random_order(source: SpeechSource, min_samples: int, seed: int) -> list[int]:
    utterances = source.utterances
    usable = [index for index, utterance in enumerate(utterances) if utterance.num_samples >= min_samples]
    return sorted(usable, key=lambda index: utterance_hash(seed, 0, utterances[index].id, "anchor"))


def _random_recordings(
    arguments: PretrainingArguments, source: SpeechSource, config: DinoSRConfig, num_frames: int
) -> PartialSource:
    """Draw recordings that have so many frames in parts of `max_seconds`, one of each; all if they have fewer."""
    max_samples, drawn = int(arguments.data.max_seconds * SAMPLING_RATE), []
    for index in _in_random_order(source, config.receptive_field, arguments.run.seed):
        drawn.append(index)
        num_frames -= int(config.num_frames(min(source.utterances[index].num_samples, max_samples)))
        if num_frames <= 0:
            break
    return PartialSource(source, drawn)


def _small(labels: list[int] | NDArray[np.int64], num_labels: int) -> NDArray[np.unsignedinteger]:
    """Store labels in as few bytes as they need."""
    return np.asarray(labels).astype(np.min_scalar_type(num_labels))


def _no_tracks(source: SpeechSource, num_labels: int) -> dict[str, NDArray[np.unsignedinteger]]:
    """Return an empty track for each recording, by which a resumed run knows those without labels from new ones."""
    return dict.fromkeys(source.ids, _small([], num_labels))


def _check_tracks(tracks: Mapping[str, NDArray[np.unsignedinteger]]) -> None:
    if not any(map(len, tracks.values())):
        raise ArgumentError("No recording with labels is as long as a frame. Give longer recordings.")


def _match_labels(labels: Mapping[str, Labels], source: SpeechSource) -> dict[str, str]:
    return match_labels(source.ids, labels, others=source.others)


def _label_anchor(arguments: PretrainingArguments, source: SpeechSource) -> TrackAnchor:
    """Turn the labels of a file into tracks."""
    config, path = arguments.model_config(), arguments.run.anchor
    assert path is not None
    labels = read_anchor_labels(path, arguments.data.label_tier)
    numbers = {name: number for number, name in enumerate(anchor_label_names(labels))}
    field = config.receptive_field
    names = _match_labels(labels, source)
    tracks = _no_tracks(source, len(numbers))
    for utterance_id, num_samples in source.utterances:
        if utterance_id not in names or num_samples < field:
            continue
        num_steps = (num_samples - field) // _LABEL_STRIDE + 1
        try:
            own = frame_labels(labels[names[utterance_id]], num_steps, stride=_LABEL_STRIDE, field=field)
        except ValueError as error:
            raise ArgumentError(f"{utterance_id}: {error}") from error
        tracks[utterance_id] = _small([numbers[label] for label in own], len(numbers))
    logger.info(f"{sum(len(track) > 0 for track in tracks.values()):,} of {len(source):,} recordings have labels.")
    _check_tracks(tracks)
    return TrackAnchor(tracks, len(numbers), _LABEL_STRIDE, field, config.inputs_to_logits_ratio, field)


def _check_model(arguments: PretrainingArguments, source: SpeechSource) -> None:
    """Raise `ValueError` unless the anchor is a model with the layer, and the recordings have enough of its frames."""
    options = arguments.run
    assert options.anchor is not None and options.anchor_layer is not None
    config = baseline_config(options.anchor)
    check_layers(config, [options.anchor_layer], with_codebooks=False)
    num_frames = sum(int(config.num_frames(num_samples)) for _, num_samples in source.utterances)
    _check_num_frames(num_frames, arguments.model.num_anchor_labels)


def _model_anchor(arguments: PretrainingArguments, source: SpeechSource, device: torch.device) -> TrackAnchor:
    """
    Cluster a layer of a model on random recordings, and label all.

    HuBERT's way, but with features normalised over each recording and averaged over three frames: their clusters tell
    more of phones (docs/experiments.md).
    """
    options, num_labels, config = arguments.run, arguments.model.num_anchor_labels, arguments.model_config()
    assert options.anchor is not None and options.anchor_layer is not None
    _check_model(arguments, source)
    (extractor,) = open_extractors(options.anchor, layers=[options.anchor_layer], is_smoothed=True, device=device)
    logger.info(f"Labelling {len(source):,} recordings with layer {options.anchor_layer} of {options.anchor}.")
    max_frames = max(MAX_LAYER_FRAMES, MIN_CLUSTER_FRAMES * num_labels)
    some = _random_recordings(arguments, source, extractor.config, max_frames)
    kmeans = fit_layer_kmeans(extractor, some, num_labels, max_frames=max_frames, seed=options.seed)
    tracks = _no_tracks(source, num_labels)
    tracks |= {name: _small(codes[0], num_labels) for name, codes in extractor.units(source, kmeans=kmeans)}
    _check_tracks(tracks)
    stride, field = extractor.config.inputs_to_logits_ratio, extractor.config.receptive_field
    return TrackAnchor(tracks, num_labels, stride, field, config.inputs_to_logits_ratio, config.receptive_field)
