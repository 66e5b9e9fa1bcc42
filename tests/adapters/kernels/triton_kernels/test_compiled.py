"""Every kernel is compiled for GPUs that are not there: without errors, on tensor cores, within the shared memory."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

LIMITS = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes of shared memory of a program, by compute capability (CUDA C++ Programming Guide, table of capabilities)."""

PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from randlora_pl.adapters.kernels.triton_kernels import TILES
from randlora_pl.adapters.kernels.triton_kernels import jit

S = dict(lambdas="*fp32", gammas="*fp32", a="*fp32")
N = dict(N=137, R=30, PEFT=False)
C = dict(CT=tl.bfloat16, PRECISION="ieee")
H, W = "*bf16", dict(num_warps=8)
high, wide, deep, stages, warps = TILES[0]
tiles = dict(BM=high, BN=wide, BK=deep)
KERNELS = [
    (jit.build_kernel, dict(S, out=H, weight=H, b=H), dict(N, **C, **tiles, TRANSPOSED=True, ADDS=True, DITHERS=True),
     dict(num_stages=stages, num_warps=warps)),
    (jit.form_kernel, dict(S, out=H), dict(N, BP=16, BN=256), {}),
    (jit.reduce_kernel, dict(S, parts="*fp32", grad_gammas="*fp32", gradient=H), dict(N, BJ=2, BK=32, BN=128), {}),
    (jit.project_kernel, dict(out=H, x=H, signs="*i8", h="*fp32"), dict(C, COPIES=4, B=64, BB=64, BT=128, x_f=1), W),
    (jit.expand_kernel, dict(out=H, onto=H, mixed=H, signs="*i8", h="*fp32"),
     dict(C, COPIES=4, B=64, BB=64, BT=128, ADDS=True, DITHERS=True, out_t=1, onto_t=1, mixed_t=1), W),
    (jit.mix_kernel, dict(S, out=H, signs="*i8", o="*fp32"),
     dict(N, REPEATS=2, B=64, M=64, MP=64, PRECISION="tf32", BN=64), {}),
    (jit.unmix_kernel, dict(out="*fp32", mixed=H, signs="*i8", o="*fp32"),
     dict(REPEATS=2, B=64, M=64, MP=64, PRECISION="tf32", BN=64), {}),
    (jit.ternary_project_kernel, dict(parts="*fp32", x=H, packed="*i32"), dict(C, BT=16, BD=64, BW=4), {}),
    (jit.ternary_expand_kernel, dict(out=H, y=H, packed="*i32"), dict(C, BT=16, BD=64, BW=4), {}),
]
result = []
for capability in map(int, sys.argv[1:]):
    for kernel, pointers, constants, options in KERNELS:
        types = {"scale": "fp32", **pointers, **dict.fromkeys(constants, "constexpr")}
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        numbers = {name: number for number, name in enumerate(kernel.arg_names)}
        aligned = {(numbers[name],): [["tt.divisibility", 16]] for name in signature if name not in constants}
        aligned.pop((numbers.get("scale"),), None)
        source = ASTSource(kernel, signature, {(numbers[n],): v for n, v in constants.items()}, aligned)
        target = GPUTarget("cuda", capability, 32)
        made = triton.compile(source, target=target, options={"num_warps": 4, **options})
        products = made.asm["ptx"].count("mma.sync") + made.asm["ptx"].count("wgmma.mma")
        result.append([capability, kernel.fn.__name__, made.metadata.shared, products])
print(json.dumps(result))
"""


@pytest.mark.full
def test_kernels_compile_for_gpus_with_their_tensor_cores_and_fit() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, *map(str, LIMITS)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 9 * len(LIMITS)
    for capability, name, shared, products in found:
        assert shared <= LIMITS[capability], (name, shared)
        assert (products > 0) == (name not in ("form_kernel", "reduce_kernel")), name
