"""The C++ in cpp/, compiled on first use for the machine at hand, and kept in the user's cache directory."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
SOURCES = sorted(Path(__file__).with_name("cpp").iterdir())
FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-std=c++17"),
    # Sums in any order, and no bookkeeping of floating-point exceptions. NaN and infinity stay what they are.
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"),
)


@cache
def obstacle() -> str | None:
    """Why there is none, in words; null: there is one, compiled."""
    if platform.system() != "Linux":
        return f"native kernels are made for Linux alone, and this is {platform.system()}"
    if shutil.which(_compiler()) is None:
        return f"there is no C++ compiler ({_compiler()}; CXX names another one)"
    if _library_path().exists():
        return None
    there = next(each for each in _library_path().parents if each.exists())
    if not os.access(there, os.W_OK):
        return f"{there} cannot be written, where native kernels would be compiled; XDG_CACHE_HOME names another place"
    complaint = _compile(_library_path())
    return None if complaint is None else f"{_compiler()} cannot compile native kernels: {complaint}"


@cache
def available() -> bool:
    why = obstacle()
    if why is not None:
        logger.warning("%s: the hot path runs in PyTorch's own operations, slower", why)
    return why is None


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


@cache
def _library_path() -> Path:
    """Of this source, compiler and processor: another one has a library of its own. A process stays with what it found first."""
    processor = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    flags = [line for line in processor.splitlines() if line.startswith(("flags", "Features", "model name"))]
    made_of = "\n".join((*(each.read_text() for each in SOURCES), *FLAGS, _compiler(), *flags))
    cache_directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache_directory / "nndecomp" / f"native-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"


def _compile(path: Path) -> str | None:
    """What the compiler says if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_suffix(f".{os.getpid()}")
    sources = [str(each) for each in SOURCES if each.suffix == ".cpp"]
    made = subprocess.run([_compiler(), *FLAGS, *sources, "-o", str(own)], capture_output=True, text=True)
    if made.returncode:
        return made.stderr.strip().splitlines()[0] if made.stderr.strip() else f"exit status {made.returncode}"
    own.replace(path)  # whole or not at all, also where several processes start at once
    return None


@cache
def library() -> ctypes.CDLL:
    assert obstacle() is None, obstacle()
    library = ctypes.CDLL(str(_library_path()))
    library.candidates_new.restype = ctypes.c_void_p
    library.row_squares.restype = ctypes.c_double
    library.candidates_screen.restype = library.candidates_count.restype = ctypes.c_long
    library.candidates_keep.restype = ctypes.c_float
    return library


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    if tensor is None:
        return ctypes.c_void_p(None)
    assert tensor.dtype in TYPES, f"native kernels take {', '.join(map(str, TYPES))}, not {tensor.dtype}"
    return ctypes.c_void_p(tensor.data_ptr())


# What tensors hold that the kernels take.
TYPES = (torch.float32, torch.int64, torch.int32, torch.int8)
LONG, INT, FLOAT = ctypes.c_long, ctypes.c_int, ctypes.c_float


def threads() -> ctypes.c_int:
    return INT(torch.get_num_threads())
