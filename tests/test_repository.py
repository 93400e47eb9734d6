"""The repository's own rules: docstrings, which way imports point, sizes, set-up files, and what no file may say."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]

SKIPPED = {".git", ".hypothesis", ".coverage", "runs", "data", "betons", "build", "__pycache__"}

FLOORS = {
    "params": 0, "system": 0,
    "masks": 1, "files": 1, "sparsity": 1, "tasks": 1, "models": 1, "data": 1, "native": 1, "reporting": 1,
    "pruning": 2, "training": 2,
    "structured_levels": 3, "structured_stages": 3, "structured_masks": 3, "level_channels": 3,
    "levels": 3, "level_masks": 3, "level_extensions": 3, "rewinding": 3, "feasibility": 3, "estimate": 3, "record": 3,
    "analysis": 3, "waiting": 3, "owned": 3,
}  # fmt: skip
"""Floor of each part of utils/: a module imports from its own floor or lower ones."""

FORBIDDEN = {
    ("training", "pruning"): "the trainer imports no method",
    ("reporting", "masks"): "reporting reads files alone",
    ("reporting", "files"): "reporting reads files alone",
    ("reporting", "models"): "reporting reads files alone",
    ("reporting", "data"): "reporting reads files alone",
}
"""Imports within a floor that are not wanted either."""

DISTRIBUTIONS = {
    "PIL": "pillow",
    "torch_pruning": "torch-pruning",
    "yaml": "pyyaml",
    "cv2": "opencv-python-headless",
    "sklearn": "scikit-learn",
}
"""Modules whose distribution has another name."""

OPTIONAL = {"ffcv", "tensorboard", "onnx", "onnxruntime", "google"}
"""Imported where present: FFCV is built by the set-up script, the rest comes with what the tests need."""

MAX_LINES = 400


# What there is ----------------------------------------------------------------------------------------------------


@functools.cache
def repository_files() -> tuple[Path, ...]:
    """Files that are, or would be, committed; everything but the usual leftovers where there is no git."""
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if done.returncode == 0 and done.stdout:
        paths = [ROOT / name for name in done.stdout.decode().split("\0") if name]
        return tuple(sorted(path for path in paths if path.is_file()))
    return tuple(sorted(_walk(ROOT)))


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name in SKIPPED or path.name.startswith(".venv") or path.name.endswith("_cache"):
            continue
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def python_files(*under: str) -> list[Path]:
    inside = [path for path in repository_files() if path.suffix == ".py"]
    return [path for path in inside if not under or path.relative_to(ROOT).parts[0] in under]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth; `from a import b` gives `a` and `a.b`."""
    names: set[str] = set()
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def is_entry_point(path: Path) -> bool:
    """harness.py, and modules started with `python -m`."""
    return path.name == "__main__.py" or path == ROOT / "harness.py" or 'if __name__ == "__main__":' in path.read_text()


def text_files() -> list[Path]:
    return [path for path in repository_files() if b"\0" not in path.read_bytes()[:4096]]


def test_the_repository_is_found() -> None:
    names = {str(path.relative_to(ROOT)) for path in repository_files()}
    assert {"Makefile", "requirements.txt", "utils/params/__init__.py", "tests/test_repository.py", ".ci/run"} <= names
    assert not [name for name in names if name.startswith((".venv", "runs/", ".git/")) or name.endswith(".pyc")]


# Code -------------------------------------------------------------------------------------------------------------


def test_every_module_has_a_docstring() -> None:
    bare = [path for path in python_files() if not ast.get_docstring(tree_of(path))]
    assert not bare, f"no docstring: {[str(path.relative_to(ROOT)) for path in bare]}"


def test_everything_public_in_utils_has_a_docstring() -> None:
    bare = []
    for path in python_files("utils", "harness.py", "harness_params.py", "harness_utils.py"):
        for node in tree_of(path).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                bare += [] if ast.get_docstring(node) else [f"{path.relative_to(ROOT)}: {node.name}"]
    assert not bare


def test_files_can_be_read_in_one_sitting() -> None:
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    long = [f"{path.relative_to(ROOT)}: {lines} lines" for path, lines in counts.items() if lines > MAX_LINES]
    assert not long


def test_the_top_level_is_fixed() -> None:
    allowed = {
        "harness.py", "harness_params.py", "harness_utils.py", "utils", "configs", "requirements.txt", "assets",
        "tests", "README.md", "benchmarks", "Makefile", "pyproject.toml", "LICENSE", ".ci", "docs", ".gitignore",
    }  # fmt: skip
    found = {path.relative_to(ROOT).parts[0] for path in repository_files()}
    assert found <= allowed, f"unexpected at the top level: {sorted(found - allowed)}"


# Imports point one way --------------------------------------------------------------------------------------------


def part_of(module: str) -> str | None:
    """`utils.pruning.rounds` to `pruning`; None for anything outside utils and for utils itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "utils" and len(parts) > 1 else None


def utils_modules() -> list[Path]:
    return [path for path in python_files("utils") if path != ROOT / "utils" / "__init__.py"]


def test_every_part_of_utils_has_a_floor() -> None:
    parts = {part_of(module_name(path)) for path in utils_modules()}
    assert parts <= set(FLOORS), f"give these a floor in FLOORS: {sorted(map(str, parts - set(FLOORS)))}"


def test_imports_point_down() -> None:
    wrong = []
    for path in utils_modules():
        if is_entry_point(path):
            continue
        here = part_of(module_name(path))
        for there in sorted({part_of(name) for name in imports(path)} - {None, here}, key=str):
            assert here is not None
            assert there is not None
            reason = FORBIDDEN.get((here, there), "" if FLOORS[there] <= FLOORS[here] else f"{there} is above {here}")
            wrong += [f"{path.relative_to(ROOT)} imports utils.{there}: {reason}"] if reason else []
    assert not wrong


def test_the_import_rule_can_fail() -> None:
    assert FLOORS["reporting"] < FLOORS["training"] < FLOORS["levels"]
    (driver,) = [path for path in utils_modules() if module_name(path) == "utils.levels"]
    assert {"pruning", "training", "reporting"} <= {part_of(name) for name in imports(driver)}


def test_only_entry_points_import_harness_modules() -> None:
    entry_points = {"harness", "harness_params", "harness_utils"}
    for path in python_files("utils"):
        if not is_entry_point(path):
            found = {name.partition(".")[0] for name in imports(path)} & entry_points
            assert not found, f"{path.relative_to(ROOT)} imports {found}"


def test_only_harness_params_imports_fastargs() -> None:
    code = [path for path in python_files() if path.relative_to(ROOT).parts[0] != "tests"]
    users = [path.name for path in code if any(name.partition(".")[0] == "fastargs" for name in imports(path))]
    assert users == ["harness_params.py"]


@pytest.mark.parametrize("module", ["utils.params", "utils.params.catalog", "utils.params.plan", "harness_params"])
def test_configs_are_read_without_torch(module: str) -> None:
    heavy = ("torch", "torchvision", "timm", "ffcv", "numba", "pandas")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_params_need_no_fastargs() -> None:
    code = "import sys, utils.params.catalog; print('fastargs' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


# Requirements -----------------------------------------------------------------------------------------------------


def requirements(name: str) -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    return {requirement.name.lower(): requirement for requirement in found}


def third_party(paths: list[Path]) -> set[str]:
    own = {"utils", "tests", "benchmarks", "harness", "harness_params", "harness_utils", "__future__", ""}
    modules = {name.partition(".")[0] for path in paths for name in imports(path)}
    return {DISTRIBUTIONS.get(module, module) for module in modules - own - set(sys.stdlib_module_names)}


def test_every_import_is_required() -> None:
    used = third_party(python_files("utils", "harness.py", "harness_params.py", "harness_utils.py", "benchmarks"))
    assert "torch" in used
    missing = used - OPTIONAL - set(requirements("requirements.txt"))
    assert not missing, f"not in requirements.txt: {sorted(missing)}"


def test_every_import_of_the_tests_is_required() -> None:
    listed = set(requirements("requirements.txt")) | set(requirements(".ci/requirements-dev.txt"))
    # packaging comes with pytest.
    assert third_party(python_files("tests")) - OPTIONAL - {"packaging"} <= listed


def test_what_is_installed_lies_in_the_ranges() -> None:
    for name, requirement in requirements("requirements.txt").items():
        version = importlib.metadata.version(name)
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} but {version} is installed"


def test_every_requirement_has_a_lowest_version() -> None:
    for requirement in requirements("requirements.txt").values():
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators & {">=", "=="}, f"{requirement}: no lower bound for `make test-low` to pin"


# Set-up and documents ---------------------------------------------------------------------------------------------


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    for heading in ("1. Definitions.", "3. Grant of Patent License.", "9. Accepting Warranty or Additional Liability."):
        assert heading in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_make_alone_prints_every_target() -> None:
    done = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("setup", "demo", "test", "test-all", "test-low", "lint", "clean"):
        assert f"make {target} " in done.stdout


def test_make_demo_runs_two_processes_on_the_quick_start() -> None:
    done = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    words = "torchrun --standalone --nproc-per-node=2 harness.py --config configs/quickstart.yaml"
    assert words in done.stdout
    assert (ROOT / "configs" / "quickstart.yaml").is_file()


def test_ci_runs_make_test() -> None:
    text = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^exec make .*\btest\b", text, re.MULTILINE)
    assert "set -euo pipefail" in text


@pytest.mark.parametrize("script", ["run", "setup.sh", "test.sh"])
def test_scripts_parse_and_are_strict(script: str) -> None:
    path = ROOT / ".ci" / script
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "set -euo pipefail" in path.read_text()


def test_set_up_pins_the_lowest_versions(tmp_path: Path) -> None:
    """The expression that makes `==` of `>=` in setup.sh gives every requirement's lower bound."""
    (expression,) = re.findall(r"sed -E '([^']+)' requirements\.txt", (ROOT / ".ci" / "setup.sh").read_text())
    done = subprocess.run(
        ["sed", "-E", expression, str(ROOT / "requirements.txt")], capture_output=True, text=True, check=True
    )
    pins = [Requirement(line.strip()) for line in done.stdout.splitlines() if line.strip()]
    expected = requirements("requirements.txt")
    assert [pin.name.lower() for pin in pins] == list(expected)
    for pin in pins:
        lower = [s.version for s in expected[pin.name.lower()].specifier if s.operator in (">=", "==")]
        assert str(pin.specifier) == f"=={lower[0]}"


def test_readme_names_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    configs = set(re.findall(r"\bconfigs/[\w./-]+\.yaml\b", text))
    assert "configs/quickstart.yaml" in configs
    missing = sorted(name for name in configs if not (ROOT / name).is_file())
    assert not missing, f"README names configs that are not there: {missing}"


def test_readme_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [link for link in links if link and "://" not in link and not (ROOT / link).exists()]
    assert not missing


def test_no_file_names_a_place_on_one_machine() -> None:
    folders = "|".join(("work", "root", "tmp", "home", "mnt", "Users"))
    absolute = re.compile(rf"""(?:^|[\s"'`=(:])/(?:{folders})/\w""")
    outside = re.compile(r"\.\./" + "shared|" + "DESIGN" + r"\.md|" + "SCIENCE" + r"\.md")
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if absolute.search(line) or outside.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found


def test_text_ends_with_one_newline_and_has_no_trailing_space() -> None:
    for path in text_files():
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".py", ".yaml", ".md", ".txt", ".toml", ".sh") and text:
            assert text.endswith("\n"), f"{path.relative_to(ROOT)}: no newline at the end"
            assert not re.search(r"[ \t]$", text, re.MULTILINE), f"{path.relative_to(ROOT)}: space at a line's end"
