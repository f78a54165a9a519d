"""Programs in forks end, read and write as they do in processes of their own."""

import os
import signal
import subprocess
import sys
import time

import pytest

import forks

PROGRAM = """
import os, sys
print(sys.argv[1:], os.environ["COLOUR"], os.path.basename(os.getcwd()), sys.stdin.read())
print("careful", file=sys.stderr)
sys.exit({end})
"""


@pytest.mark.parametrize("end", ["0", "3", "'a message'", "1 / 0"])
def test_a_fork_is_as_a_process_of_its_own(tmp_path, end):
    environment = {**os.environ, "COLOUR": "green"}
    words = ["-c", PROGRAM.format(end=end), "a", "-b"]
    fork = forks.run(words, env=environment, cwd=tmp_path, text="input")
    options = {"env": environment, "cwd": tmp_path, "input": "input", "capture_output": True, "text": True}
    plain = subprocess.run([sys.executable, *words], **options)
    assert (fork.returncode, fork.stdout) == (plain.returncode, plain.stdout)
    assert fork.stderr.splitlines()[0] == "careful" and fork.stderr.splitlines()[-1] == plain.stderr.splitlines()[-1]


def test_a_script_and_a_module_run(tmp_path):
    (tmp_path / "neighbour.py").write_text("import sys\nif __name__ == '__main__': print(sys.argv)\n")
    (tmp_path / "script.py").write_text("import neighbour, sys\nprint(sys.argv, __name__)\n")
    script = tmp_path / "script.py"
    assert forks.run([script, "a"]).stdout == f"{[str(script), 'a']} __main__\n"
    module = forks.run(["-m", "neighbour", "b"], env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert module.stdout == f"{[str(tmp_path / 'neighbour.py'), 'b']}\n"


def test_a_fork_can_be_killed_and_does_not_outlive_its_time():
    program = forks.Program(["-c", "import time; print('begun', flush=True); time.sleep(60)"])
    while "begun" not in program.stdout.read_text():
        time.sleep(0.01)
    assert program.is_running
    os.kill(program.pid, signal.SIGKILL)
    assert program.wait().returncode == -signal.SIGKILL
    with pytest.raises(TimeoutError, match=r"did not end within 0\.1 s"):
        forks.run(["-c", "import time; time.sleep(60)"], timeout=0.1)


def test_processes_know_of_each_other():
    code = """
import os, torch
torch.distributed.init_process_group("gloo")
torch.distributed.barrier()  # the first process, which serves the others, stays until all have met
print(torch.distributed.get_world_size())
raise SystemExit(int(os.environ["RANK"]) * 5)
"""
    done = forks.run_in_processes(2, ["-c", code])
    assert (done.returncode, done.stdout) == (5, "2\n2\n")
