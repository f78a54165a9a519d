"""
Collapse, announced: figures of a run that fall under their bounds, since when, and what usually helps.

A collapsed model has a falling loss: where all frames are alike, they are easy to predict. What tells are the
perplexities, the codewords in use, and the share of the energy that changes over time. docs/experiments.md has what
the default bounds were measured on.

`N` codebooks, `V` codewords.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from ..model.configuration_dinosr import DinoSRConfig

_TOO_FAST = "a lower learning_rate or a greater warmup_share"
_CODEWORDS = (
    "a lower codebook_decay for the first hundreds of steps (codebook_end_decay and codebook_end_decay_step bring it"
    " back), a greater step_seconds, so that more frames fall on a codeword, or"
    " codebook_revival_share=0.1, by which codewords out of use start anew"
)
_FRAMES = (
    f"{_TOO_FAST}; longer and cleaner utterances (min_seconds): in short ones the distance to the edge is the easiest"
    " to predict. The loss does not show it, as instance norm blows up what little is left"
)


class CollapseBounds(Protocol):
    """
    Under what a run counts as collapsed.

    Attributes:
        collapse_perplexity: Bound of target and prediction perplexities, as a share of V; 0: none.
        collapse_active: Bound of the codewords in use, as a share of V; 0: none. At or under `collapse_perplexity` it
            says nothing of its own: a perplexity is never more than the codewords in use.
        collapse_variation: Bound of the share of energy that changes over time, for the teacher's layers and the
            convolutions; 0: none.
        collapse_patience: Lines of metrics running.
    """

    collapse_perplexity: float
    collapse_active: float
    collapse_variation: float
    collapse_patience: int


class _Figure(NamedTuple):
    """A figure of `MetricSums.compute`, which bound it has, what usually helps, and whether each codebook has one."""

    key: str
    label: str
    bound: str
    advice: str
    is_per_codebook: bool = True


_FIGURES = (
    _Figure("target_perplexities", "target perplexity", "collapse_perplexity", f"{_CODEWORDS}; {_TOO_FAST}"),
    _Figure("prediction_perplexities", "prediction perplexity", "collapse_perplexity", _TOO_FAST),
    _Figure("codebook_active_codewords", "number of codewords in use", "collapse_active", _CODEWORDS),
    _Figure("target_variations", "variation over time of the teacher", "collapse_variation", _FRAMES),
    _Figure("feature_variation", "variation over time of the convolutions", "collapse_variation", _FRAMES, False),
)


@dataclass
class _Watch:
    """
    One figure of one codebook.

    Attributes:
        is_under: What was last said: True after a warning.
        since: Step of the first of the lines under the bound; None: there is none to speak of.
        num_lines: Lines running that contradict what was last said.
        value: The last value.
    """

    is_under: bool = False
    since: int | None = None
    num_lines: int = 0
    value: float = 0.0

    def see(self, step: int, value: float, is_under: bool, patience: int) -> bool:
        """Take in the value of a line; whether there is something new to say."""
        self.value = value
        if not is_under and not self.is_under:
            self.since = None
        elif self.since is None:
            self.since = step
        self.num_lines = self.num_lines + 1 if is_under != self.is_under else 0
        if self.num_lines < patience:
            return False
        self.is_under, self.num_lines = is_under, 0
        return True


def _number(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.3g}"


class CollapseMonitor:
    """
    Reads a run's lines of metrics and says what is new: a figure that fell under its bound, or that is back.

    A figure has fallen, or is back, once `collapse_patience` lines running say so. As long as nothing changes, there
    is silence. Keep the state in checkpoints, so that a resumed run neither repeats itself nor forgets.

    Args:
        config: Of the model.
        bounds: Shares of the codewords, a share of the energy, and lines running: the arguments of a run have them.
        grace_steps: Lines of these first steps do not count: codebooks start at random, and settle.

    Raises:
        ValueError: For values out of range.
    """

    def __init__(self, config: DinoSRConfig, bounds: CollapseBounds, *, grace_steps: int = 50) -> None:
        names = ("collapse_perplexity", "collapse_active", "collapse_variation")
        self._shares: dict[str, float] = {name: getattr(bounds, name) for name in names}
        for name, value in self._shares.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value} is out of range: it must be less than 1, and at least 0 (no bound).")
        self._patience = bounds.collapse_patience
        if self._patience < 1:
            raise ValueError(
                f"collapse_patience={self._patience} is out of range: it must be at least 1 line of metrics."
            )
        if grace_steps < 0:
            raise ValueError(f"grace_steps={grace_steps} is out of range: it must be at least 0.")
        self._codebook_size = config.codebook_size
        self._grace_steps = grace_steps
        first_layer = config.num_hidden_layers - config.num_codebooks + 1
        self._codebooks = [f"codebook {i + 1} (layer {first_layer + i})" for i in range(config.num_codebooks)]
        self._watches = {
            figure.key: [_Watch() for _ in range(config.num_codebooks if figure.is_per_codebook else 1)]
            for figure in _FIGURES
        }

    @property
    def has_collapsed(self) -> bool:
        """Whether a warning stands."""
        return any(watch.is_under for watches in self._watches.values() for watch in watches)

    def check(self, metrics: Mapping[str, Any]) -> list[str]:
        """
        Take in a line of metrics.

        Args:
            metrics: `step`, and what `MetricSums.compute` gives. Figures that the line lacks are left as they are; a
                line without a masked frame says nothing.

        Returns:
            What is new, mostly nothing; a text for each figure that fell, with all codebooks it fell in, and for each
            one that is back.
        """
        step, num_frames = int(metrics["step"]), metrics.get("masked_frames", math.inf)
        if step <= self._grace_steps or not num_frames:
            return []
        texts: list[str] = []
        for figure in _FIGURES:
            if figure.key in metrics and self._shares[figure.bound]:
                values = metrics[figure.key] if figure.is_per_codebook else [metrics[figure.key]]
                texts += self._check_figure(figure, step, values, self._bound(figure, num_frames))
        return texts

    def _bound(self, figure: _Figure, num_frames: float = math.inf) -> float:
        share = self._shares[figure.bound]
        # A few frames cannot fall on more codewords than there are of them.
        return share if figure.bound == "collapse_variation" else share * min(self._codebook_size, num_frames)

    def _check_figure(self, figure: _Figure, step: int, values: Sequence[float], bound: float) -> Iterator[str]:
        watches = self._watches[figure.key]
        news = [
            number
            for number, (watch, value) in enumerate(zip(watches, values, strict=True))
            # What is no number is no sign of health.
            if watch.see(step, value, not value >= bound, self._patience)
        ]
        if fallen := [number for number in news if watches[number].is_under]:
            yield f"Step {step:,}: {self._describe(figure, fallen)}"
        for number in news:
            if not watches[number].is_under:
                yield (
                    f"Step {step:,}: {self._name(figure, number)} is back at {_number(watches[number].value)}, over"
                    f" its bound of {_number(bound)}, which it was under since step {watches[number].since:,}."
                )
                watches[number].since = None

    def _name(self, figure: _Figure, number: int) -> str:
        return f"{figure.label}, {self._codebooks[number]}," if figure.is_per_codebook else figure.label

    def _describe(self, figure: _Figure, numbers: Sequence[int]) -> str:
        """What fell, in which codebooks, how far, since when, and what usually helps."""
        share, watches = self._shares[figure.bound], self._watches[figure.key]
        where = [f"{self._codebooks[number]} " if figure.is_per_codebook else "" for number in numbers]
        fallen = "; ".join(
            f"{place}at {_number(watches[number].value)} since step {watches[number].since:,}"
            for place, number in zip(where, numbers, strict=True)
        )
        of_what = "" if figure.bound == "collapse_variation" else f" of {self._codebook_size} codewords"
        return (
            f"the run looks collapsed. The {figure.label} is under {_number(self._bound(figure))}"
            f" ({figure.bound}={share}{of_what}): {fallen}. What usually helps: {figure.advice}."
        )

    def standing(self) -> list[str]:
        """The warnings that stand, as they would be given now."""
        return [
            self._describe(figure, fallen)
            for figure in _FIGURES
            if (fallen := [i for i, watch in enumerate(self._watches[figure.key]) if watch.is_under])
        ]

    def state_dict(self) -> dict[str, list[dict[str, Any]]]:
        """What the lines so far have left behind, ready for JSON."""
        return {key: [asdict(watch) for watch in watches] for key, watches in self._watches.items()}

    def load_state_dict(self, state: Mapping[str, list[dict[str, Any]]]) -> None:
        """
        Go on where another monitor stopped. The bounds stay this one's.

        Raises:
            ValueError: If the state is of other figures or of another number of codebooks.
        """
        ours = {key: len(watches) for key, watches in self._watches.items()}
        theirs = {key: len(watches) for key, watches in state.items()}
        if ours != theirs:
            raise ValueError(
                f"The state is of {theirs}, but this monitor watches {ours}. Give a state of a run of the same model."
            )
        self._watches = {key: [_Watch(**watch) for watch in watches] for key, watches in state.items()}
