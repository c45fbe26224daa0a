"""fxport: train any plain PyTorch language model with flash attention, serve it in vLLM.

port = fxport.port(model)      # proven, or refused with file and line
port.save("my_model/")         # then: vllm.LLM("my_model/")
torch.compile(model, backend="vllm_generic")
"""

from fxport.api import Port, port
from fxport.errors import FxportError, Location, PortError, Reason, ReasonCode, SavedPortError
from fxport.report import Decision, Outcome, Report

__all__ = [
    "Decision",
    "FxportError",
    "Location",
    "Outcome",
    "Port",
    "PortError",
    "Reason",
    "ReasonCode",
    "Report",
    "SavedPortError",
    "port",
]
