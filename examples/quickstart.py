"""Four stages of a small network under PACI, in one process, in the fifteen lines that a notebook needs."""

import torch
from torch import nn

import paci_rt

teacher, stages = nn.Linear(64, 10), [nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3)]
stages.append(nn.Linear(64, 10))
pipeline = paci_rt.LocalPipeline(  # schedule="paci" unless told otherwise
    stages, n_microbatches=4, loss_fn=nn.CrossEntropyLoss(), optimizer=lambda p: paci_rt.AdamW(p, lr=3e-3)
)
for step in range(300):
    x, losses = torch.randn(64, 64), []
    pipeline.step(x, target=teacher(x).argmax(1), losses=losses)
    if step % 50 == 49:
        print(f"step {step + 1:3}  loss {torch.stack(losses).mean():.3f}")
pipeline.drain()
print("updates between forward and backward, counted by stage:", pipeline.stats()["drift"])
