"""Compiles every Triton kernel for compute capability 9.0, without a GPU, and prints the bytes of registers that each one spills.

python tests/triton_compiled.py        one line a kernel; run by tests/test_triton_backend.py
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # kernels are compiled where it is not set

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nndecomp.decompositions.backends import triton_adam, triton_collect, triton_gather, triton_rows, triton_topk

HALF, FULL, LONG, INT = "*bf16", "*fp32", "*i64", "*i32"
# Types of arguments by name; others are int32, and those of what is multiplied are a kernel's own.
TYPES = {
    **dict.fromkeys(("b", "c", "z_out", "value_out", "weights", "pieces", "floor", "floors", "ceiling"), FULL),
    **dict.fromkeys(("indices", "offsets", "bounds", "order", "owner", "ends", "tokens"), LONG),
    **dict.fromkeys(("index_out", "place_out", "entries", "counter", "rank"), LONG),
    **dict.fromkeys(("parameter", "m", "v", "n", "clip", "squares", "shares"), FULL),
    **dict.fromkeys(("keep", "lr", "beta1", "other1", "log1", "beta2", "other2", "log2", "epsilon"), "fp32"),
    **dict.fromkeys(("counts", "histogram", "level", "wanted"), INT),
}
# Tiles as on a GPU: 32 features a token are selected, of a dictionary in four strips. Once in bfloat16, once in float32.
TILE = {"SCALED": True, "ROWS": 128, "FEATURES": 128, "DEPTH": 64, "PRECISION": "ieee"}
EXACT = {**TILE, "DEPTH": 32, "PRECISION": "tf32x3"}
GATHER = {"COLUMNS": triton_gather.COLUMNS, "AHEAD": triton_gather.AHEAD}
PIECES = {"PIECE": triton_gather.PIECE, **GATHER}
BITS = {"SHIFT": 20, "BITS": 11}
LISTS, STRIP = {"ROOM": 256, "SHORTENED": 16}, {"STRIP": triton_collect.STRIP}
KERNELS = [
    (triton_gather._bag_kernel, HALF, GATHER, 1),
    (triton_gather._bag_kernel, FULL, GATHER, 1),
    (triton_gather._piece_kernel, FULL, PIECES, 1),
    (triton_gather._feature_kernel, FULL, PIECES, 1),
    (triton_adam._norm_kernel, HALF, {"TANGENT": True, **PIECES}, 1),
    (triton_adam._adam_kernel, HALF, {"TANGENT": True, **PIECES}, 1),
    (triton_gather._dots_kernel, FULL, {"SLOTS": 16, "COLUMNS": triton_gather.COLUMNS}, 4),
    (triton_topk._topk_kernel, HALF, LISTS | TILE, 8),
    (triton_topk._topk_kernel, FULL, LISTS | EXACT, 8),
    (triton_topk._merge_kernel, FULL, {"SCALED": True, "STRIPS": 4, "ROOM": 256, "MERGED": 1}, 4),
    (triton_collect._collect_kernel, HALF, {"PER_FEATURE": True, **STRIP, **TILE}, 8),
    (triton_collect._collect_kernel, FULL, {"PER_FEATURE": False, **STRIP, **EXACT}, 8),
    (triton_collect._histogram_kernel, HALF, {**BITS, **STRIP, **TILE}, 8),
    (triton_collect._refine_kernel, HALF, BITS, 4),
    (triton_rows._project_kernel, FULL, {"COLUMNS": triton_rows.COLUMNS}, 4),
    (triton_rows._normalise_kernel, FULL, {"COLUMNS": triton_rows.COLUMNS}, 4),
]


def spilled(kernel, numbers: str, constants: dict, num_warps: int) -> int:
    """Bytes that a thread stores because it has no more registers, as the assembler says."""
    names = kernel.arg_names
    known = TYPES | dict.fromkeys(("x", "W", "grad", "table", "rows", "out"), numbers)
    types = {name: "constexpr" if name in constants else known.get(name, "i32") for name in names}
    # What Triton finds out by itself at a launch: addresses and widths are multiples of 16.
    aligned = [
        name for name in names if types[name].startswith("*") or name in ("d", "stride", "out_stride", "row_stride")
    ]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": 3}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.metadata.shared <= 227 * 1024, f"{kernel.__name__} takes {made.metadata.shared} bytes of shared memory"
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        command = [assembler, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))


if __name__ == "__main__":
    for kernel, numbers, *how in KERNELS:
        print(kernel.__name__, numbers, spilled(kernel, numbers, *how), flush=True)
