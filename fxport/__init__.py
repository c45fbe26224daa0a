"""fxport: train any plain PyTorch language model with flash attention, serve it in vLLM.

port = fxport.port(model)      # proven, or refused with file and line
port.save("my_model/")         # then: vllm.LLM("my_model/")
torch.compile(model, backend="vllm_generic")
fxport.explain(model)          # what is rewritten, and what is in the way
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxport import nn, testing
    from fxport.api import Port, port
    from fxport.diff.record import GraphDiff
    from fxport.errors import FxportError, Location, PortError, Reason, ReasonCode, SavedPortError
    from fxport.explain_api import explain
    from fxport.explain_records import Explanation
    from fxport.loading import Loaded, load
    from fxport.nn.registry import register_model
    from fxport.parallel.api import gather_state_dict, parallelize, plan, shard_state_dict
    from fxport.parallel.context import ParallelContext
    from fxport.parallel.plan import Plan
    from fxport.report import Decision, Outcome, Report
    from fxport.verification import verify
    from fxport.verify_records import Verification

__all__ = [
    "Decision",
    "Explanation",
    "FxportError",
    "GraphDiff",
    "Loaded",
    "Location",
    "Outcome",
    "ParallelContext",
    "Plan",
    "Port",
    "PortError",
    "Reason",
    "ReasonCode",
    "Report",
    "SavedPortError",
    "Verification",
    "explain",
    "gather_state_dict",
    "load",
    "nn",
    "parallelize",
    "plan",
    "port",
    "register_model",
    "shard_state_dict",
    "testing",
    "verify",
]

# Public name -> module. Loaded on first use: the pytest plugin must not load torch.
_HOMES = {
    "Decision": "fxport.report",
    "Explanation": "fxport.explain_records",
    "FxportError": "fxport.errors",
    "GraphDiff": "fxport.diff.record",
    "Loaded": "fxport.loading",
    "Location": "fxport.errors",
    "Outcome": "fxport.report",
    "ParallelContext": "fxport.parallel.context",
    "Plan": "fxport.parallel.plan",
    "Port": "fxport.api",
    "PortError": "fxport.errors",
    "Reason": "fxport.errors",
    "ReasonCode": "fxport.errors",
    "Report": "fxport.report",
    "SavedPortError": "fxport.errors",
    "Verification": "fxport.verify_records",
    "explain": "fxport.explain_api",
    "gather_state_dict": "fxport.parallel.api",
    "load": "fxport.loading",
    "parallelize": "fxport.parallel.api",
    "plan": "fxport.parallel.api",
    "port": "fxport.api",
    "register_model": "fxport.nn.registry",
    "shard_state_dict": "fxport.parallel.api",
    "verify": "fxport.verification",
}
_SUBMODULES = ("nn", "testing")


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return importlib.import_module(f"fxport.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'fxport' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
