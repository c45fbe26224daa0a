"""The Triton kernels of `expert_linear`, on a GPU or (see `test_triton_attention`) interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    from expert_cases import *  # noqa: F403
else:

    def test_in_the_interpreter() -> None:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--no-header", str(Path(__file__))],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
        assert " passed" in done.stdout
