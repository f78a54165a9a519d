"""The model that fine-tuning starts from: a checkpoint's student or teacher under a new head, or with adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..model.configuration_dinosr import DinoSRConfig
from ..model.modeling_dinosr import DinoSRForPreTraining, DinoSRPreTrainedModel
from ..utils.command_line import ArgumentError
from ..utils.model_folder import open_dinosr_config
from .finetuning_arguments import StartArguments


def _read_config(name: str) -> DinoSRConfig:
    try:
        return open_dinosr_config(name)
    except ValueError as error:
        raise ArgumentError(f"model={error}") from error


@torch.no_grad()
def _take_teacher(model: DinoSRPreTrainedModel, name: str, config: DinoSRConfig) -> None:
    """Put the teacher of a pre-training checkpoint where the student is."""
    if "DinoSRForPreTraining" not in (config.architectures or []):
        kinds = ", ".join(config.architectures or ["nothing known"])
        raise ArgumentError(
            f"network=teacher needs a pre-training checkpoint, but {name} has {kinds}. Use network=student."
        )
    pretrained = DinoSRForPreTraining.from_pretrained(name)
    for averaged, own in pretrained.teacher.pairs_with(model.base_model):
        own.copy_(averaged)


def _into_evaluation_mode(encoder: nn.Module, args: Any) -> None:
    encoder.eval()


def freeze_encoder(model: DinoSRPreTrainedModel) -> None:
    """Keep the encoder of a model as it is, and in evaluation mode also while `Trainer` trains the head."""
    model.freeze_base_model()
    model.base_model.register_forward_pre_hook(_into_evaluation_mode)


def load_model(
    model_class: type[DinoSRPreTrainedModel], arguments: StartArguments, changes: dict[str, Any]
) -> DinoSRPreTrainedModel:
    """
    The checkpoint under a head.

    Args:
        model_class: The head.
        arguments: The checkpoint, and what is changed of it; what they leave out stays as the checkpoint has it.
        changes: Further fields of the configuration: those of the labels.

    Returns:
        The model, in float32, all of it trainable but what is to be frozen.

    Raises:
        ArgumentError: If the checkpoint cannot be opened, is no DinoSR, has no teacher where that is asked for, or
            cannot be what it is changed to.
    """
    config = _read_config(arguments.model)
    changes = {**arguments.config_changes(), **changes}
    try:
        if arguments.from_scratch:
            model = model_class(DinoSRConfig(**{**config.to_diff_dict(), **changes}))
        else:
            # Another vocabulary than that of a fine-tuned checkpoint makes a new head, and transformers says so.
            model = model_class.from_pretrained(
                arguments.model, dtype=torch.float32, ignore_mismatched_sizes=True, **changes
            )
    except (OSError, ValueError) as error:  # the first: there are no weights
        raise ArgumentError(f"model={arguments.model}: {error}") from error
    if arguments.network == "teacher" and not arguments.from_scratch:
        _take_teacher(model, arguments.model, config)
    if arguments.freeze_feature_encoder and not arguments.from_scratch:
        model.freeze_feature_encoder()
    if arguments.freeze_encoder:
        freeze_encoder(model)
    return model


def add_adapters(model: DinoSRPreTrainedModel, arguments: StartArguments) -> Any:
    """
    PEFT's low-rank adapters (arXiv 2106.09685) around a model; its head goes on learning as a whole.

    Raises:
        ArgumentError: If the model has no layers of these names, or a learnt sum of its layers.
        ImportError: Without peft.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("lora_rank needs peft: pip install peft") from error
    if list(model.parameters(recurse=False)):
        raise ArgumentError(
            "lora_rank does not go with use_weighted_layer_sum: PEFT trains and keeps whole layers of a head, and the"
            " weights of that sum are none. Set one of them to 0 or false."
        )
    names = [name for name, _ in model.named_modules()]
    for target in arguments.lora_targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ArgumentError(f"lora_targets has {target}, but no layer is called so. Try q_proj, v_proj, out_proj.")
    head = [name for name, _ in model.named_children() if name != model.base_model_prefix and name != "dropout"]
    settings = peft.LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        target_modules=arguments.lora_targets,
        modules_to_save=head,
    )
    return peft.get_peft_model(model, settings)


def without_adapters(model: Any) -> PreTrainedModel:
    """The model with its adapters merged into the weights; a model without any, as it is."""
    return model if isinstance(model, PreTrainedModel) else model.merge_and_unload()
