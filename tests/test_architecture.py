"""The house as design has it: who may import whom, and one name per op in every place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gear_engine import ops
from gear_engine.bench import counts, registry

ROOT = Path(__file__).resolve().parent.parent

#: Rooms from the bottom up: a room may import rooms of lower floors, and itself. A new module needs a floor here.
FLOORS: tuple[frozenset[str], ...] = (
    # Kernels import nothing from above; ops loads a Triton kernel by name when it is chosen.
    frozenset({"errors", "_C", "triton_kernels"}),
    frozenset({"caption_cleaning", "config", "cuda_graph", "files", "hub", "pages", "pretrained", "request"}),
    frozenset({"scheduler"}),
    frozenset({"ops", "segments"}),
    frozenset({"models", "metrics", "row_table", "text_encoders"}),
    frozenset({"kv_cache"}),
    frozenset({"memory", "sampler"}),
    frozenset({"runner", "rows"}),
    frozenset({"prefixes", "tokenizers"}),
    frozenset({"steps"}),
    frozenset({"step_program"}),
    frozenset({"checkpoint"}),
    frozenset({"engine"}),
    frozenset({"foreign_modules", "runs"}),
    frozenset({"compat", "pipeline_inputs", "pipeline_output", "report"}),
    frozenset({"pipeline"}),
    frozenset({"training"}),
    frozenset({"bench"}),
    frozenset({"cli"}),
    frozenset({"__init__"}),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
#: Rooms that plan or describe, and so know no device.
WITHOUT_TORCH = frozenset({"errors", "config", "request", "scheduler", "segments"})
OPS_HELPERS = frozenset({"__init__", "backends", "native", "packed_weight", "readout_kernels", "triton_backend"})
#: Functions that several kernels share, with a reference and a test of their own but no backend to choose.
SHARED_FUNCTIONS = frozenset({"philox"})
#: Ops made of other ops: chosen where those are, timed by the rollout benchmark.
COMPOSED = frozenset({"decode_steps"})


def python_files() -> Iterator[tuple[str, Path]]:
    """(room, file) of everything that is installed."""
    for path in sorted((ROOT / "gear_engine").rglob("*.py")):
        yield path.relative_to(ROOT / "gear_engine").parts[0].removesuffix(".py"), path
    for room in ("bench", "triton_kernels"):
        for path in sorted((ROOT / room).rglob("*.py")):
            yield room, path


def imported_names(path: Path) -> set[str]:
    """Absolute dotted names of all imports in a file, also those inside functions, but not those for typing only."""
    tree = ast.parse(path.read_text(), str(path))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the absolute name"
            names.add(str(node.module))
            if node.module == "gear_engine":
                names |= {f"gear_engine.{alias.name}" for alias in node.names}
    return names


def rooms_of(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("gear_engine.")}


def test_every_module_has_a_floor() -> None:
    unknown = {room for room, _ in python_files()} - set(FLOOR_OF)
    assert not unknown, f"give {sorted(unknown)} a floor in {Path(__file__).name}"


def test_imports_go_down() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {other}"
        for room, path in python_files()
        for other in rooms_of(imported_names(path))
        if other in FLOOR_OF and other != room and FLOOR_OF[other] >= FLOOR_OF.get(room, 99)
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_that_know_no_device_import_no_torch() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for room, path in python_files()
        if room in WITHOUT_TORCH and any(name.split(".")[0] == "torch" for name in imported_names(path))
    ]
    assert not wrong


def test_memory_for_kernels_names_its_dtype() -> None:
    """A kernel writes fp32 whatever torch's default dtype is. Modules follow it, as modules do."""
    wrong = []
    for room, path in python_files():
        if room in {"training", "cli", "bench"} or path.name == "layers.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"torch.empty", "torch.zeros", "torch.ones"}:
                named = {keyword.arg for keyword in node.keywords}
                if not named & {"dtype", None}:  # None: **options
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def test_kernels_include_no_torch_header() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".h", ".cu", ".cuh"}]
    assert sources
    wrong = [
        str(path.relative_to(ROOT))
        for path in sources
        if re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text())
    ]
    assert not wrong


def test_the_source_list_is_complete() -> None:
    listed = set(re.findall(r"^\s+((?:cpu|cuda|common)/\S+\.(?:cpp|cu))$", (ROOT / "CMakeLists.txt").read_text(), re.M))
    present = {str(path.relative_to(ROOT / "csrc")) for path in (ROOT / "csrc").rglob("*.c*") if path.suffix != ".cuh"}
    assert listed == present - {"bindings.cpp"}


def op_modules() -> list[str]:
    names = {path.stem for path in (ROOT / "gear_engine" / "ops").glob("*.py")}
    calls = {f"{name}_cuda" for name in names}
    return sorted(names - OPS_HELPERS - SHARED_FUNCTIONS - COMPOSED - calls)


@pytest.mark.parametrize("op", op_modules())
def test_an_op_has_one_name_in_every_place(op: str) -> None:
    found = ops.backends.implementations(op)
    assert "reference" in found, "no reference"
    assert set(found) - {"reference"}, "no implementation beside the reference"
    for backend, place in (
        ("cpu", f"csrc/cpu/{op}.cpp"),
        ("cuda", f"csrc/cuda/{op}.cu"),
        ("triton", f"triton_kernels/{op}.py"),
    ):
        assert (backend in found) == (ROOT / place).is_file(), f"{place} and the {backend!r} backend go together"
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").is_file(), "no test"
    assert op in registry.benchmarks(), "`gear-engine bench` does not run it: register it in bench/suite_*.py"
    assert callable(getattr(counts, op, None)), "bench/counts.py does not count its bytes and operations"


def test_no_orphan() -> None:
    """No kernel and no op test without its op."""
    known = set(op_modules()) | SHARED_FUNCTIONS | COMPOSED
    files = (ROOT / "tests" / "ops").glob("test_*.py")
    tests = {re.sub("^test_(cpu_|cuda_|fp8_)?", "", path.stem) for path in files}
    assert tests - known <= {"triton_kernels", "triton_variants", "not_finite", "backends", "native"}
    triton = {path.stem for path in (ROOT / "triton_kernels").glob("*.py")} - {"__init__"}
    assert triton <= known
    cuda = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert cuda <= known
