"""What the compiler makes of our Triton attention kernels on Hopper, without a GPU.

    python -m fxport.tools.triton_resources [--sass DIR] [--case NAME ...]

Runs the host code of `fxport.ops.triton.attention` on CPU tensors behind a driver that compiles
for sm_90 and launches nothing, so that each kernel is built exactly as a GPU would get it. Prints
registers per thread, stack bytes (where spilled registers go), shared memory, and how many matrix
instructions of which kind the machine code holds. Exit 1 if a kernel's shared memory does not fit.
"""

from __future__ import annotations

import argparse
import collections
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from tabulate import tabulate
from triton.backends.compiler import GPUTarget

from fxport.ops.params import AttentionParams
from fxport.ops.triton.attention import backward, forward

__all__ = ["main"]

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_SHARED_LIMIT = 232448  # bytes of shared memory a block may have on sm_90
_MATRIX = re.compile(r"\b(HGMMA|HMMA|QGMMA|UTMALDG|LDGSTS)\b")


class _Utils:
    """Takes the place of the CUDA driver: keeps each binary instead of loading it."""

    def __init__(self, built: list[tuple[str, bytes, int]]) -> None:
        self.built = built

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[object, object, int, int, int]:
        """Name, code, shared memory -> handles, registers, spills, most threads (all made up)."""
        self.built.append((name, binary, shared))
        return object(), object(), 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """The one property that the compiler asks for."""
        return {"max_shared_mem": 2**30}  # too much is reported in the table, not raised


class OfflineHopper:
    """A Triton driver whose device is an sm_90 that never runs anything.

    Attributes:
        built: ``(name, machine code, bytes of shared memory)`` of each kernel so far.
    """

    def __init__(self) -> None:
        self.built: list[tuple[str, bytes, int]] = []
        self.utils = _Utils(self.built)

    def get_current_target(self) -> GPUTarget:
        """Compile for Hopper."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """A launcher that does nothing."""
        return lambda *args, **kwargs: None


def _tensors(size: int, dtype: torch.dtype, group: int, length: int) -> list[torch.Tensor]:
    heads = 2 * group
    return [
        torch.zeros(1, h, length, size, dtype=dtype)
        for h in (heads, heads // group, heads // group)
    ]


def _cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls to compile: name -> forward and backward."""
    half, length = torch.bfloat16, 512
    for dtype, name in ((half, "bf16"), (torch.float32, "fp32")):
        for size in (64, 128, 256):
            yield f"{name} causal {size}", partial(_both, size, dtype, 1, length, causal=True)
    for name, limits in (("causal", {"causal": True}), ("window", {"window_left": 300})):
        for size in (64, 128):
            call = partial(_both, size, half, 2, 17 * length, **limits)
            yield f"bf16 long {name} {size}", call
    borders = torch.tensor([0, 5000, 17 * length], dtype=torch.int32)
    call = partial(_both, 128, half, 2, 17 * length, causal=True, cu_seqlens=borders)
    yield "bf16 long packed 128", call
    long_bias = torch.zeros(1, 4, 17 * length, 17 * length, dtype=half)
    for size in (64, 128):
        call = partial(_both, size, half, 2, 17 * length, bias=long_bias)
        yield f"bf16 long bias {size}", call
    dense = partial(_both, 128, half)
    yield "bf16 dense 128", partial(dense, 1, length)
    yield "bf16 ragged 128", partial(dense, 1, 500)
    yield "bf16 window gqa 128", partial(dense, 4, length, causal=True, window_left=100)
    yield "bf16 softcap 128", partial(dense, 1, length, causal=True, softcap=30.0)
    extras: dict[str, dict[str, Any]] = {
        "sinks": {"sinks": torch.zeros(2)},
        "alibi": {"alibi_slopes": torch.zeros(2)},
        "bias": {"bias": torch.zeros(1, 2, length, length, dtype=half)},
        "shared bias": {"bias": torch.zeros(1, 1, length, length, dtype=half)},
        "fp32 bias": {"bias": torch.zeros(1, 2, length, length)},
        "bool": {"bias": torch.ones(1, 1, length, length, dtype=torch.bool)},
        "padding": {"bias": torch.zeros(1, 1, 1, length)},
        "dropout": {"seed": torch.zeros(1, dtype=torch.int64), "dropout_p": 0.1},
    }
    for name, extra in extras.items():
        for size in (64, 128, 256):
            yield f"bf16 {name} {size}", partial(_both, size, half, 1, length, causal=True, **extra)
    everything: dict[str, Any] = {
        "sinks": torch.zeros(4),
        "alibi_slopes": torch.zeros(4),
        "bias": torch.zeros(4, 500, 500),
        "cu_seqlens": torch.tensor([0, 200, 500], dtype=torch.int32),
        "seed": torch.zeros(1, dtype=torch.int64),
        "causal": True,
        "window_left": 100,
        "softcap": 30.0,
        "dropout_p": 0.1,
    }
    for size in (64, 128, 256):
        yield f"bf16 everything {size}", partial(_both, size, half, 2, 500, **everything)


def _both(size: int, dtype: torch.dtype, group: int, length: int, **given: Any) -> tuple[Any, ...]:
    """One call of forward and one of backward, all gradients wanted."""
    names = ("bias", "sinks", "alibi_slopes", "cu_seqlens", "seed")
    bias, sinks, slopes, cu_seqlens, seed = (given.pop(name, None) for name in names)
    params = AttentionParams(scale=1 / math.sqrt(size), **given)
    q, k, v = _tensors(size, dtype, group, length)
    optional = (bias, sinks, slopes)
    out, lse = forward(q, k, v, *optional, cu_seqlens, seed, params)
    wanted = tuple(x is not None and x.is_floating_point() for x in (q, k, v, *optional))
    return backward(out, None, q, k, v, out, lse, *optional, cu_seqlens, seed, params, wanted)


def _resources(binary: bytes, sass: Path | None) -> tuple[int, int, str]:
    """Registers per thread, stack bytes, and the matrix and copy instructions of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if sass is not None:
        sass.write_text(text)
    registers, stack = (
        max(int(n) for n in re.findall(rf"\b{what}:(\d+)", text)) for what in ("REG", "STACK")
    )
    counted = collections.Counter(_MATRIX.findall(text))
    return registers, stack, " ".join(f"{name}:{n}" for name, n in sorted(counted.items()))


def main() -> int:
    """Compile every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sass", type=Path, help="write each kernel's machine code there")
    parser.add_argument("--case", action="append", help="only cases whose name contains this")
    arguments = parser.parse_args()
    driver = OfflineHopper()
    triton.runtime.driver.set_active(driver)  # type: ignore[arg-type]
    rows: list[tuple[str, str, int, int, int, str]] = []
    for name, call in _cases():
        if arguments.case and not any(part in name for part in arguments.case):
            continue
        driver.built.clear()
        call()
        for kernel, binary, shared in driver.built:
            path = None
            if arguments.sass:
                arguments.sass.mkdir(parents=True, exist_ok=True)
                path = arguments.sass / f"{name.replace(' ', '-')}-{kernel}.sass"
            registers, stack, instructions = _resources(binary, path)
            rows.append((name, kernel, registers, stack, shared, instructions))
    print(f"triton {triton.__version__}, sm_90")
    headers = ("case", "kernel", "registers", "stack", "shared", "instructions")
    print(tabulate(rows, headers=headers))
    return int(any(shared > _SHARED_LIMIT for *_, shared, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
