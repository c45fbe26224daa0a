"""Steps that are taken in pieces, or for more tokens than there are, as steps on the tokens.

At plain lengths alone: how many pieces there are, and how much is padded, hangs on the length.
"""

from __future__ import annotations

from torch import Tensor, fx

from fxport.capture.arguments import shape_of
from fxport.capture.whole.lift import join_pieces
from fxport.capture.whole.narrow import padded_lengths, without_padding
from fxport.capture.whole.tidy import tidy

__all__ = ["make_whole"]


def make_whole(gm: fx.GraphModule, batch: int, length: int) -> None:
    """Rewrites the graph of one plain length in place; what nothing is known of stays.

    So does a graph some of whose sizes only the data know.
    """
    tensors = (n for n in gm.graph.nodes if isinstance(n.meta.get("val"), Tensor))
    if not all(isinstance(size, int) for node in tensors for size in shape_of(node)):
        return
    tidy(gm)
    padded = padded_lengths(gm, length)
    lengths = {rows * n for n in (length, *padded) for rows in (1, batch)}
    while join_pieces(gm, lengths) + without_padding(gm, length):
        tidy(gm)
