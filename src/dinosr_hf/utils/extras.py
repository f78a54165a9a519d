"""Optional packages, imported where they are used; the error says which extra to install."""

from __future__ import annotations

import importlib
from typing import Any


def import_extra(module: str, extra: str, purpose: str = "This") -> Any:
    """
    Import a module, by its full name, of an optional package that our `extra` installs.

    Raises `ImportError` with the command that installs it; `purpose` is the subject of the message, what needs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{purpose} needs {module}: pip install "dinosr-hf[{extra}]"') from error
