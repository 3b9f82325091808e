"""The devices that commands can run on: their names and properties."""

from __future__ import annotations

import torch

from swiftkernels.backends.cpu import library
from swiftkernels.utils.text import first_line

LOST = 75
"""Exit status of a process that stops because of `why_lost`: EX_TEMPFAIL, another may go on."""


def gpus() -> list[torch.device]:
    """The devices that may run the Triton kernels."""
    counts = {"cuda": torch.cuda.device_count(), "xpu": torch.xpu.device_count()}
    return [torch.device(kind, i) for kind, count in counts.items() for i in range(count)]


def find(text: str | None) -> torch.device:
    """The device of that name; for None the first GPU, or the CPU if there is no GPU.

    "cuda" is "cuda:0".

    Raises:
        ValueError: there is no device of that name.
    """
    present = [*gpus(), torch.device("cpu")]
    if text is None:
        return present[0]
    for device in present:
        if text == str(device) or (text == device.type and device.index in (None, 0)):
            return device
    names = ", ".join(map(str, present))
    raise ValueError(
        f"device must be one of {names}; got {text!r}. `swiftkernels doctor` shows which GPUs "
        "torch sees, and why it sees no others."
    )


def name(device: torch.device) -> str:
    """The product name of the GPU or the CPU."""
    if device.type == "cpu":
        return library.processor_name()
    return str(torch.get_device_module(device).get_device_name(device))


def facts(device: torch.device) -> str:
    """Architecture, multiprocessors and memory of a GPU; threads on a CPU."""
    if device.type == "cpu":
        return f"threads used: {torch.get_num_threads()}"
    properties = torch.get_device_module(device).get_device_properties(device)
    memory = f"{properties.total_memory / 2**30:.1f} GiB of memory"
    if device.type == "xpu":
        return f"driver {properties.driver_version}, {memory}"
    architecture = f"compute capability {properties.major}.{properties.minor}"
    if torch.version.hip:
        architecture = properties.gcnArchName
    return f"{architecture}, {properties.multi_processor_count} multiprocessors, {memory}"


def why_lost(device: torch.device) -> str:
    """Why no more calls can run on a GPU in this process, after an error there; "" if they can."""
    if device.type == "cpu":
        return ""
    try:
        torch.get_device_module(device).synchronize(device)
    except RuntimeError as error:
        return first_line(error)
    return ""


def built_for() -> str:
    """The kinds of GPUs that this build of torch supports, with the versions of their libraries."""
    versions = {
        "CUDA": torch.version.cuda,
        "ROCm": torch.version.hip,
        "XPU": torch.version.xpu,
    }
    return " and ".join(f"{kind} {v}" for kind, v in versions.items() if v) or "the CPU only"
