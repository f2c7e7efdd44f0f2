"""Have attention's choices forgotten, so that a test begins as a new process would."""

from mpdit_kernels.backends import choose, libraries, op, probe


def forget() -> None:
    """Import, probe, choose and tell anew."""
    for cache in (libraries.missing, choose.remembered, op.remembered_plan):
        cache.cache_clear()
    probe._probed.clear()
    choose._told.clear()
