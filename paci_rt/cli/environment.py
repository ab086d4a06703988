"""What the environment of a command says of other processes, and whether it can be meant."""

from __future__ import annotations

import os

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each of the processes that it starts."""
_STARTS_RUN = ("RANK", "WORLD_SIZE")


def speaks() -> bool:
    """Whether this process prints errors for all: not the ranks of torchrun behind the first."""
    return (
        not all(name in os.environ for name in TORCHRUN)
        or not os.environ["RANK"].isdigit()
        or not int(os.environ["RANK"])
    )


def check_torchrun_variables() -> None:
    """Raise ValueError for variables of torchrun that are left over from something else, or were set in part.

    A run would wait for processes that nobody starts.
    """
    there = [name for name in TORCHRUN if name in os.environ]
    if not any(name in there for name in _STARTS_RUN):
        return
    remedy = f"unset {' and '.join(name for name in _STARTS_RUN if name in there)} to train without torchrun"
    missing = [name for name in TORCHRUN if name not in there]
    if missing:
        raise ValueError(
            f"{there[0]}={os.environ[there[0]]!r} is in the environment without {' and '.join(missing)}: torchrun sets "
            f"all of them; {remedy}"
        )
    numbers = {}
    for name, least, most in (("WORLD_SIZE", 1, 1 << 17), ("RANK", 0, 1 << 17), ("MASTER_PORT", 0, 65535)):
        text = os.environ[name]
        if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
            raise ValueError(
                f"{name}={text[:80]!r} is in the environment, which is no number from {least} to {most}; {remedy}"
            )
        numbers[name] = int(text)
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise ValueError(
            f"RANK={numbers['RANK']} and WORLD_SIZE={numbers['WORLD_SIZE']} are in the environment, and ranks "
            f"end below WORLD_SIZE; {remedy}"
        )
    if not os.environ["MASTER_ADDR"].strip() or not os.environ["MASTER_ADDR"].isprintable():
        raise ValueError(
            f"MASTER_ADDR={os.environ['MASTER_ADDR'][:80]!r} is in the environment, which is no host: {remedy}"
        )


def started_by_hand() -> str:
    """A line on the processes that this one will wait for, where no known launcher started it; else empty."""
    known = ("TORCHELASTIC_RUN_ID", "GROUP_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
    if not all(name in os.environ for name in TORCHRUN) or any(name in os.environ for name in known):
        return ""
    rank, size, host, port = (os.environ[name] for name in TORCHRUN)
    return (
        f"RANK={rank} and WORLD_SIZE={size} are in the environment: waiting for {size} processes at {host}:{port}; "
        "unset both to train without torchrun"
    )
