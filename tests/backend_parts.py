"""The backends that select on a CPU, for tests that each of them passes."""

import pytest

from nndecomp.decompositions.backends import compiled, native
from nndecomp.decompositions.backends.pure import Pure

needs_native = pytest.mark.skipif(compiled.obstacle() is not None, reason=str(compiled.obstacle()))
BACKENDS = [
    pytest.param(Pure(), id="torch"),
    pytest.param(native.PLAIN, id="native", marks=needs_native),
    pytest.param(native.CERTAIN, id="native_certain", marks=needs_native),
    pytest.param(native.LIKELY, id="native_int8", marks=needs_native),
]
