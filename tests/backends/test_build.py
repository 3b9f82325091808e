"""Building, packaging and loading the CPU kernels' libraries."""

from __future__ import annotations

import json
import platform
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftkernels.backends.cpu import library
from swiftkernels.ops.additive_attention.cpu import launch
from tests.builds import (
    CSRC,
    LIBRARIES,
    ROOT,
    build_in_place,
    copy_project,
    libraries,
    needs_compiler,
    run,
)

OPERATOR = Path("swiftkernels", "ops", "additive_attention", "csrc")
NO_COMPILER = (
    {"PATH": "/nonexistent", "CXX": ""},
    {"CXX": "/nonexistent/c++"},
    {"CXX": "'"},
    {"CXX": "false"},
    {"CXXFLAGS": "'"},
)


@pytest.fixture
def project(tmp_path):
    return copy_project(tmp_path / "project")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A project with its libraries in place; not to be changed."""
    project = copy_project(tmp_path_factory.mktemp("built") / "project")
    build_in_place(project)
    return project


@pytest.fixture
def in_process(monkeypatch, built):
    """The loader of this process, looking into the built project."""
    caches = (library.loaded, library.why_not, library._open, library._processor_runs)

    def look_into(directory):
        for cache in caches:
            cache.cache_clear()
        monkeypatch.setattr(library, "DIRECTORY", directory)
        monkeypatch.delenv("SWIFTKERNELS_CPU_ISA", raising=False)

    look_into(built / LIBRARIES)
    yield look_into
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("environment", [*NO_COMPILER, {"SWIFTKERNELS_BUILD": "0"}])
def test_without_a_compiler_the_package_is_built_pure(project, environment):
    done = run(project, "setup.py", "build", "--build-lib", "out", **environment)
    assert "CPU kernels not built" in done.stdout + done.stderr
    out = project / "out"
    assert not libraries(out)
    record = json.loads((out / LIBRARIES / "_build.json").read_text())
    assert record["error"]
    assert record["compiler"] == ""
    code = "import swiftkernels.backends.cpu.library as lib; print(lib.loaded(), lib.why_not())"
    said = run(out, "-c", code).stdout
    assert said.startswith("None needs the compiled kernels, which were not built")
    assert record["error"] in said
    assert "reinstall: pip install" in said


def test_a_program_that_is_no_compiler_leaves_the_kernels_out(project):
    record_path = project / LIBRARIES / "_build.json"
    record_path.write_text('{"libraries": [')  # of a build that was killed
    log = build_in_place(project, CXX="echo")
    assert "the compiler wrote no file" in log
    record = json.loads(record_path.read_text())
    assert all("wrote no file" in made["error"] for made in record["libraries"].values())
    text = run(project, "-m", "swiftkernels", "doctor", status=1, CXX="'").stdout
    assert "the compiler wrote no file; is it a C++ compiler?" in text
    assert "CXX=' is no command: No closing quotation" in text


@needs_compiler
def test_every_instruction_set_gets_a_library_with_one_interface(built):
    record = json.loads((built / LIBRARIES / "_build.json").read_text())
    assert record["compiler"]
    good = {isa for isa, made in record["libraries"].items() if not made["error"]}
    assert good == set(libraries(built))
    assert good & {"portable", "neon"}
    if platform.machine() == "x86_64":
        assert set(record["libraries"]) == set(library.ISAS) - {"neon"}


@needs_compiler
def test_an_instruction_set_that_does_not_compile_leaves_the_others(project):
    source = project / CSRC / "features.cpp"
    text = source.read_text()
    wrong = "avx2" if platform.machine() == "x86_64" else "portable"
    if platform.machine() in ("aarch64", "arm64"):
        pytest.skip("one library only")
    macro = f"SWIFTKERNELS_ISA_{wrong.upper()}"
    source.write_text(f"#ifdef {macro}\n#error on purpose\n#endif\n{text}")
    log = build_in_place(project)
    assert f"CPU kernels for {wrong} not built" in log
    record = json.loads((project / LIBRARIES / "_build.json").read_text())
    assert "on purpose" in record["libraries"][wrong]["error"]
    assert wrong not in libraries(project)
    assert libraries(project)


@needs_compiler
def test_libraries_are_rebuilt_when_sources_or_flags_have_changed(project):
    def times():
        return {isa: path.stat().st_mtime_ns for isa, path in libraries(project).items()}

    build_in_place(project)
    first = times()
    assert first
    build_in_place(project)
    assert times() == first
    header = project / CSRC / "new.h"
    header.write_text("// a header\n")
    build_in_place(project)
    second = times()
    assert all(second[isa] > first[isa] for isa in first)
    build_in_place(project, CXXFLAGS="-g")
    assert all(time > second[isa] for isa, time in times().items())
    build_in_place(project, SWIFTKERNELS_BUILD="0")
    assert not times()
    assert not list((project / LIBRARIES).glob("*.tmp"))


@needs_compiler
def test_flags_of_the_user_cannot_undo_an_instruction_set(project):
    build_in_place(project, CXXFLAGS="-O0 -march=nocona -DMINE")
    record = json.loads((project / LIBRARIES / "_build.json").read_text())
    for isa, made in record["libraries"].items():
        assert "-DMINE" in made["command"]
        if isa == "avx2":
            assert made["command"].rindex("-march=x86-64-v3") > made["command"].index("nocona")


@needs_compiler
def test_a_wheel_with_libraries_is_for_one_platform_and_every_python(project):
    run(project, "setup.py", "-q", "bdist_wheel")
    (wheel,) = (project / "dist").glob("*.whl")
    python, abi, system = wheel.stem.split("-")[-3:]
    assert (python, abi) == ("py3", "none")
    assert system != "any"
    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if n.endswith(".so")]
    assert "swiftkernels/backends/cpu/_build.json" in names
    data = {p.relative_to(project).as_posix() for p in project.glob("swiftkernels/**/[!_]*.json")}
    data |= {"swiftkernels/py.typed", "swiftkernels/tools/imagenet_labels.txt"}
    assert data <= set(names)
    assert not [n for n in names if "csrc" in n or ".data/" in n]
    # Nothing that was there before leaks into a wheel without.
    wheel.unlink()
    run(project, "setup.py", "-q", "bdist_wheel", SWIFTKERNELS_BUILD="0")
    (wheel,) = (project / "dist").glob("*.whl")
    assert wheel.stem.endswith("-py3-none-any")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if n.endswith(".so")]
    assert "swiftkernels/backends/cpu/_build.json" in names


def files_of(folder: Path) -> set[str]:
    """The files of the project in a folder, without what was made there."""
    made = {".git", "__pycache__", "_build", "mathematics"}
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {
        path.as_posix()
        for path in found
        if not made & {*path.parts}
        and path.parts[0] not in ("build", "dist", "results")
        and not any(p.startswith(".") and p != ".ci" for p in path.parts[:-1])
        and not any(p.endswith(".egg-info") for p in path.parts)
        and not path.name.endswith((".so", "_build.json", ".tmp", ".pyc"))
    }


def test_the_sdist_is_whole(tmp_path):
    """It has all files of the project, so that its tests can run."""
    project, names = tmp_path / "project", files_of(ROOT)
    for name in names:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    (project / LIBRARIES / "_kernels_portable.so").touch()
    (project / LIBRARIES / "_build.json").touch()
    run(project, "setup.py", "-q", "sdist")
    (sdist,) = (project / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        found = {name.split("/", 1)[-1] for name in archive.getnames() if "." in name}
        # Python 3.11.4 and later ask for a filter.
        safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(tmp_path, **safely)
    assert {f"{OPERATOR.as_posix()}/forward.cpp", "tests/conftest.py", "constraints.txt"} <= names
    assert names - found - {"PKG-INFO", "setup.cfg"} == set()
    assert not [name for name in found if name.endswith((".so", "_build.json", ".pyc"))]
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert files_of(unpacked) - {"PKG-INFO", "setup.cfg"} == names - {"PKG-INFO", "setup.cfg"}


@needs_compiler
def test_the_best_library_that_the_processor_can_run_is_loaded(in_process):
    runs = [isa for isa, can_run in library.available().items() if can_run]
    assert runs == [isa for isa in library.ISAS if isa in runs]
    assert library.loaded().name == runs[0]
    assert library.loaded() is library.loaded()
    assert library.why_not() == ""
    assert [library.load(isa).name for isa in runs] == runs


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 only")
def test_the_environment_chooses_the_library(in_process, monkeypatch, built):
    code = "import swiftkernels.backends.cpu.library as lib; print(lib.loaded(), lib.why_not())"
    assert "name='portable'" in run(built, "-c", code, SWIFTKERNELS_CPU_ISA="portable").stdout
    said = run(built, "-c", code, SWIFTKERNELS_CPU_ISA="none").stdout
    assert said.startswith("None is switched off by SWIFTKERNELS_CPU_ISA=none")
    said = run(built, "-c", code, status=1, SWIFTKERNELS_CPU_ISA="nonsense").stderr
    assert "ValueError: SWIFTKERNELS_CPU_ISA must name" in said
    assert "'nonsense'" in said
    assert f"Built: {', '.join(library.available())}" in said
    monkeypatch.setattr(library, "_processor_runs", lambda isa: isa == "portable")
    monkeypatch.setenv("SWIFTKERNELS_CPU_ISA", "avx2")
    with pytest.raises(ValueError, match=r"the processor lacks AVX2.*can run: portable\."):
        library.loaded()
    monkeypatch.setenv("SWIFTKERNELS_CPU_ISA", "neon")
    with pytest.raises(ValueError, match="not built"):
        library.why_not()


@needs_compiler
@pytest.mark.parametrize(
    ("source", "entry", "replacement", "difference"),
    [
        (
            CSRC / "features.cpp",
            '{"DONE", DONE}',
            '{"DONE", 7}',
            f"in swiftkernels_cpu_abi, DONE is 7, {library.DONE} is needed",
        ),
        (
            OPERATOR / "abi.cpp",
            '{"sizeof(Call)", sizeof(Call)}',
            '{"sizeof(Call)", 8}',
            f"in swiftkernels_additive_abi, sizeof(Call) is 8, {launch._CALL.size} is needed",
        ),
        (
            OPERATOR / "abi.cpp",
            '{"PLAIN", PLAIN}',
            '{"PLAIN", PLAIN}, {"FANCY", 3}',
            "in swiftkernels_additive_abi, FANCY is 3, None is needed",
        ),
        (
            OPERATOR / "abi.cpp",
            "swiftkernels_additive_abi()",
            "swiftkernels_subtractive_abi()",
            "it has no swiftkernels_additive_abi",
        ),
    ],
)
def test_a_library_of_another_interface_is_refused(
    in_process, project, source, entry, replacement, difference
):
    text = (project / source).read_text()
    assert text.count(entry) == 1
    (project / source).write_text(text.replace(entry, replacement))
    build_in_place(project)
    in_process(project / LIBRARIES)
    assert library.loaded() is None
    assert f"built from other sources: {difference}" in library.why_not()
    assert "reinstall from the sources: pip install" in library.why_not()


@needs_compiler
def test_a_broken_library_is_passed_over(in_process, project):
    build_in_place(project)
    best = next(iter(libraries(project)))
    in_process(project / LIBRARIES)
    runs = [isa for isa, can_run in library.available().items() if can_run]
    if len(runs) < 2:
        pytest.skip("one library only")
    best = runs[0]
    libraries(project)[best].write_bytes(b"not a library")
    in_process(project / LIBRARIES)
    assert library.loaded().name == runs[1]
    assert library.problem(best).startswith("cannot be loaded")


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 only")
def test_without_the_portable_library_torch_tells_what_the_processor_can(in_process, project):
    build_in_place(project)
    best = library.loaded().name
    libraries(project)["portable"].unlink()
    in_process(project / LIBRARIES)
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "DEFAULT":
        assert library.loaded() is None
    else:
        assert library.loaded().name == ("avx2" if capability == "AVX2" else "avx512")
        assert library.ISAS.index(best) <= library.ISAS.index(library.loaded().name)


LOAD_ALL = """
import torch, swiftkernels.backends.cpu.library as lib
for isa, can_run in lib.available().items():
    if can_run:
        lib.load(isa)
assert lib.loaded()
"""


@needs_compiler
@pytest.mark.parametrize("tree", ["copy", "checkout"])
def test_loading_leaves_denormal_numbers_alone(built, tree):
    if tree == "checkout" and not libraries(ROOT):
        pytest.skip("nothing was built in the checkout")
    code = f"{LOAD_ALL}\nprint((torch.full((1,), 1e-40) * 1 != 0).item())"
    assert run(built if tree == "copy" else ROOT, "-c", code).stdout == "True\n"


@needs_compiler
def test_flags_of_the_user_cannot_switch_denormal_numbers_off(project):
    build_in_place(project, CXXFLAGS="-Ofast -ffast-math -funsafe-math-optimizations")
    assert libraries(project)
    code = f"{LOAD_ALL}\nprint((torch.full((1,), 1e-40) * 1 != 0).item())"
    assert run(project, "-c", code).stdout == "True\n"


@needs_compiler
@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_the_openmp_runtime_is_that_of_torch(built):
    code = f"""{LOAD_ALL}
for name in lib.available():
    if lib.available()[name] and hasattr(lib.load(name).handle, "parallel_threads"):
        assert lib.load(name).handle.parallel_threads() == torch.get_num_threads() == 2
maps = {{line.split()[-1] for line in open("/proc/self/maps")}}
print(len([path for path in maps if "libgomp" in path]))
"""
    assert run(built, "-c", code).stdout == "1\n"


@pytest.mark.slow
@needs_compiler
def test_pip_installs_with_and_without_a_compiler(project, tmp_path):
    install = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target")
    run(project, *install, str(tmp_path / "with"), ".")
    assert libraries(tmp_path / "with")
    assert (tmp_path / "with" / "bin" / "swiftkernels").exists()
    run(project, *install, str(tmp_path / "without"), ".", CXX="/nonexistent/c++")
    assert not libraries(tmp_path / "without")
    code = (
        "import swiftkernels, torch; swiftkernels.AdditiveAttention(8, 8, 1)(torch.ones(1, 2, 8))"
    )
    for folder in ("with", "without"):
        run(tmp_path / folder, "-c", code)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_an_editable_install_builds_in_place(project, tmp_path, mode):
    install = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--ignore-installed")
    mode = (f"--config-settings=editable_mode={mode}",)
    run(project, *install, *mode, "--prefix", str(tmp_path / "prefix"), "-e", ".")
    assert libraries(project)
    first = {path: path.stat().st_mtime_ns for path in libraries(project).values()}
    source = project / CSRC / "features.cpp"
    source.write_text(source.read_text() + "// changed\n")
    run(project, *install, *mode, "--prefix", str(tmp_path / "prefix"), "-e", ".")
    assert all(path.stat().st_mtime_ns > time for path, time in first.items())


@pytest.mark.slow
@needs_compiler
def test_build_makes_the_wheel_from_the_sdist(project):
    pytest.importorskip("build")
    run(project, "-m", "build", "--no-isolation")
    (wheel,) = (project / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [n for n in names if n.endswith(".so")]
