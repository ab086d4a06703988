"""``paci-rt export``: a checkpoint as a folder that transformers loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from paci_rt.cli import outputs

USAGE = "paci-rt export CHECKPOINT --to DIR [options]"
DESCRIPTION = """\
Write the model of a checkpoint as safetensors, with a config.json, so that from_pretrained(DIR) of transformers loads
it: GPT2LMHeadModel, LlamaForCausalLM or ModernBertForMaskedLM. The optimizer's state is left out.
"""
JSON_HELP = "write the result: checkpoint model steps folder class parameters params_sha256"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``paci-rt export``."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of the checkpoint, or an index in it")
    parser.add_argument("--to", metavar="DIR", required=True, help="a new folder")


def run(args: argparse.Namespace) -> int:
    """``paci-rt export``."""
    import paci_rt
    from paci_rt.train.export import check_empty, config_of, export
    from paci_rt.train.saved import load_model

    outputs.check_file("--json", args.json)
    check_empty(Path(args.to))
    outputs.check_folder("--to", args.to)
    model = load_model(args.checkpoint)
    folder = export(model, args.to)
    name = config_of(model.shape, model.dtype)["architectures"][0]
    count = sum(parameter.numel() for parameter in model.module.parameters())
    digest = paci_rt.params_sha256(model.module.named_parameters())
    found = {"checkpoint": model.path, "model": model.shape.name, "steps": model.steps, "folder": str(folder)}
    outputs.write_json(args.json, {**found, "class": name, "parameters": count, "params_sha256": digest})
    print(f"""{folder} has {model.shape.name} after {model.steps} steps, {count:,} parameters:
  transformers.{name}.from_pretrained("{folder}")""")
    return 0
