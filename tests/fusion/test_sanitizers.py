"""Fused networks on images of random sizes under ASan and UBSan."""

from __future__ import annotations

import platform
import shutil
import subprocess

import pytest

from tests.builds import CSRC, LIBRARIES, ROOT, copy_project, run

SCRIPT = """
import random, torch
from swiftkernels import fuse_for_inference
from swiftkernels.fusion import steps as of
from swiftkernels.fusion.chain import FusedChain
from swiftkernels.models import SwiftFormer

torch.manual_seed(0)
model = SwiftFormer((16, 40, 24, 56), (2, 1, 2, 3), num_classes=7).eval()
fused = fuse_for_inference(model)
generator = random.Random(0)

def check(fused, channels, number, least=1):
    torch.set_num_threads(1 + number % 3)
    batch, height, width = (generator.randint(least, most) for most in (5, 130, 130))
    x = torch.randn(batch, channels, height, width)
    if number % 2:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), fused.plain(x), rtol=1e-3, atol=1e-4)

for number in range(60):
    check(fused, 3, number)

def randn(*shape):
    return torch.randn(shape) / max(1, torch.Size(shape[1:]).numel()) ** 0.5

def chain(c, d, kernel):
    m = 2 * c
    return FusedChain([
        of.Convolution(randn(c, c, 4, 4), randn(c), 2, 3, "relu6"),
        of.PartialConvolution(randn(2, 2, 3, 3), randn(2), c),
        of.Normalise(1 + randn(c), randn(c), 1e-5, True),
        of.Average(randn(c), 3, adds=2),
        of.Depthwise(randn(m, 1, kernel, kernel), randn(m), 2, "gelu", 2),
        of.SqueezeExcite(randn(5, m), randn(5), randn(m, 5), randn(m), "relu", "sigmoid"),
        of.Convolution(randn(d, m, 1, 1), randn(d), 1, 0, "silu"),
        of.Depthwise(randn(d, 1, kernel, kernel), randn(d), 1, "hardswish"),
        of.Normalise(1 + randn(d), randn(d), 1e-6, False),
        of.ConvMlp(None, None, randn(3 * d, d), randn(3 * d), randn(d, 3 * d), randn(d), "gelu",
                   False, adds=3),
        of.Convolution(randn(c, d, 1, 1), randn(c), 1, 0),
    ]).eval()

for number in range(60):
    check(chain(3 + 7 * number % 41, 2 + 5 * number % 37, (3, 5, 7)[number % 3]),
          3 + 7 * number % 41, number, least=2)
print("done")
"""

FLAGS = (
    "-std=c++17 -O1 -g -fPIC -shared -fopenmp -fvisibility=hidden -march=x86-64-v3 "
    "-DSWIFTKERNELS_ISA_AVX2=1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86-64"
)
def test_fused_networks_touch_no_memory_but_theirs(tmp_path):
    project = copy_project(tmp_path / "project")
    # Backwards take half of the time to compile.
    every = ROOT.glob("swiftkernels/**/csrc/*.cpp")
    sources = [str(path) for path in every if "backward" not in path.name]
    target = project / LIBRARIES / "_kernels_avx2.so"
    command = ["g++", *FLAGS.split(), f"-I{ROOT / CSRC}", *sources, "-o", str(target)]
    subprocess.run(command, check=True)
    runtimes = [
        subprocess.check_output(["g++", f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "ubsan")
    ]
    done = run(
        project, "-c", SCRIPT, LD_PRELOAD=" ".join(runtimes), ASAN_OPTIONS="detect_leaks=0",
        SWIFTKERNELS_CPU_ISA="avx2",
    )  # fmt: skip
    assert done.stdout.endswith("done\n"), done.stderr
