"""Importing: light, without the optional packages, and with a documented surface."""

from __future__ import annotations

import doctest
import inspect
import re
import subprocess
import sys

import pytest

import swiftkernels
from swiftkernels.integrations import warmup
from swiftkernels.ops.additive_attention import api, layer
from tests.builds import ROOT

OPTIONAL = (
    "triton",
    "numpy",
    "matplotlib",
    "sklearn",
    "tqdm",
    "PIL",
    "timm",
    "transformers",
    "torchvision",
)


def run_python(code: str) -> str:
    """The output of a fresh interpreter, warnings of torch about a missing NumPy aside."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_works_without_any_optional_package():
    out = run_python(f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))  # None: importing one raises ModuleNotFoundError
import torch
from swiftkernels import AdditiveAttention
x = torch.randn(2, 8, 3, 3, requires_grad=True)
for backend in ("auto", "aten", "reference"):
    AdditiveAttention(8, 8, 1, backend=backend)(x).sum().backward()
try:
    AdditiveAttention(8, 8, 1, backend="triton")(x)
except ValueError as error:
    print(error)
""")
    assert "triton, which is not installed" in out


def test_importing_takes_no_optional_package_along():
    """Nor does a call on a CPU."""
    out = run_python(f"""
import sys
import torch
before = set(sys.modules)
import swiftkernels
swiftkernels.AdditiveAttention(8, 8, 1)(torch.randn(2, 9, 8)).sum().backward()
new = set(sys.modules) - before
print(sorted(new & set({OPTIONAL})))
print(sorted(m for m in new if m.endswith((".triton.launch", ".triton.tiles"))))
""")
    assert out == "[]\n[]\n"


def test_flops_are_counted_whenever_the_counter_is_imported():
    """The formulas are registered behind its import, before ours or after."""
    for first, second in (("torch.utils.flop_counter", "swiftkernels"), ("swiftkernels", "torch")):
        out = run_python(f"""
import {first}, {second}, torch
from torch.utils.flop_counter import FlopCounterMode
layer = swiftkernels.AdditiveAttention(8, 8, 1, backend="aten")
with FlopCounterMode(display=False) as counter:
    layer(torch.randn(1, 5, 8))
print(counter.get_total_flops())
""")
        assert int(out) == 2 * 5 * 8 * (8 + 8 + 8 + 8)


def test_version_is_that_of_the_project():
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', project, re.MULTILINE)[1] == swiftkernels.__version__


def test_all_names_what_is_there():
    assert sorted(swiftkernels.__all__) == swiftkernels.__all__
    public = {
        name
        for name, value in vars(swiftkernels).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public | set(swiftkernels._MODULES) == set(swiftkernels.__all__)
    assert set(swiftkernels.__all__) <= set(dir(swiftkernels))


@pytest.mark.parametrize("name", swiftkernels.__all__)
def test_every_public_name_is_documented(name):
    value = getattr(swiftkernels, name)
    assert inspect.getdoc(value)
    assert not value.__doc__.startswith(f"{name}(")  # what NamedTuple and dataclass make up
    if inspect.isclass(value):
        for method, function in vars(value).items():
            if inspect.isfunction(function) and not method.startswith("_"):
                # extra_repr and the like have the documentation of torch.nn.Module.
                assert inspect.getdoc(getattr(value, method)), method


EXPLAINED = ("AdditiveAttention", "accelerate", "additive_attention", "warmup")


@pytest.mark.parametrize("name", EXPLAINED)
def test_every_argument_is_explained(name):
    value = getattr(swiftkernels, name)
    arguments = value.__doc__[value.__doc__.index("Args:") : value.__doc__.index("Example:")]
    for parameter in inspect.signature(value).parameters:
        assert re.search(rf"\b{parameter}\b.*:", arguments), parameter


@pytest.mark.parametrize("module", [api, layer, warmup])
def test_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
