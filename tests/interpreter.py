"""Makes Triton's interpreter several times faster, and right in bf16 and fp16."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from mpdit_kernels.launch import TUNABLES
from numpy.typing import NDArray
from triton import language as tl
from triton.language import core
from triton.runtime import interpreter


def speed_up() -> None:
    """Skip what Triton 3.7's interpreter computes in vain or anew each time; results stay bit for bit the same."""
    _replace_functions_once_a_launch()
    # Each whole-number operation is done again in 64 bits, to assert what isn't asserted outside of debug mode.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _remember_types()


def _remember_types() -> None:
    """Derive what follows from a type's element and shape, half of the interpreter's time, once for each of them."""
    np_dtype, init_block, init_tensor = interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__
    np_dtypes, blocks, shapes = {}, {}, {}

    def remembered_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(dtype)
        return np_dtypes[name]

    def init_remembered_block(self, element_ty, shape):
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in blocks:
            init_block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def init_remembered_tensor(self, handle, type):
        key = id(type.shape) if type.is_block() else None  # blocks keeps it, so that no other gets its id
        if key not in shapes:
            init_tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    interpreter._get_np_dtype = remembered_np_dtype
    core.block_type.__init__, core.tensor.__init__ = init_remembered_block, init_remembered_tensor


def _replace_functions_once_a_launch() -> None:
    """Replace triton.language's functions once a launch for each module, not at every call of a device function.

    What a launch replaced is put back when it ends.
    """
    replace, run, done = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def once(fn):
        if fn.__module__ not in done:
            done.add(fn.__module__)
            return replace(fn)
        return None

    def launch(self, *args, **kwargs):
        done.clear()
        try:
            return run(self, *args, **kwargs)
        finally:
            done.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launch


def narrow(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bits of fp32 numbers as bf16, to nearest, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    # Half a unit of the last place kept, less the smallest part of one where that place is 0 and a tie goes down.
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return as fp32 the bf16 numbers of these bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def compute_narrow_floats() -> None:
    """Have casts round and products multiply bf16 numbers, and refuse other arithmetic on bf16 and fp16.

    Triton (3.6 to 3.7.1) holds a bf16 number as the integer of its bits: it casts to it by cutting bits off, and what
    it multiplies or adds are those integers. On a GPU a kernel may compute in a narrow type, and rounds each time: ours
    are not to.
    """
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def widened(x: Any) -> Any:
        return handle(widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def cast(self: Any, source: Any, kind: Any) -> Any:
        if kind.scalar == tl.bfloat16:
            return handle(narrow(widened(source).data.astype(np.float32)), tl.bfloat16)
        return usual_cast(self, widened(source), kind)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return usual_dot(self, widened(a), widened(b), *rest)

    usual_cast, usual_dot = builder.cast_impl, builder.create_dot
    builder.cast_impl, builder.create_dot = cast, dot
    builder.get_bf16 = lambda self, value: handle(narrow(np.array([value], np.float32)), tl.bfloat16)
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_fabs", "create_erf", "create_rsqrt"):
        setattr(builder, name, _refusing(getattr(builder, name)))
    for reduction in (interpreter.ReduceOps, interpreter.ScanOps):
        reduction.apply_impl = _refusing(reduction.apply_impl)


def _refusing(operation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operation)
    def guarded(self: Any, *operands: Any) -> Any:
        if np.where not in operands:  # which only chooses
            for x in (y for operand in operands for y in (operand if isinstance(operand, tuple) else [operand])):
                if getattr(getattr(x, "dtype", None), "scalar", None) in (tl.bfloat16, tl.float16):
                    raise TypeError(f"arithmetic on {x.dtype.scalar} numbers: cast them to tl.float32 first")
        return operation(self, *operands)

    return guarded


@contextmanager
def few_programs() -> Iterator[None]:
    """Have kernels take many rows at once: the interpreter's time goes by operations, not by rows."""
    import mpdit_kernels.adaln.triton_impl
    import mpdit_kernels.upsample.triton_impl  # noqa: F401
    from mpdit_kernels.short_attn import triton_impl as short_attn

    with ExitStack() as stack:
        stack.enter_context(short_attn.FORWARD.override(short_attn._forward(32, 320, 32, 4)))
        stack.enter_context(short_attn.BACKWARD.override(short_attn._backward(32, 32, 4, whole=True)))
        for name in ("adaln.forward", "adaln.backward", "upsample.forward", "upsample.backward"):
            config = {"ROWS": 32, "TOKENS": 32, "CAP": 1024, "num_warps": 4, "num_stages": 1}
            stack.enter_context(TUNABLES[name].override(config))
        yield
