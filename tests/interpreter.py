"""Makes Triton's interpreter several times faster; the tests would take as much longer without it."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from mpdit_kernels.launch import TUNABLES
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
