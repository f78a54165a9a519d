"""The command `dinosr`: its help, its subcommands beside the scripts of examples/, its recipes and its errors."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import dinosr_cli
from dinosr_cli import COMMANDS
from dinosr_hf.utils import recipes as recipes_module
from dinosr_hf.utils.recipes import find_recipe, first_clause, recipes
from scripts import ROOT

EXAMPLES = {path.stem for path in (ROOT / "examples").glob("*.py")}
WITHOUT_SCRIPT = {"list_recipes", "print_completion"}


def last_words(monkeypatch, *argv):
    """Run `dinosr` with these words, which must end with a message."""
    monkeypatch.setattr(sys, "argv", ["dinosr", *map(str, argv)])
    with pytest.raises(SystemExit) as end:
        dinosr_cli.main()
    assert "\n" not in str(end.value.code)
    return end.value.code


def test_the_help_fits_a_screen_and_imports_no_torch():
    code = "import sys, dinosr_cli; dinosr_cli.main(['--help']); assert not {'torch', 'dinosr_hf'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) < 24 and max(map(len, lines)) < 80


def test_every_script_has_a_subcommand_and_the_other_way_round():
    modules = {module for module, *_ in COMMANDS.values()}
    assert modules - WITHOUT_SCRIPT == EXAMPLES
    assert modules == {path.stem for path in (ROOT / "src" / "dinosr_hf" / "commands").glob("[a-z]*.py")}


@pytest.mark.parametrize("script", sorted(EXAMPLES))
def test_a_script_runs_its_command(script, monkeypatch, capsys):
    path = ROOT / "examples" / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.startswith(f"usage: {script}.py ")
    assert f"examples/{script}.py" in ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_subcommand_is_called_as_the_user_typed_it(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dinosr", name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        dinosr_cli.main()
    text = capsys.readouterr().out
    assert text.startswith(f"usage: dinosr {name} ") and f"    dinosr {name}" in text


def test_errors_name_the_subcommand(monkeypatch):
    assert last_words(monkeypatch, "kmeans", "m", "d", "--output", "a.txt") == (
        "dinosr kmeans: --output must end in .safetensors."
    )
    assert last_words(monkeypatch, "plot", "runs/none", "--y").startswith("dinosr plot: y is not a known argument.")
    assert last_words(monkeypatch, "pretrain", "--max_stepz", "3").startswith("dinosr pretrain: max_stepz is not")
    assert last_words(monkeypatch, "publish", "runs/a", "hub/a", "--public") == (
        "dinosr publish: --public needs --push."
    )
    assert last_words(monkeypatch, "convert", "a", "b", "--to", "spidr", "--license", "mit") == (
        "dinosr convert: --to takes only a folder and a file. Leave out the other flags."
    )
    assert last_words(monkeypatch, "pretain") == (
        "dinosr: pretain is not a command. The nearest is pretrain. dinosr --help lists all."
    )


def test_a_subcommand_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "dinosr_hf.commands.extract_units", raising=False)
    assert last_words(monkeypatch, "units") == 'dinosr units needs accelerate: pip install "dinosr-hf[train]"'


@pytest.mark.parametrize("name", ["demo", "demo-recognition"])
def test_demos_refuse_what_they_do_not_take(monkeypatch, name):
    other = "Use `dinosr pretrain` or `dinosr finetune`."
    said = last_words(monkeypatch, name, "base_1gpu")
    assert said == f"dinosr {name}: base_1gpu: a demo takes no file or recipe. {other}"
    said = last_words(monkeypatch, name, "--data", "my_speech")
    assert said == f"dinosr {name}: --data: a demo has synthetic speech. {other}"


def test_a_package_that_transformers_misses_is_said(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("Could not import module 'Trainer'.") from ImportError("accelerate is missing")

    monkeypatch.setattr(dinosr_cli.importlib, "import_module", fail)
    assert last_words(monkeypatch, "units") == "dinosr units: accelerate is missing"


@pytest.mark.parametrize("name", ["demo", "demo-recognition", "recipes"])
def test_the_help_offers_no_file_where_there_can_be_none(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dinosr", name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        dinosr_cli.main()
    assert "YAML file with some of these" not in capsys.readouterr().out
    file = tmp_path / "a.yaml"
    file.write_text("words: 1\n")
    if name == "recipes":
        said = last_words(monkeypatch, name, file)
        assert said == f"dinosr recipes: {file}: words is not a known argument. There are none."


def test_recipes_are_found_by_name_after_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("small") == find_recipe("small.yaml") == ROOT / "examples" / "configs" / "small.yaml"
    assert find_recipe("nothing") is None
    Path("small.yaml").write_text("seed: 1\n")
    assert find_recipe("small.yaml") == Path("small.yaml") and find_recipe("small").is_absolute()


def test_recipes_are_listed_with_what_they_are_for(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dinosr", "recipes"])
    dinosr_cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == sorted(recipes())
    assert lines[sorted(recipes()).index("small")] == (
        "small           A DinoSR for a few hours of speech and a laptop or one small GPU"
    )
    assert max(map(len, lines[:-1])) < 120 and lines[-1] == f"The files are in {ROOT / 'examples' / 'configs'}."
    assert all(len(first_clause(path)) >= 10 for path in recipes().values())


def test_an_unknown_recipe_is_answered_with_the_names(monkeypatch):
    message = last_words(monkeypatch, "finetune", "ctc_10d")
    assert message.startswith(
        "dinosr finetune: ctc_10d is neither a YAML file nor a recipe. The recipes are adapt, base_1gpu"
    )


def test_a_wheel_has_the_recipes_in_the_package(tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text("# Mine, for tests.\nseed: 3\n")
    monkeypatch.setattr(recipes_module, "_FOLDER", tmp_path)
    assert list(recipes()) == ["own"] and first_clause(recipes()["own"]) == "Mine"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_flags_choices_and_recipes(shell, monkeypatch, capsys):
    pytest.importorskip("shtab")
    monkeypatch.setattr(sys, "argv", ["dinosr", "completion", shell])
    dinosr_cli.main()
    script = capsys.readouterr().out
    for word in ("finetune-classifier", "--window_seconds", "safetensors", "base_ls960", "--max_steps"):
        assert word in script
    assert "--no_overwrite" not in script


# The function that the script registers for `dinosr`, called as bash calls it.
ASK_BASH = r"""
source "$1"; shift
[[ $(complete -p dinosr) =~ -F\ ([^ ]+) ]]
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
"${BASH_REMATCH[1]}"
printf "%s\n" "${COMPREPLY[@]}"
"""


def test_bash_completes_what_the_user_types(tmp_path, monkeypatch, capsys):
    pytest.importorskip("shtab")
    monkeypatch.setattr(sys, "argv", ["dinosr", "completion", "bash"])
    dinosr_cli.main()
    (tmp_path / "dinosr.bash").write_text(capsys.readouterr().out)
    (tmp_path / "runs").mkdir()
    for name in ("own.yaml", "other.txt"):
        (tmp_path / name).touch()

    def offers(line):
        words = ["bash", "--norc", "-c", ASK_BASH, "bash", "./dinosr.bash", *line.split(" ")]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return set(done.stdout.splitlines())

    expected = {
        "dinosr finetune-c": "finetune-classifier",
        "dinosr pretrain --max_st": "--max_steps",
        "dinosr pretrain small --data runs --max_st": "--max_steps",
        "dinosr demo --max_st": "--max_steps",
        "dinosr demo --test_u": "--test_utterances",
        "dinosr demo-recognition --learning_r": "--learning_rate",
        "dinosr pretrain base_ls": "base_ls960",
        "dinosr finetune ow": "own.yaml",
        "dinosr pretrain --data ot": "other.txt",
        "dinosr units model ot": "other.txt",
        "dinosr convert a b --to sp": "spidr",
    }
    assert {line: offers(line) for line in expected} == {line: {word} for line, word in expected.items()}
    assert offers("dinosr finetune-classifier ") == {*recipes(), "own.yaml", "runs"}
