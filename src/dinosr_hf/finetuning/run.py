"""A whole fine-tuning run: speech, task, model, `Trainer`, and what is left in the folder."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..data import SAMPLING_RATE, LabelledSource
from ..model.configuration_dinosr import DinoSRConfig
from ..training.run_record import RunRecord, describe_hardware, library_versions, time_now, write_record
from ..utils.command_line import ArgumentError
from ..utils.model_folder import save_folder
from ..utils.threads import set_cpu_threads
from .batches import LabelledDataset, hours
from .finetuning_arguments import FinetuningArguments, LabelledDataArguments, StartArguments
from .initial_model import add_adapters, load_model, without_adapters
from .splits import open_splits
from .task import Task, describe_unusable, num_frames_of
from .trainer import FreezeCallback, SpeechTrainer

logger = logging.getLogger(__name__)


def _resume_point(arguments: FinetuningArguments) -> str | None:
    """The checkpoint to go on from, which only its own option asks for."""
    asked = arguments.resume_from_checkpoint
    last = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    if not asked or str(asked).lower() == "false":
        if last is not None:
            raise ArgumentError(
                f"output_dir={arguments.output_dir} has {Path(last).name}. Go on from it with"
                " --resume_from_checkpoint true, or give another output_dir."
            )
        if Path(arguments.output_dir, "config.json").is_file():
            raise ArgumentError(f"output_dir={arguments.output_dir} has a model already. Give another output_dir.")
        return None
    if str(asked).lower() == "true":
        if last is None:
            raise ArgumentError(f"resume_from_checkpoint: {arguments.output_dir} has no checkpoint. Leave it out.")
        return last
    if not Path(asked, "trainer_state.json").is_file():
        raise ArgumentError(
            f"resume_from_checkpoint={asked} is no checkpoint of a fine-tuning run: it has no trainer_state.json. The"
            " model to start from is `model`."
        )
    return str(asked)


def _training_set(
    source: LabelledSource,
    targets: list[Any],
    task: Task,
    config: DinoSRConfig,
    data: LabelledDataArguments,
    seed: int,
) -> LabelledDataset:
    """What can be trained on; what cannot is counted and reported."""
    reasons: dict[str, list[str]] = {}
    positions = []
    low, high = data.min_seconds * SAMPLING_RATE, data.max_seconds * SAMPLING_RATE
    crop_samples = None if task.crop_seconds is None else int(task.crop_seconds * SAMPLING_RATE)
    if crop_samples is not None:
        high = float("inf")
    num_frames = num_frames_of(config, source.num_samples)
    for position, (target, frames) in enumerate(zip(targets, num_frames, strict=True)):
        length = source.num_samples[position]
        reason = "too short" if length < low else "too long" if length > high else task.unusable(target, frames)
        if reason is None:
            positions.append(position)
        else:
            reasons.setdefault(reason, []).append(source.ids[position])
    if reasons:
        logger.warning(describe_unusable(reasons, len(source)))
    if not positions:
        raise ArgumentError(f"{source.name}: no utterance can be trained on. Look at min_seconds and max_seconds.")
    return LabelledDataset(
        source, targets, positions, crop_samples=crop_samples, speed_change=data.speed_change, seed=seed
    )


def _evaluation_set(source: LabelledSource | None, task: Task) -> LabelledDataset | None:
    return None if source is None else LabelledDataset(source, task.targets(source))


def _make_trainer(
    model: Any, arguments: FinetuningArguments, task: Task, train: LabelledDataset, evaluation: LabelledDataset | None
) -> SpeechTrainer:
    if evaluation is None and arguments.eval_strategy != "no":
        raise ArgumentError("There is no speech to evaluate on: give eval_data or eval_split, or --eval_strategy no.")
    arguments.metric_for_best_model = f"eval_{task.metric}"
    arguments.greater_is_better = task.greater_is_better
    encoder = without_wrapper(model).base_model
    callbacks = []
    if arguments.freeze_steps:
        callbacks.append(FreezeCallback(encoder, arguments.freeze_steps))
    return SpeechTrainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=evaluation,
        compute_metrics=task.metrics,
        callbacks=callbacks,
    )


def without_wrapper(model: Any) -> PreTrainedModel:
    """The transformers model, also of one that PEFT has wrapped."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def _evaluate(trainer: SpeechTrainer, task: Task, dataset: LabelledDataset | None, name: str) -> dict[str, Any] | None:
    """Figures of a split, with files of predictions and errors in the output folder."""
    if dataset is None:
        return None
    output = trainer.predict(dataset, metric_key_prefix=name)
    metrics = output.metrics or {}
    trainer.log_metrics(name, metrics)
    source = dataset.source
    record: dict[str, Any] = {"dataset": source.name, "split": source.split or name, "num_utterances": len(dataset)}
    if trainer.is_world_process_zero():
        figures = task.report(source, output.predictions, Path(trainer.args.output_dir), name)
        if name == "eval":
            task.calibrate(cast(DinoSRConfig, without_wrapper(trainer.model).config), source, output.predictions)
        record |= {**figures, "real_time_factor": metrics[f"{name}_real_time_factor"]}
    return record


def _describe_data(train: LabelledDataset, unreadable: int) -> dict[str, Any]:
    source = train.source
    return {
        "name": source.name,
        "split": source.split,
        "hours": hours(train.num_samples),
        "utterances": len(train),
        "unreadable": unreadable,
    }


def finetune(
    task: Task,
    start: StartArguments,
    data: LabelledDataArguments,
    arguments: FinetuningArguments,
    *,
    on_trainer: Callable[[SpeechTrainer], None] | None = None,
) -> RunRecord:
    """
    Fine-tune a head, from opening the data to the last figures.

    The output folder then has the model with its processor, as `pipeline` opens it, predictions and errors of each
    evaluation, and `run.json`, the record of the run.

    Args:
        task: What to learn.
        start: The model to start from.
        data: The recordings and their labels.
        arguments: The optimization.
        on_trainer: Called with the trainer before it starts, to add callbacks to it.

    Returns:
        What `run.json` has.

    Raises:
        ArgumentError: If the arguments do not fit the model, the data or the folder, or the data cannot be read.
    """
    if start.freeze_encoder and arguments.freeze_steps:
        raise ArgumentError("freeze_steps would count for nothing with freeze_encoder. Leave one of them out.")
    started, folder = time_now(), Path(arguments.output_dir)
    resume = _resume_point(arguments)
    set_seed(arguments.seed)
    if arguments.device.type == "cpu":
        set_cpu_threads(arguments.num_threads, arguments.world_size)
    try:
        splits = open_splits(data, arguments.seed)
        task.prepare(splits.train)
    except ArgumentError:
        raise
    except (ValueError, OSError) as error:
        raise ArgumentError(str(error)) from error
    model: Any = load_model(task.model_class, start, task.config_changes())
    train = _training_set(splits.train, task.targets(splits.train), task, model.config, data, arguments.seed)
    evaluation, test = _evaluation_set(splits.eval, task), _evaluation_set(splits.test, task)
    if start.lora_rank:
        model = add_adapters(model, start)
    trainer = _make_trainer(model, arguments, task, train, evaluation)
    if on_trainer is not None:
        on_trainer(trainer)
    trainer.train(resume_from_checkpoint=resume)

    figures = [_evaluate(trainer, task, evaluation, "eval"), _evaluate(trainer, task, test, "test")]
    final = without_adapters(trainer.accelerator.unwrap_model(trainer.model))
    told = (dataclasses.asdict(start), dataclasses.asdict(data), dataclasses.asdict(task.arguments), arguments.told())
    record = RunRecord(
        task=task.name,
        arguments={name: value for group in told for name, value in group.items()},
        base_model=None if start.from_scratch else start.model,
        data=[_describe_data(train, len(trainer.unreadable_ids()))],
        steps=trainer.state.global_step,
        evaluation=[figure for figure in figures if figure is not None],
        versions=library_versions(),
        started=started,
        finished=time_now(),
        hardware=describe_hardware(arguments.world_size),
    )
    if trainer.is_world_process_zero():
        save_folder(final, folder)
        task.save(folder)
        write_record(folder, record)
    trainer.accelerator.wait_for_everyone()
    return record
