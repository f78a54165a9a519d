"""What the scripts share: arguments from a YAML file and flags over it, and errors that say what to change."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging


class ArgumentError(ValueError):
    """An argument that a run cannot work with; the message says which, and what to change."""


@contextmanager
def command(script: str | os.PathLike, *mendable: type[Exception]) -> Iterator[None]:
    """
    Do what a script is for: warnings are lines of text, and an error that its user can mend is one too.

    Args:
        script: Path of the script, `__file__`.
        *mendable: Errors whose message says what to change; left out, ValueError, OSError and ImportError.

    Raises:
        SystemExit: For such an error, with `script: message`, so that the exit status is 1. Others are passed on.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    downloads_are_shown = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # of loading weights, and with it the Hub's
    if downloads_are_shown:
        enable_progress_bars()
    kinds = mendable or (ValueError, OSError, ImportError)
    try:
        yield
    except kinds as error:
        sys.exit(f"{Path(script).name}: {error}")


def refuse_unknown(
    names: Iterable[Any], known: Sequence[str], kind: str = "argument", where: str | os.PathLike | None = None
) -> None:
    """
    Refuse the first name that is not known.

    Args:
        names: What a user has written.
        known: What there is.
        kind: What a name is called in the error.
        where: The place of the names, for the error.

    Raises:
        ArgumentError: Names it, and the nearest that is known.
    """
    place = "" if where is None else f"{where}: "
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise ArgumentError(f"{place}{name} is no {kind}. The nearest is {near}.")


def read_yaml(path: Path, known: Sequence[str], kind: str = "argument") -> dict[str, Any]:
    """
    Read a YAML file of lines `key: value`.

    Args:
        path: The file.
        known: The keys that it may have.
        kind: What a key is called in errors.

    Raises:
        ArgumentError: If it is no such file, or has another key; the message names the nearest.
    """
    if not path.is_file():
        raise ArgumentError(f"{path} is not a file. Give the path of a YAML file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ArgumentError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, Mapping):
        raise ArgumentError(f"{path} must be lines of `key: value`, but holds a {type(content).__name__}.")
    refuse_unknown(content, known, kind, where=path)
    return dict(content)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:  # argparse would print all flags and exit
        raise ArgumentError(f"{message}. --help lists all arguments.")


def _as_flags(key: str, value: Any) -> list[str]:
    """A line of the file as words of a command line; none for what such words cannot say."""
    if value is None or value == []:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    # In one word, since a value may begin with a dash.
    return [f"--{key}={json.dumps(value) if isinstance(value, Mapping) else value}"]


def _file_and_flags(
    argv: Sequence[str], groups: Sequence[Any], default_config: str | Path | None
) -> tuple[list[str], dict[str, Any], list[str]]:
    """The known keys, what the file says, and the flags."""
    known = [spec.name for group in groups for spec in dataclasses.fields(group) if spec.init]
    flags = list(argv)
    path = default_config
    if flags and not flags[0].startswith("-"):
        path = flags.pop(0)
    return known, {} if path is None else read_yaml(Path(path), known), flags


def _names_of(flags: Sequence[str]) -> set[str]:
    return {flag[2:].partition("=")[0] for flag in flags if flag.startswith("--")}


def explicit_names(argv: Sequence[str], groups: Sequence[Any], default_config: str | Path | None = None) -> set[str]:
    """
    The arguments that a command line has, in its file or its flags; others are at their defaults.

    Args:
        argv: As for `parse_groups`, which should have found no fault in it.
        groups: The same.
        default_config: The same.
    """
    _, from_file, flags = _file_and_flags(argv, groups, default_config)
    return {*from_file, *_names_of(flags)}


def parse_groups(argv: Sequence[str], groups: Sequence[Any], default_config: str | Path | None = None) -> list[Any]:
    """
    Read a command line into dataclasses: a YAML file first, if there is one, and flags over it.

    Args:
        argv: First, if given, the path of a YAML file; then flags, `--name value`.
        groups: Dataclasses; no two have a field of the same name.
        default_config: The YAML file that counts where none is given; None: none.

    Returns:
        An object of each group; fields that neither file nor flags have are at their defaults.

    Raises:
        ArgumentError: For an unknown key (the message names the nearest), a value of the wrong type, and what the
            dataclasses refuse.
    """
    known, from_file, flags = _file_and_flags(argv, groups, default_config)
    as_flags: list[str] = []
    for key, value in from_file.items():
        as_flags += _as_flags(key, value)
    try:
        *parsed, unknown = _Parser(groups, allow_abbrev=False).parse_args_into_dataclasses(
            args=[*as_flags, *flags], look_for_args_file=False, return_remaining_strings=True
        )
    except ArgumentError:
        raise
    except ValueError as error:  # what the dataclasses object to by themselves, as TrainingArguments does
        raise ArgumentError(str(error)) from error
    for text in unknown:
        if not text.startswith("-"):
            raise ArgumentError(f"{text} belongs to no argument.")
        refuse_unknown([text.lstrip("-").partition("=")[0]], known)
    named = _names_of(flags)
    for key, value in from_file.items():
        if (value is None or value == []) and key not in named:
            owner = next(group for group in parsed if hasattr(group, key))
            setattr(owner, key, value)
    return parsed


def check_ranges(rules: Sequence[tuple[bool, str, Any, str]]) -> None:
    """
    Refuse the first value that is out of range.

    Args:
        rules: (whether it holds, name of the argument, its value, what is allowed).

    Raises:
        ArgumentError: Names the argument, its value and what is allowed.
    """
    for holds, name, value, allowed in rules:
        if not holds:
            raise ArgumentError(f"{name}={value} is out of range: it must be {allowed}.")
