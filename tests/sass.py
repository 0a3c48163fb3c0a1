"""What Triton kernels become on NVIDIA GPUs, read without one: registers, spills, and the machine instructions of the main loop.

Run as a script it compiles every kernel that the package ships, in its own process, since Triton's interpreter cannot be left again.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One instruction of cuobjdump's listing: its address, a predicate perhaps, its name with modifiers, and its operands.
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.MULTILINE)
MATRIX = ("HMMA", "HGMMA", "IMMA", "IGMMA")
# Integer and logic operations, shifts, permutations and conversions: what taking numbers out of words costs.
ALU = ("LOP3", "PRMT", "SHF", "I2F", "I2FP", "SEL", "ISETP", "VIADD", "IADD3")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # without modifiers: HGMMA of HGMMA.64x8x16.F32
    operands: str


@dataclass(frozen=True)
class Machine:
    """A compiled kernel: registers a thread, bytes of local memory a thread (spills), bytes of shared memory, and its instructions."""

    registers: int
    spilled: int
    shared: int
    instructions: tuple[Instruction, ...]

    def counts(self) -> Counter[str]:
        return Counter(one.name for one in self.instructions)

    def main_loop(self) -> Counter[str]:
        """The instructions of the loop with the most matrix products: from where a branch goes back to, to the branch."""
        loops: list[Counter[str]] = []
        for end in self.instructions:
            target = re.search(r"0x([0-9a-f]+)", end.operands) if end.name == "BRA" else None
            if target is not None and int(target[1], 16) < end.address:
                loops.append(Counter(one.name for one in self.instructions if int(target[1], 16) <= one.address <= end.address))
        # Of loops within one another, the innermost.
        return max(loops, key=lambda loop: (sum(loop[name] for name in MATRIX), -loop.total()), default=Counter())


def compile_kernel(fn: Any, signature: dict[str, str], constants: dict[str, Any], architecture: int, warps: int, stages: int) -> Machine:
    """`fn` for sm_`architecture`. `signature` has the Triton type of each argument that is none of the `constants`; all pointers and integers are
    multiples of 16, as torch's are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = fn.arg_names
    source = ASTSource(
        fn=fn,
        signature={name: "constexpr" if name in constants else signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature.get(name, "fp")[0] in "*i"},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return disassemble(compiled.asm["cubin"], compiled.metadata.shared)


def disassemble(cubin: bytes, shared: int) -> Machine:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.cubin"
        file.write_bytes(cubin)
        run = [subprocess.run([tool, option, file], capture_output=True, text=True, check=True) for option in ("-res-usage", "-sass")]
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", run[0].stdout + run[0].stderr)
    assert usage is not None, run[0].stdout + run[0].stderr
    found = (Instruction(int(address, 16), name.split(".")[0], rest) for address, name, rest in INSTRUCTION.findall(run[1].stdout))
    return Machine(int(usage[1]), int(usage[2]) + int(usage[3]), shared, tuple(found))
