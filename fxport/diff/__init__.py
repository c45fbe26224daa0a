"""What passes change in a graph, and whether it still computes the same."""

from fxport.diff.record import Change, GraphDiff, NodeRecord, Row

__all__ = ["Change", "GraphDiff", "NodeRecord", "Row"]
