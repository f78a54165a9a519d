"""
Check the house rules that imports show: the layers of docs/architecture.md, the files that are copied to the Hub as
remote code, and that extras are imported only where they are used.

`find_violations(file, source)` checks every file of the package, and snippets that each break one rule.
"""

import ast
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

from scripts import ROOT

PACKAGE = ROOT / "src" / "dinosr_hf"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up. An import points to a lower layer or stays within its subpackage.
LAYERS = (
    ("model",),
    ("utils",),
    ("data",),
    ("inference",),
    ("analysis", "recognition"),
    ("units",),
    ("training",),
    ("pretraining", "finetuning"),
    ("hub",),
    ("__init__",),
    ("commands",),
    ("cli",),
)
LAYER = {subpackage: number for number, subpackages in enumerate(LAYERS) for subpackage in subpackages}
# The files that are copied into a model's folder.
REMOTE_CODE = {file.stem for file in (PACKAGE / "model").glob("*_dinosr.py")}
# What `data` may import of the model: the configuration for frame lengths, and the sampler of masks.
DATA_MAY_IMPORT = {"configuration_dinosr", "masking_dinosr"}

# Installed everywhere: our dependencies and those of transformers.
ALWAYS_INSTALLED = {
    "filelock",
    "numpy",
    "regex",
    "safetensors",
    "torch",
    "transformers",
    "huggingface_hub",
    "tqdm",
    "yaml",
}
REMOTE_CODE_MAY_IMPORT = {"numpy", "torch", "transformers", "huggingface_hub"}
EXTRAS = [
    "accelerate",
    "datasets",
    "discophon",
    "espeakng_loader",
    "evaluate",
    "fastabx",
    "flashlight",
    "gradio",
    "jinja2",
    "jiwer",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pandas",
    "peft",
    "pyarrow",
    "scipy",
    "sklearn",
    "soundfile",
    "soxr",
    "tensorboard",
]

MAX_SOURCE_LINES = 650


def subpackage_of(file: Path) -> str:
    """Return the subpackage of a file of src/dinosr_hf, as named in `LAYERS`."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(file: Path, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Yield the absolute names of the modules that a statement imports from, such as `dinosr_hf.data.audio`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    package = ["dinosr_hf", *file.relative_to(PACKAGE).parent.parts] if node.level else []
    base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
    base = [part for part in base if part]
    for alias in node.names:
        inside = PACKAGE.joinpath(*base[1:], alias.name)
        is_module = base[0] == "dinosr_hf" and (inside.is_dir() or inside.with_suffix(".py").exists())
        yield ".".join([*base, alias.name] if is_module else base)


def module_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run at import: not function bodies, not `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if deferred or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            continue
        yield node
        yield from module_level(node)


def layer_violations(subpackage: str, target: str) -> Iterator[str]:
    parts = target.split(".")
    if parts[0] != "dinosr_hf":
        return
    target_name = parts[1] if len(parts) > 1 else "__init__"
    if target_name == subpackage:
        return
    if target_name not in LAYER or subpackage not in LAYER:
        yield f"{subpackage} imports {target}: give both a place in LAYERS"
    elif LAYER[target_name] >= LAYER[subpackage]:
        yield f"{subpackage} imports {target}, which is not below it"
    elif (
        subpackage == "data"
        and target_name == "model"
        and parts[2:3] not in [[name] for name in sorted(DATA_MAY_IMPORT)]
    ):
        yield f"data imports {target}: frame lengths come from the configuration"


def remote_code_violations(source: str, tree: ast.AST) -> Iterator[str]:
    """
    Yield what breaks remote code: transformers finds the files to copy by a regular expression, line by line, and
    reads annotations as types.
    """
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in statements:
        text = ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            yield f"`{text}` turns annotations into strings, which from_pretrained and @strict cannot read"
        elif isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or node.module not in REMOTE_CODE:
                yield f"`{text}` is not `from .module import Name` of another file of the remote code"
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for root in {name.partition(".")[0] for name in names}:
                if root not in REMOTE_CODE_MAY_IMPORT | sys.stdlib_module_names:
                    yield f"`{text}` is not installed where remote code runs"
    lines = {line for node in statements for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    for number, line in enumerate(source.splitlines(), start=1):
        if number not in lines and re.match(r"\s*(from\s+\S+\s+import\b|import\s+\S+\s*$)", line):
            yield f"line {number} looks like an import, and transformers would follow it: {line.strip()}"


def find_violations(file: Path, source: str) -> list[str]:
    """Return the violations of a file of src/dinosr_hf."""
    tree, subpackage, found = ast.parse(source), subpackage_of(file), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in dict.fromkeys(imported_modules(file, node)):
                found += layer_violations(subpackage, target)
    may_import = ALWAYS_INSTALLED | sys.stdlib_module_names | {"dinosr_hf", "dinosr_cli"}
    if subpackage in ("pretraining", "commands"):
        may_import |= {"accelerate"}
    for node in module_level(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in dict.fromkeys(imported_modules(file, node)):
                if target.partition(".")[0] not in may_import:
                    found.append(f"{target} is an extra: import it in the function that uses it")
                elif target.startswith("torch.utils.tensorboard"):
                    found.append(f"{target} needs an extra: import it in the function that uses it")
    if subpackage == "model" and file.stem != "__init__":
        found += remote_code_violations(source, tree)
    if file.name != "modeling_dinosr.py" and len(source.splitlines()) > MAX_SOURCE_LINES:
        found.append(f"{len(source.splitlines())} lines are more than {MAX_SOURCE_LINES}")
    return [f"{file.relative_to(PACKAGE)}: {violation}" for violation in found]


def uses_torch_distributed(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"):
            return True
        if isinstance(node, ast.Import) and any(a.name.startswith("torch.distributed") for a in node.names):
            return True
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if any(name.startswith("torch.distributed") for name in names):
                return True
    return False


def test_package_follows_the_rules():
    assert SOURCES
    assert [line for file in SOURCES for line in find_violations(file, file.read_text())] == []


def test_every_file_has_a_layer():
    assert {subpackage_of(file) for file in SOURCES} <= set(LAYER)


def test_one_module_uses_torch_distributed():
    found = [str(file.relative_to(PACKAGE)) for file in SOURCES if uses_torch_distributed(file.read_text())]
    assert len(found) <= 1, found


def test_transformers_copies_all_files_of_the_remote_code():
    copied = {Path(file).stem for file in get_relative_import_files(str(PACKAGE / "model" / "modeling_dinosr.py"))}
    assert copied | {"modeling_dinosr"} == REMOTE_CODE


BAD_SOURCES = {
    "up": ("data/audio.py", "from ..pretraining.loop import train", "not below"),
    "sideways": ("finetuning/run.py", "from ..pretraining import run", "not below"),
    "up_to_the_front_door": ("analysis/plots.py", "from .. import DinoSRModel", "not below"),
    "up_by_absolute_name": ("analysis/plots.py", "from dinosr_hf.hub import save", "not below"),
    "up_inside_a_function": ("model/masking_dinosr.py", "def f():\n    from ..data import audio", "not below"),
    "unknown_place": ("recognition/metrics.py", "from ..attic import thing", "LAYERS"),
    "data_uses_the_model": ("data/batching.py", "from ..model.modeling_dinosr import DinoSRModel", "configuration"),
    "data_uses_the_model_as_module": ("data/batching.py", "from ..model import codebook_dinosr", "configuration"),
    "extra_at_import": ("data/audio.py", "import soundfile", "extra"),
    "extra_at_import_guarded": (
        "analysis/plots.py",
        "try:\n    import matplotlib\nexcept OSError: ...",
        "extra",
    ),
    "extra_in_a_class_body": ("analysis/plots.py", "class A:\n    from scipy import fft", "extra"),
    "accelerate_outside_pretraining": ("recognition/scoring.py", "from accelerate import Accelerator", "extra"),
    "tensorboard_by_torch": ("pretraining/loop.py", "from torch.utils.tensorboard import SummaryWriter", "extra"),
    "remote_from_package": ("model/modeling_dinosr.py", "from . import masking_dinosr", "from .module import Name"),
    "remote_from_subpackage": ("model/modeling_dinosr.py", "from .data.audio import x", "from .module import Name"),
    "remote_by_absolute_name": (
        "model/modeling_dinosr.py",
        "from dinosr_hf.model.masking_dinosr import x",
        "not installed",
    ),
    "remote_safetensors": ("model/modeling_dinosr.py", "import safetensors", "not installed"),
    "remote_future": ("model/configuration_dinosr.py", "from __future__ import annotations", "strings"),
    "remote_import_in_docstring": (
        "model/codebook_dinosr.py",
        '"""\n    from .attic import Old\n"""',
        "looks like an import",
    ),
    "remote_plain_import_in_docstring": (
        "model/codebook_dinosr.py",
        '"""\nimport soundfile\n"""',
        "looks like an import",
    ),
    "too_long": ("data/audio.py", "x = 1\n" * (MAX_SOURCE_LINES + 1), "lines"),
}
GOOD_SOURCES = {
    "down": (
        "pretraining/loop.py",
        "from ..data.audio import load_audio\nfrom ..model.modeling_dinosr import DinoSRModel",
    ),
    "same_package": ("data/collator.py", "from .audio import load_audio\nfrom . import sources"),
    "extra_where_used": ("data/audio.py", "def f():\n    import soundfile"),
    "extra_for_types": ("data/sources.py", "if TYPE_CHECKING:\n    from datasets import Dataset"),
    "accelerate_in_pretraining": ("pretraining/loop.py", "from accelerate import Accelerator"),
    "remote_in_parentheses": ("model/modeling_dinosr.py", "from .codebook_dinosr import (\n    A,\n    B,\n)"),
    "remote_example_in_docstring": ("model/modeling_dinosr.py", '"""\n>>> from dinosr_hf import DinoSRModel\n"""'),
    "remote_prose": ("model/modeling_dinosr.py", '"""\nfrom the student, and import duties\n"""'),
}


@pytest.mark.parametrize(("file", "source", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_checker_finds_violations(file, source, message):
    assert message in "\n".join(find_violations(PACKAGE / file, source))


@pytest.mark.parametrize(("file", "source"), GOOD_SOURCES.values(), ids=GOOD_SOURCES)
def test_checker_accepts_valid_sources(file, source):
    assert find_violations(PACKAGE / file, source) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.distributed as dist", True),
        ("from torch import distributed", True),
        ("from torch.distributed import all_reduce", True),
        ("import torch\ntorch.distributed.barrier()", True),
        ("import torch\ntorch.distributions.Normal(0, 1)", False),
    ],
)
def test_torch_distributed_is_found(source, expected):
    assert uses_torch_distributed(source) is expected


def test_package_imports_without_extras():
    # The extras are installed here, and transformers imports some of them itself, so hide them from both.
    modules = [
        ".".join(["dinosr_hf", *file.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        for file in SOURCES
        if subpackage_of(file) not in ("pretraining", "commands")  # they need accelerate
    ]
    code = textwrap.dedent(
        f"""
        import importlib, sys

        class WithoutExtras:
            def __init__(self, finder):
                self.finder = finder

            def __getattr__(self, name):
                return getattr(self.finder, name)

            def find_spec(self, name, path=None, target=None):
                hidden = name.partition(".")[0] in {EXTRAS}
                return None if hidden else self.finder.find_spec(name, path, target)

        sys.meta_path[:] = [WithoutExtras(finder) for finder in sys.meta_path]
        import dinosr_hf
        dinosr_hf.DinoSRModel
        for module in {modules}:
            importlib.import_module(module)
        assert not {set(EXTRAS)} & {{name.partition(".")[0] for name in sys.modules}}
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_name_of_a_class_is_used_once():
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in SOURCES]
    names = Counter(node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []
