"""Loops and counts that are read from PTX and from disassembled machine code."""

from __future__ import annotations

from bench.machine_code import Loop, copy_waits, counted, loops, ptx, sass


def disassembly(*lines: str) -> str:
    """A disassembly as nvdisasm prints it; a line that ends with a colon is a label."""
    text = [
        line if line.endswith(":") else f"        /*{16 * n:04x}*/                   {line} ;"
        for n, line in enumerate(lines)
    ]
    return "\n".join(["\t.section\t.text._kernel", ".text._kernel:", *text, ".L_x_9:", *END])


END = (
    "        /*a440*/                   BRA `(.L_x_9);",
    "        /*a450*/                   NOP;",
    ".L_x_10:",
)


def loops_of(*lines: str) -> list[list[str]]:
    code = sass(disassembly(*lines))
    return [[code[i].opcode for i in loop] for loop in loops(code)]


def test_a_kernel_without_a_loop() -> None:
    """A loop that is read from the trap after the last instruction, or from a branch forwards."""
    lines = ("MOV R1, R2", "@P0 BRA `(.L_x_1)", "FADD R1, R1, R2", ".L_x_1:", "EXIT")
    assert loops_of(*lines) == []
    assert counted(sass(disassembly(*lines)), ptx("ret;")) == (Loop(4),)


def test_nested_loops() -> None:
    """Instructions of an inner loop that count for the outer loop, or an inner loop that is not seen."""
    lines = (
        "S2R R0, SR_CTAID.X",
        ".L_x_0:",
        "FADD R1, R1, R2",
        ".L_x_1:",
        "FMUL R3, R3, R3",
        "ISETP.NE.AND P0, PT, R4, RZ, PT",
        "@!P0 BRA `(.L_x_1)",
        ".L_x_2:",
        "MUFU.EX2 R5, R5",
        "@P1 BRA `(.L_x_2)",
        "@!UP0 BRA `(.L_x_0)",
        "EXIT",
    )
    assert loops_of(*lines) == [["FADD", "BRA"], ["FMUL", "ISETP.NE.AND", "BRA"], ["MUFU.EX2", "BRA"]]


def test_branches_within_a_loop() -> None:
    """A part of a loop that is left out because a branch skips it, or lies after the last EXIT."""
    lines = (
        ".L_x_0:",
        "@P0 BRA `(.L_x_1)",
        "FADD R1, R1, R2",
        ".L_x_1:",
        "@P1 BRA `(.L_x_4)",
        ".L_x_3:",
        "BRA.U UP0, `(.L_x_0)",
        "EXIT",
        ".L_x_4:",
        "FMUL R1, R1, R2",
        "BRA `(.L_x_3)",
    )
    assert loops_of(*lines) == [["BRA", "FADD", "BRA", "BRA.U", "FMUL", "BRA"]]


def test_a_jump_back_is_not_a_loop() -> None:
    """Rare code after the end of a kernel, whose branch back into it is taken for a loop."""
    lines = (
        "@P0 BRA `(.L_x_2)",
        "FADD R1, R1, R2",
        ".L_x_1:",
        "FADD R1, R1, R3",
        "EXIT",
        ".L_x_2:",
        "FMUL R1, R1, R2",
        "BRA `(.L_x_1)",
    )
    assert loops_of(*lines) == []


def test_the_counts_of_a_loop() -> None:
    """A count that misses a form of an instruction, or that includes the code around the loop."""
    outside = (
        "LDL R1, [R2]",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
    )
    lines = (
        *outside,
        ".L_x_0:",
        "DEPBAR.LE SB0, 0x2",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "WARPGROUP.ARRIVE",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "MUFU.EX2 R1, R1",
        "@!P0 MUFU.RCP R1, R1",
        "LDL R3, [R1+0x4]",
        "LDL.LU.64 R4, [R1+0x8]",
        "STL.128 [R1], R8",
        "@P0 STL.U8 [R1], R8",
        "LDS.128 R8, [R1]",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "LDGSTS.E.BYPASS.128 [R45], desc[UR24][R24.64], !P0",
        "LDGDEPBAR",
        "@!P0 BRA `(.L_x_0)",
        *outside,
        "EXIT",
    )
    source = ptx(
        "$L_0:\n\tcp.async.wait_group \t2;\n\twgmma.mma_async.sync.aligned {%r1};\n\t@%p1 bra $L_0;\n\tret;"
    )
    assert counted(sass(disassembly(*lines)), source) == (
        Loop(
            instructions=17,
            matmuls=2,
            matmul_waits=1,
            barriers=2,
            spills=4,
            spill_bytes=4 + 8 + 16 + 1,
            mufu=2,
            copy_waits=(2,),
        ),
    )


def test_the_order_of_wait_barrier_and_copy() -> None:
    """A copy right after a wait for matmuls, in the same iteration or the next, that is not counted."""

    def unordered(*lines: str) -> int:
        body = [f"{line} R1" for line in lines]
        return counted(sass(disassembly(".L_x_0:", *body, "@P0 BRA `(.L_x_0)", "EXIT")), ptx("ret;"))[
            0
        ].unordered

    assert unordered("WARPGROUP.DEPBAR.LE", "BAR.SYNC", "LDGSTS.E", "LDGSTS.E") == 0
    assert unordered("BAR.SYNC", "WARPGROUP.DEPBAR.LE", "LDGSTS.E", "LDGSTS.E") == 2
    assert unordered("LDGSTS.E", "BAR.SYNC", "WARPGROUP.DEPBAR.LE") == 1
    assert unordered("LDGSTS.E", "WARPGROUP.DEPBAR.LE", "BAR.SYNC") == 0
    assert unordered("BAR.SYNC", "LDGSTS.E", "WARPGROUP.DEPBAR.LE", "LDGSTS.E") == 1


PTX = """
.visible .entry _kernel(
	.param .u64 _kernel_param_0
)
{
	.reg .b32 	%r<9>;
	ld.param.b64 	%rd1, [_kernel_param_0];
	cp.async.wait_group 	0;
	@%p9 bra 	$L__BB0_3;
$L__BB0_2:                              // %loop
	.loc	1 62 8
	cp.async.wait_group 	2;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1, %r2 }, { %r3 }, { %r4 };
	cp.async.wait_group 	0x1;
	@!%p1 bra 	$L__BB0_2;
$L__BB0_3:
	bra.uni 	$L__BB0_4;
$L__BB0_4:
	cp.async.wait_all;
	@%p2 bra 	$L__BB0_4;
	ret;
}
"""


def test_the_waits_of_ptx() -> None:
    """A wait outside a loop, or in a loop without a matmul, that counts for a loop with one."""
    assert copy_waits(ptx(PTX)) == [(2, 1)]
    assert copy_waits(ptx(PTX.replace("cp.async.wait_group \t2", "cp.async.wait_all"))) == [(0, 1)]
    assert copy_waits(ptx(PTX.replace("@!%p1 bra", "@!%p1 add"))) == []


def test_loops_that_correspond() -> None:
    """A kernel whose loops the assembler doubles: waits that are lost, or a crash."""
    body = ("HMMA.16816.F32.BF16 R4, R8, R12, R4", "IADD3 R1, R1, 0x1, RZ")
    lines = (".L_x_0:", *body, "@P0 BRA `(.L_x_0)", ".L_x_1:", *body, "@P0 BRA `(.L_x_1)", "EXIT")
    assert [loop.copy_waits for loop in counted(sass(disassembly(*lines)), ptx(PTX))] == [(2, 1), (2, 1)]
