"""Makes Triton's interpreter several times faster; the tests would take as much longer without it.

It replaces the functions of triton.language anew at every call of a device function. Once a launch for each module is
enough: what a launch replaced is put back when it ends.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from mpdit_kernels.launch import TUNABLES
from triton.runtime import interpreter


def speed_up() -> None:
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
