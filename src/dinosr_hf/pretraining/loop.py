"""
The pre-training loop: forward, backward, clip, optimizer, schedule, codebooks and teacher, log.

`B` batch, `S` samples, `T` frames.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from .._compat import enable_gradient_checkpointing
from ..data import (
    SAMPLING_RATE,
    DatasetSource,
    PretrainingCollator,
    SpeechSource,
    StepDataset,
    StepLoader,
    min_maskable_samples,
    open_source,
    plan_epoch,
    summarize_plan,
)
from ..data.synthetic import SyntheticCorpus
from ..modeling_dinosr import DinoSRForPreTraining
from .arguments import ArgumentError, DataArguments, PretrainingArguments, RunArguments
from .metrics import MetricSums
from .schedules import tri_stage
from .state import append_metrics, save_model

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]


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


def _open_data(data: DataArguments, seed: int) -> SpeechSource:
    if data.data != "synthetic":
        return open_source(
            data.data, split=data.data_split, config_name=data.data_config, audio_column=data.audio_column
        )
    logger.info("Making %d utterances with espeak-ng.", data.synthetic_utterances)
    corpus = synthetic_corpus(data, num_utterances=data.synthetic_utterances, seed=seed, split="train")
    return DatasetSource(corpus.to_dataset(num_proc=min(8, os.cpu_count() or 1)))


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


def _steps(
    source: SpeechSource, arguments: PretrainingArguments, accelerator: Accelerator, first_step: int = 0
) -> Iterator[tuple[int, list[Batch]]]:
    """Epoch after epoch without end: the epoch's number and this process's micro-batches of a step."""
    data, seed = arguments.data, arguments.run.seed
    num_samples = [utterance.num_samples for utterance in source.utterances]
    limits = {"min_samples": int(data.min_seconds * SAMPLING_RATE)}
    collator = PretrainingCollator(arguments.model_config(), seed=seed)
    micro_samples = int(data.micro_seconds * SAMPLING_RATE)
    epoch = 0
    while True:
        plan = plan_epoch(
            num_samples,
            seed=seed,
            epoch=epoch,
            step_samples=int(data.step_seconds * SAMPLING_RATE),
            max_samples=int(data.max_seconds * SAMPLING_RATE),
            mode="pad" if data.batching == "pad" else "crop",
            num_buckets=data.num_buckets,
            ids=[utterance.id for utterance in source.utterances],
            **limits,
        )
        if epoch == 0:
            world = accelerator.num_processes
            summary = summarize_plan(plan, num_samples, world_size=world, micro_samples=micro_samples, **limits)
            logger.info("Epoch: %s", summary)
        dataset = StepDataset(
            source, plan, collator, accelerator.process_index, accelerator.num_processes, micro_samples, epoch
        )
        loader = StepLoader(
            dataset, num_workers=data.num_workers, pin_memory=accelerator.device.type == "cuda", first_step=first_step
        )
        for micro_batches in loader:
            yield epoch, micro_batches
        epoch, first_step = epoch + 1, 0


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _count_samples(batch: Batch) -> tuple[int, int]:
    """Samples of a batch without padding, and samples of padding."""
    total = batch["input_values"].numel()
    read = int(batch["attention_mask"].sum()) if "attention_mask" in batch else total
    return read, total - read


def _accumulate_gradients(
    model: torch.nn.Module, micro_batches: list[Batch], accelerator: Accelerator, sums: MetricSums
) -> None:
    """
    Forward and backward of a step: the gradient is that of the mean over all masked frames of the step, however they
    are spread over micro-batches and processes.
    """
    # Padded frames are never in these masks, so that the frames of the step are known before the first forward pass.
    masked = [int(batch["mask_time_indices"].sum()) for batch in micro_batches]
    total = accelerator.reduce(torch.tensor(sum(masked), device=accelerator.device), "sum").item()
    for position, (batch, num_masked) in enumerate(zip(micro_batches, masked, strict=True)):
        is_last = position == len(micro_batches) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            output = model(**_to_device(batch, accelerator.device))
            # Processes' gradients are averaged, not added up.
            accelerator.backward(output.loss * (num_masked * accelerator.num_processes / total))
        sums.add(output, *_count_samples(batch))


def _optimizer_and_schedule(
    model: DinoSRForPreTraining, options: RunArguments
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        weight_decay=options.weight_decay,
    )
    factor = partial(
        tri_stage,
        max_steps=options.max_steps,
        warmup_share=options.warmup_share,
        hold_share=options.hold_share,
        final_lr_scale=options.final_lr_scale,
    )
    return optimizer, LambdaLR(optimizer, factor)


def pretrain(
    model: DinoSRForPreTraining, source: SpeechSource, arguments: PretrainingArguments, accelerator: Accelerator
) -> DinoSRForPreTraining:
    """
    Train a model on a source, and leave it in `output_dir` with `metrics.jsonl` beside it.

    Args:
        model: A fresh or pre-trained model of `arguments.model_config()`.
        source: The recordings.
        arguments: What the run is told.
        accelerator: Devices, precision, processes. Its own gradient accumulation must be off: steps are cut into
            micro-batches by `micro_seconds`.

    Returns:
        The trained model, without wrappers.

    Raises:
        ValueError: For data that the arguments do not fit.
        FloatingPointError: If the loss is not a finite number.
    """
    options, config, device = arguments.run, model.config, accelerator.device
    if options.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    optimizer, schedule = _optimizer_and_schedule(model, options)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    is_frozen = False
    sums = MetricSums(config.num_codebooks, config.codebook_size, device)
    since = time.perf_counter()
    bar = tqdm(total=options.max_steps, disable=not accelerator.is_main_process, unit="step", dynamic_ncols=True)
    for step, (epoch, micro_batches) in enumerate(_steps(source, arguments, accelerator), start=1):
        _accumulate_gradients(wrapped, micro_batches, accelerator, sums)
        grad_norm = None
        if options.max_grad_norm > 0:
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        learning_rate = schedule.get_last_lr()[0]
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        decays = model.update_targets(step)
        if not is_frozen and model.apply_freeze(step):
            is_frozen = True
            logger.info("Step %d: teacher, convolutions and projection are frozen from here on.", step)
            if accelerator.num_processes > 1:
                # Its buckets wait for the gradients of parameters that have none any more.
                wrapped = accelerator.prepare_model(model)
        bar.update()
        if step % options.log_steps == 0 or step in (1, options.max_steps):
            metrics: dict[str, Any] = {"step": step, "epoch": epoch, "learning_rate": learning_rate, **decays}
            metrics |= sums.compute(partial(accelerator.reduce, reduction="sum"))
            metrics["audio_seconds_per_second"] = metrics["seconds"] / (time.perf_counter() - since)
            if grad_norm is not None:
                metrics["grad_norm"] = float(grad_norm)
            _log(metrics, bar, accelerator, options.output_dir)
            sums = MetricSums(config.num_codebooks, config.codebook_size, device)
            since = time.perf_counter()
        is_last = step == options.max_steps
        if accelerator.is_main_process and options.save_steps and step % options.save_steps == 0 and not is_last:
            save_model(model, Path(options.output_dir) / f"step-{step}")
        if is_last:
            break
    bar.close()
    if accelerator.is_main_process:
        save_model(model, options.output_dir)
    accelerator.wait_for_everyone()
    return model.eval()


def _log(metrics: dict[str, Any], bar: tqdm, accelerator: Accelerator, output_dir: str) -> None:
    bar.set_postfix(
        loss=f"{metrics['loss']:.3f}",
        ppl=f"{metrics['target_perplexity']:.0f}/{metrics['prediction_perplexity']:.0f}",
        active=f"{metrics['active_codewords']:.0f}",
        speed=f"{metrics['audio_seconds_per_second']:.0f}x",
    )
    if accelerator.is_main_process:
        append_metrics(output_dir, metrics)
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    accelerator.log(numbers, step=metrics["step"])
    if not math.isfinite(metrics["loss"]):
        raise FloatingPointError(
            f"The loss is {metrics['loss']} at step {metrics['step']}. Lower learning_rate, use bf16 instead of fp16,"
            " or set max_grad_norm; the last saved model is in output_dir."
        )


def run(arguments: PretrainingArguments) -> DinoSRForPreTraining:
    """
    A whole run: data, model, training; what `examples/pretrain.py` does.

    Args:
        arguments: As `parse_arguments` gives them.

    Returns:
        The trained model.

    Raises:
        ArgumentError: If `output_dir` has a model already, or a span does not fit the shortest utterance.
        ValueError: As the data.
    """
    options = arguments.run
    output_dir = Path(options.output_dir)
    if (output_dir / "config.json").exists():
        raise ArgumentError(f"output_dir={output_dir} has a model already. Give another folder, or remove this one.")
    _check_mask_fits(arguments)
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        log_with=options.trackers or None,
        project_dir=output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if not accelerator.is_main_process:
        logging.getLogger("dinosr_hf").setLevel(logging.WARNING)
    if accelerator.device.type == "cpu":
        # `accelerate launch` leaves a process one thread, whatever there is.
        share = (os.cpu_count() or 1) // accelerator.num_processes
        torch.set_num_threads(options.num_threads or max(1, share))
    set_seed(options.seed)
    with accelerator.main_process_first():
        source = _open_data(arguments.data, options.seed)
    model = DinoSRForPreTraining(arguments.model_config())
    num_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info(
        "%s parameters to train; %s; %d process(es) on %s, precision %s.",
        f"{num_parameters:,}",
        f"{sum(u.num_samples for u in source.utterances) / SAMPLING_RATE / 3600:.2f} h in {len(source):,} utterances",
        accelerator.num_processes,
        accelerator.device.type,
        accelerator.mixed_precision,
    )
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "arguments.yaml").write_text(arguments.to_yaml(), encoding="utf-8")
        (output_dir / "metrics.jsonl").unlink(missing_ok=True)
    if options.trackers:
        accelerator.init_trackers("dinosr")
    model = pretrain(model, source, arguments, accelerator)
    accelerator.end_training()
    return model
