"""Every Triton kernel compiles for every target without a GPU, into the instructions that its speed rests on.

Compiling the matrix kernel takes most of the time here, so beyond one target only bf16 with bias is: fp16 differs in
the name of a type, and without bias the same product stands alone. ``python -m paci_rt.kernels.aot`` compiles all.
"""

from __future__ import annotations

import re

import pytest

from paci_rt.kernels.aot import ARCHS, Compiled, Variant, compile_variant, variants, widest, widest_copy

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""What a program can have at most (CUDA C++ Programming Guide, compute capabilities)."""

MATRIX_INSTRUCTION = {80: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
CASES = [
    pytest.param(variant, arch, id=f"{variant.name}-sm_{arch}")
    for variant in variants()
    for arch in ARCHS
    if not variant.name.startswith("wgrad") or variant.name.endswith("bf16 bias") or arch == 90
]


def vector_accesses(variant: Variant) -> tuple[int, int]:
    """Wide loads and stores of a thread: four elements each, which the accumulation does for two runs of four."""
    name = variant.name
    if name.startswith("accumulate"):
        return (2 if "unaligned" in name else 4), 2
    low = "fp32" not in name
    if name == "measure":
        return 2, 0
    if "ahead" in name:
        return (4 if "adam" in name else 3), (1 if low else 2)
    state = 2 if "adam" in name else 1 if "momentum" in name or "lion" in name else 0
    return 2 + state + ("last" in name), 1 + state + low


@pytest.mark.parametrize(("variant", "arch"), CASES)
def test_compiles_without_spills_into_wide_accesses(variant: Variant, arch: int) -> None:
    made = compile_variant(variant, arch)
    assert made.spill_bytes == 0
    # Some versions of ptxas (Triton 3.6, 3.8, 3.9) keep one address of a few kernels on the stack there.
    assert made.stack_bytes <= (8 if arch == 120 else 0)
    assert ".local" not in made.ptx
    # At least two programs fit on a multiprocessor.
    assert made.registers * variant.warps * 32 <= 65536 // (1 if variant.name.startswith("wgrad") else 2)
    assert made.shared_bytes <= SHARED_BYTES[arch]
    if variant.name.startswith(("wgrad", "bias")):
        check_matrix(variant, arch, made)
    elif variant.name not in ("totals", "entries"):
        assert made.load_bits == 128
        assert (made.vector_loads, made.vector_stores) == vector_accesses(variant)
        check_arithmetic(variant, made)
        check_order(made)


def check_matrix(variant: Variant, arch: int, made: Compiled) -> None:
    """Tensor cores of the target's generation; factors and sums move 128 bits at a time."""
    assert made.load_bits == 128
    if variant.name.startswith("wgrad"):
        assert MATRIX_INSTRUCTION[arch] in made.matrix_instructions
        assert made.store_bits == 128
        # Two of the smaller tiles fit on a multiprocessor, so that one adds to memory while the other multiplies.
        if arch in (90, 100) and "256" not in variant.name:
            assert 2 * made.registers * variant.warps * 32 <= 65536
            assert 2 * made.shared_bytes <= SHARED_BYTES[arch]


def check_order(made: Compiled) -> None:
    """From the first to the last thing that a block reads nothing waits for any of it, as divisions and stores do."""
    loads = [match.start() for match in re.finditer(r"\bld\.global[\w.:]*\.v\d", made.ptx)]
    assert not re.search(r"\b(div\.rn\.f32|st\.global)", made.ptx[loads[0] : loads[-1]])


def check_arithmetic(variant: Variant, made: Compiled) -> None:
    """Correctly rounded, nothing contracted: the bits of the CPU kernels."""
    assert not re.search(r"\bfma\.rn(\.ftz)?\.f32", made.ptx)
    assert not re.search(r"\b(div\.(full|approx)|sqrt\.approx|rcp\.|\w+\.rn\.ftz)", made.ptx)
    if "accumulate" not in variant.name and variant.name != "measure":
        assert "div.rn.f32" in made.ptx
    if "adam" in variant.name:
        assert "sqrt.rn.f32" in made.ptx


def test_variants_have_names_of_their_own() -> None:
    names = [variant.name for variant in variants()]
    assert len(set(names)) == len(names)


def test_what_is_read_off_assembly() -> None:
    ptx = "@%p3 ld.global.v4.b32 { %r1 }, [a];\nld.global.b64 x;\nld.global.L1::evict_last.v2.b32 y;\nst.global.b16 z;"
    assert widest(ptx, "ld") == 128
    assert widest(ptx, "st") == 16
    assert widest("", "ld") == 0
    assert widest_copy("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r3;") == 128
    assert widest_copy("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 4;") == 32
