"""Two hosts with torchrun and under Slurm: the local run's bits, and both sides end when the link is cut."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from paci_rt import checkpoint, cli
from support.deadlines import deadline
from support.hosts import ROOT, Hosts, Refused

pytestmark = pytest.mark.slow
RUN = ["--stages", "2", "--batch-size", "2", "--accumulation", "2", "--seq-len", "16", "--eval-batches", "1"]
PORT = "29544"
TORCHRUN = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "host-a"]
TIMEOUT_S = 5.0


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 200)
    try:
        made = Hosts(tmp_path)
    except Refused as reason:
        pytest.skip(f"no hosts can be made of network namespaces: {reason}")
    try:
        yield made
    finally:
        made.close()


def start(hosts: Hosts, *program: str, **environment: str) -> list[subprocess.Popen[str]]:
    """``program``, what torchrun runs, on both hosts."""
    where = [*TORCHRUN, "--master-port", PORT]
    return [hosts.start(at, [sys.executable, *where, "--node-rank", str(at), *program], **environment) for at in (0, 1)]


def train(*options: str) -> list[str]:
    return ["-m", "paci_rt", "train", *RUN, "--data", "text.txt", *options]


def locally(tmp_path: Path, *options: str) -> dict[str, object]:
    """The result of a run in this process."""
    argv = ["train", *RUN, "--data", str(tmp_path / "text.txt"), "--transport", "local"]
    assert cli.main([*argv, "--json", str(tmp_path / "local.json"), *options]) == 0
    result: dict[str, object] = json.loads((tmp_path / "local.json").read_text())
    return result


def ended(processes: list[subprocess.Popen[str]], within_s: float) -> list[tuple[str, str]]:
    """Output and errors of both, which end by themselves in time."""
    until = time.monotonic() + within_s
    return [process.communicate(timeout=max(0.1, until - time.monotonic())) for process in processes]


def test_two_hosts_give_the_bits_of_one(hosts: Hosts, tmp_path: Path) -> None:
    options = ["--steps", "4", "--eval-interval", "2"]
    both = start(hosts, *train(*options, "--json", "two.json", "--save-trace", "trace.json", "--out", "saved"))
    (out, err), (other_out, other_err) = ended(both, deadline(150))
    assert [process.returncode for process in both] == [0, 0], err + other_err
    # Progress and result are on the first host, although the loss is known on the other one.
    assert "step 4/4" in err and "params_sha256" in out
    assert "step" not in other_err and other_out == ""
    result = json.loads((tmp_path / "two.json").read_text())
    assert result["transport"] == "gloo"
    assert result["params_sha256"] == locally(tmp_path, *options)["params_sha256"]
    assert checkpoint.verify(tmp_path / "saved")["windows"] == 4
    tracks = {one["tid"] for one in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert tracks == {0, 1}


def test_hosts_with_disks_of_their_own(hosts: Hosts, tmp_path: Path) -> None:
    options = ["--eval-interval", "0", "--lr-steps", "4", "--out", "own/a"]
    both = start(hosts, *train("--steps", "1000000", *options))
    (_, err), (_, other_err) = ended(both, deadline(150))
    assert all(process.returncode not in (0, None) for process in both)
    said = "rank 0 on host host-a does not see what rank 1 on host host-b writes to own/a: give a folder"
    assert said in err + other_err
    assert "step 1/" not in err
    both = start(hosts, *train("--steps", "2", *options, "--gather-checkpoints"))
    (_, err), (_, other_err) = ended(both, deadline(150))
    assert [process.returncode for process in both] == [0, 0], err + other_err
    assert checkpoint.verify(tmp_path / "own-host-a" / "a")["windows"] == 2
    assert list((tmp_path / "own-host-b").iterdir()) == []
    shutil.copytree(tmp_path / "own-host-a" / "a", tmp_path / "own-host-b" / "a")
    both = start(
        hosts, *train("--steps", "4", *options, "--gather-checkpoints", "--resume", "own/a", "--json", "r.json")
    )
    (_, err), (_, other_err) = ended(both, deadline(150))
    assert [process.returncode for process in both] == [0, 0], err + other_err
    straight = locally(tmp_path, "--steps", "4", *options[:-2], "--out", str(tmp_path / "b"), "--save-interval", "2")
    assert json.loads((tmp_path / "r.json").read_text())["params_sha256"] == straight["params_sha256"]


def wait_for_line(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if words in line:
            return
    raise AssertionError(f"ended without {words!r}: {''.join(said)}")


def test_a_link_that_is_cut_ends_both_sides(hosts: Hosts, tmp_path: Path) -> None:
    saved = str(tmp_path / "saved")
    locally(tmp_path, "--steps", "3", "--out", saved)
    options = ["--steps", "1000000", "--eval-interval", "0", "--transfer-timeout", str(deadline(TIMEOUT_S))]
    both = start(hosts, *train(*options, "--resume", saved, "--out", saved))
    wait_for_line(both[0], "step ")
    hosts.cut()
    began = time.monotonic()
    (_, err), (_, other_err) = ended(both, deadline(90))
    assert time.monotonic() - began < deadline(TIMEOUT_S + 60)
    assert all(process.returncode not in (0, None) for process in both)
    said = err + other_err
    assert "TransferTimeoutError" in said or "PeerLostError" in said or "timed out after" in said, said
    assert checkpoint.verify(saved)["windows"] == 3
    assert locally(tmp_path, "--steps", "4", "--resume", saved)["steps"] == 4


SLOW_SAVE = """
import sys, time
from pathlib import Path
import torch
from paci_rt import cli

if __name__ == "__main__":
    save, calls = torch.save, []

    def slowly(content, stream, **options):
        if isinstance(content, dict) and "params" in content:  # a part of a checkpoint
            calls.append(1)
            if len(calls) == 2:
                Path("saving").touch()
                time.sleep(3)
        save(content, stream, **options)

    torch.save = slowly
    sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_link_that_is_cut_during_a_save_leaves_the_checkpoint_before(hosts: Hosts, tmp_path: Path) -> None:
    pytest.importorskip("paci_rt.transport.collective", reason="gathers have torch's own deadline of 30 minutes here")
    (tmp_path / "slow_save.py").write_text(SLOW_SAVE)
    options = [*train("--steps", "100", "--eval-interval", "0", "--save-interval", "2", "--out", "saved")[2:]]
    both = start(hosts, "slow_save.py", *options, "--transfer-timeout", str(deadline(TIMEOUT_S)))
    until = time.monotonic() + deadline(120)
    while not (tmp_path / "saving").exists():
        assert time.monotonic() < until and both[0].poll() is None
        time.sleep(0.02)
    hosts.cut()
    ended(both, deadline(90))
    assert all(process.returncode not in (0, None) for process in both)
    assert checkpoint.verify(tmp_path / "saved")["windows"] == 2
    assert locally(tmp_path, "--steps", "3", "--resume", str(tmp_path / "saved"))["steps"] == 3


def test_the_recipe_for_slurm(hosts: Hosts, tmp_path: Path) -> None:
    """The file of the examples, with Slurm's two programs played by scripts that know both hosts."""
    tools = tmp_path / "bin"
    tools.mkdir()
    lines = ["#!/bin/bash", "shift  # --kill-on-bad-exit"]
    for at in (0, 1):
        start_it = " ".join(f"'{word}'" if word != '"$@"' else word for word in hosts.command(at, ['"$@"']))
        lines.append(f"SLURM_NODEID={at} {start_it} & pid{at}=$!")
    lines += ["wait $pid0 && wait $pid1"]
    scripts = {"srun": "\n".join(lines), "scontrol": "#!/bin/bash\nprintf 'host-a\\nhost-b\\n'"}
    for name, text in scripts.items():
        (tools / name).write_text(text + "\n")
        (tools / name).chmod(stat.S_IRWXU)
    job = {"SLURM_JOB_NODELIST": "host-[a-b]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "1"}
    environment = {**os.environ, **job, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": sys.executable}
    options = [*RUN[2:], "--data", "text.txt", "--steps", "2", "--json", "slurm.json"]
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "slurm.sbatch"), *options],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=deadline(150),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "slurm.json").read_text())
    assert result["params_sha256"] == locally(tmp_path, "--steps", "2")["params_sha256"]
