"""Recipes: YAML files of arguments that come with the package and are found by their names."""

from __future__ import annotations

import re
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# A wheel has them in the package, a clone beside the scripts.
_FOLDER = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parents[1] / "examples" / "configs"


def recipes() -> dict[str, Path]:
    """Return the recipes' files by name, such as `base_1gpu`."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def find_recipe(name: str) -> Path | None:
    """Return the file of a path, which comes first, or of a recipe, with or without .yaml; None if there is none."""
    if Path(name).is_file():
        return Path(name)
    return recipes().get(name.removesuffix(".yaml"))


def first_clause(recipe: Path) -> str:
    """Return what a recipe says of itself, up to the first mark in the comment that it begins with."""
    comment = re.match(r"(?:#.*\n)*", recipe.read_text(encoding="utf-8"))
    assert comment is not None
    text = " ".join(line.removeprefix("#").strip() for line in comment[0].splitlines())
    return re.split(r"[.,:;](?: |$)| \(", text)[0]
