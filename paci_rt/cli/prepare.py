"""``paci-rt prepare``: text to files of tokens."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paci_rt.cli import outputs
from paci_rt.cli.options import number
from paci_rt.data import prepare as work
from paci_rt.data.documents import find_source
from paci_rt.data.shards import MANIFEST
from paci_rt.data.tokenizers import HELP, find_tokenizer
from paci_rt.errors import DataError, RunStopped

DESCRIPTION = """\
Tokenize text into a folder of files that train --data FOLDER maps into memory, with a manifest of what must be in
them. Text is: text files, JSON lines (.jsonl, .json, also .gz), parquet, folders of these, a folder of datasets'
save_to_disk, or hf:NAME, a data set of Hugging Face's hub. nanoGPT's and llm.c's .bin files need no preparation.
"""

JSON_HELP = "write the manifest: dtype tokenizer documents largest_token train[] val[] (each file tokens sha256)"
TOLD_EVERY_S = 5.0


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``paci-rt prepare``."""
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="PATH", help="files and folders with text, or hf:NAME[:CONFIG]"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for the tokens")
    parser.add_argument("--tokenizer", default="bytes", metavar="NAME", help=f"{HELP} (default: bytes)")
    parser.add_argument(
        "--end-token", metavar="TEXT", help="the token behind every document, or none (default: the tokenizer's own)"
    )
    parser.add_argument(
        "--text-key", default="text", metavar="NAME", help="the key or column that has the text (default: text)"
    )
    parser.add_argument(
        "--val-share",
        type=number,
        default=work.VAL_SHARE,
        metavar="X",
        help="share of the documents that is held back, where no file or split is for validation (default: "
        f"{work.VAL_SHARE})",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=work.SHARD_TOKENS,
        metavar="N",
        help=f"tokens per file (default: {work.SHARD_TOKENS})",
    )


def run(args: argparse.Namespace) -> int:
    """``paci-rt prepare``."""
    outputs.check_file("--json", args.json)
    for flag, value in (("--out", args.out), *(("--data", one) for one in args.data)):
        if not value or "\0" in value:
            raise DataError(f"{flag} is {value!r}: a name has characters, and no zero bytes")
    tokenizer = find_tokenizer(args.tokenizer, args.end_token)
    source = find_source(args.data, args.text_key)
    for name in source.tests:
        print(f"paci-rt: {name} is left out: its name says that it is a test", file=sys.stderr)
    if source.others:
        more = f" and {len(source.others) - 1} more" if len(source.others) > 1 else ""
        print(f"paci-rt: {source.others[0]}{more} left out: there are tables beside it", file=sys.stderr)
    options = {"val_share": args.val_share, "shard_tokens": args.shard_tokens, "told": _Told()}
    with _ended_in_order():
        manifest = work.prepare(source, Path(args.out), tokenizer, **options)
    if args.json is not None:
        outputs.ready(args.json).write_text(manifest.to_json(), encoding="utf-8")
    counts = {part: sum(shard.tokens for shard in getattr(manifest, part)) for part in ("train", "val")}
    files = len(manifest.train) + len(manifest.val)
    print(
        f"{args.out}: {manifest.documents:,} documents, {counts['train']:,} tokens to train on and {counts['val']:,} "
        f"for validation, {manifest.dtype} in {files} files and {MANIFEST}\n"
        f"tokenizer {tokenizer.name}, {tokenizer.vocab_size:,} tokens; train with --data {args.out}"
    )
    return 0


class _Told:
    """Progress, on standard error every few seconds."""

    def __init__(self) -> None:
        self._at_s = time.monotonic()

    def __call__(self, documents: int, tokens: int) -> None:
        if time.monotonic() - self._at_s >= TOLD_EVERY_S:
            self._at_s = time.monotonic()
            print(f"{documents:,} documents, {tokens:,} tokens", file=sys.stderr, flush=True)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM within it is an exception, so that what was begun is removed."""

    def stop(*_: Any) -> None:
        raise RunStopped("stopped by SIGTERM; nothing was written", 0)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
