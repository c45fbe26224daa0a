"""What forward asks about being traced is answered as if nobody traced it.

    if not torch.compiler.is_compiling() and T > 4096:      is_compiling() is False here: the
        x = x * self.scale                                  question about T is seen, and answered
    if _get_current_dispatch_mode_stack(): ...              no mode is active here

Torch and Python go on being told the truth. Files that hold the functions under names of their
own (``from torch.compiler import is_compiling``) are given ours for the time of a trace.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn
from torch._guards import CompileContext, TracingContext

from fxport.capture.location import is_library
from fxport.capture.memos import files_around

__all__ = ["asked_as_eager"]

# What each says where nobody traces, and no mode of anybody's is active.
_ANSWERS: dict[str, Any] = {
    "is_compiling": False,
    "is_exporting": False,
    "is_fx_tracing": False,
    "is_fx_symbolic_tracing": False,
    "is_in_torch_dispatch_mode": False,
    "is_in_any_mode_without_ignore_compile_internals": False,
    "_get_current_dispatch_mode": None,
    "_get_current_dispatch_mode_stack": [],
    "_get_current_function_mode": None,
    "_get_current_function_mode_stack": [],
    "_len_torch_dispatch_stack": 0,
    "_len_torch_function_stack": 0,
    "_get_dispatch_mode": None,
    "_is_torch_function_mode_enabled": False,
    "get_proxy_mode": None,
    "has_torch_function": False,
    "has_torch_function_unary": False,
    "has_torch_function_variadic": False,
    "detect_fake_mode": None,
    "active_fake_mode": None,
}
_WHERE = (
    "torch.compiler",
    "torch._C",
    "torch._dynamo",
    "torch._dynamo.external_utils",
    "torch._guards",
    "torch._utils",
    "torch.fx._symbolic_trace",
    "torch.fx.experimental.proxy_tensor",
    "torch.overrides",
    "torch.utils._python_dispatch",
)
# What is there for the time of a trace; `try_get` gives it, or None.
_CONTEXTS = (TracingContext, CompileContext)
_OURS = "fxport_asked"


@contextmanager
def asked_as_eager(model: nn.Module) -> Iterator[None]:
    """For the time of a trace, or of a run on shapes."""
    libraries = [sys.modules[name] for name in _WHERE if name in sys.modules]
    asked = {
        function: _eager(function, answer)
        for library in libraries
        for question, answer in _ANSWERS.items()
        if callable(function := vars(library).get(question)) and not hasattr(function, _OURS)
    }
    places = [*libraries, *files_around(model)]
    held: list[tuple[Any, str, Any]] = [
        (p, k, v) for p in places for k, v in vars(p).items() if _is_one(v, asked)
    ]
    contexts: list[tuple[Any, str, Any]] = [(c, "try_get", vars(c)["try_get"]) for c in _CONTEXTS]
    for place, name, function in held:
        setattr(place, name, asked[function])
    for place, name, function in contexts:
        setattr(place, name, staticmethod(_eager(function.__func__, None)))
    try:
        yield
    finally:
        for place, name, function in (*held, *contexts):
            setattr(place, name, function)


def _is_one(value: Any, functions: dict[Callable[..., Any], Any]) -> bool:
    return type(value) in (FunctionType, BuiltinFunctionType) and value in functions


def _eager(question: Callable[..., Any], eager: Any) -> Callable[..., Any]:
    @functools.wraps(question)
    def answer(*args: Any, **kwargs: Any) -> Any:
        if is_library(sys._getframe(1).f_code.co_filename):
            return question(*args, **kwargs)
        return eager.copy() if isinstance(eager, list) else eager

    setattr(answer, _OURS, True)
    return answer
