"""benchmarks/gpu/run without a GPU: in tiny sizes, killed, continued, with steps that hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu.device import cases, networks, recorded_tests, results, supervise, times
from benchmarks.gpu.device.results import (
    BEGUN,
    DONE,
    FAILED,
    RIGHT,
    SKIPPED,
    STOPPED,
    WAITING,
    WRONG,
)
from benchmarks.gpu.device.supervise import ROOT, Run, Step
from swiftkernels.backends import devices
from swiftkernels.testing import costs, timing
from swiftkernels.testing.engines import OURS, missing
from swiftkernels.utils.files import read_csv

CPU = torch.device("cpu")
RUN = ROOT / "benchmarks" / "gpu" / "run"
TINY = ("--device", "cpu", "--tiny", "--networks", "xs", "--dtypes", "float32", "--batches", "2")

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def python(code: str, **options: Any) -> Step:
    """A step that runs code, named by its first word."""
    name = options.pop("name", code.split()[0])
    return Step(name, ("-c", code), **{"limit": 60.0} | options)


def run(folder: Path, *steps: Step, seconds: float = 100.0) -> dict[str, results.Row]:
    """The rows of steps.csv after a run of the steps; of those in the folder if there are none."""
    Run(folder, steps or None, seconds, say=lambda _: None)()
    return {row["step"]: row for row in read_csv(folder / results.STEPS)}


def states(rows: dict[str, results.Row]) -> dict[str, str]:
    return {name: row["state"] for name, row in rows.items() if name != "pictures"}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch) -> None:
    """Of runs in this process, because PyTorch and matplotlib take seconds to import."""
    monkeypatch.setattr(supervise, "PICTURES", python("print('none')", name="pictures"))


def test_without_a_gpu_the_other_steps_really_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [RUN, "--device", "cpu", "--out", tmp_path], env=environment(), capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert supervise.main(["--report", str(tmp_path)]) == 0  # had no time limit
    names = {*results.TABLES, results.LOG, results.REPORT}
    if not missing(["matplotlib"]):
        names |= {results.NETWORKS_PNG, results.OPERATORS_PNG}
        assert f"![{results.OPERATORS_PNG}]" in (tmp_path / results.REPORT).read_text()
    assert {path.name for path in tmp_path.iterdir()} == names
    steps = {row["step"]: row for row in read_csv(tmp_path / results.STEPS)}
    skipped = {name for name, row in steps.items() if row["state"] == SKIPPED}
    ran = {"device", "verify-first", "verify", "networks-float32", "training-float32", "operators"}
    assert steps.keys() - skipped - {"pictures"} == ran
    assert all(steps[name]["note"] == "needs a GPU" for name in skipped - {"pictures"})
    assert {steps[name]["state"] for name in ran} == {DONE}
    checks = read_csv(tmp_path / results.CHECKS)
    assert {row["outcome"] for row in checks} == {RIGHT}, checks
    kinds = {"verify", "networks", "training", "operators"}
    assert {row["step"] for row in checks} == kinds
    rows = read_csv(tmp_path / results.NETWORKS)
    forward = [row["engine"] for row in rows if row["direction"] == results.FORWARD]
    assert {"eager", "channels_last", OURS} <= set(forward)
    training = {row["engine"] for row in rows if row["direction"] == results.TRAINING}
    assert training == {"eager", "channels_last", "accelerated", "accelerated-channels_last"}
    assert all(float(row["min_seconds"]) > 0 and row["error"] for row in rows)
    assert {row["operator"] for row in read_csv(tmp_path / results.OPERATORS)} == {
        "additive_attention", "conv_mlp", "separable_attention",
    }  # fmt: skip
    assert len(done.stdout) < 12_000
    for text in (
        "autotune-float32: skipped; needs a GPU",
        "fused, graph=False |",
        "Training step in ms",
    ):
        assert text in done.stdout
    written = (tmp_path / results.REPORT).read_text()
    assert "needs a GPU" in written
    assert "The times mean nothing" in written


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable}


def processes_with(text: str) -> list[int]:
    """Processes that have a text in their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it ended
            continue
    return found


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@needs_linux
def test_a_killed_run_keeps_its_results_and_goes_on(tmp_path: Path) -> None:
    steps = [
        Step("device", supervise.measure("device", *TINY), 100.0),
        Step("verify", supervise.measure("verify", *TINY), 100.0),
    ]
    Run(tmp_path, steps, 100.0)  # writes the plan
    command = [RUN, "--resume", tmp_path]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)

    def finished() -> dict[str, results.Row]:
        rows = read_csv(tmp_path / results.CHECKS)
        return {row["case"]: row for row in rows if row["outcome"] != BEGUN}

    wait_for(lambda: len(finished()) >= 2 or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not processes_with(str(tmp_path)))  # the step ends with it
    kept = finished()
    assert len(kept) >= 2
    assert "verify" in (tmp_path / results.LOG).read_text()
    rows = {row["step"]: row["state"] for row in read_csv(tmp_path / results.STEPS)}
    assert rows["device"] == DONE
    assert rows["verify"] == results.RUNNING

    again = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "verify: done" in again.stdout
    found = finished()
    assert len(found) > len(kept)
    assert {name: found[name] for name in kept} == kept  # not measured again


@needs_linux
def test_a_step_that_hangs_is_killed_with_its_processes(tmp_path: Path) -> None:
    sleep = f"import time; time.sleep(300)  # {tmp_path}"
    hang = "import subprocess, sys; print('case 7', flush=True);"
    hang += f"subprocess.run([sys.executable, '-c', {sleep!r}])"
    rows = run(
        tmp_path, python(hang, name="hang", limit=3.0), python("print('after')", name="next")
    )
    assert states(rows) == {"hang": STOPPED, "next": DONE}
    assert rows["hang"]["note"] == "stopped after 3 s; last: case 7"
    assert rows["next"]["note"] == "after"
    assert not processes_with(sleep)
    assert "stopped after 3 s" in (tmp_path / results.REPORT).read_text()

    # The next run tries it last, and says so in its exit status.
    order: list[str] = []
    steps = Rows(tmp_path)
    steps.put([steps.get("next") | {"state": WAITING}])
    finished = Run(tmp_path, None, 100.0, say=lambda line: order.append(line.split(":")[0]))()
    assert order == ["next", "hang", "pictures"]
    assert not finished


def Rows(folder: Path) -> results.Rows:  # noqa: N802
    return results.Rows(folder / results.STEPS, results.STEP_COLUMNS, ("step",))


def test_a_step_that_breaks_is_named(tmp_path: Path) -> None:
    rows = run(
        tmp_path,
        python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", name="signal"),
        python("raise SystemExit('no such thing')", name="status"),
        python(f"print('wrong: 2'); raise SystemExit({results.FOUND_ERRORS})", name="wrong"),
        python("import sys; print(3); sys.exit(9)", name="nine"),
    )
    assert rows["signal"]["note"].startswith("SIGSEGV")
    assert rows["nine"]["note"] == "exit status 9: 3"
    assert rows["status"]["note"] == "exit status 1: no such thing"
    assert (rows["wrong"]["state"], rows["wrong"]["note"]) == (DONE, "wrong: 2")
    assert {rows[name]["state"] for name in ("signal", "status", "nine")} == {results.BROKEN}


def test_a_lost_device_is_given_another_process(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = (
        f"import pathlib, sys; m = pathlib.Path({str(mark)!r}); n = m.exists(); m.touch(); print(n)"
    )
    rows = run(tmp_path, python(f"{code}; sys.exit(0 if n else {devices.LOST})", name="lost"))
    assert (rows["lost"]["state"], rows["lost"]["note"]) == (DONE, "True")
    assert (tmp_path / results.LOG).read_text().count("== lost") == 2


def test_what_has_no_time_left_waits(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(supervise, "LEAST_SECONDS", 2.0)
    slow = python(
        "import time; print('begun', flush=True); time.sleep(60)", name="slow", limit=90.0
    )
    rows = run(tmp_path, slow, python("print(1)", name="next"), seconds=4.0)
    assert states(rows) == {"slow": WAITING, "next": WAITING}
    assert rows["slow"]["note"] == "time was over; last: begun"
    assert rows["next"]["tries"] == "0"
    steps = Rows(tmp_path)
    assert steps.get("pictures")["state"] == DONE
    steps.put([steps.get("slow") | {"command": "-c pass"}])
    assert states(run(tmp_path)) == {"slow": DONE, "next": DONE}


def test_missing_packages_skip_their_step_by_name(tmp_path: Path) -> None:
    step = python("print(1)", name="packages", needs=("torch", "no_such", "nor_this"))
    rows = run(tmp_path, step)
    assert rows["packages"]["state"] == SKIPPED
    assert rows["packages"]["note"] == "needs no_such, nor_this"


def test_a_run_does_not_go_on_with_results_of_another_machine(tmp_path: Path) -> None:
    run(tmp_path, python("print('GPU A')", name="device"), python("print(1)", name="next"))
    steps = Rows(tmp_path)
    steps.put([steps.get("device") | {"command": "-c \"print('GPU B')\""}])
    with pytest.raises(ValueError, match="its results are of GPU A, and this is GPU B"):
        run(tmp_path)
    assert Rows(tmp_path).get("device")["note"] == "GPU A"


def test_wrong_arguments(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(devices, "gpus", list)
    with pytest.raises(ValueError, match="torch sees none"):
        supervise.main(["--out", str(tmp_path)])
    with pytest.raises(ValueError, match=r"has no steps\.csv"):
        supervise.main(["--report", str(tmp_path)])
    with pytest.raises(ValueError, match=r"has no steps\.csv"):
        supervise.main(["--resume", str(tmp_path), "--device", "cpu"])
    Run(tmp_path, [], 1.0)
    with pytest.raises(ValueError, match="Go on with them by --resume"):
        supervise.main(["--out", str(tmp_path), "--device", "cpu"])
    with (
        supervise.alone_in(tmp_path),
        pytest.raises(ValueError, match="no other run works"),
        supervise.alone_in(tmp_path),
    ):
        pass


def test_a_copy_goes_on_elsewhere(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    run(first, python("print(1)", name="one", needs=("no_such",)))
    given = supervise.parse(["--resume", str(first), "--out", str(second)])
    assert supervise.prepare(given) == second
    assert Rows(second).get("one")["state"] == SKIPPED


def test_retry_runs_what_was_wrong_again(tmp_path: Path) -> None:
    steps = [python("print(1)", name="one"), python("print(2)", name="two", needs=("no_such",))]
    run(tmp_path, *steps)
    checks = results.checks(tmp_path)
    for name, outcome in (("a", RIGHT), ("b", WRONG), ("c", FAILED)):
        checks.put([{"step": "one", "case": name, "outcome": outcome}])
    supervise.retry(tmp_path)
    assert results.checks(tmp_path).outcomes("one") == {"a": RIGHT}
    rows = {row["step"]: row["state"] for row in read_csv(tmp_path / results.STEPS)}
    assert rows == {"one": WAITING, "two": SKIPPED, "pictures": WAITING}


def settings(folder: Path) -> cases.Settings:
    return cases.Settings(folder, CPU, ("xs",), ("float32",), (2,), False, False, True)


def test_cases_are_written_one_by_one_and_not_run_again(tmp_path: Path, monkeypatch) -> None:
    ran: list[str] = []

    def case(name: str, outcome: str = RIGHT) -> cases.Case:
        def call() -> results.Row:
            assert results.checks(tmp_path).get("step", name)["outcome"] == BEGUN
            ran.append(name)
            if outcome == FAILED:
                raise RuntimeError(f"no {name}\nbecause")
            return {"outcome": outcome, "output": 0.5}

        return call

    todo = {
        ("a", "float32"): case("a"),
        ("b", "float32"): case("b", FAILED),
        ("c", "float16"): case("c"),
    }
    checks = results.checks(tmp_path)
    checks.put([{"step": "step", "case": "a", "dtype": "float32", "outcome": BEGUN}])
    assert cases.run_cases("step", todo, settings(tmp_path)) == results.FOUND_ERRORS
    assert ran == ["b", "c", "a"]  # a process ended in a before
    checks = results.checks(tmp_path)
    assert checks.outcomes("step") == {"a": RIGHT, "b": FAILED, "c": RIGHT}
    assert checks.get("step", "b")["note"] == "RuntimeError: no b"
    assert cases.run_cases("step", todo, settings(tmp_path)) == results.FOUND_ERRORS
    assert ran == ["b", "c", "a"]

    monkeypatch.setattr(devices, "why_lost", lambda device: "illegal memory access")
    todo = {(name, "float32"): case(name) for name in "dcef"}
    assert cases.run_cases("step", todo, settings(tmp_path)) == devices.LOST
    assert ran == ["b", "c", "a", "d"]


class FakeGpu:
    """Stands for a GPU in `times._time_engines`: it computes on the CPU, at times of its own."""

    type = "cuda"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(times, "machine", lambda device: {"device": "fake"})
        monkeypatch.setattr(timing, "Stopwatch", lambda device: self.measure)
        monkeypatch.setattr(timing, "capture", self.capture)
        monkeypatch.setattr(costs, "peak_bytes", lambda call, device: 7)
        monkeypatch.setattr(devices, "why_lost", lambda device: "")
        self.captured: list[Any] = []

    def measure(self, call: Any, queued: bool = False) -> float:
        call()
        return 0.5 if queued else 2.0

    def capture(self, call: Any) -> Any:
        (out,) = call()
        if out == 3:
            raise RuntimeError("cannot be captured")
        self.captured.append(out.item())
        return lambda: [out]


def test_engines_on_a_gpu_are_checked_captured_and_timed(tmp_path: Path, monkeypatch) -> None:
    gpu = FakeGpu(monkeypatch)

    def engine(value: float, fails: bool = False) -> Any:
        def build() -> Any:
            if fails:
                raise RuntimeError("does not compile\nat all")
            return lambda: [torch.tensor(value)]

        return build

    def wrong(name: str, row: results.Row, outputs: Sequence[torch.Tensor]) -> str:
        row["error"] = outputs[0].item()
        return "too large" if row["error"] > 3 else ""

    builders = {
        "eager": engine(1.0), "channels_last": engine(3.0), "compile": engine(4.0),
        "compile-max": engine(1.0, fails=True), OURS: engine(2.0), results.GRAPHS: engine(1.0),
    }  # fmt: skip
    given: Any = settings(tmp_path)._replace(device=gpu)
    net: Any = SimpleNamespace(name="swiftformer_xs", origin=OURS)
    found = times._time_engines(given, net, results.FORWARD, "float16", 8, builders, wrong)
    assert found["outcome"] == WRONG
    notes = "channels_last: no graph: RuntimeError: cannot be captured; compile: too large; "
    assert found["note"] == f"{notes}compile-max: RuntimeError: does not compile"
    rows = {row["engine"]: row for row in read_csv(tmp_path / results.NETWORKS)}
    assert list(rows) == list(builders)
    columns = ("images_per_second", "graph_images_per_second", "peak_bytes")
    assert {name: tuple(row[c] for c in columns) for name, row in rows.items()} == {
        "eager": ("4", "16", "7"),
        "channels_last": ("4", "", "7"),
        "compile": ("", "", ""),
        "compile-max": ("", "", ""),
        OURS: ("4", "16", "7"),
        results.GRAPHS: ("4", "", ""),
    }
    assert gpu.captured == [1.0, 2.0]


def test_a_network_without_its_graph_is_named() -> None:
    calls: list[torch.Tensor] = []
    images = torch.zeros(2, 3, 8, 8)
    notes = [
        SimpleNamespace(shape=(2, 3, 8, 8), reason=""),
        SimpleNamespace(shape=(1,), reason="x"),
    ]

    class Fused:
        report = SimpleNamespace(graphs=notes)

        def __call__(self, x: torch.Tensor) -> None:
            calls.append(x)

    network = Fused()
    assert networks.why_no_graph(network, images) == ""
    assert len(calls) == 3
    notes[0].reason = "no memory"
    assert networks.why_no_graph(network, images) == "no memory"
    assert networks.why_no_graph(network, images[:1]) == "such images were not captured"


def test_a_device_is_lost_when_no_call_answers(monkeypatch) -> None:
    assert devices.why_lost(CPU) == ""

    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    broken = SimpleNamespace(synchronize=fail)
    monkeypatch.setattr(torch, "get_device_module", lambda device: broken)
    expected = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert devices.why_lost(torch.device("cuda")) == expected


def test_outcomes_of_tests_are_recorded(tmp_path: Path) -> None:
    recorder = recorded_tests.Recorder(settings(tmp_path))

    def report(name: str, when: str, outcome: str, longrepr: Any = None) -> None:
        recorder.pytest_runtest_logreport(
            SimpleNamespace(
                nodeid=name, when=when, outcome=outcome, longrepr=longrepr, duration=0.5
            )
        )

    report("a", "setup", "passed")
    report("a", "call", "passed")
    report("a", "teardown", "passed")
    report("b", "setup", "skipped", ("file", 1, "Skipped: needs two GPUs"))
    report("c", "call", "failed", SimpleNamespace(reprcrash=SimpleNamespace(message="assert 1\n")))
    report("d", "call", "failed", "worker crashed")
    rows = {row["case"]: row for row in read_csv(tmp_path / results.CHECKS)}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "a": RIGHT, "b": SKIPPED, "c": FAILED, "d": FAILED,
    }  # fmt: skip
    notes = [rows[name]["note"] for name in "abcd"]
    assert notes == ["", "Skipped: needs two GPUs", "assert 1", "worker crashed"]


ENGINE_SECONDS = {"eager": 4.0, "channels_last": 3.0, "compile-max": 2.0, OURS: 1.0}


def network_rows(
    networks: Sequence[str], batches: Sequence[int], dtypes: Sequence[str], direction: str
) -> list[results.Row]:
    return [
        {
            "network": f"swiftformer_{name}", "direction": direction, "dtype": dtype,
            "batch": batch, "side": 224, "engine": engine, "rounds": 9, "graph_rounds": 9,
            "median_seconds": seconds * batch / 1e3, "min_seconds": seconds * batch / 2e3,
            "graph_median_seconds": seconds * batch / 4e3, "peak_bytes": 3 << 20,
            "graph_min_seconds": seconds * batch / 8e3,
            "device": "GPU", "torch": "2", "triton": "3",
        }
        for name in networks for batch in batches for dtype in dtypes
        for engine, seconds in ENGINE_SECONDS.items()
    ]  # fmt: skip


def test_tables_have_images_per_second_and_gains(tmp_path: Path) -> None:
    rows = results.networks(tmp_path)
    rows.put(network_rows(["xs"], [64], ["float16"], results.FORWARD))
    found = read_csv(tmp_path / results.NETWORKS)
    table = results.throughput_table(found, [""], minima=True).splitlines()
    assert table[0].split("|")[4].strip() == "eager"
    cells = [cell.strip() for cell in table[2].split("|")[1:-1]]
    expected = ["XS", "float16", "64", "250 (500)", "333 (667)", "500 (1,000)", "1,000 (2,000)"]
    assert cells == [*expected, "2.00"]
    both = results.throughput_table(found, list(results.MODES))
    assert "| 1,000 / 4,000 | 2.00 / 2.00 |" in " ".join(both.split())
    training = network_rows(["xs"], [64], ["float32"], results.TRAINING)
    rows.put([row for row in training if row["engine"] != OURS])
    assert "256.0 (128.0), 3 MiB" in results.training_table(read_csv(tmp_path / results.NETWORKS))


def test_the_summary_stays_short(tmp_path: Path) -> None:
    Run(tmp_path, supervise.plan("cuda:0"), 1.0)
    checks = results.checks(tmp_path)
    checks.put(
        {"step": step, "case": f"{dtype} {i}", "dtype": dtype, "outcome": FAILED, "note": "x" * 500}
        for step in ("verify", "networks", "tests")
        for dtype in ("float16", "float32", "bfloat16", "float64")
        for i in range(30)
    )
    rows = results.networks(tmp_path)
    dtypes = ["float16", "float32", "tf32"]
    for direction in (results.FORWARD, results.TRAINING):
        rows.put(network_rows(networks.SIZES, [1, 8, 64, 128], dtypes, direction))
    text = results.summary(tmp_path)
    assert len(text) <= results.LONGEST
    assert "Not finished: device" in text
    assert text.endswith(f"the rest is in {results.REPORT}")
    results.write_report(tmp_path)
    whole = (tmp_path / results.REPORT).read_text()
    assert "and 320 more in checks.csv" in whole
    assert whole.count("| XS ") == 4 * 3 * 3


def test_some_steps_only(tmp_path: Path) -> None:
    steps = [python("print('ran')", name=name) for name in ("first", "second", "third")]
    Run(tmp_path, steps, 100.0, ["third", "first"], say=lambda _: None)()
    rows = {row["step"]: row["state"] for row in read_csv(tmp_path / results.STEPS)}
    assert (rows["first"], rows["second"], rows["third"]) == (DONE, results.WAITING, DONE)
    with pytest.raises(ValueError, match="--steps must be names of steps of the folder: first"):
        Run(tmp_path, None, 100.0, ["fourth"], say=lambda _: None)()


def test_the_plan_has_its_steps_in_order() -> None:
    steps = [step.name for step in supervise.plan("cuda:0")]
    first = ["device", "verify-first", "networks-float16", "training", "tests"]
    assert steps[: len(first)] == first
    assert len(set(steps)) == len(steps)
    tiny = supervise.tiny_plan("cpu")
    assert [step.name for step in tiny] == steps
    assert all("--tiny" in step.command for step in tiny if not step.gpu and step.name != "device")
    for step in (*supervise.plan("cuda:0"), *tiny):
        assert Step.of({**{k: str(v) for k, v in step.row().items()}}) == step
