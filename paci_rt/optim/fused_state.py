"""State of a fused optimizer for one flat group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from paci_rt.optim.backend import make_steps
from paci_rt.optim.flat import FlatGroup
from paci_rt.optim.steps_native import Ahead, FlatStep


class FusedState:
    """State of a fused optimizer for one flat group: flat fp32 buffers and, for low precision, fp32 masters.

    Args:
        names: of the flat buffers, which begin at zero.
        numbers: what is one number for each parameter, and what it begins at.

    Attributes:
        group: the parameters.
        param_group: the optimizer's group that they belong to; hyper-parameters are read from it at each update.
        flat: flat fp32 buffers by state name.
        master: fp32 weights of bf16/fp16 parameters, None where parameters are fp32 themselves.
        numbers: by state name, one number for each parameter, such as ``step``, the updates that it has had.
        steps: what takes the group's steps on its device.
        clip: what the gradients of the update that comes now are multiplied by; on a GPU fp32 of one element.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        param_group: dict[str, Any],
        group: FlatGroup,
        names: tuple[str, ...],
        numbers: Mapping[str, float] | None = None,
    ) -> None:
        self.group, self.param_group, self._optimizer = group, param_group, optimizer
        self.steps = make_steps(group)
        self.flat = {name: group.empty_like(torch.float32) for name in names}
        self.master: Tensor | None = None
        if group.dtype is not torch.float32:
            self.master = group.empty_like(torch.float32)
            self.master.copy_(group.weight)
        self.clip: Tensor | float | None = None
        self._first = dict(numbers or {})
        self.numbers = {name: torch.full((len(group.params),), value) for name, value in self._first.items()}
        self._versions = self._param_versions()
        for position, param in enumerate(group.params):
            self.adopt(position, optimizer.state.get(param) or {})

    @property
    def nbytes(self) -> int:
        """Bytes of the state without the masters."""
        return sum(tensor.nbytes for tensor in (*self.flat.values(), *self.numbers.values()))

    def has_state(self, position: int) -> bool:
        """Whether a parameter has been updated, or was given a state."""
        return bool(self._optimizer.state.get(self.group.params[position]))

    def views(self, position: int) -> dict[str, Any]:
        """One parameter's state under torch's names, as views of the flat buffers."""
        views: dict[str, Any] = {name: values[position] for name, values in self.numbers.items()}
        views.update({name: self.group.view(flat, position) for name, flat in self.flat.items()})
        if self.master is not None:
            views["master"] = self.group.view(self.master, position)
        return views

    def check(self, position: int, entry: Mapping[str, Any]) -> None:
        """Make sure that :meth:`adopt` can take ``entry``.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs.
        """
        name, views = self.group.names[position], self.views(position)
        given = {key: value for key, value in entry.items() if value is not None}
        if not given:
            return
        missing, unexpected = views.keys() - given.keys() - {"master"}, given.keys() - views.keys() - {"master"}
        if missing or unexpected:
            raise ValueError(
                f"optimizer state of {name!r} has {sorted(given)}, but {type(self._optimizer).__name__} keeps "
                f"{sorted(views)}: it was saved by another optimizer"
            )
        for key, value in given.items():
            check_state_value(key, name, value)
            shape = torch.as_tensor(value).shape
            if key in views and shape != views[key].shape:
                raise ValueError(
                    f"optimizer state {key!r} of {name!r} has shape {tuple(shape)}, expected {tuple(views[key].shape)}"
                )

    def adopt(self, position: int, entry: dict[str, Any]) -> None:
        """Replace one parameter's state by the values of ``entry``; an empty one resets it.

        A missing ``master`` keeps the master that the parameter implies, so that states of plain torch optimizers
        can be loaded.

        Raises:
            ValueError: as :meth:`check`; nothing has been changed then.
        """
        self.check(position, entry)
        param, views = self.group.params[position], self.views(position)
        given = {key: value for key, value in entry.items() if value is not None}
        if not given:
            for key, view in views.items():
                view.fill_(self._first.get(key, 0.0))
            if self.master is not None:
                views["master"].copy_(self.group.values(position))
            self._optimizer.state.pop(param, None)
            return
        for key, view in views.items():
            view.copy_(torch.as_tensor(given[key]) if key in given else self.group.values(position))
        self._optimizer.state[param] = views

    def updates(self) -> list[int]:
        """Updates that each parameter has had: all of them where there is a ``step``, else only whether there was
        one."""
        steps = self.numbers.get("step")
        if steps is not None:
            return [int(count) for count in steps.tolist()]
        return [int(self.has_state(position)) for position in range(len(self.group.params))]

    def movable(self, known: Sequence[bool]) -> list[int]:
        """Positions of the parameters that can be put ahead: those of ``known`` gradients, and those with a past."""
        return [position for position, count in enumerate(self.updates()) if known[position] or count]

    def step(self, grad_sum: Tensor, divisor: float, positions: list[int], ahead: Ahead | None = None) -> FlatStep:
        """What a step over the parameters at ``positions``, which ascend, is told: gradients ``grad_sum / divisor``,
        flat and fp32, and the group's options."""
        group, options, updates = self.group, self.param_group, self.updates()
        step: FlatStep = {
            "master": group.weight if self.master is None else self.master,
            "weight": None if self.master is None else group.weight,
            "grad_sum": grad_sum,
            "pieces": [(group.offsets[i], group.numels[i], updates[i] + 1) for i in positions],
            "lr": float(options["lr"]),
            "weight_decay": float(options["weight_decay"]),
            "divisor": -divisor if options["maximize"] else divisor,
            "ahead": ahead,
        }
        if self.clip is not None and ahead is None:
            step["clip"] = self.clip
        return step

    def count(self, positions: list[int]) -> None:
        """Parameters at ``positions`` were updated: their state shows in ``optimizer.state`` from now on."""
        if "step" in self.numbers:
            self.numbers["step"][positions] += 1
        if not self.flat and not self.numbers and self.master is None:
            return
        for position in positions:
            if not self.has_state(position):
                self._optimizer.state[self.group.params[position]] = self.views(position)

    def _changing(self) -> list[Tensor]:
        """What an update changes besides the weights."""
        masters = [] if self.master is None else [self.master]
        return [*masters, *self.flat.values(), *self.numbers.values()]

    def copied(self, memory: Any = None) -> tuple[list[Tensor], list[bool]]:
        """Copies of all that an update changes besides the weights, in the ``memory`` of earlier ones if given."""
        tensors = self._changing()
        kept = [torch.empty_like(tensor) for tensor in tensors] if memory is None else memory[0]
        for copy, tensor in zip(kept, tensors, strict=True):
            copy.copy_(tensor)
        return kept, [self.has_state(position) for position in range(len(self.group.params))]

    def bring_back(self, kept: tuple[list[Tensor], list[bool]]) -> None:
        """Take over what :meth:`copied` has copied."""
        for tensor, copy in zip(self._changing(), kept[0], strict=True):
            tensor.copy_(copy)
        for param, had in zip(self.group.params, kept[1], strict=True):
            if not had:
                self._optimizer.state.pop(param, None)

    def refresh_masters(self) -> None:
        """Follow weights that the user changed in place since the last update, for example by ``load_state_dict``.

        Only elements whose master no longer rounds to the weight are replaced, so nothing is lost where nothing
        changed. Changes through ``param.data`` are not seen.
        """
        if self.master is None:
            return
        versions = self._param_versions()
        if versions != self._versions:
            weight = self.group.weight
            changed = self.master.to(weight.dtype) != weight
            self.master.copy_(torch.where(changed, weight.float(), self.master))
            self._versions = versions

    def _param_versions(self) -> list[int]:
        return [param._version for param in self.group.params]


def check_state_value(key: str, name: str, value: Any) -> None:
    """Make sure that one entry of a parameter's state is something to compute with.

    Raises:
        ValueError: it is neither a tensor nor a number; a moment that is no floating-point or complex tensor; a count
            of steps that is no number of at least 0.
    """
    if isinstance(value, Tensor) and value.dim():
        fine, wanted = value.is_floating_point() or value.is_complex(), "floating-point numbers"
    else:
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        fine, wanted = type(number) in (int, float, complex), "a number"
        if fine and key == "step":
            fine, wanted = type(number) is not complex and 0 <= number < 2**53, "a count of steps"
    if not fine:
        said = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"{value!r:.40}"
        raise ValueError(f"optimizer state {key!r} of {name!r} is {said}, not {wanted}")
