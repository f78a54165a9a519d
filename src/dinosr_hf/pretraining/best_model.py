"""The model of the lowest held-out loss, and the end of a run that does not get lower."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..model.modeling_dinosr import DinoSRForPreTraining
from ..training.resume import find_checkpoints, step_of
from ..utils.files import remove
from ..utils.model_folder import open_weights, save_folder
from .run_folder import read_evaluations

logger = logging.getLogger(__name__)

PREFIX = "best-"


class BestModel:
    """
    Keeps the model of the lowest held-out loss in the folder `best-STEP` of a run, and says when the run should end.

    It also keeps the one that was the best at each checkpoint that there is, from which the run may be resumed.

    The losses are in `metrics.jsonl`, which a resumed run reads again. Only those of one held-out set are comparable
    and count: `eval_set`, the `HeldOut.digest`; None: that of the last. All processes make it and call its methods
    together.
    """

    def __init__(
        self, output_dir: str | os.PathLike, patience: int, accelerator: Accelerator, eval_set: str | None = None
    ) -> None:
        self._folder, self._patience, self._accelerator = Path(output_dir), patience, accelerator
        found = [read_evaluations(output_dir) if accelerator.is_main_process else {}]
        evaluations: dict[int, Mapping[str, Any]] = broadcast_object_list(found)[0]
        if evaluations and eval_set is None:
            eval_set = evaluations[max(evaluations)].get("set")
        self._evaluations = {step: own for step, own in evaluations.items() if own.get("set") == eval_set}

    @property
    def step(self) -> int:
        """Step of the lowest loss so far; 0: none was measured."""
        return self._lowest(max(self._evaluations, default=0))

    def _lowest(self, last_step: int, *in_memory: int) -> int:
        """
        Return the step of the lowest loss up to a step, where one that is no number is the highest; 0: none.

        With steps `in_memory`, only they and those whose model could be written count.
        """

        def order(step: int) -> tuple[float, int]:
            loss = float(self._evaluations[step]["loss"])
            return (math.inf if math.isnan(loss) else loss, step)

        steps = [step for step in self._evaluations if step <= last_step]
        if in_memory:
            steps = [step for step in steps if step in in_memory or self._path(step).exists()]
        return min(steps, key=order, default=0)

    @property
    def is_over(self) -> bool:
        """Whether the loss has not been lower for as many evaluations as the run's patience."""
        return sum(step > self.step for step in self._evaluations) >= self._patience

    def ended_at(self, step: int) -> bool:
        """Return whether the run was over when it had been evaluated after a step, its last."""
        return self.is_over and max(self._evaluations) == step

    def has(self, step: int) -> bool:
        """Return whether there was an evaluation after a step."""
        return step in self._evaluations

    def add(self, step: int, figures: Mapping[str, Any], model: DinoSRForPreTraining) -> None:
        """Add an evaluation, and keep the model if its loss is the lowest of those kept, beside the checkpoints'."""
        self._evaluations[step] = figures
        if not self._accelerator.is_main_process:
            return
        if self._lowest(step, step) == step:
            save_folder(model, self._path(step))
        starts = [step, *map(step_of, find_checkpoints(self._folder))]  # the run may go on from any of them
        kept = {self._path(self._lowest(start, step)) for start in starts}
        for other in set(self._folder.glob(f"{PREFIX}*")) - kept:
            remove(other)

    def restore(self, step: int, model: DinoSRForPreTraining) -> Mapping[str, Any]:
        """Load the kept model's weights into the model of a step, unless that is the best; return its figures."""
        self._accelerator.wait_for_everyone()
        best = self._lowest(step, step)
        if best != self._lowest(step):
            logger.warning("%s is missing: the run ends with the best of the others.", self._path(self.step))
        if best in (0, step):
            return self._evaluations.get(step, {})
        loss = float(self._evaluations[best]["loss"])
        logger.info("Step %d had the lowest held-out loss, %.4f: the run ends with its model.", best, loss)
        model.load_state_dict(open_weights(DinoSRForPreTraining, self._path(best)).state_dict())
        return self._evaluations[best]

    def _path(self, step: int) -> Path:
        return self._folder / f"{PREFIX}{step}"
