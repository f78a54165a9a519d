"""One place that says which extra to install."""

from __future__ import annotations

import importlib
from typing import Any


def import_extra(module: str, extra: str) -> Any:
    """
    Import a module that only an extra brings.

    Raises:
        ImportError: If it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} is needed here: pip install "dinosr-hf[{extra}]"') from error
