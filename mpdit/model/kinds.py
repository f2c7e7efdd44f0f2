"""The kinds of transitions and time embeddings there are: tables that the model, planning, command line and help read.

A new kind is a module, wherever it stands in this folder, and an entry here. Modules are named, not imported: they need
torch, which no help text waits for.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from mpdit.core.errors import ConfigError

T = TypeVar("T")


class TransitionKind(NamedTuple):
    """Describes a transition: an entry of TRANSITIONS; expand and refine are modules with a `cost`, by file and name.

    Attributes:
        expand: made of (width, factor); takes image tokens [B, n0, D] and their grid to [B, n1, D]. Under autocast
            tokens come in fp32 and leave in its dtype, as they do from a Linear: planning counts on that.
        refine: made of (width); takes all tokens [B, m+n1, D], m and the fine grid to the same shape. "" for none.
        help: what it is.
        fused: whether mpdit_kernels.upsample_tokens does it in one piece.
    """

    expand: str
    refine: str
    help: str
    fused: bool = False


TRANSITIONS = {
    "linear": TransitionKind("transition:Expand", "", "a Linear onto the finer grid"),
    "conv_transpose": TransitionKind("transition:ExpandTranspose", "", "a transposed convolution"),
    "linear_linear": TransitionKind(
        "transition:Expand", "transition:RefineLinear", "linear, then GELU, norm and a Linear", fused=True
    ),
    "linear_mlp": TransitionKind("transition:Expand", "transition:RefineMLP", "linear, then GELU, norm and an MLP"),
    "linear_conv": TransitionKind(
        "transition:Expand", "transition:RefineConv", "linear, then GELU, norm and a 3 x 3 convolution"
    ),
}


class TimeKind(NamedTuple):
    """Describes a time embedding: an entry of TIME_EMBEDDINGS.

    Attributes:
        module: a TimeEmbedding, by file and name.
        help: what it is.
        least_layers: fewest time_layers.
        reads: fields of ModelConfig that only the kinds read that name them.
    """

    module: str
    help: str
    least_layers: int = 1
    reads: tuple[str, ...] = ()


TIME_EMBEDDINGS = {
    "fno": TimeKind(
        "time:FNOTimeEmbedding",
        "a Fourier neural operator of time_layers layers, time_width wide",
        least_layers=2,
        reads=("time_width",),
    ),
    "sinusoidal": TimeKind("time:SinusoidalTimeEmbedding", "DiT's sines and cosines, then time_layers Linears"),
}


def entry_of(table: Mapping[str, T], field: str, name: Any) -> T:
    """Return an entry of a table of kinds; ConfigError tells what there is."""
    if not isinstance(name, str) or name not in table:
        raise ConfigError(f"{field} is {name!r:.80}: choose one of {told(table)}")
    return table[name]


def told(table: Mapping[str, Any]) -> str:
    """Return the names of a table of kinds, each with its `help`, in words."""
    return ", ".join(f"{name} ({kind.help})" for name, kind in table.items())


def module_of(name: str) -> Any:
    """Import a kind's module, such as "transition:Expand"."""
    return pkgutil.resolve_name(f"{__package__}.{name}")


OVERRIDE_HELP = f"transition: {told(TRANSITIONS)}; time_embedding: {told(TIME_EMBEDDINGS)}"
"""What help says of the fields of ModelConfig that name a kind."""
