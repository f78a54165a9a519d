"""
`transformers.Trainer` for speech: steps of a fixed amount of audio, and losses that do not depend on accumulation.

`B` batch, `T` frames, `V` labels, `C` classes.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from ..data import SAMPLING_RATE
from ..data.workers import WorkerLoader
from ..inference.windowed import without_padding
from ..training.restarts import check_connected
from ..training.resume import CheckpointError
from ..training.run_record import RunRecord
from ..training.schedules import make_schedule
from ..training.signals import RunInterrupted, SignalWatch
from ..utils.command_line import ArgumentError
from ..utils.files import flush_to_disk, remove, temporary_path
from .batches import LabelledCollator, LabelledDataset, LengthBatchSampler, StepBatchSampler, count_steps
from .finetuning_arguments import FinetuningArguments
from .resume_point import read_file_list, write_file_list


class FreezeCallback(TrainerCallback):
    """
    Train only the head for the first `num_steps` updates, as the paper's protocol does with little labelled speech.

    During these the encoder, the model's `dinosr`, runs without gradients, in training mode as in the reference. Its
    parameters keep `requires_grad`, so that the optimizer and a distributed wrapper include them from the start.
    """

    def __init__(self, encoder: nn.Module, num_steps: int) -> None:
        self._encoder, self.num_steps = encoder, num_steps
        self._hooks: list[Any] = []
        self._had_gradients = True

    def _without_gradients(self, *args: Any) -> None:
        self._had_gradients = torch.is_grad_enabled()
        torch.set_grad_enabled(False)

    def _with_gradients(self, *args: Any) -> None:
        torch.set_grad_enabled(self._had_gradients)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step < self.num_steps and not self._hooks:
            self._hooks = [
                self._encoder.register_forward_pre_hook(self._without_gradients),
                self._encoder.register_forward_hook(self._with_gradients, always_call=True),
            ]
        elif state.global_step >= self.num_steps:
            self.on_train_end(args, state, control)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class _RunCallback(TrainerCallback):
    """
    Set the epoch of sampler and data set, also when a resumed run wraps the sampler to skip its first steps.

    Find the best checkpoint of a run that was moved, check the weights whenever figures are logged, and answer signals
    after a step: with a checkpoint, and with `RunInterrupted` once it is written.
    """

    def __init__(self, trainer: SpeechTrainer) -> None:
        self._trainer = trainer
        self._signal = 0  # that ends the run, in any process

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if (resumed := self._trainer.resumed_from) is not None:
            # In this run's folder by the name that `rotate_checkpoints` compares, or it would be removed.
            own = Path(args.output_dir, f"checkpoint-{state.best_global_step}")
            for best in (own, resumed.with_name(own.name)):
                if best.is_dir():
                    state.best_model_checkpoint = str(best)
                    break

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._trainer.check_weights()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        signals, accelerator = self._trainer.signals, self._trainer.accelerator
        asked = [int(signals.save or signals.stop > 0), signals.stop]
        if accelerator.num_processes > 1:
            numbers = accelerator.gather(torch.tensor([asked], device=accelerator.device))
            asked = numbers.amax(dim=0).tolist()
        signals.save, self._signal = False, asked[1]
        if asked[0]:
            control.should_save = True

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._signal:
            path = Path(args.output_dir, f"checkpoint-{state.global_step}")
            raise RunInterrupted(self._signal, state.global_step, f"with {path}")

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        sampler, dataset = self._trainer.sampler, self._trainer.train_dataset
        dataset.epoch = state.global_step // sampler.num_steps
        sampler.set_epoch(dataset.epoch)


def mean_step_seconds(dataset: LabelledDataset, step_seconds: float) -> float:
    """Return the audio of a step on average: as many steps are made as come nearest to `step_seconds`."""
    num_samples = dataset.num_samples
    return sum(num_samples) / count_steps(num_samples, int(step_seconds * SAMPLING_RATE)) / SAMPLING_RATE


class SpeechTrainer(Trainer):
    """
    Fine-tune a DinoSR with a head, or PEFT's wrapper of one, on a `LabelledDataset`.

    Differences from `Trainer`: a step has `step_seconds` of audio over all processes and micro-batches; its loss is
    the mean over all utterances of the step, whatever the number of micro-batches and processes; the schedule is the
    paper's; evaluation includes each utterance once and drops padding frames before decoding.

    `compute_metrics` gets object arrays with an entry per utterance. The predictions are int64 (T,) for a CTC head,
    the best label of each frame without padding; float (C,) for a classification head, the logits; None if the
    recording could not be read. The label_ids are the targets.

    Raises `ArgumentError` if this process has several GPUs, or several processes were started without a ddp_backend.
    """

    args: FinetuningArguments
    train_dataset: LabelledDataset
    eval_dataset: LabelledDataset | None
    record: RunRecord | None = None  # of the run, which each checkpoint gets a copy of
    labels: Sequence[str] | None = None  # of the head, which each checkpoint gets too
    resumed_from: Path | None = None  # checkpoint

    def __init__(self, model: nn.Module, args: FinetuningArguments, **kwargs: Any) -> None:
        if args.n_gpu > 1:
            raise ArgumentError(
                f"This process has {args.n_gpu} GPUs. Start one process per GPU: `accelerate launch --multi_gpu`."
            )
        check_connected(args.world_size, "Set ddp_backend, for CPUs to gloo.")
        self.signals = SignalWatch()
        self._unreadable: set[int] = set()
        self._unread_in_row = 0  # recordings, since one was read
        self._unfinished: Path | None = None  # where a checkpoint is being written
        # The number of forward passes in a step; set before Trainer reads it. With little data a step has up to half
        # as much again as step_seconds; a pass may have a tenth more than micro_seconds.
        longest, train = args.step_seconds, kwargs.get("train_dataset")
        if train is not None:
            longest = max(longest, mean_step_seconds(train, args.step_seconds) / 1.1)
        args.gradient_accumulation_steps = math.ceil(longest / (args.world_size * args.micro_seconds))
        if args.ddp_find_unused_parameters is None:
            # The encoder may have no gradients, and the mask embedding may be unused. Trainer's default is False with
            # activation checkpointing, and would then wait for their gradients forever.
            args.ddp_find_unused_parameters = True
        super().__init__(model=model, args=args, **kwargs)
        # Both tell Trainer that a micro-batch's loss is its share of the step's, to be added up and not divided again;
        # transformers before 5.23 reads only the second.
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True
        self.add_callback(_RunCallback(self))

    @property
    def config(self) -> Any:
        """Configuration of the model."""
        return self.accelerator.unwrap_model(self.model).config

    def _make_loader(self, dataset: LabelledDataset, sampler: StepBatchSampler | LengthBatchSampler) -> DataLoader:
        return WorkerLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=LabelledCollator(self.config.receptive_field),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    @cached_property
    def sampler(self) -> StepBatchSampler:
        """The batches of this process, a part of each step."""
        args = self.args
        return StepBatchSampler(
            self.train_dataset.num_samples,
            step_samples=int(args.step_seconds * SAMPLING_RATE),
            num_accumulated=args.gradient_accumulation_steps,
            seed=args.seed,
            rank=args.process_index,
            world_size=args.world_size,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of `sampler`, which Accelerate does not need to split."""
        return self._make_loader(self.train_dataset, self.sampler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the loader of this process's share of the utterances."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        micro_samples, args = int(self.args.micro_seconds * SAMPLING_RATE), self.args
        sampler = LengthBatchSampler(
            dataset.num_samples, micro_samples=micro_samples, rank=args.process_index, world_size=args.world_size
        )
        return self._make_loader(dataset, sampler)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return the same as `get_eval_dataloader`."""
        return self.get_eval_dataloader(test_dataset)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Create the optimizer as `Trainer` does, with `head_learning_rate` for the head if it is set."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.args.head_learning_rate
        if is_new and rate is not None:
            assert self.model is not None
            # All parameters outside the encoder, `dinosr`, of a model or of PEFT's wrapper around one.
            head = {id(weight) for name, weight in self.model.named_parameters() if "dinosr" not in name.split(".")}
            for group in list(optimizer.param_groups):
                of_head = [parameter for parameter in group["params"] if id(parameter) in head]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
                if of_head:
                    optimizer.add_param_group({**group, "params": of_head, "lr": rate})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Create the schedule that the arguments name, over `num_training_steps`."""
        if self.lr_scheduler is None:
            own: Any = optimizer or self.optimizer
            options = copy.copy(self.args)
            options.max_steps = num_training_steps  # which epochs may determine
            self.lr_scheduler = LambdaLR(own, make_schedule(options))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """Return the micro-batches of a step, and its number of utterances over all processes."""
        if self.state.global_step >= self.state.max_steps:  # resumed from the last checkpoint, within an epoch
            self.control.should_training_stop = True
            num_batches = 0
        batches = list(islice(epoch_iterator, num_batches))
        unreadable = [index for batch in batches for index in batch.pop("unreadable").tolist()]
        self._unreadable.update(unreadable)
        num_read = sum(int((batch["index"] >= 0).sum()) for batch in batches)
        counts = self.accelerator.reduce(torch.tensor([num_read, len(unreadable)], device=device), reduction="sum")
        # One alone may be damaged, and is left out; several are a disk that is gone. The same in all processes.
        self._unread_in_row = 0 if num_read or int(counts[0]) else self._unread_in_row + int(counts[1])
        if self._unread_in_row > 1:
            self._stop_unread()
        return batches, counts[0]

    def _stop_unread(self) -> None:
        """Write a checkpoint and raise `ArgumentError`: no recording of the next step could be read."""
        assert self.model is not None
        step = self.state.global_step
        if step and self.args.save_strategy != "no" and not Path(self.args.output_dir, f"checkpoint-{step}").is_dir():
            self._save_checkpoint(self.model, None)
        raise ArgumentError(
            f"None of the {self._unread_in_row} recordings up to step {step + 1} could be read; the log names them."
            " Look at the disk, or remove damaged recordings from train_data, and give the same command again."
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """
        Return the sum of the utterances' losses, divided by the step's number of utterances (`num_items_in_batch`).

        `ctc_loss_reduction="mean"` divides an utterance's loss by its number of labels; "sum" (the paper) does not.
        """
        inputs = dict(inputs)
        num_utterances = int((inputs.pop("index") >= 0).sum())
        outputs = model(**inputs)
        if num_utterances == 0:
            loss = outputs.logits.sum() * 0.0  # no recording could be read, but other processes wait for gradients
        else:
            total = outputs.loss if _is_sum(self.config, inputs["labels"]) else outputs.loss * num_utterances
            # Gradients are averaged over processes, and each process has its part of the sum.
            loss = total / num_items_in_batch * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def check_weights(self) -> None:
        """Raise `ArgumentError` unless all weights are finite numbers."""
        assert self.model is not None
        finite = [weight.isfinite().all() for weight in self.model.parameters() if weight.requires_grad]
        if finite and not torch.stack(finite).all():
            raise ArgumentError(
                f"After step {self.state.global_step} some weights are not finite numbers: training has diverged. The"
                " checkpoints are from before that. Lower learning_rate or set max_grad_norm, and go on from the last"
                " one with --resume_from_checkpoint true, or start again with another output_dir."
            )

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder that checkpoints are in, or while one is being written, that for unfinished ones."""
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """
        Write a checkpoint as `Trainer` does, but atomically, with digests of its files and the record of the run.

        Raises `CheckpointError` if it cannot be written, and `ArgumentError` if weights are not finite.
        """
        self.check_weights()
        path = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        self._unfinished = temporary_path(path.with_name("checkpoint"))
        try:
            if self.args.should_save:
                remove(self._unfinished)  # from a process that was killed
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # until each process has written its random state
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(path)
            if self.args.should_save:
                self.state.save_to_json(str(self._unfinished / path.name / "trainer_state.json"))
                write_file_list(self._unfinished / path.name, self.record, self.labels)
                remove(path)  # of an earlier attempt that was refused
                (self._unfinished / path.name).rename(path)
                flush_to_disk(path.parent)
        except Exception as error:  # safetensors and torch raise their own
            raise CheckpointError(
                f"{path} could not be written ({type(error).__name__}: {error}). Earlier checkpoints are unchanged."
                f" Free space in {path.parent.resolve()}, and give the same command again."
            ) from error
        finally:
            if self.args.should_save:
                remove(self._unfinished)
            self._unfinished = None
        if self.args.should_save:
            best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
            rotate_checkpoints(self.args.output_dir, limit, best_model_checkpoint=best, use_mtime=True)

    def _load_best_model(self) -> None:
        """Load the best checkpoint. Raises `CheckpointError` if a file of it is not what was written."""
        best = self.state.best_model_checkpoint
        assert best is not None
        try:
            read_file_list(Path(best))
        except CheckpointError as error:
            advice = f"It had the best model. Remove {best} to finish with the last one."
            raise CheckpointError(f"{error} {advice}") from error
        super()._load_best_model()

    def unreadable(self) -> set[int]:
        """Return the indices of training recordings that a process could not read so far; call in all processes."""
        from accelerate.utils import gather_object

        return set(gather_object(sorted(self._unreadable)))

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run `Trainer.evaluation_loop` for utterances of any length, each of them once."""
        from accelerate.utils import gather_object

        dataset = dataloader.dataset
        assert isinstance(dataset, LabelledDataset)
        if self.model is self.model_wrapped and self.args.device.type != "cpu":
            self.model.to(self.args.device)  # if nothing was trained before
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
            # An utterance of a class that the model does not have has no loss.
            count = int((labels >= 0).sum()) if labels.dim() == 1 else len(index)
            if count:
                total_loss += float(outputs.loss) * (1 if _is_sum(self.config, labels) else count)
                num_losses += count
            predicted = _predictions(self.config, outputs.logits, batch["attention_mask"])
            found += zip(index.tolist(), predicted, strict=True)
        seconds = time.perf_counter() - start
        parts = gather_object([(found, total_loss, num_losses, seconds)])
        all_found, losses, counts, times = zip(*parts, strict=True)
        by_index = dict(chain.from_iterable(all_found))
        predictions = np.fromiter(map(by_index.get, range(len(dataset))), dtype=object)
        targets = np.fromiter((dataset.targets[position] for position in dataset.positions), dtype=object)
        metrics = {
            "loss": sum(losses) / max(1, sum(counts)),
            "real_time_factor": max(times) * SAMPLING_RATE / sum(dataset.num_samples),
            "unreadable": len(dataset) - len(by_index),
        }
        if self.compute_metrics is not None:
            metrics.update(self.compute_metrics(EvalPrediction(predictions=predictions, label_ids=targets)))
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=predictions, label_ids=targets, metrics=prefixed, num_samples=len(dataset))


def _is_sum(config: Any, labels: torch.Tensor) -> bool:
    """Return whether the model's loss is a sum over utterances (CTC, labels (B, L)) instead of their mean."""
    return labels.dim() == 2 and config.ctc_loss_reduction == "sum"


def _predictions(config: Any, logits: torch.Tensor, attention_mask: torch.Tensor) -> list[np.ndarray]:
    """Return logits (B, C) as they are; of (B, T, V) the best label of each frame without padding, int64 (T,)."""
    if logits.dim() == 2:
        return list(logits.float().cpu().numpy())
    num_frames = config.num_frames(attention_mask.sum(dim=-1)).tolist()
    return without_padding(logits.argmax(dim=-1), num_frames)
