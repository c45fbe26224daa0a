"""What a user installs: the wheel's content, light imports, entry points."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, cwd: Path) -> str:
    """Output of a fresh interpreter that is not in the repository."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in ("fxport", "passes", "backends", "tools"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "."]
    done = subprocess.run([*pip, "-w", str(folder)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_source_file(wheel: set[str]) -> None:
    installed_as = {
        "fxport": "fxport",
        "passes": "fxport/passes",
        "backends": "fxport/backends",
        "tools": "fxport/tools",
    }
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in installed_as.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert expected <= wheel, f"missing from the wheel: {sorted(expected - wheel)}"


def test_the_wheel_holds_data_and_licence(wheel: set[str]) -> None:
    assert {"fxport/py.typed", "fxport/templates/report.html"} <= wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_the_wheel_adds_one_top_level_package(wheel: set[str]) -> None:
    top = {name.split("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fxport"}


def test_import_fxport_is_light(tmp_path: Path) -> None:
    code = (
        "import sys, fxport; "
        "print([m for m in ('vllm', 'transformers', 'triton') if m in sys.modules])"
    )
    assert run_python(code, tmp_path) == "[]"


def test_the_backend_is_listed_without_importing_fxport(tmp_path: Path) -> None:
    code = (
        "import sys, torch._dynamo; "
        "print('vllm_generic' in torch._dynamo.list_backends(), 'fxport' in sys.modules)"
    )
    assert run_python(code, tmp_path) == "True False"


def test_the_vllm_plugin_is_found(tmp_path: Path) -> None:
    code = (
        "from importlib.metadata import entry_points; "
        "found = [e for e in entry_points(group='vllm.general_plugins') if e.name == 'fxport']; "
        "print(len(found), callable(found[0].load()))"
    )
    assert run_python(code, tmp_path) == "1 True"


def test_the_command_line_starts(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("fxport")
    done = subprocess.run([program, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "explain" in done.stdout and "port" in done.stdout
