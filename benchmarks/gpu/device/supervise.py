"""Checks the kernels on a GPU and measures them there, within a limit of time.

Each step is a process with its own limit, the most important first; a step that hangs is killed.
All results are written as soon as they are there, so that a run that is killed at any moment leaves
what it has measured. --resume goes on with the rest. Missing packages skip the steps that need
them. Nothing is installed, and no network is used.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.device import results
from benchmarks.gpu.device.results import (
    BROKEN,
    DONE,
    FINISHED,
    RUNNING,
    SKIPPED,
    STOPPED,
    WAITING,
    Row,
    Rows,
)
from swiftkernels.backends import devices
from swiftkernels.testing.engines import missing
from swiftkernels.utils import command
from swiftkernels.utils.files import make_folder, remove_leftovers
from swiftkernels.utils.progress import duration
from swiftkernels.utils.text import shown

ROOT = Path(__file__).parents[3]
OUT = "{out}"
"""Stands for the folder in the commands of steps."""
PICTURES_SECONDS = 30.0
"""Reserved at the end for pictures and report."""
LEAST_SECONDS = 20.0
"""A step is not started with less time than this: PyTorch and the device take half of it."""
SAID = 120
"""Characters of a note in the line about a step."""
KILL_SECONDS = 10.0
"""How long the end of a killed process is waited for."""
DEVICE = "device"
"""The step that names the machine; it runs first, and again when a run goes on."""


@dataclass(frozen=True)
class Step:
    """A process that checks or measures something."""

    name: str
    command: tuple[str, ...]
    """Arguments of Python; `OUT` in them is the folder."""
    limit: float
    """Seconds."""
    needs: tuple[str, ...] = ()
    """Packages."""
    gpu: bool = False
    """Whether it needs a GPU."""

    def row(self) -> Row:
        """Of steps.csv, before the step runs."""
        needs = " ".join(self.needs)
        row: Row = {"step": self.name, "state": WAITING, "tries": 0, "limit": self.limit}
        return row | {"needs": needs, "gpu": int(self.gpu), "command": shlex.join(self.command)}

    @staticmethod
    def of(row: Row) -> Step:
        """The step of such a row."""
        return Step(
            row["step"], tuple(shlex.split(row["command"])), float(row["limit"]),
            tuple(row["needs"].split()), bool(int(row["gpu"])),
        )  # fmt: skip


def measure(step: str, *options: str) -> tuple[str, ...]:
    return ("-m", "benchmarks.gpu.device.measure", step, "--out", OUT, *options)


def plan(device: str) -> list[Step]:
    """All steps for a GPU, the most important first."""
    # Compilers of whole networks take a minute for each problem: they have steps of their own.
    half, single = ("--dtypes", "float16"), ("--dtypes", "float32")

    def step(
        name: str,
        kind: str,
        limit: float,
        *options: str,
        needs: tuple[str, ...] = (),
        gpu: bool = True,
    ) -> Step:
        return Step(name, measure(kind, "--device", device, *options), limit, needs, gpu)

    sizes = ("--batches", "64", "128", "1", "8")
    some = ("--networks", "xs", "l1")
    compiled = "--compiled"
    return [
        step(DEVICE, "device", 60, gpu=False),
        step("verify-first", "verify", 100, "--first", "--networks", "xs"),
        step("networks-float16", "networks", 160, *half, *sizes),
        step("training", "training", 90, "--dtypes", "bfloat16", *some),
        step("tests", "tests", 150, needs=("pytest",)),
        step("autotune-float16-xs", "networks", 150, *half, compiled, "--networks", "xs"),
        step("operators-float16", "operators", 80, *half),
        step("autotune-float16", "networks", 400, *half, *sizes, compiled),
        step("networks-float32", "networks", 140, *single, *sizes),
        step("training-compiled", "training", 240, "--dtypes", "bfloat16", *some, compiled),
        step("verify", "verify", 500),
        step("operators-compiled", "operators", 400, *half, compiled),
        step("autotune-float32", "networks", 500, *single, *sizes, compiled),
        step("training-float32", "training", 240, *single, compiled),
        step("operators", "operators", 300, "--batches", "8", "1"),
        step("networks-tf32", "networks", 120, "--dtypes", "tf32", *sizes),
    ]  # fmt: skip


def tiny_plan(device: str) -> list[Step]:
    """The same steps in tiny sizes, to try the command; those that need a GPU are skipped there."""
    sizes = ("--networks", "xs", "--dtypes", "float32", "--batches", "2")
    tiny = ("--device", device, "--tiny", *sizes)
    names = {"verify-first": ("verify", "--first"), "networks-float32": ("networks",)}
    names |= {"training-float32": ("training",), "operators": ("operators",), "verify": ("verify",)}
    found = []
    for step in plan(device):
        if step.name in names:
            kind, *options = names[step.name]
            step = Step(step.name, measure(kind, *options, *tiny), step.limit)
        found.append(step)
    return found


PICTURES = Step(
    "pictures", measure("pictures", "--device", "cpu"), PICTURES_SECONDS, ("matplotlib",)
)
"""Runs last, also after the time is over."""


class Run:
    """The steps of a folder.

    Args:
        folder: of the results.
        steps: to run; None: those that the folder has already.
        seconds: for all of them.
        only: names of the steps to run, in this order; empty: all that are not finished.
        say: gets a line about each step.
    """

    def __init__(
        self,
        folder: Path,
        steps: Sequence[Step] | None,
        seconds: float,
        only: Sequence[str] = (),
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.only, self.say = folder, only, say
        self.end = time.monotonic() + seconds
        self.rows = Rows(folder / results.STEPS, results.STEP_COLUMNS, ("step",))
        if steps is not None:
            self.rows.put([step.row() for step in (*steps, PICTURES)])
        self.steps = [Step.of(row) for row in self.rows]
        self.has_gpu = not results.is_tiny(folder)

    def __call__(self) -> bool:
        """Run what is not finished; returns whether all of it was right."""
        self._name_device()
        try:
            for step in self._order():
                left = self.end - time.monotonic()
                if left >= min(LEAST_SECONDS, step.limit):
                    self._try(step, left)
        finally:
            self._try(PICTURES, PICTURES_SECONDS)
        bad = [row["step"] for row in self.rows if row["state"] in (BROKEN, STOPPED)]
        wrong = [r for r in results.checks(self.folder) if r["outcome"] in results.ERRORS]
        return not (wrong or set(bad) - {PICTURES.name})

    def _name_device(self) -> None:
        """Run the first step, which names the machine.

        Raises:
            ValueError: the results are of another machine.
        """
        step = next((step for step in self.steps if step.name == DEVICE), None)
        if step is None:
            return
        before = self._row(step)
        self._try(step, step.limit)
        now = self._row(step)
        if before["state"] == now["state"] == DONE and before["note"] != now["note"]:
            self.rows.put([before])
            raise ValueError(
                f"--resume must be a folder of this machine; its results are of {before['note']}, "
                f"and this is {now['note']}. Start a new run with --out."
            )

    def _order(self) -> list[Step]:
        """What is not finished; last what was stopped or broke before.

        Raises:
            ValueError: a step of `only` is not in the folder.
        """
        by_name = {step.name: step for step in self.steps}
        if unknown := [name for name in self.only if name not in by_name]:
            raise ValueError(
                f"--steps must be names of steps of the folder: {', '.join(by_name)}; got "
                f"{', '.join(unknown)}. Start a new run with --out for others."
            )
        unfinished = [
            by_name[name]
            for name in self.only or by_name
            if name not in (DEVICE, PICTURES.name)
            and self._row(by_name[name])["state"] not in FINISHED
        ]
        return sorted(unfinished, key=lambda step: self._row(step)["state"] in (STOPPED, BROKEN))

    def _row(self, step: Step) -> Row:
        return self.rows.get(step.name)

    def _try(self, step: Step, left: float) -> None:
        """Run a step for at most `left` seconds, write what became of it, and the report."""
        row = dict(self._row(step))
        if why := self._why_skipped(step):
            row |= {"state": SKIPPED, "note": why}
        else:
            row |= {"state": RUNNING, "tries": int(row["tries"]) + 1, "note": ""}
            self.rows.put([row])
            began = time.monotonic()
            state, note = self._run(step, min(left, step.limit), left < step.limit)
            took = float(row["seconds"] or 0) + time.monotonic() - began
            row |= {"state": state, "note": note, "seconds": took}
        self.rows.put([row])
        results.write_report(self.folder)
        time_taken = f" in {duration(float(row['seconds']))}" if row["seconds"] else ""
        self.say(f"{step.name}: {row['state']}{time_taken}; {shown(row['note'], SAID)}")

    def _why_skipped(self, step: Step) -> str:
        if step.gpu and not self.has_gpu:
            return "needs a GPU"
        lacking = missing(step.needs)
        return f"needs {', '.join(lacking)}" if lacking else ""

    def _run(self, step: Step, seconds: float, at_deadline: bool) -> tuple[str, str]:
        """State and note of a step that runs for so many seconds at most."""
        end = time.monotonic() + seconds
        log = self.folder / results.LOG
        arguments = [part.replace(OUT, str(self.folder)) for part in step.command]
        status: int | None = devices.LOST
        while status == devices.LOST and (left := end - time.monotonic()) > 0:
            with log.open("ab") as file:
                file.write(f"\n== {step.name}\n".encode())
                start = file.tell()
                file.flush()
                status = run_process([sys.executable, *arguments], file, left)
        last = last_line(log, start)
        if status in (0, results.FOUND_ERRORS):
            return DONE, last
        if status is None or status == devices.LOST:
            if at_deadline:
                return WAITING, f"time was over; last: {last}"
            return STOPPED, f"stopped after {duration(seconds)}; last: {last}"
        ended = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return BROKEN, f"{ended}: {last}"


def run_process(arguments: Sequence[str], output: Any, seconds: float) -> int | None:
    """Run a command; it and all processes that it started end within so many seconds.

    Returns:
        The exit status; None if it was killed.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        # A process that waits for a broken driver may not end at all.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(KILL_SECONDS)


def last_line(log: Path, start: int) -> str:
    """The last line that is not empty in a file behind a position."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other run works in the folder.

    Raises:
        ValueError: another does.
    """
    import fcntl  # not on Windows

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"--out must be a folder in which no other run works; one works in "
                f"{shown(folder)}. Wait for it, or choose another folder."
            ) from error
        yield
    finally:
        os.close(handle)


def prepare(given: argparse.Namespace) -> Path:
    """The folder of the results; for --resume with --out a copy of the earlier ones.

    Raises:
        ValueError: --out has results of an earlier run, or --resume has none.
    """
    if given.resume:
        check_results("--resume", given.resume)
    out: Path = (given.out or given.resume or Path("results/gpu")).absolute()
    make_folder("--out", out)
    remove_leftovers(out)
    new = not (out / results.STEPS).exists()
    if given.resume and given.resume.absolute() != out and new:
        for name in (*results.TABLES, results.LOG):
            if (given.resume / name).exists():
                shutil.copy(given.resume / name, out / name)
    elif not (given.resume or new):
        raise ValueError(
            f"--out must be a folder without results of an earlier run; {shown(out)} has some. Go "
            f"on with them by --resume {shown(out)}, or choose another folder."
        )
    return out


def check_results(option: str, folder: Path) -> None:
    """Check that a folder is one of a run.

    Raises:
        ValueError: it is not.
    """
    if not (folder / results.STEPS).exists():
        raise ValueError(
            f"{option} must be a folder of results; {shown(folder)} has no {results.STEPS}. Give "
            "the --out of a run."
        )


def retry(folder: Path) -> None:
    """Let what was wrong or failed run again."""
    results.checks(folder).remove(results.ERRORS, "outcome")
    steps = Rows(folder / results.STEPS, results.STEP_COLUMNS, ("step",))
    steps.put([row | {"state": WAITING} for row in steps if row["state"] == DONE])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command.Parser(
        prog="benchmarks/gpu/run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, help="folder to write to (default: results/gpu)")
    add("--minutes", type=float, default=9.0, help="time for all steps (%(default)g)")
    add("--resume", type=Path, metavar="FOLDER", help="go on with the run of this folder")
    add("--retry", action="store_true", help="with --resume: what was wrong, too")
    names = [step.name for step in plan("cuda") if step.name != DEVICE]
    add("--steps", nargs="+", choices=names, metavar="STEP", help="only these, in this order")
    add("--report", type=Path, metavar="FOLDER", help="only write the report and the pictures")
    device_help = (
        "cuda:0, for example (default: the first GPU); cpu tries the command, in tiny sizes"
    )
    add("--device", help=device_help)
    given = parser.parse_args(arguments)
    if given.retry and not given.resume:
        parser.error("--retry needs --resume FOLDER")
    if given.minutes <= 0:
        parser.error(f"--minutes must be positive; got {given.minutes:g}")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; returns the exit status, 1 if something was wrong, failed or was stopped."""
    began = time.monotonic()
    given = parse(arguments)
    if given.report:
        return report(given.report)
    device = devices.find(given.device)
    folder = prepare(given)
    with alone_in(folder):
        steps = None
        if not given.resume:
            check_gpu(device, given.device is not None)
            steps = tiny_plan("cpu") if device.type == "cpu" else plan(str(device))
        elif not results.is_tiny(folder):
            check_gpu(device)
        if given.retry:
            retry(folder)
        seconds = 60 * given.minutes - PICTURES_SECONDS - (time.monotonic() - began)
        run = Run(folder, steps, seconds, given.steps or ())
        try:
            right = run()
        except KeyboardInterrupt as interruption:
            interruption.args = (f"to go on: --resume {folder}",)
            raise
        print(f"\n{results.summary(folder)}\n\nAll of it: {folder / results.REPORT}")
        return int(not right)


def check_gpu(device: torch.device, asked_for: bool = False) -> None:
    """Check that a run can measure something on a device.

    Raises:
        ValueError: it is a CPU that nobody asked for.
    """
    if device.type == "cpu" and not asked_for:
        raise ValueError(
            "--device must be a GPU; torch sees none, and `swiftkernels doctor` shows why. To try "
            "the command without a GPU, in tiny sizes: --device cpu"
        )


def report(folder: Path) -> int:
    """Write the report and the pictures of a folder."""
    check_results("--report", folder)
    if lacking := missing(PICTURES.needs):
        print(f"No pictures: they need {', '.join(lacking)}")
    else:
        from benchmarks.gpu.device import plots

        plots.draw(folder)
    results.write_report(folder)
    print(f"{results.summary(folder)}\n\nWritten: {folder / results.REPORT}")
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
