"""
Settings of the documentation site, which `make docs` builds with Sphinx.

Its source is the whole repository, not docs/ alone: pages keep their places, so that a relative link works on the code
host and on the site.
"""

import dataclasses
import inspect
import json
import posixpath
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from numpy.typing import ArrayLike
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.util import logging
from sphinx.util.rst import escape
from sphinx.util.typing import stringify_annotation

import dinosr_hf

ROOT = Path(__file__).parent.parent

project = "dinosr-hf"
author = "The dinosr-hf authors"
version = release = dinosr_hf.__version__
root_doc = "docs/index"
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
include_patterns = [
    "*.md",
    "docs/*.md",
    "docs/reference/*",
    "docs/tutorials/*",
    "benchmarks/**.md",
    "examples/*.ipynb",
]
# Folders are excluded by name, because the search for pages would look into environments and runs.
exclude_patterns = [
    entry.name for entry in ROOT.iterdir() if entry.is_dir() and entry.name not in ("docs", "benchmarks", "examples")
]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
myst_heading_anchors = 6  # the anchors of the code host
# A name in single backticks is a link if it is one of ours, and code otherwise.
default_role = "py:obj"
add_module_names = False
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 140
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_theme_options = {
    "light_css_variables": {"color-api-name": "var(--color-brand-content)"},
    "dark_css_variables": {"color-api-name": "var(--color-brand-content)"},
}
html_title = f"dinosr-hf {version}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False

logger = logging.getLogger(__name__)


def public_names() -> dict[str, Any]:
    """Return what the packages' `__all__` list, by the names that users import."""
    files = sorted((ROOT / "src" / "dinosr_hf").rglob("__init__.py"))
    modules = [import_module(".".join(file.parent.relative_to(ROOT / "src").parts)) for file in files]
    return {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in modules
        for name in getattr(module, "__all__", ())
    }


def settings_of(value: Any) -> list[dataclasses.Field]:
    """Return the fields of a dataclass of settings, whose signature is too long to read; nothing for other objects."""
    if not (inspect.isclass(value) and dataclasses.is_dataclass(value)):
        return []
    fields = [field for field in dataclasses.fields(value) if field.name in value.__annotations__]
    return fields if value is dinosr_hf.DinoSRConfig or any("help" in field.metadata for field in fields) else []


def shorten_signature(
    app: Sphinx, what: str, name: str, value: Any, options: Any, arguments: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Leave the signature of settings to their list, and name numpy's types as the code does."""
    if settings_of(value):
        return "(**settings)", None

    def shorten(text: str) -> str:
        text = text.replace(stringify_annotation(ArrayLike, "smart"), "~numpy.typing.ArrayLike")
        return re.sub(r"~numpy.ndarray\[.*?~numpy.dtype\[(.*?)\]\]", r"~numpy.typing.NDArray[\1]", text)

    return arguments and shorten(arguments), returns and shorten(returns)


def mark_code(lines: list[str]) -> list[str]:
    """Return a docstring with its code, which is in Markdown's fences or indented, marked as reStructuredText does."""
    marked: list[str] = []
    prose, fence = True, ""  # whether the last line at the margin was prose; the indentation of an open fence
    for line in lines:
        if found := re.fullmatch(r"( *)```(\w*)", line):
            marked += [] if fence or not found[2] else [f"{found[1]}.. code-block:: {found[2]}", ""]
            fence = "" if fence else f"{found[1]}    "
            continue
        if fence:
            line = f"    {line}" if line else ""
        elif line.startswith("    ") and prose and marked and not marked[-1]:
            marked += ["::", ""]
            prose = False
        elif line and not line.startswith(" "):
            prose = not re.match(r"- |\d+\. |\.\. |[A-Z][a-z]+:$", line)
        marked.append(line)
    return marked


def render_docstring(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Turn a docstring in Google's style, with types and defaults for settings, into reStructuredText."""
    # The page describes a constant; its docstring would be that of its type.
    lines[:] = [] if what == "data" else mark_code(lines)
    if what not in ("property", "attribute"):  # there it would take "a: b" for a type and its description
        config = Config(napoleon_custom_sections=[("State", "params_style")])
        lines[:] = GoogleDocstring(lines, config, app, what, name, value, options).lines()
    for field in settings_of(value):
        start = f":param {field.name}:"
        if not any(line.startswith(start) for line in lines):
            text = escape(field.metadata["help"]).replace(r"\`", "`")  # names stay code
            lines.append(f"{start} {text}")
        kind = field.type if isinstance(field.type, str) else stringify_annotation(field.type, "smart")
        default = field.default_factory() if callable(field.default_factory) else field.default
        default = "" if default is dataclasses.MISSING else f", default ``{default!r}``"
        place = next(number for number, line in enumerate(lines) if line.startswith(start))
        lines.insert(place, f":type {field.name}: {kind}{default}")
    lines.append("")


def skip_member(app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Skip the fields of a NamedTuple, which its signature has ("Alias for field number 0"), and transformers' own."""
    return True if type(value).__name__ == "_tuplegetter" or name == "config_class" else None


def link_public_name(app: Sphinx, env: BuildEnvironment, node: Any, content: nodes.TextElement) -> nodes.Node | None:
    """Link a type by the name that users import, where it is named by the module that defines it."""
    public = app.public_paths.get(node.get("reftarget")) if node.get("refdomain") == "py" else None
    if public is None:
        return None
    return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", public, node, content)


def name_pages_by_title(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Show a page's title where the text of a link is the name of its file."""
    for link in doctree.findall(nodes.reference):
        target = posixpath.join(posixpath.dirname(page), link.get("refuri", "").partition("#")[0])
        title = app.env.titles.get(posixpath.normpath(target).removesuffix(".html"))
        if title and re.fullmatch(r"[\w./-]+\.md", link.astext()):
            link.children = [nodes.inline("", title.astext())]


def notebook_as_markdown(notebook: dict[str, Any]) -> str:
    """Return a notebook's cells and outputs, below a link to the notebook itself."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text'])}```")
            elif image := output["data"].get("image/png"):
                parts.append(f"![The figure](data:image/png;base64,{image.strip()})")
    parts.insert(1, "Download the notebook: {download}`first_steps.ipynb`.")
    return "\n\n".join(parts)


def prepare_source(app: Sphinx, page: str, source: list[str]) -> None:
    """Turn notebooks into Markdown, and put the results of benchmarks below their overview, which links to them."""
    # A page in the format of transformers' documentation: to download, not to read here.
    source[0] = source[0].replace("](upstream/dinosr.md", "](path:upstream/dinosr.md")
    if page.startswith("examples/"):
        source[0] = notebook_as_markdown(json.loads(source[0]))
    if page == "benchmarks/README":
        source[0] += "\n```{toctree}\n:hidden:\n:glob:\n:reversed:\nresults/*\n```\n"


def check_complete(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of public names that no page describes."""
    for name in public_names().keys() - env.domains["py"].objects.keys():
        logger.warning("%s is public, but no page of docs/reference describes it", name)


def add_front_page(app: Sphinx, exception: Exception | None) -> None:
    """Lead from the root of the site to its first page."""
    Path(app.outdir, "index.html").write_text('<meta http-equiv="refresh" content="0; url=docs/index.html">\n')


def setup(app: Sphinx) -> None:
    """Connect the functions above; Sphinx calls this."""
    app.public_paths = {
        f"{value.__module__}.{value.__qualname__}": name
        for name, value in public_names().items()
        if inspect.isclass(value) or inspect.isfunction(value)
    }
    app.connect("source-read", prepare_source)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-docstring", render_docstring)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("env-check-consistency", check_complete)
    app.connect("missing-reference", link_public_name)
    app.connect("doctree-resolved", name_pages_by_title)
    app.connect("build-finished", add_front_page)
