from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import paci_rt
from paci_rt.runtime import in_flight
from paci_rt.runtime.stage import PipelineStage


def test_bad_stages_are_named() -> None:
    with pytest.raises(ValueError, match="stage_index is 2 of num_stages 2"):
        PipelineStage(nn.Linear(2, 2), 2, 2)
    with pytest.raises(ValueError, match="'cuda'"):
        PipelineStage(nn.Linear(2, 2), 0, 2, "cuda")
    with pytest.raises(paci_rt.StageError, match="submodule is a function"):
        PipelineStage(lambda x: x, 0, 2)  # type: ignore[arg-type]


def test_a_stage_that_returns_what_cannot_travel_is_named() -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, object]]:
            return x, {"hidden": object()}

    with pytest.raises(paci_rt.StageError, match=r"stage 0 returned a object at output\[1\]\['hidden'\]"):
        PipelineStage(Wrong(), 0, 2).forward(0, (torch.zeros(2, 2),), {})


def test_backwards_start_from_outputs_where_edges_do_not_keep_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def weights() -> Tensor:
        torch.manual_seed(0)
        pipe = paci_rt.LocalPipeline(
            [nn.Linear(3, 3), nn.Linear(3, 3)],
            n_microbatches=2,
            loss_fn=lambda output, target: (output - target).square().mean(),
            optimizer=lambda params: paci_rt.AdamW(params, lr=1e-2),
        )
        for _ in range(3):
            pipe.step(torch.randn(4, 3), target=torch.randn(4, 3))
        pipe.drain()
        pipe.close()
        return torch.cat([param.detach().flatten() for _, param in pipe.named_parameters()])

    by_edges = weights()
    monkeypatch.setattr(in_flight, "_EDGES_AS_ROOTS", False)
    assert torch.equal(weights(), by_edges)


def test_the_output_is_not_kept_for_the_backward() -> None:
    stage = PipelineStage(nn.Linear(4, 4), 0, 2)
    message, output, _ = stage.forward(0, (torch.ones(3, 4),), {})
    assert message is not None and message.tensors[0] is not None
    address = message.tensors[0].untyped_storage().data_ptr()
    kept = [tensor for saved in stage.in_flight.values() for tensor in saved.inputs]
    roots = [root for saved in stage.in_flight.values() for root in saved.held.roots]
    assert not kept and not any(isinstance(root, Tensor) for root in roots)
    assert output.untyped_storage().data_ptr() == address  # handed over, not copied
    gradients = stage.backward(0, (torch.ones(3, 4),))
    assert gradients.tensors == ()
    assert stage.submod.weight.grad is not None  # nobody attached: gradients stay where torch leaves them
