"""
DinoSR (arXiv 2305.10005) for PyTorch: the model, its pre-training objective, and task heads.

The file runs as the data flow: waveform to features (the layers are in `encoder_dinosr`); then teacher, codebooks and
prediction heads of pre-training; then the heads of fine-tuning.

`B` batch, `S` samples, `T` frames, `C` conv channels, `D` hidden size, `N` codebooks, `V` codewords, `M` masked
frames.
"""

import math
import os
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    CausalLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
    Wav2Vec2BaseModelOutput,
    XVectorOutput,
)
from transformers.utils.generic import TransformersKwargs, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .codebook_dinosr import OnlineCodebooks
from .configuration_dinosr import DinoSRConfig, Length
from .dropout_dinosr import DinoSRDropout
from .encoder_dinosr import (
    DinoSRAttention,
    DinoSREncoder,
    DinoSREncoderLayer,
    DinoSRFeatureEncoder,
    DinoSRFeatureProjection,
    DinoSRLinear,
    DinoSRPositionalConv,
    DinoSRTeacher,
    check_input,
    fill_front_end_copies,
)
from .heads_dinosr import (
    DinoSRMarginLoss,
    DinoSRTimeDelayLayers,
    ctc_loss,
    mask_padding_logits,
    mean_and_deviation_over_time,
    mean_over_time,
)
from .masking_dinosr import numpy_generator, sample_span_mask, sample_spec_augment
from .objective_dinosr import DinoSRForPreTrainingOutput, energy_sums, masked_prediction_losses
from .units_dinosr import DinoSRUnitEncoder

# Which of transformers' automatic classes finds which model; a saved folder's `auto_map` is made of it.
AUTO_CLASSES = {
    "AutoModel": "DinoSRModel",
    "AutoModelForPreTraining": "DinoSRForPreTraining",
    "AutoModelForCTC": "DinoSRForCTC",
    "AutoModelForAudioClassification": "DinoSRForSequenceClassification",
    "AutoModelForAudioFrameClassification": "DinoSRForAudioFrameClassification",
    "AutoModelForAudioXVector": "DinoSRForXVector",
}


class DinoSRPreTrainedModel(PreTrainedModel):
    """What all DinoSR models share: names, initialisation, frame counts, freezing."""

    config_class = DinoSRConfig
    config: DinoSRConfig
    base_model_prefix = "dinosr"
    main_input_name = "input_values"
    input_modalities = "audio"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    # Otherwise `Trainer` takes our losses, means over a batch, for shares of an accumulated one, and adds them up.
    accepts_loss_kwargs = False
    _no_split_modules = ["DinoSREncoderLayer"]
    _can_record_outputs = {
        "hidden_states": DinoSREncoderLayer,
        "attentions": OutputRecorder(DinoSRAttention, index=1, layer_name="encoder"),
    }
    # What pre-training needs beside the encoder: a checkpoint of it loads into every head without a word about these.
    _keys_to_ignore_on_load_unexpected = [r"^teacher\.", r"^codebooks\.", r"^heads\."]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside of transformers, modules without parameters of their own would be left out, which is where
        # the teacher becomes the student's copy. All of `_init_weights` respects what was loaded.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, DinoSRLinear | DinoSRPositionalConv):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
        elif isinstance(module, nn.Conv1d):
            init.kaiming_normal_(module.weight)
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, DinoSRModel):
            init.uniform_(module.masked_spec_embed)
        elif isinstance(module, OnlineCodebooks):
            init.copy_(module.sums, module.initial_sums())
            init.ones_(module.counts)
            if module.usage is not None:
                init.ones_(module.usage)
        elif isinstance(module, DinoSRForPreTraining):
            for own, live in module.teacher.pairs_with(module.dinosr):
                init.copy_(own, live)
        elif isinstance(module, DinoSRMarginLoss):
            init.normal_(module.weight)
        else:
            super()._init_weights(module)
        if isinstance(module, DinoSRClassifier) and module.layer_weights is not None:
            init.constant_(module.layer_weights, 1 / len(module.layer_weights))

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in every transformers model; the folder names all heads, so that each finds its code with the weights."""
        if self._auto_class is not None:
            self.config.auto_map = {auto: f"modeling_dinosr.{name}" for auto, name in AUTO_CLASSES.items()}
        super().save_pretrained(save_directory, *args, **kwargs)

    def freeze_feature_encoder(self) -> None:
        """Stop training the convolutions, as fine-tuning does from its first update."""
        self.base_model.feature_extractor.requires_grad_(False)

    def freeze_base_model(self) -> None:
        """Stop training everything but the head."""
        self.base_model.requires_grad_(False)

    def _get_feat_extract_output_lengths(self, input_lengths: Length) -> Length:
        """Frames of so many samples; transformers' speech examples and pipelines look for this name."""
        return self.config.num_frames(input_lengths)

    def _frame_mask(self, attention_mask: torch.Tensor | None, num_frames: int) -> torch.Tensor | None:
        """attention_mask (B, S), 1 for samples and 0 for padding at the end, to bool (B, T), True for frames."""
        if attention_mask is None:
            return None
        lengths = self.config.num_frames(attention_mask.long().sum(dim=-1))
        return torch.arange(num_frames, device=attention_mask.device) < lengths[:, None]


class DinoSRModel(DinoSRPreTrainedModel):
    """
    The DinoSR encoder: speech in, one feature vector every 20 ms out.

    Args:
        config: A `DinoSRConfig`.
    """

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__(config)
        self.feature_extractor = DinoSRFeatureEncoder(config)
        self.feature_projection = DinoSRFeatureProjection(config)
        self.masked_spec_embed = nn.Parameter(torch.empty(config.hidden_size))
        self.encoder = DinoSREncoder(config)
        self.post_init()

    def _mask_features(
        self, features: torch.Tensor, mask_time_indices: torch.Tensor | None, frame_mask: torch.Tensor | None
    ) -> torch.Tensor:
        over_channels = None
        if mask_time_indices is not None:
            if mask_time_indices.shape != features.shape[:2]:
                raise ValueError(
                    f"mask_time_indices has shape {tuple(mask_time_indices.shape)}, but must be (batch, frames) ="
                    f" {tuple(features.shape[:2])}. `config.num_frames` tells the frames of so many samples."
                )
            mask_time_indices = mask_time_indices.to(features.device, torch.bool)
        elif self.training and self.config.apply_spec_augment:
            lengths = None if frame_mask is None else frame_mask.sum(dim=-1).tolist()
            over_time, over_channels = sample_spec_augment(
                self.config, *features.shape[:2], lengths=lengths, generator=numpy_generator(None)
            )
            mask_time_indices = torch.from_numpy(over_time).to(features.device)
        if mask_time_indices is not None:
            mask_embedding = self.masked_spec_embed.to(features.dtype)
            features = torch.where(mask_time_indices[..., None], mask_embedding, features)
        if over_channels is not None:
            features = features.masked_fill(torch.from_numpy(over_channels).to(features.device)[:, None], 0.0)
        return features

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        mask_time_indices: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | Wav2Vec2BaseModelOutput:
        """
        Encode a batch of waveforms. An utterance's features do not depend on the padding of its batch.

        Args:
            input_values: (B, S), 16 kHz, zero mean and unit variance an utterance, padded at the end.
            attention_mask: (B, S), 1 for samples, 0 for padding; None: no padding.
            mask_time_indices: bool (B, T), frames to replace by the mask embedding. Given, it stands in for the
                random masks of fine-tuning, over channels too.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `last_hidden_state` (B, T, D), zero in the padding unless `reference_padding` is set; `extract_features`
            (B, T, C): the normalised output of the convolutions; and on demand `hidden_states`, the first layer's
            input and each layer's output, and `attentions`.

        Raises:
            ValueError: For inputs of another shape, or too short for a frame.
        """
        check_input(self.config, input_values, attention_mask)
        frame_mask = self._frame_mask(attention_mask, self.config.num_frames(input_values.shape[1]))
        features = self.feature_extractor(input_values, frame_mask).transpose(1, 2)
        hidden_states, features = self.feature_projection(features)
        hidden_states = self._mask_features(hidden_states, mask_time_indices, frame_mask)
        hidden_states = self.encoder(hidden_states, frame_mask, **kwargs)
        return Wav2Vec2BaseModelOutput(last_hidden_state=hidden_states, extract_features=features)


class DinoSRForPreTraining(DinoSRUnitEncoder, DinoSRPreTrainedModel):
    """
    DinoSR's self-distillation: a student predicts, for masked frames, the codewords of the teacher's top layers.

    A training step is one or more `forward` with `backward`, the optimizer's step, and one `update_targets`.
    `encode_units` and `layer_features` look at unmasked speech.

    Args:
        config: A `DinoSRConfig`.

    Attributes:
        dinosr: The student.
        heads: N linear layers from the student's last layer to V codewords.
        teacher: The student's average; equal to it at first.
        codebooks: The codewords, in float32 whatever the dtype of the rest.
    """

    _keep_in_fp32_modules_strict = ["codebooks"]

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__(config)
        self.dinosr = DinoSRModel(config)
        self.heads = nn.ModuleList(
            DinoSRLinear(config.hidden_size, config.codebook_size) for _ in range(config.num_codebooks)
        )
        self.teacher = DinoSRTeacher(config)
        self.codebooks = OnlineCodebooks(
            config.num_codebooks, config.codebook_size, config.hidden_size, config.codebook_revival_share
        )
        self.register_load_state_dict_pre_hook(fill_front_end_copies)
        self.post_init()

    def initialize_weights(self) -> None:
        """Called by transformers after building and after loading, which makes every parameter trainable."""
        super().initialize_weights()
        self.teacher.requires_grad_(False)
        self.codebooks.requires_grad_(False)

    def _sample_mask(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor | None, generator: torch.Generator | None
    ) -> torch.Tensor:
        samples = torch.ones_like(input_values) if attention_mask is None else attention_mask
        num_samples = samples.long().sum(dim=-1).tolist()
        mask = sample_span_mask(
            (len(input_values), self.config.num_frames(input_values.shape[1])),
            self.config.mask_prob,
            self.config.mask_length,
            min_spans=self.config.mask_min_spans,
            lengths=[self.config.num_frames(n) for n in num_samples],
            generator=numpy_generator(generator),
        )
        return torch.from_numpy(mask).to(input_values.device)

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        mask_time_indices: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        masked_frames: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | DinoSRForPreTrainingOutput:
        """
        Mask, encode, predict; in training mode also gather what `update_targets` will take.

        Args:
            input_values: (B, S), 16 kHz, zero mean and unit variance an utterance, padded at the end.
            attention_mask: (B, S), 1 for samples, 0 for padding; None: no padding.
            mask_time_indices: bool (B, T), the frames to mask and predict; padded frames are left out of it. None: in
                training they are drawn here; in evaluation nothing is masked and there is no loss.
            generator: Source of the masks drawn here; None: torch's global generator of the CPU.
            masked_frames: int64 (M,), `mask_time_indices.flatten().nonzero()[:, 0]` where it has no padded frame. It
                is taken on trust, and spares a GPU the wait for how many there are. None: they are counted here.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `DinoSRForPreTrainingOutput`.

        Raises:
            ValueError: For inputs or masks of another shape.
        """
        if mask_time_indices is None and self.training:
            check_input(self.config, input_values, attention_mask)
            mask_time_indices = self._sample_mask(input_values, attention_mask, generator)
        student = self.dinosr(input_values, attention_mask, mask_time_indices=mask_time_indices, **kwargs)
        losses: dict[str, Any] = {}
        if mask_time_indices is not None:
            for_student_only = ("output_hidden_states", "output_attentions")
            teacher_kwargs = {name: value for name, value in kwargs.items() if name not in for_student_only}
            features = student.extract_features
            frame_mask = self._frame_mask(attention_mask, features.shape[1])
            targets, energies = self._targets_and_energies(input_values, features, frame_mask, teacher_kwargs)
            if masked_frames is None:
                masked = mask_time_indices.to(targets.device, torch.bool)
                if frame_mask is not None:
                    masked = masked & frame_mask
                masked_frames = masked.flatten().nonzero()[:, 0]
            chosen = student.last_hidden_state.flatten(0, 1).index_select(0, masked_frames)
            losses = self._score(chosen, targets.flatten(1, 2).index_select(1, masked_frames))
            losses |= {"target_energies": energies, "feature_energies": energy_sums(features, frame_mask)}
        return DinoSRForPreTrainingOutput(
            **losses,
            last_hidden_state=student.last_hidden_state,
            hidden_states=student.hidden_states,
            attentions=student.attentions,
        )

    def _score(self, student: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
        """Student's output (M, D) and targets (N, M, D) at masked frames to losses and counts."""
        codes = self.codebooks.assign(targets)
        if self.training:
            self.codebooks.accumulate(targets, codes)
        logits = torch.stack([head(student) for head in self.heads])  # (N, M, V)
        return dict(masked_prediction_losses(logits, codes))

    @torch.no_grad()
    def update_targets(self, step: int) -> dict[str, float]:
        """
        Commit the codebooks, then move the teacher: once after each step of the optimizer.

        The codebooks take what training forward passes have gathered since the last call, over all processes: every
        process must call this. The teacher's layers move towards the student's by exponential average, its positional
        convolutions are copied (paper, equation 1; docs/parity.md, T2 to T8).

        Args:
            step: Updates completed, this one included: 1 after the first.

        Returns:
            The decays used: `codebook_decay`, and `ema_decay`, which is 1.0 where the teacher stood still.

        Raises:
            ValueError: If `step` is not at least 1.
        """
        if step < 1:
            raise ValueError(
                f"step={step}, but update_targets comes after an optimizer step: give the number of completed updates,"
                " 1 after the first."
            )
        num_steps = self.config.codebook_update_steps
        codebook_decay = self.config.codebook_decay_at(max(0, step - num_steps))
        self.codebooks.commit(codebook_decay, is_due=step % num_steps == 0)
        ema_decay = self.config.ema_decay_at(step)
        if ema_decay < 1:
            self.teacher.follow(self.dinosr.encoder, ema_decay)
        if self.config.freeze_teacher_step is None or step <= self.config.freeze_teacher_step:
            self.teacher.copy_front_end(self.dinosr.feature_extractor, self.dinosr.feature_projection)
        self.apply_freeze(step)
        return {"codebook_decay": codebook_decay, "ema_decay": ema_decay}

    def apply_freeze(self, step: int) -> bool:
        """
        Stop training what the freeze step stops; `update_targets` does it, and a resumed run before its first forward.

        With `freeze_mode="frozen"` these are the convolutions and the projection, which feed the teacher. The other
        modes freeze nothing of the student.

        Args:
            step: Updates completed.

        Returns:
            Whether the step is at or past `freeze_teacher_step` in this mode.
        """
        frozen = self.config.freeze_mode == "frozen" and self.config.is_teacher_frozen_at(step)
        if frozen:
            for module in (self.dinosr.feature_extractor, self.dinosr.feature_projection):
                for parameter in module.parameters():
                    parameter.requires_grad_(False)
                    parameter.grad = None  # or the optimizer would go on with its momentum
        return frozen


class DinoSRForCTC(DinoSRPreTrainedModel):
    """
    DinoSR with a linear layer to labels, for connectionist temporal classification; `pad_token_id` is the blank.

    Args:
        config: A `DinoSRConfig` with the `vocab_size` of the tokenizer.

    Raises:
        ValueError: If `pad_token_id` is no label of `vocab_size`.
    """

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__(config)
        if config.pad_token_id is None or not 0 <= config.pad_token_id < config.vocab_size:
            raise ValueError(
                f"pad_token_id={config.pad_token_id} is the blank of CTC and must be a label below"
                f" vocab_size={config.vocab_size}. Take both from the tokenizer."
            )
        self.dinosr = DinoSRModel(config)
        self.dropout = DinoSRDropout(config.final_dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | CausalLMOutput:
        """
        Args:
            input_values: (B, S), as for `DinoSRModel`.
            attention_mask: (B, S) or None.
            labels: int64 (B, L), padded at the end with -100.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `logits` (B, T, vocab_size), of padding the blank's, and with labels `loss` in nats, reduced as configured.

        Raises:
            ValueError: For labels outside of the vocabulary.
        """
        outputs = self.dinosr(input_values, attention_mask, **kwargs)
        samples = torch.ones_like(input_values) if attention_mask is None else attention_mask
        num_frames = self.config.num_frames(samples.long().sum(dim=-1))
        logits = mask_padding_logits(self.config, self.lm_head(self.dropout(outputs.last_hidden_state)), num_frames)
        loss = None if labels is None else ctc_loss(self.config, logits, labels, num_frames)
        return CausalLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class DinoSRClassifier(DinoSRPreTrainedModel):
    """What the classification heads share: the encoder, and the learnt average of its layers."""

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__(config)
        self.dinosr = DinoSRModel(config)
        self.num_labels: int = config.num_labels or 0
        self.layer_weights: nn.Parameter | None = None
        if config.use_weighted_layer_sum:
            self.layer_weights = nn.Parameter(torch.empty(config.num_hidden_layers + 1))

    def _encode(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor | None, kwargs: Mapping[str, Any]
    ) -> tuple[torch.Tensor, Wav2Vec2BaseModelOutput]:
        """Features (B, T, D), of the last layer or of all, and the encoder's output."""
        if self.layer_weights is None:
            outputs = self.dinosr(input_values, attention_mask, **kwargs)
            return outputs.last_hidden_state, outputs
        asked_for = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        outputs = self.dinosr(input_values, attention_mask, **{**kwargs, "output_hidden_states": True})
        weights = self.layer_weights.softmax(dim=0)
        features = sum(weight * layer for weight, layer in zip(weights, outputs.hidden_states, strict=True))
        if not asked_for:
            outputs["hidden_states"] = None
        return features, outputs


class DinoSRForSequenceClassification(DinoSRClassifier):
    """
    DinoSR with one decision an utterance: keyword, speaker, language, emotion.

    Args:
        config: A `DinoSRConfig` with `num_labels`; 1 makes it a regression.
    """

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__(config)
        self.projector = nn.Linear(config.hidden_size, config.classifier_proj_size)
        self.classifier = nn.Linear(config.classifier_proj_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | SequenceClassifierOutput:
        """
        Args:
            input_values: (B, S), as for `DinoSRModel`.
            attention_mask: (B, S) or None.
            labels: int64 (B,) for cross entropy, or float (B,) for squared error where `num_labels` is 1.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `logits` (B, num_labels), and `loss` where labels are given.
        """
        features, outputs = self._encode(input_values, attention_mask, kwargs)
        features = self.projector(features)
        pooled = mean_over_time(features, self._frame_mask(attention_mask, features.shape[1]))
        logits = self.classifier(pooled)
        loss = None
        if labels is not None and self.num_labels == 1:
            loss = nn.functional.mse_loss(logits.view(-1), labels.view(-1).to(logits.dtype))
        elif labels is not None:
            loss = nn.functional.cross_entropy(logits, labels.view(-1))
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class DinoSRForAudioFrameClassification(DinoSRClassifier):
    """
    DinoSR with one decision a frame: phones, diarisation.

    Args:
        config: A `DinoSRConfig` with `num_labels`.
    """

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | TokenClassifierOutput:
        """
        Args:
            input_values: (B, S), as for `DinoSRModel`.
            attention_mask: (B, S) or None.
            labels: int64 (B, T) with -100 for frames that do not count, or one-hot (B, T, num_labels). Padded frames
                never count.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `logits` (B, T, num_labels), and `loss` where labels are given.
        """
        features, outputs = self._encode(input_values, attention_mask, kwargs)
        logits = self.classifier(features)
        loss = None
        if labels is not None:
            classes = labels.argmax(dim=-1) if labels.dim() == 3 else labels
            frame_mask = self._frame_mask(attention_mask, logits.shape[1])
            if frame_mask is not None:
                classes = classes.masked_fill(~frame_mask, -100)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), classes.flatten())
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class DinoSRForXVector(DinoSRClassifier):
    """
    DinoSR with a speaker embedding: time-delay layers, then mean and deviation over time (ICASSP 2018, x-vectors).

    Args:
        config: A `DinoSRConfig` with `num_labels` speakers.
    """

    def __init__(self, config: DinoSRConfig) -> None:
        super().__init__(config)
        self.projector = nn.Linear(config.hidden_size, config.tdnn_dim[0])
        self.tdnn = DinoSRTimeDelayLayers(config)
        self.feature_extractor = nn.Linear(config.tdnn_dim[-1] * 2, config.xvector_output_dim)
        self.classifier = nn.Linear(config.xvector_output_dim, config.xvector_output_dim)
        self.objective = DinoSRMarginLoss(config.xvector_output_dim, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | XVectorOutput:
        """
        Args:
            input_values: (B, S), as for `DinoSRModel`.
            attention_mask: (B, S) or None.
            labels: int64 (B,), the speakers.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `embeddings` and `logits`, each (B, xvector_output_dim), and `loss` where labels are given.

        Raises:
            ValueError: If the utterances are shorter than what the time-delay layers look at.
        """
        features, outputs = self._encode(input_values, attention_mask, kwargs)
        frame_mask = self._frame_mask(attention_mask, features.shape[1])
        if frame_mask is not None:
            frame_mask = frame_mask[:, self.tdnn.num_frames_lost :]
        delayed = self.tdnn(self.projector(features))
        embeddings = self.feature_extractor(mean_and_deviation_over_time(delayed, frame_mask))
        logits = self.classifier(embeddings)
        loss = None if labels is None else self.objective(logits, labels)
        both = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return XVectorOutput(loss=loss, logits=logits, embeddings=embeddings, **both)


__all__ = [
    "DinoSRForAudioFrameClassification",
    "DinoSRForCTC",
    "DinoSRForPreTraining",
    "DinoSRForPreTrainingOutput",
    "DinoSRForSequenceClassification",
    "DinoSRForXVector",
    "DinoSRModel",
    "DinoSRPreTrainedModel",
]
