"""What Triton kernels become on NVIDIA GPUs, read without one: registers, spills, and the machine instructions of the main loop.

The tests run it as a script: a process that has imported Triton for its interpreter cannot compile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smoothquant_plus.runtime.kernels.triton.shipped import Compilation

# One instruction of cuobjdump's listing: its address, a predicate perhaps, its name with modifiers, and its operands.
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.MULTILINE)
MATRIX = ("HMMA", "HGMMA", "IMMA", "IGMMA", "UTCHMMA", "UTCIMMA")


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

    def main_loop(self) -> Counter[str]:
        """The instructions of the loop with the most matrix products: from where a branch goes back to, to the branch."""
        loops: list[Counter[str]] = []
        for end in self.instructions:
            target = re.search(r"0x([0-9a-f]+)", end.operands) if end.name == "BRA" else None
            if target is not None and int(target[1], 16) < end.address:
                loops.append(Counter(one.name for one in self.instructions if int(target[1], 16) <= one.address <= end.address))
        # Of loops within one another, the innermost.
        return max(loops, key=lambda loop: (sum(loop[name] for name in MATRIX), -loop.total()), default=Counter())


def compile_for(architecture: str, one: Compilation) -> Machine:
    """`one` as machine code of `architecture`, such as 'sm_90'."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(one.signature)
    source = ASTSource(
        fn=one.kernel,
        signature=one.signature,
        constexprs={(names.index(name),): value for name, value in one.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in one.aligned},
    )
    options = {"num_warps": one.warps, "num_stages": one.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32), options=options)
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


def main(architecture: str, names: str) -> None:
    """Print, as JSON lines, what each compilation for `architecture` became whose name matches the regular expression `names`."""
    from smoothquant_plus.runtime.kernels.triton.shipped import shipped

    for one in shipped(architecture):
        if re.search(names, one.name):
            found = compile_for(architecture, one)
            loop, how = found.main_loop(), one.configuration
            # A turn of the loop takes so many weights a thread, of 128 input channels for w4a16.
            weights = how.channels * how.depth / (how.warps * 32) if how else 0
            line = {"name": one.name, "rows": how.rows if how else 0, "registers": found.registers, "spilled": found.spilled}
            print(json.dumps(line | {"shared": found.shared, "weights": weights, "loop": loop}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
