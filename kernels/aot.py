"""Compiles every kernel ahead of time, for machines that need not have a GPU, and reads what the compiler made.

    python -m paci_rt.kernels.aot [--arch 80,90,100,120] [--only TEXT]

prints a row a kernel and target: registers, spills and stack in bytes, shared memory, widest loads and stores.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from paci_rt.kernels.device.accumulate import accumulate_kernel, measure_kernel, totals_kernel
from paci_rt.kernels.device.adamw import adamw_ahead_kernel, adamw_kernel
from paci_rt.kernels.device.entries import PER_LAUNCH, entries_kernel
from paci_rt.kernels.device.lion import lion_ahead_kernel, lion_kernel
from paci_rt.kernels.device.sgd import sgd_ahead_kernel, sgd_kernel
from paci_rt.kernels.device.wgrad import bias_kernel, wgrad_kernel
from paci_rt.kernels.launch import BLOCK, OPTIONS, TOTALS_BLOCK, TOTALS_WARPS, UPDATE_WARPS, WARPS
from paci_rt.kernels.tiles import BIAS_WARPS, TILES, bias_constants

ARCHS = (80, 90, 100, 120)
"""Compute capabilities that are compiled for: Ampere, Hopper, and both kinds of Blackwell."""

ELEMENTS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
FLAT = {"grad_sum": "*fp32", "rows": "*fp32", "chunks": "*i64"}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One specialisation of a kernel, as the wrappers launch it.

    Attributes:
        name: for people and tests.
        kernel: the Triton function.
        types: Triton's type of every run-time argument; arguments that are in neither dictionary are None.
        constants: values of the compile-time arguments.
        aligned: arguments known to be divisible by 16; all pointers unless said otherwise.
        warps: warps a program.
        stages: depth of software pipelining.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] | None = None
    warps: int = WARPS
    stages: int = 2


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What a compilation gave.

    Attributes:
        ptx: assembly text.
        registers: a thread's.
        spill_bytes: local memory of a thread, where spilled registers and indexed arrays go.
        stack_bytes: stack frame of a thread.
        shared_bytes: shared memory of a program.
        load_bits: widest global load, 0 without any; wide asynchronous copies to shared memory count.
        store_bits: widest global store.
        vector_loads: number of global loads of several elements a thread.
        vector_stores: number of such stores.
        matrix_instructions: kinds of tensor-core instruction: ``mma``, ``wgmma``, ``tcgen05``.
    """

    ptx: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    load_bits: int
    store_bits: int
    vector_loads: int
    vector_stores: int
    matrix_instructions: tuple[str, ...]


def accumulate_variants() -> Iterator[Variant]:
    """Three gradient dtypes, aligned and not, the addresses' table and the totals."""
    types = {"front": "*fp32", "squares": "*fp64", "nonfinite": "*i32", "entries": "*i64", "chunks": "*i64"}
    for name, element in ELEMENTS.items():
        for aligned in (True, False):
            constants = {"ELEMENT": element, "ALIGNED": aligned, "BLOCK": BLOCK}
            label = f"accumulate {name}" + ("" if aligned else " unaligned")
            yield Variant(name=label, kernel=accumulate_kernel, types=types, constants=constants)
    yield Variant(
        name="totals",
        kernel=totals_kernel,
        types={"totals": "*fp64", "squares": "*fp64", "nonfinite": "*i32", "count": "i32"},
        constants={"BLOCK": TOTALS_BLOCK},
        aligned=("totals", "squares", "nonfinite"),
        warps=TOTALS_WARPS,
    )
    yield Variant(
        name="measure",
        kernel=measure_kernel,
        types={"front": "*fp32", "squares": "*fp64", "nonfinite": "*i32", "numbers": "*i64", "chunks": "*i64"},
        constants={"BLOCK": BLOCK},
    )
    addresses = {f"p{index}": "i64" for index in range(PER_LAUNCH)}
    yield Variant(
        name="entries",
        kernel=entries_kernel,
        types={"entries": "*i64", "first": "i32", "count": "i32", **addresses},
        constants={},
        aligned=("entries",),
        warps=1,
    )


def _step_variants(name: str, kernel: Any, state: dict[str, str], **switches: Any) -> Iterator[Variant]:
    """A step of each weight dtype, with and without the last gradients, which have the weight's dtype."""
    for low, element in ELEMENTS.items():
        for fused in (False, True):
            types = {"master": "*fp32", **state, **FLAT, "clip": "*fp32"}
            types |= {} if low == "fp32" else {"low": f"*{low}"}
            types |= {"entries": "*i64"} if fused else {}
            yield Variant(
                name=f"{name} {low}" + (" + last gradients" if fused else ""),
                kernel=kernel,
                types=types,
                constants={"ELEMENT": element, "ALIGNED": True, "BLOCK": BLOCK, **switches},
                warps=UPDATE_WARPS,
            )


def _ahead_variants(name: str, kernel: Any, state: dict[str, str], **switches: Any) -> Iterator[Variant]:
    for low in ELEMENTS:
        weights = {"kept": "*fp32"} if low == "fp32" else {"low": f"*{low}"}
        types = {"master": "*fp32", **weights, **state, **FLAT, "repeats": "i32"}
        yield Variant(
            name=f"{name} ahead {low}",
            kernel=kernel,
            types=types,
            constants={"BLOCK": BLOCK, **switches},
            aligned=tuple(key for key in types if key != "repeats"),
            warps=UPDATE_WARPS,
        )


def update_variants() -> Iterator[Variant]:
    """AdamW, NAdam, Lion and SGD."""
    moments, buffer = {"exp_avg": "*fp32", "exp_avg_sq": "*fp32"}, {"buffer": "*fp32"}
    for name, nesterov in (("adamw", False), ("nadam", True)):
        yield from _step_variants(name, adamw_kernel, moments, NESTEROV=nesterov)
        yield from _ahead_variants(name, adamw_ahead_kernel, moments, NESTEROV=nesterov)
    yield from _step_variants("lion", lion_kernel, {"exp_avg": "*fp32"})
    yield from _ahead_variants("lion", lion_ahead_kernel, {"exp_avg": "*fp32"})
    yield from _step_variants("sgd", sgd_kernel, {})
    yield from _step_variants("sgd momentum", sgd_kernel, buffer)
    yield from _ahead_variants("sgd", sgd_ahead_kernel, buffer)


def wgrad_variants() -> Iterator[Variant]:
    """Every tile, both dtypes, with and without bias; and the bias alone, which fp32 has too."""
    for name, element in ELEMENTS.items():
        types = {"bias": "*fp32", "dy": f"*{name}", "rows": "i32", "n": "i32", "stride": "i64", "overwrite": "i32"}
        yield Variant(
            name=f"bias {name}",
            kernel=bias_kernel,
            types=types,
            constants=bias_constants(element.primitive_bitwidth // 8),
            aligned=("bias", "dy", "n", "stride"),
            warps=BIAS_WARPS,
        )
    for tile in TILES:
        for element in ("bf16", "fp16"):
            for bias in (False, True):
                types = {"front": "*fp32", "dy": f"*{element}", "x": f"*{element}", "rows": "i32", "n": "i32"}
                types |= {"k": "i32", "stride_dy": "i64", "stride_x": "i64", "overwrite": "i32"}
                types |= {"overwrite_bias": "i32", **({"bias": "*fp32"} if bias else {})}
                aligned = ("front", "bias", "dy", "x", "n", "k", "stride_dy", "stride_x")
                yield Variant(
                    name=f"wgrad {tile.name} {element}" + (" bias" if bias else ""),
                    kernel=wgrad_kernel,
                    types=types,
                    constants=tile.constants,
                    aligned=tuple(key for key in aligned if key in types),
                    warps=tile.warps,
                    stages=tile.stages,
                )


def variants() -> list[Variant]:
    """All that the wrappers can launch, up to shapes and alignments that only cost speed."""
    return [*accumulate_variants(), *update_variants(), *wgrad_variants()]


def compile_variant(variant: Variant, arch: int) -> Compiled:
    """Compile for compute capability ``arch`` (90 is 9.0), with the options that the wrappers launch with."""
    fn = variant.kernel
    absent = [name for name in fn.arg_names if name not in variant.types and name not in variant.constants]
    constants = {**variant.constants, **dict.fromkeys(absent)}
    signature = {name: variant.types.get(name, "constexpr") for name in fn.arg_names}
    pointers = tuple(name for name, kind in variant.types.items() if kind.startswith("*"))
    aligned = pointers if variant.aligned is None else variant.aligned
    attributes = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = {**OPTIONS, "num_warps": variant.warps, "num_stages": variant.stages}
    source = ASTSource(fn, signature, constants, attributes)
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = str(done.asm["ptx"])
    usage = resource_usage(done.asm["cubin"])
    return Compiled(
        ptx=ptx,
        registers=usage["REG"],
        spill_bytes=usage["LOCAL"],
        stack_bytes=usage["STACK"],
        shared_bytes=int(done.metadata.shared),
        load_bits=max(widest(ptx, "ld"), widest_copy(ptx)),
        store_bits=widest(ptx, "st"),
        vector_loads=len(re.findall(r"\bld\.global[\w.:]*\.v\d", ptx)),
        vector_stores=len(re.findall(r"\bst\.global[\w.:]*\.v\d", ptx)),
        matrix_instructions=tuple(
            kind for kind in ("mma", "wgmma", "tcgen05") if re.search(rf"(?<!\.)\b{kind}\.", ptx)
        ),
    )


def widest(ptx: str, operation: str) -> int:
    """Bits of the widest global ``ld`` or ``st`` in PTX text."""
    found = re.findall(rf"\b{operation}\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[a-z](\d+)\b", ptx)
    return max((int(count or 1) * int(bits) for count, bits in found), default=0)


def widest_copy(ptx: str) -> int:
    """Bits of the widest asynchronous copy from global to shared memory."""
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+|\d+)", ptx)
    return 8 * max((int(size, 0) for size in sizes), default=0)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """``REG``, ``STACK``, ``SHARED``, ``LOCAL`` as the cuobjdump that Triton carries reads them from machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def main() -> None:
    """Compile and print the table."""
    parser = argparse.ArgumentParser(description="Compile every kernel ahead of time and print what it needs.")
    parser.add_argument("--arch", default=",".join(map(str, ARCHS)), help="compute capabilities, as in 80,90")
    parser.add_argument("--only", default="", metavar="TEXT", help="only variants whose name contains TEXT")
    options = parser.parse_args()
    heads = f"{'arch':>4s} {'regs':>5s} {'spill':>6s} {'stack':>6s} {'shared':>7s} {'load':>5s} {'store':>6s}"
    print(f"{'kernel':44s} {heads}  tensor cores")
    for variant in variants():
        if options.only not in variant.name:
            continue
        for arch in map(int, options.arch.split(",")):
            made = compile_variant(variant, arch)
            cores = " ".join(made.matrix_instructions)
            print(
                f"{variant.name:44s} {arch:4d} {made.registers:5d} {made.spill_bytes:6d} {made.stack_bytes:6d} "
                f"{made.shared_bytes:7d} {made.load_bits:5d} {made.store_bits:6d}  {cores}",
                flush=True,
            )


if __name__ == "__main__":
    main()
