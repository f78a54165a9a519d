"""
What a fine-tuning run can be told: data, the model to start from, the run; by a YAML file and flags over it.

Defaults are the paper's protocol for 100 hours (wav2vec 2.0's configurations, which the authors used), or a comment
says why not. What is not set leaves the checkpoint's configuration as it is.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from ..training.schedules import SCHEDULES
from ..utils.command_line import ArgumentError, check_ranges


@dataclass
class LabelledDataArguments:
    """
    The recordings and their labels.

    Raises:
        ArgumentError: For a value that is out of range.
    """

    train_data: list[str] = field(
        default_factory=lambda: ["synthetic"],
        metadata={
            "help": "One or several of: a folder with metadata.csv (or LibriSpeech's .trans.txt files), a table"
            " (.csv, .jsonl), a manifest (.tsv and .wrd), a dataset here or on the Hub; or `synthetic`: speech made on"
            " the spot by espeak-ng."
        },
    )
    eval_data: list[str] = field(
        default_factory=list,
        metadata={"help": "The same for choosing the best checkpoint; left out: train_data with eval_split."},
    )
    test_data: list[str] = field(
        default_factory=list, metadata={"help": "The same for the last word; left out: train_data with test_split."}
    )
    train_split: str | None = field(default=None, metadata={"help": "Split of train_data, if it has several."})
    eval_split: str | None = field(default=None, metadata={"help": "Split of eval_data; synthetic: validation."})
    test_split: str | None = field(default=None, metadata={"help": "Split of test_data; synthetic: test."})
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset with several."})
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the labels; left out: where transcripts usually are."}
    )
    audio_column: str = field(default="audio", metadata={"help": "Column of a dataset that has the audio."})
    min_seconds: float = field(default=0.1, metadata={"help": "Shorter utterances are not trained on."})
    max_seconds: float = field(
        # The reference has no bound but its batch of 200 s, which no device of today needs to be protected from less.
        default=40.0,
        metadata={"help": "Longer utterances are not trained on; evaluation takes all."},
    )
    speed_change: float = field(
        default=0.0,
        metadata={
            "help": "Play each training utterance at a speed between 1 - this and 1 + this, another one in each epoch;"
            " 0 (the paper): as it is."
        },
    )
    synthetic_utterances: int = field(default=200, metadata={"help": "Utterances of synthetic training speech."})
    synthetic_eval_utterances: int = field(
        default=50, metadata={"help": "Utterances of synthetic validation and of test speech, each."}
    )
    synthetic_speakers: int = field(
        default=40, metadata={"help": "Speakers of synthetic training speech; evaluation has 40 others."}
    )
    synthetic_text: str = field(
        default="sentences",
        metadata={"choices": ["sentences", "digits", "mixed"], "help": "What synthetic speakers say."},
    )
    synthetic_languages: list[str] = field(
        default_factory=lambda: ["en"], metadata={"help": "Languages of synthetic speech: en, de, es, fr, it."}
    )
    synthetic_noise: bool = field(default=False, metadata={"help": "Whether it has rooms, microphones and noise."})

    def __post_init__(self) -> None:
        rules = [
            (self.min_seconds >= 0, "min_seconds", self.min_seconds, "at least 0"),
            (self.max_seconds > self.min_seconds, "max_seconds", self.max_seconds, "more than min_seconds"),
            (0 <= self.speed_change < 1, "speed_change", self.speed_change, "at least 0 and less than 1"),
        ]
        for name in ("synthetic_utterances", "synthetic_eval_utterances", "synthetic_speakers"):
            rules.append((getattr(self, name) >= 1, name, getattr(self, name), "at least 1"))
        check_ranges(rules)


# Fields of DinoSRConfig that fine-tuning may change.
CONFIG_FIELDS = (
    *("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout", "layerdrop"),
    *("mask_time_prob", "mask_time_length", "mask_time_min_masks"),
    *("mask_feature_prob", "mask_feature_length", "mask_feature_min_masks"),
)


@dataclass
class StartArguments:
    """
    The model to start from, and what is changed of it.

    Raises:
        ArgumentError: For values that are out of range, or count for nothing beside `freeze_encoder`.
    """

    model: str = field(
        default="runs/tiny", metadata={"help": "Folder or Hub name of a pre-trained, or already fine-tuned, DinoSR."}
    )
    network: str = field(
        default="student",
        metadata={
            "choices": ["student", "teacher"],
            "help": "Which of a pre-training checkpoint's encoders to fine-tune (the paper's ablations: the teacher).",
        },
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Take the configuration of `model`, but random weights: for comparisons."}
    )
    freeze_feature_encoder: bool = field(
        default=True, metadata={"help": "Never train the convolutions, unless they are random (from_scratch)."}
    )
    freeze_encoder: bool = field(
        default=False,
        metadata={"help": "Train the head alone, on what the encoder gives in evaluation mode, as SUPERB does."},
    )
    hidden_dropout: float | None = field(default=None, metadata={"help": "As in DinoSRConfig; left out: the model's."})
    attention_dropout: float | None = field(default=None, metadata={"help": "As in DinoSRConfig."})
    activation_dropout: float | None = field(default=None, metadata={"help": "As in DinoSRConfig."})
    feat_proj_dropout: float | None = field(default=None, metadata={"help": "As in DinoSRConfig."})
    final_dropout: float | None = field(default=None, metadata={"help": "As in DinoSRConfig."})
    layerdrop: float | None = field(default=None, metadata={"help": "As in DinoSRConfig."})
    mask_time_prob: float | None = field(default=None, metadata={"help": "As in DinoSRConfig; 0 masks no time."})
    mask_time_length: int | None = field(default=None, metadata={"help": "As in DinoSRConfig."})
    mask_time_min_masks: int | None = field(default=None, metadata={"help": "As in DinoSRConfig."})
    mask_feature_prob: float | None = field(default=None, metadata={"help": "As in DinoSRConfig; 0: no channels."})
    mask_feature_length: int | None = field(default=None, metadata={"help": "As in DinoSRConfig."})
    mask_feature_min_masks: int | None = field(default=None, metadata={"help": "As in DinoSRConfig."})
    lora_rank: int = field(
        default=0, metadata={"help": "Train low-rank adapters (PEFT) and the head; 0: all weights."}
    )
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapters, over their rank."})
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"],
        metadata={"help": "Layers that get adapters: q_proj, k_proj, v_proj, out_proj, ..."},
    )

    def __post_init__(self) -> None:
        rules = [(self.lora_rank >= 0, "lora_rank", self.lora_rank, "at least 0")]
        rules += [(self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "more than 0")]
        for name, value in self.config_changes().items():
            if name.endswith("_length"):
                rules.append((value >= 1, name, value, "at least 1"))
            elif name.endswith("_min_masks"):
                rules.append((value >= 0, name, value, "at least 0"))
            else:
                rules.append((0 <= value <= 1, name, value, "at least 0 and at most 1"))
        check_ranges(rules)
        if not self.freeze_encoder:
            return
        of_encoder = [name for name in self.config_changes() if name != "final_dropout"]
        unread = [*of_encoder, *(["lora_rank"] if self.lora_rank else [])]
        if unread:
            raise ArgumentError(
                f"{', '.join(unread)} would count for nothing with freeze_encoder: the encoder is not trained, has no"
                " dropout and is not masked. Leave one or the other out."
            )

    def config_changes(self) -> dict[str, Any]:
        """Fields of the configuration that were set."""
        return {name: getattr(self, name) for name in CONFIG_FIELDS if getattr(self, name) is not None}


_SECONDS = (
    "batches are in seconds of audio. Set step_seconds (of an optimizer step), micro_seconds (of a forward pass)"
)
_SHARES = "the schedule is ours. Set schedule, warmup_share, hold_share, final_lr_scale"
_TASK = "the task says what the best checkpoint is. Leave it out"
_OURS = "batches, losses and evaluation are our own, which do without it. Leave it out"

# Of `TrainingArguments`, what has another form here, or none.
_REPLACED = {
    "per_device_train_batch_size": _SECONDS,
    "per_device_eval_batch_size": _SECONDS,
    "gradient_accumulation_steps": _SECONDS,
    "lr_scheduler_type": _SHARES,
    "lr_scheduler_kwargs": _SHARES,
    "warmup_steps": _SHARES,
    "metric_for_best_model": _TASK,
    "greater_is_better": _TASK,
    **dict.fromkeys(
        (
            *("auto_find_batch_size", "label_smoothing_factor", "train_sampling_strategy", "length_column_name"),
            *("data_seed", "dataloader_drop_last", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
            *("prediction_loss_only", "batch_eval_metrics", "eval_accumulation_steps", "eval_do_concat_batches"),
            *("bf16_full_eval", "fp16_full_eval", "label_names", "do_train", "do_eval", "do_predict"),
        ),
        _OURS,
    ),
}


@dataclass
class FinetuningArguments(TrainingArguments):
    """
    The optimization: everything that `transformers.TrainingArguments` has, with the paper's values, and what follows.

    Raises:
        ArgumentError: For a value that is out of range, or one that counts for nothing.
    """

    output_dir: str = field(default="runs/finetuned", metadata={"help": "Folder of the results."})
    step_seconds: float = field(
        default=1600.0,
        metadata={"help": "Audio of an optimizer step, over all processes and micro-batches (the paper: 26.7 min)."},
    )
    micro_seconds: float = field(
        default=200.0, metadata={"help": "Audio of one forward pass, about, padding included; what fits a device."}
    )
    learning_rate: float = field(default=3e-5, metadata={"help": "Learning rate between warm-up and decay."})
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Another such rate for the head; left out: the same."}
    )
    schedule: str = field(
        default="tri_stage",
        metadata={"choices": ["tri_stage", "cosine", "constant"], "help": "Of the rate: tri_stage is the paper's."},
    )
    warmup_share: float = field(default=0.1, metadata={"help": "Share of the steps in which the rate rises."})
    hold_share: float = field(default=0.4, metadata={"help": "Share of the steps in which it stays; the rest decays."})
    final_lr_scale: float = field(default=0.05, metadata={"help": "Last learning rate, as a share."})
    freeze_steps: int = field(default=0, metadata={"help": "Updates in which only the head learns, at first."})
    max_steps: int = field(default=80_000, metadata={"help": "Updates; -1: as num_train_epochs says."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Decay of the squared gradients' mean."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Adam's epsilon."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients to this norm; 0 (the paper): never."})
    num_threads: int = field(
        default=0, metadata={"help": "CPU threads of a process when training on a CPU; 0: its share of the cores."}
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: steps, epoch or no."})
    eval_steps: float | None = field(default=1000, metadata={"help": "Updates from one evaluation to the next."})
    save_steps: float = field(default=1000, metadata={"help": "Updates from one checkpoint to the next."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep, beside the best."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Not for these data sets."})

    def __post_init__(self) -> None:
        own = {spec.name: spec.default for spec in fields(TrainingArguments)}
        for name, instead in _REPLACED.items():
            if name in own and getattr(self, name) != own[name]:
                raise ArgumentError(f"{name}={getattr(self, name)} counts for nothing: {instead}.")
        check_ranges(
            [
                (self.step_seconds > 0, "step_seconds", self.step_seconds, "more than 0"),
                (self.micro_seconds > 0, "micro_seconds", self.micro_seconds, "more than 0"),
                (self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0"),
                (0 <= self.warmup_share <= 1, "warmup_share", self.warmup_share, "at least 0 and at most 1"),
                (
                    0 <= self.hold_share <= 1 - self.warmup_share,
                    *("hold_share", self.hold_share, "at most 1 with warmup_share"),
                ),
                (0 < self.final_lr_scale <= 1, "final_lr_scale", self.final_lr_scale, "more than 0 and at most 1"),
                (self.freeze_steps >= 0, "freeze_steps", self.freeze_steps, "at least 0"),
                (
                    self.num_threads >= 0,
                    *("num_threads", self.num_threads, "at least 0, which means its share of the cores"),
                ),
                (self.schedule in SCHEDULES, "schedule", self.schedule, f"one of {', '.join(SCHEDULES)}"),
            ]
        )
        if self.eval_strategy == "no":
            self.load_best_model_at_end = False
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (self.use_cpu or not torch.accelerator.is_available()):
            # Left alone, Accelerate looks for MPI and, without it, has each process train by itself.
            self.use_cpu, self.ddp_backend = True, self.ddp_backend or "gloo"
        super().__post_init__()

    def told(self) -> dict[str, Any]:
        """The values for `run.json`: those of this class, and of `TrainingArguments` those that were changed."""
        own, values = type(self).__annotations__, self.to_dict()
        theirs = {spec.name: spec.default for spec in fields(TrainingArguments)}
        return {name: value for name, value in values.items() if name in own or value != theirs.get(name, value)}

    def with_max_steps(self, max_steps: int) -> FinetuningArguments:
        """A copy for a run of so many updates, where epochs decide."""
        changed = copy.copy(self)
        changed.max_steps = max_steps
        return changed
