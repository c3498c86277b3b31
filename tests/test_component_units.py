"""Laws of components of weight matrices as units."""

from pathlib import Path

import pytest
import torch
from experiment_parts import small_target

from nndecomp.config.schema import DType, TargetConfig, TargetKind
from nndecomp.config.spd import ImportanceConfig, ImportanceKind
from nndecomp.decompositions.spd.components import masked
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.errors import SettingError
from nndecomp.evaluation.component_units import component_units
from nndecomp.targets.base import Target
from nndecomp.targets.load import load_target
from nndecomp.targets.maps import find_maps
from nndecomp.tokens.batch import Row, TokenBatch

C = 12


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    path: Path = small_target(tmp_path_factory.mktemp("model"))
    cfg = TargetConfig(kind=TargetKind.llama_simple_mlp, path=str(path), dtype=DType.float32)
    return load_target(cfg, torch.device("cpu"))


def decomposed(
    target: Target, *patterns: str, kind: ImportanceKind = ImportanceKind.shared_mlp
) -> ParameterDecomposition:
    maps = find_maps(target.module(), dict.fromkeys(patterns, C))
    return ParameterDecomposition(maps, ImportanceConfig(kind=kind, hidden=[8]), seed=0)


def text() -> tuple[TokenBatch, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    batch = TokenBatch.of([Row(torch.randint(264, (n,), generator=draw).tolist(), False) for n in (9, 5, 9)], 9, pad=0)
    return batch, batch.mask


def test_components_live_where_the_model_has_sites_and_else_in_spaces_of_their_own(target: Target):
    batch, keep = text()
    units = component_units(target, decomposed(target, "h.*.mlp.c_fc", "h.*.mlp.down_proj"), batch, keep, 2)
    assert [each.name for each in units] == [f"L{i}.{part}" for part in ("c_fc", "down_proj") for i in range(4)]
    fc, down = units[1], units[5]
    assert list(fc.reads) == ["L1.mlp_in"] and list(fc.writes) == ["h.1.mlp.c_fc:out"]
    assert list(down.reads) == ["L1.mlp_hidden"] and list(down.writes) == ["L1.mlp_out"]
    assert (fc.layer, fc.part, fc.signed, fc.n) == (1, "c_fc", False, C)


def test_what_active_components_write_is_the_map_masked_by_its_importances(target: Target):
    batch, keep = text()
    decomposition = decomposed(target, "h.2.mlp.down_proj")
    (units,) = component_units(target, decomposition, batch, keep, 2)
    name, own = next(iter(decomposition.components.items()))
    inputs, outputs = {}, {}
    with torch.no_grad(), decomposition.recording(inputs, outputs):
        target.final(batch.tokens)
        g = decomposition.importances(inputs)[name].g
        z = masked(own, inputs[name], outputs[name], None, g, None, None)
    written = torch.from_numpy(units.activity.codes.toarray()) @ units.writes["L2.mlp_out"].double()
    torch.testing.assert_close(written.float(), z[keep], atol=1e-5, rtol=1e-4)
    assert units.activity.firings.sum() == (g[keep] > 0).sum() > 0


def test_maps_of_no_layer_are_refused(target: Target):
    batch, keep = text()
    with pytest.raises(SettingError, match="wte, which belongs to no one layer"):
        component_units(target, decomposed(target, "wte", kind=ImportanceKind.mlp), batch, keep, 2)
