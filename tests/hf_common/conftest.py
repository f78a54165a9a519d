"""
Reads deselect.txt and must_run.txt, and writes the summary line of the common tests.

A test counts once, however many subtests it has: failed if any part failed, or if it is listed in must_run.txt and any
part of it was skipped; else skipped if it was skipped as a whole; else passed.
"""

import fnmatch
import gc
import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def read_patterns(file: str) -> list[str]:
    lines = (HERE / file).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


DESELECT = read_patterns("deselect.txt")
MUST_RUN = read_patterns("must_run.txt")
OUTCOMES: dict[str, set[str]] = {}
SKIP_REASONS: dict[str, str] = {}


def is_listed(nodeid: str, patterns: list[str]) -> bool:
    name = nodeid.rsplit("::", 1)[-1]
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_printoptions(threshold=8, edgeitems=1)  # transformers formats all tensors that it compares
    for marker in ("is_pipeline_test", "is_training_test", "accelerate_tests", "flash_attn_test", "generate"):
        config.addinivalue_line("markers", f"{marker}: transformers' own marker")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if is_listed(item.nodeid, DESELECT)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    # as in tests/conftest.py
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcomes = OUTCOMES.setdefault(report.nodeid, set())
    if report.when != "call" and report.passed:
        return
    is_subtest = "subtest" in type(report).__name__.lower()
    outcomes.add(f"subtest {report.outcome}" if is_subtest else report.outcome)
    if report.skipped and isinstance(report.longrepr, tuple):
        SKIP_REASONS[report.nodeid] = report.longrepr[2]


def judge(nodeid: str, outcomes: set[str]) -> str:
    if outcomes & {"failed", "subtest failed"}:
        return "failed"
    if outcomes & {"skipped", "subtest skipped"} and is_listed(nodeid, MUST_RUN):
        return "failed"
    return "skipped" if "skipped" in outcomes else "passed"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    verdicts = {nodeid: judge(nodeid, outcomes) for nodeid, outcomes in OUTCOMES.items()}
    for report in terminalreporter.stats.get("error", []):
        verdicts[report.nodeid] = "failed"
    for nodeid, outcomes in OUTCOMES.items():
        if verdicts[nodeid] == "failed" and not outcomes & {"failed", "subtest failed"} and nodeid in SKIP_REASONS:
            terminalreporter.write_line(f"SKIPPED BUT MUST RUN {nodeid} {SKIP_REASONS[nodeid]}")
    counts = {kind: list(verdicts.values()).count(kind) for kind in ("passed", "failed", "skipped")}
    Path(os.environ["HF_COMMON_SUMMARY"]).write_text(
        "hf-common-suite: {passed} passed, {failed} failed, {skipped} skipped\n".format(**counts)
    )
