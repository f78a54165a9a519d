"""The model that a run starts with: of random weights, or one that was trained before."""

from __future__ import annotations

import logging

import torch

from ..model.modeling_dinosr import DinoSRForPreTraining, DinoSRModel
from ..utils.command_line import ArgumentError
from ..utils.model_folder import open_dinosr_config
from .pretraining_arguments import CODEBOOK_SIZES, PretrainingArguments

logger = logging.getLogger(__name__)


def initial_model(arguments: PretrainingArguments) -> DinoSRForPreTraining:
    """
    The model of a run, before its first step.

    A `base_model` that pre-training has left goes on with its student, teacher, heads and codebooks. Of any other, and
    of one with codebooks of other sizes, the network is taken: the teacher is its copy, and heads and codebooks begin
    anew. Its schedules begin at step 0 in either case.

    Args:
        arguments: Of the run.

    Raises:
        ArgumentError: If `base_model` cannot be read.
    """
    config, name = arguments.model_config(), arguments.run.base_model
    if name is None:
        return DinoSRForPreTraining(config)
    try:
        base = open_dinosr_config(name)
        is_pretraining = "DinoSRForPreTraining" in (base.architectures or [])
        are_alike = all(getattr(base, size) == getattr(config, size) for size in CODEBOOK_SIZES)
        if is_pretraining and are_alike:
            logger.info("Starting from %s, with its teacher, heads and codebooks.", name)
            return DinoSRForPreTraining.from_pretrained(name, config=config, dtype=torch.float32)
        network = DinoSRModel.from_pretrained(name, config=config, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"base_model={name}: {error}") from error
    why = "its codebooks are of other sizes" if is_pretraining else "it has no codebooks"
    logger.info("Starting from the network of %s; %s, so teacher, heads and codebooks begin anew.", name, why)
    model = DinoSRForPreTraining(config)
    model.dinosr.load_state_dict(network.state_dict())
    with torch.no_grad():
        for own, live in model.teacher.pairs_with(model.dinosr):
            own.copy_(live)
    return model
