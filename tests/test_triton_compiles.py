"""Triton kernels compile for a GPU, without one: the interpreter accepts what the compiler does not.

In a process of its own, where the interpreter is off and a launch compiles for sm_80 in place of running.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
            torch.bool: "*i1", torch.int32: "*i32", torch.float64: "*fp64", torch.uint8: "*u8"}
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}
compiled = []

def kind(value):
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"

def run(self, *args, grid, warmup, **kwargs):
    options = {name: value for name, value in kwargs.items() if name in OPTIONS}
    bound = dict(zip(self.arg_names, args)) | {name: v for name, v in kwargs.items() if name not in OPTIONS}
    constant = {p.name for p in self.params if p.is_constexpr}
    signature = {name: "constexpr" if name in constant else kind(bound[name]) for name in self.arg_names}
    source = ASTSource(fn=self, signature=signature, constexprs={name: bound[name] for name in constant})
    kernel = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
    assert len(kernel.asm["cubin"]) > 0
    compiled.append(self.__name__)

JITFunction.run = run

from gear_engine.ops.sample_tokens import SamplingTable
from gear_engine.request import SamplingParams
from gear_engine.triton_kernels import (codebook_quantize, decode_attention, dual_readout, group_norm_silu, philox,
                                        residual_moments, sample_tokens, sign_bits, skinny_linear, soft_readout)

def table(params):
    return SamplingTable.build(params, [p.uses_guidance for p in params], 61, torch.device("cpu"))

bf16, index = torch.bfloat16, torch.zeros(2, dtype=torch.int64)
cache = torch.zeros(2, 3, 2, 8, 72, dtype=bf16)
decode_attention.decode_attention(torch.zeros(2, 6 * 72, dtype=bf16), cache[0], cache[1], torch.zeros(3), index, index,
                                  torch.zeros(7, 36, 2), 2)
scales = torch.zeros(2, 3, 2, 8, dtype=torch.float16)
decode_attention.decode_attention(torch.zeros(2, 6 * 72, dtype=bf16), *cache.to(torch.float8_e4m3fn), torch.zeros(3),
                                  index, index, torch.zeros(7, 36, 2), 2, k_scale=scales[0], v_scale=scales[1])
x, weight = torch.zeros(2, 256, dtype=bf16), torch.zeros(32, 256, dtype=bf16)
skinny_linear.skinny_linear(x, weight, norm_weight=x[0], gate=weight)
params = [SamplingParams(cfg_scale=2.0, top_k=3), SamplingParams(top_p=0.5)]
known = table(params)
blind = SamplingTable(**{**vars(known), "rows": 2, "params": None, "uniform": None, "paired": False,
                         "draws": torch.ones(2, dtype=torch.bool)})
sample_tokens.sample_tokens(torch.zeros(2, 61), blind, seeds=index, positions=index)
philox.philox(index, index, 61)
z, codebook, row, code = torch.zeros(5, 8), torch.zeros(300, 8), torch.zeros(5), torch.zeros(300)
for inner_product in (False, True):
    codebook_quantize.codebook_quantize(z, row, codebook, code, inner_product)
values = torch.zeros(300, 70)
for dtype in (torch.float32, bf16):
    sign_bits.sign_bits(torch.zeros(5, 30, dtype=dtype), 3)
soft_readout.soft_readout(z, codebook, code, values, 2.0)
dual_readout.dual_readout(torch.zeros(5, 70), row, row, z, codebook, code, values, 2.0, [False, True, False])
for half in (torch.zeros(6, 5, 36, dtype=bf16), torch.zeros(6, 5, 36)):
    moments, images = torch.zeros(6, 3, 2, dtype=torch.float64), half.view(2, 3, 5, 36)
    for residual in (None, torch.zeros(6, 5, 36)):
        residual_moments.residual_moments(half, residual, moments, accumulate=residual is not None)
    residual_moments.residual_moments(half.view(3, 5, 4, 18), torch.zeros(6, 10, 18), moments, phase_offset=0)
    for affine in (values[:2, :36], torch.zeros(2, 2, 36)):
        group_norm_silu.group_norm_silu(torch.zeros_like(images, dtype=torch.float32), moments.view(2, 3, 3, 2),
                                        affine[0], affine[1], images)
print(*compiled)
"""


def test_every_kernel_compiles_for_sm_80(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    script = tmp_path / "compile_kernels.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    sources = (Path(__file__).resolve().parent.parent / "triton_kernels").glob("*.py")
    kernels = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.M)}
    assert kernels == set(done.stdout.split())
