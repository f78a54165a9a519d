"""Command lines: arguments from a YAML file and flags over it, and errors that say what to change."""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import difflib
import io
import json
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from huggingface_hub import errors as hub_errors
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from .recipes import find_recipe, recipes
from .text_files import load_yaml

NetworkError: type[Exception] = hub_errors.HTTPError  # type: ignore[attr-defined] # of its HTTP client, whichever
MAX_NUMBER = 10**15  # of samples, or steps, which no run has


class ArgumentError(ValueError):
    """An argument that a run cannot work with; the message says which, and what to change."""


@contextmanager
def argument_errors(prefix: str = "", kinds: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """Raise errors of the body, of these kinds, as an `ArgumentError` with the same message."""
    try:
        yield
    except kinds as error:
        raise ArgumentError(f"{prefix}{error}") from error


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Escape characters for `codecs`, in JSON's way, so that JSON stays valid."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error("dinosr_escape", _escape)


def _print_anything() -> None:
    """Print characters that the encoding of stdout or stderr lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="dinosr_escape")


def _drops_output() -> bool:
    """Return whether stdout takes no more text; what it has not written is dropped, or Python would try again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return _has_no_reader()


def _has_no_reader() -> bool:
    """Return whether stdout is a pipe whose reader has gone. Without a buffer, a flush would not tell."""
    if not hasattr(select, "poll"):  # Windows
        return False
    pipe = select.poll()
    try:
        pipe.register(sys.stdout.fileno(), 0)
    except OSError:  # no file, as in notebooks
        return False
    return any(event & select.POLLERR for _, event in pipe.poll(0))


def program(script: str | os.PathLike) -> str:
    """Return what the user typed: `dinosr subcommand`, or the name of a script, whose `__file__` is given."""
    typed = Path(sys.argv[0]).name
    return typed if typed.startswith("dinosr ") else Path(script).name


@contextmanager
def command(script: str | os.PathLike, *user_errors: type[Exception]) -> Iterator[None]:
    """
    Run the body of a script, with warnings as lines of text and user errors as one line instead of a traceback.

    From here on, characters that the terminal's encoding lacks are printed as escapes, such as `\\u00e9`.
    `script` is its `__file__`. User errors, by default ValueError, OSError and ImportError, and errors of the network
    end it with the line `program: message` and exit status 1, Ctrl-C without a line; others are passed on. An error of
    stdout, such as a full disk, ends it in the same way; if the reader of stdout has gone, as `head` goes, it ends
    with status 1 and without a message.
    """
    _print_anything()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    shows_downloads = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # of loading weights, but it disables the Hub's too
    if shows_downloads:
        enable_progress_bars()
    caught = (*(user_errors or (ValueError, OSError, ImportError)), NetworkError)  # which is no OSError
    handled: tuple[type[Exception], ...] = (OSError, *caught)
    try:
        yield
        if sys.stdout is not None:  # as `>&-` leaves it
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except handled as error:
        is_of_stdout = isinstance(error, OSError) and sys.stdout is not None and _drops_output()
        if is_of_stdout and isinstance(error, BrokenPipeError):
            sys.exit(1)
        if not is_of_stdout and not isinstance(error, caught):
            raise
        sys.exit(f"{program(script)}: {'stdout: ' if is_of_stdout else ''}{error}")


def refuse_unknown(
    names: Iterable[Any], known: Sequence[str], kind: str = "argument", where: str | os.PathLike | None = None
) -> None:
    """Raise `ArgumentError` for the first name that is not known, with the nearest known one and where the name is."""
    for name in names:
        if name not in known:
            place = "" if where is None else f"{where}: "
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            advice = f"The nearest is {nearest[0]}." if nearest else "There are none."
            raise ArgumentError(f"{place}{name} is not a known {kind}. {advice}")


def _expand_home(value: Any) -> Any:
    """Replace ~ at the beginning of a path, which a shell does neither in files nor behind an equals sign."""
    if isinstance(value, list):
        return [_expand_home(part) for part in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def read_yaml(path: Path, known: Sequence[str], kind: str = "argument") -> dict[str, Any]:
    """Read a YAML file of lines `key: value`. Raises `ArgumentError` if it is no such file, or has another key."""
    if not path.is_file():
        raise ArgumentError(f"{path} is not a file. Give the path of a YAML file.")
    with argument_errors():
        content = load_yaml(path) or {}
    if not isinstance(content, Mapping):
        raise ArgumentError(f"{path} must be lines of `key: value`, but holds a {type(content).__name__}.")
    refuse_unknown(content, known, kind, where=path)
    return {name: _expand_home(value) for name, value in content.items()}


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show the defaults, and the description as it is written."""


class Parser(HfArgumentParser):
    """
    The parser of a command: a YAML file first, if any, then flags, which take precedence over it.

    Args:
        description: Text above the arguments in `--help`.
        groups: Dataclasses whose fields are flags, no two of the same name. The YAML file may be a recipe then.
        takes_file: Whether there may be a file. It changes the help alone; the command reads the words.
    """

    def __init__(self, description: str | None, groups: Sequence[Any] = (), *, takes_file: bool = True) -> None:
        may_come = "A YAML file with some of these arguments may come first: name: value."
        super().__init__(
            groups,
            prog=program(sys.argv[0]),
            description=description,
            usage="%(prog)s [RECIPE or FILE.yaml] [--flag value ...]" if groups else None,
            epilog=may_come if takes_file and not groups else None,
            formatter_class=_Formatter if groups else argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for action in self._actions:
            if action.option_strings[0] == f"--no_{action.dest}":  # it repeats the help of the flag that it negates
                action.help = argparse.SUPPRESS

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument; one of "store_true" gets a twin, `--no_name`, which takes precedence over a file's true."""
        action = super().add_argument(*names, **options)
        if options.get("action") == "store_true":
            no_name = f"--no_{names[0].removeprefix('--')}"
            super().add_argument(no_name, dest=action.dest, action="store_false", help=argparse.SUPPRESS)
        return action

    def error(self, message: str) -> Any:
        """Raise `ArgumentError`, where argparse would print all flags and exit."""
        raise ArgumentError(f"{message}. --help lists all arguments.")

    def arguments(self) -> dict[str, argparse.Action]:
        """Return the arguments by their names in a YAML file, those with a flag without its dashes."""
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
        return {next(iter(action.option_strings), action.dest).removeprefix("--"): action for action in shown}

    def set_defaults_from(self, path: Path) -> None:
        """Take what a YAML file says for arguments that are not given; those without a flag get one of their name."""
        known = self.arguments()
        for name, value in read_yaml(path, [*known]).items():
            action, values = known[name], [str(part) for part in (value if isinstance(value, list) else [value])]
            if value in (None, []):
                continue
            if action.nargs == 0:
                if not isinstance(value, bool):
                    raise ArgumentError(f"{path}: {name}={value} must be true or false.")
                action.default = value
            elif action.nargs is None and len(values) > 1:
                raise ArgumentError(f"{path}: {name} takes one value, but has {len(values)}.")
            else:
                with argument_errors(f"{path}: ", (argparse.ArgumentError,)):
                    action.default = self._get_values(action, values)
            action.required = False
            if not action.option_strings:  # now it is a flag, and the words are those that the file lacks
                action.option_strings = [f"--{name}"]
                self._option_string_actions[f"--{name}"] = action


def _as_flags(key: str, value: Any) -> list[str]:
    """Turn a line of the file into words of a command line; none for values that words cannot express."""
    if value is None or value == []:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    # In one word, since a value may begin with a dash.
    return [f"--{key}={json.dumps(value) if isinstance(value, Mapping) else value}"]


def plain_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with flags as `--output_dir`, however typed, and ~ as the home folder."""
    plain = []
    for word in words:
        name, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
        flag = f"--{name[2:].replace('-', '_')}{sign}" if name else ""
        plain.append(flag + _expand_home(value))
    return plain


def _refuse_rest(words: Sequence[str], known: Sequence[str]) -> None:
    """Refuse the first of the words that no argument has taken."""
    for word in words:
        if not word.startswith("-"):
            raise ArgumentError(f"{word} does not belong to any argument. Flags are --name value.")
        refuse_unknown([word.lstrip("-").partition("=")[0]], known)


class CommandLine(NamedTuple):
    """The words of a command line of arguments."""

    known: list[str]  # names of the arguments
    from_file: dict[str, Any]  # the content of the YAML file
    has_own_file: bool  # whether the file is named, and not the default
    flags: list[str]

    @property
    def flag_names(self) -> set[str]:
        """Names of the arguments that flags set: of --no_streaming it is streaming."""
        names = {flag[2:].partition("=")[0] for flag in self.flags if flag.startswith("--")}
        return {name if name in self.known else name.removeprefix("no_") for name in names}

    @property
    def typed_names(self) -> set[str]:
        """Names of the arguments that flags or the named file set."""
        return {*(self.from_file if self.has_own_file else ()), *self.flag_names}


def read_command_line(
    argv: Sequence[str], groups: Sequence[Any], default_config: str | Path | None = None
) -> CommandLine:
    """Read the words and the file of a command line for `parse_groups`, which has the arguments and errors."""
    known = [spec.name for group in groups for spec in dataclasses.fields(group) if spec.init]
    path, flags = default_config, plain_words(argv)
    has_own_file = bool(flags) and not flags[0].startswith("-")
    if has_own_file:
        name = flags.pop(0)
        if (path := find_recipe(name)) is None:
            names = ", ".join(recipes())
            raise ArgumentError(f"{name} is neither a YAML file nor a recipe. The recipes are {names}.")
    return CommandLine(known, {} if path is None else read_yaml(Path(path), known), has_own_file, flags)


def _check_value(name: str, value: Any) -> None:
    """Refuse numbers that no argument can have, whose products would not be numbers, and an output without a name."""
    if value == "" and name in ("output", "output_dir"):
        raise ArgumentError(f"{name} is empty, as a shell variable is that was not set. Give a path.")
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int | float) and not -MAX_NUMBER <= number <= MAX_NUMBER:
            raise ArgumentError(f"{name}={number} is out of range: it must be a finite number up to {MAX_NUMBER:.0e}.")
    if name == "seed" and isinstance(value, int):
        check_ranges([(0 <= value < 2**32, name, value, "at least 0 and less than 2 ** 32")])


def parse_options(parser: Parser, argv: Sequence[str], **least: int) -> argparse.Namespace:
    """
    Parse a command line; exit with one line for what the parser refuses, and for a number such as nan.

    If the first word ends in .yaml, it is a file of arguments. `least` has the least value of the options that need
    one, by name. Of lists of integers, or of choices, each value counts once.
    """
    words = plain_words(argv)
    try:
        if words and words[0].endswith((".yaml", ".yml")):
            parser.set_defaults_from(Path(words.pop(0)))
        options, rest = parser.parse_known_args(words)
        _refuse_rest(rest, [*parser.arguments()])
        for action in parser.arguments().values():
            values = getattr(options, action.dest, None)
            if isinstance(values, list) and (action.choices or action.type is int):
                setattr(options, action.dest, list(dict.fromkeys(values)))
        for name, value in vars(options).items():
            _check_value(name, value)
            if name in least and value is not None:
                check_ranges([(value >= least[name], name, value, f"at least {least[name]}")])
    except ArgumentError as error:
        sys.exit(f"{parser.prog}: {error}")
    return options


def _set_empty(group: Any, key: str, value: list[Any] | None) -> None:
    hint = get_type_hints(type(group))[key]
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in kinds:
        setattr(group, key, None)
    elif any(get_origin(kind) is list for kind in kinds):
        setattr(group, key, [])
    else:
        raise ArgumentError(f"{key} has no value. Give it one, or leave out its line.")


def parse_groups(
    argv: Sequence[str],
    groups: Sequence[Any],
    default_config: str | Path | None = None,
    *,
    description: str | None = None,
) -> list[Any]:
    """
    Parse a command line into an object of each dataclass.

    Args:
        argv: YAML file or recipe, optional, then flags, `--name value`, which take precedence over it.
        groups: Dataclasses; no two have a field of the same name.
        default_config: Path of the YAML file to use if `argv` has none; None: no file.
        description: Text above the arguments in `--help`.

    Raises:
        ArgumentError: For an unknown key (the message names the nearest), a value of the wrong type, and what the
            dataclasses refuse.
    """
    line = read_command_line(argv, groups, default_config)
    words = [word for key, value in line.from_file.items() for word in _as_flags(key, value)]
    with argument_errors():  # a dataclass may refuse values itself, as TrainingArguments does
        *parsed, rest = Parser(description, groups).parse_args_into_dataclasses(
            args=[*words, *line.flags], look_for_args_file=False, return_remaining_strings=True
        )
    for group in parsed:
        for spec in dataclasses.fields(group):
            _check_value(spec.name, getattr(group, spec.name))
    _refuse_rest(rest, line.known)
    for key in line.from_file.keys() - line.flag_names:
        if line.from_file[key] in (None, []):  # which words cannot express
            _set_empty(next(group for group in parsed if hasattr(group, key)), key, line.from_file[key])
    return parsed


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise `ValueError`, with the choices, unless the value of the argument `name` is one of them."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown. Choose one of {', '.join(choices)}.")


def check_ranges(rules: Iterable[tuple[bool, str, Any, str]]) -> None:
    """Refuse the first value that is not allowed: rules are (is allowed, name, value, what is allowed)."""
    for is_allowed, name, value, allowed in rules:
        if not is_allowed:
            raise ArgumentError(f"{name}={value} is out of range: it must be {allowed}.")


def refuse_unused(
    options: Any, default_of: Callable[[str], Any], names: Iterable[str], reason: str, way_out: str
) -> None:
    """Refuse the first of the named options that has another value than by default, since it would have no effect."""
    for name in names:
        if (value := getattr(options, name)) != default_of(name):
            raise ArgumentError(f"{name}={value} is set, but {reason}. Leave {name} out, or {way_out}.")
