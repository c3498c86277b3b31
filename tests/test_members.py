"""Laws of the grid of decompositions that one run trains together."""

import pytest

from nndecomp import build
from nndecomp.config.compose import compose, dump, load
from nndecomp.config.schema import Activation, Architecture
from nndecomp.errors import SettingError

NAME = "exp_000_quickstart"
ONE = "compare.architectures=[per_layer_transcoder]"


def test_variants_differ_from_the_run_by_what_they_say_and_share_its_k():
    skip = "+compare.variants.skip={skip: true, n_features: 32}"
    free = "+compare.variants.jump={activation: jumprelu, k: null, jumprelu_threshold: 0.5}"
    found = build.decompositions(compose(NAME, ["compare.architectures=[neurons]", "compare.k=[4,8]", skip, free]))
    assert list(found) == ["neurons_k4", "neurons_k8", "skip_k4", "skip_k8", "jump"]
    assert [found[name].skip for name in found] == [False, False, True, True, False]
    assert (found["skip_k8"].k, found["skip_k8"].n_features, found["jump"].n_features) == (8, 32, 512)
    assert found["jump"].activation is Activation.jumprelu and found["jump"].k is None


def test_every_member_but_neurons_is_made_once_for_each_seed():
    grid = ["compare.architectures=[per_layer_transcoder,neurons]", "compare.k=[4]", "+compare.seeds=[3,5]"]
    found = build.members(compose(NAME, grid))
    assert {name: member.seed for name, member in found.items()} == {
        "per_layer_transcoder_k4_seed3": 3,
        "per_layer_transcoder_k4_seed5": 5,
        "neurons_k4": 0,
    }
    assert found["neurons_k4"].config.architecture is Architecture.neurons


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["+compare.variants.a={typo: 1}"], "typo"),
        (["+compare.variants.a={k: 4, n_features: 2}"], "decomposition.k=4 must lie between 1 and"),
        ([ONE, "+compare.seeds=[1,1]"], "compare.seeds=[1, 1] must name each once"),
        (["compare.architectures=[]"], "must name at least one between them"),
        ([ONE, "compare.k=[]"], "compare.k=[] must name at least one"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_in_one_sentence(overrides: list[str], said: str):
    with pytest.raises(SettingError) as refused:
        build.decompositions(compose(NAME, overrides))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_saved_grid_is_read_back(tmp_path):
    cfg = compose(NAME, ["+compare.variants.skip={skip: true}", "+compare.seeds=[1,2]"])
    (tmp_path / "config.yaml").write_text(dump(cfg))
    assert build.members(load(tmp_path / "config.yaml")) == build.members(cfg)
