"""Compile the kernels for a GPU that need not be there, and print what each tile takes: a JSON list.

`python tests/compile_kernels.py 90` compiles the tiles of the table for compute capability 9.0, `--all` also their
parts for narrow batches, and all of them with dropout.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # triton reads it where kernels are defined

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from randbatch.kernels.triton import device
from randbatch.kernels.triton.tiles import TABLE, Tile

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {
    "*fp32": ("shift", "lse", "delta", "grad_lse"),
    "*i64": ("order", "starts", "widths", "seed"),
    "fp32": ("scale", "dropout_p"),
    "i32": ("first", "num_heads", "num_tiles"),
}
TYPE_OF = {name: kind for kind, names in TYPES.items() for name in names}


def kernels(kind: int, every: bool) -> Iterator[tuple[str, str, int, Tile, bool]]:
    """(kernel, dtype, D, tile, dropout): with dropout heads of 64, whose tiles are nearest to the limit."""
    for (of, size, dim), tiles in TABLE.items():
        for dropout in (False, True):
            if of != kind or (dropout and dim != 64 and not every):
                continue
            tall = {"forward": [tiles.forward], "queries": [tiles.queries], "keys": [tiles.keys]}
            tall["whole"] = list(tiles.dropout if dropout else tiles.whole)
            for name, column in tall.items():
                blocks = [16, 32, 64, 128, 256] if every else [256]
                parts = {tile.within(block, dim) for tile, block in itertools.product(column, blocks)}
                for tile in sorted(parts, key=str):
                    yield name, "bf16" if size == 2 else "fp32", dim, tile, dropout


def compile_one(name: str, dtype: str, dim: int, tile: Tile, dropout: bool, kind: int) -> dict[str, Any]:
    kernel = {"forward": device.attend_forward, "keys": device.backward_of_keys}.get(name, device.backward_of_queries)
    constants = {"SIZE_D": dim, "SIZE_E": dim, "D": dim, "E": dim, "M": tile.rows, "N": tile.cols}
    constants |= {
        "SHIFT": True,
        "DROPOUT": dropout,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "UPCAST": False,
    }
    if kernel is device.backward_of_queries:
        constants |= {"WHOLE": name == "whole", "GRAD_LSE": True}
    names = kernel.arg_names
    strides = [each for each in names if each.endswith(("_row", "_head"))]
    types = {each: "constexpr" if each in constants else TYPE_OF.get(each, f"*{dtype}") for each in names}
    types |= dict.fromkeys(strides, "i32")
    aligned = [each for each in names if types[each].startswith("*") or each in strides]
    source = ASTSource(
        kernel,
        types,
        {(names.index(each),): value for each, value in constants.items()},
        {(names.index(each),): [["tt.divisibility", 16]] for each in aligned},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", kind, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL"))
    return {
        "kernel": f"{name} {dtype} D={dim} {tile}{' dropout' if dropout else ''}",
        "registers": registers,
        "spilled": stack + local,
        "shared": compiled.metadata.shared,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("capability", type=int, choices=(80, 90))
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    rows = [compile_one(*each, arguments.capability) for each in kernels(arguments.capability, arguments.all)]
    print(json.dumps(rows))
