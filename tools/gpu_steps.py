"""What ``make gpu`` does, step by step. To measure something more, add a line.

A benchmark joins by writing ``measures`` into its JSON (``gpu_runner.py`` says how), again whenever it knows more, and
by staying inside its limit. The shares add up to the time of the whole run, so that every step has its turn; a step may
take what those before it have left, up to its limit.
"""

from __future__ import annotations

from gpu_runner import Step


def _benchmark(name: str, does: str, call: str, *, share_s: float, limit_s: float) -> Step:
    """A script of ``benchmarks/`` with its options, which writes ``measures``."""
    command = ("{python}", *f"benchmarks/{call}".split(), "--json", "{out}")
    return Step(name=name, does=does, command=command, share_s=share_s, limit_s=limit_s)


STEPS: tuple[Step, ...] = (
    Step(
        name="build",
        does="the native core with its CUDA half, into this folder",
        # In place: works offline, and where the interpreter's packages cannot be written to.
        command=("{python}", "setup.py", "build_ext", "--inplace"),
        environment={"PACI_RT_CUDA": "on", "PACI_RT_TESTING": "on"},
        reads="nothing",
        share_s=60,
        limit_s=170,
    ),
    Step(
        name="tests",
        does="everything in tests/ that needs a GPU",
        command=("{python}", "tools/gpu_tests.py", "--limit-s", "{limit_s}", "--json", "{out}"),
        share_s=130,
        limit_s=180,
    ),
    _benchmark(
        "kernels",
        "Triton kernels against copying, torch and CuPy",
        "kernels.py --device cuda",
        share_s=65,
        limit_s=120,
    ),
    _benchmark(
        "one_gpu",
        "eight stages on partitions of the GPU: PACI and zero bubble against 1F1B-flush",
        "one_gpu.py --accumulation 8 --repeats 2",
        share_s=110,
        limit_s=150,
    ),
    _benchmark(
        "overlap",
        "what an update costs beside the next micro-batch, and that nothing waits for the device",
        "update_overlap.py",
        share_s=60,
        limit_s=120,
    ),
    _benchmark(
        "links",
        "messages between stages on one GPU against copying, and hidden behind compute",
        "gpu_links.py",
        share_s=35,
        limit_s=90,
    ),
    _benchmark(
        "parity",
        "training on the GPU against the CPU, bf16 against fp32, streams against none",
        "parity.py --windows 8",
        share_s=60,
        limit_s=150,
    ),
)
