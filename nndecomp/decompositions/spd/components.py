"""Rank-one components of one linear map y = x M + b, and the map with some of them masked.

    M ~ V U         V [d_in, C], U [C, d_out]; component c is the matrix of rank one V_c U_c
    a = x V         [..., C]: what each component reads (of an embedding: rows of V)
    D = M - V U     what the components leave over
    z = (a * m) U + mu x D + b

Since x D = y - b - a U, the leftover costs no product with D: z = (a * (m - mu)) U + mu y + (1 - mu) b. With m = mu = 1 that
is y itself, bit for bit. D is not constant: its gradient reaches V and U, here through a U.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nndecomp.targets.maps import LinearMap, MapKind


class Components(nn.Module):
    def __init__(self, linear: LinearMap, n_components: int, generator: torch.Generator) -> None:
        """V ~ N(0, 1 / d_in), U ~ N(0, 1 / C)."""
        super().__init__()
        self.kind, self.n_components = linear.kind, n_components
        device = linear.weight.device
        V = torch.randn(linear.d_in, n_components, generator=generator) / linear.d_in**0.5
        U = torch.randn(n_components, linear.d_out, generator=generator) / n_components**0.5
        self.V = nn.Parameter(V.to(device))
        self.U = nn.Parameter(U.to(device))

    def read(self, x: Float[Tensor, "*rows d_in"] | Int[Tensor, "*rows"]) -> Float[Tensor, "*rows C"]:
        return self.V[x] if self.kind is MapKind.embedding else x.to(self.V.dtype) @ self.V

    def product(self) -> Float[Tensor, "d_in d_out"]:
        return self.V @ self.U

    def norms(self) -> Float[Tensor, " C"]:
        """Frobenius norm of each component, |V_c| |U_c|."""
        return self.V.norm(dim=0) * self.U.norm(dim=1)


class TransposedComponents(Components):
    """Of a map with the transposed matrix of another: V and U are U^T and V^T of the other's, in the same memory.

    It has no parameters of its own: those of the other get the gradients of both uses.
    """

    def __init__(self, linear: LinearMap, other: Components) -> None:
        nn.Module.__init__(self)
        self.kind, self.n_components = linear.kind, other.n_components
        self._other = (other,)  # in a tuple, so that its parameters are not listed a second time as this module's

    @property
    def V(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._other[0].U.T

    @property
    def U(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._other[0].V.T


def masked(
    components: Components,
    x: Float[Tensor, "*rows d_in"] | Int[Tensor, "*rows"],
    y: Float[Tensor, "*rows d_out"],
    bias: Float[Tensor, " d_out"] | None,
    m: Float[Tensor, "*masked C"],
    mu: Float[Tensor, "*leftover"] | None,
    route: Bool[Tensor, "*routed"] | None,
    a: Float[Tensor, "*rows C"] | None = None,
) -> Float[Tensor, "*rows d_out"]:
    """z where `route` says so (null: everywhere), and y, the map's own output on the same x, elsewhere. mu null: 0.

    a: what the components read of x, where it is known.
    """
    a = components.read(x) if a is None else a
    if mu is None:
        z = (a * m) @ components.U
        z = z if bias is None else z + bias
    else:
        mu = mu.unsqueeze(-1)
        z = (a * (m - mu)) @ components.U + mu * y
        z = z if bias is None else z + (1 - mu) * bias  # not y - bias and back: that would round
    return z if route is None else torch.where(route.unsqueeze(-1), z.to(y.dtype), y)
