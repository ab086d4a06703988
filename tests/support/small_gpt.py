"""Models of a few thousand parameters that train in a moment."""

from __future__ import annotations

from paci_rt.train.gpt import GPTConfig

SMALL = {
    f"small{'-tied' if tied else ''}": GPTConfig(
        name=f"small{'-tied' if tied else ''}", vocab_size=256, context=16, layers=4, heads=2, width=16, tied=tied
    )
    for tied in (False, True)
}
