"""Kill a run again and again, above all while it saves, and start it anew until it has finished."""

from pathlib import Path

import forks

# Imports take seconds and a step milliseconds: one process imports, its forks run the command and are killed.
_CODE = """
import importlib, os, random, signal, sys, time
from pathlib import Path
name, config, out, num_kills = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
script = importlib.import_module(f"dinosr_hf.commands.{name}")
record, log = out / "run.json", out.parent / "log.txt"
chance = random.Random(0)
kills = while_saving = starts = 0
while not record.exists() or '"finished": null' in record.read_text():
    starts += 1
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        script.main([config])
        os._exit(0)
    names = lambda: os.listdir(out) if out.exists() else []
    newest = lambda: max([int(name.split("-")[1]) for name in names() if name.startswith("checkpoint-")], default=0)
    saves = lambda: any(name.startswith(".unfinished-") for name in names())
    # The first kills are before there is any checkpoint, and most of all while one is being written.
    wanted, at_a_save = (newest() + 1 if kills > 1 else 0), kills % 3 != 2
    delay = chance.random() * (0.005 if at_a_save else 0.05)
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0, log.read_text()[-3000:]
            break
        if kills < num_kills and out.exists() and newest() >= wanted and (not at_a_save or saves()):
            time.sleep(delay)
            os.kill(child, signal.SIGSTOP)  # so that what is seen is what is killed
            os.waitpid(child, os.WUNTRACED)
            is_saving = saves()
            if at_a_save and not is_saving:  # too late: at the next one, and at once
                delay = 0
                os.kill(child, signal.SIGCONT)
                continue
            while_saving += is_saving
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            break
        time.sleep(0.001)
    assert starts < 60
print(kills, while_saving)
"""


def run_through_kills(script: str, config: Path, out: Path, num_kills: int) -> None:
    """Run a command to its end; assert that it was killed so often, and half of that while it saved."""
    done = forks.run(["-c", _CODE, script, config, out, num_kills], timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    kills, while_saving = map(int, done.stdout.split()[-2:])
    assert kills == num_kills and while_saving >= num_kills // 2
