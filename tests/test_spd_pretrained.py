"""A parameter decomposition on disk is read back bit for bit, of the model that it is of and of no other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from spd_parts import SHARED, chain, decomposed
from torch import Tensor, nn

from nndecomp.config.spd import ImportanceConfig, ImportanceKind
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.decompositions.spd.pretrained import load_parameters, save_parameters
from nndecomp.errors import SettingError

WIDTHS = (4, 6, 6, 3)


def made(model: nn.Module, kind: ImportanceKind) -> ParameterDecomposition:
    """Its patterns are not in the order of names, and every number is random."""
    cfg = ImportanceConfig(kind=kind, hidden=[5], d_model=8, n_blocks=1, n_heads=2, d_mlp=6, causal=False)
    decomposition = decomposed(model, {"4": 5, "0": 3, "2": 4}, cfg)
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in decomposition.parameters():
            parameter.normal_(generator=draw)
    return decomposition


@pytest.mark.parametrize("kind", ImportanceKind)
def test_what_is_saved_is_read_back_bit_for_bit(kind: ImportanceKind, tmp_path: Path):
    """The fault: maps, or the order of global inputs, that come back in another order than they were trained in."""
    model = chain(*WIDTHS)
    before = made(model, kind)
    save_parameters(before, tmp_path / "spd", "chain")
    torch.rand(5)
    after = load_parameters(tmp_path / "spd", chain(*WIDTHS))
    assert list(after.maps) == list(before.maps) == ["4", "0", "2"] and after.cfg == before.cfg
    ours, theirs = before.state_dict(), after.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    x = {name: torch.randn(2, 3, width) for name, width in (("0", 4), ("2", 6), ("4", 6))}
    q: list[dict[str, Tensor]] = [{n: e.q for n, e in each.importances(x).items()} for each in (before, after)]
    assert all(torch.equal(q[0][name], q[1][name]) for name in x)
    assert not after.training


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (chain(4, 6, 6), "decomposes 4, a linear map that this model does not have"),
        (
            nn.Sequential(*list(chain(*WIDTHS))[:4], nn.ReLU()),
            "decomposes 4, a linear map that this model does not have",
        ),
        (chain(4, 6, 6, 2), "decomposes 4 as .* but this model's is .*'d_out': 2"),
        (None, "of norm .* but this model's has norm .*: it is another model than chain"),
    ],
)
def test_another_model_is_refused(other: nn.Module | None, sentence: str, tmp_path: Path):
    save_parameters(decomposed(chain(*WIDTHS), {"4": 5, "0": 3}, SHARED), tmp_path / "spd", "chain")
    if other is None:
        other = chain(*WIDTHS)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
    with pytest.raises(SettingError, match=sentence):
        load_parameters(tmp_path / "spd", other.requires_grad_(False))


def test_what_is_no_parameter_decomposition_is_refused(tmp_path: Path):
    save_parameters(decomposed(chain(*WIDTHS), {"0": 3}, SHARED), tmp_path / "spd", "chain")
    path = tmp_path / "spd/config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"format": "nndecomp.SparseDictionary"}))
    with pytest.raises(SettingError):
        load_parameters(tmp_path / "spd", chain(*WIDTHS))
