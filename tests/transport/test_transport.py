from __future__ import annotations

import hashlib
import random
import time
from typing import Any

import pytest
import torch

from paci_rt.errors import ScheduleError, StageError
from paci_rt.schedules.channel import Channel
from paci_rt.transport import LocalTransport, Message, make_transport, wire
from paci_rt.transport.base import check_timeout
from paci_rt.transport.gloo import GlooTransport
from support.messages import check, message
from support.pool import WorkerPool

DOWN, UP = Channel("F", 0, 1), Channel("B", 1, 0)


def exchange(rank: int, group: Any, name: str, count: int, ahead: int, sleeps: bool) -> None:
    """Rank 0 sends, rank 1 answers, with ``ahead`` messages on their way, as in a pipeline."""
    transport = make_transport(name, group=group, num_stages=2)
    assert transport.name == name
    rng = random.Random(rank)
    outgoing, incoming = (DOWN, UP) if rank == 0 else (UP, DOWN)
    transport.open([incoming])
    for at in range(count + ahead):
        if sleeps:
            time.sleep(rng.choice((0.0, 0.0, 0.001, 0.003)))
        if rank == 0 and at < count:
            transport.send(outgoing, at, message(at))
        if rank == 1 and at < count:
            check(transport.recv(incoming, at), message(at))
            transport.send(outgoing, at, message(1000 + at))
        if rank == 0 and at >= ahead:
            check(transport.recv(incoming, at - ahead), message(1000 + at - ahead))
    transport.flush()
    transport.close()


@pytest.mark.parametrize(("ahead", "sleeps"), [(1, False), (3, True)])
@pytest.mark.parametrize("name", ["gloo", "shm"])
def test_random_messages_arrive_as_they_were_sent(workers: WorkerPool, name: str, ahead: int, sleeps: bool) -> None:
    workers.run(exchange, 2, name, 60, ahead, sleeps)


def relay(rank: int, group: Any, name: str, seed: int, count: int, processes: int) -> str:
    """A chain: messages of up to 8 MiB go down and other ones up, between skewed ranks that keep some of what they
    receive; returns a hash of all that arrived."""
    transport = make_transport(name, group=group, num_stages=processes, slots=None if name == "gloo" else 3)
    below, above = Channel("F", rank - 1, rank), Channel("B", rank + 1, rank)
    transport.open([channel for channel in (below, above) if 0 <= channel[1] < processes])
    rng, digest, kept = random.Random(seed * 100 + rank), hashlib.sha256(), []

    def big(at: int, sender: int) -> Message:
        generator = torch.Generator().manual_seed(seed * 10_000 + 10 * at + sender)
        size = int(torch.randint(0, 4, (1,), generator=generator))
        numel = (0, 700, 300_000, 2 << 20)[size]
        return Message((torch.randn(numel, generator=generator), None), (True, False))

    def take(channel: Channel, at: int) -> None:
        tensor = transport.recv(channel, at).tensors[0]
        assert tensor is not None
        kept.append(tensor)
        if rng.random() < 0.6:  # others die now and then, in any order
            kept.pop(rng.randrange(len(kept)))
        digest.update(tensor.numpy().tobytes())

    for at in range(count):
        if rng.random() < 0.3:
            time.sleep(rng.random() * 0.004 * (1 + rank))
        if rank > 0:
            take(below, at)
        if rank + 1 < processes:
            transport.send(Channel("F", rank, rank + 1), at, big(at, rank))
        if rank > 0:
            transport.send(Channel("B", rank, rank - 1), at, big(at, rank))
        if rank + 1 < processes and at >= 2:
            take(above, at - 2)
    for at in range(max(0, count - 2), count):
        if rank + 1 < processes:
            take(above, at)
    transport.flush()
    transport.close()
    return digest.hexdigest()


@pytest.mark.parametrize("seed", [1, 2])
def test_all_transports_deliver_identical_bytes(workers: WorkerPool, seed: int) -> None:
    over = {name: workers.run(relay, 4, name, seed, 12, 4) for name in ("gloo", "shm")}
    assert over["gloo"] == over["shm"] and len(set(over["shm"])) == 4


def lifetimes(rank: int, group: Any) -> list[int]:
    """How many sent messages are held: right after each send, and once the other side has answered."""
    transport = GlooTransport(group, num_stages=2)
    if rank == 1:
        transport.open([DOWN])
        for at in range(2):
            transport.recv(DOWN, at)
            transport.send(UP, at, Message((torch.zeros(1),), (False,)))
        transport.flush()
        return []
    transport.open([UP])
    held = []
    for at in range(2):
        transport.send(DOWN, at, Message((torch.zeros(100_000),), (True,)))
        held.append(transport.held_messages)
        transport.recv(UP, at)
        held.append(transport.held_messages)
    return held


def test_sent_tensors_live_until_they_have_arrived_and_no_longer(workers: WorkerPool) -> None:
    assert workers.run(lifetimes, 2)[0] == [1, 0, 1, 0]


def wrong_index(rank: int, group: Any) -> str:
    transport = GlooTransport(group, num_stages=2)
    if rank == 0:
        transport.send(DOWN, 7, Message((torch.zeros(1),), (False,)))
        transport.flush()
        return ""
    transport.open([DOWN])
    try:
        transport.recv(DOWN, 8)
    except ScheduleError as error:
        return str(error)
    return "no error"


def test_a_message_out_of_order_is_named(workers: WorkerPool) -> None:
    assert "message 7 (sequence 0) arrived where message 8" in workers.run(wrong_index, 2)[1]
    local = LocalTransport()
    local.send(DOWN, 7, Message((), ()))
    with pytest.raises(ScheduleError, match="message 7 arrived where 8"):
        local.recv(DOWN, 8)


def wrong_size(rank: int, group: Any) -> str:
    try:
        GlooTransport(group, num_stages=3)
    except ValueError as error:
        return str(error)
    return "no error"


def test_stages_and_processes_must_match(workers: WorkerPool) -> None:
    assert workers.run(wrong_size, 2)[0].startswith("3 stages on a process group of 2")


def untransportable(rank: int, group: Any) -> str:
    transport = GlooTransport(group, num_stages=2)
    if rank == 1:
        return ""
    try:
        transport.send(DOWN, 0, Message((torch.zeros(1, dtype=torch.bits8),), (False,)))
    except StageError as error:
        return str(error)
    return "no error"


def test_a_mistake_of_ours_is_not_taken_for_a_lost_peer(workers: WorkerPool) -> None:
    assert "torch.bits8" in workers.run(untransportable, 2)[0]


def test_without_torch_distributed_the_remedy_is_named() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        GlooTransport(None, num_stages=2)


def test_headers_read_back() -> None:
    for seed in range(50):
        metas = wire.describe(message(seed))
        packed = wire.pack_header(seed, 2 * seed, 3 * seed, metas, inline=seed % 2 == 0)
        assert wire.unpack_header(packed) == (seed, 2 * seed, 3 * seed, metas, seed % 2 == 0)


def test_what_no_header_can_describe_is_named() -> None:
    many = Message(tuple(torch.zeros(1, 1, 1) for _ in range(30)), (False,) * 30)
    with pytest.raises(StageError, match="30 tensors"):
        wire.pack_header(0, 0, 0, wire.describe(many), inline=False)
    with pytest.raises(StageError, match="bits8"):
        wire.describe(Message((torch.zeros(1, dtype=torch.bits8),), (False,)))


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf"), 1e10, 10**400, "5", True, None])
def test_a_deadline_is_a_number_of_seconds(seconds: Any) -> None:
    with pytest.raises(ValueError, match=r"transfer_timeout_s is .*: give a number of seconds above 0"):
        check_timeout(seconds, "transfer_timeout_s")
