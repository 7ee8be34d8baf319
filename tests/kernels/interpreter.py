"""Triton's interpreter, mended where it is not what the hardware does.

It multiplies the bits of bf16 numbers as integers (3.9), cuts fp32 to bf16 where hardware rounds to
nearest even, multiplies fp32 in full where tf32 is asked for, and makes numbers of arrays in a way
that numpy 2.4 refuses (3.6). Calls of functions are made faster. Import this before any kernel.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert_others = interpreter._convert_float


def _convert(values, source, target, rounding_mode):
    if source == tl.float32 and target == tl.bfloat16:
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))
        return np.where(np.isnan(values), np.uint32(0x7FC00000), rounded).__rshift__(16).astype(
            np.uint16
        )  # fmt: skip
    if source == tl.bfloat16 and target == tl.float32:
        return (np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << 16).view(
            np.float32
        )
    return _convert_others(values, source, target, rounding_mode)


def _cut_to_tf32(values):
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
    a, b = (
        _convert(x.data, tl.bfloat16, tl.float32, None) if x.dtype.scalar == tl.bfloat16 else x.data
        for x in (a, b)
    )
    if input_precision == interpreter._ir.INPUT_PRECISION.TF32:
        a, b = (_cut_to_tf32(x) for x in (a, b))
    product = np.matmul(a, b, dtype=d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


_patch_tensor_otherwise = interpreter._patch_lang_tensor


def _patch_tensor(tensor, scope):
    _patch_tensor_otherwise(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_tensor
interpreter._convert_float = _convert
interpreter.InterpreterBuilder.create_dot = _dot


_patched = set()


def _call(function, *args, **kwargs):
    # A running kernel has patched the language that it sees; the interpreter does it again in
    # every call of a function, which takes most of its time. Triton's own functions see another
    # module, and what is patched there stays.
    module = function.fn.__module__
    if module.startswith("triton.") and module not in _patched:
        interpreter._patch_lang(function.fn)
        _patched.add(module)
    return function.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call
