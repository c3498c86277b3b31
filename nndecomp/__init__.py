"""Takes a trained network apart into sparse, readable pieces, and measures which way of doing so is best.

settings -> target -> tokens -> activations -> decomposition -> training -> run directory -> evaluation -> report

Experiments are started from the command line. What a notebook needs is here; `nndecomp.face` describes it.
"""

# The face imports the package it is the face of.
# pyright: reportImportCycles=false

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nndecomp.face import (
        evaluate,
        load_decomposition,
        load_parameters,
        load_target,
        neurons,
        patched_logits,
        read,
        record,
        rows,
        to_jumprelu,
        to_pursuit,
        tokenise,
        with_unit_norm_decoder,
    )

__all__ = [
    "evaluate",
    "load_decomposition",
    "load_parameters",
    "load_target",
    "neurons",
    "patched_logits",
    "read",
    "record",
    "rows",
    "to_jumprelu",
    "to_pursuit",
    "tokenise",
    "with_unit_norm_decoder",
]


def __getattr__(name: str) -> Any:
    """The face is loaded when it is first used: it brings torch, and importing the package should not."""
    if name not in __all__:
        raise AttributeError(f"module 'nndecomp' has no attribute {name!r}")
    from nndecomp import face

    return getattr(face, name)


def __dir__() -> list[str]:
    return __all__
