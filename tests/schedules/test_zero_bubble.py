from __future__ import annotations

import itertools
from collections import Counter

import pytest

from paci_rt import schedules
from paci_rt.action import Op, decode
from paci_rt.schedules import FAMILIES, Shape
from paci_rt.schedules.lowering import Lowering
from paci_rt.schedules.validate import validate
from support.clock import longest_rank

GRID = list(itertools.product((1, 2, 3, 4, 5, 8), (1, 2, 3, 4, 7, 8, 16, 24)))


def short(name: str, stage: int, stages: int, accumulation: int, windows: int = 1) -> str:
    stream = decode(schedules.get(name).stream(Shape(num_stages=stages, accumulation=accumulation), stage, windows))
    return " ".join(f"{action.op.value}{action.index}" for action in stream)


def test_orders_written_out_by_hand() -> None:
    last_h1 = "F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 F6 I6 W3 F7 I7 W4 W5 W6 W7 U0"
    last_h2 = "F0 I0 F1 I1 F2 I2 F3 I3 F4 I4 F5 I5 F6 I6 W0 F7 I7 W1 W2 W3 W4 W5 W6 W7 U0"
    assert short("zb-h1", 3, 4, 8) == last_h1
    assert short("zb-h2", 3, 4, 8) == last_h2
    assert short("zb-h1", 0, 3, 4) == "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3 U0"
    assert short("zb-h1", 1, 3, 4) == "F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3 U0"
    assert short("zb-h2", 0, 2, 4) == "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3 U0"
    assert short("zb-h2", 1, 2, 4) == "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3 U0"


def test_fewer_micro_batches_than_stages() -> None:
    assert short("zb-h1", 0, 4, 2) == "F0 F1 I0 W0 I1 W1 U0"
    assert short("zb-h2", 0, 4, 2) == "F0 F1 I0 W0 I1 W1 U0"
    assert short("zb-h1", 3, 4, 2) == "F0 I0 F1 I1 W0 W1 U0"
    assert short("zb-h1", 0, 1, 2, windows=2) == "F0 I0 W0 F1 I1 W1 U0 F2 I2 W2 F3 I3 W3 U1"


@pytest.mark.parametrize("name", ["zb-h1", "zb-h2"])
@pytest.mark.parametrize(("stages", "accumulation"), GRID)
def test_all_work_is_done_once_within_the_bounds(name: str, stages: int, accumulation: int) -> None:
    family, shape = FAMILIES[name], Shape(num_stages=stages, accumulation=accumulation)
    ahead = {"zb-h1": 1, "zb-h2": 2}[name]
    for stage in range(stages):
        held: Counter[Op] = Counter()
        peak = stashes = 0
        for action in decode(family.stream(shape, stage, 1)):
            assert action.op is Op.U or action.index == held[action.op]
            held[action.op] += 1
            peak = max(peak, held[Op.F] - held[Op.I])
            stashes = max(stashes, held[Op.I] - held[Op.W])
        assert held == {Op.F: accumulation, Op.I: accumulation, Op.W: accumulation, Op.U: 1}
        assert peak == min(ahead * (stages - 1 - stage) + 1, accumulation) == family.in_flight_bound(shape, stage)
        assert stashes == min(ahead * stage + 1, accumulation)
    validate(Lowering(family=family, shape=shape), capacity=1)


@pytest.mark.parametrize(("stages", "accumulation", "expected"), [(4, 8, (33, 27, 24)), (8, 24, (93, 79, 72))])
def test_length_at_unit_times(stages: int, accumulation: int, expected: tuple[int, int, int]) -> None:
    shape = Shape(num_stages=stages, accumulation=accumulation)
    assert tuple(longest_rank(FAMILIES[name], shape, (1, 1, 1)) for name in ("1f1b", "zb-h1", "zb-h2")) == expected


@pytest.mark.parametrize(("stages", "accumulation"), [(2, 6), (4, 12), (8, 24)])
@pytest.mark.parametrize("times", [(18.522, 18.086, 9.337), (1.0, 1.0, 0.7), (10.4, 10.2, 7.7)])
def test_bubbles_have_their_closed_forms(stages: int, accumulation: int, times: tuple[float, float, float]) -> None:
    shape, hop, before = Shape(num_stages=stages, accumulation=accumulation), 0.03 * times[0], stages - 1
    forward, input_grad, weight_grad = times
    bubble = {
        "1f1b": before * sum(times) + (2 * before * accumulation / stages + 2 * (stages - 2)) * hop,
        "zb-h1": before * (forward + input_grad - weight_grad) + 4 * before * hop,
        "zb-h2": before * (forward + input_grad - 2 * weight_grad) + 2 * before * hop,
    }
    for name, expected in bubble.items():
        length = longest_rank(FAMILIES[name], shape, times, hop)
        assert length - accumulation * sum(times) == pytest.approx(expected, rel=1e-9), name
