"""Arguments that pre-training and fine-tuning have in common: help texts and allowed ranges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any

from .schedules import SCHEDULES

_HELP = {
    "audio_column": "Column of a dataset that holds the audio.",
    "step_seconds": "Seconds of audio in an optimizer step, over all processes and micro-batches",
    "micro_seconds": "Seconds of audio, padding included, in one forward pass of a process. Lower it if the device"
    " runs out of memory.",
    "speed_change": "Play each training utterance at a speed drawn in each epoch, from 1 - speed_change to 1 +"
    " speed_change, which changes voice and tempo",
    "learning_rate": "Peak learning rate, between warm-up and decay.",
    "schedule": "Learning rate after the warm-up. tri_stage (the paper): hold, then exponential decay; cosine: half a"
    " cosine; constant: hold.",
    "warmup_share": "Share of the steps during which the learning rate rises.",
    "hold_share": "Share of the steps during which the learning rate stays at its peak; it decays in the rest.",
    "final_lr_scale": "Final learning rate, as a share of the peak",
    "adam_beta2": "Decay of Adam's average of the squared gradients.",
    "adam_epsilon": "Epsilon of Adam.",
    "max_grad_norm": "Clip gradients to this norm; 0 (the paper): no clipping.",
    "num_threads": "Number of CPU threads of a process; 0: OMP_NUM_THREADS, or if that is not set, its share of the"
    " cores.",
}


def argument(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """Return a dataclass field with a help text and, if they are few, the allowed values; lists are copied."""
    metadata = {"help": text} | ({} if choices is None else {"choices": list(choices)})
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def shared_argument(name: str, default: Any, note: str | None = None) -> Any:
    """Return a dataclass field for an argument of both kinds of run; the help ends with the note in parentheses."""
    text = _HELP[name].removesuffix(".") + ("." if note is None else f" ({note}).")
    return argument(default, text, choices=tuple(SCHEDULES) if name == "schedule" else None)


def shared_rules(options: Any) -> list[tuple[bool, str, Any, str]]:
    """Return the ranges of the arguments that both kinds of run have, for `check_ranges`."""
    rules = {
        "schedule": (options.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
        "learning_rate": (options.learning_rate > 0, "more than 0"),
        "warmup_share": (0 <= options.warmup_share <= 1, "at least 0 and at most 1"),
        "hold_share": (
            options.hold_share >= 0 and options.warmup_share + options.hold_share <= 1,
            "at least 0, and at most 1 together with warmup_share",
        ),
        "final_lr_scale": (0 < options.final_lr_scale <= 1, "more than 0 and at most 1"),
        "adam_epsilon": (options.adam_epsilon > 0, "more than 0"),
        "adam_beta2": (0 <= options.adam_beta2 < 1, "at least 0 and less than 1"),
        "max_grad_norm": (options.max_grad_norm >= 0, "at least 0, where 0 turns clipping off"),
        "num_threads": (options.num_threads >= 0, "at least 0, where 0 is the process's share of the cores"),
    }
    return [(is_allowed, name, getattr(options, name), allowed) for name, (is_allowed, allowed) in rules.items()]
