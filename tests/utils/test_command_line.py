"""Arguments from a file and flags over it, beside the tests of pre-training's arguments."""

import ast
import io
import json
import os
import re
import sys
from dataclasses import dataclass, field

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from dinosr_hf.utils.command_line import (
    ArgumentError,
    NetworkError,
    Parser,
    check_ranges,
    command,
    parse_groups,
    parse_options,
    read_command_line,
)
from scripts import ROOT


@dataclass
class Sound:
    rate: int = 16
    names: list[str] = field(default_factory=lambda: ["a"])
    marks: str = "'"
    limit: int | None = 5
    is_loud: bool = False
    options: dict | str | None = None


@dataclass
class Place:
    town: str = field(default="Bonn", metadata={"choices": ["Bonn", "Rome"]})


def parse(tmp_path, content, *flags):
    path = tmp_path / "a.yaml"
    path.write_text(content, encoding="utf-8")
    return parse_groups([str(path), *flags], (Sound, Place))


def test_flags_without_a_file():
    assert parse_groups(["--rate=8", "--town", "Rome"], (Sound, Place)) == [Sound(rate=8), Place("Rome")]


def test_flags_take_precedence_over_the_file(tmp_path):
    sound, place = parse(tmp_path, "rate: 3\ntown: Rome\nnames: [x, y]\n", "--rate", "4", "--names", "z")
    assert (sound.rate, sound.names, place.town) == (4, ["z"], "Rome")


@pytest.mark.parametrize(
    ("content", "name", "value"),
    [
        ('marks: "-\'"', "marks", "-'"),  # not a flag
        ('marks: "--rate=1"', "marks", "--rate=1"),
        ('marks: ""', "marks", ""),
        ("marks: a b = c", "marks", "a b = c"),
        ("limit: null", "limit", None),
        ("limit: -3", "limit", -3),
        ("names: []", "names", []),
        ("names: one", "names", ["one"]),
        ("is_loud: true", "is_loud", True),
        ("is_loud: no", "is_loud", False),
        ("marks: no", "marks", "no"),
        ("names: [no, 010]", "names", ["no", "010"]),
        ("", "rate", 16),
    ],
)
def test_values_of_a_file_keep_their_type(tmp_path, content, name, value):
    assert getattr(parse(tmp_path, content)[0], name) == value


def test_a_key_without_value(tmp_path):
    assert parse(tmp_path, "names:\nlimit:\n")[0] == Sound(names=[], limit=None)
    for content in ("rate:", "rate: null", "rate: []", "marks: ~"):
        with pytest.raises(ArgumentError, match=rf"^{content[:4]}s? has no value. Give it one, or leave out its line"):
            parse(tmp_path, f"{content}\n")


@pytest.mark.parametrize("flags", [["--limit", "7"], ["--limit=7"]], ids=["two words", "one word"])
def test_flags_take_precedence_over_null(tmp_path, flags):
    assert parse(tmp_path, "limit: null\n", *flags)[0].limit == 7


def test_a_mapping_reaches_training_arguments(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"output_dir: {tmp_path}\naccelerator_config: {{split_batches: true}}\n")
    (arguments,) = parse_groups([str(path)], (TrainingArguments,))
    assert arguments.accelerator_config.split_batches is True


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("rat: 1", [], r"a\.yaml: rat is not a known argument\. The nearest is rate"),
        ("", ["--tow=Rome"], r"tow is not a known argument\. The nearest is town"),
        ("", ["--rat", "1"], r"rat is not a known argument\. The nearest is rate"),  # abbreviations are refused
        ("rate: fast", [], "rate.*fast"),
        ("town: Paris", [], "town.*Paris"),
        ("3: 4", [], "3 is not a known argument"),
        ("text", [], "must be lines of `key: value`, but holds a str"),
    ],
    ids=["key", "flag", "abbreviation", "type", "choice", "number", "no table"],
)
def test_unreadable_arguments_are_named(tmp_path, content, flags, message):
    with pytest.raises(ArgumentError, match=message):
        parse(tmp_path, content, *flags)


def test_what_a_dataclass_refuses_is_an_argument_error(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--load_best_model_at_end", "true", "--eval_strategy", "epoch"]
    with pytest.raises(ArgumentError, match="save and eval strategy to match"):
        parse_groups(flags, (TrainingArguments,))


def test_the_first_value_out_of_range_is_named():
    rules = [(True, "a", 1, "odd"), (False, "b", 2, "odd"), (False, "c", 4, "odd")]
    with pytest.raises(ArgumentError, match=r"b=2 is out of range: it must be odd\."):
        check_ranges(rules)
    check_ranges(rules[:1])


@dataclass
class Noise:
    rooms: bool = field(default=True, metadata={"help": "Whether to add rooms."})


def test_help_begins_with_the_description_and_names_each_flag_once(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make.py", "--help"])
    with pytest.raises(SystemExit):
        parse_groups(["--help"], (Noise,), description="Make noise.\n\n    make.py loud.yaml\n")
    help_text = capsys.readouterr().out
    assert help_text.startswith(
        "usage: make.py [RECIPE or FILE.yaml] [--flag value ...]\n\nMake noise.\n\n    make.py loud.yaml\n\n"
    )
    assert help_text.count("Whether to add rooms. (default: True)") == 1 and "--no_rooms" not in help_text
    assert parse_groups(["--no_rooms"], (Noise,)) == [Noise(rooms=False)]


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError, ArgumentError])
def test_a_user_error_is_one_line(error):
    with pytest.raises(SystemExit, match=r"^say\.py: give another$"), command("/somewhere/say.py"):
        raise error("give another")


def test_errors_of_the_network_are_one_line_and_an_interruption_none():
    with pytest.raises(SystemExit, match=r"^say\.py: no route$"), command("say.py", ArgumentError):
        raise NetworkError("no route")
    with pytest.raises(SystemExit) as end, command("say.py"):
        raise KeyboardInterrupt
    assert end.value.code == 130


def test_other_errors_keep_their_traceback():
    with pytest.raises(KeyError), command("say.py"):
        raise KeyError("a bug")
    with pytest.raises(ValueError, match="a bug"), command("say.py", ArgumentError):
        raise ValueError("a bug")


@pytest.mark.parametrize("are_shown", [True, False])
def test_a_script_hides_the_bar_of_loading_weights_but_not_of_downloads(are_shown, monkeypatch):
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
    (enable_progress_bars if are_shown else disable_progress_bars)()
    try:
        with command("say.py"):
            pass
        assert not transformers_logging.is_progress_bar_enabled()
        assert are_progress_bars_disabled() != are_shown
    finally:
        enable_progress_bars()


def test_a_script_prints_what_the_terminal_cannot_show(monkeypatch):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    text = "é 日 😀 \udcff"
    with pytest.raises(UnicodeEncodeError):
        print(text)
    with command("say.py"):
        print(text)
        print(json.dumps({"text": text}, ensure_ascii=False), file=sys.stderr)
    print(text)  # after the command, too
    for stream in streams.values():
        stream.flush()
    shown, errors = (stream.buffer.getvalue().decode("ascii").splitlines() for stream in streams.values())
    assert shown == [r"\u00e9 \u65e5 \ud83d\ude00 \udcff"] * 2
    assert json.loads(errors[0]) == {"text": text}


def test_a_terminal_that_shows_everything_is_left_as_it_is(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    with command("say.py"):
        print("é 日 😀")
    stream.flush()
    assert stream.buffer.getvalue().decode("utf-8") == "é 日 😀\n"


@pytest.mark.parametrize("buffering", [-1, 0], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("errors", [(), (ArgumentError,)], ids=["usual errors", "arguments alone"])
def test_a_reader_that_has_gone_ends_a_script_without_a_word(monkeypatch, capfd, errors, buffering):
    read, write = os.pipe()
    os.close(read)
    with io.TextIOWrapper(open(write, "wb", buffering), write_through=buffering == 0) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as end, command("say.py", *errors):
            print("transcripts")
    assert end.value.code == 1 and capfd.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
@pytest.mark.parametrize("errors", [(), (ArgumentError,)], ids=["usual errors", "arguments alone"])
def test_output_that_does_not_fit_on_the_disk_is_an_error(monkeypatch, errors):
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        message = r"^say\.py: stdout: .*No space left on device$"
        with pytest.raises(SystemExit, match=message), command("say.py", *errors):
            print("transcripts")


MODULES = sorted((ROOT / "src" / "dinosr_hf" / "commands").glob("[a-z]*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.stem)
def test_all_modules_run_as_a_command(module):
    source = module.read_text(encoding="utf-8")
    assert len(re.findall(r"with (?:resumable_)?command\(__file__", source)) == 1
    help_text = ast.get_docstring(ast.parse(source))
    assert help_text.isascii()  # --help is printed before


def make_units_parser():
    parser = Parser("Make units.")
    parser.add_argument("model", help="folder")
    parser.add_argument("inputs", nargs="+", help="files")
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--layers", type=int, nargs="+", help="layers")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds")
    parser.add_argument("--form", choices=("npy", "pt"), help="format")
    parser.add_argument("--merge", action="store_true", help="merge runs")
    return parser


def parse_units(tmp_path, content, *flags):
    path = tmp_path / "units.yaml"
    path.write_text(content, encoding="utf-8")
    return parse_options(make_units_parser(), [str(path), *flags], seconds=1)


WHOLE = "model: m\ninputs: [a.wav, b.wav]\noutput_dir: out\nlayers: [5, 9]\nmerge: true\nform: null\n"


def test_a_file_may_have_all_arguments_of_any_command(tmp_path):
    expected = {"model": "m", "inputs": ["a.wav", "b.wav"], "output_dir": "out", "layers": [5, 9]}
    assert vars(parse_units(tmp_path, WHOLE)) == {**expected, "seconds": 3.0, "form": None, "merge": True}


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--layers", "3"], "layers", [3]),
        (["--output-dir=here"], "output_dir", "here"),
        (["--no_merge"], "merge", False),
        (["--model", "n"], "model", "n"),
        (["--inputs", "c.wav", "d.wav"], "inputs", ["c.wav", "d.wav"]),
        (["--form", "pt"], "form", "pt"),
    ],
)
def test_words_take_precedence_over_the_file_of_any_command(tmp_path, flags, name, value):
    assert getattr(parse_units(tmp_path, WHOLE, *flags), name) == value


def test_words_are_those_that_the_file_lacks(tmp_path):
    options = parse_units(tmp_path, "model: m\n", "a.wav", "b.wav", "--output_dir", "out")
    assert (options.model, options.inputs) == ("m", ["a.wav", "b.wav"])


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("layer: 5", [], r"a\.py: \S+units\.yaml: layer is not a known argument\. The nearest is layers\."),
        ("layers: five", [], r"a\.py: \S+units\.yaml: argument --layers: invalid int value: 'five'"),
        ("form: mp3", [], r"a\.py: \S+units\.yaml: argument --form: invalid choice: 'mp3'"),
        ("merge: 3", [], r"a\.py: \S+units\.yaml: merge=3 must be true or false\."),
        ("seconds: [1, 2]", [], r"a\.py: \S+units\.yaml: seconds takes one value, but has 2\."),
        ("model: a\nmodel: b", [], r"a\.py: \S+units\.yaml is not valid YAML: .*model"),
        ("seconds: 0.5\n" + WHOLE, [], r"a\.py: seconds=0\.5 is out of range: it must be at least 1\."),
        ("model: m", ["--output_dir", "o"], r"a\.py: the following arguments are required: inputs\. --help lists all"),
        (WHOLE, ["c.wav"], r"a\.py: c\.wav does not belong to any argument\. Flags are --name value\."),
        (WHOLE, ["--layer", "5"], r"a\.py: layer is not a known argument\. The nearest is layers\."),
    ],
    ids=["key", "type", "choice", "switch", "two values", "twice", "range", "missing", "word", "flag"],
)
def test_errors_of_any_command_are_one_line(tmp_path, monkeypatch, content, flags, message):
    monkeypatch.setattr(sys, "argv", ["/somewhere/a.py"])
    with pytest.raises(SystemExit, match=f"^{message}") as end:
        parse_units(tmp_path, content, *flags)
    assert "\n" not in str(end.value)


def test_home_is_written_out_in_files_and_behind_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    content = "inputs: [~/a.wav, b~/c.wav]\noutput_dir: ~/out\nmodel: m\n"
    options = parse_units(tmp_path, content)
    assert (options.inputs, options.output_dir) == (["/home/ann/a.wav", "b~/c.wav"], "/home/ann/out")
    assert parse_units(tmp_path, content, "--output-dir=~/other").output_dir == "/home/ann/other"
    assert parse(tmp_path, "names: [~/a]\n")[0].names == ["/home/ann/a"]
    assert parse(tmp_path, "", "--names", "~/b")[0].names == ["/home/ann/b"]


def test_a_value_counts_once_in_a_list_of_choices(tmp_path):
    parser = Parser("")
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--kinds", choices=["a", "b"], nargs="+")
    parser.add_argument("--data", nargs="+")
    words = ["--layers", "2", "1", "2", "--kinds", "b", "b", "--data", "x", "x"]
    assert vars(parse_options(parser, words)) == {"layers": [2, 1], "kinds": ["b"], "data": ["x", "x"]}


def test_flags_with_dashes_are_those_with_underscores(tmp_path):
    content = "is_loud: false\nlimit: null\n"
    assert parse(tmp_path, content, "--is-loud", "true")[0].is_loud is True
    assert read_command_line(["--is-loud=true", "--names", "a-b"], (Sound, Place)).typed_names == {"is_loud", "names"}
    assert read_command_line(["--no-is-loud"], (Sound, Place)).typed_names == {"is_loud"}
