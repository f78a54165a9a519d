# Copyright 2026 The dinosr-hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The configuration of DinoSR (arXiv 2305.10005): sizes, dropouts, codebooks, teacher, pre-training mask."""

import math
from collections.abc import Sequence
from typing import Any, Self, TypeVar

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

FEATURE_ENCODERS = ("conv", "log_mel")
FREEZE_MODES = ("frozen", "shared", "copied")
HEAD_INPUTS = ("last_layer", "own_layer")
EMA_SCHEDULES = ("linear", "exponential")
TEACHER_INITS = ("student", "random")
ATTENTION_INITS = ("normal", "xavier")
CTC_LOSS_REDUCTIONS = ("mean", "sum")

SAMPLING_RATE = 16_000
# The log-mel front end: samples of a window, samples from one window to the next, windows of a frame, mel filters.
MEL_WINDOW = 400
MEL_HOP = 160
MELS_PER_FRAME = 2
NUM_MELS = 80

# What no speech model comes near: a configuration beyond it is damaged or hostile, and would exhaust the memory.
MAX_LAYERS = 1_000
MAX_CONVOLUTIONS = 100  # of the front end, of the positions and of the x-vector
MAX_WIDTH = 65_536  # of a layer, or of a kernel
MAX_CLASSES = 1_000_000  # labels, codewords
MAX_MASK = 100_000  # frames or channels of a span, or spans
MAX_WEIGHTS = 20_000_000_000

Length = TypeVar("Length", int, torch.Tensor)


def _anneal(start: float, end: float, num_steps: int, step: int) -> float:
    """Linear from start to end over num_steps, then end."""
    if step >= num_steps:
        return float(end)
    return float(end - (end - start) * (1 - step / num_steps))


@strict
class DinoSRConfig(PreTrainedConfig):  # trf-ignore: TRF057
    r"""
    Configuration of a DinoSR model; the defaults are the base model of the paper (Section 4.1 and its `base.yaml`).

    Fields that mean the same as in `Data2VecAudioConfig`, whose architecture this is, have the same names.

    Args:
        vocab_size: Number of output labels of `DinoSRForCTC`.
        hidden_size: Width `D` of the transformer.
        num_hidden_layers: Number of transformer layers, in the student as in the teacher.
        num_attention_heads: Attention heads of a layer; divides `hidden_size`.
        intermediate_size: Width of a layer's feed-forward network.
        hidden_act: Activation of the feed-forward network.
        hidden_dropout: Dropout after attention, after the feed-forward network and before the first layer.
        activation_dropout: Dropout inside the feed-forward network.
        attention_dropout: Dropout of attention probabilities.
        feat_proj_dropout: Dropout of the projected features, student only.
        final_dropout: Dropout before the CTC head (Data2VecAudio's value; the paper does not state one).
        layerdrop: Probability with which the student skips a layer in training.
        initializer_range: Standard deviation of the transformer's initial weights.
        attention_init: Distribution of attention's initial weights. `"normal"`: as the transformer's others.
            `"xavier"`: Xavier's uniform one, with a gain of 1 / sqrt(2) for queries, keys and values (SpidR).
        qkv_bias: Whether queries, keys and values have a bias; not in SpidR.
        layer_norm_eps: Epsilon of the layer norms of transformer and projection.
        feature_encoder: Front end. `"conv"`: the paper's convolutions of the waveform. `"log_mel"`: 80 log mel
            energies every 10 ms, two to a frame, normalised over the utterance (docs/parity.md, D9); it has no
            weights, and `conv_dim`, `conv_stride`, `conv_kernel` and `conv_bias` are not used.
        feat_extract_activation: Activation of the convolutions (feature encoder and positions).
        conv_dim: Output channels of each convolution of the feature encoder.
        conv_stride: Stride of each convolution of the feature encoder.
        conv_kernel: Kernel size of each convolution of the feature encoder.
        conv_bias: Whether the convolutions of the feature encoder have a bias.
        num_conv_pos_embedding_groups: Groups of the positional convolutions; divides `hidden_size`.
        conv_pos_kernel_size: Kernel size of each positional convolution.
        num_conv_pos_embeddings: Number of stacked positional convolutions.
        num_codebooks: Number `N` of top layers that have a codebook and a prediction head.
        codebook_size: Number `V` of codewords of a codebook.
        codebook_decay: Decay of codeword sums and counts (tau of the paper's equations 4 and 5).
        codebook_end_decay: Value that `codebook_decay` is annealed to linearly; None keeps it constant.
        codebook_end_decay_step: Update at which the annealing of `codebook_decay` ends.
        codebook_update_steps: Number of optimizer steps from one update of the codebooks to the next, which takes all
            frames in between. The paper's 1 belongs to its large batch.
        codebook_revival_share: Part of an even share of the frames below which a codeword restarts beside a much used
            one. 0: never, as in the paper, whose unused codewords stay unused; 0.1 keeps all in use.
        num_anchor_labels: Number of labels that `DinoSRForPreTraining` predicts beside the codewords, from
            `anchor_labels` (docs/parity.md, D10); 0: none, as in the paper.
        head_input: Input of the prediction head of a codebook. `"last_layer"`: the output of the student's last
            layer. `"own_layer"`: that of the feed-forward network of the codebook's own layer, as in SpidR
            (docs/parity.md).
        ema_decay: Decay of the teacher's average at the first update (lambda of the paper's equation 1).
        ema_schedule: How the decay grows. `"linear"`: to `ema_end_decay` over `ema_anneal_steps`. `"exponential"`:
            `1 - (1 - ema_decay) * exp(-step / ema_timescale)`, as in SpidR.
        ema_end_decay: Decay of the teacher's average once `ema_anneal_steps` updates are done; linear schedule.
        ema_anneal_steps: Updates over which the decay goes linearly from `ema_decay` to `ema_end_decay`.
        ema_timescale: Updates in which the exponential schedule makes the distance to 1 smaller by a factor of e.
        ema_threshold: Distance to 1 at which the exponential schedule stops the teacher.
        teacher_init: The teacher's initial weights. `"student"`: the student's. `"random"`: the student's except those
            of attention and feed-forward networks, which are drawn anew, as in SpidR.
        freeze_teacher_step: Update from which the teacher is frozen; None: never.
        freeze_front_end_step: Update from which the student's convolutions and projection are frozen whatever the
            teacher does, as in SpidR; None: they are frozen with the teacher, see `freeze_mode`.
        freeze_mode: Treatment of convolutions and projection when the teacher is frozen. `"frozen"`: they are frozen
            too, as the authors intended. `"shared"`: they go on learning and feed the teacher, as in the authors'
            code. `"copied"`: the teacher keeps copies of them, and the student's go on learning.
        reference_padding: Whether to handle padding as the authors' code does, or with `head_input="own_layer"` as
            SpidR's: features or targets of an utterance depend on the padding of its batch. For comparisons only.
        mask_prob: Pre-training mask: `mask_prob * frames / mask_length` spans are drawn. Spans overlap, so the default
            masks about 57 % of the frames.
        mask_length: Pre-training mask: number of frames of a span.
        mask_min_spans: Pre-training mask: least number of spans of an utterance.
        apply_spec_augment: Whether `DinoSRModel` masks features when training (fine-tuning). Pre-training never does.
        mask_time_prob: Fine-tuning mask over time, as `mask_prob`.
        mask_time_length: Fine-tuning mask over time: number of frames of a span.
        mask_time_min_masks: Fine-tuning mask over time: least number of spans.
        mask_feature_prob: Fine-tuning mask over channels, as `mask_prob`.
        mask_feature_length: Fine-tuning mask over channels: number of channels of a span, at most `hidden_size`.
        mask_feature_min_masks: Fine-tuning mask over channels: least number of spans.
        ctc_loss_reduction: `"mean"` (over utterances, each divided by its number of labels) or `"sum"`.
        ctc_zero_infinity: Whether an utterance too short for its labels has zero loss instead of infinite loss.
        use_weighted_layer_sum: Whether the classification heads read a learnt average of all layers (SUPERB).
        classifier_proj_size: Width of the projection in front of utterance pooling.
        tdnn_dim: Output channels of each time-delay layer of `DinoSRForXVector`.
        tdnn_kernel: Kernel size of each time-delay layer.
        tdnn_dilation: Dilation of each time-delay layer.
        xvector_output_dim: Width of the x-vector.
        pad_token_id: Label of padding, which is the blank of CTC.
        bos_token_id: Label that begins a sentence.
        eos_token_id: Label that ends a sentence.

    Raises:
        ValueError: If the values make no model; the message names the fields.

    Example:

    ```python
    >>> from dinosr_hf import DinoSRConfig, DinoSRModel

    >>> config = DinoSRConfig(num_hidden_layers=4, num_codebooks=2)
    >>> config.num_frames(16000)
    49
    >>> model = DinoSRModel(config)
    ```
    """

    model_type = "dinosr"

    vocab_size: int = 32
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.1
    activation_dropout: float | int = 0.0
    attention_dropout: float | int = 0.1
    feat_proj_dropout: float | int = 0.0
    final_dropout: float | int = 0.1
    layerdrop: float | int = 0.05
    initializer_range: float | int = 0.02
    attention_init: str = "normal"
    qkv_bias: bool = True
    layer_norm_eps: float | int = 1e-5
    feature_encoder: str = "conv"
    feat_extract_activation: str = "gelu"
    conv_dim: list[int] | tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512)
    conv_stride: list[int] | tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_kernel: list[int] | tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embedding_groups: int = 16
    conv_pos_kernel_size: int = 19
    num_conv_pos_embeddings: int = 5
    num_codebooks: int = 8
    codebook_size: int = 256
    codebook_decay: float | int = 0.9
    codebook_end_decay: float | int | None = None
    codebook_end_decay_step: int = 0
    codebook_update_steps: int = 1
    codebook_revival_share: float | int = 0.0
    num_anchor_labels: int = 0
    head_input: str = "last_layer"
    ema_decay: float | int = 0.999
    ema_schedule: str = "linear"
    ema_end_decay: float | int = 0.9999
    ema_anneal_steps: int = 30_000
    ema_timescale: float | int = 20_000
    ema_threshold: float | int = 1e-7
    teacher_init: str = "student"
    freeze_teacher_step: int | None = 200_001
    freeze_front_end_step: int | None = None
    freeze_mode: str = "frozen"
    reference_padding: bool = False
    mask_prob: float | int = 0.8
    mask_length: int = 10
    mask_min_spans: int = 1
    apply_spec_augment: bool = True
    mask_time_prob: float | int = 0.05
    mask_time_length: int = 10
    mask_time_min_masks: int = 2
    mask_feature_prob: float | int = 0.0
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0
    ctc_loss_reduction: str = "mean"
    ctc_zero_infinity: bool = True
    use_weighted_layer_sum: bool = False
    classifier_proj_size: int = 256
    tdnn_dim: list[int] | tuple[int, ...] = (512, 512, 512, 512, 1500)
    tdnn_kernel: list[int] | tuple[int, ...] = (5, 3, 3, 1, 1)
    tdnn_dilation: list[int] | tuple[int, ...] = (1, 2, 3, 1, 1)
    xvector_output_dim: int = 512
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Before the type of each entry is checked, and a name is made for each class.
        for name in ("conv_dim", "conv_stride", "conv_kernel", "tdnn_dim", "tdnn_kernel", "tdnn_dilation"):
            value = kwargs.get(name)
            if isinstance(value, list | tuple) and len(value) > MAX_CONVOLUTIONS:
                raise ValueError(
                    f"{name} has {len(value):,} entries, one a layer: it must have at most {MAX_CONVOLUTIONS}."
                )
        num_labels = kwargs.get("num_labels")
        if isinstance(num_labels, int) and not 0 <= num_labels <= MAX_CLASSES:
            raise ValueError(
                f"num_labels={num_labels} is out of range: it must be at least 0 and at most {MAX_CLASSES}."
            )
        return super().__new__(cls)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # Here and not only as a hook of @strict, whose own error is no ValueError.
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Raise `ValueError` unless the values make a model."""
        self._check_transformer()
        self._check_front_end()
        self._check_codebooks_and_teacher()
        self._check_masks()
        self._check_heads()
        if (num_weights := self.num_encoder_weights + self._num_head_weights()) > MAX_WEIGHTS:
            names = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "num_codebooks")
            sizes = ", ".join(f"{name}={getattr(self, name)}" for name in (*names, "codebook_size", "conv_dim"))
            raise ValueError(
                f"These sizes make {num_weights:,} weights, and a model may have at most {MAX_WEIGHTS:,}: {sizes}."
                " Lower some of them."
            )

    def _check_transformer(self) -> None:
        self._check_range(("num_hidden_layers",), 1, MAX_LAYERS)
        self._check_range(("hidden_size", "num_attention_heads"), 1, MAX_WIDTH)
        self._check_range(("vocab_size", "intermediate_size"), 1, MAX_CLASSES)
        self._check_range(("layer_norm_eps",), 0, open_low=True)
        self._check_range(("initializer_range",), 0)
        probabilities = ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout")
        self._check_range((*probabilities, "final_dropout", "layerdrop"), 0, 1)
        self._check_divides("num_attention_heads", "hidden_size")
        self._check_one_of("hidden_act", ACT2FN)
        self._check_one_of("attention_init", ATTENTION_INITS)

    def _check_front_end(self) -> None:
        self._check_one_of("feature_encoder", FEATURE_ENCODERS)
        self._check_lists(("conv_dim", "conv_stride", "conv_kernel"))
        self._check_one_of("feat_extract_activation", ACT2FN)
        self._check_range(("num_conv_pos_embeddings",), 1, MAX_CONVOLUTIONS)
        self._check_range(("conv_pos_kernel_size", "num_conv_pos_embedding_groups"), 1, MAX_WIDTH)

    def _check_codebooks_and_teacher(self) -> None:
        self._check_range(("num_codebooks", "codebook_update_steps"), 1)
        self._check_range(("codebook_size",), 1, MAX_CLASSES)
        if self.num_codebooks > self.num_hidden_layers:
            raise ValueError(
                f"num_codebooks={self.num_codebooks} is more than num_hidden_layers={self.num_hidden_layers}, but each"
                " codebook belongs to a layer of its own. Lower num_codebooks or raise num_hidden_layers."
            )
        self._check_range(("codebook_decay", "ema_decay", "ema_end_decay"), 0, 1)
        if self.codebook_end_decay is not None:
            self._check_range(("codebook_end_decay",), 0, 1)
        self._check_range(("codebook_end_decay_step", "ema_anneal_steps"), 0)
        self._check_range(("num_anchor_labels",), 0, MAX_CLASSES)
        self._check_range(("codebook_revival_share",), 0, 0.5)
        self._check_range(("ema_timescale",), 0, open_low=True)
        self._check_range(("ema_threshold",), 0, 1)
        for name, what in (("freeze_teacher_step", "teacher"), ("freeze_front_end_step", "front end")):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(
                    f"{name}={value} must be at least 0: the update from which the {what} is frozen, or None."
                )
        self._check_one_of("head_input", HEAD_INPUTS)
        self._check_one_of("ema_schedule", EMA_SCHEDULES)
        self._check_one_of("teacher_init", TEACHER_INITS)
        self._check_one_of("freeze_mode", FREEZE_MODES)

    def _check_masks(self) -> None:
        self._check_range(("mask_prob",), 0, 1, open_low=True)
        self._check_range(("mask_time_prob", "mask_feature_prob"), 0, 1)
        self._check_range(("mask_length", "mask_time_length", "mask_feature_length"), 1, MAX_MASK)
        self._check_range(("mask_min_spans", "mask_time_min_masks", "mask_feature_min_masks"), 0, MAX_MASK)
        if self.mask_feature_prob > 0 and self.mask_feature_length > self.hidden_size:
            raise ValueError(
                f"mask_feature_length={self.mask_feature_length} is longer than hidden_size={self.hidden_size}, the"
                " axis that it masks. Lower mask_feature_length, or set mask_feature_prob to 0 for no such mask."
            )

    def _check_heads(self) -> None:
        self._check_one_of("ctc_loss_reduction", CTC_LOSS_REDUCTIONS)
        self._check_lists(("tdnn_dim", "tdnn_kernel", "tdnn_dilation"))
        self._check_range(("classifier_proj_size", "xvector_output_dim"), 1, MAX_WIDTH)

    def _check_range(self, names: Sequence[str], low: float, high: float = math.inf, open_low: bool = False) -> None:
        for name in names:
            value = getattr(self, name)
            too_low = value <= low if open_low else value < low
            if too_low or value > high or value in (math.inf, -math.inf) or value != value:  # the last: NaN
                allowed = f"{'more than' if open_low else 'at least'} {low}"
                allowed += "" if high == math.inf else f" and at most {high}"
                raise ValueError(f"{name}={value} is out of range: it must be {allowed}.")

    def _check_divides(self, divisor: str, name: str) -> None:
        if getattr(self, name) % getattr(self, divisor):
            raise ValueError(
                f"{divisor}={getattr(self, divisor)} does not divide {name}={getattr(self, name)}. Change one of them."
            )

    def _check_one_of(self, name: str, allowed: Any) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name}={getattr(self, name)!r} is unknown. Choose one of {', '.join(sorted(allowed))}.")

    def _check_lists(self, names: Sequence[str]) -> None:
        lengths = {name: len(getattr(self, name)) for name in names}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            shown = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise ValueError(f"These lists must have one entry a layer, the same number and at least one: {shown}.")
        for name in names:
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name}={getattr(self, name)} has an entry below 1.")
            if max(getattr(self, name)) > MAX_WIDTH:
                raise ValueError(f"{name}={getattr(self, name)} has an entry above {MAX_WIDTH}.")

    def _convolutions(self) -> list[tuple[int, int]]:
        """Kernel size and stride of each step from samples to frames."""
        if self.feature_encoder == "log_mel":
            return [(MEL_WINDOW, MEL_HOP), (MELS_PER_FRAME, MELS_PER_FRAME)]
        return list(zip(self.conv_kernel, self.conv_stride, strict=True))

    @property
    def feature_size(self) -> int:
        """Number `C` of the front end's channels (base: 512)."""
        return NUM_MELS * MELS_PER_FRAME if self.feature_encoder == "log_mel" else self.conv_dim[-1]

    @property
    def num_encoder_weights(self) -> int:
        """Number of weights of the encoder, without biases and norms (base: 93 million)."""
        width, inputs = self.hidden_size, 1
        layers = self.num_hidden_layers * (4 * width**2 + 2 * width * self.intermediate_size)
        kernel = self.conv_pos_kernel_size * self.num_conv_pos_embeddings
        positions = width * (width // self.num_conv_pos_embedding_groups) * kernel
        convolutions = 0
        for outputs, size in (
            [] if self.feature_encoder == "log_mel" else zip(self.conv_dim, self.conv_kernel, strict=True)
        ):
            convolutions, inputs = convolutions + inputs * outputs * size, outputs
        return layers + positions + convolutions + self.feature_size * width

    def _num_head_weights(self) -> int:
        codebooks = 2 * self.num_codebooks * self.codebook_size  # codewords, and heads that predict them
        inputs, delays = (self.hidden_size, *self.tdnn_dim), zip(self.tdnn_dim, self.tdnn_kernel, strict=True)
        layers = sum(width * outputs * kernel for width, (outputs, kernel) in zip(inputs, delays, strict=False))
        return self.hidden_size * (self.vocab_size + self.num_anchor_labels + codebooks) + layers

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Number of samples from one frame to the next (base: 320, 50 Hz)."""
        return math.prod(stride for _, stride in self._convolutions())

    @property
    def receptive_field(self) -> int:
        """Number of samples that a frame sees; frame `i` begins at sample `i * inputs_to_logits_ratio` (base: 400)."""
        field, hop = 1, 1
        for kernel, stride in self._convolutions():
            field, hop = field + (kernel - 1) * hop, hop * stride
        return field

    @property
    def codebook_layers(self) -> range:
        """Numbers, from 1, of the transformer layers with a codebook: the top `num_codebooks` (base: 5 to 12)."""
        return range(self.num_hidden_layers - self.num_codebooks + 1, self.num_hidden_layers + 1)

    def num_frames(self, num_samples: Length) -> Length:
        """
        Return the number of frames of so many samples.

        Args:
            num_samples: Number of samples, an int or an integer tensor of any shape.

        Returns:
            Number of frames, of the same type; 0 for waveforms shorter than the receptive field.
        """
        for kernel, stride in self._convolutions():
            if isinstance(num_samples, torch.Tensor):
                num_samples = torch.div(num_samples - kernel, stride, rounding_mode="floor") + 1
            else:
                num_samples = (num_samples - kernel) // stride + 1
        return num_samples.clamp(min=0) if isinstance(num_samples, torch.Tensor) else max(num_samples, 0)

    @property
    def unit_sources(self) -> tuple[str, ...]:
        """The sources of units that a model of this configuration has, see `encode_units`."""
        return ("student", "teacher", "anchor") if self.num_anchor_labels else ("student", "teacher")

    def num_units(self, source: str) -> int:
        """Return the number of units of a source of `encode_units`: the anchor's labels, or a codebook's codewords."""
        return self.num_anchor_labels if source == "anchor" else self.codebook_size

    def default_layer(self, source: str) -> int:
        """Return the layer, from 1, whose units to take: 5, which the paper analyses, or the last if 5 has none."""
        return 5 if source != "anchor" and 5 in self.codebook_layers else self.num_hidden_layers

    def codebook_decay_at(self, step: int) -> float:
        """Return the decay of the codebooks' update that follows `step` completed updates (docs/parity.md, T5)."""
        end = self.codebook_decay if self.codebook_end_decay is None else self.codebook_end_decay
        return _anneal(self.codebook_decay, end, self.codebook_end_decay_step, step)

    def is_freeze_reached_at(self, step: int) -> bool:
        """Return whether `freeze_teacher_step` is reached after `step` completed updates; see `teacher_stop_step`."""
        return self.freeze_teacher_step is not None and step >= self.freeze_teacher_step

    @property
    def teacher_stop_step(self) -> int | None:
        """First number of completed updates after which the teacher stays as it is; None: there is none."""
        stops = [] if self.freeze_teacher_step is None else [self.freeze_teacher_step]
        if self.ema_schedule == "linear":
            if self.freeze_mode != "frozen":
                stops = [max(stop, self.ema_anneal_steps) for stop in stops]
            if self.ema_end_decay == 1:
                stops.append(self.ema_anneal_steps)
        elif self.ema_threshold > 0:
            distance = max(1 - self.ema_decay, self.ema_threshold)
            stops.append(math.ceil(self.ema_timescale * math.log(distance / self.ema_threshold)))
        return min(stops, default=None)

    def is_front_end_frozen_at(self, step: int) -> bool:
        """Return whether the student's front end is frozen after `step` completed updates."""
        if self.freeze_front_end_step is not None:
            return step >= self.freeze_front_end_step
        return self.freeze_mode == "frozen" and self.is_freeze_reached_at(step)

    def ema_decay_at(self, step: int) -> float:
        """
        Return the teacher's decay after `step` completed updates; 1.0: it does not move (docs/parity.md, T3, T6).

        If the freeze comes before the end of annealing, `freeze_mode` "frozen" stops the teacher at once; "shared" and
        "copied" anneal the decay towards 1 from then on, as the authors' code does.
        """
        is_reached, end = self.is_freeze_reached_at(step), self.ema_end_decay
        if is_reached and (self.freeze_mode == "frozen" or self.ema_schedule == "exponential"):
            return 1.0
        if self.ema_schedule == "exponential":
            distance = (1 - self.ema_decay) * math.exp(-step / self.ema_timescale)
            return 1.0 if distance <= self.ema_threshold else 1 - distance
        if is_reached:
            end = 1.0
        return _anneal(self.ema_decay, end, self.ema_anneal_steps, step)


__all__ = ["DinoSRConfig"]
