"""Load the model that fine-tuning starts from: a checkpoint's student or teacher, with a new head or adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..model.configuration_dinosr import DinoSRConfig
from ..model.modeling_dinosr import DinoSRForPreTraining, DinoSRPreTrainedModel
from ..utils.command_line import ArgumentError, argument_errors
from ..utils.model_folder import has_codebooks, open_dinosr_config, open_weights
from .finetuning_arguments import InitialModelArguments


def check_initial_model(arguments: InitialModelArguments) -> DinoSRConfig:
    """Return the configuration of the model to start from. Raises `ArgumentError` if it is no DinoSR's."""
    with argument_errors("model="):
        config = open_dinosr_config(arguments.model)
    return config


@torch.no_grad()
def _copy_teacher(model: DinoSRPreTrainedModel, name: str, config: DinoSRConfig) -> None:
    """Overwrite the student's weights with those of the checkpoint's teacher."""
    if not has_codebooks(config):
        kind = ", ".join(config.architectures or ["model"])
        raise ArgumentError(
            f"network=teacher needs a pre-training checkpoint, but {name} is a {kind} without a teacher. Set"
            " network=student."
        )
    with argument_errors("network=teacher of model="):
        checkpoint = open_weights(DinoSRForPreTraining, name)
    for averaged, own in checkpoint.teacher.parameter_pairs(model.base_model):
        own.copy_(averaged)


def _set_eval_mode(encoder: nn.Module, args: Any) -> None:
    encoder.eval()


def load_initial_model(
    model_class: type[DinoSRPreTrainedModel], arguments: InitialModelArguments, changes: dict[str, Any]
) -> DinoSRPreTrainedModel:
    """
    Load a checkpoint with a head, in float32, with the parts frozen that the arguments freeze.

    `changes` are further changes of the configuration, which follow from the labels. Raises `ArgumentError` if the
    checkpoint cannot be opened, is not a DinoSR, does not have the requested teacher, or does not allow the changes.
    """
    name, changes = arguments.model, {**arguments.config_changes(), **changes}
    config = check_initial_model(arguments)
    with argument_errors():  # `from_pretrained` would set the changes without looking at them
        changed = DinoSRConfig(**{**config.to_diff_dict(), **changes})
    with argument_errors("model="):
        if arguments.from_scratch:
            model = model_class(changed)
        else:
            # A vocabulary other than that of a fine-tuned checkpoint needs a new head, with a warning.
            options = {"dtype": torch.float32, "ignore_mismatched_sizes": True, **changes}
            model = open_weights(model_class, name, may_lack=rf"(?!{model_class.base_model_prefix}\.)", **options)
    if arguments.network == "teacher":
        _copy_teacher(model, name, config)
    if arguments.freeze_feature_encoder and not arguments.from_scratch:
        model.freeze_feature_encoder()
    if arguments.freeze_encoder:
        model.freeze_base_model()
        # `Trainer` sets training mode for the whole model in each step.
        model.base_model.register_forward_pre_hook(_set_eval_mode)
    return model


def renew_head(model: DinoSRPreTrainedModel) -> None:
    """Give the layer that scores labels random weights."""
    head: nn.Module = getattr(model, "lm_head", None) or model.get_submodule("classifier")
    for weight in head.parameters():
        weight._is_hf_initialized = False  # type: ignore[attr-defined] # or transformers would keep it
    model._init_weights(head)


def add_adapters(model: DinoSRPreTrainedModel, arguments: InitialModelArguments) -> Any:
    """Wrap a model with PEFT's low-rank adapters (arXiv 2106.09685); all of the head stays trainable."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("lora_rank needs peft: pip install peft") from error
    if list(model.parameters(recurse=False)):
        raise ArgumentError(
            "lora_rank does not work with use_weighted_layer_sum: PEFT trains and saves whole layers of a head, and"
            " the weights of the sum are not a layer. Set lora_rank to 0, or use_weighted_layer_sum to false."
        )
    names = [name for name, _ in model.named_modules()]
    for target in arguments.lora_targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ArgumentError(
                f"lora_targets has {target}, but the model has no layer of that name. Try q_proj, v_proj, out_proj."
            )
    head = [name for name, _ in model.named_children() if name != model.base_model_prefix and name != "dropout"]
    rank, alpha, targets = arguments.lora_rank, arguments.lora_alpha, arguments.lora_targets
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, modules_to_save=head)
    return peft.get_peft_model(model, settings)


def merge_adapters(model: Any) -> PreTrainedModel:
    """Return the model with its adapters, if any, merged into its weights."""
    return model if isinstance(model, PreTrainedModel) else model.merge_and_unload()
