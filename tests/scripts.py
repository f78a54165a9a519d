"""Commands of the package and scripts of benchmarks/ as modules, and the folder of the fixtures."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures"


def load_command(name: str) -> ModuleType:
    """Import the module of a subcommand, which is named as the script of examples/ that runs it."""
    return importlib.import_module(f"dinosr_hf.commands.{name}")


def load_script(script: str | Path) -> ModuleType:
    """Import a script by its path from the project's root; it can import its neighbours, as when Python runs it."""
    path = ROOT / script
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module
