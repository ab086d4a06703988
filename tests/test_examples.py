from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.deadlines import deadline

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("quickstart.py", "counted by stage: {0: {0: 303, 1: 897}"),
        ("swap_from_torch.py", "equal torch's bit for bit: True"),
    ],
)
@pytest.mark.slow
def test_examples_run_and_print_what_they_promise(script: str, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script)], capture_output=True, text=True, timeout=deadline(120)
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


@pytest.mark.slow
def test_a_hugging_face_model_goes_in_and_out(tmp_path: Path) -> None:
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install paci-rt[test]"
    )
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    given, made = tmp_path / "given", tmp_path / "made"
    transformers.LlamaForCausalLM(config).save_pretrained(given)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "huggingface.py"), str(given), str(made)],
        capture_output=True, text=True, timeout=deadline(120),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    _, told = transformers.AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
