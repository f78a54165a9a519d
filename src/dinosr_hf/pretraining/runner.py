"""A whole run: open the data, find the checkpoint to resume from, and run the loop."""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, set_seed

from ..analysis import read_alignments
from ..analysis.plots import save_figure
from ..data import (
    SAMPLING_RATE,
    DatasetSource,
    MixedSource,
    SpeechSource,
    SpeechStream,
    min_maskable_samples,
    open_source,
    open_stream,
)
from ..data.mixture import hold_out
from ..data.synthetic import SyntheticCorpus
from ..model.modeling_dinosr import DinoSRForPreTraining
from ..training.restarts import check_connected, separate_restarts
from ..training.resume import (
    CheckpointError,
    changed_arguments,
    find_checkpoints,
    lock_output_folder,
    refuse_existing_model,
    warn_of_changes,
)
from ..training.run_record import public_values
from ..utils.command_line import ArgumentError, argument_errors
from ..utils.files import write_atomically
from ..utils.model_folder import open_dinosr_config, open_weights
from ..utils.threads import set_cpu_threads
from .anchor_making import check_anchor, open_anchor
from .base_model import initial_model
from .best_model import BestModel
from .checkpoint import Checkpoint, abandon_later, checkpoint_to_resume, remove_leftovers
from .feed import StepFeed
from .held_out import HeldOut
from .loop import Pretraining
from .plan import RunPlan, describe_left_out, plan_figure
from .pretraining_arguments import DataArguments, PretrainingArguments, RunArguments, value_for
from .run_folder import begin_record, finished_step, recorded_run, truncate_metrics
from .scaling import Change, changes_table, scale_to_batch
from .train_state import check_fits

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


# Arguments that say what a run began with, and with these what it learnt from.
_BEGINNING = ("base_model", "new_codebooks", "anchor", "anchor_layer", "anchor_features")
_IDENTITY = (*_BEGINNING, "data", "data_split", "data_config", "synthetic_languages", "seed")


def synthetic_corpus(data: DataArguments, *, num_utterances: int, seed: int, split: str) -> SyntheticCorpus:
    """
    Return the corpus that `data: synthetic` stands for, or its validation or test split, with other speakers.

    Raises `ValueError` for languages that the corpus does not have, and other impossible values.
    """
    return SyntheticCorpus(
        num_utterances=num_utterances,
        seed=seed,
        languages=data.synthetic_languages,
        split=split,
        noise=data.synthetic_noise,
        text="mixed",
        num_texts=(data.synthetic_texts[0], data.synthetic_texts[-1]),
    )


def _speak(corpus: SyntheticCorpus) -> datasets.Dataset:
    # In this process if there is little to say: another one needs seconds before its first utterance.
    num_proc = min(8, os.cpu_count() or 1, len(corpus) // 32)
    return corpus.to_dataset(num_proc=num_proc if num_proc > 1 else None)


def _open_one(data: DataArguments, number: int, seed: int) -> SpeechSource | SpeechStream:
    name = data.data[number]
    if name == "synthetic":
        logger.info(f"Making {data.synthetic_utterances} utterances with espeak-ng.")
        corpus = synthetic_corpus(data, num_utterances=data.synthetic_utterances, seed=seed, split="train")
        return DatasetSource(_speak(corpus))
    options: dict[str, Any] = {"split": value_for(data.data_split, number), "audio_column": data.audio_column}
    options["config_name"] = value_for(data.data_config, number)
    if data.streaming:
        return open_stream(name, **options, window_seconds=data.window_seconds, seed=seed)
    return open_source(name, **options)


def _check_lengths(source: SpeechSource, data: DataArguments, name: str) -> None:
    """Raise `ArgumentError` if all recordings are too short; warn if most of the audio is in too long ones."""
    lengths = [utterance.num_samples for utterance in source.utterances]
    longest, min_seconds = max(lengths), data.min_seconds
    of_name = "" if len(data.data) == 1 else f" of {name}"
    found = f"No recording{of_name} is at least {min_seconds=} long (the longest has {longest / SAMPLING_RATE:.3g} s)"
    if longest < int(min_seconds * SAMPLING_RATE):
        raise ArgumentError(f"{found}. Lower --min_seconds.")
    if longest < int(min_seconds * SAMPLING_RATE) * (1 + data.speed_change):
        raise ArgumentError(
            f"{found} at the highest speed of speed_change={data.speed_change:g}. Lower --min_seconds or"
            " --speed_change."
        )
    used = sum(min(length, int(data.max_seconds * SAMPLING_RATE)) for length in lengths) / sum(lengths)
    if used < 0.5:
        logger.warning(
            f"An epoch uses only {used:.0%} of the audio{of_name}: a part of max_seconds={data.max_seconds:g} of each"
            " recording. To use all, list them as parts (`dinosr manifest --cut_seconds`)."
        )


def open_data(data: DataArguments, seed: int) -> tuple[SpeechSource | SpeechStream, SpeechSource | None]:
    """
    Open the recordings that `data` names; several are mixed. Return them, and what `eval_share` holds out.

    The seed is for the synthetic corpus, and for the order of a stream. Raises `ValueError` if one cannot be opened,
    or all of its recordings are too short.
    """
    sources = [_open_one(data, number, seed) for number in range(len(data.data))]
    held_out: SpeechSource | None = None
    if data.eval_share and data.eval_data is None and isinstance(first := sources[0], SpeechSource):
        with argument_errors("eval_share: "):
            sources[0], held_out = hold_out(first, data.eval_share)
    for name, source in zip(data.data, sources, strict=True):
        if isinstance(source, SpeechSource):
            _check_lengths(source, data, name)
    if len(sources) == 1:
        return sources[0], held_out
    mixed = MixedSource(
        [source for source in sources if isinstance(source, SpeechSource)],
        _names(data),
        weights=data.data_weights or None,
        temperature=data.data_temperature,
    )
    min_samples, max_samples = int(data.min_seconds * SAMPLING_RATE), int(data.max_seconds * SAMPLING_RATE)
    logger.info(mixed.describe(min_samples=min_samples, max_samples=max_samples))
    return mixed, held_out


def _names(data: DataArguments) -> list[str]:
    """
    Name several data by as few of their last path components as tell them apart, so that a corpus can be moved; with
    configuration and split if they have one each.
    """
    parts_of = [Path(name).parts or (name,) for name in data.data]
    short = (["/".join(parts[-length:]) for parts in parts_of] for length in range(1, max(map(len, parts_of)) + 1))
    names = next((names for names in short if len(set(names)) == len(names)), [str(Path(name)) for name in data.data])
    for values in (data.data_config, data.data_split):
        if len(values) > 1:
            names = [f"{name}:{value}" if value else name for name, value in zip(names, values, strict=True)]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ArgumentError(f"data has {repeated} twice. Name it once; --data_weights says how often it is used.")
    return names


def open_held_out(arguments: PretrainingArguments, held_out: SpeechSource | None = None) -> HeldOut | None:
    """
    Open the speech that a run is evaluated on, with its labels if there are any: `eval_data`, or what `open_data` has
    held out. None if there is neither.

    Synthetic speech has other voices than the training data. Raises `ValueError` if it cannot be opened, no utterance
    is usable, or labels do not fit.
    """
    data, labels, name = arguments.data, None, f"eval_data={arguments.data.eval_data}"
    if data.eval_data is None and held_out is None:
        return None
    if held_out is not None:
        source, name = held_out, f"eval_share={data.eval_share:g}"
    elif data.eval_data == "synthetic":
        # An utterance has at least about 8 seconds, so this many have eval_seconds together.
        num_utterances = math.ceil(data.eval_seconds / 8)
        corpus = synthetic_corpus(data, num_utterances=num_utterances, seed=arguments.run.seed, split="validation")
        rows = _speak(corpus)
        source = DatasetSource(rows)
        labels = {row["id"]: row["phones"] for row in rows.select_columns(["id", "phones"])}
    else:
        assert data.eval_data is not None
        options: dict[str, Any] = {"split": data.eval_split, "audio_column": data.audio_column}
        same = [number for number, trained in enumerate(data.data) if trained == data.eval_data]
        if same:
            configs = {value_for(data.data_config, number) for number in same}
            if len(configs) > 1:
                raise ArgumentError(
                    f"{name} is among the data with the configurations {', '.join(sorted(map(str, configs)))}, and"
                    " which of them to evaluate on is not known. Give other eval_data, or eval_share."
                )
            (options["config_name"],) = configs
            if data.eval_split in (value_for(data.data_split, number) for number in same):
                advice = "Give another eval_split, or eval_share"
                logger.warning("%s is trained on, so its figures are too good. %s.", name, advice)
        with argument_errors("eval_data="):
            source = open_source(data.eval_data, **options)
    if data.eval_labels is not None:
        with argument_errors("eval_labels="):
            labels = read_alignments(data.eval_labels, tier=data.label_tier)
    with argument_errors(f"{name}: "):
        return HeldOut(
            source,
            arguments.model_config(),
            batch_seconds=data.micro_seconds,
            limit_seconds=data.eval_seconds,
            max_seconds=data.max_seconds,
            labels=labels,
        )


def _check_mask_fits(arguments: PretrainingArguments) -> None:
    config, data = arguments.model_config(), arguments.data
    shortest, needed = int(data.min_seconds * SAMPLING_RATE), min_maskable_samples(config)
    if shortest < needed:
        raise ArgumentError(
            f"mask_length={config.mask_length} does not fit: an utterance of min_seconds={data.min_seconds:g} has only"
            f" {config.num_frames(shortest)} frames. Raise min_seconds to at least {-(-needed // 160) / 100:.2f} or"
            " lower mask_length."
        )


def _make_accelerator(arguments: PretrainingArguments) -> Accelerator:
    options = arguments.run
    separate_restarts()
    with argument_errors():  # of trackers and mixed_precision
        accelerator = Accelerator(
            mixed_precision=options.mixed_precision,
            log_with=options.trackers or None,
            project_dir=options.output_dir,
            # The others wait while the main process scans the recordings and makes labels of an anchor, which may take
            # many hours, and NCCL's default limit is ten minutes.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(days=30))],
        )
    check_connected(accelerator.num_processes)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ArgumentError(
            f"{accelerator.distributed_type.value} shards the weights, which the teacher's average does not support."
            " Use plain data parallelism (`accelerate launch --multi_gpu`); base and large fit a GPU with it."
        )
    known = {getattr(tracker, "value", tracker) for tracker in accelerator.log_with}
    for name in options.trackers:
        if name not in known:
            raise ArgumentError(f"trackers={name} is unknown to Accelerate, or not installed here.")
    if not accelerator.is_main_process:
        logging.getLogger("dinosr_hf").setLevel(logging.ERROR)
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise ArgumentError("mixed_precision=fp16 needs a GPU; a CPU would compute in float32. Give bf16 or no.")
    set_cpu_threads(options.num_threads, accelerator.num_processes)  # beside a GPU they make the anchor
    return accelerator


def run(arguments: PretrainingArguments) -> DinoSRForPreTraining | None:
    """
    Run a pre-training from its data to the trained model, as `dinosr pretrain` does.

    If `output_dir` has a checkpoint, the run resumes from it. Returns the trained model, or None after a dry run.

    Raises:
        ArgumentError: If `output_dir` has a model and no checkpoint, or a finished run with other data, is in use or
            cannot be written to, if a mask span does not fit the shortest utterance, or the data, the `base_model` or
            the `anchor` cannot be opened.
        CheckpointError: If there are checkpoints but none can be used with this `base_model` and anchor, or one cannot
            be written.
        TrainingStopped: If going on would be of no use.
        RunInterrupted: After SIGTERM, SIGINT or SIGHUP; a checkpoint was written.
        ValueError: If no step can be made of the data.
    """
    arguments, changes = scale_to_batch(arguments)
    _check_mask_fits(arguments)
    accelerator = _make_accelerator(arguments)
    if arguments.run.dry_run:
        _dry_run(arguments, changes, accelerator)
        return None
    if changes:
        logger.info(changes_table(arguments, changes))
    with lock_output_folder(arguments.run.output_dir) if accelerator.is_main_process else contextlib.nullcontext():
        return _train(arguments, accelerator)


def _dry_run(arguments: PretrainingArguments, changes: Sequence[Change], accelerator: Accelerator) -> None:
    """Print and draw the plan of the run, and open all that it would open."""
    world_size, seed = accelerator.num_processes, arguments.run.seed
    with argument_errors("", (ValueError, OSError)), accelerator.main_process_first():
        source, held_out = open_data(arguments.data, seed)
        open_held_out(arguments, held_out)
    check_anchor(arguments, source)
    if arguments.run.base_model is not None:
        with argument_errors("base_model="):
            open_dinosr_config(arguments.run.base_model)
    feed = StepFeed(source, arguments.data, arguments.model_config(), seed=seed, world_size=world_size)
    summary = feed.summarize()
    left_out = None
    if summary is not None and isinstance(source, SpeechSource):  # what a stream leaves out is not known
        left_out = describe_left_out(arguments.data, source, summary)
    plan = RunPlan(arguments, summary, world_size, changes=changes, left_out=left_out)
    if accelerator.is_main_process:
        print(plan)
        try:
            drawn = f"is drawn in {save_figure(plan_figure(plan), Path(arguments.run.output_dir) / 'plan.png')}"
        except ImportError:
            drawn = 'is not drawn, as there is no matplotlib (pip install "dinosr-hf[analysis]")'
        print(f"\nThe plan {drawn}. Nothing was trained.")


def _resume(arguments: PretrainingArguments, accelerator: Accelerator) -> Checkpoint | None:
    """
    Find the checkpoint to resume from, and report what has changed since.

    Raises `CheckpointError` if the run began with another model or anchor.
    """
    options, output_dir = arguments.run, Path(arguments.run.output_dir)
    if accelerator.is_main_process:
        remove_leftovers(output_dir)
    check = partial(check_fits, arguments=arguments, accelerator=accelerator)
    checkpoint = checkpoint_to_resume(options.resume, output_dir, check, accelerator)
    if checkpoint is None:
        return None
    manifest, now = checkpoint.manifest, public_values(arguments.to_dict())
    if changes := changed_arguments(manifest["arguments"], now, _BEGINNING):
        raise CheckpointError(
            f"{checkpoint.path} is of a run that began in another way: {changes}. Give the same, or start another run"
            f" in another output_dir, with base_model={checkpoint.path} to train its model on."
        )
    epoch, hours = manifest["feed"]["epoch"], manifest["progress"]["audio_seconds"] / 3600
    position = f"step {checkpoint.step} of {options.max_steps}, epoch {epoch}, {hours:.2f} hours of audio"
    logger.info(f"Resuming from {checkpoint.path}: {position}.")
    # If mixed_precision is unset, it is what Accelerate is configured to.
    saved = manifest["arguments"] | {"mixed_precision": manifest["precision"]}
    now |= {"mixed_precision": accelerator.mixed_precision}
    warn_of_changes(saved, now, now.keys() - {"output_dir", "resume", "trackers", "num_workers", "num_threads"})
    return checkpoint


def _end_step(options: RunArguments, finished_at: int, accelerator: Accelerator) -> int:
    """Return the last step of a run: the one it finished at (0: not) if patience ended it, else `max_steps`."""
    if not (finished_at and options.eval_patience):
        return options.max_steps
    best = BestModel(options.output_dir, options.eval_patience, accelerator)
    return finished_at if best.ended_at(finished_at) else options.max_steps


def _refuse_other_run(arguments: PretrainingArguments, saved: Mapping[str, Any]) -> None:
    """Raise `ArgumentError` if the saved arguments, of the finished run in `output_dir`, are those of another run."""
    names = [name for name in _IDENTITY if name in saved]  # none without a record
    if changes := changed_arguments(saved, public_values(arguments.to_dict()), names):
        output_dir = Path(arguments.run.output_dir)
        raise ArgumentError(
            f"output_dir={output_dir} has a finished run with other arguments, so nothing would be trained: {changes}."
            f" Give another output_dir, and base_model={output_dir} there to train that model on."
        )


def _open_finished(output_dir: Path, last: Checkpoint | None) -> DinoSRForPreTraining | None:
    """Open the model of a finished run; None if it cannot be opened, but the run's `last` checkpoint has it too."""
    try:
        with argument_errors("output_dir="):
            model = open_weights(
                DinoSRForPreTraining, output_dir, advice="Give another output_dir to begin a new run."
            )
    except ArgumentError as error:
        if last is None:
            raise
        logger.warning(f"{error} It is written again from {last.path.name}.")
        return None
    go_on = "To continue it, raise max_steps, or eval_patience if that ended it; to start another, give"
    if not find_checkpoints(output_dir):
        go_on = f"It has no checkpoint to go on from. To train its model on, give base_model={output_dir} and"
    logger.info(f"This run is finished. {go_on} another output_dir.")
    return model


def _finished_model(
    arguments: PretrainingArguments, checkpoint: Checkpoint | None, accelerator: Accelerator
) -> DinoSRForPreTraining | None:
    """
    Return the model of a run that is finished; None if the run is to go on, or to write its model again.

    `checkpoint` is one of the run's own. Raises `ArgumentError` if without a checkpoint a model would be lost, or what
    is finished is another run.
    """
    output_dir = Path(arguments.run.output_dir)
    found: list[Any] = [None, 0]
    if accelerator.is_main_process:  # others may see an older state of a shared disk
        found = [recorded_run(output_dir) if checkpoint is None else None, finished_step(output_dir)]
    record, last_step = broadcast_object_list(found)
    end_step = _end_step(arguments.run, last_step, accelerator)
    if record is not None and record.finished is not None:
        last_step = max(last_step, record.steps)  # finished.json may be damaged
    if checkpoint is not None and checkpoint.goes_back and last_step > checkpoint.step:
        return None
    if last_step < end_step:
        if checkpoint is None and (record is None or record.finished is not None):
            refuse_existing_model(output_dir)  # else it is of this run, which did not finish
        return None
    saved = checkpoint.manifest["arguments"] if checkpoint else record.arguments if record else {}
    _refuse_other_run(arguments, saved)
    return _open_finished(output_dir, last=checkpoint if checkpoint and checkpoint.step >= end_step else None)


def _train(arguments: PretrainingArguments, accelerator: Accelerator) -> DinoSRForPreTraining:
    options, output_dir = arguments.run, Path(arguments.run.output_dir)
    checkpoint = _resume(arguments, accelerator)
    is_own = checkpoint is not None and checkpoint.path.parent.resolve() == output_dir.resolve()
    own = checkpoint if is_own else None  # one of another folder says nothing of what is in this one
    finished = _finished_model(arguments, own, accelerator)
    accelerator.wait_for_everyone()  # before files change that the others have just looked at
    if finished is not None:
        return finished
    set_seed(options.seed)
    with argument_errors("", (ValueError, OSError)):
        with accelerator.main_process_first():
            source, held_out_source = open_data(arguments.data, options.seed)
        held_out = open_held_out(arguments, held_out_source)
    anchor = open_anchor(arguments, source, accelerator, checkpoint)
    if checkpoint is None:
        with accelerator.main_process_first():
            model = initial_model(arguments)
    else:  # it has all weights; the base model may be gone
        model = DinoSRForPreTraining(arguments.model_config())
    _describe(model, source, accelerator)
    record = None
    if accelerator.is_main_process:
        write_atomically(output_dir / "arguments.yaml", arguments.to_yaml())
        if own is not None and own.goes_back:
            abandon_later(output_dir, own)
        last_step = own.step if own else 0
        truncate_metrics(output_dir, last_step, is_last=last_step >= options.max_steps)
        record = begin_record(arguments, source, accelerator, is_resumed=is_own)
    if options.trackers:
        items = public_values(arguments.to_dict()).items()  # trackers take plain values only
        plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in items}
        try:
            accelerator.init_trackers("dinosr", config=plain)
        except Exception as error:  # of whatever the tracker needs, such as a login
            logger.error(f"No tracker gets the metrics: {type(error).__name__}: {error}")
    try:
        return Pretraining(model, source, arguments, accelerator, checkpoint, held_out, anchor, record).run()
    finally:
        for tracker in accelerator.trackers:  # writes what they hold back; `end_training` would wait for the others
            try:
                tracker.finish()
            except Exception as error:  # whatever it is, it changes nothing of how the run ended
                logger.error(f"The tracker {tracker.name} may lack the last steps: {type(error).__name__}: {error}")


def _describe(model: DinoSRForPreTraining, source: SpeechSource | SpeechStream, accelerator: Accelerator) -> None:
    num_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    amount = "a stream"
    if isinstance(source, SpeechSource):
        amount = f"{source.seconds / 3600:.2f} h in {len(source):,} utterances"
    logger.info(
        f"{num_parameters:,} parameters to train; {amount}; {accelerator.num_processes} process(es) on"
        f" {accelerator.device.type}, precision {accelerator.mixed_precision}."
    )
