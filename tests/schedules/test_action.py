from __future__ import annotations

import pytest

from paci_rt.action import Action, Op, dependencies


@pytest.mark.parametrize("op", list(Op))
def test_every_action_parses_back(op: Op) -> None:
    for stage, index in ((0, 0), (7, 31), (12, 10_000)):
        action = Action(stage, op, index)
        assert Action.parse(str(action)) == action


@pytest.mark.parametrize("text", ["", "F0", "2F", "2X0", "2F-1", "2f0", "2F0x", "SEND_F"])
def test_what_is_no_action_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is no action"):
        Action.parse(text)


def test_dependencies_are_those_of_the_mathematics() -> None:
    def needs(text: str) -> set[str]:
        return {str(action) for action in dependencies(Action.parse(text), num_stages=3, accumulation=2)}

    assert needs("0F4") == set()
    assert needs("1F4") == {"0F4"}
    assert needs("2B4") == {"2F4"}
    assert needs("1B4") == {"1F4", "2B4"}
    assert needs("1I4") == {"1F4", "2I4"}
    assert needs("1W4") == {"1I4"}
    assert needs("0U3") == {"0B6", "0B7"}
