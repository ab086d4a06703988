"""Gradients of embeddings in rows: the bits of dense ones, and left to autograd where only that is right."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import paci_rt
from paci_rt.runtime import embedding_rows
from paci_rt.runtime.embedding_rows import EmbeddingLookup

VOCABULARY, WIDTH, A = 40, 16, 4


class Plain(nn.Module):
    """One embedding and a head."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH, dtype=dtype, **options)
        self.head = nn.Linear(WIDTH, VOCABULARY, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))  # type: ignore[no-any-return]


class Twice(Plain):
    """Looks up twice in a forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x) + self.table(x.roll(1, 1)))  # type: ignore[no-any-return]


class TiedHead(Plain):
    """The head is the table."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.table.weight


class ReadElsewhere(Plain):
    """A plain function reads the table too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.table(x), self.table.weight) + self.table.weight.mean()


class Checkpointed(Plain):
    """The lookup is run again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        inner: Any = checkpoint(lambda ids: self.table(ids).tanh(), x, use_reentrant=False)
        return self.head(inner)  # type: ignore[no-any-return]


def trained(make: Callable[[], nn.Module], *, rows: bool, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """Weights and gradient norms of a few windows."""
    torch.manual_seed(0)
    model = make()
    with monkeypatch.context() as patch:
        if not rows:
            patch.setattr(embedding_rows, "find_embeddings", lambda _: [])
        pipe = paci_rt.LocalPipeline(
            [model],
            n_microbatches=A,
            loss_fn=lambda out, target: F.cross_entropy(out.flatten(0, 1).float(), target.flatten()),
            optimizer=lambda params: paci_rt.AdamW([param for _, param in params], lr=0.01),
            **{"schedule": "1f1b", **options},
        )
    generator, norms = torch.Generator().manual_seed(1), []
    for _ in range(3):
        x = torch.randint(VOCABULARY, (2 * A, 30), generator=generator)
        pipe.step(x, target=x.roll(1, 1))
        norms.append(pipe.stats()["grad_norm"][0])
    pipe.close()
    return [*(param.detach().clone() for param in model.parameters()), torch.tensor(norms)]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "fp32": Plain,
    "bf16": lambda: Plain(torch.bfloat16),
    "fp16": lambda: Plain(torch.float16),
    "padding": lambda: Plain(padding_idx=3),
    "twice": Twice,
    "tied head": TiedHead,
    "read elsewhere": ReadElsewhere,
    "checkpointed": Checkpointed,
    "scaled by frequency": lambda: Plain(scale_grad_by_freq=True),
    "renormed": lambda: Plain(max_norm=1.0),
}


@pytest.mark.parametrize("name", MODELS)
def test_rows_have_the_bits_of_dense_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, dense = (trained(MODELS[name], rows=which, monkeypatch=monkeypatch) for which in (True, False))
    assert all(torch.equal(one, other) for one, other in zip(rows, dense, strict=True))


@pytest.mark.parametrize("options", [{"schedule": "zb-h1"}, {"max_grad_norm": 0.1}, {"on_nonfinite": "skip-window"}])
def test_so_with_a_split_backward_and_with_looks_at_gradients(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, dense = (trained(Plain, rows=which, monkeypatch=monkeypatch, **options) for which in (True, False))
    assert all(torch.equal(one, other) for one, other in zip(rows, dense, strict=True))


def attached(model: nn.Module) -> paci_rt.LocalPipeline:
    return paci_rt.LocalPipeline(
        [model],
        n_microbatches=A,
        loss_fn=lambda out, target: F.cross_entropy(out.flatten(0, 1), target.flatten()),
        optimizer=lambda params: paci_rt.SGD([param for _, param in params], lr=0.1),
        schedule="1f1b",
    )


def test_no_backward_takes_a_gradient_as_large_as_the_table() -> None:
    model = Plain()
    model.table = nn.Embedding(50_000, WIDTH)
    pipe = attached(model)
    x = torch.randint(VOCABULARY, (A, 30))
    pipe.step(x, target=x)
    memory = pipe.stats()["memory"][0]
    assert 0 < memory["temporaries"] < model.table.weight.nbytes / 10
    pipe.close()


def test_a_gradient_that_autograd_makes_is_counted() -> None:
    model = Plain(scale_grad_by_freq=True)
    pipe = attached(model)
    x = torch.randint(VOCABULARY, (A, 1))
    pipe.step(x, target=x)
    assert pipe.stats()["memory"][0]["temporaries"] >= model.table.weight.nbytes
    pipe.close()


@pytest.mark.parametrize("remove_after", [None, 1, 2])
def test_a_hook_sees_the_gradient_and_none_is_lost_when_it_goes(remove_after: int | None) -> None:
    """A post-accumulate hook that goes in the middle of a window, on a table and on a matrix, beside plain torch."""
    x = torch.randint(VOCABULARY, (A, 30), generator=torch.Generator().manual_seed(2))
    results = []
    for pipelined in (True, False):
        torch.manual_seed(0)
        model, seen, handles = Plain(), [], []

        def forward_hook(*_: Any, seen: list[int] = seen, handles: list[Any] = handles) -> None:
            seen.append(1)
            if remove_after is not None and len(seen) == remove_after + 1:
                for handle in handles:
                    handle.remove()

        model.register_forward_pre_hook(forward_hook)
        pipe = attached(model) if pipelined else None
        for param in (model.table.weight, model.head.weight):
            handles.append(param.register_post_accumulate_grad_hook(lambda _: None))
        if pipe is not None:
            pipe.step(x, target=x)
            pipe.close()
        else:
            for part in x.split(1):
                F.cross_entropy(model(part).flatten(0, 1), part.flatten()).div(A).backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        results.append([param.detach().clone() for param in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)  # 1/a is applied to the sum, not to each loss


def test_copies_and_pickles_compute_as_usual_and_close_gives_the_forward_back() -> None:
    model = Plain()
    pipe = attached(model)
    assert isinstance(model.table.__dict__["forward"], EmbeddingLookup)
    x = torch.randint(VOCABULARY, (2, 5))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    assert not model(x).requires_grad or model.table.weight.grad is None
    model(x).sum().backward()  # somebody else's backward leaves its gradient where autograd would
    assert model.table.weight.grad is not None
    pipe.close()
    assert "forward" not in model.table.__dict__
