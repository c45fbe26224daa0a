"""In-place operations on values that nobody else sees, as their out-of-place form.

    s = matmul(q, k)                      s = matmul(q, k)
    masked_fill_(s, mask, -inf)     ->    t = masked_fill(s, mask, -inf)
    softmax(s)                            softmax(t)

Those that cannot be replaced safely stay, and keep their neighbourhood from being rewritten. So do
those under `torch.no_grad` on a value from outside: its gradient goes past the change.
"""

from __future__ import annotations

from torch import fx

from fxport.capture.memory import is_mutation
from fxport.passes.functional import drop_whole_slices, replace_mutation
from fxport.passes.graph_facts import grad_modes
from fxport.passes.slice_writes import join_written_pieces

__all__ = ["without_inplace"]


def without_inplace(gm: fx.GraphModule) -> None:
    """Replaces what can be replaced."""
    written = [node for node in gm.graph.nodes if is_mutation(node)]
    if not written:
        return
    modes = grad_modes(gm.graph.nodes)
    unseen = {n for n in written if not modes[n] and any(modes[i] for i in n.all_input_nodes)}
    if not unseen:
        drop_whole_slices(gm)
        join_written_pieces(gm)
    for node in list(gm.graph.nodes):
        if is_mutation(node) and node not in unseen:
            replace_mutation(gm, node)
