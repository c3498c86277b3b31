"""What computes the hot path: selection, gathers and segment sums.

    torch    pure PyTorch, on any device and in any precision; the reference of the others
    native   C++ on the CPU, float32, compiled for the machine on first use
    triton   kernels for CUDA

All of them select the same entries and add up the same numbers, in other orders. The mathematics, with its gradients, stands once, in
`nndecomp.decompositions.kernels`; a backend has the primitives that it is made of.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nndecomp.config.schema import BackendKind
from nndecomp.decompositions.backends.interface import Backend
from nndecomp.errors import SettingError

_asked = BackendKind.auto


def use(kind: BackendKind) -> None:
    """For the whole process. Raises SettingError if it cannot be had here."""
    global _asked
    match kind:
        case BackendKind.native:
            from nndecomp.decompositions.backends import native

            if not native.available():
                raise SettingError(f"backend=native: {native.obstacle()}; use backend=torch")
        case _:
            pass
    _asked = kind


@contextmanager
def using(kind: BackendKind) -> Iterator[None]:
    """For a while."""
    before = _asked
    use(kind)
    try:
        yield
    finally:
        use(before)


def of(tensor: Tensor) -> Backend:
    """The backend for a tensor: what was asked for where it serves the tensor's device and precision, else torch. Under autocast
    products are torch's, in the precision that it says."""
    from nndecomp.decompositions.backends import pure

    if _asked is BackendKind.torch:
        return pure.BACKEND
    served = tensor.dtype in (torch.float32, torch.int64) and not torch.is_autocast_enabled(tensor.device.type)
    if tensor.device.type == "cpu" and served:
        from nndecomp.decompositions.backends import native

        if native.available():
            return native.BACKEND
    return pure.BACKEND
