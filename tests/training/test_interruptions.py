"""Trainings that are killed, interrupted, run twice, and meet full disks, at random moments."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from swiftkernels.training import lock, resume
from tests import training_cases
from tests.builds import ROOT
from tests.disks import file_system

TIMES = 50
EPOCHS = 12
OPTIONS = {"epochs": EPOCHS, "save_every": 1, "log_every": 1}

TRAIN = f"""
import sys
from pathlib import Path
from swiftkernels.utils import command
from tests import training_cases

def body():
    print("ready", flush=True)
    training_cases.run("small", Path(sys.argv[1]), resume=True, **{OPTIONS!r})

sys.exit(command.run(body))
"""

SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
STATUSES = {"kill": -9, "terminate": 143, "interrupt": 130, "fill": 2, "double": -9}


def start(out: Path) -> subprocess.Popen[str]:
    """A training that continues in a folder; it has imported all packages."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", TRAIN, str(out)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def disturb(process: subprocess.Popen[str], how: str, out: Path) -> str:
    """Do something to a running training; returns what it printed as an error."""
    filler = out.parent / "filler"
    if how in SIGNALS:
        process.send_signal(SIGNALS[how])
    elif how == "fill":
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 14))
            except OSError:
                pass
    elif how == "double":
        other = start(out)
        _, err = other.communicate()
        if other.returncode == 2:
            assert f"{out} is locked by process {process.pid} on" in err
        else:  # the first one has ended meanwhile
            assert (process.wait(), other.returncode) == (0, 0), err
        process.kill()
    _, err = process.communicate()
    filler.unlink(missing_ok=True)
    return err


@pytest.mark.slow
def test_no_moment_loses_a_checkpoint(tmp_path, one_thread):
    """50 disturbances: last.pth is whole after each, and the training ends with the same bits."""
    training_cases.run("small", tmp_path / "complete", **OPTIONS)
    choose = random.Random(0)
    done, step, counts = 0, 0, dict.fromkeys(STATUSES, 0)
    with file_system(tmp_path / "disk", "2m") as disk:
        out = disk / "out"
        while done < TIMES:
            how = choose.choice(list(STATUSES))
            process = start(out)
            time.sleep(choose.uniform(0, 0.5))
            err = disturb(process, how, out)
            assert "Traceback" not in err, err
            if process.returncode == 0:  # it was faster: another run of the same length
                assert torch.load(out / "last.pth", weights_only=True)["step"] == 3 * EPOCHS
                for path in out.iterdir():
                    path.unlink()
                step = 0
                continue
            assert process.returncode == STATUSES[how], (how, err)
            done += 1
            counts[how] += 1
            if (out / "last.pth").exists():
                found = resume.read(out / "last.pth").step
                assert found >= step
                step = found
            else:
                assert step == 0
            if STATUSES[how] > 0:  # it could remove its temporary files
                assert not list(out.glob(f".*.{process.pid}-*.tmp"))
        print(counts)
        assert all(counts.values())
        process = start(out)
        _, err = process.communicate()
        assert process.returncode == 0, err
        states = [
            torch.load(folder / "last.pth", weights_only=True)
            for folder in (tmp_path / "complete", out)
        ]
        for state in states:
            del state["args"], state["pooling"]
        torch.testing.assert_close(*states, rtol=0, atol=0)
        tables = [(f / "metrics.csv").read_bytes() for f in (tmp_path / "complete", out)]
        assert tables[0] == tables[1]
        names = {path.name for path in out.iterdir()}
        assert names == {"last.pth", "best.pth", "metrics.csv", "loss.png", lock.NAME}
