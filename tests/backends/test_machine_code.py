"""The machine code of the loop of the matrix product (backends/cpu/csrc/gemm.cpp)."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess

import pytest

from swiftkernels.backends.cpu import library

STEP = 8
"""As in gemm.h."""

# The heights and widths of blocks that most products use, in rows and vectors.
BLOCKS = [("avx2", size) for size in ((6, 2), (5, 2), (4, 3))]
BLOCKS += [("avx512", size) for size in ((8, 3), (7, 3), (6, 4))]


@functools.cache
def disassembly(isa: str) -> str:
    path = library.DIRECTORY / f"_kernels_{isa}.so"
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def longest_block(text: str, rows: int, vectors: int) -> list[str]:
    """The instructions without jumps that have the most products, of the kernel of that size."""
    name = rf"^\w+ <\S*multiplyILi{rows}ELi{vectors}ELb0E\S*>:$"
    body = re.split(name, text, maxsplit=1, flags=re.M)[1].split("\n\n")[0]
    code = [line.strip().split(":", 1) for line in body.splitlines() if line.strip()]
    targets = set(re.findall(r"\tj\w+\s+([0-9a-f]+)", body))
    blocks: list[list[str]] = [[]]
    for address, instruction in code:
        if address in targets:
            blocks.append([])
        blocks[-1].append(instruction)
        if instruction.startswith("\tj"):
            blocks.append([])
    return max(blocks, key=lambda block: sum("vfmadd" in line for line in block))


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.parametrize(("isa", "size"), BLOCKS)
def test_the_loop_multiplies_and_adds_in_place(isa, size):
    if isa not in library.available() or "clang" in library.build_record()["compiler"]:
        pytest.skip("needs the library as gcc compiles it")
    rows, vectors = size
    code = longest_block(disassembly(isa), rows, vectors)
    count = {name: sum(name in line for line in code) for name in ("vfmadd231ps", "vbroadcastss")}
    assert count == {"vfmadd231ps": STEP * rows * vectors, "vbroadcastss": STEP * rows}
    assert sum("vfmadd" in line for line in code) == count["vfmadd231ps"]
    assert not [line for line in code if re.search(r"%[re](sp|bp)", line)], "sums are in memory"
    # Two moves in all these steps are what gcc 12 makes of blocks with every register in use.
    assert sum("vmovaps" in line for line in code) <= 2, "sums move between registers"
