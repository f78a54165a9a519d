"""
Arguments of a fine-tuning run: the data, the initial model and the optimization, from a YAML file and flags over it.

The defaults are the paper's protocol for 100 hours (wav2vec 2.0's configurations, which the authors used), or a
comment says why not.
"""

from __future__ import annotations

import os
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from transformers import TrainingArguments

from ..model.configuration_dinosr import DinoSRConfig
from ..training.restarts import separate_restarts
from ..training.shared_arguments import argument, shared_argument, shared_rules
from ..utils.command_line import ArgumentError, argument_errors, check_ranges


@dataclass
class LabelledDataArguments:
    """Recordings with labels. Raises `ArgumentError` if a value is out of range."""

    train_data: list[str] = argument(
        ["synthetic"],
        "Training data, one or more of: a folder with metadata.csv (or the transcripts of LibriSpeech or MLS), a table"
        " (.csv, .jsonl), a manifest (.tsv and .wrd), a dataset on this machine or on the Hub; or `synthetic`: speech"
        " that espeak-ng generates.",
    )
    eval_data: list[str] = argument(
        [], "Data that selects the best checkpoint; if not given, eval_split of train_data."
    )
    test_data: list[str] = argument([], "Data for the final evaluation; if not given, test_split of train_data.")
    train_split: str | None = argument(None, "Split of train_data, if it has several.")
    eval_split: str | None = argument(None, "Split of eval_data; synthetic: validation.")
    test_split: str | None = argument(None, "Split of test_data; synthetic: test.")
    data_config: str | None = argument(None, "Configuration of a dataset that has several.")
    label_column: str | None = argument(None, "Column of the labels; if not given, the usual columns of transcripts.")
    audio_column: str = shared_argument("audio_column", "audio")
    min_seconds: float = argument(0.1, "Shorter utterances are left out of training.")
    # The reference is limited only by its batch of 200 s, and current devices need no lower limit.
    max_seconds: float = argument(40.0, "Longer utterances are left out of training; evaluation includes all.")
    speed_change: float = shared_argument("speed_change", 0.0, "the paper: 0, at its own speed")
    synthetic_utterances: int = argument(200, "Number of synthetic training utterances.")
    synthetic_eval_utterances: int = argument(50, "Number of synthetic utterances of validation, and of test.")
    synthetic_speakers: int = argument(40, "Number of synthetic training speakers; evaluation has 40 others.")
    synthetic_text: str = argument("sentences", "What synthetic speakers say.", ["sentences", "digits", "mixed"])
    synthetic_languages: list[str] = argument(["en"], "Languages of synthetic speech: en, de, es, fr, it.")
    synthetic_noise: bool = argument(False, "Whether synthetic speech has rooms, microphones and noise.")

    def __post_init__(self) -> None:
        rules = [
            (self.min_seconds >= 0, "min_seconds", self.min_seconds, "at least 0"),
            (self.max_seconds > self.min_seconds, "max_seconds", self.max_seconds, "more than min_seconds"),
            (0 <= self.speed_change < 1, "speed_change", self.speed_change, "at least 0 and less than 1"),
        ]
        for name in ("synthetic_utterances", "synthetic_eval_utterances", "synthetic_speakers"):
            rules.append((getattr(self, name) >= 1, name, getattr(self, name), "at least 1"))
        check_ranges(rules)


def _config_field(note: str = "") -> Any:
    """Return a field that replaces the one of the same name of DinoSRConfig, if it is given."""
    return argument(None, f"As in DinoSRConfig{note}; if not given, the checkpoint's value.")


@dataclass
class InitialModelArguments:
    """
    The model that fine-tuning starts from, and changes of its configuration.

    Raises `ArgumentError` if a value is out of range, or has no effect with `freeze_encoder`.
    """

    model: str = argument("runs/tiny", "Folder or Hub name of a pre-trained or fine-tuned DinoSR.")
    network: str = argument(
        "student",
        "Encoder of a pre-training checkpoint to fine-tune (the teacher is in the paper's ablations).",
        ["student", "teacher"],
    )
    from_scratch: bool = argument(False, "Whether to take only the configuration of `model`, with random weights.")
    freeze_feature_encoder: bool = argument(True, "Whether to freeze the convolutions; from_scratch trains them.")
    freeze_encoder: bool = argument(
        False, "Whether to train only the head, with the encoder in evaluation mode, as SUPERB does."
    )
    hidden_dropout: float | None = _config_field()
    attention_dropout: float | None = _config_field()
    activation_dropout: float | None = _config_field()
    feat_proj_dropout: float | None = _config_field()
    final_dropout: float | None = _config_field()
    layerdrop: float | None = _config_field()
    mask_time_prob: float | None = _config_field(" (0: no masks over time)")
    mask_time_length: int | None = _config_field()
    mask_time_min_masks: int | None = _config_field()
    mask_feature_prob: float | None = _config_field(" (0: no masks over channels)")
    mask_feature_length: int | None = _config_field()
    mask_feature_min_masks: int | None = _config_field()
    lora_rank: int = argument(0, "Rank of low-rank adapters (PEFT) to train beside the head; 0: train all weights.")
    lora_alpha: int = argument(16, "Scale of the adapters, which is divided by their rank.")
    lora_targets: list[str] = argument(
        ["q_proj", "v_proj"], "Names of the layers with adapters: q_proj, k_proj, v_proj, out_proj, ..."
    )

    def __post_init__(self) -> None:
        check_ranges(
            [
                (self.lora_rank >= 0, "lora_rank", self.lora_rank, "at least 0"),
                (self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "more than 0"),
            ]
        )
        if self.from_scratch and self.network != "student":
            raise ArgumentError(
                f"network={self.network} would have no effect with from_scratch, whose weights are random. Remove one"
                " or the other."
            )
        for name, default in (("lora_alpha", 16), ("lora_targets", ["q_proj", "v_proj"])):
            if not self.lora_rank and getattr(self, name) != default:
                raise ArgumentError(f"{name} would have no effect without adapters. Set lora_rank, or remove it.")
        changes = self.config_changes()
        with argument_errors():
            DinoSRConfig(**changes)  # checks the ranges
        without_effect = [name for name in changes if name != "final_dropout"]
        if self.lora_rank:
            without_effect.append("lora_rank")
        if self.freeze_encoder and without_effect:
            raise ArgumentError(
                f"{', '.join(without_effect)} would have no effect with freeze_encoder: a frozen encoder is not"
                " trained, has no dropout and is not masked. Remove one or the other."
            )

    def config_changes(self) -> dict[str, Any]:
        """Return the fields of the configuration that were given: all those with None as default."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.default is None}
        return {name: value for name, value in values.items() if value is not None}


# What to do instead of setting fields of `TrainingArguments` that SpeechTrainer does not read.
_NO_EFFECT = {
    "batches are measured in seconds of audio. Set step_seconds (an optimizer step) and micro_seconds (a forward"
    " pass)": ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    "set schedule, warmup_share, hold_share and final_lr_scale instead": (
        *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    ),
    "the task decides which checkpoint is the best. Remove it": ("metric_for_best_model", "greater_is_better"),
    "publish the finished folder with dinosr publish instead": (
        *("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push"),
        "hub_revision",
    ),
    "a signal such as SIGTERM always writes a checkpoint. Remove it": ("enable_jit_checkpoint",),
    "a checkpoint without the optimizer could not be resumed. Remove it": ("save_only_model",),
    "SpeechTrainer has its own batches, losses and evaluation. Remove it": (
        *("auto_find_batch_size", "label_smoothing_factor", "train_sampling_strategy", "length_column_name"),
        *("data_seed", "dataloader_drop_last", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
        *("prediction_loss_only", "batch_eval_metrics", "eval_accumulation_steps", "eval_do_concat_batches"),
        *("dataloader_multiprocessing_context", "dataloader_in_order", "include_for_metrics"),
        *("bf16_full_eval", "fp16_full_eval", "label_names", "do_train", "do_eval", "do_predict"),
        *("remove_unused_columns", "eval_use_gather_object"),
    ),
}
_DEFAULTS = {
    spec.name: spec.default if spec.default_factory is MISSING else spec.default_factory()
    for spec in fields(TrainingArguments)
}


@dataclass
class FinetuningArguments(TrainingArguments):
    """
    The optimization: all of `transformers.TrainingArguments`, with the paper's values as defaults, and the following.

    Raises `ArgumentError` if a value is out of range, or an argument was given that has no effect.
    """

    output_dir: str = argument("runs/finetuned", "Folder of the checkpoints and results.")
    step_seconds: float = shared_argument("step_seconds", 1600.0, "the paper: 26.7 min")
    micro_seconds: float = shared_argument("micro_seconds", 200.0)
    learning_rate: float = shared_argument("learning_rate", 3e-5)
    head_learning_rate: float | None = argument(None, "Peak learning rate of the head; if not given, learning_rate.")
    schedule: str = shared_argument("schedule", "tri_stage")
    warmup_share: float = shared_argument("warmup_share", 0.1)
    hold_share: float = shared_argument("hold_share", 0.4)
    final_lr_scale: float = shared_argument("final_lr_scale", 0.05)
    freeze_steps: int = argument(0, "Number of updates at the start in which only the head learns.")
    max_steps: int = argument(80_000, "Number of updates; -1: as given by num_train_epochs.")
    adam_beta2: float = shared_argument("adam_beta2", 0.98)
    adam_epsilon: float = shared_argument("adam_epsilon", 1e-8)
    max_grad_norm: float = shared_argument("max_grad_norm", 0.0)
    num_threads: int = shared_argument("num_threads", 0)
    eval_strategy: str = argument("steps", "When to evaluate: steps, epoch or no.")
    eval_steps: float | None = argument(1000, "Number of updates between evaluations.")
    save_steps: float = argument(1000, "Number of updates between checkpoints.")
    save_total_limit: int | None = argument(2, "Number of checkpoints to keep; the last and the best are always kept.")
    load_best_model_at_end: bool = argument(True, "Whether to finish with the best checkpoint instead of the last.")
    dry_run: bool = argument(False, "Whether to open data and model, print what would be trained, and end.")

    def __post_init__(self) -> None:
        for instead, names in _NO_EFFECT.items():
            for name in names:
                if name in _DEFAULTS and getattr(self, name) != _DEFAULTS[name]:
                    given = name if name == "hub_token" else f"{name}={getattr(self, name)}"
                    raise ArgumentError(f"{given} has no effect: {instead}.")
        check_ranges(
            [
                *shared_rules(self),
                (self.step_seconds > 0, "step_seconds", self.step_seconds, "more than 0"),
                (self.micro_seconds > 0, "micro_seconds", self.micro_seconds, "more than 0"),
                (self.freeze_steps >= 0, "freeze_steps", self.freeze_steps, "at least 0"),
            ]
        )
        for name in ("fsdp", "deepspeed"):
            if getattr(self, name) or os.environ.get(f"ACCELERATE_USE_{name.upper()}") in ("true", "1"):
                raise ArgumentError(
                    f"{name} splits the weights, and evaluation and saving need them whole. Start one process per GPU"
                    " without it: `accelerate launch --multi_gpu`."
                )
        if self.max_steps > 0 and self.num_train_epochs != _DEFAULTS["num_train_epochs"]:
            raise ArgumentError(
                f"num_train_epochs={self.num_train_epochs:g} has no effect: max_steps={self.max_steps} counts. Set"
                " --max_steps -1, or remove it."
            )
        if self.eval_strategy == "no":
            self.load_best_model_at_end = False
        if self.load_best_model_at_end and self.save_total_limit == 1:
            self.save_total_limit = 2  # Trainer would remove the last at the end
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (self.use_cpu or not torch.accelerator.is_available()):
            # By default Accelerate looks for MPI and, without it, has each process train alone.
            self.use_cpu, self.ddp_backend = True, self.ddp_backend or "gloo"
        separate_restarts()
        super().__post_init__()
        by_steps = self.save_strategy == self.eval_strategy == "steps"
        if self.load_best_model_at_end and by_steps and self.save_steps != self.eval_steps:
            raise ArgumentError(
                f"save_steps={self.save_steps:g} is not eval_steps={self.eval_steps:g}, so the best model may be of a"
                " step without a checkpoint. Give both the same value, or set --load_best_model_at_end false."
            )

    def to_record(self) -> dict[str, Any]:
        """Return the values for `run.json`: the fields of this class, and changed ones of `TrainingArguments`."""
        own, values = type(self).__annotations__, self.to_dict()
        return {name: value for name, value in values.items() if name in own or value != _DEFAULTS.get(name, value)}
