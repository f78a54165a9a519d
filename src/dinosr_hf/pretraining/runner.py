"""A whole run: where the data comes from, what the run goes on from, and then the loop."""

from __future__ import annotations

import datetime
import logging
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, set_seed
from filelock import BaseFileLock, FileLock, Timeout

from ..analysis import read_alignments
from ..data import (
    SAMPLING_RATE,
    DatasetSource,
    MixedSource,
    SpeechSource,
    SpeechStream,
    min_maskable_samples,
    open_source,
)
from ..data.synthetic import SyntheticCorpus
from ..model.modeling_dinosr import DinoSRForPreTraining
from ..utils.command_line import ArgumentError
from ..utils.threads import set_cpu_threads
from .base_model import initial_model
from .checkpoint import Checkpoint, choose_checkpoint
from .feed import StepFeed
from .held_out import HeldOut, row_labels
from .loop import Pretraining
from .plan import describe_plan, plan_figure
from .pretraining_arguments import ARCHITECTURE, DataArguments, PretrainingArguments
from .run_summary import begin_record, finish_record
from .scaling import Change, changes_table, scale_to_batch
from .state import cut_metrics, finished_step

logger = logging.getLogger(__name__)


def synthetic_corpus(data: DataArguments, *, num_utterances: int, seed: int, split: str) -> SyntheticCorpus:
    """
    The corpus that `data: synthetic` stands for, or its other splits, which have other speakers.

    Args:
        data: Its `synthetic_languages`, `synthetic_texts` and `synthetic_noise` count.
        num_utterances: How many utterances.
        seed: Of the corpus.
        split: "train", "validation" or "test".

    Raises:
        ValueError: For values the corpus does not have.
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


def _open_one(data: DataArguments, number: int, seed: int) -> SpeechSource | SpeechStream:
    name = data.data[number]
    if name == "synthetic":
        logger.info("Making %d utterances with espeak-ng.", data.synthetic_utterances)
        corpus = synthetic_corpus(data, num_utterances=data.synthetic_utterances, seed=seed, split="train")
        return DatasetSource(corpus.to_dataset(num_proc=min(8, os.cpu_count() or 1)))

    def own(values: list[str]) -> str | None:
        return values[number if len(values) > 1 else 0] if values else None

    return open_source(
        name,
        split=own(data.data_split),
        config_name=own(data.data_config),
        audio_column=data.audio_column,
        streaming=data.streaming,
        window_seconds=data.window_seconds,
        seed=seed,
    )


def open_data(data: DataArguments, seed: int) -> SpeechSource | SpeechStream:
    """
    Open what `data` names; several are mixed.

    Args:
        data: Names, splits, configurations, weights and temperature.
        seed: Of the synthetic corpus, and of the order of a stream.

    Raises:
        ValueError: As the sources.
    """
    sources = [_open_one(data, number, seed) for number in range(len(data.data))]
    if len(sources) == 1:
        return sources[0]
    mixed = MixedSource(
        [source for source in sources if isinstance(source, SpeechSource)],
        _names(data),
        weights=data.data_weights or None,
        temperature=data.data_temperature,
    )
    min_samples, max_samples = int(data.min_seconds * SAMPLING_RATE), int(data.max_seconds * SAMPLING_RATE)
    logger.info("%s", mixed.describe(min_samples=min_samples, max_samples=max_samples))
    return mixed


def _names(data: DataArguments) -> list[str]:
    """
    What tells several data apart: as few of their last path components as do, so that a corpus can be moved, with
    configuration and split where they have one each.
    """
    parts_of = [Path(name).parts or (name,) for name in data.data]
    names = next(
        (
            short
            for length in range(1, max(map(len, parts_of)) + 1)
            if len(set(short := ["/".join(parts[-length:]) for parts in parts_of])) == len(short)
        ),
        data.data,
    )
    parts = [values if len(values) > 1 else [] for values in (data.data_config, data.data_split)]
    return [":".join([name, *(values[number] for values in parts if values)]) for number, name in enumerate(names)]


def _check_mask_fits(arguments: PretrainingArguments) -> None:
    config, data = arguments.model_config(), arguments.data
    shortest = int(data.min_seconds * SAMPLING_RATE)
    needed = min_maskable_samples(config)
    if shortest < needed:
        raise ArgumentError(
            f"mask_length={config.mask_length} does not fit: the shortest utterance has {config.num_frames(shortest)}"
            f" frames ({shortest:,} samples). Raise min_seconds to at least {-(-needed // 160) / 100:.2f} or lower"
            " mask_length."
        )


def _make_accelerator(arguments: PretrainingArguments) -> Accelerator:
    options = arguments.run
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        log_with=options.trackers or None,
        project_dir=options.output_dir,
        # The others wait while the main process looks through the recordings, and NCCL's own limit is ten minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=3))],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ArgumentError(
            f"{accelerator.distributed_type.value} shards the weights, and the teacher follows them one by one. Use"
            " plain data parallelism (`accelerate launch --multi_gpu`); base and large fit a GPU with it."
        )
    known = {getattr(tracker, "value", tracker) for tracker in accelerator.log_with}
    for name in options.trackers:
        if name not in known:
            raise ArgumentError(f"trackers={name} is no tracker that Accelerate knows, or it is not installed here.")
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise ArgumentError("mixed_precision=fp16 needs a GPU: on a CPU it would be float32. Give bf16 or no.")
    if not accelerator.is_main_process:
        logging.getLogger("dinosr_hf").setLevel(logging.ERROR)
    if accelerator.device.type == "cpu":
        set_cpu_threads(options.num_threads, accelerator.num_processes)
    return accelerator


def _lock(output_dir: Path, accelerator: Accelerator) -> BaseFileLock | None:
    """Two runs in one folder would write over each other."""
    if not accelerator.is_main_process:
        return None
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output_dir / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ArgumentError(
            f"Another run is at work in output_dir={output_dir}. Give another folder, or end that run (an"
            " interrupted `accelerate launch` can leave its training process behind)."
        ) from error
    except OSError as error:
        raise ArgumentError(f"output_dir={output_dir} cannot be written to: {error}") from error
    return lock


def _report_changes(checkpoint: Checkpoint, arguments: PretrainingArguments, precision: str) -> None:
    """Say which arguments are not those that the checkpoint's run was told."""
    before, now = checkpoint.manifest["arguments"], arguments.to_dict()
    # What Accelerate was configured to counts, where mixed_precision is left out.
    before, now = before | {"mixed_precision": checkpoint.manifest["precision"]}, now | {"mixed_precision": precision}
    quiet = {"output_dir", "resume", "trackers", "num_workers", "num_threads"}
    changed = [name for name in now if name not in quiet and before.get(name) != now[name]]
    for name in changed:
        logger.warning("%s is %s now, and was %s at the checkpoint.", name, now[name], before.get(name))


def _resume(arguments: PretrainingArguments, accelerator: Accelerator) -> Checkpoint | None:
    options, output_dir = arguments.run, Path(arguments.run.output_dir)
    config = arguments.model_config().to_dict()
    if accelerator.is_main_process:
        for rest in [*output_dir.glob(".unfinished-*"), *output_dir.glob(".removed-*")]:  # of a run that was killed
            shutil.rmtree(rest, ignore_errors=True)
    checkpoint = choose_checkpoint(
        options.resume, output_dir, {name: config[name] for name in ARCHITECTURE}, accelerator
    )
    is_other = checkpoint is None and (output_dir / "config.json").exists()
    if is_other and finished_step(output_dir) < options.max_steps:
        raise ArgumentError(f"output_dir={output_dir} has a model already. Give another folder, or remove this one.")
    if checkpoint is not None:
        progress = checkpoint.manifest["progress"]
        logger.info(
            "Resuming from %s: step %d of %d, epoch %d, %.2f hours of audio.",
            checkpoint.path,
            checkpoint.step,
            options.max_steps,
            checkpoint.manifest["feed"]["epoch"],
            progress["audio_seconds"] / 3600,
        )
        _report_changes(checkpoint, arguments, accelerator.mixed_precision)
    return checkpoint


def _describe(model: DinoSRForPreTraining, source: SpeechSource | SpeechStream, accelerator: Accelerator) -> None:
    num_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    amount = "a stream"
    if isinstance(source, SpeechSource):
        hours = sum(utterance.num_samples for utterance in source.utterances) / SAMPLING_RATE / 3600
        amount = f"{hours:.2f} h in {len(source):,} utterances"
    logger.info(
        "%s parameters to train; %s; %d process(es) on %s, precision %s.",
        f"{num_parameters:,}",
        amount,
        accelerator.num_processes,
        accelerator.device.type,
        accelerator.mixed_precision,
    )


def open_held_out(arguments: PretrainingArguments) -> HeldOut | None:
    """
    Open the speech that a run is judged on: of other voices if it is synthetic, with labels if there are any.

    Args:
        arguments: Of the run.

    Returns:
        The speech, None without `eval_data`.

    Raises:
        ValueError: As the sources and `HeldOut`.
    """
    data = arguments.data
    if data.eval_data is None:
        return None
    labels: Any = None
    if data.eval_data == "synthetic":
        # An utterance has 8 seconds at least, or else there are a few less than asked for.
        num_utterances = math.ceil(data.eval_seconds / 8)
        corpus = synthetic_corpus(data, num_utterances=num_utterances, seed=arguments.run.seed, split="validation")
        rows = corpus.to_dataset(num_proc=min(8, os.cpu_count() or 1))
        source: SpeechSource | SpeechStream = DatasetSource(rows)
        labels = row_labels(rows.select_columns(["id", "phones"]))
    else:
        source = open_source(data.eval_data, split=data.eval_split, audio_column=data.audio_column)
    assert isinstance(source, SpeechSource)
    if data.eval_labels is not None:
        labels = read_alignments(data.eval_labels)
    return HeldOut(
        source,
        arguments.model_config(),
        batch_seconds=data.micro_seconds,
        limit_seconds=data.eval_seconds,
        max_seconds=data.max_seconds,
        labels=labels,
    )


def _dry_run(
    arguments: PretrainingArguments,
    source: SpeechSource | SpeechStream,
    accelerator: Accelerator,
    changes: Sequence[Change],
) -> None:
    """Print and draw what the run would be."""
    world_size = accelerator.num_processes
    feed = StepFeed(source, arguments.data, arguments.model_config(), seed=arguments.run.seed, world_size=world_size)
    plan = describe_plan(arguments, feed.summarize(), world_size, changes=changes)
    if accelerator.is_main_process:
        print(plan)
        picture = Path(arguments.run.output_dir) / "plan.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        plan_figure(plan).savefig(picture, dpi=150)
        print(f"\nThe picture is {picture}. Nothing was trained.")


def run(arguments: PretrainingArguments) -> DinoSRForPreTraining | None:
    """
    A whole run: data, model, training; what `examples/pretrain.py` does.

    If `output_dir` has a checkpoint, the run goes on from it.

    Args:
        arguments: As `parse_arguments` gives them.

    Returns:
        The trained model; None after a dry run.

    Raises:
        ArgumentError: If `output_dir` has a model and nothing to resume from, is in use or cannot be written to, if a
            span does not fit the shortest utterance, or the data or the `base_model` cannot be opened.
        CheckpointError: If there are checkpoints but none can be used, or one cannot be written.
        TrainingStopped: If going on would be of no use.
        RunInterrupted: After SIGTERM, SIGINT or SIGHUP; a checkpoint was written.
        ValueError: If no step can be made of the data.
    """
    arguments, changes = scale_to_batch(arguments)
    if changes and not arguments.run.dry_run:
        kappa = arguments.data.step_seconds / arguments.run.reference_step_seconds
        logger.info("%s", changes_table(changes, kappa))
    options = arguments.run
    output_dir = Path(options.output_dir)
    _check_mask_fits(arguments)
    accelerator = _make_accelerator(arguments)
    lock = None if options.dry_run else _lock(output_dir, accelerator)
    try:
        return _run(arguments, changes, accelerator)
    finally:
        if lock is not None:
            lock.release()


def _run(
    arguments: PretrainingArguments, changes: Sequence[Change], accelerator: Accelerator
) -> DinoSRForPreTraining | None:
    options, output_dir = arguments.run, Path(arguments.run.output_dir)
    checkpoint = None if options.dry_run else _resume(arguments, accelerator)
    if not options.dry_run and finished_step(output_dir) >= options.max_steps:
        logger.info("This run is finished. To train on, raise max_steps; to begin another, give another output_dir.")
        return DinoSRForPreTraining.from_pretrained(output_dir)
    set_seed(options.seed)
    try:
        with accelerator.main_process_first():
            source = open_data(arguments.data, options.seed)
        held_out = None if options.dry_run else open_held_out(arguments)
    except (ValueError, OSError) as error:
        raise ArgumentError(str(error)) from error
    if options.dry_run:
        _dry_run(arguments, source, accelerator, changes)
        return None
    if checkpoint is None:
        with accelerator.main_process_first():
            model = initial_model(arguments)
    else:  # it has everything; what the run once started from may be gone
        model = DinoSRForPreTraining(arguments.model_config())
    _describe(model, source, accelerator)
    record = None
    if accelerator.is_main_process:
        (output_dir / "arguments.yaml").write_text(arguments.to_yaml(), encoding="utf-8")
        cut_metrics(output_dir, checkpoint.step if checkpoint else 0)
        processes = accelerator.num_processes
        record = begin_record(arguments, source, num_processes=processes, is_resumed=checkpoint is not None)
    if options.trackers:
        told = arguments.to_dict()  # trackers take plain values only
        plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in told.items()}
        accelerator.init_trackers("dinosr", config=plain)
    try:
        trained = Pretraining(model, source, arguments, accelerator, checkpoint, held_out).run()
        if record is not None:
            finish_record(arguments, record, held_out)
        return trained
    finally:
        for tracker in accelerator.trackers:  # what they hold back is written; no waiting for others here
            tracker.finish()
