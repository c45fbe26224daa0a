"""The Triton kernels against the dense formula in float64, and what they compile to.

With a GPU the tests of `triton_cases` run here, natively. Without one they run in Triton's
interpreter, which must be switched on before Triton is imported and would change every kernel of
this process, so a process of their own runs them: same file, TRITON_INTERPRET=1. To run some of
them by hand: ``TRITON_INTERPRET=1 pytest tests/ops/test_triton_attention.py -k dropout``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    from triton_cases import *  # noqa: F403
else:

    def _run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
        return done

    def test_in_the_interpreter() -> None:
        done = _run("pytest", "-q", "--no-header", str(Path(__file__)), TRITON_INTERPRET="1")
        assert " passed" in done.stdout

    def test_compiles_for_hopper() -> None:
        """The interpreter accepts code that the compiler does not, and knows no limits."""
        cases = ("bf16 causal 128", "bf16 everything 64", "bf16 shared bias 64")
        chosen = [word for case in cases for word in ("--case", case)]
        done = _run("fxport.tools.triton_resources", *chosen)
        table = done.stdout.splitlines()
        for kernel in ("forward_kernel", "query_kernel", "key_kernel", "bias_kernel"):
            lines = [line for line in table if kernel in line and line.startswith("bf16")]
            assert lines, kernel
            assert all("HGMMA" in line and "UTMALDG" in line for line in lines), lines
