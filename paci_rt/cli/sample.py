"""``paci-rt sample``: text from a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from paci_rt.cli import outputs
from paci_rt.cli.options import ConfigOptions, config_options, number

USAGE = "paci-rt sample CHECKPOINT --prompt TEXT [options]"
DESCRIPTION = """\
Let the model of a checkpoint go on with a text. Equal seeds give equal texts. Only decoders do: gpt2 and llama.
"""
JSON_HELP = "write the result: checkpoint model steps prompt text tokens[] seed"
MOST_TOKENS = 1 << 20


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``paci-rt sample``."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of the checkpoint, or an index in it")
    group = parser.add_argument_group("text")
    group.add_argument("--prompt", metavar="TEXT", required=True, help="what the text begins with")
    group.add_argument("--tokens", type=int, metavar="N", default=200, help="tokens to add (default: 200)")
    group.add_argument(
        "--temperature",
        type=number,
        metavar="X",
        default=0.8,
        help="below 1 likelier tokens are taken more often, 0 takes the likeliest each time (default: 0.8)",
    )
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens alone (default: all)")
    group.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="what made the tokens: bytes, a tokenizer.json, a folder with one, tiktoken:NAME or hf:NAME "
        "(default: that of the run's data, bytes for text)",
    )
    options = ConfigOptions(parser)
    options.group("running")
    options.add("seed", int, "N", "seed of the draws")
    options.add("device", str, "NAME", "cpu, cuda, cuda:N or auto")
    options.add("threads", int, "N", "compute threads")


def run(args: argparse.Namespace) -> int:
    """``paci-rt sample``."""
    import torch

    from paci_rt.data.tokenizers import find_tokenizer
    from paci_rt.train.sampling import generate
    from paci_rt.train.saved import config_of, load_model
    from paci_rt.train.text import tokenizer_of_run

    _check(args)
    outputs.check_file("--json", args.json)
    model = load_model(args.checkpoint)
    if not model.shape.generates:
        raise ValueError(
            f"{args.checkpoint} has a model of the family {model.shape.family}, which fills in masked tokens and "
            "cannot go on with a text: give a checkpoint of gpt2 or llama"
        )
    config = config_of(model, config_options(args))
    if args.tokenizer is None:
        tokenizer = tokenizer_of_run(model.shape.vocab_size, config.data)
    else:
        tokenizer = find_tokenizer(args.tokenizer)
    prompt = list(tokenizer.encode([args.prompt])[0])
    if not prompt:
        raise ValueError(f"--prompt {args.prompt!r} has no tokens: give at least one character")
    if max(prompt) >= model.shape.vocab_size:
        raise ValueError(
            f"--tokenizer {tokenizer.name} makes token {max(prompt)} of the prompt, and the model's vocabulary has "
            f"{model.shape.vocab_size}: give the tokenizer that made the data"
        )
    torch.set_num_threads(config.threads)
    device = config.torch_device(0)
    drawn = generate(
        model.module.to(device),
        model.shape,
        torch.tensor(prompt, device=device),
        count=args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=config.seed,
    ).tolist()
    text = _decoded(tokenizer.decode, [*prompt, *drawn], tokenizer.name)
    found: dict[str, Any] = {"checkpoint": model.path, "model": model.shape.name, "steps": model.steps}
    found |= {"prompt": args.prompt, "text": text, "tokens": drawn, "seed": config.seed}
    outputs.write_json(args.json, found)
    print(text)
    return 0


def _decoded(decode: Any, tokens: list[int], name: str) -> str:
    try:
        return str(decode(tokens))
    except Exception as error:  # libraries raise errors of many kinds
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"--tokenizer {name} cannot read the model's tokens ({said[:200]}): give the one that made the data"
        ) from None


def _check(args: argparse.Namespace) -> None:
    if not args.prompt:
        raise ValueError("--prompt is empty: give at least one character")
    if any("\ud800" <= one <= "\udfff" for one in args.prompt):
        raise ValueError(f"--prompt {args.prompt!r} is no Unicode text: give it as UTF-8")
    if not 1 <= args.tokens <= MOST_TOKENS:
        raise ValueError(f"--tokens is {args.tokens}: give an integer from 1 to {MOST_TOKENS}")
    if not 0 <= args.temperature <= 1e6 or 0 < args.temperature < 1e-6:
        raise ValueError(f"--temperature is {args.temperature}: give 0, or a number from 1e-6 to 1e6")
    if args.top_k is not None and args.top_k < 1:
        raise ValueError(f"--top-k is {args.top_k}: give an integer of at least 1")
