"""What computes the hot path: selection, gathers and segment sums.

    torch    pure PyTorch, on any device and in any precision; the reference of the others
    native   C++ on the CPU, float32, compiled for the machine on first use
    native_int8   the same with a bound for what 8 bits can be wrong by that holds very likely, not always, and less to compute twice
    triton   kernels for CUDA

All of them select the same entries and add up the same numbers, in other orders. The mathematics, with its gradients, stands once, in
`nndecomp.decompositions.kernels`; a backend has the primitives that it is made of.
"""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from nndecomp.config.schema import BackendKind
from nndecomp.decompositions.backends.interface import Backend, RowUpdate
from nndecomp.errors import SettingError

logger = logging.getLogger(__name__)
_asked = BackendKind.auto


def use(kind: BackendKind) -> None:
    """For the whole process, which says anew what computes. Raises SettingError if it cannot be had here."""
    _ask(kind)
    _say.cache_clear()


def _ask(kind: BackendKind) -> None:
    global _asked
    match kind:
        case BackendKind.native | BackendKind.native_int8:
            from nndecomp.decompositions.backends import compiled

            if not compiled.available():
                raise SettingError(f"backend={kind.value}: {compiled.obstacle()}; use backend=torch")
        case BackendKind.triton:
            if without_triton() is not None:
                raise SettingError(f"backend=triton: {without_triton()}; use backend=auto or native")
        case _:
            pass
    _asked = kind


@contextmanager
def using(kind: BackendKind) -> Iterator[None]:
    """For a while."""
    before = _asked
    _ask(kind)
    try:
        yield
    finally:
        _ask(before)


def of(tensor: Tensor) -> Backend:
    """The backend for a tensor: what was asked for where it serves the tensor's device and precision, else torch. Under autocast
    products are rounded as it says; on the CPU they are torch's then. The log says so where it is first needed."""
    found = _serving(tensor)
    _say(tensor.device, found.name)
    return found


@cache
def _say(device: torch.device, name: str) -> None:
    logger.info("sparse codes on %s by backend=%s", device, name)


def _serving(tensor: Tensor) -> Backend:
    from nndecomp.decompositions.backends import pure

    if tensor.device.type == "cpu" and _asked in (BackendKind.auto, BackendKind.native, BackendKind.native_int8):
        from nndecomp.decompositions.backends import compiled, native

        served = tensor.dtype in (torch.float32, torch.int64) and not torch.is_autocast_enabled("cpu")
        if served and compiled.available():
            return native.LIKELY if _asked is BackendKind.native_int8 else native.exact()
    wanted = _asked is BackendKind.triton or (tensor.device.type == "cuda" and _asked is BackendKind.auto)
    served = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64)
    if wanted and served and _triton_serves(tensor.device.type):
        from nndecomp.decompositions.backends import triton_backend

        return triton_backend.BACKEND
    return pure.BACKEND


def row_updates(W: Tensor) -> type[RowUpdate] | None:
    """By which W may be moved without its gradient being written; null: its backend has nothing for that."""
    if W.dtype != torch.float32:
        return None
    match _serving(W).name:
        case "native" | "native_int8":
            from nndecomp.decompositions.backends.native_rows import NativeRows

            return NativeRows
        case "triton":
            from nndecomp.decompositions.backends.triton_adam import TritonRows

            return TritonRows
        case _:
            return None


@cache
def without_triton() -> str | None:
    """Why Triton's kernels cannot be had, in words; null: they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'nndecomp[triton]')"
    from nndecomp.decompositions.backends.triton_launch import INTERPRETED

    if not INTERPRETED and not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


@cache
def _triton_serves(device: str) -> bool:
    why = without_triton()
    if why is not None:
        logger.warning("%s: the hot path runs in PyTorch's own operations, slower", why)
        return False
    from nndecomp.decompositions.backends.triton_launch import INTERPRETED

    return device == "cuda" or INTERPRETED
