"""A Llama of transformers, cut over two processes, trained under PACI, saved, and loaded again by transformers.

    torchrun --nproc-per-node 2 examples/huggingface.py FOLDER OUT

FOLDER is what ``save_pretrained`` wrote: each process reads its own half. OUT is read by ``from_pretrained``.
"""

import sys

import torch
import torch.distributed as dist

import paci_rt

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
stage = paci_rt.PipelineStage(paci_rt.hf.stage(sys.argv[1], rank, size), rank, size)
loss_fn = lambda logits, ids: torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())  # noqa: E731
adamw, losses = paci_rt.AdamW(stage.named_parameters(), lr=1e-3), []
schedule = paci_rt.SchedulePACI(stage, n_microbatches=4, loss_fn=loss_fn, optimizer=adamw)
for step in range(20):
    ids = torch.arange(8 * 32).view(8, 32).add(step).remainder(50)  # your token ids, [sequences, length], on all ranks
    schedule.step(ids, target=ids, losses=losses)
    if rank == size - 1 and step % 5 == 4:
        print(f"step {step + 1:2}  loss {torch.stack(losses).mean():.3f}", flush=True)
paci_rt.hf.save_pretrained(schedule, sys.argv[2])
