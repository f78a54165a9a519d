"""The workflows of .github call commands that exist, with pinned actions and few rights."""

import re

import pytest
import yaml

from scripts import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_commands_that_exist(path):
    workflow = yaml.safe_load(path.read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = [step["run"].split() for step in steps if "run" in step]
    called = {word for command, *words in commands if command == "make" for word in words if "=" not in word}
    assert called, "no make target"
    assert called <= TARGETS, f"no such target: {called - TARGETS}"
    assert all((ROOT / command).is_file() for command, *_ in commands if command.startswith("."))
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"]) for step in steps if "uses" in step)
    assert workflow["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())
