"""Optional packages, imported where they are used, and the one place that says what to install."""

from __future__ import annotations

import importlib
from typing import Any


def import_extra(module: str, extra: str, purpose: str = "This") -> Any:
    """
    Import a module that only an extra brings.

    Args:
        module: Its full name.
        extra: The extra of ours that has it.
        purpose: What needs it, to begin the error with.

    Raises:
        ImportError: If it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{purpose} needs {module}: pip install "dinosr-hf[{extra}]"') from error
