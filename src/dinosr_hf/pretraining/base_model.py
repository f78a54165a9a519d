"""The model that a run starts with: random weights, or a model that was trained before."""

from __future__ import annotations

import logging

import torch

from ..model.configuration_dinosr import DinoSRConfig
from ..model.modeling_dinosr import DinoSRForPreTraining, DinoSRModel
from ..utils.command_line import argument_errors
from ..utils.model_folder import has_codebooks, open_dinosr_config, open_weights
from .pretraining_arguments import CODEBOOK_SIZES, PretrainingArguments

logger = logging.getLogger(__name__)


# What a checkpoint lacks if it begins with this run: the count of codewords in use, which revival needs, and the front
# end of the teacher's own that `freeze_mode` gives it.
_MAY_LACK = r"codebooks\.usage$|teacher\.feature_(extractor|projection)\."


def _continued(name: str, base: DinoSRConfig, config: DinoSRConfig, parts: tuple[str, ...]) -> DinoSRForPreTraining:
    """Return a model with those parts of a pre-training checkpoint, whose codebooks may have other sizes than its."""
    sizes = {size: getattr(base, size) for size in CODEBOOK_SIZES}
    own = DinoSRConfig(**{**config.to_dict(), **sizes, "num_anchor_labels": 0})
    before = open_weights(DinoSRForPreTraining, name, may_lack=_MAY_LACK, config=own, dtype=torch.float32)
    kept = {key: value for key, value in before.state_dict().items() if key.startswith(parts)}
    model = DinoSRForPreTraining(config)
    missing, _ = model.load_state_dict(kept, strict=False)
    assert not any(key.startswith(parts) for key in missing), missing
    return model


def keeps_codebooks(arguments: PretrainingArguments) -> bool:
    """Return whether a run goes on with its base model's codebooks. Raises `ArgumentError` if that cannot be read."""
    config, name = arguments.model_config(), arguments.run.base_model
    if name is None or arguments.run.new_codebooks:
        return False
    with argument_errors("base_model="):
        base = open_dinosr_config(name)
    return has_codebooks(base) and all(getattr(base, size) == getattr(config, size) for size in CODEBOOK_SIZES)


def initial_model(arguments: PretrainingArguments) -> DinoSRForPreTraining:
    """
    Build the model of a run before its first step.

    A `base_model` from pre-training keeps its student, teacher, heads and codebooks; with `new_codebooks`, student and
    teacher. From any other model, and from one with codebooks of other sizes, only the network is taken: the teacher
    is a copy of it, and heads and codebooks start anew. The anchor's head always starts anew: another run's clusters
    have other numbers. Schedules start at step 0 in any case. Raises `ArgumentError` if `base_model` cannot be read.
    """
    config, name = arguments.model_config(), arguments.run.base_model
    if name is None:
        return DinoSRForPreTraining(config)
    with argument_errors("base_model="):
        base = open_dinosr_config(name)
        is_pretraining = has_codebooks(base)
        if is_pretraining and arguments.run.new_codebooks:
            logger.info("Starting from network and teacher of %s; heads and codebooks start anew.", name)
            return _continued(name, base, config, ("dinosr.", "teacher."))
        if keeps_codebooks(arguments):
            anew = "; the anchor's head starts anew" if config.num_anchor_labels or base.num_anchor_labels else ""
            logger.info("Starting from %s, with its teacher, heads and codebooks%s.", name, anew)
            return _continued(name, base, config, ("dinosr.", "teacher.", "heads.", "codebooks."))
        network = open_weights(DinoSRModel, name, config=config, dtype=torch.float32)
    reason = "its codebooks have other sizes" if is_pretraining else "it has no codebooks"
    logger.info("Starting from the network of %s; %s, so teacher, heads and codebooks start anew.", name, reason)
    model = DinoSRForPreTraining(config)
    model.dinosr.load_state_dict(network.state_dict())
    with torch.no_grad():
        for own, live in model.teacher.parameter_pairs(model.dinosr):
            own.copy_(live)
    return model
