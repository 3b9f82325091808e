"""Accuracy against latency of small networks that differ only in their token mixer.

`python -m benchmarks.tradeoff` trains each on Fashion-MNIST with several seeds, times the trained
networks and the bare mixers, and writes tradeoff.csv, tokens.csv and two plots drawn from them. The
plots of the documentation come from `--full`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import plots
from benchmarks.data import Dataset, Split, load
from benchmarks.networks import MIXERS, WIDTH, Classifier
from swiftkernels.backends import devices
from swiftkernels.testing.timing import Call, Stopwatch, Timing, clock_name, interleave
from swiftkernels.utils import command, progress
from swiftkernels.utils.files import make_folder, write_csv

DEFAULT_MIXERS = tuple(m for m in MIXERS if m not in ("additive_sum", "additive_linear"))
BATCHES = (1, 32)
"""Batch sizes at which the trained networks are timed."""
SIDES = (7, 14, 28, 56, 112)
"""Sides of the square grids of tokens at which the bare mixers are timed."""
LONGEST_CALL = 2.0
"""Seconds. Larger sizes of a mixer are skipped once a call could take longer."""


class Extent(NamedTuple):
    """How much a run does."""

    seeds: int
    epochs: int
    per_class: int | None
    """As in `Settings`."""
    sides: tuple[int, ...]
    seconds: float


EXTENTS = {
    "quick": Extent(1, 3, 300, SIDES[:3], 1.0),
    "default": Extent(2, 5, 300, SIDES[:4], 2.0),
    "full": Extent(3, 8, None, SIDES, 6.0),
}

BATCH = 64
LEARNING_RATE = 5e-3


@dataclass(frozen=True)
class Settings:
    """What one run of the command does."""

    mixers: tuple[str, ...]
    seeds: int
    epochs: int
    out: Path
    data: Path | None = None
    per_class: int | None = None
    """Images of each class in training and test; None for all."""
    device: str = "cpu"
    threads: int = 1
    """While timing. Workers train with one: accuracies do not depend on the number of cores."""
    workers: int = 1
    sides: tuple[int, ...] = SIDES
    seconds: float = 6.0
    """Time for the rounds of one comparison."""

    def dataset(self) -> Dataset:
        dataset = load(self.data)
        if self.per_class is None:
            return dataset
        return Dataset(dataset.name, *(s.per_class(self.per_class) for s in dataset[1:]))


class Job(NamedTuple):
    """One network to train."""

    mixer: str
    seed: int


class Trained(NamedTuple):
    """One trained network."""

    job: Job
    accuracy: float
    """Share of the test images classified correctly."""
    weights: dict[str, np.ndarray]
    """State dict; as NumPy arrays, which pass between processes without shared memory."""


def run(settings: Settings) -> None:
    """Train, measure, write the CSV files and the plots, and print the table."""
    dataset = settings.dataset()
    make_folder("--out", settings.out)
    trained = train_all(settings, dataset)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with torch.inference_mode():
            tradeoff = time_networks(settings, dataset, trained)
            tokens = time_mixers(settings)
    finally:
        torch.set_num_threads(threads)
    write_csv(settings.out / plots.TRADEOFF_CSV, tradeoff, digits=6)
    write_csv(settings.out / plots.TOKENS_CSV, tokens, digits=6)
    images = plots.draw(settings.out)
    print(table(tradeoff))
    files = [settings.out / plots.TRADEOFF_CSV, settings.out / plots.TOKENS_CSV, *images]
    print("\nWritten: " + ", ".join(str(file) for file in files))


def train_all(settings: Settings, dataset: Dataset) -> list[Trained]:
    """Train every mixer with the first seed, then with the next one."""
    jobs = [Job(m, seed) for seed in range(settings.seeds) for m in settings.mixers]
    one_by_one = settings.workers == 1
    training = (
        _train_in_turn(settings, dataset, jobs) if one_by_one else _train_in_workers(settings, jobs)
    )
    results = {}
    with progress.Progress(len(jobs), "networks", "training networks", leave=True) as bar:
        for trained in training:
            results[trained.job] = trained
            bar.advance()
    return [results[job] for job in jobs]


def _train_in_turn(settings: Settings, dataset: Dataset, jobs: list[Job]) -> Iterator[Trained]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for job in jobs:
            yield train(job, settings, dataset, position=1)
    finally:
        torch.set_num_threads(threads)


def _train_in_workers(settings: Settings, jobs: list[Job]) -> Iterator[Trained]:
    context = multiprocessing.get_context("spawn")  # fork does not work with torch's threads
    lock = context.RLock()  # for the progress bars, which share the screen
    progress.share_lock(lock)
    executor = ProcessPoolExecutor(
        min(settings.workers, len(jobs)),
        mp_context=context,
        initializer=_start_worker,
        initargs=(settings, context.Value("i", 0), lock),
    )
    with executor:
        try:
            for future in as_completed([executor.submit(_train_in_worker, j) for j in jobs]):
                yield future.result()
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


_worker: tuple[Settings, Dataset, int]


def _start_worker(settings: Settings, counter: Any, lock: Any) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent process reports the interruption
    torch.set_num_threads(1)
    progress.share_lock(lock)
    with counter.get_lock():
        counter.value += 1
        _worker = (settings, settings.dataset(), counter.value)


def _train_in_worker(job: Job) -> Trained:
    settings, dataset, position = _worker
    return train(job, settings, dataset, position)


def train(job: Job, settings: Settings, dataset: Dataset, position: int) -> Trained:
    """Train one network and evaluate it; `position` is the line of its progress bar.

    The order and the flips of the images depend only on the seed, not on the mixer.
    """
    device = torch.device(settings.device)
    images, labels = to_tensors(dataset.train, device)
    model = Classifier(job.mixer, job.seed).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05, fused=True)
    batch = min(BATCH, len(images))
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=settings.epochs * steps, pct_start=0.25
    )
    generator = torch.Generator().manual_seed(job.seed)
    with progress.Progress(
        settings.epochs * steps, "steps", f"{job.mixer}, seed {job.seed}", position=position
    ) as bar:
        for _ in range(settings.epochs):
            order = torch.randperm(len(images), generator=generator)
            for rows in order[: steps * batch].split(batch):
                flip = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
                rows, flip = rows.to(device), flip.to(device)
                x = torch.where(flip, images[rows].flip(-1), images[rows])
                loss = F.cross_entropy(model(x), labels[rows], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.advance()
    weights = {name: value.cpu().numpy() for name, value in model.state_dict().items()}
    return Trained(job, evaluate(model, dataset.test, device), weights)


@torch.no_grad()
def evaluate(model: Classifier, split: Split, device: torch.device) -> float:
    """Share of the images that `model` classifies correctly."""
    model.eval()
    images, labels = to_tensors(split, device)
    guesses = torch.cat([model(x).argmax(1) for x in images.split(500)])
    return (guesses == labels).double().mean().item()


def to_tensors(split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images [M, 1, 28, 28] with about zero mean and unit variance, and labels [M]."""
    images = torch.tensor(split.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(split.labels, dtype=torch.long)
    return ((images / 255 - 0.286) / 0.353).to(device), labels.to(device)


def time_networks(
    settings: Settings, dataset: Dataset, trained: Sequence[Trained]
) -> list[dict[str, Any]]:
    """One row per mixer: accuracy over the seeds, and latency of the first seed's network."""
    networks = {}
    for mixer in settings.mixers:
        network = Classifier(mixer)
        weights = next(t.weights for t in trained if t.job == Job(mixer, 0))
        network.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
        networks[mixer] = network.to(settings.device).eval()
    images, _ = to_tensors(dataset.test, torch.device(settings.device))
    timings = {}
    for batch in progress.track(BATCHES, "batch sizes", "timing networks", leave=True):
        x = images[torch.arange(batch, device=images.device) % len(images)]
        calls = {mixer: _bind(network, x) for mixer, network in networks.items()}
        timings[batch] = interleave(calls, Stopwatch(settings.device), settings.seconds)
    rows = []
    for mixer in settings.mixers:
        accuracies = [t.accuracy for t in trained if t.job.mixer == mixer]
        row: dict[str, Any] = {
            "mixer": mixer,
            "parameters": sum(p.numel() for p in networks[mixer].parameters()),
            "accuracy_mean": statistics.mean(accuracies),
            "accuracy_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else "",
            "accuracies": " ".join(f"{a:.4f}" for a in accuracies),
        }
        for batch in BATCHES:
            row.update(_quartiles(f"batch{batch}_ms", timings[batch][mixer]))
        row |= {
            "seeds": settings.seeds,
            "epochs": settings.epochs,
            "data": dataset.name,
            "train_images": len(dataset.train.labels),
            "test_images": len(dataset.test.labels),
            **_machine(settings),
        }
        rows.append(row)
    return rows


def time_mixers(settings: Settings) -> list[dict[str, Any]]:
    """One row per mixer and number of tokens, batch 1, width as in the networks."""
    modules = {}
    for mixer in settings.mixers:
        make = MIXERS[mixer]
        if make is not None:
            torch.manual_seed(0)
            modules[mixer] = make(WIDTH).to(settings.device).eval()
    rows: list[dict[str, Any]] = []
    last: dict[str, float] = {}
    sides = progress.track(settings.sides, "numbers of tokens", "timing mixers", leave=True)
    for i, side in enumerate(sides):
        if i:
            growth = (side / settings.sides[i - 1]) ** 4  # at worst quadratic in the tokens
            for mixer in list(modules):
                if last[mixer] * growth > LONGEST_CALL:
                    print(
                        f"{mixer} is not timed from {side**2} tokens up: "
                        f"a call could take over {LONGEST_CALL:g} s."
                    )
                    del modules[mixer]
        x = torch.randn(1, side**2, WIDTH, generator=torch.Generator().manual_seed(0))
        x = x.to(settings.device)
        calls = {mixer: _bind(module, x) for mixer, module in modules.items()}
        timings = interleave(calls, Stopwatch(settings.device), settings.seconds)
        for mixer, times in timings.items():
            last[mixer] = times.median
            rows.append(
                {
                    "mixer": mixer,
                    "tokens": side**2,
                    "width": WIDTH,
                    "batch": 1,
                    **_quartiles("latency_ms", times),
                    "seeds": settings.seeds,
                    **_machine(settings),
                }
            )
    return rows


def _bind(module: torch.nn.Module, x: Tensor) -> Call:
    return lambda: module(x)


def _quartiles(name: str, times: Timing) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    lower, median, upper = statistics.quantiles([1e3 * s for s in times.samples], n=4)
    return {name: median, f"{name}_q25": lower, f"{name}_q75": upper}


def _machine(settings: Settings) -> dict[str, Any]:
    return {
        "device": devices.name(torch.device(settings.device)),
        "threads": settings.threads,
        "clock": clock_name(settings.device),
        "dtype": "float32",
        "torch": torch.__version__,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy, its difference to the control seed by seed, latency and parameters."""
    accuracies = {row["mixer"]: [float(a) for a in row["accuracies"].split()] for row in rows}
    lines = [
        f"{'mixer':<18}{'accuracy %':>14}{'minus none':>14}"
        + "".join(f"{f'ms, batch {b}':>14}" for b in BATCHES)
        + f"{'parameters':>12}"
    ]
    for row in sorted(rows, key=lambda row: -row["accuracy_mean"]):
        mixer = row["mixer"]
        difference = "-"
        if "none" in accuracies and mixer != "none":
            pairs = zip(accuracies[mixer], accuracies["none"], strict=True)
            difference = _mean_sd([a - b for a, b in pairs], "+.2f")
        lines.append(
            f"{mixer:<18}{_mean_sd(accuracies[mixer], '.2f'):>14}{difference:>14}"
            + "".join(f"{row[f'batch{b}_ms']:>14.3f}" for b in BATCHES)
            + f"{row['parameters']:>12,}"
        )
    first = rows[0]
    note = (
        f"mean ± standard deviation over {first['seeds']} seeds, "
        f"{first['test_images']:,} test images; "
        f"median latency, {first['device']}, {first['threads']} thread(s)"
    )
    return "\n".join([*lines, note])


def _mean_sd(shares: Sequence[float], form: str) -> str:
    mean = format(100 * statistics.mean(shares), form)
    return f"{mean} ± {100 * statistics.stdev(shares):.2f}" if len(shares) > 1 else mean


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """The settings from the command line; wrong arguments end the program with a message."""
    parser = command.Parser(
        prog="python -m benchmarks.tradeoff",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    extent = parser.add_mutually_exclusive_group()
    quick_help = "fewer images, epochs, seeds and tokens: about a minute"
    extent.add_argument("--quick", action="store_true", help=quick_help)
    full_help = "all images, epochs, seeds and tokens: a quarter of an hour"
    extent.add_argument("--full", action="store_true", help=full_help)
    names = ", ".join(EXTENTS)
    seeds, epochs = (
        "/".join(str(getattr(e, field)) for e in EXTENTS.values()) for field in ("seeds", "epochs")
    )
    add("--seeds", type=positive, help=f"networks per mixer ({names}: {seeds})")
    add("--epochs", type=positive, help=f"({names}: {epochs})")
    add(
        "--mixers",
        nargs="+",
        choices=MIXERS,
        default=DEFAULT_MIXERS,
        metavar="MIXER",
        help=f"of {', '.join(MIXERS)} (default: all but additive_sum and additive_linear)",
    )
    add("--data", type=Path, help="folder with Fashion-MNIST's four idx files: use all its images")
    add("--out", type=Path, default=Path("results"), help="folder to write to (%(default)s)")
    add("--device", type=_device, default="cpu", help="cpu (default), cuda or cuda:N")
    add("--threads", type=positive, default=1, help="while timing on a CPU (%(default)s)")
    workers_help = "networks trained at a time, one thread each (default: one per core; 1 on CUDA)"
    add("--workers", type=positive, help=workers_help)
    given = parser.parse_args(arguments)
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out must be a folder; {given.out} is a file.")
    workers = given.workers or (1 if given.device != "cpu" else _cores())
    chosen = EXTENTS["quick" if given.quick else "full" if given.full else "default"]
    settings = Settings(
        mixers=tuple(dict.fromkeys(given.mixers)),
        seeds=given.seeds or chosen.seeds,
        epochs=given.epochs or chosen.epochs,
        out=given.out,
        data=given.data,
        per_class=chosen.per_class,
        device=given.device,
        threads=given.threads,
        workers=workers,
        sides=chosen.sides,
        seconds=chosen.seconds,
    )
    try:
        settings.dataset()
    except ValueError as error:
        parser.error(f"--data: {error}" if given.data else str(error))
    return settings


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1; got {text!r}")
    return int(text)


def _device(text: str) -> str:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N; got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{text!r} does not exist: torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return text


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(command.run(lambda: run(parse())))
