"""Type-check the package as it installs.

`passes/` installs as `fxport.passes` (setuptools ``package-dir``), a mapping that mypy does not
know: run on the source tree it would take ``fxport.passes`` for a missing package and check
nothing that crosses the border. So the installed layout is laid out as links and checked there.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def package_dirs() -> dict[str, str]:
    """Package name -> folder in the repository, from pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    mapping: dict[str, str] = settings["tool"]["setuptools"]["package-dir"]
    return mapping


def link_tree(target: Path) -> None:
    """Make `target/fxport` look like the installed package; its files are links."""
    package = target / "fxport"
    package.mkdir()
    for entry in (ROOT / "fxport").iterdir():
        (package / entry.name).symlink_to(entry)
    for name, folder in package_dirs().items():
        if "." in name:
            (package / name.split(".")[1]).symlink_to(ROOT / folder)


def in_repository(output: str) -> str:
    """Turn `fxport/passes/x.py` back into `passes/x.py`, so that an editor can jump there."""
    for name, folder in package_dirs().items():
        if "." in name:
            output = re.sub(rf"^{name.replace('.', '/')}/", f"{folder}/", output, flags=re.M)
    return output


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        link_tree(Path(temporary))
        command = [sys.executable, "-m", "mypy", "-p", "fxport"]
        command += ["--config-file", str(ROOT / "pyproject.toml")]
        command += ["--cache-dir", str(ROOT / ".mypy_cache")]
        done = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
    print(in_repository(done.stdout), end="")
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
