"""
What a pre-training run can be told: the model, the data, the run; by a YAML file and by flags over it.

The defaults are the paper's (Section 4.1), or a comment says why not.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from ..model.configuration_dinosr import DinoSRConfig
from ..utils.command_line import ArgumentError, check_ranges, explicit_names, parse_groups
from ..utils.model_folder import open_dinosr_config

# Fields of DinoSRConfig that pre-training reads; what belongs to fine-tuning is set there.
MODEL_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop"),
    *("initializer_range", "layer_norm_eps", "feat_extract_activation"),
    *("conv_dim", "conv_stride", "conv_kernel", "conv_bias"),
    *("num_conv_pos_embeddings", "conv_pos_kernel_size", "num_conv_pos_embedding_groups"),
    *(
        "num_codebooks",
        "codebook_size",
        "codebook_decay",
        "codebook_end_decay",
        "codebook_end_decay_step",
        "codebook_update_steps",
        "codebook_revival_share",
    ),
    *("ema_decay", "ema_end_decay", "ema_anneal_steps", "freeze_teacher_step", "freeze_mode"),
    *("mask_prob", "mask_length", "mask_min_spans"),
)

CODEBOOK_SIZES = ("num_codebooks", "codebook_size")

# Of these, what a checkpoint must agree in: they decide the shapes of the weights and what is computed with them.
ARCHITECTURE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("feat_extract_activation", "conv_dim", "conv_stride", "conv_kernel", "conv_bias"),
    *("num_conv_pos_embeddings", "conv_pos_kernel_size", "num_conv_pos_embedding_groups"),
    *CODEBOOK_SIZES,
)


def _model_arguments() -> type:
    """A dataclass of the model's fields, with the configuration's own defaults and docstring lines."""
    lines = re.findall(r"^ {8}(\w+): (.+(?:\n {12}.+)*)", DinoSRConfig.__doc__ or "", re.MULTILINE)
    helps = {name: re.sub(r"\s+", " ", text).replace("%", "%%") for name, text in lines}
    defaults: dict[str, Any] = {spec.name: spec.default for spec in dataclasses.fields(DinoSRConfig)}
    fields: list[tuple[str, Any, Any]] = []
    for name in MODEL_FIELDS:
        annotation, default = str(DinoSRConfig.__annotations__[name]), defaults[name]
        metadata = {"help": helps[name]}
        if "list" in annotation:
            fields.append((name, list[int], field(default_factory=partial(list, default), metadata=metadata)))
            continue
        kind: Any = float if "float" in annotation else type(default)
        kind = kind | None if "None" in annotation else kind
        fields.append((name, kind, field(default=default, metadata=metadata)))
    return dataclasses.make_dataclass("ModelArguments", fields)


ModelArguments: Any = _model_arguments()


@dataclass
class DataArguments:
    """The recordings, and how they are cut into optimizer steps."""

    data: list[str] = field(
        default_factory=lambda: ["synthetic"],
        metadata={
            "help": "One or several of: a folder of audio, tar archives, a manifest (.tsv, .csv, .jsonl), a folder or"
            " file of `datasets`, a dataset's name on the Hub; or `synthetic`: speech made on the spot by espeak-ng."
        },
    )
    data_split: list[str] = field(
        default_factory=list, metadata={"help": "Split of the data, where it has several: one for all, or one each."}
    )
    data_config: list[str] = field(
        default_factory=list, metadata={"help": "Configuration of a Hub dataset with several: one for all, or each."}
    )
    data_weights: list[float] = field(
        default_factory=list, metadata={"help": "With several data, how much each counts; left out: all alike."}
    )
    data_temperature: float = field(
        default=1.0,
        metadata={"help": "With several data, shares follow weight * hours ** this: 1 as they are, towards 0 equal."},
    )
    audio_column: str = field(default="audio", metadata={"help": "Column of a dataset that has the audio."})
    streaming: bool = field(
        default=False, metadata={"help": "Read a dataset as a stream, without downloading or indexing it first."}
    )
    window_seconds: float = field(
        default=28_800.0,
        metadata={"help": "Audio of a stream that is held in memory, undecoded, and cut into steps at a time."},
    )
    synthetic_utterances: int = field(default=1200, metadata={"help": "Utterances of the synthetic corpus."})
    synthetic_languages: list[str] = field(
        default_factory=lambda: ["en"], metadata={"help": "Languages of the synthetic corpus: en, de, es, fr, it."}
    )
    synthetic_texts: list[int] = field(
        default_factory=lambda: [4, 6], metadata={"help": "Least and greatest number of sentences in an utterance."}
    )
    synthetic_noise: bool = field(
        default=True, metadata={"help": "Whether the synthetic corpus has rooms, microphones and noise."}
    )
    batching: str = field(
        default="crop",
        metadata={
            "choices": ["crop", "pad"],
            "help": "crop: all utterances of a step are cut to its shortest, at random (the paper); pad: they are"
            " padded.",
        },
    )
    step_seconds: float = field(
        default=3800.0,
        metadata={"help": "Audio of an optimizer step, over all processes and micro-batches (the paper: 63 minutes)."},
    )
    micro_seconds: float = field(
        default=237.5, metadata={"help": "Audio of one forward pass of a process, padding included; what fits a GPU."}
    )
    min_seconds: float = field(default=2.0, metadata={"help": "Shorter utterances are left out."})
    max_seconds: float = field(default=20.0, metadata={"help": "Of longer utterances a random part is taken."})
    num_buckets: int = field(default=20, metadata={"help": "Buckets of similar duration, at most."})
    num_workers: int = field(default=4, metadata={"help": "Reading processes of each training process."})
    max_skipped_share: float = field(
        default=0.01,
        metadata={
            "help": "Share of the utterances that may turn out unreadable while training; past it the run stops. Of at"
            " least 1,000."
        },
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Held-out speech, anything that `data` may be; left out: no evaluation."}
    )
    eval_split: str | None = field(default=None, metadata={"help": "Split of the held-out speech."})
    eval_labels: str | None = field(
        default=None,
        metadata={
            "help": "Phone labels of the held-out speech (.jsonl, .ctm, a folder of TextGrids); synthetic has its own."
        },
    )
    eval_seconds: float = field(default=1800.0, metadata={"help": "Held-out audio used, at most."})


@dataclass
class RunArguments:
    """The optimization, and what is left behind."""

    output_dir: str = field(default="runs/pretrain", metadata={"help": "Folder for the model and the metrics."})
    base_model: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name of a DinoSR to train on; its sizes count where none are told. Left out: random"
            " weights."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, masks, crops and order."})
    resume: str = field(
        default="auto",
        metadata={
            "help": "auto: from the newest good checkpoint in output_dir, if any; never: refuse a folder that has one;"
            " or the path of a checkpoint."
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "Print and draw what the run would be, and stop."})
    max_steps: int = field(default=400_000, metadata={"help": "Updates of the optimizer."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate between warm-up and decay."})
    schedule: str = field(
        default="tri_stage",
        metadata={
            "choices": ["tri_stage", "cosine", "constant"],
            "help": "Of the learning rate, after the warm-up: hold and decay (the paper), half a cosine, or hold.",
        },
    )
    warmup_share: float = field(default=0.03, metadata={"help": "Share of the steps in which the rate rises."})
    hold_share: float = field(
        default=0.47, metadata={"help": "Share of the steps in which it stays; the rest decays."}
    )
    final_lr_scale: float = field(
        default=0.1,
        metadata={"help": "Last learning rate, as a share (the paper's text; the authors' file comes to 0.01)."},
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "Decay of the gradients' mean."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Decay of the squared gradients' mean."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "Adam's epsilon."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of all parameters, norms and biases too."})
    scale_to_batch: bool = field(
        default=False,
        metadata={"help": "Take optimizer and averages as meant for reference_step_seconds, and scale them to this."},
    )
    reference_step_seconds: float = field(
        default=3800.0, metadata={"help": "Audio of a step that the values were chosen for, for scale_to_batch."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients to this norm; 0 (the paper): never."})
    max_skipped_steps: int = field(
        default=20,
        metadata={"help": "Steps in a row without finite gradients, which are skipped, after which the run stops."},
    )
    mixed_precision: str | None = field(
        default=None,
        metadata={"help": "no, fp16 (the paper) or bf16; left out: as `accelerate` is configured or launched."},
    )
    num_threads: int = field(
        default=0,
        metadata={"help": "CPU threads of a process when training on a CPU; 0: its share of the cores."},
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade a third of the speed for memory."})
    torch_compile: bool = field(default=False, metadata={"help": "Compile the model: slow to start, then faster."})
    torch_compile_backend: str = field(default="inductor", metadata={"help": "What `torch.compile` compiles with."})
    log_steps: int = field(default=100, metadata={"help": "Steps from one line of metrics to the next."})
    checkpoint_steps: int = field(
        default=1000,
        metadata={"help": "Steps from one checkpoint, to resume from, to the next; 0: only when a signal asks."},
    )
    keep_checkpoints: int = field(default=2, metadata={"help": "How many checkpoints to keep, the newest ones."})
    save_steps: int = field(
        default=25_000, metadata={"help": "Steps from one model that is kept for good to the next; 0: only the last."}
    )
    eval_steps: int = field(default=5000, metadata={"help": "Steps from one evaluation of eval_data to the next."})
    collapse_perplexity: float = field(
        default=0.05, metadata={"help": "Warn where a perplexity falls under this share of the codewords; 0: never."}
    )
    collapse_active: float = field(
        default=0.15, metadata={"help": "Warn where fewer than this share of the codewords are in use; 0: never."}
    )
    collapse_variation: float = field(
        default=0.02,
        metadata={"help": "Warn where less than this share of targets or features changes over time; 0: never."},
    )
    collapse_patience: int = field(
        default=3, metadata={"help": "Lines of metrics in a row that must be past a bound before it counts."}
    )
    stop_on_collapse: bool = field(default=False, metadata={"help": "Stop the run at such a warning."})
    trackers: list[str] = field(
        default_factory=list, metadata={"help": "Where Accelerate sends the metrics too: tensorboard, wandb, ..."}
    )


@dataclass
class PretrainingArguments:
    """Everything a run is told."""

    model: Any
    data: DataArguments
    run: RunArguments

    def model_config(self) -> DinoSRConfig:
        """The configuration of the model. Raises `ValueError` for combinations no model can have."""
        return DinoSRConfig(**dataclasses.asdict(self.model))

    def to_dict(self) -> dict[str, Any]:
        """All arguments by name."""
        return {name: value for group in self._groups() for name, value in dataclasses.asdict(group).items()}

    def to_yaml(self) -> str:
        """The arguments as a file that starts the same run."""
        return "\n".join(yaml.safe_dump(dataclasses.asdict(group), sort_keys=False) for group in self._groups())

    def _groups(self) -> tuple[Any, DataArguments, RunArguments]:
        return self.model, self.data, self.run


PRECISIONS = (None, "no", "fp16", "bf16")
GROUPS: Any = (ModelArguments, DataArguments, RunArguments)


def parse_arguments(argv: Sequence[str], default_config: str | Path) -> PretrainingArguments:
    """
    Read the command line of `examples/pretrain.py`.

    Args:
        argv: First, if given, a YAML file; then flags, `--name value`, which go over it.
        default_config: The YAML file that counts where none is given.

    Returns:
        The arguments; keys that neither file nor flags have are at the paper's values.

    Raises:
        ArgumentError: For an unknown key (the message names the nearest), a value of the wrong type or out of range,
            a `base_model` that cannot be opened or is not of the sizes told.
    """
    arguments = PretrainingArguments(*parse_groups(argv, GROUPS, default_config))
    if arguments.run.base_model is not None:
        _take_sizes(arguments, explicit_names(argv, GROUPS, default_config))
    _check(arguments)
    return arguments


def _take_sizes(arguments: PretrainingArguments, told: set[str]) -> None:
    """Give the model the sizes of the one that it starts from, but for codebooks: other ones may begin anew."""
    name = arguments.run.base_model
    assert name is not None
    try:
        base = open_dinosr_config(name)
    except ValueError as error:
        raise ArgumentError(f"base_model={error}") from error
    for field_name in ARCHITECTURE:
        theirs, ours = getattr(base, field_name), getattr(arguments.model, field_name)
        if field_name not in told:
            setattr(arguments.model, field_name, theirs)
        elif ours != theirs and field_name not in CODEBOOK_SIZES:
            raise ArgumentError(
                f"base_model={name} has {field_name} {theirs}, but {ours} is told. Leave {field_name} out, or give the"
                " configuration that this model was trained with."
            )


def _check(arguments: PretrainingArguments) -> None:
    data, run = arguments.data, arguments.run
    rules = [
        (run.max_steps >= 1, "max_steps", run.max_steps, "at least 1"),
        (run.learning_rate > 0, "learning_rate", run.learning_rate, "more than 0"),
        (0 <= run.warmup_share <= 1, "warmup_share", run.warmup_share, "at least 0 and at most 1"),
        (0 <= run.hold_share <= 1 - run.warmup_share, "hold_share", run.hold_share, "at most 1 with warmup_share"),
        (0 < run.final_lr_scale <= 1, "final_lr_scale", run.final_lr_scale, "more than 0 and at most 1"),
        (run.reference_step_seconds > 0, "reference_step_seconds", run.reference_step_seconds, "more than 0"),
        (run.seed >= 0, "seed", run.seed, "at least 0"),
        (0 <= run.adam_beta1 < 1, "adam_beta1", run.adam_beta1, "at least 0, less than 1"),
        (0 <= run.adam_beta2 < 1, "adam_beta2", run.adam_beta2, "at least 0, less than 1"),
        (run.adam_epsilon > 0, "adam_epsilon", run.adam_epsilon, "more than 0"),
        (run.weight_decay >= 0, "weight_decay", run.weight_decay, "at least 0"),
        (run.max_grad_norm >= 0, "max_grad_norm", run.max_grad_norm, "at least 0, which means never"),
        (run.max_skipped_steps >= 1, "max_skipped_steps", run.max_skipped_steps, "at least 1"),
        (run.mixed_precision in PRECISIONS, "mixed_precision", run.mixed_precision, "no, fp16, bf16"),
        (run.num_threads >= 0, "num_threads", run.num_threads, "at least 0, which means its share of the cores"),
        (run.log_steps >= 1, "log_steps", run.log_steps, "at least 1"),
        (run.checkpoint_steps >= 0, "checkpoint_steps", run.checkpoint_steps, "at least 0, which means on signals"),
        (run.keep_checkpoints >= 1, "keep_checkpoints", run.keep_checkpoints, "at least 1"),
        (run.save_steps >= 0, "save_steps", run.save_steps, "at least 0, which means only at the end"),
        (run.eval_steps >= 1, "eval_steps", run.eval_steps, "at least 1"),
        (0 <= run.collapse_perplexity < 1, "collapse_perplexity", run.collapse_perplexity, "at least 0, less than 1"),
        (0 <= run.collapse_active < 1, "collapse_active", run.collapse_active, "at least 0, less than 1"),
        (0 <= run.collapse_variation < 1, "collapse_variation", run.collapse_variation, "at least 0, less than 1"),
        (run.collapse_patience >= 1, "collapse_patience", run.collapse_patience, "at least 1"),
        (data.num_buckets >= 1, "num_buckets", data.num_buckets, "at least 1"),
        (data.num_workers >= 0, "num_workers", data.num_workers, "at least 0"),
        (0 <= data.max_skipped_share <= 1, "max_skipped_share", data.max_skipped_share, "at least 0 and at most 1"),
        (0 < data.data_temperature <= 1, "data_temperature", data.data_temperature, "more than 0 and at most 1"),
        (data.synthetic_utterances >= 1, "synthetic_utterances", data.synthetic_utterances, "at least 1"),
        (data.min_seconds > 0, "min_seconds", data.min_seconds, "more than 0"),
        (data.max_seconds >= data.min_seconds, "max_seconds", data.max_seconds, "at least min_seconds"),
        (data.step_seconds >= data.max_seconds, "step_seconds", data.step_seconds, "at least max_seconds"),
        (data.micro_seconds >= data.max_seconds, "micro_seconds", data.micro_seconds, "at least max_seconds"),
        (data.window_seconds >= data.step_seconds, "window_seconds", data.window_seconds, "at least step_seconds"),
        (data.eval_seconds >= data.max_seconds, "eval_seconds", data.eval_seconds, "at least max_seconds"),
    ]
    check_ranges(rules)
    for name in ("data_split", "data_config", "data_weights"):
        values = getattr(data, name)
        allowed_lengths = {0, len(data.data)} | ({1} if name != "data_weights" else set())
        if len(values) not in allowed_lengths:
            raise ArgumentError(f"{name} has {len(values)} values for {len(data.data)} data. Give one for each.")
    backends = torch.compiler.list_backends(exclude_tags=()) if run.torch_compile else []
    if run.torch_compile and run.torch_compile_backend not in backends:
        raise ArgumentError(
            f"torch_compile_backend={run.torch_compile_backend} is none of {', '.join(backends)}. Choose one of them."
        )
    if data.streaming and len(data.data) > 1:
        raise ArgumentError("streaming reads one dataset, but data has several. Mix them on disk, or give one.")
    if data.eval_labels is not None and data.eval_data is None:
        raise ArgumentError("eval_labels belong to eval_data, which is left out. Give both.")
    try:
        arguments.model_config()
    except ValueError as error:
        raise ArgumentError(str(error)) from error
