"""Blocks of code in the documents of the project."""

import json
import re

from scripts import ROOT


def blocks(name, language):
    """Return (number of its first line, text) of each fenced block of a language, or of each code cell."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".ipynb"):
        cells = json.loads(text)["cells"] if language == "python" else []
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        code = [re.sub(r"^%.*", "", cell) for cell in code]  # IPython's magic
        return [(1, re.sub(r"^(STEPS|UTTERANCES) = \d+", r"\1 = 8", cell, flags=re.MULTILINE)) for cell in code]
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]
