"""Who reads a stage's parameters, by the graph that autograd made of a forward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def readers(outputs: Sequence[Tensor], layer_node: str) -> tuple[set[int], set[int]]:
    """``id`` of the parameters that split layers read, and of those that others read, by the graph of ``outputs``.

    What checkpointing hides is not in it.

    Args:
        outputs: of a forward.
        layer_node: name of the type of a split layer's node, whose first input is no parameter of its.
    """
    pending = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(pending)
    layers: set[int] = set()
    others: set[int] = set()
    while pending:
        node = pending.pop()
        is_layer = type(node).__name__ == layer_node
        for at, (parent, _) in enumerate(node.next_functions):
            if parent is None:
                continue
            param = getattr(parent, "variable", None)
            if param is not None:
                (layers if is_layer and at > 0 else others).add(id(param))
            elif parent not in seen:
                seen.add(parent)
                pending.append(parent)
    return layers, others
