# Copyright 2026 The dinosr-hf authors and The HuggingFace Inc. team. All rights reserved.
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
"""
PyTorch DinoSR model (https://huggingface.co/papers/2305.10005): Data2VecAudio's encoder, trained to predict the
codewords of online codebooks that cluster its own teacher's layers.

`B` batch, `S` samples, `T` frames, `D` hidden size, `N` codebooks, `V` codewords, `M` masked frames.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from ... import initialization as init
from ...backbone_utils import filter_output_hidden_states
from ...configuration_utils import PreTrainedConfig
from ...masking_utils import create_bidirectional_mask
from ...modeling_outputs import (
    CausalLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
    Wav2Vec2BaseModelOutput,
    XVectorOutput,
)
from ...modeling_utils import PreTrainedModel
from ...processing_utils import Unpack
from ...utils import ModelOutput, TransformersKwargs, auto_docstring
from ...utils.generic import can_return_tuple, maybe_autocast, merge_with_config_defaults
from ...utils.output_capturing import OutputRecorder, capture_outputs
from ..data2vec.modeling_data2vec_audio import (
    AMSoftmaxLoss,
    Data2VecAudioConvLayer,
    Data2VecAudioEncoder,
    Data2VecAudioEncoderLayer,
    Data2VecAudioFeatureEncoder,
    Data2VecAudioFeatureProjection,
    Data2VecAudioFeedForward,
    Data2VecAudioPadLayer,
    Data2VecAudioPositionalConvEmbedding,
    Data2VecAudioPositionalConvLayer,
)
from ..wav2vec2.modeling_wav2vec2 import Wav2Vec2Attention

# Exception from transformers' model linter: these fields differ by run or head, not by the checkpoint's architecture.
# trf-ignore: TRF041 apply_spec_augment, use_weighted_layer_sum


@auto_docstring
@strict
class DinoSRConfig(PreTrainedConfig):
    r"""
    feat_proj_dropout (`float`, *optional*, defaults to 0.0):
        Dropout of the projected features, student only.
    final_dropout (`float`, *optional*, defaults to 0.1):
        Dropout before the head of [`DinoSRForCTC`].
    feat_extract_activation (`str`, *optional*, defaults to `"gelu"`):
        Activation of the convolutions, those of the feature encoder and of the positions.
    conv_dim (`tuple[int]` or `list[int]`, *optional*, defaults to `(512, 512, 512, 512, 512, 512, 512)`):
        Output channels of each convolution of the feature encoder.
    conv_stride (`tuple[int]` or `list[int]`, *optional*, defaults to `(5, 2, 2, 2, 2, 2, 2)`):
        Stride of each convolution of the feature encoder.
    conv_bias (`bool`, *optional*, defaults to `False`):
        Whether the convolutions of the feature encoder have a bias.
    num_conv_pos_embedding_groups (`int`, *optional*, defaults to 16):
        Groups of the positional convolutions.
    conv_pos_kernel_size (`int`, *optional*, defaults to 19):
        Kernel size of each positional convolution.
    num_conv_pos_embeddings (`int`, *optional*, defaults to 5):
        Number of stacked positional convolutions.
    num_codebooks (`int`, *optional*, defaults to 8):
        Number of top layers that have a codebook and a prediction head.
    codebook_size (`int`, *optional*, defaults to 256):
        Number of codewords of a codebook.
    codebook_decay (`float`, *optional*, defaults to 0.9):
        Decay of the sums and counts of the codewords at an update.
    codebook_end_decay (`float`, *optional*):
        Value that `codebook_decay` is annealed to linearly; `None` keeps it constant.
    codebook_end_decay_step (`int`, *optional*, defaults to 0):
        Update at which the annealing of `codebook_decay` ends.
    ema_decay (`float`, *optional*, defaults to 0.999):
        Decay of the teacher's moving average at the first update.
    ema_end_decay (`float`, *optional*, defaults to 0.9999):
        Decay of the teacher's moving average once `ema_anneal_steps` updates are done.
    ema_anneal_steps (`int`, *optional*, defaults to 30000):
        Number of updates over which the decay goes linearly from `ema_decay` to `ema_end_decay`.
    freeze_teacher_step (`int`, *optional*, defaults to 200001):
        Update from which the teacher and the convolutions and projection that feed it are frozen; `None`: never.
    mask_prob (`float`, *optional*, defaults to 0.8):
        Pre-training mask: `mask_prob * frames / mask_length` spans are drawn, which overlap.
    mask_length (`int`, *optional*, defaults to 10):
        Pre-training mask: number of frames of a span.
    mask_min_spans (`int`, *optional*, defaults to 1):
        Pre-training mask: least number of spans of an utterance.
    apply_spec_augment (`bool`, *optional*, defaults to `True`):
        Whether [`DinoSRModel`] masks features when it is fine-tuned. Pre-training has its own mask.
    mask_time_prob (`float`, *optional*, defaults to 0.05):
        Fine-tuning mask over time, as `mask_prob`.
    mask_time_length (`int`, *optional*, defaults to 10):
        Fine-tuning mask over time: number of frames of a span.
    mask_time_min_masks (`int`, *optional*, defaults to 2):
        Fine-tuning mask over time: least number of spans.
    mask_feature_length (`int`, *optional*, defaults to 10):
        Fine-tuning mask over channels: number of channels of a span.
    mask_feature_min_masks (`int`, *optional*, defaults to 0):
        Fine-tuning mask over channels: least number of spans.
    ctc_zero_infinity (`bool`, *optional*, defaults to `True`):
        Whether an utterance too short for its labels has zero loss instead of infinite loss.
    use_weighted_layer_sum (`bool`, *optional*, defaults to `False`):
        Whether the classification heads read a learnt average of all layers.
    classifier_proj_size (`int`, *optional*, defaults to 256):
        Width of the projection in front of utterance pooling.
    tdnn_dim (`tuple[int]` or `list[int]`, *optional*, defaults to `(512, 512, 512, 512, 1500)`):
        Output channels of each time-delay layer of [`DinoSRForXVector`].
    tdnn_kernel (`tuple[int]` or `list[int]`, *optional*, defaults to `(5, 3, 3, 1, 1)`):
        Kernel size of each time-delay layer.
    tdnn_dilation (`tuple[int]` or `list[int]`, *optional*, defaults to `(1, 2, 3, 1, 1)`):
        Dilation of each time-delay layer.
    xvector_output_dim (`int`, *optional*, defaults to 512):
        Width of the x-vector.

    Example:

    ```python
    >>> from transformers import DinoSRConfig, DinoSRModel

    >>> # Initializing a DinoSR configuration with the sizes of the paper's base model
    >>> configuration = DinoSRConfig()

    >>> # Initializing a model (with random weights) from the configuration
    >>> model = DinoSRModel(configuration)

    >>> # Accessing the model configuration
    >>> configuration = model.config
    ```"""

    model_type = "dinosr"
    # Options of dinosr-hf that this model does not have, and the one value of each that it stands for.
    _fixed_options = {
        "attention_init": "normal",
        "codebook_revival_share": 0.0,
        "codebook_update_steps": 1,
        "ema_schedule": "linear",
        "feature_encoder": "conv",
        "freeze_front_end_step": None,
        "freeze_mode": "frozen",
        "head_input": "last_layer",
        "num_anchor_labels": 0,
        "qkv_bias": True,
        "reference_padding": False,
        "teacher_init": "student",
    }

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
    layer_norm_eps: float | int = 1e-5
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
    ema_decay: float | int = 0.999
    ema_end_decay: float | int = 0.9999
    ema_anneal_steps: int = 30_000
    freeze_teacher_step: int | None = 200_001
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

    def __post_init__(self, **kwargs):
        for name, expected in self._fixed_options.items():
            if (value := kwargs.pop(name, expected)) != expected:
                raise ValueError(f"`{name}={value!r}` is not supported; expected {expected!r}.")
        self.num_feat_extract_layers = len(self.conv_dim)
        super().__post_init__(**kwargs)
        is_regression = self.problem_type == "regression" and self.num_labels == 1
        if self.problem_type not in (None, "single_label_classification") and not is_regression:
            raise ValueError(f"`problem_type={self.problem_type!r}` is not supported; every input has a single label.")

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Validates the architecture of the config."""
        lengths = {len(self.conv_dim), len(self.conv_stride), len(self.conv_kernel)}
        if len(lengths) > 1:
            raise ValueError(
                "`conv_dim`, `conv_stride` and `conv_kernel` must have the same length: one entry a layer."
            )
        if self.num_codebooks > self.num_hidden_layers:
            raise ValueError(
                f"`num_codebooks={self.num_codebooks}` must not exceed `num_hidden_layers={self.num_hidden_layers}`:"
                " each codebook belongs to a layer of its own."
            )

    @property
    def inputs_to_logits_ratio(self) -> int:
        return math.prod(self.conv_stride)


@auto_docstring(
    custom_intro="""
    Output of [`DinoSRForPreTraining`]. Fields about masked frames are `None` if no frame was masked.
    """
)
@dataclass
class DinoSRForPreTrainingOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
        Cross entropy in nats of the student's predictions, mean over masked frames and codebooks.
    codebook_losses (`torch.FloatTensor` of shape `(num_codebooks,)`, *optional*):
        The loss of each codebook, without gradient.
    num_masked_frames (`torch.LongTensor` of shape `(1,)`, *optional*):
        Number of masked frames of the batch.
    target_perplexity (`torch.FloatTensor` of shape `(num_codebooks,)`, *optional*):
        Number of codewords that the targets use, from 1 to `codebook_size`.
    prediction_perplexity (`torch.FloatTensor` of shape `(num_codebooks,)`, *optional*):
        The same for the student's mean prediction.
    codes (`torch.LongTensor` of shape `(num_codebooks, num_masked_frames)`, *optional*):
        The codeword of each masked frame, in the order of batch and time.
    last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
        The student's output.
    """

    loss: torch.FloatTensor | None = None
    codebook_losses: torch.FloatTensor | None = None
    num_masked_frames: torch.LongTensor | None = None
    target_perplexity: torch.FloatTensor | None = None
    prediction_perplexity: torch.FloatTensor | None = None
    codes: torch.LongTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor] | None = None
    attentions: tuple[torch.FloatTensor] | None = None


# Layers are assigned anew, with our names: the converter renames by the folder, data2vec, and would otherwise copy
# Data2VecAudioConvLayer as DinoSRAudioConvLayer. So the file is valid Python by itself, too.


class DinoSRConvLayer(Data2VecAudioConvLayer):
    pass


class DinoSRFeatureEncoder(Data2VecAudioFeatureEncoder):
    def __init__(self, config):
        super().__init__(config)
        self.conv_layers = nn.ModuleList([DinoSRConvLayer(config, layer_id=i) for i in range(len(config.conv_dim))])


class DinoSRFeatureProjection(Data2VecAudioFeatureProjection):
    pass


class DinoSRPadLayer(Data2VecAudioPadLayer):
    pass


class DinoSRPositionalConvLayer(Data2VecAudioPositionalConvLayer):
    def __init__(self, config):
        super().__init__(config)
        self.padding = DinoSRPadLayer(config.conv_pos_kernel_size)


class DinoSRPositionalConvEmbedding(Data2VecAudioPositionalConvEmbedding):
    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList([DinoSRPositionalConvLayer(config) for _ in range(config.num_conv_pos_embeddings)])

    def forward(self, hidden_states, frame_mask=None):
        hidden_states = hidden_states.transpose(1, 2)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
            if frame_mask is not None:
                # Every layer has a bias and a norm: its padding would leak into the next layer's frames.
                hidden_states = hidden_states.masked_fill(~frame_mask[:, None], 0.0)
        return hidden_states.transpose(1, 2)


class DinoSRAttention(Wav2Vec2Attention):
    pass


class DinoSRFeedForward(Data2VecAudioFeedForward):
    pass


class DinoSREncoderLayer(Data2VecAudioEncoderLayer):
    def __init__(self, config):
        super().__init__(config)
        self.attention = DinoSRAttention(
            embed_dim=config.hidden_size,
            num_heads=config.num_attention_heads,
            dropout=config.attention_dropout,
            is_decoder=False,
            config=config,
        )
        self.feed_forward = DinoSRFeedForward(config)
        self.layerdrop = config.layerdrop

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the layer's output and its feed-forward network's, of which the teacher's targets are made."""
        residual = hidden_states
        attention_output, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = self.layer_norm(hidden_states + self.dropout(attention_output))
        feed_forward_output = self.feed_forward(hidden_states)
        hidden_states = self.final_layer_norm(hidden_states + feed_forward_output)
        if frame_mask is not None:
            hidden_states = hidden_states.masked_fill(~frame_mask[..., None], 0.0)
        if self.training and self.layerdrop > 0:
            # Computed and thrown away, not left out: every parameter gets a gradient in every process.
            keep = torch.rand((), device=hidden_states.device) >= self.layerdrop
            hidden_states = torch.where(keep, hidden_states, residual.to(hidden_states.dtype))
        return hidden_states, feed_forward_output


class DinoSREncoder(Data2VecAudioEncoder):
    def __init__(self, config):
        super().__init__(config)
        self.pos_conv_embed = DinoSRPositionalConvEmbedding(config)
        self.layers = nn.ModuleList([DinoSREncoderLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(
        self,
        hidden_states: torch.Tensor,
        frame_mask: torch.Tensor | None = None,
        return_layers: tuple[int, ...] = (),
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the last layer's output, and of `return_layers`, numbered from 1, the feed-forward outputs."""
        if frame_mask is not None:
            hidden_states = hidden_states.masked_fill(~frame_mask[..., None], 0.0)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=frame_mask
        )
        hidden_states = hidden_states + self.pos_conv_embed(hidden_states, frame_mask)
        hidden_states = self.dropout(self.layer_norm(hidden_states))
        feed_forward_outputs = []
        for number, layer in enumerate(self.layers, start=1):
            hidden_states, feed_forward_output = layer(hidden_states, attention_mask, frame_mask, **kwargs)
            if number in return_layers:
                feed_forward_outputs.append(feed_forward_output)
        return hidden_states, feed_forward_outputs


class DinoSRTeacher(DinoSREncoder):
    """The student's encoder, averaged over updates. Always in evaluation mode, without gradients."""

    def __init__(self, config):
        super().__init__(config)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True):
        return self

    @torch.no_grad()
    def ema_update(self, student: DinoSREncoder, decay: float):
        """Average layers and norm, keeping `decay` of the old; copy the positional convolutions."""
        for (name, own), other in zip(self.named_parameters(), student.parameters(), strict=True):
            own.lerp_(other, 1.0 if name.startswith("pos_conv_embed.") else 1 - decay)


class DinoSRCodebooks(nn.Module):
    """
    A codeword is the mean of the frames assigned to it: sums `(N, V, D)` divided by counts `(N, V)`, both decayed at
    every update. Frozen parameters; `accumulate` gathers, in training, what the next `commit` takes in.
    """

    def __init__(self, config: DinoSRConfig):
        super().__init__()
        shape = (config.num_codebooks, config.codebook_size)
        self.sums = nn.Parameter(torch.zeros(*shape, config.hidden_size, dtype=torch.float32), requires_grad=False)
        self.counts = nn.Parameter(torch.ones(shape, dtype=torch.float32), requires_grad=False)
        self._pending = None

    @torch.no_grad()
    def assign(self, targets: torch.Tensor) -> torch.Tensor:
        """Find the nearest codeword of each frame in each codebook: float32 `(N, M, D)` to int64 `(N, M)`."""
        with maybe_autocast(device_type=targets.device.type, enabled=False):
            codewords = self.sums / self.counts[..., None]
            half_norms = codewords.square().sum(dim=-1)[:, None, :] / 2
            return torch.baddbmm(half_norms, targets.float(), codewords.mT, beta=-1).argmax(dim=-1)

    @torch.no_grad()
    def accumulate(self, targets: torch.Tensor, codes: torch.Tensor):
        """Add the frames `(N, M, D)` of a micro-batch to the sums and counts of the next `commit`."""
        num_codebooks, codebook_size, hidden_size = self.sums.shape
        if self._pending is None or self._pending.device != self.sums.device:
            self._pending = self.sums.new_zeros(num_codebooks, codebook_size, hidden_size + 1, dtype=torch.float32)
        rows = codes + codebook_size * torch.arange(num_codebooks, device=codes.device)[:, None]
        # One more column of ones: sums and counts travel together, here and between processes.
        frames = nn.functional.pad(targets.float(), (0, 1), value=1.0)
        self._pending.view(-1, hidden_size + 1).index_add_(0, rows.flatten(), frames.flatten(0, 1))

    @torch.no_grad()
    def commit(self, decay: float):
        """Update the codewords that frames were assigned to, in any process. All processes must call this."""
        pending, self._pending = self._pending, None
        if pending is None:
            pending = self.sums.new_zeros(*self.sums.shape[:2], self.sums.shape[2] + 1, dtype=torch.float32)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(pending)
        weight = torch.where(pending[..., -1] > 0, 1.0 - decay, 0.0)
        self.sums.lerp_(pending[..., :-1].to(self.sums.dtype), weight[..., None].to(self.sums.dtype))
        self.counts.lerp_(pending[..., -1].to(self.counts.dtype), weight.to(self.counts.dtype))


@auto_docstring
class DinoSRPreTrainedModel(PreTrainedModel):
    config: DinoSRConfig
    base_model_prefix = "dinosr"
    main_input_name = "input_values"
    input_modalities = "audio"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_record_outputs = {
        "hidden_states": DinoSREncoderLayer,
        "attentions": OutputRecorder(DinoSRAttention, index=1, layer_name="encoder"),
    }
    # The losses are means over the batch: `Trainer` must not take them for shares of an accumulated one.
    accepts_loss_kwargs = False
    _no_split_modules = ["DinoSREncoderLayer"]
    _keys_to_ignore_on_load_unexpected = [r"^teacher\.", r"^codebooks\.", r"^heads\."]

    @torch.no_grad()
    def _init_weights(self, module):
        """Initialize the weights"""
        super()._init_weights(module)
        if isinstance(module, DinoSRFeatureProjection):
            self._init_uniform(module.projection)
        elif isinstance(module, DinoSRPositionalConvLayer):
            self._init_uniform(module.conv)
        elif isinstance(module, nn.Conv1d):
            init.kaiming_normal_(module.weight)
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, DinoSRModel):
            init.uniform_(module.masked_spec_embed)
        elif isinstance(module, DinoSRAMSoftmaxLoss):
            init.normal_(module.weight)
        elif isinstance(module, DinoSRCodebooks):
            codewords = torch.randn_like(module.sums, dtype=torch.float32)
            variance, mean = torch.var_mean(codewords, dim=1, correction=0, keepdim=True)
            init.copy_(module.sums, (codewords - mean) * torch.rsqrt(variance + 1e-5))
            init.ones_(module.counts)
        elif isinstance(module, DinoSRForPreTraining):
            for head in module.heads:
                self._init_uniform(head)
            for own, student in zip(module.teacher.parameters(), module.dinosr.encoder.parameters(), strict=True):
                init.copy_(own, student)
        if hasattr(module, "layer_weights"):
            init.constant_(module.layer_weights, 1 / (self.config.num_hidden_layers + 1))

    def _init_uniform(self, layer: nn.Linear | nn.Conv1d):
        """As torch initializes layers by itself."""
        bound = 1 / math.sqrt(layer.weight[0].numel())
        init.uniform_(layer.weight, -bound, bound)
        init.uniform_(layer.bias, -bound, bound)

    def freeze_feature_encoder(self):
        """
        Calling this function will disable the gradient computation for the feature encoder so that its parameter will
        not be updated during training.
        """
        self.base_model.feature_extractor._freeze_parameters()

    def freeze_base_model(self):
        """
        Calling this function will disable the gradient computation for the base model so that its parameters will not
        be updated during training. Only the head will be updated.
        """
        self.base_model.requires_grad_(False)

    def _average_layers(self, outputs: Wav2Vec2BaseModelOutput) -> torch.Tensor:
        """The last layer, or the learnt average of all layers that `use_weighted_layer_sum` asks for."""
        if not self.config.use_weighted_layer_sum:
            return outputs.last_hidden_state
        weights = self.layer_weights.softmax(dim=-1)
        return (torch.stack(outputs.hidden_states) * weights.view(-1, 1, 1, 1)).sum(dim=0)

    def _get_feat_extract_output_lengths(self, input_lengths: torch.LongTensor | int):
        """
        Computes the output length of the convolutional layers
        """
        for kernel_size, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            input_lengths = (input_lengths - kernel_size) // stride + 1
        return input_lengths

    def _get_feature_vector_attention_mask(
        self, feature_vector_length: int, attention_mask: torch.LongTensor | None
    ) -> torch.Tensor | None:
        if attention_mask is None:
            return None
        lengths = self._get_feat_extract_output_lengths(attention_mask.long().sum(dim=-1))
        return torch.arange(feature_vector_length, device=attention_mask.device) < lengths[:, None]


def _numpy_generator(generator: torch.Generator | None = None) -> np.random.Generator:
    """A numpy generator seeded by a draw from torch's."""
    device = generator.device if generator is not None else torch.device("cpu")
    return np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator, device=device)))


def _sample_span_mask(
    shape: tuple[int, int],
    mask_prob: float,
    mask_length: int,
    min_spans: int,
    generator: np.random.Generator,
    lengths: list[int] | None = None,
) -> np.ndarray:
    """
    Draws a mask of randomly placed spans for each row of a batch, as the paper's code does: the spans of a row of `n`
    frames number `mask_prob * n / mask_length`, rounded at random, have distinct starts and may overlap.

    Args:
        shape: Number of rows and of frames.
        mask_prob: Share of the row that the spans would cover if they did not overlap; 0: no mask.
        mask_length: Number of frames of a span.
        min_spans: Least number of spans of a row.
        generator: Source of all randomness.
        lengths: Valid frames of each row; the rest is padding and never masked. Without them one draw of the number
            of spans serves all rows.
    """

    def draw_num_spans(size):
        return max(min_spans, int(mask_prob * size / mask_length + generator.random()))

    batch_size, num_frames = shape
    mask = np.zeros(shape, dtype=bool)
    if mask_prob == 0:
        return mask
    shared_num_spans = draw_num_spans(num_frames)  # drawn even where every row then draws its own
    for row in range(batch_size):
        size = num_frames if lengths is None else lengths[row]
        num_spans = shared_num_spans if lengths is None else draw_num_spans(size)
        if num_spans == 0 or size <= 0:
            continue
        # A short row has one start more than there are spans; spans that reach past the end are cut there.
        num_starts = size - mask_length if size - mask_length > num_spans else num_spans + 1
        starts = generator.choice(num_starts, num_spans, replace=False)
        frames = (starts[:, None] + np.arange(min(mask_length, size))).ravel()
        mask[row, frames[frames < size]] = True
    return mask


@auto_docstring
class DinoSRModel(DinoSRPreTrainedModel):
    def __init__(self, config: DinoSRConfig):
        super().__init__(config)
        self.feature_extractor = DinoSRFeatureEncoder(config)
        self.feature_projection = DinoSRFeatureProjection(config)
        self.masked_spec_embed = nn.Parameter(torch.empty(config.hidden_size))
        self.encoder = DinoSREncoder(config)
        self.post_init()

    def _mask_hidden_states(
        self,
        hidden_states: torch.Tensor,
        mask_time_indices: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
    ):
        """Replaces masked frames by the mask embedding; in fine-tuning, draws the masks of SpecAugment."""
        config, (batch_size, num_frames, hidden_size) = self.config, hidden_states.shape
        over_channels = None
        if mask_time_indices is None and self.training and config.apply_spec_augment:
            generator = _numpy_generator()
            lengths = [num_frames] * batch_size if frame_mask is None else frame_mask.sum(dim=-1).tolist()
            spans = (config.mask_time_prob, config.mask_time_length, config.mask_time_min_masks)
            mask_time_indices = torch.from_numpy(
                _sample_span_mask((batch_size, num_frames), *spans, generator, lengths)
            )
            spans = (config.mask_feature_prob, config.mask_feature_length, config.mask_feature_min_masks)
            over_channels = torch.from_numpy(_sample_span_mask((batch_size, hidden_size), *spans, generator))
        if mask_time_indices is not None:
            mask = mask_time_indices.to(hidden_states.device, torch.bool)[..., None]
            hidden_states = torch.where(mask, self.masked_spec_embed.to(hidden_states.dtype), hidden_states)
        if over_channels is not None:
            hidden_states = hidden_states.masked_fill(over_channels.to(hidden_states.device)[:, None], 0.0)
        return hidden_states

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(
        self,
        input_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        mask_time_indices: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | Wav2Vec2BaseModelOutput:
        r"""
        mask_time_indices (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Frames to replace by the mask embedding. It replaces the random masks of fine-tuning, those over channels
            too.
        """
        extract_features = self.feature_extractor(input_values).transpose(1, 2)
        frame_mask = self._get_feature_vector_attention_mask(extract_features.shape[1], attention_mask)
        hidden_states, extract_features = self.feature_projection(extract_features)
        hidden_states = self._mask_hidden_states(hidden_states, mask_time_indices, frame_mask)
        hidden_states, _ = self.encoder(hidden_states, frame_mask, **kwargs)
        return Wav2Vec2BaseModelOutput(last_hidden_state=hidden_states, extract_features=extract_features)


def _mean_over_time(hidden_states: torch.Tensor, frame_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the frames of each utterance: `(..., B, T, D)` to `(..., B, 1, D)`."""
    if frame_mask is None:
        return hidden_states.mean(dim=-2, keepdim=True)
    weight = frame_mask[..., None].to(hidden_states.dtype)
    return (hidden_states * weight).sum(dim=-2, keepdim=True) / weight.sum(dim=-2, keepdim=True).clamp(min=1.0)


def _normalize_over_time(hidden_states: torch.Tensor, frame_mask: torch.Tensor | None) -> torch.Tensor:
    """Zero mean and unit variance over the frames of each utterance and channel, in float32: `(N, B, T, D)`."""
    hidden_states = hidden_states.float()
    hidden_states = hidden_states - _mean_over_time(hidden_states, frame_mask)
    return hidden_states * torch.rsqrt(_mean_over_time(hidden_states.square(), frame_mask) + 1e-5)


def _perplexity(histogram: torch.Tensor) -> torch.Tensor:
    """Number of codewords in use: `2 ** entropy` of counts or summed probabilities `(N, V)`."""
    share = histogram.float() / histogram.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return torch.exp2(-(share * torch.log2(share + 1e-8)).sum(dim=-1))


def _anneal(start: float, end: float, num_steps: int, step: int) -> float:
    return end if step >= num_steps else end - (end - start) * (1 - step / num_steps)


@auto_docstring(
    custom_intro="""
    DinoSR with its self-distillation: for masked frames, a student predicts the codewords of its teacher's top layers.

    A training step is one or more `forward` with `backward`, the optimizer's step, and one `update_targets`.
    """
)
class DinoSRForPreTraining(DinoSRPreTrainedModel):
    _keep_in_fp32_modules_strict = ["codebooks"]

    def __init__(self, config: DinoSRConfig):
        super().__init__(config)
        self.dinosr = DinoSRModel(config)
        self.heads = nn.ModuleList(
            [nn.Linear(config.hidden_size, config.codebook_size) for _ in range(config.num_codebooks)]
        )
        self.teacher = DinoSRTeacher(config)
        self.codebooks = DinoSRCodebooks(config)
        first_layer = config.num_hidden_layers - config.num_codebooks + 1
        self.codebook_layers = tuple(range(first_layer, config.num_hidden_layers + 1))
        self.post_init()

    def initialize_weights(self):
        """Freezes what is not trained: every parameter is made trainable after building and loading."""
        super().initialize_weights()
        self.teacher.requires_grad_(False)
        self.codebooks.requires_grad_(False)

    def sample_mask(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Draws the mask of pre-training, bool of shape `(batch_size, sequence_length)`."""
        samples = torch.ones_like(input_values) if attention_mask is None else attention_mask
        lengths = self._get_feat_extract_output_lengths(samples.long().sum(dim=-1))
        shape = (len(input_values), self._get_feat_extract_output_lengths(input_values.shape[1]))
        spans = (self.config.mask_prob, self.config.mask_length, self.config.mask_min_spans)
        mask = _sample_span_mask(shape, *spans, _numpy_generator(generator), lengths.clamp(min=0).tolist())
        return torch.from_numpy(mask).to(input_values.device)

    @torch.no_grad()
    def compute_targets(
        self, extract_features: torch.Tensor, frame_mask: torch.Tensor | None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """The teacher's top layers, normalized over time, of the student's front end: `(N, B, T, D)`."""
        # Without the projection's dropout, which is the student's alone.
        projected = self.dinosr.feature_projection.projection(extract_features)
        _, outputs = self.teacher(projected, frame_mask, self.codebook_layers, **kwargs)
        return _normalize_over_time(torch.stack(outputs), frame_mask)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        mask_time_indices: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | DinoSRForPreTrainingOutput:
        r"""
        mask_time_indices (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Frames to mask and predict; padding is left out. By default drawn here in training; in evaluation nothing
            is masked then, and there is no loss.
        generator (`torch.Generator`, *optional*):
            Source of the masks drawn here; by default torch's global CPU generator.
        """
        if mask_time_indices is None and self.training:
            mask_time_indices = self.sample_mask(input_values, attention_mask, generator)
        student = self.dinosr(input_values, attention_mask, mask_time_indices=mask_time_indices, **kwargs)
        output = DinoSRForPreTrainingOutput(
            last_hidden_state=student.last_hidden_state,
            hidden_states=student.hidden_states,
            attentions=student.attentions,
        )
        if mask_time_indices is None:
            return output

        features = student.extract_features
        masked = mask_time_indices.to(features.device, torch.bool)
        frame_mask = self._get_feature_vector_attention_mask(features.shape[1], attention_mask)
        if frame_mask is not None:
            masked = masked & frame_mask
        for_student_only = ("output_hidden_states", "output_attentions")
        kwargs = {name: value for name, value in kwargs.items() if name not in for_student_only}
        targets = self.compute_targets(features, frame_mask, **kwargs)[:, masked]  # (N, M, D)
        codes = self.codebooks.assign(targets)
        if self.training:
            self.codebooks.accumulate(targets, codes)
        predictors = student.last_hidden_state[masked]  # (M, D)
        log_probs = torch.stack([head(predictors) for head in self.heads]).float().log_softmax(dim=-1)  # (N, M, V)
        losses = -log_probs.gather(-1, codes[..., None]).squeeze(-1).sum(dim=1) / max(codes.shape[1], 1)
        code_counts = codes.new_zeros(len(codes), self.config.codebook_size)
        code_counts.scatter_add_(1, codes, torch.ones_like(codes))
        output.loss = losses.mean()
        output.codebook_losses = losses.detach()
        output.num_masked_frames = codes.new_full((), codes.shape[1])
        output.target_perplexity = _perplexity(code_counts)
        output.prediction_perplexity = _perplexity(log_probs.detach().exp().sum(dim=1))
        output.codes = codes
        return output

    @torch.no_grad()
    def update_targets(self, step: int) -> dict[str, float]:
        """
        Updates the codebooks, then moves the teacher: once after each step of the optimizer, in every process.

        Args:
            step (`int`):
                Number of updates completed, this one included: 1 after the first.

        Returns:
            `dict[str, float]`: The decays used, `codebook_decay` and `ema_decay`; the latter is 1.0 once the teacher
            is frozen.
        """
        config = self.config
        codebook_end_decay = config.codebook_decay if config.codebook_end_decay is None else config.codebook_end_decay
        codebook_decay = _anneal(config.codebook_decay, codebook_end_decay, config.codebook_end_decay_step, step - 1)
        self.codebooks.commit(codebook_decay)
        ema_decay = 1.0
        if not self.apply_freeze(step):
            ema_decay = _anneal(config.ema_decay, config.ema_end_decay, config.ema_anneal_steps, step)
            self.teacher.ema_update(self.dinosr.encoder, ema_decay)
        return {"codebook_decay": codebook_decay, "ema_decay": ema_decay}

    def apply_freeze(self, step: int) -> bool:
        """
        Freezes the student's convolutions and projection once the teacher is frozen, and returns whether they are.
        A resumed run calls this before its first forward, with the number of updates completed.
        """
        is_frozen = self.config.freeze_teacher_step is not None and step >= self.config.freeze_teacher_step
        if is_frozen:
            for module in (self.dinosr.feature_extractor, self.dinosr.feature_projection):
                module.requires_grad_(False)
                module.zero_grad(set_to_none=True)  # or the optimizer would go on with its momentum
        return is_frozen

    @torch.no_grad()
    def encode_units(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layer: int = 5,
        source: str = "student",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Computes acoustic units of unmasked speech, one codeword a frame, in evaluation mode.

        Args:
            input_values (`torch.FloatTensor` of shape `(batch_size, num_samples)`):
                Waveforms, as for [`DinoSRModel`].
            attention_mask (`torch.LongTensor` of shape `(batch_size, num_samples)`, *optional*):
                1 for samples, 0 for padding.
            layer (`int`, *optional*, defaults to 5):
                Number of a transformer layer with a codebook, from 1: one of the top `num_codebooks`.
            source (`str`, *optional*, defaults to `"student"`):
                `"student"`: the most probable codeword by that layer's prediction head. `"teacher"`: the codeword
                nearest to the teacher's layer, normalized over the utterance.

        Returns:
            `tuple[torch.LongTensor, torch.LongTensor]`: Codes of shape `(batch_size, sequence_length)`, -1 in the
            padding, and the number of frames of each utterance.
        """
        if layer not in self.codebook_layers or source not in ("student", "teacher"):
            raise ValueError(
                f"There are no units of `layer={layer}` and `source={source!r}`. Choose one of"
                f" {self.codebook_layers}, and 'student' or 'teacher'."
            )
        student = self.dinosr(input_values, attention_mask)
        attention_mask = torch.ones_like(input_values) if attention_mask is None else attention_mask
        frame_mask = self._get_feature_vector_attention_mask(student.last_hidden_state.shape[1], attention_mask)
        number = self.codebook_layers.index(layer)
        if source == "student":
            codes = self.heads[number](student.last_hidden_state).float().argmax(dim=-1)
        else:
            targets = self.compute_targets(student.extract_features, frame_mask)
            codes = self.codebooks.assign(targets.flatten(1, 2))[number].view(frame_mask.shape)
        return codes.masked_fill(~frame_mask, -1), frame_mask.sum(dim=-1)


@auto_docstring(
    custom_intro="""
    DinoSR Model with a `language modeling` head on top for Connectionist Temporal Classification (CTC).
    """
)
class DinoSRForCTC(DinoSRPreTrainedModel):
    def __init__(self, config: DinoSRConfig):
        super().__init__(config)
        self.dinosr = DinoSRModel(config)
        self.dropout = nn.Dropout(config.final_dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | CausalLMOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
            Labels for connectionist temporal classification, below `config.vocab_size`; those set to `-100` are
            ignored.
        """
        if labels is not None and labels.max() >= self.config.vocab_size:
            raise ValueError(f"Label values must be < vocab_size: {self.config.vocab_size}")

        outputs = self.dinosr(input_values, attention_mask=attention_mask, **kwargs)
        logits = self.lm_head(self.dropout(outputs.last_hidden_state))
        samples = torch.ones_like(input_values) if attention_mask is None else attention_mask
        logit_lengths = self._get_feat_extract_output_lengths(samples.long().sum(dim=-1)).clamp(min=0)
        # Padding is the blank with probability 1: a padded batch is decoded as its utterances one by one.
        is_padding = torch.arange(logits.shape[1], device=logits.device) >= logit_lengths[:, None]
        is_blank = torch.arange(logits.shape[2], device=logits.device) == self.config.pad_token_id
        logits = logits.masked_fill(is_padding[..., None] & ~is_blank, -1e4)  # trf-ignore: TRF032
        logits = logits.masked_fill(is_padding[..., None] & is_blank, 0.0)

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                logit_lengths=logit_lengths,
                blank_token_id=self.config.pad_token_id,
                reduction=self.config.ctc_loss_reduction,
                zero_infinity=self.config.ctc_zero_infinity,
                **kwargs,
            )
        return CausalLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@auto_docstring(
    custom_intro="""
    DinoSR Model with a sequence classification head on top (a linear layer over the pooled output) for tasks like
    SUPERB Keyword Spotting.
    """
)
class DinoSRForSequenceClassification(DinoSRPreTrainedModel):
    def __init__(self, config: DinoSRConfig):
        super().__init__(config)
        self.dinosr = DinoSRModel(config)
        if config.use_weighted_layer_sum:
            self.layer_weights = nn.Parameter(torch.empty(config.num_hidden_layers + 1))
        self.projector = nn.Linear(config.hidden_size, config.classifier_proj_size)
        self.classifier = nn.Linear(config.classifier_proj_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    @auto_docstring
    def forward(
        self,
        input_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | SequenceClassifierOutput:
        r"""
        labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            Class of each utterance, in `[0, ..., config.num_labels - 1]`; if `config.num_labels == 1`, the value of
            each, for a regression (mean squared error).
        """
        outputs = self.dinosr(input_values, attention_mask=attention_mask, **kwargs)
        hidden_states = self.projector(self._average_layers(outputs))
        frame_mask = self._get_feature_vector_attention_mask(hidden_states.shape[1], attention_mask)
        logits = self.classifier(_mean_over_time(hidden_states, frame_mask).squeeze(1))
        loss = None
        if labels is not None and self.config.num_labels == 1:
            loss = nn.functional.mse_loss(logits.view(-1), labels.view(-1).to(logits.dtype))
        elif labels is not None:
            loss = nn.functional.cross_entropy(logits, labels.view(-1))
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


@auto_docstring
class DinoSRForAudioFrameClassification(DinoSRPreTrainedModel):
    def __init__(self, config: DinoSRConfig):
        super().__init__(config)
        self.dinosr = DinoSRModel(config)
        if config.use_weighted_layer_sum:
            self.layer_weights = nn.Parameter(torch.empty(config.num_hidden_layers + 1))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    @auto_docstring
    def forward(
        self,
        input_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TokenClassifierOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Label of each frame, -100 for frames to ignore; or one-hot labels of shape
            `(batch_size, sequence_length, config.num_labels)`. Padding is ignored.
        """
        outputs = self.dinosr(input_values, attention_mask=attention_mask, **kwargs)
        logits = self.classifier(self._average_layers(outputs))
        loss = None
        if labels is not None:
            labels = labels.argmax(dim=-1) if labels.dim() == 3 else labels
            frame_mask = self._get_feature_vector_attention_mask(logits.shape[1], attention_mask)
            if frame_mask is not None:
                labels = labels.masked_fill(~frame_mask, -100)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class DinoSRAMSoftmaxLoss(AMSoftmaxLoss):
    pass


class DinoSRTDNNLayer(nn.Module):
    def __init__(self, config: DinoSRConfig, layer_id: int):
        super().__init__()
        self.conv = nn.Conv1d(
            config.tdnn_dim[max(layer_id - 1, 0)],
            config.tdnn_dim[layer_id],
            kernel_size=config.tdnn_kernel[layer_id],
            dilation=config.tdnn_dilation[layer_id],
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(hidden_states).relu()


@auto_docstring(
    custom_intro="""
    DinoSR Model with an XVector feature extraction head on top for tasks like Speaker Verification.
    """
)
class DinoSRForXVector(DinoSRPreTrainedModel):
    def __init__(self, config: DinoSRConfig):
        super().__init__(config)
        self.dinosr = DinoSRModel(config)
        if config.use_weighted_layer_sum:
            self.layer_weights = nn.Parameter(torch.empty(config.num_hidden_layers + 1))
        self.projector = nn.Linear(config.hidden_size, config.tdnn_dim[0])
        self.tdnn = nn.ModuleList([DinoSRTDNNLayer(config, i) for i in range(len(config.tdnn_dim))])
        self.feature_extractor = nn.Linear(config.tdnn_dim[-1] * 2, config.xvector_output_dim)
        self.classifier = nn.Linear(config.xvector_output_dim, config.xvector_output_dim)
        self.objective = DinoSRAMSoftmaxLoss(config.xvector_output_dim, config.num_labels)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    @auto_docstring
    def forward(
        self,
        input_values: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | XVectorOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Speaker of each utterance, in `[0, ..., config.num_labels - 1]`.
        """
        outputs = self.dinosr(input_values, attention_mask=attention_mask, **kwargs)
        hidden_states = self.projector(self._average_layers(outputs))
        attention_mask = torch.ones_like(input_values) if attention_mask is None else attention_mask
        frame_mask = self._get_feature_vector_attention_mask(hidden_states.shape[1], attention_mask)
        hidden_states = hidden_states.transpose(1, 2)
        for layer in self.tdnn:
            hidden_states = layer(hidden_states)
        hidden_states = hidden_states.transpose(1, 2)

        # Statistic pooling; the layers have shortened every utterance by the same number of frames.
        frame_mask = frame_mask[:, -hidden_states.shape[1] :]
        num_frames = frame_mask.sum(dim=1)[:, None, None]
        mean = _mean_over_time(hidden_states, frame_mask)
        variance = _mean_over_time((hidden_states - mean).square(), frame_mask)
        variance = variance * num_frames / (num_frames - 1).clamp(min=1)
        embeddings = self.feature_extractor(torch.cat([mean, (variance + 1e-12).sqrt()], dim=-1).squeeze(1))
        logits = self.classifier(embeddings)
        loss = None if labels is None else self.objective(logits, labels)
        return XVectorOutput(
            loss=loss,
            logits=logits,
            embeddings=embeddings,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "DinoSRConfig",
    "DinoSRForAudioFrameClassification",
    "DinoSRForCTC",
    "DinoSRForPreTraining",
    "DinoSRForSequenceClassification",
    "DinoSRForXVector",
    "DinoSRModel",
    "DinoSRPreTrainedModel",
]
