"""What a profile says about a model, and the JSON file that it lives in. Measuring is in
:mod:`paci_rt.profiling.blocks`.

::

    {
      "format": "paci-rt profile", "version": 1,
      "profiled": {"model": "gpt-mini", "dtype": "fp32", "rows": 2, "seq_len": 128, "threads": 1, "machine": {...}},
      "input_bytes": 2048,                          # a micro-batch as the first stage takes it
      "update_s_per_byte": 2.3e-10,                 # one AdamW update, by bytes of parameters
      "state_bytes_per_parameter_byte": 3.0,        # masters, moments and one accumulator, by bytes of parameters
      "has_masters": false,                         # whether the optimizer keeps fp32 weights beside the parameters
      "hop_s": 0.0, "bandwidth_bytes_per_s": null,  # a message between stages; null: no limit
      "blocks": [
        {"name": "embedding", "role": "first", "measured_as": "embedding",
         "forward_s": ..., "input_grad_s": ..., "weight_grad_s": ...,             # of one micro-batch
         "parameter_bytes": ..., "activation_bytes": ..., "stash_bytes": ..., "boundary_bytes": ...},
        ...
      ]
    }

A partition counts blocks with the role ``middle``; those before them (``first``) belong to the first stage and those
behind (``last``) to the last. Blocks that are alike are measured once: ``measured_as`` is the one whose numbers a
block has. ``activation_bytes`` is what a micro-batch keeps between forward and backward. ``stash_bytes`` is what of
that, and of its gradients, stays for a weight gradient that is put off. ``boundary_bytes`` is the output that is sent.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from paci_rt.planner.json_reader import JsonReader, is_number
from paci_rt.simulate.costs import LEAST_BANDWIDTH
from paci_rt.wording import shown

FORMAT, VERSION = "paci-rt profile", 1
MOST_BLOCKS = 4096
ROLES = ("first", "middle", "last")
_SECONDS = ("forward_s", "input_grad_s", "weight_grad_s")
BYTES = ("parameter_bytes", "activation_bytes", "stash_bytes", "boundary_bytes")


@dataclass(frozen=True, kw_only=True)
class BlockProfile:
    """One block and one micro-batch of it; see the top of this file for the fields.

    Attributes:
        name: of the block.
        role: ``first``, ``middle`` or ``last``.
        forward_s, input_grad_s, weight_grad_s: seconds of one micro-batch.
        parameter_bytes: of the block.
        activation_bytes: what one micro-batch keeps between forward and backward.
        stash_bytes: what of that stays for a weight gradient that is put off.
        boundary_bytes: output of one micro-batch.
        measured_as: the block that was measured in place of this one.

    Example:
        >>> from paci_rt.planner import BlockProfile
        >>> block = BlockProfile(
        ...     name="block", role="middle", forward_s=0.010, input_grad_s=0.010, weight_grad_s=0.005,
        ...     parameter_bytes=4096, activation_bytes=2048, stash_bytes=1024, boundary_bytes=512,
        ... )
        >>> block.compute_s
        0.025
    """

    name: str
    role: str
    forward_s: float
    input_grad_s: float
    weight_grad_s: float
    parameter_bytes: int
    activation_bytes: int
    stash_bytes: int
    boundary_bytes: int
    measured_as: str = ""

    @property
    def compute_s(self) -> float:
        """Forward and whole backward of one micro-batch, in seconds."""
        return self.forward_s + self.input_grad_s + self.weight_grad_s


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A model as the planner sees it: blocks in order, and what they run on.

    Attributes:
        blocks: roles in the order first, middle, last, with at least one middle block.
        input_bytes: a micro-batch as the first stage takes it.
        update_s_per_byte: seconds of one optimizer update by bytes of parameters.
        state_bytes_per_parameter_byte: fp32 masters, optimizer state and one accumulator, by bytes of parameters.
        has_masters: whether there are fp32 masters.
        hop_s: seconds until the first byte of a message is there.
        bandwidth_bytes_per_s: and how fast the others follow.
        profiled: model, dtype, rows, seq_len, threads, machine.

    Raises:
        ValueError: roles in another order, or no middle block.

    Example:
        >>> from paci_rt.planner import BlockProfile, Profile
        >>> block = BlockProfile(
        ...     name="block", role="middle", forward_s=0.010, input_grad_s=0.010, weight_grad_s=0.005,
        ...     parameter_bytes=4096, activation_bytes=2048, stash_bytes=1024, boundary_bytes=512,
        ... )
        >>> profile = Profile(blocks=(block,) * 6, hop_s=1e-4)
        >>> profile.middle, profile.bounds([2, 4])
        (6, [(0, 2), (2, 6)])
    """

    blocks: tuple[BlockProfile, ...]
    input_bytes: int = 0
    update_s_per_byte: float = 0.0
    state_bytes_per_parameter_byte: float = 3.0
    has_masters: bool = False
    hop_s: float = 0.0
    bandwidth_bytes_per_s: float = math.inf
    profiled: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ranks = [ROLES.index(block.role) for block in self.blocks]
        if ranks != sorted(ranks) or ROLES.index("middle") not in ranks:
            raise ValueError(
                f"the roles of the blocks are {', '.join(block.role for block in self.blocks) or 'missing'}: list "
                "blocks with role first, then at least one with role middle, then those with role last"
            )

    @property
    def middle(self) -> int:
        """Blocks that a partition counts."""
        return sum(block.role == "middle" for block in self.blocks)

    def bounds(self, partition: Sequence[int]) -> list[tuple[int, int]]:
        """Range of ``blocks`` that each stage of ``partition`` holds.

        Raises:
            ValueError: a stage without a block, or a partition that does not hold all of them.
        """
        sizes = list(partition)
        if not sizes or min(sizes) < 1 or sum(sizes) != self.middle:
            raise ValueError(
                f"partition {','.join(map(str, sizes)) or 'of no stages'} must give every stage at least one block "
                f"and add up to {self.middle}"
            )
        starts = [sum(block.role == "first" for block in self.blocks)]
        for size in sizes:
            starts.append(starts[-1] + size)
        starts[0], starts[-1] = 0, len(self.blocks)
        return list(itertools.pairwise(starts))

    def to_json(self) -> dict[str, Any]:
        """The profile as its file has it."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "profiled": self.profiled,
            "input_bytes": self.input_bytes,
            "update_s_per_byte": self.update_s_per_byte,
            "state_bytes_per_parameter_byte": self.state_bytes_per_parameter_byte,
            "has_masters": self.has_masters,
            "hop_s": self.hop_s,
            "bandwidth_bytes_per_s": self.bandwidth_bytes_per_s if math.isfinite(self.bandwidth_bytes_per_s) else None,
            "blocks": [asdict(block) for block in self.blocks],
        }


def load_profile(path: str | Path) -> Profile:
    """Read a profile from its file.

    Args:
        path: of a file that ``paci-rt plan --profile`` wrote.

    Raises:
        ValueError: the file cannot be read or is no profile; one line that names the file, the key and what was found.

    Example:
        >>> import json, tempfile
        >>> from paci_rt.planner import BlockProfile, Profile, load_profile
        >>> block = BlockProfile(
        ...     name="block", role="middle", forward_s=0.010, input_grad_s=0.010, weight_grad_s=0.005,
        ...     parameter_bytes=4096, activation_bytes=2048, stash_bytes=1024, boundary_bytes=512,
        ... )
        >>> with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        ...     json.dump(Profile(blocks=(block, block)).to_json(), file)
        ...     file.flush()
        ...     load_profile(file.name).middle
        2
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"profile {path} cannot be read ({error.strerror}): name a file of paci-rt plan") from None
    except (ValueError, RecursionError) as error:  # no text, no JSON, or numbers and nesting beyond any sense
        raise ValueError(
            f"profile {path} is not JSON ({str(error)[:200]}): delete it, and paci-rt plan measures again"
        ) from None
    try:
        return parse_profile(data)
    except ValueError as error:
        raise ValueError(f"profile {path}: {error}") from None


def parse_profile(data: Any) -> Profile:
    """The profile that a decoded file holds.

    Args:
        data: what :meth:`Profile.to_json` gave.

    Raises:
        ValueError: the message names the key and what was found there.

    Example:
        >>> from paci_rt.planner import parse_profile
        >>> parse_profile({"format": "paci-rt profile", "version": 1})
        Traceback (most recent call last):
        ValueError: blocks is missing: give a list with one entry per block
    """
    reader = JsonReader(data, "")
    reader.check_header(FORMAT, VERSION, wrote="paci-rt plan --profile", again="measure again")
    blocks = reader.objects("blocks", "block", MOST_BLOCKS)
    return Profile(
        blocks=tuple(map(_parse_block, blocks)),
        input_bytes=reader.number("input_bytes", whole=True),
        update_s_per_byte=reader.number("update_s_per_byte"),
        state_bytes_per_parameter_byte=reader.number("state_bytes_per_parameter_byte"),
        has_masters=reader.get("has_masters", "true or false", lambda value: isinstance(value, bool)),
        hop_s=reader.number("hop_s"),
        bandwidth_bytes_per_s=_bandwidth(reader),
        profiled=reader.get("profiled", "an object", lambda value: isinstance(value, dict)),
    )


def _parse_block(reader: JsonReader) -> BlockProfile:
    known = {one.name for one in fields(BlockProfile)}
    unknown = sorted(set(reader.data) - known)
    if unknown:
        raise ValueError(
            f"{reader.where} has {shown(unknown[0], 40)}, which is unknown: a block has {', '.join(sorted(known))}"
        )
    name = reader.get("name", "a word", lambda value: isinstance(value, str) and value)
    numbers = {key: reader.number(key) for key in _SECONDS} | {key: reader.number(key, whole=True) for key in BYTES}
    role = reader.get("role", "one of " + ", ".join(ROLES), lambda value: value in ROLES)
    return BlockProfile(name=name, role=role, measured_as=str(reader.data.get("measured_as", "")), **numbers)


def _bandwidth(reader: JsonReader) -> float:
    what = f"a number of at least {LEAST_BANDWIDTH:g}, or null for no limit"
    value = reader.get(
        "bandwidth_bytes_per_s",
        what,
        lambda value: value is None or (is_number(value) and value >= LEAST_BANDWIDTH),
    )
    return math.inf if value is None else float(value)
