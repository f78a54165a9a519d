"""Arguments of a pre-training run. The defaults are the paper's (Section 4.1), or the help says why not."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any, get_args

import torch
import yaml

from ..analysis.baselines import MFCC_KINDS
from ..model.configuration_dinosr import (
    ATTENTION_INITS,
    EMA_SCHEDULES,
    FEATURE_ENCODERS,
    FREEZE_MODES,
    HEAD_INPUTS,
    TEACHER_INITS,
    DinoSRConfig,
)
from ..training.resume import find_checkpoints
from ..training.run_record import public_values
from ..training.shared_arguments import argument, shared_argument, shared_rules
from ..utils.command_line import (
    ArgumentError,
    CommandLine,
    argument_errors,
    check_ranges,
    parse_groups,
    read_command_line,
)
from ..utils.model_folder import open_dinosr_config
from ..utils.threads import MAX_THREADS
from .anchor_arguments import anchor_kind, check_mfcc_frames, drop_settings_of_another_anchor, settle_anchor

# The fields of DinoSRConfig that pre-training exposes, in the order of --help. Types and defaults are DinoSRConfig's;
# the other fields belong to fine-tuning and are set there.
MODEL_HELP = {
    "hidden_size": "Width of the transformer.",
    "num_hidden_layers": "Number of transformer layers, in the student and in the teacher.",
    "num_attention_heads": "Number of attention heads of a layer; must divide hidden_size.",
    "intermediate_size": "Width of a layer's feed-forward network.",
    "hidden_act": "Activation of the feed-forward network.",
    "hidden_dropout": "Dropout after attention, after the feed-forward network and before the first layer.",
    "activation_dropout": "Dropout inside the feed-forward network.",
    "attention_dropout": "Dropout of the attention probabilities.",
    "feat_proj_dropout": "Dropout of the projected features; student only.",
    "layerdrop": "Probability with which the student skips a layer in training.",
    "initializer_range": "Standard deviation of the transformer's initial weights.",
    "attention_init": "Distribution of attention's initial weights. normal: as the transformer's others; xavier: as in"
    " SpidR.",
    "qkv_bias": "Whether queries, keys and values of attention have a bias; not in SpidR.",
    "layer_norm_eps": "Epsilon of the layer norms of transformer and projection.",
    "feature_encoder": "Front end. conv (the paper): convolutions of the waveform, set by conv_*; log_mel: log mel"
    " energies, nothing learnt, which needs far less speech and time.",
    "feat_extract_activation": "Activation of the convolutions, both of the feature encoder and of the positions.",
    "conv_dim": "Output channels of each convolution of the feature encoder.",
    "conv_stride": "Stride of each convolution of the feature encoder.",
    "conv_kernel": "Kernel size of each convolution of the feature encoder.",
    "conv_bias": "Whether the convolutions of the feature encoder have a bias.",
    "num_conv_pos_embeddings": "Number of stacked positional convolutions.",
    "conv_pos_kernel_size": "Kernel size of each positional convolution.",
    "num_conv_pos_embedding_groups": "Number of groups of the positional convolutions; must divide hidden_size.",
    "num_codebooks": "Number of top layers that have a codebook and a prediction head.",
    "codebook_size": "Number of codewords of a codebook.",
    "codebook_decay": "Decay of codeword sums and counts (tau of the paper's equations 4 and 5).",
    "codebook_end_decay": "Value that codebook_decay is annealed to, linearly; unset: codebook_decay is constant.",
    "codebook_end_decay_step": "Update at which the annealing of codebook_decay ends.",
    "codebook_update_steps": "Number of updates of the weights per update of the codebooks, which takes all frames"
    " since the last one. The paper's 1 belongs to its large batch.",
    "codebook_revival_share": "A codeword that gets less than this part of an even share of the frames starts anew"
    " beside a much used one. 0 (the paper): never, and unused codewords stay unused; 0.1 keeps all in use.",
    "num_anchor_labels": "Number of the anchor's labels; 0: codebook_size, or as many as the file of labels has.",
    "head_input": "What the head of a codebook reads. last_layer (the paper): the student's output; own_layer (SpidR):"
    " the feed-forward output of the codebook's own layer of the student.",
    "ema_decay": "Decay of the teacher's average at the first update (lambda of the paper's equation 1).",
    "ema_schedule": "How that decay grows. linear (the paper); exponential (SpidR): 1 - (1 - ema_decay) * exp(-step /"
    " ema_timescale).",
    "ema_end_decay": "Decay of the teacher's average after ema_anneal_steps updates; linear schedule.",
    "ema_anneal_steps": "Number of updates over which the decay goes linearly from ema_decay to ema_end_decay.",
    "ema_timescale": "Number of updates in which the exponential schedule comes nearer to 1 by a factor of e.",
    "ema_threshold": "Distance of the decay from 1 at which the exponential schedule stops the teacher.",
    "teacher_init": "The teacher's initial weights. student (the paper): the student's; random (SpidR): those of"
    " attention and feed-forward networks are drawn anew.",
    "freeze_teacher_step": "Update from which the teacher is frozen; null in the YAML file: never.",
    "freeze_front_end_step": "Update from which convolutions and projection are frozen, whatever the teacher does"
    " (SpidR); unset: with the teacher, see freeze_mode.",
    "freeze_mode": "What is frozen with the teacher. frozen: convolutions and projection too, as the authors meant;"
    " shared: they go on learning and feed the teacher, as in the authors' code; copied: the teacher keeps copies of"
    " them, and the student's go on learning.",
    "mask_prob": "Number of mask spans drawn is mask_prob * frames / mask_length. Spans overlap: the default masks"
    " about 57 %% of the frames.",
    "mask_length": "Number of frames of a mask span.",
    "mask_min_spans": "Minimum number of mask spans of an utterance.",
}

_CHOICES = {
    "feature_encoder": FEATURE_ENCODERS,
    "attention_init": ATTENTION_INITS,
    "head_input": HEAD_INPUTS,
    "ema_schedule": EMA_SCHEDULES,
    "teacher_init": TEACHER_INITS,
    "freeze_mode": FREEZE_MODES,
}

CODEBOOK_SIZES = ("num_codebooks", "codebook_size")

# What a checkpoint must agree in: the shapes of the weights, and what is computed with them.
ARCHITECTURE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("feature_encoder", "feat_extract_activation", "conv_dim", "conv_stride", "conv_kernel", "conv_bias"),
    *("num_conv_pos_embeddings", "conv_pos_kernel_size", "num_conv_pos_embedding_groups"),
    *CODEBOOK_SIZES,
    *("num_anchor_labels", "qkv_bias", "head_input"),
)

# What a run may change, and takes from its `base_model` otherwise.
INHERITED = (
    *("mask_prob", "mask_length", "mask_min_spans"),
    *("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop"),
)


def _model_argument(name: str, text: str) -> tuple[str, Any, Any]:
    """Return name, type and field of a flag: `float` for DinoSRConfig's `float | int`, `list[int]` for its tuples."""
    spec = next(spec for spec in dataclasses.fields(DinoSRConfig) if spec.name == name)
    kinds: Any = get_args(spec.type) or (spec.type,)
    kind: Any = next((kind for kind in (list[int], float) if kind in kinds), kinds[0])
    default: Any = spec.default
    field = argument(list(default) if kind == list[int] else default, text, choices=_CHOICES.get(name))
    return name, kind | None if types.NoneType in kinds else kind, field


ModelArguments: Any = dataclasses.make_dataclass("ModelArguments", starmap(_model_argument, MODEL_HELP.items()))


@dataclass
class DataArguments:
    """The recordings, and how they are cut into optimizer steps."""

    data: list[str] = argument(
        ["synthetic"],
        "One or several of: a folder of audio, tar archives, a manifest (.tsv, .csv, .jsonl), a folder or"
        " file of `datasets`, a dataset's name on the Hub; or `synthetic`: speech made on the spot by espeak-ng.",
    )
    data_split: list[str] = argument(
        [], "Split of the data, if it has several: one for all, or one for each, '' where there are none."
    )
    data_config: list[str] = argument(
        [],
        "Configuration of a dataset that has several: one for all, or one for each, '' where there are none. eval_data"
        " of the same name has the same.",
    )
    data_weights: list[float] = argument(
        [], "Weight of each of several data in the mixture; unset: all have the same."
    )
    data_temperature: float = argument(
        1.0, "Shares of several data are proportional to weight * hours ** this: 1 keeps them, towards 0 evens them."
    )
    audio_column: str = shared_argument("audio_column", "audio")
    streaming: bool = argument(
        False, "Whether to read a dataset as a stream, without downloading or indexing it first."
    )
    window_seconds: float = argument(
        28_800.0, "Seconds of a stream that are held in memory, undecoded, and cut into steps at a time."
    )
    synthetic_utterances: int = argument(1200, "Number of utterances of the synthetic corpus.")
    synthetic_languages: list[str] = argument(["en"], "Languages of the synthetic corpus: en, de, es, fr, it.")
    synthetic_texts: list[int] = argument(
        [4, 6], "Minimum and maximum number of sentences in an utterance of the synthetic corpus."
    )
    synthetic_noise: bool = argument(
        True, "Whether the synthetic corpus has room acoustics, microphone colouring and noise."
    )
    batching: str = argument(
        "crop",
        "crop (the paper): cut all utterances of a step at random to its shortest; pad: pad them.",
        choices=["crop", "pad"],
    )
    step_seconds: float = shared_argument("step_seconds", 3800.0, "the paper: 63 minutes")
    micro_seconds: float = shared_argument("micro_seconds", 237.5)
    min_seconds: float = argument(2.0, "Minimum length of an utterance; shorter ones are left out.")
    max_seconds: float = argument(20.0, "Maximum length of an utterance; of a longer one a random part is used.")
    speed_change: float = shared_argument("speed_change", 0.0, "the paper: 0, at its own speed")
    num_buckets: int = argument(20, "Maximum number of buckets of similar duration.")
    num_workers: int = argument(4, "Number of data loading processes of each training process.")
    max_skipped_share: float = argument(
        0.01,
        "Stop the run if more than this share of the recent utterances cannot be used (at least 1,000 are counted).",
    )
    eval_data: str | None = argument(
        None, "Held-out speech, anything that `data` can be; unset: that of eval_share, or no evaluation."
    )
    eval_share: float = argument(
        0.0,
        "About the share of the recordings of `data` (the first, if there are several) that are held out for"
        " evaluation and not trained on, unless eval_data is given.",
    )
    eval_split: str | None = argument(None, "Split of eval_data.")
    eval_labels: str | None = argument(
        None, "Phone labels of the held-out speech (.jsonl, .ctm, a folder of TextGrids); synthetic has its own."
    )
    label_tier: str = argument(
        "phones", "Tier of TextGrids, or key in JSONL, of the labels of eval_labels and anchor."
    )
    eval_seconds: float = argument(1800.0, "Maximum seconds of held-out audio to evaluate on.")


def value_for(values: Sequence[str], number: int) -> str | None:
    """Return the value for one of several data, from one for all or one for each; None if it is empty, or none is."""
    return (values[number if len(values) > 1 else 0] or None) if values else None


@dataclass
class RunArguments:
    """The optimization, and what is written to disk."""

    output_dir: str = argument("runs/pretrain", "Path to the folder for the model and the metrics.")
    base_model: str | None = argument(
        None,
        "Folder or Hub name of a DinoSR to continue from; it also gives sizes, masks and dropout that are not set"
        " here. Unset: random weights.",
    )
    new_codebooks: bool = argument(
        False, "Whether heads and codebooks start anew, and only network and teacher are the base model's."
    )
    fit_heads_steps: int = argument(
        0,
        "Number of updates at the start in which only heads and codebooks learn; network and teacher stand still.",
    )
    anchor: str | None = argument(
        None,
        "Frame labels that the model predicts beside its codewords, which makes short runs learn far more. mfcc:"
        " clusters of MFCCs of the data; a file of labels (.jsonl, .ctm, a folder of TextGrids), which may have some"
        " of the recordings; or a model's folder or Hub name: clusters of its anchor_layer. none, or not set (the"
        " paper): no anchor.",
    )
    anchor_layer: int | None = argument(None, "Layer of the anchor's model, from 1, that is clustered.")
    anchor_features: str = argument(
        "tuned",
        "MFCCs of anchor mfcc. tuned: with what makes k-means follow phones; textbook: plain.",
        choices=list(MFCC_KINDS),
    )
    anchor_weight: float = argument(2.0, "Weight of the anchor in the loss; each codebook has 1.")
    anchor_end_weight: float | None = argument(
        None, "Value that anchor_weight is annealed to, linearly; unset: anchor_weight is constant."
    )
    anchor_unmasked_share: float = argument(
        0.5, "Share of unmasked frames in the anchor's loss; the rest is of masked ones."
    )
    anchor_end_unmasked_share: float | None = argument(
        None, "Value that anchor_unmasked_share is annealed to, linearly; unset: it is constant."
    )
    anchor_end_step: int = argument(0, "Update at which the annealing of the anchor's weight and share ends.")
    seed: int = argument(0, "Seed of weights, masks, crops and order.")
    resume: str = argument(
        "auto",
        "auto: resume from the newest usable checkpoint in output_dir, if there is one; never: refuse an output_dir"
        " that has checkpoints; or the path of a checkpoint.",
    )
    dry_run: bool = argument(False, "Whether to print and draw the plan of the run, and stop.")
    max_steps: int = argument(400_000, "Number of optimizer updates.")
    learning_rate: float = shared_argument("learning_rate", 5e-4)
    schedule: str = shared_argument("schedule", "tri_stage")
    warmup_share: float = shared_argument("warmup_share", 0.03)
    hold_share: float = shared_argument("hold_share", 0.47)
    final_lr_scale: float = shared_argument(
        "final_lr_scale", 0.1, "the paper's text; the authors' configuration comes to 0.01"
    )
    adam_beta1: float = argument(0.9, "Decay of Adam's average of the gradients.")
    adam_beta2: float = shared_argument("adam_beta2", 0.98)
    adam_epsilon: float = shared_argument("adam_epsilon", 1e-6)
    weight_decay: float = argument(0.01, "Weight decay of all parameters, norms and biases included.")
    scale_to_batch: bool = argument(
        False,
        "Whether to take optimizer, averages and step counts as chosen for reference_step_seconds, and scale them to"
        " step_seconds.",
    )
    reference_step_seconds: float = argument(
        3800.0, "Seconds of audio in a step that the values were chosen for, for scale_to_batch."
    )
    max_grad_norm: float = shared_argument("max_grad_norm", 0.0)
    max_skipped_steps: int = argument(
        20, "Stop the run after this many steps in a row without finite gradients, which are skipped."
    )
    mixed_precision: str | None = argument(
        None, "no, fp16 (the paper) or bf16; unset: as `accelerate` is configured or launched."
    )
    num_threads: int = shared_argument("num_threads", 0)
    gradient_checkpointing: bool = argument(
        False, "Whether to recompute activations: a third slower, but less memory."
    )
    torch_compile: bool = argument(False, "Whether to compile the model: slow to start, then faster.")
    torch_compile_backend: str = argument("inductor", "Backend of `torch.compile`.")
    log_steps: int = argument(100, "Number of steps between two lines of metrics.")
    checkpoint_steps: int = argument(
        1000, "Number of steps between two checkpoints, from which a run resumes; 0: only when a signal asks for one."
    )
    keep_checkpoints: int = argument(
        2, "Number of checkpoints to keep, the newest ones; in a collapse also the last one before it."
    )
    save_steps: int = argument(25_000, "Number of steps between two models that are kept; 0: only the last.")
    eval_steps: int = argument(5000, "Number of steps between two evaluations on held-out speech.")
    eval_patience: int = argument(
        0,
        "End the run after so many evaluations without a lower held-out loss, with the model of the lowest; 0: never.",
    )
    collapse_perplexity: float = argument(
        0.05, "Warn if a perplexity falls below this share of the codewords; 0: never."
    )
    collapse_active: float = argument(0.15, "Warn if less than this share of the codewords is in use; 0: never.")
    collapse_variation: float = argument(
        0.02, "Warn if less than this share of the energy of targets or features changes over time; 0: never."
    )
    collapse_patience: int = argument(3, "Number of consecutive lines of metrics below a bound before the warning.")
    stop_on_collapse: bool = argument(False, "Whether to stop the run at such a warning.")
    trackers: list[str] = argument(
        [], "Experiment trackers that also get the metrics, through Accelerate: tensorboard, wandb, ..."
    )


@dataclass
class PretrainingArguments:
    """All arguments of a pre-training run."""

    model: Any
    data: DataArguments
    run: RunArguments

    def model_config(self) -> DinoSRConfig:
        """Return the configuration of the model. Raises `ValueError` for combinations that no model can have."""
        return DinoSRConfig(**dataclasses.asdict(self.model))

    def to_dict(self) -> dict[str, Any]:
        """Return all arguments by name."""
        return {name: value for group in dataclasses.asdict(self).values() for name, value in group.items()}

    def to_yaml(self) -> str:
        """Return the arguments as the text of a YAML file that starts the same run, without passwords in addresses."""
        groups = dataclasses.asdict(self).values()
        return "\n".join(yaml.safe_dump(public_values(group), sort_keys=False) for group in groups)


GROUPS: Any = (ModelArguments, DataArguments, RunArguments)


def parse_arguments(
    argv: Sequence[str], default_config: str | Path | None = None, *, description: str | None = None
) -> PretrainingArguments:
    """
    Parse the command line of `dinosr pretrain`: a YAML file or recipe, or `default_config`, then flags, which win.

    `description` is that of `parse_groups`.

    Raises:
        ArgumentError: For an unknown key (the message names the nearest), a value of the wrong type or out of range,
            and a `base_model` that cannot be opened or contradicts the sizes that are set.
    """
    arguments = PretrainingArguments(*parse_groups(argv, GROUPS, default_config, description=description))
    line = read_command_line(argv, GROUPS, default_config)
    if "anchor" in line.flag_names:
        drop_settings_of_another_anchor(arguments.model, arguments.run, line.flag_names)
    if arguments.run.base_model is not None:
        _take_sizes(arguments, arguments.run.base_model, line)
    _check(arguments)
    return arguments


def _take_sizes(arguments: PretrainingArguments, base_model: str, line: CommandLine) -> None:
    """Set what the command line does not set to the base model's values. Codebooks and anchor may differ."""
    # A run that has begun may outlive its base model, whose values its checkpoints have.
    last = next(iter(find_checkpoints(arguments.run.output_dir)), None)
    try:
        with argument_errors("base_model="):
            base = open_dinosr_config(base_model)
    except ArgumentError:
        if last is None:
            raise
        with argument_errors("base_model="):
            base = open_dinosr_config(last)
    for name in (*ARCHITECTURE, *INHERITED):
        if name == "num_anchor_labels":  # the run's anchor sets it
            continue
        base_value, value = getattr(base, name), getattr(arguments.model, name)
        if name not in line.from_file and name not in line.flag_names:
            setattr(arguments.model, name, base_value)
        elif value != base_value and name not in (*CODEBOOK_SIZES, *INHERITED):
            advice = f"Leave {name} out, or give the configuration that the base model was trained with."
            if name not in line.typed_names:
                advice = "It is of tiny_cpu, which applies without a recipe. Give one without sizes, such as adapt."
            problem = f"{name}={value} contradicts base_model={base_model}, which has {name}={base_value}"
            raise ArgumentError(f"{problem}. {advice}")


# Test and description of the values that are allowed, and names of the arguments.
_RANGES: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (
        lambda value: value >= 1,
        "at least 1",
        "max_steps max_skipped_steps log_steps keep_checkpoints eval_steps collapse_patience num_buckets",
    ),
    (lambda value: value >= 0, "at least 0", "seed weight_decay fit_heads_steps eval_patience"),
    (lambda value: 0 <= value <= 1024, "at least 0 and at most 1,024", "num_workers"),
    (lambda value: 0 <= value <= MAX_THREADS, f"at least 0 and at most {MAX_THREADS:,}", "num_threads"),
    (lambda value: 1 <= value <= 10_000_000, "at least 1 and at most 10,000,000", "synthetic_utterances"),
    (lambda value: len(value) in (1, 2), "one number, or a minimum and a maximum", "synthetic_texts"),
    (lambda value: value >= 0, "at least 0, where 0 means only on signals", "checkpoint_steps"),
    (lambda value: value >= 0, "at least 0, where 0 means only at the end", "save_steps"),
    (lambda value: value > 0, "more than 0", "reference_step_seconds min_seconds"),
    (lambda value: 0 <= value < 1, "at least 0 and less than 1", "adam_beta1"),
    (
        lambda value: 0 <= value < 1,
        "at least 0 (no bound) and less than 1",
        "collapse_perplexity collapse_active collapse_variation",
    ),
    (lambda value: 0 <= value <= 1, "at least 0 and at most 1", "max_skipped_share"),
    (lambda value: 0 < value <= 1, "more than 0 and at most 1", "data_temperature"),
    (lambda value: 0 <= value < 1, "at least 0 and less than 1", "speed_change eval_share"),
    (lambda value: value is None or 0 <= value < math.inf, "at least 0", "anchor_weight anchor_end_weight"),
    (
        lambda value: value is None or 0 <= value <= 1,
        "at least 0 and at most 1",
        "anchor_unmasked_share anchor_end_unmasked_share",
    ),
    (lambda value: value >= 0, "at least 0", "anchor_end_step"),
    (lambda value: value in (None, "no", "fp16", "bf16"), "no, fp16 or bf16", "mixed_precision"),
)
# The first of each pair must be at least as large as the second.
_AT_LEAST = (
    *(("max_seconds", "min_seconds"), ("step_seconds", "max_seconds"), ("micro_seconds", "max_seconds")),
    *(("window_seconds", "step_seconds"), ("eval_seconds", "max_seconds")),
)


def _check_codebook_decay(model: ModelArguments) -> None:
    """Raise `ArgumentError` if `codebook_decay` changes at no step, or changes to nothing."""
    end, end_step = model.codebook_end_decay, model.codebook_end_decay_step
    if (end_step > 0) != (end is not None) and end != model.codebook_decay:
        raise ArgumentError(
            f"codebook_end_decay_step={end_step} does not fit codebook_end_decay={end}: it is the step at which"
            " codebook_decay gets there. Set both, or neither."
        )


def _check(arguments: PretrainingArguments) -> None:
    data, run, values = arguments.data, arguments.run, arguments.to_dict()
    check_ranges(shared_rules(run))
    for test, allowed, names in _RANGES:
        check_ranges((test(values[name]), name, values[name], allowed) for name in names.split())
    check_ranges((values[name] >= values[low], name, values[name], f"at least {low}") for name, low in _AT_LEAST)
    if not data.data:
        raise ArgumentError("data is empty. Give at least one folder, manifest or dataset.")
    for name in ("data_split", "data_config", "data_weights"):
        allowed_lengths = {0, len(data.data)} | ({1} if name != "data_weights" else set())
        if len(values[name]) not in allowed_lengths:
            raise ArgumentError(
                f"{name} has {len(values[name])} values, but data has {len(data.data)}. Give one value for each."
            )
    no_effect = {"data_weights": "data has one value"} if len(data.data) == 1 else {}
    if set(data.data) == {"synthetic"}:
        no_effect |= dict.fromkeys(("data_split", "data_config", "streaming"), "data is synthetic")
    if data.eval_data == "synthetic":
        no_effect["eval_split"] = "eval_data is synthetic"
    for name, reason in no_effect.items():
        if values[name]:
            raise ArgumentError(f"{name}={values[name]} has no effect: {reason}. Leave {name} out.")
    backends = torch.compiler.list_backends(exclude_tags=()) if run.torch_compile else []
    if run.torch_compile and run.torch_compile_backend not in backends:
        raise ArgumentError(
            f"torch_compile_backend={run.torch_compile_backend} is unknown. Choose one of {', '.join(backends)}."
        )
    if data.streaming and len(data.data) > 1:
        raise ArgumentError(
            f"streaming reads a single dataset, but data has {len(data.data)}. Give one, or read them from disk."
        )
    for name in ("eval_labels", "eval_patience"):
        if values[name] and data.eval_data is None and not data.eval_share:
            raise ArgumentError(
                f"{name} is set, but there is no held-out speech. Give eval_data or eval_share as well."
            )
    if data.eval_split is not None and data.eval_data is None:
        raise ArgumentError(
            f"eval_split={data.eval_split} is a split of eval_data, which is not set. Give eval_data, which may be the"
            " same dataset as data."
        )
    if data.eval_share and data.eval_data is None and data.streaming:
        raise ArgumentError("eval_share holds out recordings, which streaming does not list. Give eval_data instead.")
    for name in ("new_codebooks", "fit_heads_steps"):
        if values[name] and run.base_model is None:
            raise ArgumentError(f"{name} is for continuing a base_model. Give one, or leave {name} out.")
    _check_codebook_decay(arguments.model)
    settle_anchor(arguments.model, data, run)
    has_label_file = data.eval_labels is not None or (run.anchor is not None and anchor_kind(run.anchor) == "labels")
    if data.label_tier != "phones" and not has_label_file:
        raise ArgumentError(
            f"label_tier={data.label_tier} has no effect without labels. Give eval_labels, or remove it."
        )
    with argument_errors():
        config = arguments.model_config()
    check_mfcc_frames(run, config.inputs_to_logits_ratio)
