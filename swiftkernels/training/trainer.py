"""The training loop: steps, evaluation, checkpoints, in one or several processes.

The random numbers of a step follow from the seed and the number of the step, those of an image from
the seed and its position in the epoch (`swiftkernels.training.data`). So a checkpoint needs no
random states, and a resumed run continues as if it had not been interrupted: on a CPU, with the
same libraries and number of threads, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset

from swiftkernels import models
from swiftkernels.backends import devices
from swiftkernels.models.checkpoint_io import own_pooling
from swiftkernels.models.family import constructors
from swiftkernels.training import data, lock, metrics, optimizer, resume
from swiftkernels.training.losses import DistillationLoss
from swiftkernels.training.recipe import Recipe
from swiftkernels.utils import files
from swiftkernels.utils.extras import need
from swiftkernels.utils.progress import Progress
from swiftkernels.utils.text import shown

LAST, BEST = "last.pth", "best.pth"
METRICS, PICTURE = "metrics.csv", "loss.png"

CHANGEABLE = ("data", "out", "weights", "device", "workers", "save_every", "resume")
"""Options that a resumed run may change."""


class Scores(NamedTuple):
    """The scores of a model on labelled images."""

    loss: float
    """Mean cross-entropy."""
    top1: float
    """Percentage of images where the label has the highest logit."""
    top5: float
    """Percentage of images where the label is among the five highest logits."""


class World(NamedTuple):
    """This process and the number of processes of the training."""

    rank: int
    processes: int
    device: torch.device

    def mean(self, t: Tensor) -> Tensor:
        """The mean over all processes."""
        return self.sum(t) / self.processes

    def sum(self, t: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.processes > 1:
            t = t.clone()
            dist.all_reduce(t)
        return t


def train(
    recipe: Recipe,
    model: nn.Module | None = None,
    train_set: Any = None,
    val_set: Any = None,
) -> list[metrics.Row]:
    """Train with the recipe, in this process or, under torchrun, in several processes.

    Writes to `recipe.out`: last.pth (the state for resuming: "model", "model_ema", "optimizer",
    "step", "args", ...), best.pth (the weights of the epoch with the highest top-1), metrics.csv
    and loss.png.

    Args:
        recipe: the options.
        model: a model to train instead of `recipe.model`. It returns logits, or a pair of them in
            training. With distillation its method `set_distilled_training(True)` is called, if it
            has one.
        train_set, val_set: datasets of pairs (image [C, H, W], class number), instead of the
            folders of `recipe.data`. Random transforms must use the default generator of torch.

    Returns:
        The rows of metrics.csv.

    Raises:
        ValueError: options, data and checkpoint do not fit each other, or another training uses
            the folder.
        OSError: a file could not be written; earlier files are complete.
        ImportError: a package is missing; the message says which.
        FloatingPointError: the loss is not finite.
    """
    need("matplotlib", "train", "Training")  # fail at the start, not after an epoch
    with _world(recipe.device) as world:
        if train_set is None:
            train_set, val_set = data.image_folders(recipe)
        elif val_set is None:
            raise ValueError(
                "val_set must be given together with train_set; got None. Pass both or neither."
            )
        if model is None:
            model = build(recipe, len(train_set.classes))
        return _Run(recipe, model, train_set, val_set, world).train()


def build(recipe: Recipe, classes: int) -> models.Network:
    """The model of the recipe, initialised with its seed or with the weights of a file.

    Raises:
        ValueError: the weights do not fit.
    """
    torch.manual_seed(recipe.seed)
    model = constructors()[recipe.model](
        num_classes=classes,
        drop_path_rate=recipe.drop_path,
        distillation=recipe.distillation != "none",
        pooling=recipe.pooling or "l2",
    )
    model.set_grad_checkpointing(recipe.grad_checkpointing)
    if recipe.weights is not None:
        report = models.load_checkpoint(
            model, recipe.weights, pooling=recipe.pooling, fresh_heads=recipe.fresh_heads
        )
        _print_once(report)
    return model


def _print_once(report: models.LoadReport) -> None:
    """Print a report in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(report)


class _Run:
    """A training and its state."""

    def __init__(
        self, recipe: Recipe, model: nn.Module, train_set: Any, val_set: Any, world: World
    ) -> None:
        self.recipe = recipe
        self.world = world
        self.memory_format = (
            torch.channels_last if recipe.channels_last else torch.contiguous_format
        )
        self.model = model.to(world.device)
        if recipe.distillation != "none" and hasattr(model, "set_distilled_training"):
            model.set_distilled_training(True)  # type: ignore[operator]
        if recipe.channels_last:
            self.model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        classes = _classes(train_set, model)
        self.mix = data.mixing(recipe, classes)
        teacher = data.teacher_of(recipe, classes)
        self.criterion = DistillationLoss(
            nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing),
            teacher,
            recipe.distillation,
            recipe.alpha,
            recipe.tau,
        ).to(world.device)
        self.parallel = _parallel(self.model, world)
        self.average: AveragedModel | None = None
        if recipe.ema:
            self.average = AveragedModel(
                self.model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True
            )
        self.optimizer = torch.optim.AdamW(
            optimizer.parameter_groups(self.model, recipe.weight_decay), recipe.lr
        )

        self.draws = data.ShuffledDraws(
            train_set, recipe.seed, recipe.repeats, world.rank, world.processes
        )
        images = recipe.batch_size * recipe.accumulate
        self.steps_per_epoch = len(self.draws) // images
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch_size must allow at least one step in an epoch; got {images} images per "
                f"process and step, with {len(train_set)} images for {world.processes} processes. "
                "Reduce batch_size or accumulate."
            )
        self.steps = recipe.epochs * self.steps_per_epoch
        loading: dict[str, Any] = {
            "batch_size": recipe.batch_size,
            "num_workers": recipe.workers,
            "persistent_workers": recipe.workers > 0,
            "pin_memory": world.device.type == "cuda",
        }
        self.train_loader: DataLoader[Any] = DataLoader(
            data.SeededDataset(train_set, recipe.seed),
            sampler=self.draws,
            drop_last=True,
            **loading,
        )
        share = range(world.rank, len(val_set), world.processes)
        self.val_loader: DataLoader[Any] = DataLoader(Subset(val_set, share), **loading)

        self.step = 0
        """Number of steps done."""
        self.rows: list[metrics.Row] = []
        self.best = -1.0
        """The highest top-1 so far."""
        self.loss = torch.zeros((), device=world.device)
        """Sum of the losses since the last row."""
        self.loss_steps = 0

    def train(self) -> list[metrics.Row]:
        """Train until the last step; returns the rows of metrics.csv."""
        with _locked(self.recipe.out, self.world):
            self._restore()
            while self.step < self.steps:
                self._epoch()
        return self.rows

    def _epoch(self) -> None:
        """The remaining steps of an epoch, its evaluation and a checkpoint."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        self.draws.epoch = epoch
        self.draws.start = done * self.recipe.batch_size * self.recipe.accumulate
        self.model.train()
        batches = iter(self.train_loader)
        text = f"epoch {epoch + 1} of {self.recipe.epochs}"
        quiet = self.world.rank != 0
        with Progress(
            self.steps_per_epoch, "steps", text, done=done, leave=True, quiet=quiet
        ) as bar:
            for left in reversed(range(self.steps_per_epoch - done)):
                self._train_step(batches)
                bar.advance()
                if left and self.step % self.recipe.log_every == 0:
                    bar.note(f"loss {self._log({}):.3f}")
                if left and self.step % self.recipe.save_every == 0:
                    self._save(LAST)
        self._end_of_epoch()

    def _train_step(self, batches: Iterator[Any]) -> None:
        recipe, device = self.recipe, self.world.device
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        for part in range(recipe.accumulate):
            images, labels = next(batches)
            images = images.to(device, memory_format=self.memory_format, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            torch.manual_seed(data.derived_seed(recipe.seed, self.step, part, self.world.rank))
            images, labels = self.mix(images, labels)
            with self._synchronised(part == recipe.accumulate - 1):
                with _autocast(device, recipe.bfloat16):
                    outputs = self.parallel(images)
                    loss = self.criterion(images, outputs, labels) / recipe.accumulate
                loss.backward()
            self.loss += loss.detach()
        if recipe.clip:
            optimizer.clip_adaptively_(optimizer.clipped_parameters(self.model), recipe.clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        self.loss_steps += 1

    def _learning_rate(self) -> float:
        recipe = self.recipe
        warmup = round(recipe.warmup_epochs * self.steps_per_epoch)
        return optimizer.learning_rate(
            self.step, self.steps, warmup, recipe.lr, recipe.warmup_lr, recipe.min_lr
        )

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """A context for a backward: gradients are reduced over the processes only in the last."""
        if last or not isinstance(self.parallel, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.parallel.no_sync()

    def _end_of_epoch(self) -> None:
        found = self._evaluate(self.model)
        row: metrics.Row = {"val_loss": found.loss, "top1": found.top1, "top5": found.top5}
        top1 = found.top1
        if self.average is not None:
            found = self._evaluate(self.average.module)
            row |= {"ema_val_loss": found.loss, "ema_top1": found.top1, "ema_top5": found.top5}
            top1 = max(top1, found.top1)
        self._log(row)
        better = top1 > self.best
        self.best = max(top1, self.best)
        self._save(LAST)
        if better:
            self._save(BEST)
        if self.world.rank == 0:
            metrics.draw(self.recipe.out / METRICS, self.recipe.out / PICTURE)

    def _evaluate(self, model: nn.Module) -> Scores:
        if self.world.processes > 1:  # running statistics differ: use those of the first process
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        return evaluate(model, self.val_loader, self.world, self.recipe.bfloat16)

    def _log(self, scores: metrics.Row) -> float:
        """Add a row to metrics.csv; returns its training loss."""
        self._average_loss()
        loss = self.loss.item() / self.loss_steps
        row = {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            **scores,
        }
        self.rows.append(row)
        self.loss.zero_()
        self.loss_steps = 0
        if self.world.rank == 0:
            metrics.write(self.rows, self.recipe.out / METRICS)
        return loss

    def _average_loss(self) -> None:
        """Replace the loss of each process by the mean over all processes."""
        self.loss = self.world.mean(self.loss)
        if not math.isfinite(self.loss.item()):
            raise FloatingPointError(
                f"the loss is {self.loss.item()} since step {self.step - self.loss_steps}. Resume "
                f"from {shown(self.recipe.out / LAST)}, if that file exists, or start again with a "
                "lower lr."
            )

    def _save(self, name: str) -> None:
        self._average_loss()
        if self.world.rank != 0:
            return
        weights: dict[str, Any] = {
            "model": self.model.state_dict(),
            "model_ema": None if self.average is None else self.average.module.state_dict(),
            "args": self._args(),
            "step": self.step,
        }
        if isinstance(self.model, models.Network):
            weights["pooling"] = own_pooling(self.model)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "rows": self.rows,
            "best": self.best,
            "loss": self.loss,
            "loss_steps": self.loss_steps,
        }
        with files.replacing(self.recipe.out / name) as file:
            torch.save(weights if name == BEST else weights | state, file)

    def _restore(self) -> None:
        """Continue from the last checkpoint, if there is one and the recipe says so."""
        for name in (LAST, BEST, METRICS, PICTURE):
            files.check_file("out", self.recipe.out / name)
        path = self.recipe.out / LAST
        if path.is_file():
            if not self.recipe.resume:
                raise ValueError(
                    f"out must be a folder without a checkpoint; {shown(path)} exists. Pass resume "
                    "to continue from it, or choose another folder."
                )
            found = resume.read(path)
            _check_options(found.args, self._args(), path)
            average = None if self.average is None else self.average.module
            found.check(path, self.model, average, self.optimizer)
            is_complete = found.step == self.steps
            if found.step > self.steps or (is_complete and not found.has_scores()):
                raise ValueError(
                    f"{shown(path)} must be of at most step {self.steps}, the last one with these "
                    f"images, and have scores in its rows; it is of step {found.step}. Resume with "
                    "the same data, or restore the file from a copy."
                )
            self.model.load_state_dict(found.model)
            if self.average is not None and found.model_ema is not None:
                self.average.module.load_state_dict(found.model_ema)
                self.average.n_averaged.fill_(found.step)
            self.optimizer.load_state_dict(found.optimizer)
            self.step, self.rows, self.best = found.step, found.rows, found.best
            self.loss.fill_(found.loss)
            self.loss_steps = found.loss_steps
            if self.world.rank == 0:  # without rows of steps that will be repeated
                metrics.write(self.rows, self.recipe.out / METRICS)
        if self.world.processes > 1:
            steps: list[Any] = [None] * self.world.processes
            dist.all_gather_object(steps, self.step)
            if len(set(steps)) > 1:
                raise ValueError(
                    f"out must be the same folder for all processes; in {shown(self.recipe.out)} "
                    f"they found checkpoints of the steps {steps}. Use a shared file system."
                )

    def _args(self) -> dict[str, Any]:
        return self.recipe.as_dict() | {"processes": self.world.processes}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: DataLoader[Any],
    world: World | None = None,
    bfloat16: bool = False,
) -> Scores:
    """Loss and accuracies of a model, over the batches of all processes.

    The model is evaluated in eval mode; afterwards its mode is restored.

    Raises:
        ValueError: there are no images.
    """
    device = next(model.parameters()).device
    world = world or World(0, 1, device)
    was_training = model.training
    model.eval()
    found = torch.zeros(4, dtype=torch.float64, device=device)
    with Progress(len(batches), "batches", "evaluation", quiet=world.rank != 0) as bar:
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            with _autocast(device, bfloat16):
                logits = model(images)
            logits = logits.float()
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            found += torch.stack([loss, best[:, 0].sum(), best.sum(), loss.new_tensor(len(best))])
            bar.advance()
    model.train(was_training)
    loss_sum, top1, top5, images_seen = world.sum(found).tolist()
    if images_seen == 0:
        raise ValueError("val_set must have at least one image; got none.")
    return Scores(loss_sum / images_seen, 100 * top1 / images_seen, 100 * top5 / images_seen)


def evaluate_file(recipe: Recipe, checkpoint: Path, ema: bool = False) -> Scores:
    """Scores of a checkpoint for the model of the recipe, on the images in data/val.

    Prints a report of loading.

    Args:
        recipe: model, data and device.
        checkpoint: any file that `load_checkpoint` reads.
        ema: evaluate the averaged weights.

    Raises:
        ValueError: the weights do not fit the model, or the images are missing.
    """
    val_set = data.validation_folder(recipe)
    with _world(recipe.device) as world:
        model = build(replace(recipe, distillation="none", weights=None), len(val_set.classes))
        _print_once(models.load_checkpoint(model, checkpoint, pooling=recipe.pooling, ema=ema))
        share = Subset(val_set, range(world.rank, len(val_set), world.processes))
        batches = DataLoader(share, recipe.batch_size, num_workers=recipe.workers)
        return evaluate(model.to(world.device), batches, world, recipe.bfloat16)


@contextlib.contextmanager
def _world(device: str) -> Iterator[World]:
    """The process group of torchrun, or this single process."""
    own = devices.find(None if device == "auto" else device)
    if "RANK" not in os.environ:
        yield World(0, 1, own)
        return
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), own)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _locked(out: Path, world: World) -> Iterator[None]:
    """Lock the folder for this training; the first process does it for all."""
    with contextlib.ExitStack() as stack:
        failure: list[Exception | None] = [None]
        if world.rank == 0:
            try:
                if stack.enter_context(lock.locked(out)):
                    files.remove_leftovers(out)
            except (ValueError, OSError) as error:
                failure = [error]
        if world.processes > 1:
            dist.broadcast_object_list(failure)
        if failure[0] is not None:
            raise failure[0]
        yield


def _parallel(model: nn.Module, world: World) -> nn.Module:
    if world.processes == 1:
        return model
    ids = [world.device] if world.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def _autocast(device: torch.device, on: bool) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def _classes(train_set: Sized, model: nn.Module) -> int:
    for owner, name in ((model, "num_classes"), (train_set, "classes")):
        found = getattr(owner, name, None)
        if found is not None:
            return found if isinstance(found, int) else len(found)
    raise ValueError(
        "model must have an attribute num_classes, or train_set an attribute classes; got neither. "
        "Set one of them."
    )


def _check_options(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    # By their text, because the values of a wrong file may be tensors.
    differing = [k for k in now if k not in CHANGEABLE and repr(before.get(k)) != repr(now[k])]
    if differing:
        changes = ", ".join(f"{k}={shown(repr(before.get(k)))}, got {now[k]!r}" for k in differing)
        raise ValueError(
            f"resume needs the options of {shown(path)}: {changes}. Pass the same options, or "
            "start again in another folder."
        )
