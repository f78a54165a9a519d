"""
`transformers.Trainer` for speech: steps of so much audio, losses that mean the same however they are accumulated.

`B` batch, `T` frames.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from transformers.training_args import ParallelMode

from ..data import SAMPLING_RATE
from ..training.schedules import make_schedule
from ..utils.command_line import ArgumentError
from .batches import LabelledDataset, LengthBatchSampler, StepBatchSampler, make_loader
from .finetuning_arguments import FinetuningArguments


class FreezeCallback(TrainerCallback):
    """
    Trains the head alone for the first updates, as the paper's protocol does with little labelled speech.

    Until then the encoder runs without gradient, in training mode as the reference does. Its parameters stay what the
    optimizer and a distributed wrapper know of, so that they train from the named update on in every process.

    Args:
        encoder: The part that waits, the model's `dinosr`.
        num_steps: Updates that it waits for.
    """

    def __init__(self, encoder: nn.Module, num_steps: int) -> None:
        self.num_steps = num_steps
        self._encoder = encoder
        self._hooks: list[Any] = []
        self._had_gradients = True

    @property
    def is_frozen(self) -> bool:
        """Whether the encoder runs without gradient at the moment."""
        return bool(self._hooks)

    def _without_gradients(self, *args: Any) -> None:
        self._had_gradients = torch.is_grad_enabled()
        torch.set_grad_enabled(False)

    def _with_gradients(self, *args: Any) -> None:
        torch.set_grad_enabled(self._had_gradients)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze or unfreeze, by the number of updates, which a resumed run knows too."""
        if state.global_step < self.num_steps and not self._hooks:
            self._hooks = [
                self._encoder.register_forward_pre_hook(self._without_gradients),
                self._encoder.register_forward_hook(self._with_gradients, always_call=True),
            ]
        elif state.global_step >= self.num_steps:
            self._unfreeze()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was."""
        self._unfreeze()

    def _unfreeze(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class _EpochCallback(TrainerCallback):
    """Tells sampler and data set their epoch, also where a resumed run wraps it to skip what was done."""

    def __init__(self, trainer: SpeechTrainer) -> None:
        self._trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        sampler, dataset = self._trainer.sampler, self._trainer.train_dataset
        if sampler is not None and isinstance(dataset, LabelledDataset):
            dataset.epoch = state.global_step // sampler.num_steps
            sampler.set_epoch(dataset.epoch)


class SpeechTrainer(Trainer):
    """
    Fine-tunes a DinoSR head on a `LabelledDataset`.

    Different from `Trainer`: a step is `step_seconds` of audio over all processes and micro-batches; its loss is the
    mean over all utterances of the step, so that accumulation and processes change nothing; the schedule is the
    paper's; evaluation takes each utterance once and drops the frames of padding before anything is decoded.

    Args:
        model: A DinoSR with a head, or PEFT's wrapper of it.
        args: The arguments.
        **kwargs: As for `Trainer`. `compute_metrics` gets arrays of objects, one an utterance of the data set: what
            the model gives, int64 (T,) for a CTC head (the best label of each frame that is not padding) or float (C,)
            for a classification head, None where it could not be read; and the targets.

    Raises:
        ArgumentError: If a process has several GPUs, or several processes do not know of each other.
    """

    args: FinetuningArguments

    def __init__(self, model: nn.Module, args: FinetuningArguments, **kwargs: Any) -> None:
        if args.n_gpu > 1:
            raise ArgumentError(
                f"This process has {args.n_gpu} GPUs. Start a process for each: `accelerate launch --multi_gpu`."
            )
        num_started = int(os.environ.get("WORLD_SIZE", "1"))
        if num_started > 1 and args.parallel_mode != ParallelMode.DISTRIBUTED:
            # Each would train by itself, and all would write the same files.
            raise ArgumentError(
                f"{num_started} processes were started, but do not know of each other. Name the ddp_backend, such as"
                " gloo for CPUs."
            )
        self.sampler: StepBatchSampler | None = None
        self._unreadable: set[int] = set()
        # Before Trainer looks at it: what one process takes in a pass decides how many passes make a step.
        per_pass = args.world_size * args.micro_seconds
        args.gradient_accumulation_steps = math.ceil(args.step_seconds / per_pass)
        if args.ddp_find_unused_parameters is None:
            # The encoder may be without gradient, and the mask embedding unused. Trainer's own choice depends on
            # activation checkpointing, with which it would wait for them for ever.
            args.ddp_find_unused_parameters = True
        super().__init__(model=model, args=args, **kwargs)
        # Both say that our losses are shares of a step, to be added up and not divided once more; transformers before
        # 5.23 knows the second only.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self.add_callback(_EpochCallback(self))

    @property
    def _config(self) -> Any:
        return self.accelerator.unwrap_model(self.model).config

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        assert self.model is not None
        return self.model.named_parameters()

    def get_train_dataloader(self) -> DataLoader:
        """Each process's own part of each step; Accelerate need not split it."""
        dataset = self.train_dataset
        assert isinstance(dataset, LabelledDataset)
        self.sampler = StepBatchSampler(
            dataset.num_samples,
            step_samples=int(self.args.step_seconds * SAMPLING_RATE),
            num_accumulated=self.args.gradient_accumulation_steps,
            seed=self.args.seed,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        return make_loader(dataset, self.sampler, self._config.receptive_field, self.args.dataloader_num_workers)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Each process's own share of the utterances."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(dataset, LabelledDataset)
        sampler = LengthBatchSampler(
            dataset.num_samples,
            micro_samples=int(self.args.micro_seconds * SAMPLING_RATE),
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        return make_loader(dataset, sampler, self._config.receptive_field, self.args.dataloader_num_workers)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As for evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """As `Trainer`, and a learning rate of its own for the head if `head_learning_rate` is set."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.head_learning_rate
        if is_new and rate is not None:
            head = {id(parameter) for name, parameter in self._parameters() if is_of_head(name)}
            for group in list(optimizer.param_groups):
                of_head = [parameter for parameter in group["params"] if id(parameter) in head]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
                if of_head:
                    optimizer.add_param_group({**group, "params": of_head, "lr": rate})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The schedule of the arguments, over `num_training_steps`."""
        if self.lr_scheduler is None:
            chosen = self.optimizer if optimizer is None else optimizer
            assert chosen is not None
            self.lr_scheduler = LambdaLR(chosen, make_schedule(self.args.with_max_steps(num_training_steps)))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The micro-batches of a step, and its number of utterances over all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        for batch in batches:
            self._unreadable.update(batch.pop("unreadable").tolist())
        count = torch.tensor(sum(int((batch["index"] >= 0).sum()) for batch in batches), device=device)
        return batches, self.accelerator.reduce(count, reduction="sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """
        The utterances' losses, over the number of utterances of the whole step (`num_items_in_batch`).

        With `ctc_loss_reduction="mean"` an utterance's loss is divided by its number of labels, with "sum" it is not,
        which is the paper's.
        """
        inputs = dict(inputs)
        num_utterances = int((inputs.pop("index") >= 0).sum())
        outputs = model(**inputs)
        if num_utterances == 0:
            loss = outputs.logits.sum() * 0.0  # nothing could be read, but other processes wait for gradients
        else:
            total = outputs.loss if sums_losses(self._config, inputs["labels"]) else outputs.loss * num_utterances
            whole = num_utterances if num_items_in_batch is None else num_items_in_batch
            # Gradients are averaged over processes, of which each has its part of the sum.
            loss = total / whole * (1 if num_items_in_batch is None else self.args.world_size)
        return (loss, outputs) if return_outputs else loss

    def unreadable_ids(self) -> list[str]:
        """Names of the training recordings that could not be read so far, in any process; all processes must ask."""
        from accelerate.utils import gather_object  # an optional package, without which there is no Trainer

        assert isinstance(self.train_dataset, LabelledDataset)
        return sorted({self.train_dataset.ids[index] for index in set(gather_object(sorted(self._unreadable)))})

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`, for utterances of any length, each of them once."""
        from accelerate.utils import gather_object  # an optional package, without which there is no Trainer

        dataset = dataloader.dataset
        assert isinstance(dataset, LabelledDataset)
        if self.model is self.model_wrapped and self.args.device.type != "cpu":
            self.model.to(self.args.device)  # evaluation without training before it
        model = self.accelerator.unwrap_model(self.model).eval()
        found: list[tuple[int, np.ndarray]] = []
        total_loss, num_losses, start = 0.0, 0, time.perf_counter()
        for batch in tqdm(dataloader, description, disable=self.args.disable_tqdm or not self.is_world_process_zero()):
            batch = self._prepare_inputs(batch)
            index, _ = batch.pop("index"), batch.pop("unreadable")
            with self.compute_loss_context_manager():
                outputs = model(**batch)
            if index[0] < 0:
                continue
            labels = batch["labels"]
            # An utterance of a class that the model does not know has no loss.
            count = int((labels >= 0).sum()) if labels.dim() == 1 else len(index)
            if count:
                total_loss += float(outputs.loss) * (1 if sums_losses(self._config, labels) else count)
                num_losses += count
            found += zip(
                index.tolist(), _decisions(self._config, outputs.logits, batch["attention_mask"]), strict=True
            )
        seconds = time.perf_counter() - start
        parts = gather_object([(found, total_loss, num_losses, seconds)])
        by_index = dict(pair for part, *_ in parts for pair in part)
        predictions = _ragged([by_index.get(index) for index in range(len(dataset))])
        targets = _ragged([dataset.targets[position] for position in dataset.positions])
        audio = sum(dataset.num_samples) / SAMPLING_RATE
        metrics = {
            "loss": sum(loss for _, loss, _, _ in parts) / max(1, sum(count for _, _, count, _ in parts)),
            "real_time_factor": max(spent for *_, spent in parts) / audio,
            "unreadable": len(dataset) - len(by_index),
        }
        if self.compute_metrics is not None:
            metrics.update(self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=targets)))
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=predictions, label_ids=targets, metrics=prefixed, num_samples=len(dataset))


def _ragged(values: list[Any]) -> np.ndarray:
    """An array of objects, for values of different lengths."""
    array = np.empty(len(values), dtype=object)
    for position, value in enumerate(values):
        array[position] = value
    return array


def is_of_head(parameter_name: str) -> bool:
    """Whether a parameter is not of the encoder, of a model or of PEFT's wrapper around it."""
    return "dinosr" not in parameter_name.split(".")


def sums_losses(config: Any, labels: torch.Tensor) -> bool:
    """Whether the model's loss is a sum over utterances (CTC, labels (B, L)) and not their mean."""
    return labels.dim() == 2 and config.ctc_loss_reduction == "sum"


def _decisions(config: Any, logits: torch.Tensor, attention_mask: torch.Tensor) -> list[np.ndarray]:
    """Of logits (B, T, V) the best label of each frame that is not padding, int64 (T,); logits (B, C) as they are."""
    if logits.dim() == 2:
        return list(logits.float().cpu().numpy())
    num_frames = config.num_frames(attention_mask.sum(dim=-1)).tolist()
    best = logits.argmax(dim=-1).cpu().numpy()
    return [row[:count] for row, count in zip(best, num_frames, strict=True)]
