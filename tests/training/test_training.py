"""The recipe: loss, clipping, schedule, order of the images, interrupted and resumed runs."""

from __future__ import annotations

import copy
import csv
import doctest
import errno
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("matplotlib")

from benchmarks import training_memory
from swiftkernels.models import SwiftFormer, convert_state_dict
from swiftkernels.models.swiftformer import FAMILY
from swiftkernels.ops.additive_attention.layer import AttentionForward
from swiftkernels.training import (
    DistillationLoss,
    Recipe,
    clip_adaptively_,
    data,
    lock,
    losses,
    metrics,
    parameter_groups,
    recipe,
    trainer,
)
from swiftkernels.training.data import SeededDataset, ShuffledDraws
from swiftkernels.training.optimizer import clipped_parameters, learning_rate
from tests import training_cases
from tests.builds import ROOT
from tests.vision import import_torchvision


class Fixed(nn.Module):
    """A teacher with constant logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return self.logits


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def test_hard_distillation_equals_its_formula():
    head, head_dist, target = (t.requires_grad_() for t in tensors((4, 5), (4, 5), (4, 5)))
    labels = torch.tensor([0, 3, 4, 1])
    loss = DistillationLoss(nn.CrossEntropyLoss(), Fixed(target), "hard", alpha=0.3)
    found = loss.train()(torch.empty(4, 3, 8, 8), (head, head_dist), labels)
    p, q = head.softmax(1), head_dist.softmax(1)
    own = sum(-p[i, labels[i]].log().item() for i in range(4)) / 4
    distilled = sum(-q[i, target[i].argmax()].log().item() for i in range(4)) / 4
    assert found.item() == pytest.approx(0.7 * own + 0.3 * distilled, rel=1e-12)
    found.backward()
    assert head.grad is not None
    assert head_dist.grad is not None
    assert loss.teacher.logits.grad is None


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distillation_equals_its_formula(tau):
    head, head_dist, target = tensors((4, 5), (4, 5), (4, 5))
    labels = torch.eye(5, dtype=torch.float64)[:4] * 0.6 + 0.08  # as for mixed images
    loss = DistillationLoss(nn.CrossEntropyLoss(), Fixed(target), "soft", alpha=0.4, tau=tau)
    found = loss(torch.empty(4, 3, 8, 8), (head, head_dist), labels)
    t, s = (target / tau).softmax(1), (head_dist / tau).softmax(1)
    divergence = (t * (t.log() - s.log())).sum() / 4
    own = -(labels * head.softmax(1).log()).sum() / 4
    assert found.item() == pytest.approx((0.6 * own + 0.4 * tau**2 * divergence).item(), rel=1e-12)


def test_without_a_teacher_the_loss_is_the_base_loss():
    head, other = tensors((4, 5), (4, 5))
    labels = torch.tensor([0, 1, 2, 3])
    loss = DistillationLoss(nn.CrossEntropyLoss(), kind="none")
    images = torch.empty(4, 3, 8, 8)
    assert loss(images, head, labels) == loss(images, (head, other), labels)
    assert loss(images, head, labels) == F.cross_entropy(head, labels)


def test_wrong_arguments_of_distillation_raise():
    base, teacher = nn.CrossEntropyLoss(), Fixed(torch.zeros(2, 7))
    images, logits, labels = torch.empty(2, 3, 8, 8), torch.zeros(2, 5), torch.tensor([0, 1])
    for options, message in (
        ({"kind": "warm"}, "kind must be one of"),
        ({"kind": "hard"}, "teacher must be given"),
        ({"teacher": teacher, "kind": "none"}, "teacher must be given"),
        ({"teacher": teacher, "alpha": 2.0}, "alpha must be from 0 to 1"),
        ({"teacher": teacher, "tau": 0.0}, "tau must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillationLoss(base, **options)
    with pytest.raises(ValueError, match=r"distillation=True, call model\.set_distilled_training"):
        DistillationLoss(base, teacher)(images, logits, labels)
    with pytest.raises(ValueError, match=r"teacher must give logits \[2, 5\].*\[2, 7\]"):
        DistillationLoss(base, teacher)(images, (logits, logits), labels)


def test_gradients_are_clipped_unit_by_unit():
    weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]))
    weight.grad = torch.tensor([[0.03, 0.04], [0.3, 0.4], [1.0, 0.0]])
    bias = nn.Parameter(torch.tensor([0.6, 0.8]))
    bias.grad = torch.tensor([0.0, 2.0])
    clip_adaptively_([weight, bias, nn.Parameter(torch.ones(3))], factor=0.01)
    # Norms of 5, 0.5 and min_norm = 1e-3 allow gradients of norm 0.05, 0.005 and 1e-5.
    expected = torch.tensor([[0.03, 0.04], [0.003, 0.004], [1e-5, 0.0]])
    torch.testing.assert_close(weight.grad, expected)
    torch.testing.assert_close(bias.grad, torch.tensor([0.0, 0.01]))


def test_zero_gradients_stay_zero():
    weight = nn.Parameter(torch.zeros(2, 3, 1, 1))
    weight.grad = torch.zeros_like(weight)
    clip_adaptively_([weight])
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_biases_and_norms_do_not_decay_and_classifiers_are_not_clipped():
    model = SwiftFormer((8,), (2,), num_classes=5)
    decayed, kept = parameter_groups(model, 0.025)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.025, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    kept_names = {names[id(p)] for p in kept["params"]}
    assert kept_names == {
        n for n in names.values() if n.endswith("bias") or ".norm" in n or n.startswith("norm")
    } | {"stem.1.weight", "stem.4.weight"}
    assert len(decayed["params"]) + len(kept_names) == len(names)
    not_clipped = set(names.values()) - {names[id(p)] for p in clipped_parameters(model)}
    assert not_clipped == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_learning_rate_has_a_linear_warmup_and_a_cosine():
    rates = [learning_rate(s, 110, 10, 1.0, 0.1, 0.2) for s in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.55)
    assert rates[10] == max(rates) == 1.0
    assert rates[60] == pytest.approx(0.6)
    assert rates[110] == pytest.approx(0.2)
    assert learning_rate(0, 5, 0, 1.0, 0.1, 0.2) == 1.0


def test_processes_share_the_images_of_an_epoch():
    shares = [list(ShuffledDraws(range(11), 3, rank=r, processes=2)) for r in range(2)]
    assert [len(share) for share in shares] == [5, 5]
    both = {draw.image for share in shares for draw in share}
    assert len(both) == 10


def test_order_changes_with_the_epoch_and_can_start_in_the_middle():
    draws = ShuffledDraws(range(20), seed=3)
    first = list(draws)
    draws.start = 7
    assert list(draws) == first[7:]
    assert len(draws) == 13
    draws.start, draws.epoch = 0, 1
    second = [draw.image for draw in draws]
    assert sorted(second) == list(range(20))
    assert second != [draw.image for draw in first]


def test_repeated_images_go_to_different_processes_with_other_augmentation():
    class Noise:
        def __getitem__(self, index: int) -> tuple[int, float]:
            return index, torch.rand(()).item()

    shares = [list(ShuffledDraws(range(12), 0, 3, rank, 3)) for rank in range(3)]
    assert [p.image for p in shares[0]] == [p.image for p in shares[1]]
    assert len({p.image for p in shares[0]}) == 4
    dataset = SeededDataset(Noise(), seed=0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    samples = [dataset[share[0]] for share in shares]
    assert torch.equal(torch.get_rng_state(), before)
    assert len({sample[1] for sample in samples}) == 3
    assert dataset[shares[0][0]] == samples[0]
    assert SeededDataset(Noise(), seed=1)[shares[0][0]] != samples[0]


def test_loading_processes_do_not_change_the_images():
    garments = SeededDataset(training_cases.Garments(28, 2, True), seed=0)
    draws = ShuffledDraws(range(20), seed=0)
    found = []
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(
            garments, batch_size=10, sampler=draws, num_workers=workers
        )
        found.append(torch.cat([images for images, _ in loader]))
    assert torch.equal(*found)


def run_until_killed(name: str, out: Path, kill_after: int) -> None:
    command = [sys.executable, "-m", "tests.training_cases", name, str(out), str(kill_after)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def assert_resumed_run_is_the_same(name: str, folder: Path, kill_after: int) -> Any:
    rows = training_cases.run(name, folder / "complete")
    run_until_killed(name, folder / "killed", kill_after)
    stopped = torch.load(folder / "killed" / "last.pth", weights_only=True)
    complete = torch.load(folder / "complete" / "last.pth", weights_only=True)
    assert 0 < stopped["step"] < complete["step"]
    training_cases.run(name, folder / "killed", resume=True)
    resumed = torch.load(folder / "killed" / "last.pth", weights_only=True)
    for state in (complete, resumed):
        del state["args"], state["pooling"]
    torch.testing.assert_close(resumed, complete, rtol=0, atol=0)
    tables = [(folder / run / "metrics.csv").read_bytes() for run in ("complete", "killed")]
    assert tables[0] == tables[1]
    return rows, stopped


def test_resumed_run_is_the_same_bit_for_bit(tmp_path):
    # An epoch has three steps of 32 images: the run is killed in the second step of the second.
    _, stopped = assert_resumed_run_is_the_same("small", tmp_path, 3 * 32 + 40)
    assert stopped["step"] == 4
    assert stopped["model_ema"].keys() == stopped["model"].keys()


@pytest.mark.slow
def test_xs_learns_and_its_resumed_run_is_the_same_bit_for_bit(tmp_path):
    # An epoch has ten steps; there is a checkpoint after every second step.
    rows, stopped = assert_resumed_run_is_the_same("xs", tmp_path, (10 + 5) * 32 + 40)
    assert stopped["step"] == 16
    assert rows[-1]["train_loss"] < 0.85 * rows[0]["train_loss"]


def test_loss_falls_and_is_written_and_plotted(tmp_path):
    rows = training_cases.run(
        "small", tmp_path, epochs=6, accumulate=1, repeats=1, lr=1e-2, clip=0.05
    )
    ends = [row for row in rows if "top1" in row]
    assert len(ends) == 6
    trained = [row["train_loss"] for row in rows]
    assert sum(trained[-4:]) / 4 < 0.9 * trained[0]
    assert ends[-1]["val_loss"] < 0.9 * ends[0]["val_loss"]
    with (tmp_path / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == metrics.COLUMNS
    assert [float(row["train_loss"]) for row in table] == [row["train_loss"] for row in rows]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    best = torch.load(tmp_path / "best.pth", weights_only=True)
    top1 = max(max(row["top1"], row["ema_top1"]) for row in ends)
    assert best["step"] == next(r["step"] for r in ends if top1 in (r["top1"], r["ema_top1"]))
    assert not list(tmp_path.glob(".*.tmp"))


def test_second_training_into_a_folder_raises_and_changes_nothing(tmp_path):
    training_cases.run("small", tmp_path, epochs=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    holder = f"process {os.getpid()} on {socket.gethostname()}, since 20"
    with lock.locked(tmp_path):
        for resume in (False, True):
            with pytest.raises(ValueError, match=f"{tmp_path} is locked by {holder}.* UTC"):
                training_cases.run("small", tmp_path, epochs=1, resume=resume)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == after.keys()
    assert all(before[name] == after[name] for name in before if name != lock.NAME)
    training_cases.run("small", tmp_path, epochs=1, resume=True)


HOLD = """
import os, sys
from pathlib import Path
from swiftkernels.training import lock
with lock.locked(Path(sys.argv[1])):
    if os.fork() == 0:  # a loading process that runs longer than the training
        os.close(1)
        sys.stdin.read()
        os._exit(0)
    print(flush=True)
    sys.stdin.read()
"""


def test_a_lock_that_ends_in_a_moment_is_waited_for(tmp_path):
    """As that of a killed process, which the system may release a little later."""
    pytest.importorskip("fcntl")
    held = lock.locked(tmp_path)
    held.__enter__()
    timer = threading.Timer(0.2, held.__exit__, (None, None, None))
    timer.start()
    with lock.locked(tmp_path) as exclusive:
        assert exclusive
    timer.join()


def test_killed_training_releases_its_lock(tmp_path):
    pytest.importorskip("fcntl")
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        process.stdout.readline()
        with pytest.raises(ValueError, match=f"locked by process {process.pid} on"):
            lock.locked(tmp_path).__enter__()
        process.kill()
        process.wait()
        with lock.locked(tmp_path):
            assert f"process {os.getpid()} on" in (tmp_path / lock.NAME).read_text()


def test_file_system_without_locks_is_reported(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def unable(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unable)
    left = tmp_path / ".last.pth.123-0123abcd.tmp"
    left.touch()
    training_cases.run("small", tmp_path, epochs=1)
    assert left.exists()  # another training may be writing it
    assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_temporary_files_of_a_killed_training_are_removed(tmp_path):
    training_cases.run("small", tmp_path, epochs=1)
    left = tmp_path / ".last.pth.123-0123abcd.tmp"
    left.touch()
    training_cases.run("small", tmp_path, epochs=1, resume=True)
    assert not left.exists()


def test_full_disk_ends_the_command_with_one_line(tmp_path, monkeypatch, capsys, request):
    from swiftkernels.training import __main__ as command

    training_cases.run("small", tmp_path, epochs=1)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")}
    request.getfixturevalue("full_disk")
    monkeypatch.setattr(trainer, "CHANGEABLE", (*trainer.CHANGEABLE, "epochs"))
    monkeypatch.setattr(
        command, "train", lambda recipe: training_cases.run("small", recipe.out, resume=True)
    )
    assert command.main(["--out", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == f"error: [Errno 28] No space left on device: '{tmp_path / 'last.pth'}'"
    assert not any("Traceback" in line for line in lines)
    assert not list(tmp_path.glob(".*"))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")} == before


def test_scores_equal_those_of_the_predictions():
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4], [0, 1, 2, 3, 4, 5]])

    class Table(nn.Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return logits[images.long()]

    model = Table(1, 1)
    batches = [([0, 0], [0, 4]), ([1], [0])]
    found = trainer.evaluate(model, [tuple(map(torch.tensor, batch)) for batch in batches])
    expected = F.cross_entropy(logits[[0, 0, 1]], torch.tensor([0, 4, 0]))
    assert found.loss == pytest.approx(expected.item())
    assert (found.top1, found.top5) == pytest.approx((100 / 3, 200 / 3))
    assert model.training


def test_existing_checkpoints_and_other_options_raise(tmp_path):
    training_cases.run("small", tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"last\.pth exists\. Pass resume"):
        training_cases.run("small", tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"lr=0\.005, got 0\.001"):
        training_cases.run("small", tmp_path, epochs=1, lr=1e-3, resume=True)
    again = training_cases.run("small", tmp_path, epochs=1, resume=True, save_every=7)
    assert [row["step"] for row in again] == [3]


def without(*names: str) -> Any:
    return lambda found: {k: v for k, v in found.items() if k not in names}


def having(**entries: Any) -> Any:
    return lambda found: found | entries


def with_weights(entry: str, change: Any) -> Any:
    """The last floating-point tensor of an entry, changed."""

    def changed(found: dict[str, Any]) -> dict[str, Any]:
        name = [k for k, t in found[entry].items() if t.is_floating_point()][-1]
        return found | {entry: found[entry] | {name: change(found[entry][name])}}

    return changed


def with_state(change: Any) -> Any:
    """The optimizer's state of one parameter, changed."""

    def changed(found: dict[str, Any]) -> dict[str, Any]:
        optimizer = found["optimizer"]
        state = {**optimizer["state"], 3: change(optimizer["state"][3])}
        return found | {"optimizer": {**optimizer, "state": state}}

    return changed


WRONG = {
    "list": (lambda found: [1, 2], "it holds a list"),
    "tensor": (lambda found: torch.ones(3), "it holds a Tensor"),
    "weights only": (lambda found: found["model"], "it has no args, model, model_ema"),
    "no args": (without("args"), "it has no args"),
    "no model": (without("model"), "it has no model"),
    "no optimizer": (without("optimizer"), "it has no optimizer"),
    "args": (having(args=[1]), r"its args is \[1\]"),
    "tensor in args": (
        lambda found: found | {"args": found["args"] | {"lr": torch.ones(3)}},
        "resume needs the options",
    ),
    "step": (having(step="x"), "its step is 'x'"),
    "negative step": (having(step=-3), "its step is -3"),
    "bool": (having(step=True), "its step is True"),
    "late step": (having(step=10**9), "of at most step 3"),
    "rows": (having(rows=None), "its rows is None"),
    "no scores": (having(rows=[{"step": 3}]), "have scores in its rows"),
    "columns": (having(rows=[{"a": 1}]), "its rows is"),
    "best": (having(best="x"), "its best is 'x'"),
    "loss": (having(loss=torch.ones(2)), "its loss is tensor"),
    "infinite loss": (having(loss=torch.tensor(math.inf)), "its loss is inf"),
    "loss_steps": (having(loss_steps=1.5), "its loss_steps is 1.5"),
    "names": (having(model={"a": torch.ones(1)}), "names in its model differ"),
    "number": (having(model={3: torch.ones(1)}), "names in its model differ"),
    "no average": (having(model_ema=None), "its model_ema is None"),
    "shape": (with_weights("model", lambda t: t[:1].clone()), "head.bias is .* of shape"),
    "type": (with_weights("model_ema", lambda t: t.double()), "is torch.float64 of shape"),
    "value": (with_weights("model", lambda t: 3), "is a int"),
    "nan": (with_weights("model", lambda t: t * math.nan), "finite values; NaN or infinity is in"),
    "meta": (with_weights("model", lambda t: t.to("meta")), "it is on the meta device"),
    "expanded": (with_weights("model", lambda t: t[:1].clone().expand(t.shape)), "is expanded"),
    "groups": (having(optimizer={"param_groups": [], "state": {}}), "has 0 groups of parameters"),
    "no groups": (having(optimizer={}), "its optimizer has no param_groups"),
    "state": (with_state(lambda state: {}), "the state of parameter 3 in its optimizer"),
    "moments": (
        with_state(lambda state: state | {"exp_avg": torch.ones(7)}),
        "exp_avg of parameter 3 is",
    ),
    "optimizer's nan": (
        with_state(lambda state: state | {"exp_avg_sq": state["exp_avg_sq"] * math.nan}),
        "NaN or infinity is in exp_avg_sq",
    ),
}  # fmt: skip


def test_wrong_checkpoints_raise_one_line_and_change_nothing(tmp_path):
    training_cases.run("small", tmp_path, epochs=1)
    path = tmp_path / "last.pth"
    right = torch.load(path, weights_only=True)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    arguments = training_cases.arguments("small", tmp_path, epochs=1, resume=True)
    training = trainer._Run(*arguments, trainer.World(0, 1, torch.device("cpu")))
    state = copy.deepcopy((training.model.state_dict(), training.optimizer.state_dict()))
    for case, (change, message) in WRONG.items():
        torch.save(change(copy.deepcopy(right)), path)
        wrong = path.read_bytes()
        with pytest.raises(ValueError, match=message) as caught:
            training.train()
        assert "\n" not in str(caught.value), case
        after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        assert after == before | {"last.pth": wrong, "lock": after["lock"]}, case
        now = training.model.state_dict(), training.optimizer.state_dict()
        torch.testing.assert_close(now, state, rtol=0, atol=0, msg=case)
    path.write_bytes(before["last.pth"])
    training.train()


@pytest.mark.parametrize("name", ["last.pth", "best.pth", "metrics.csv", "loss.png"])
def test_folders_with_the_names_of_files_raise_before_training(name, tmp_path):
    (tmp_path / name).mkdir()
    for resume in (False, True):
        with pytest.raises(
            ValueError, match=f"out must be the path of a file; .*{name} is a folder"
        ):
            training_cases.run("small", tmp_path, resume=resume)
    assert {path.name for path in tmp_path.iterdir()} == {name, lock.NAME}


def test_interrupted_training_says_what_is_there(tmp_path, monkeypatch, capsys):
    from swiftkernels.training import __main__ as command

    def interrupted(recipe: Recipe) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", interrupted)
    path = tmp_path / "last.pth"
    assert command.main(["--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == f"\ninterrupted; there is no {path}\n"
    path.touch()
    assert command.main(["--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == f"\ninterrupted; --resume continues from {path}\n"


def test_infinite_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match="lower lr"):
        training_cases.run("small", tmp_path, lr=1e30, clip=0.0, save_every=1)
    state = torch.load(tmp_path / "last.pth", weights_only=True)
    assert math.isfinite(state["loss"])


def test_too_few_images_for_a_step_raise(tmp_path):
    with pytest.raises(ValueError, match="400 images per process and step, with 100 images for 1"):
        training_cases.run("small", tmp_path, batch_size=200)


@pytest.mark.parametrize("options", [{"bfloat16": True}, {"channels_last": True}, {"ema": 0.0}])
def test_other_dtypes_and_layouts_train(tmp_path, options):
    rows = training_cases.run("small", tmp_path, epochs=1, **options)
    assert math.isfinite(rows[-1]["val_loss"])
    assert ("ema_top1" in rows[-1]) == ("ema" not in options)


def test_recomputed_blocks_update_running_statistics_once():
    states = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = tiny(num_classes=5, distillation=False, drop_path_rate=0.3)
        model.grad_checkpointing = enable
        x = torch.randn(4, 3, 32, 32)
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()  # recomputes all blocks again
        grads = {name: p.grad for name, p in model.named_parameters()}
        states.append((grads, model.state_dict(), model(x)))
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """torchrun with gloo: each process gets half of the images; also killed and resumed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               "-m", "tests.training_cases", "small"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for out, kill_after, status in (("complete", -1, 0), ("killed", 30, 1), ("killed", -1, 0)):
        done = subprocess.run(
            [*command, str(tmp_path / out), str(kill_after)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
    complete, resumed = (
        torch.load(tmp_path / out / "last.pth", weights_only=True) for out in ("complete", "killed")
    )
    assert complete["args"]["processes"] == 2
    for state in (complete, resumed):
        del state["args"], state["pooling"]
    torch.testing.assert_close(resumed, complete, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "resnet50"}, "model must be one of"),
        ({"epochs": 0}, "epochs"),
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"ema": 1.0}, "ema"),
        ({"erasing": 1.5}, "erasing"),
        ({"epochs": 5}, "warmup_epochs must be less than epochs=5"),
    ],
)
def test_wrong_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def tiny(**options: Any) -> SwiftFormer:
    return SwiftFormer((8, 16), (1, 2), **options)


def test_defaults_are_the_published_options_of_the_model():
    from swiftkernels.training import __main__ as training_command

    xs, checkpoint, _ = training_command.parse([])
    assert checkpoint is None
    assert (xs.rand_augment, xs.mixup, xs.cutmix, xs.lr) == (False, 0.0, 0.0, 2e-3)
    s, *_ = training_command.parse(
        ["--model", "swiftformer_s", "--mixup", "0.2", "--no-channels-last"]
    )
    assert (s.rand_augment, s.mixup, s.cutmix) == (True, 0.2, 0.0)
    l1, *_ = training_command.parse(["--model", "swiftformer_l1", "--data", "x", "--resume"])
    assert (l1.mixup, l1.cutmix, l1.data, l1.resume) == (0.8, 1.0, Path("x"), True)
    soft, *_ = training_command.parse(["--pooling", "softmax", "--distillation", "soft"])
    assert (soft.pooling, soft.distillation) == ("softmax", "soft")
    with pytest.raises(SystemExit):
        training_command.parse(["--pooling", "max"])


def test_training_starts_from_the_weights_of_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(FAMILY.constructors, "swiftformer_xs", tiny)
    official = {"model": convert_state_dict(tiny(num_classes=5).state_dict(), "timm", "official")}
    torch.save(official, tmp_path / "official.pth")
    options = Recipe(weights=tmp_path / "official.pth", fresh_heads=True)
    model = trainer.build(options, 7)
    theirs = official["model"]["network.0.0.attn.w_g"]
    assert torch.equal(model.state_dict()["stages.0.blocks.0.attn.w_g"], theirs)
    assert model.head.out_features == 7
    with pytest.raises(ValueError, match="another number of classes"):
        trainer.build(replace(options, fresh_heads=False), 7)
    capsys.readouterr()
    assert {a.pooling for a in attentions(trainer.build(options, 7))} == {"l2"}
    assert "pooling: l2, as in the official code" in capsys.readouterr().out
    assert {a.pooling for a in attentions(trainer.build(replace(options, pooling="sum"), 7))} == {
        "sum"
    }
    assert "pooling: sum, as requested" in capsys.readouterr().out


def attentions(model: nn.Module) -> list[AttentionForward]:
    return [m for m in model.modules() if isinstance(m, AttentionForward)]


def write_images(folder: Path, per_class: int) -> None:
    """Three classes of noisy colours, 40 x 32."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for label, name in enumerate(("blue", "green", "red")):
            (folder / part / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = torch.rand(40, 32, 3, generator=generator) * 120
                pixels[..., 2 - label] += 120
                image = Image.fromarray(pixels.byte().numpy())
                image.save(folder / part / name / f"{i}.png")


def test_command_trains_on_folders_of_images(tmp_path, capsys, monkeypatch):
    """With RandAugment, mixup, CutMix, erasing, a teacher and a loading process."""
    torchvision = import_torchvision()
    from swiftkernels.training import __main__ as training_command

    monkeypatch.setitem(FAMILY.constructors, "swiftformer_xs", tiny)
    write_images(tmp_path / "images", 8)
    teacher = torchvision.models.get_model("squeezenet1_1", num_classes=3)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    arguments = (
        f"--data {tmp_path / 'images'} --out {tmp_path / 'out'} --image-size 32 --epochs 2 "
        "--warmup-epochs 1 --batch-size 8 --rand-augment --mixup 0.8 --cutmix 1 --erasing 0.5 "
        "--workers 1 --device cpu --distillation hard --teacher squeezenet1_1 "
        f"--teacher-weights {tmp_path / 'teacher.pth'}"
    ).split()
    assert training_command.main(arguments) == 0
    assert "top-1" in capsys.readouterr().out
    state = torch.load(tmp_path / "out" / "last.pth", weights_only=True)
    assert state["step"] == 6
    assert state["model"]["head_dist.weight"].shape == (3, 16)
    assert training_command.main(arguments) == 2
    assert "Pass resume" in capsys.readouterr().err
    assert training_command.main([*arguments, "--resume"]) == 0
    assert "averaged weights: " in capsys.readouterr().out
    file = tmp_path / "out" / "last.pth"
    (tmp_path / "images" / "train").rename(tmp_path / "elsewhere")  # evaluation needs only val/
    for ema, column in (([], "val_loss"), (["--ema-weights"], "ema_val_loss")):
        assert training_command.main([*arguments, "--evaluate", str(file), *ema]) == 0
        out = capsys.readouterr().out
        assert f"loss {state['rows'][-1][column]:.4f}" in out
        assert "pooling: l2, as recorded in the file" in out
    (tmp_path / "elsewhere").rename(tmp_path / "images" / "train")
    file.write_bytes(file.read_bytes()[:1000])
    assert training_command.main([*arguments, "--resume"]) == 2
    assert f"{file} cannot be read" in capsys.readouterr().err
    assert training_command.main([*arguments, "--out", str(file)]) == 2
    assert str(file) in capsys.readouterr().err


def test_wrong_folders_raise(tmp_path):
    import_torchvision()
    from swiftkernels.training.data import image_folders

    write_images(tmp_path, 1)
    with pytest.raises(ValueError, match=r"has no train/\. Put the images into train/CLASS/"):
        image_folders(Recipe(data=tmp_path / "train"))
    (tmp_path / "val" / "red").rename(tmp_path / "val" / "rouge")
    with pytest.raises(ValueError, match="got red, rouge in only one of them"):
        image_folders(Recipe(data=tmp_path))
    with pytest.raises(ValueError, match="data must be a folder"):
        image_folders(Recipe())
    for image in (tmp_path / "train" / "blue").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match="data must have images in a folder for each class"):
        image_folders(Recipe(data=tmp_path))


def test_torchvision_for_another_torch_raises(monkeypatch):
    def broken(*_: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(data, "need", broken)
    with pytest.raises(ImportError, match=r"not built for torch .* \(operator torchvision::nms"):
        data.image_folders(Recipe(data=Path()))


def test_wrong_teachers_raise(tmp_path):
    import_torchvision()
    from swiftkernels.training.data import teacher_of

    options = {"distillation": "hard", "teacher": "squeezenet1_1"}
    assert teacher_of(Recipe(), 3) is None
    for changes, message in (
        ({}, "must have the 3 classes of the data; squeezenet1_1 .* has 1000"),
        ({"teacher": "nobody"}, "teacher must be one of"),
        ({"teacher_weights": "missing.pth"}, "teacher_weights must be one of .*'IMAGENET1K_V1'"),
    ):
        with pytest.raises(ValueError, match=message):
            teacher_of(Recipe(**options | changes), 3)
    path = tmp_path / "teacher.pth"
    for content, message in (
        ([1], "holds a list"),
        ({3: torch.ones(1)}, "must be a state dict of squeezenet1_1 with 3 classes"),
        ({"a": torch.ones(1)}, "must be a state dict of squeezenet1_1 .* Missing key"),
        (Path("x"), "neither a tensor nor a plain value"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message) as caught:
            teacher_of(Recipe(**options, teacher_weights=str(path)), 3)
        assert "\n" not in str(caught.value)


def test_evaluation_uses_the_centre_of_the_image(tmp_path):
    import_torchvision()
    from PIL import Image

    from swiftkernels.training.data import MEAN, evaluation_transform

    image = evaluation_transform(56)(Image.new("RGB", (128, 90), (0, 0, 0)))
    assert image.shape == (3, 56, 56)
    torch.testing.assert_close(image[0, 0, 0], torch.tensor(-MEAN[0] / 0.229))


@pytest.mark.slow
@pytest.mark.usefixtures("timm")
def test_memory_benchmark_runs_equal_training_steps():
    threads = torch.get_num_threads()
    names = ("timm", "timm, accelerated", "swiftkernels, checkpointing")
    found = {name: training_memory.measure_here(name, 4, 64, threads) for name in names}
    losses = [loss for _, loss in found.values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=training_memory.TOLERANCE)
    gradients = 4 * 3_475_360
    assert all(peak > gradients for peak, _ in found.values())


@pytest.mark.parametrize("module", [losses, recipe])
def test_examples_run(module):
    found = doctest.testmod(module, extraglobs={"torch": torch})
    assert found.attempted > 0
    assert found.failed == 0
