"""One matrix used twice has one set of components: transposed, in one memory, trained by both uses."""

from pathlib import Path

import pytest
import torch
from spd_parts import loss_term, settings
from torch import Tensor, nn
from torch.testing import assert_close

from nndecomp.config.spd import ImportanceConfig, ImportanceKind, Masks, Routing, SPDConfig
from nndecomp.decompositions.parts import parts_of_parameters
from nndecomp.decompositions.spd.components import Components
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.decompositions.spd.pretrained import load_parameters, save_parameters
from nndecomp.errors import SettingError
from nndecomp.targets.maps import find_maps
from nndecomp.training.parameters import SPDObjective
from nndecomp.training.subjects import Vectors

TIE = {"down": "up"}
MLP = ImportanceConfig(kind=ImportanceKind.mlp, hidden=[4])


class Twice(nn.Module):
    """relu(x W^T) W + b, W [3, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 3, bias=False), nn.Linear(3, 5)
        with torch.no_grad():
            self.down.weight.copy_(self.up.weight.T)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def model() -> Twice:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Twice().eval().requires_grad_(False)


def made(own: nn.Module, sizes: dict[str, int], tie: dict[str, str] | None = None) -> ParameterDecomposition:
    return ParameterDecomposition(find_maps(own, sizes), MLP, 0, tie)


@pytest.mark.parametrize("order", [("up", "down"), ("down", "up")])
def test_components_of_a_tied_map_are_the_others_transposed_in_the_same_memory(order: tuple[str, str]):
    own = made(model(), dict.fromkeys(order, 4), TIE)
    up, down = own.components["up"], own.components["down"]
    assert list(own.components) == list(order)
    assert (up.V.shape, up.U.shape, down.V.shape, down.U.shape) == ((5, 4), (4, 3), (3, 4), (4, 5))
    assert down.V.data_ptr() == up.U.data_ptr() and down.U.data_ptr() == up.V.data_ptr()
    assert_close(down.product(), up.product().T)
    with torch.no_grad():
        up.U[2, 1] = 7.0
    assert down.V[1, 2] == 7
    names = [name for name, _ in own.banks.named_parameters()]
    assert names == [f"{order.index('up')}.V", f"{order.index('up')}.U"], "they are listed, and trained, once"
    parts = parts_of_parameters(own, order)
    assert parts.whole.parameters == 5 * 4 + 4 * 3 + 2 * 4 * (4 + 4 + 4 + 1)
    assert [each.parameters for each in parts.parts.values()] == [None, None], "they are not of one map alone"


def objective(tie: dict[str, str]) -> SPDObjective:
    cfg: SPDConfig = settings(
        {"all": loss_term(Masks.stochastic), "one": loss_term(Masks.stochastic, routing=Routing.layerwise)},
        maps={"up": 4, "down": 4},
        importance=MLP,
        tie=tie,
    )
    own = model()
    return SPDObjective(
        ParameterDecomposition(find_maps(own, cfg.maps), cfg.importance, 0, cfg.tie), Vectors(own), cfg, (16,)
    )


def test_tied_components_get_the_gradients_of_both_uses():
    """Against components that share nothing and happen to be each other's transposed."""
    tied, free = objective(TIE), objective({})
    with torch.no_grad():
        for name in ("up", "down"):
            for key in ("V", "U"):
                getattr(free.decomposition.components[name], key).copy_(
                    getattr(tied.decomposition.components[name], key)
                )
        for ours, theirs in zip(
            tied.decomposition.importance.parameters(), free.decomposition.importance.parameters(), strict=True
        ):
            theirs.copy_(ours)
    x = torch.rand(16, 5, generator=torch.Generator().manual_seed(1))
    values = []
    for each in (tied, free):
        torch.manual_seed(6)
        loss, _ = each.loss(x, 0.5)
        loss.backward()
        values.append(loss.detach())
    assert_close(values[0], values[1])
    up, (theirs_up, theirs_down) = tied.decomposition.components["up"], free.decomposition.components.values()
    for ours, first, second in ((up.V, theirs_up.V, theirs_down.U), (up.U, theirs_up.U, theirs_down.V)):
        assert ours.grad is not None and first.grad is not None and second.grad is not None
        assert (first.grad != 0).any() and (second.grad != 0).any()
        assert_close(ours.grad, first.grad + second.grad.T)


def test_after_warm_up_both_maps_are_fitted():
    tied = objective(TIE)
    tied.cfg.warmup_steps, tied.cfg.warmup_lr = 300, 0.02
    assert tied.start("tied") < 1e-4
    for name, own in tied.decomposition.components.items():
        assert_close(own.product(), tied.decomposition.maps[name].matrix(), atol=0.05, rtol=0)


def test_tied_components_are_read_back_tied(tmp_path: Path):
    own = made(model(), {"down": 4, "up": 4}, TIE)
    save_parameters(own, tmp_path / "spd", "twice")
    again = load_parameters(tmp_path / "spd", model())
    assert again.tie == TIE and again.state_dict().keys() == own.state_dict().keys()
    for name, theirs in again.components.items():
        ours = own.components[name]
        assert isinstance(theirs, Components)
        assert torch.equal(ours.V, theirs.V) and torch.equal(ours.U, theirs.U)
    assert again.components["down"].V.data_ptr() == again.components["up"].U.data_ptr()


@pytest.mark.parametrize(
    ("sizes", "tie", "sentence"),
    [
        ({"up": 4}, TIE, "spd.tie={down: up} names down, but spd.maps has up"),
        ({"up": 4, "down": 3}, TIE, "spd.tie={down: up} shares components, but spd.maps has 3 for down and 4 for up"),
        (
            {"up": 4, "down": 4},
            {"down": "down"},
            "spd.tie={down: down} wants a map with the other's transposed matrix, but down is 3 to 5 and down 3 to 5",
        ),
    ],
)
def test_ties_that_cannot_be_are_refused_in_a_sentence(sizes: dict[str, int], tie: dict[str, str], sentence: str):
    with pytest.raises(SettingError) as refused:
        made(model(), sizes, tie)
    assert str(refused.value) == sentence


def test_maps_whose_matrices_differ_are_not_tied():
    """The fault: components that are asked to be two things at once."""
    own = model()
    with torch.no_grad():
        own.down.weight[0, 0] += 1
    with pytest.raises(SettingError, match="but the model has other numbers in down than in up$"):
        made(own, {"up": 4, "down": 4}, TIE)


def test_a_chain_of_ties_is_refused():
    with pytest.raises(SettingError, match="names a map that is itself tied"):
        settings({"all": loss_term(Masks.stochastic)}, tie={"a": "b", "b": "c"})
