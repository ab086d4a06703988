"""``paci-rt eval``: the loss of a checkpoint over held-back text."""

from __future__ import annotations

import argparse
import math
from typing import Any

from paci_rt.cli import outputs
from paci_rt.cli.options import ConfigOptions, config_options

USAGE = "paci-rt eval RUN [options]"
DESCRIPTION = """\
Evaluate a checkpoint of paci-rt train: the loss of its model over the held-back part of the data. Without options that
is the set that the run itself validated on, and the same number.
"""
JSON_HELP = "write the result: checkpoint model steps data val_loss perplexity sequences tokens params_sha256"
CHANGES = ("data", "batch_size", "accumulation", "seq_len", "eval_batches", "device", "threads")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``paci-rt eval``."""
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run with --out, or an index in it")
    options = ConfigOptions(parser)
    options.group("what to evaluate on; by default what the run has")
    options.add("data", str, "PATH", "as for paci-rt train; its held-back part is read", default=False)
    options.add("eval_batches", int, "N", "how many batches of --batch-size sequences", default=False)
    options.add("batch_size", int, "N", "sequences per batch", default=False)
    options.add("accumulation", int, "A", "parts that a batch is cut into, each one forward", default=False)
    options.add("seq_len", int, "N", "tokens per sequence", default=False)
    options.group("running")
    options.add("device", str, "NAME", "cpu, cuda, cuda:N or auto")
    options.add("threads", int, "N", "compute threads")


def run(args: argparse.Namespace) -> int:
    """``paci-rt eval``."""
    import torch

    import paci_rt
    from paci_rt.report import text
    from paci_rt.train.data import load_corpus
    from paci_rt.train.evaluating import mean_loss
    from paci_rt.train.saved import config_of, load_model

    outputs.check_file("--json", args.json)
    model = load_model(args.run_folder)
    config = config_of(model, config_options(args))
    corpus = load_corpus(config.data, vocab_size=config.shape.data_vocab_size, seq_len=config.seq_len)
    torch.set_num_threads(config.threads)
    digest = paci_rt.params_sha256(model.module.named_parameters())
    module = model.module.to(config.torch_device(0))
    loss, tokens = mean_loss(module, config, corpus)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    sequences = config.eval_batches * config.batch_size
    found: dict[str, Any] = {"checkpoint": model.path, "model": model.shape.name, "steps": model.steps}
    found |= {"data": corpus.name, "val_loss": loss, "perplexity": perplexity, "sequences": sequences, "tokens": tokens}
    found["params_sha256"] = digest
    bad = [name for name in ("val_loss", "perplexity") if not math.isfinite(found[name])]
    outputs.write_json(args.json, found | dict.fromkeys(bad))
    print(f"""{model.shape.name} after {model.steps} steps, on {sequences} held-back sequences of {corpus.name}
  validation loss  {text.loss(loss)} nats per token, perplexity {perplexity:.4g}, over {tokens:,} tokens
  params_sha256    {digest}""")
    return 0
