"""Costs of stages, and simulated runs of schedules by name."""

from __future__ import annotations

from paci_rt import schedules
from paci_rt.schedules import Shape, StepCosts
from paci_rt.simulate import Costs, Simulation, simulate

UNIT = Costs(forward_s=(1.0,), input_grad_s=(1.0,), weight_grad_s=(1.0,))
PUBLISHED = Costs(forward_s=(18.522,), input_grad_s=(18.086,), weight_grad_s=(9.337,), hop_s=0.601)
UNEVEN = Costs(
    forward_s=(1.0, 2.5, 1.25, 0.5),
    input_grad_s=(1.5, 1.0, 2.0, 1.0),
    weight_grad_s=(0.5, 1.5, 1.0, 0.75),
    update_s=(0.3, 0.1, 0.2, 0.4),
    hop_s=0.2,
    bandwidth_bytes_per_s=8.0,
    message_bytes=(12.0, 4.0, 20.0, 99.0),
    micro_batch_factors=(1.0, 1.3, 0.6),
    noise=0.2,
    seed=5,
)


def run(name: str, stages: int, m: int, costs: Costs = UNIT, **options) -> Simulation:
    of_run = {key: options.pop(key) for key in ("windows", "policy", "lookahead", "keep_events") if key in options}
    family = schedules.get(name)
    if family.takes_costs:
        options["costs"] = StepCosts(costs.forward_s, costs.input_grad_s, costs.weight_grad_s, costs.hop_s)
    return simulate(family, Shape(num_stages=stages, accumulation=m, **options), costs, **of_run)
