"""Tables, and the files of a report."""

import json

from matplotlib.figure import Figure

from dinosr_hf.analysis.reports import write_report

TEXTS = {"markdown": "| ü |\n", "csv": "ü\n", "rows": [{"ü": 1.5}, {"ü": None}]}


def test_report_without_a_figure(tmp_path):
    sentence = write_report(tmp_path / "new", "units", **TEXTS)
    assert sentence == f"The table is {tmp_path / 'new' / 'units'}.md, .csv and .json."
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["units.csv", "units.json", "units.md"]
    assert (tmp_path / "new" / "units.md").read_text(encoding="utf-8") == "| ü |\n"
    assert json.loads((tmp_path / "new" / "units.json").read_text(encoding="utf-8")) == TEXTS["rows"]


def test_report_with_a_figure(tmp_path):
    sentence = write_report(tmp_path, "layers", **TEXTS, figure=Figure())
    assert sentence.endswith(".json, the picture layers.png and layers.pdf.")
    assert (tmp_path / "layers.png").read_bytes()[1:4] == b"PNG"
    assert (tmp_path / "layers.pdf").read_bytes()[:4] == b"%PDF"
