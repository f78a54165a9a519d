"""A complete fine-tuning run: open the data, load the model, train, evaluate, and write the results."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import set_seed

from ..data import SAMPLING_RATE, LabelledSource
from ..model.configuration_dinosr import DinoSRConfig
from ..training.resume import lock_output_folder, set_aside_later
from ..training.run_record import RunRecord, describe_hardware, public_values, time_now, write_record
from ..utils.command_line import ArgumentError, argument_errors
from ..utils.compat import check_resumable
from ..utils.model_folder import save_folder
from ..utils.threads import set_cpu_threads
from .batches import LabelledDataset
from .finetuning_arguments import FinetuningArguments, InitialModelArguments, LabelledDataArguments
from .initial_model import add_adapters, check_initial_model, load_initial_model, merge_adapters, renew_head
from .resume_point import ResumePoint, TrainerCheckpoint, find_resume_point
from .splits import open_splits
from .task import Task, shorten_labels
from .trainer import FreezeCallback, SpeechTrainer, mean_step_seconds

logger = logging.getLogger(__name__)


def _training_set(
    source: LabelledSource, task: Task, config: DinoSRConfig, data: LabelledDataArguments, seed: int
) -> LabelledDataset:
    """Select the utterances that can be trained on, and report the others."""
    targets = task.targets(source)
    crop_samples = None if task.crop_seconds is None else int(task.crop_seconds * SAMPLING_RATE)

    def exclusion_reason(target: Any, num_samples: int) -> str | None:
        if num_samples < data.min_seconds * SAMPLING_RATE:
            return "too short"
        if crop_samples is None and num_samples > data.max_seconds * SAMPLING_RATE:
            return "too long"
        fewest = int(num_samples / (1 + data.speed_change))  # when it is played at the highest speed
        return task.exclusion_reason(target, config.num_frames(fewest))

    reasons = [exclusion_reason(*pair) for pair in zip(targets, source.num_samples, strict=True)]
    excluded = Counter(reason for reason in reasons if reason is not None)
    counts = ""
    if excluded:
        examples = {reason: source.ids[reasons.index(reason)] for reason in sorted(excluded)}
        counts = ", ".join(f"{excluded[reason]:,} {reason} (e.g. {name})" for reason, name in examples.items())
    positions = [position for position, reason in enumerate(reasons) if reason is None]
    if not positions:
        raise ArgumentError(
            f"{source.name}: none of {len(source):,} utterances can be trained on: {counts}. Check"
            f" min_seconds={data.min_seconds:g}, max_seconds={data.max_seconds:g} and the labels."
        )
    if excluded:
        logger.warning(f"{excluded.total():,} of {len(source):,} utterances are left out of training: {counts}.")
    return LabelledDataset(
        source, targets, positions, crop_samples=crop_samples, speed_change=data.speed_change, seed=seed
    )


def _describe_data(train: LabelledDataset, unreadable: Collection[int] = ()) -> list[dict[str, Any]]:
    """Return an entry of the record for each dataset that is trained on; `unreadable` are indices in `train`."""
    source, described = train.source, []
    for number, name in enumerate(source.names):
        own = [index for index, position in enumerate(train.positions) if source.datasets[position] == number]
        hours = sum(train.num_samples[index] for index in own) / SAMPLING_RATE / 3600
        counts = {"utterances": len(own), "unreadable": len({*own} & {*unreadable})}
        described.append({"name": name, "split": source.split, "hours": hours, **counts})
    return described


def _make_trainer(
    task: Task, start: InitialModelArguments, data: LabelledDataArguments, arguments: FinetuningArguments
) -> tuple[SpeechTrainer, LabelledDataset | None]:
    """Open data and model; return the trainer, which has the training and evaluation data, and the test data."""
    set_seed(arguments.seed)
    set_cpu_threads(arguments.num_threads, arguments.world_size)
    initial = check_initial_model(start)  # before the data, which can take long
    with argument_errors(kinds=(ValueError, OSError)):
        splits = open_splits(data, arguments.seed)
        task.prepare(splits.train)
    model: Any = load_initial_model(task.model_class, start, task.config_changes())
    has_head = not start.from_scratch and task.model_class.__name__ in (initial.architectures or ())
    known = task.labels_of(start.model) if has_head else None
    if known is not None and known != task.labels():
        renew_head(model)
        logger.warning(
            f"{start.model} was trained with other labels ({shorten_labels(known)}): its head starts anew."
            f"{task.keep_head_advice}"
        )
    train = _training_set(splits.train, task, model.config, data, arguments.seed)
    evaluation, test = (
        None if source is None else LabelledDataset(source, task.targets(source)) for source in splits[1:]
    )
    if 0 < arguments.max_steps <= arguments.freeze_steps:
        reach = f"freeze_steps={arguments.freeze_steps} reaches to the last of max_steps={arguments.max_steps}"
        logger.warning(f"{reach}: only the head learns. Lower freeze_steps to train the encoder too.")
    callbacks = [FreezeCallback(model.base_model, arguments.freeze_steps)] if arguments.freeze_steps else []
    if start.lora_rank:
        model = add_adapters(model, start)
    if evaluation is None and arguments.eval_strategy != "no":
        raise ArgumentError("There is no evaluation data. Give eval_data or eval_split, or set --eval_strategy no.")
    arguments.metric_for_best_model, arguments.greater_is_better = f"eval_{task.metric}", task.greater_is_better
    options = {"train_dataset": train, "eval_dataset": evaluation, "callbacks": callbacks}
    return SpeechTrainer(model, arguments, compute_metrics=task.metrics, **options), test


def _evaluate(trainer: SpeechTrainer, task: Task, splits: dict[str, LabelledDataset | None]) -> list[dict[str, Any]]:
    """Evaluate on the splits that exist, and write their predictions and errors to the output folder."""
    results = []
    for name, dataset in splits.items():
        if dataset is None:
            continue
        output = trainer.predict(dataset, metric_key_prefix=name)
        metrics = output.metrics or {}
        trainer.log_metrics(name, metrics)
        source, split = dataset.source, dataset.source.split or name
        result: dict[str, Any] = {"dataset": source.name, "split": split, "num_utterances": len(dataset)}
        if trainer.is_world_process_zero():
            result |= task.report(source, output.predictions, Path(trainer.args.output_dir), name)
            result["real_time_factor"] = metrics[f"{name}_real_time_factor"]
            if name == "eval":
                task.calibrate(trainer.config, source, output.predictions)
        results.append(result)
    return results


def _check_unchanged(checkpoint: TrainerCheckpoint, labels: Sequence[str], data: list[dict[str, Any]]) -> None:
    """Refuse to resume if the head's labels are others than at the checkpoint; warn if the recordings are."""
    if checkpoint.labels is not None and list(labels) != list(checkpoint.labels):
        changes = {"new": {*labels} - {*checkpoint.labels}, "gone": {*checkpoint.labels} - {*labels}}
        shown = "; ".join(f"{kind}: {shorten_labels(sorted(names))}" for kind, names in changes.items() if names)
        raise ArgumentError(
            f"{checkpoint.path} was trained with other labels ({shown or 'in another order'}). Undo the change of the"
            " training data, or give another output_dir."
        )
    if checkpoint.record is not None and checkpoint.record.data != data:
        before, now = (
            ", ".join(
                f"{one['name']}: {one['utterances']:,} utterances, {one['hours']:.2f} hours" for one in described
            )
            for described in (checkpoint.record.data, data)
        )
        logger.warning(f"The training data has changed since {checkpoint.path} ({before}); now it has {now}.")


def _train_and_save(
    trainer: SpeechTrainer, task: Task, test: LabelledDataset | None, record: RunRecord, begin: ResumePoint
) -> RunRecord:
    """Train, write the model, evaluate it and write the record; return the complete record."""
    folder, checkpoint = Path(trainer.args.output_dir), begin.checkpoint
    trainer.accelerator.wait_for_everyone()  # until all processes have read what the run has left
    if trainer.is_world_process_zero():
        write_record(folder, record)
        if checkpoint is not None and begin.goes_back:
            set_aside_later(folder, checkpoint.step)
    trainer.record, trainer.labels = record, task.labels()
    if checkpoint is not None:
        check_resumable(trainer.args.device, trainer.args.world_size)
        logger.info("Resuming from %s.", checkpoint.path)
        trainer.resumed_from = checkpoint.path
    with trainer.signals:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path))
    trainer.check_weights()
    # Before the evaluation and its reports, whose failure must not cost the model.
    trainer.model = model = merge_adapters(trainer.accelerator.unwrap_model(trainer.model))
    if trainer.is_world_process_zero():
        save_folder(model, folder)
        task.save(folder)
    record = dataclasses.replace(
        record,
        steps=trainer.state.global_step,
        evaluation=_evaluate(trainer, task, {"eval": trainer.eval_dataset, "test": test}),
        data=_describe_data(trainer.train_dataset, trainer.unreadable()),
        finished=time_now(),
    )
    if trainer.is_world_process_zero():
        task.save(folder)  # with what `calibrate` measured
        write_record(folder, record)
    trainer.accelerator.wait_for_everyone()
    return record


def _describe(trainer: SpeechTrainer, task: Task, test: LabelledDataset | None, begin: ResumePoint) -> str:
    """Say what a run would train, on what, for how long, and where it would write."""
    args, train, num_processes = trainer.args, trainer.train_dataset, trainer.args.world_size
    steps_per_epoch = trainer.sampler.num_steps
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    weights = list(trainer.model.parameters()) if trainer.model is not None else []
    num_trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    rows = {
        "model": f"{sum(weight.numel() for weight in weights):,} weights, of which {num_trained:,} are trained",
        "labels": f"{len(task.labels()):,}: {shorten_labels(task.labels())}",
    }
    for name, dataset in {"training": train, "evaluation": trainer.eval_dataset, "test": test}.items():
        if dataset is not None:
            minutes = sum(dataset.num_samples) / SAMPLING_RATE / 60
            rows[name] = f"{len(dataset):,} of {len(dataset.source):,} utterances, {minutes:,.1f} minutes"
    rows["steps"] = (
        f"{steps:,} of {mean_step_seconds(train, args.step_seconds):,.4g} s of audio on average over {num_processes}"
        f" process(es), in {args.gradient_accumulation_steps} micro-batch(es): {steps / steps_per_epoch:,.1f} epochs"
    )
    rows["start"] = "the first step" if begin.checkpoint is None else str(begin.checkpoint.path)
    rows["results"] = args.output_dir
    return "\n".join(f"{name:11} {value}" for name, value in rows.items())


def finetune(
    task: Task,
    start: InitialModelArguments,
    data: LabelledDataArguments,
    arguments: FinetuningArguments,
    *,
    on_trainer: Callable[[SpeechTrainer], None] | None = None,
) -> RunRecord:
    """
    Fine-tune a head, from opening the data to the final evaluation, and return the content of `run.json`.

    The output folder then has the model with its processor, as `pipeline` opens it, predictions and errors of each
    evaluation, and `run.json`, the record of the run. A run that was interrupted goes on from its last checkpoint, and
    a finished one returns its record. `on_trainer` gets the trainer before it starts, to add callbacks. A dry run
    (`arguments.dry_run`) prints a plan, and returns the record that the run would begin with.

    Raises:
        ArgumentError: If the arguments do not fit the model, data or output folder, or the data cannot be read.
        RunInterrupted: After SIGTERM, SIGINT or SIGHUP during training; a checkpoint was written.
    """
    arguments = copy.copy(arguments)  # the trainer sets some
    if start.freeze_encoder and arguments.freeze_steps:
        raise ArgumentError("freeze_steps would have no effect with freeze_encoder. Remove one of them.")
    given = public_values({**vars(start), **vars(data), **vars(task.arguments), **arguments.to_record()})
    locks = arguments.process_index == 0 and not arguments.dry_run
    with lock_output_folder(arguments.output_dir) if locks else nullcontext():
        asked = arguments.resume_from_checkpoint
        try:
            begin = find_resume_point(arguments.output_dir, asked, task.name, given)
        except ArgumentError:
            check_initial_model(start)  # a wrong model is reported first; a finished run does not need it
            raise
        previous = begin.record
        if previous is not None and begin.checkpoint is None:
            logger.info("This run is finished. To begin another, give another output_dir.")
            return previous
        started = time_now() if previous is None else previous.started
        trainer, test = _make_trainer(task, start, data, arguments)
        if on_trainer is not None:
            on_trainer(trainer)
        record = RunRecord(
            task=task.name,
            arguments=given,
            base_model=None if start.from_scratch else start.model,
            data=_describe_data(trainer.train_dataset),
            started=started,
            hardware=describe_hardware(arguments.device, arguments.world_size),
        )
        if begin.checkpoint is not None:
            _check_unchanged(begin.checkpoint, task.labels(), record.data)
        if arguments.dry_run:
            if trainer.is_world_process_zero():
                print(f"{_describe(trainer, task, test, begin)}\nNothing was trained.")
            return record
        return _train_and_save(trainer, task, test, record, begin)
