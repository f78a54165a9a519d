"""
What pre-training models make of unmasked speech: outputs of layers, targets, and acoustic units.

`B` batch, `S` samples, `T` frames, `C` conv channels, `D` hidden size, `N` codebooks, `L` layers that were asked for.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .codebook_dinosr import OnlineCodebooks
from .configuration_dinosr import DinoSRConfig
from .encoder_dinosr import DinoSRTeacher, check_input
from .objective_dinosr import energy_sums, normalize_over_time

SOURCES = ("student", "teacher")

# What stands for the units of padding.
NO_UNIT = -1


def check_layers(config: DinoSRConfig, layers: Sequence[int], *, with_codebooks: bool) -> list[int]:
    """
    Layers that a model has, numbered from 1, as a list.

    Args:
        config: Of the model.
        layers: Numbers of layers.
        with_codebooks: Whether each must have a codebook.

    Raises:
        ValueError: If there is none, or the model has no such layer, or no codebook for it.
    """
    known = config.codebook_layers if with_codebooks else range(1, config.num_hidden_layers + 1)
    what = "codebook" if with_codebooks else "transformer layer"
    found = [int(layer) for layer in layers]
    unknown = [layer for layer in found if layer not in known]
    if unknown or not found:
        listed = ", ".join(map(str, known))
        wrong = f"layer={unknown[0]} has no {what}" if unknown else "layers is empty"
        raise ValueError(f"{wrong}: this model has one for each of the layers {listed}. Choose among these.")
    return found


def check_source(source: str) -> None:
    """Raises `ValueError` for what is neither "student" nor "teacher"."""
    if source not in SOURCES:
        raise ValueError(f"source={source!r} is unknown. Choose one of {', '.join(SOURCES)}.")


class DinoSRUnitEncoder:
    """The part of `DinoSRForPreTraining` that looks at unmasked speech; it learns nothing."""

    config: Any
    training: bool
    dinosr: Any
    heads: nn.ModuleList
    teacher: DinoSRTeacher
    codebooks: OnlineCodebooks
    _frame_mask: Callable[[torch.Tensor | None, int], torch.Tensor | None]

    def compute_targets(
        self,
        input_values: torch.Tensor,
        extract_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        The teacher's view of the unmasked utterances: what is clustered (paper, Section 3.1).

        Args:
            input_values: (B, S), as given to the student.
            extract_features: (B, T, C), the student's output of that name.
            attention_mask: (B, S) or None.
            **kwargs: For the attention implementation.

        Returns:
            float32 (N, B, T, D): feed-forward output of each of the top N layers, normalised over time.
        """
        frame_mask = self._frame_mask(attention_mask, extract_features.shape[1])
        return self._targets_and_energies(input_values, extract_features, frame_mask, kwargs)[0]

    @torch.no_grad()
    def _targets_and_energies(
        self, input_values: torch.Tensor, extracted: torch.Tensor, frame_mask: torch.Tensor | None, kwargs: Mapping
    ) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.teacher.own_features(input_values, frame_mask)
        if features is None:
            # Without the projection's dropout, which is the student's alone.
            features = self.dinosr.feature_projection.projection(extracted.detach())
        layers = self.teacher(features, frame_mask, **kwargs)
        # Our frames count by themselves; the authors' statistics have the padding in them.
        targets = normalize_over_time(layers, None if self.config.reference_padding else frame_mask)
        return targets, energy_sums(layers, frame_mask)

    def _check_unmasked(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor | None, source: str, name: str
    ) -> None:
        check_source(source)
        check_input(self.config, input_values, attention_mask)
        if self.training:
            raise ValueError(
                f"{name} was called in training mode, where the student has dropout and what comes out is random."
                " Call model.eval() first."
            )

    @torch.no_grad()
    def layer_features(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layers: Sequence[int] = (5,),
        source: str = "student",
    ) -> torch.Tensor:
        """
        Continuous features of chosen layers; no layer above the highest of them is computed.

        An utterance's features do not depend on the padding of its batch, but with `reference_padding` they do.

        Args:
            input_values: (B, S), as for `DinoSRModel`.
            attention_mask: (B, S) or None.
            layers: Transformer layers, the lowest is 1; with or without a codebook.
            source: "student": the layer's output, as in `hidden_states`. "teacher": the output of the layer's
                feed-forward network, which is what the codebooks cluster once it is normalised over time (paper,
                Section 3.1).

        Returns:
            (L, B, T, D), in the order of `layers`, in the dtype of the model.

        Raises:
            ValueError: For other inputs, layers or sources, and in training mode.
        """
        self._check_unmasked(input_values, attention_mask, source, "layer_features")
        layers = check_layers(self.config, layers, with_codebooks=False)
        encoder = self.dinosr.encoder if source == "student" else self.teacher
        frame_mask = self._frame_mask(attention_mask, self.config.num_frames(input_values.shape[1]))
        features = None if source == "student" else self.teacher.own_features(input_values, frame_mask)
        if features is None:
            convolved = self.dinosr.feature_extractor(input_values, frame_mask)
            features, _ = self.dinosr.feature_projection(convolved.transpose(1, 2))
        found: dict[int, torch.Tensor] = {}
        outputs = enumerate(encoder.run_layers(features, frame_mask), start=1)
        for number, (hidden_states, fed_forward) in itertools.islice(outputs, max(layers)):
            if number in layers:
                found[number] = hidden_states if source == "student" else fed_forward
        return torch.stack([found[layer] for layer in layers])

    @torch.no_grad()
    def encode_units(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layer: int = 5,
        source: str = "student",
        layers: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Acoustic units: one codeword a frame. An utterance's units do not depend on the padding of its batch.

        Args:
            input_values: (B, S), as for `DinoSRModel`.
            attention_mask: (B, S) or None.
            layer: Transformer layer whose codebook is asked for, the lowest is 1; the paper analyses that of layer 5
                of the base model's 12. Only the top `num_codebooks` layers have one.
            source: "student": the most probable codeword by that layer's prediction head on top of the student, from
                unmasked speech: each frame is decided by itself, and the whole student is computed whatever the
                layer. "teacher": the nearest codeword of that layer's codebook to the teacher's output, normalised
                over the utterance (equation 3): what the student learns to predict. The teacher is computed up to the
                highest layer asked for.
            layers: Several layers at once, instead of `layer`.

        Returns:
            Codes int64 (B, T), or with `layers` (L, B, T), -1 where there is padding; and lengths int64 (B,), frames
            of each utterance.

        Raises:
            ValueError: If a layer has no codebook, for other inputs or sources, and in training mode.
        """
        self._check_unmasked(input_values, attention_mask, source, "encode_units")
        chosen = check_layers(self.config, [layer] if layers is None else layers, with_codebooks=True)
        if attention_mask is not None and self.config.reference_padding:
            codes, lengths = self._units_one_by_one(input_values, attention_mask, chosen, source)
        else:
            codes, lengths = self._units(input_values, attention_mask, chosen, source)
        return codes[0] if layers is None else codes, lengths

    def _units(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor | None, layers: list[int], source: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if source == "student":
            hidden_states = self.dinosr(input_values, attention_mask).last_hidden_state
            frame_mask = self._frame_mask(attention_mask, hidden_states.shape[1])
            codes = self.student_units(hidden_states, layers)
        else:
            features = self.layer_features(input_values, attention_mask, layers, "teacher")
            frame_mask = self._frame_mask(attention_mask, features.shape[2])
            targets = normalize_over_time(features, frame_mask)
            codes = self.teacher_units(targets, layers)
        if frame_mask is None:
            return codes, torch.full(codes.shape[1:2], codes.shape[2], device=codes.device)
        return codes.masked_fill(~frame_mask, NO_UNIT), frame_mask.sum(dim=-1)

    def _units_one_by_one(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor, layers: list[int], source: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_units`, for models in which padding would reach into the frames beside it."""
        num_samples = attention_mask.long().sum(dim=-1)
        lengths = self.config.num_frames(num_samples)
        shape = (len(layers), len(input_values), self.config.num_frames(input_values.shape[1]))
        codes = torch.full(shape, NO_UNIT, device=input_values.device)
        for row, (samples, frames) in enumerate(zip(num_samples.tolist(), lengths.tolist(), strict=True)):
            if frames:
                alone, _ = self._units(input_values[row : row + 1, :samples], None, layers, source)
                codes[:, row, :frames] = alone[:, 0]
        return codes, lengths

    @torch.no_grad()
    def student_units(self, hidden_states: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
        """
        The most probable codeword of each frame by the prediction heads of some layers.

        Args:
            hidden_states: (..., D), the student's last layer.
            layers: Transformer layers that have a codebook, the lowest is 1.

        Returns:
            int64 (L, ...).

        Raises:
            ValueError: If a layer has no codebook.
        """
        first = self.config.codebook_layers[0]
        numbers = check_layers(self.config, layers, with_codebooks=True)
        return torch.stack([self.heads[layer - first](hidden_states).float().argmax(dim=-1) for layer in numbers])

    @torch.no_grad()
    def teacher_units(self, targets: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
        """
        The nearest codeword of each frame in the codebooks of some layers (paper, equation 3).

        Args:
            targets: (L, ..., D), the teacher's `layer_features`, normalised over time.
            layers: The L layers, which must have codebooks, the lowest is 1.

        Returns:
            int64 (L, ...).

        Raises:
            ValueError: If a layer has no codebook.
        """
        first = self.config.codebook_layers[0]
        numbers = [layer - first for layer in check_layers(self.config, layers, with_codebooks=True)]
        return self.codebooks.assign(targets.flatten(1, -2), numbers).view(targets.shape[:-1])
