"""The timeline in letters."""

from __future__ import annotations

from paci_rt import schedules
from paci_rt.schedules import Shape
from paci_rt.simulate import Costs, simulate
from paci_rt.trace import Event, format_timeline

UNIT = Costs(forward_s=(1e-3,), input_grad_s=(1e-3,), weight_grad_s=(1e-3,))


def drawn(name: str, ranks: int, m: int, costs: Costs = UNIT, chunks: int = 1, width: int = 160) -> list[str]:
    shape = Shape(num_stages=ranks * chunks, accumulation=m, chunks=chunks)
    events = simulate(schedules.get(name), shape, costs, keep_events=True).events
    return format_timeline(events, ranks=ranks, width=width).splitlines()


def test_the_example_of_the_docstring():
    example = (format_timeline.__doc__ or "").split("::\n\n")[1].split("\n\n")[0]
    assert "\n".join("        " + line for line in drawn("1f1b", 3, 4)) == example


def test_an_update_with_a_time_has_a_cell():
    costs = Costs(forward_s=(1e-3,), input_grad_s=(1e-3,), weight_grad_s=(1e-3,), update_s=(2e-3,))
    lines = drawn("zb-h1", 2, 2, costs)
    assert lines[1] == "rank 0  F0 F1 .  I0 W0 I1 W1 U0---"
    assert lines[2] == "rank 1  .  F0 I0 F1 I1 W0 W1 U0---"
    assert "update" not in lines[-1]


def test_chunks_have_letters():
    lines = drawn("interleaved-1f1b", 2, 2, chunks=2)
    assert lines[1].startswith("rank 0  F0a F1a F0b F1b ")
    assert lines[2].startswith("rank 1  .   F0a F1a F0b B0b---- F1b B1b----")
    assert "a b ... first, second ... stage of a rank" in lines[-1]


def test_what_does_not_fit_is_counted():
    whole, cut = drawn("1f1b", 3, 4), drawn("1f1b", 3, 4, width=40)
    assert max(map(len, cut[:4])) <= 40
    columns = (3 + 4 - 1) * 3  # C of 1F1B at unit times
    assert cut[4] == f"... {columns - (40 - 8) // 3} more columns"
    assert all(line.startswith(short) for line, short in zip(whole[:4], cut[:4], strict=True))
    many = drawn("1f1b", 70, 1, width=80)
    assert many[-2].endswith("more columns and 6 more ranks")
    assert len(many) == 1 + 64 + 2


def test_executed_events_are_rounded_to_columns():
    events = [
        Event(0, "0F0", 100.0, 100.011, 0),
        Event(1, "1F0", 100.0115, 100.0215, 0),
        Event(1, "1B0", 100.0216, 100.0421, 0),
        Event(0, "0B0", 100.043, 100.063, 0),
        Event(0, "0U0", 100.063, 100.0635, 0),
    ]
    assert format_timeline(reversed(events)).splitlines() == [
        "1 column = 10 ms",
        "rank 0  F0 .  .  .  B0---|",
        "rank 1  .  F0 B0---",
        ". idle   - still running   | update",
    ]


def test_nothing_to_draw():
    assert format_timeline([]) == "no events"
    assert format_timeline([Event(0, "0F0", 1.0, 1.0, 0)]) == "no action took any time"
