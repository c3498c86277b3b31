"""Dictionaries in another form: measured with a pursuit in place of their encoder, and converted in a notebook."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nndecomp
from nndecomp import build
from nndecomp.config.compose import compose
from nndecomp.config.schema import Activation, Architecture, DecompositionConfig
from nndecomp.decompositions.architectures import build_dictionary
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.errors import SettingError
from nndecomp.targets.base import Target

TEXTS = ["def area(radius):", "return pi * radius ** 2"]


@pytest.fixture(scope="module")
def target() -> Target:
    return nndecomp.load_target("tiny")


def made(target: Target, architecture: Architecture, activation: Activation) -> SparseDictionary:
    sites = ["mlp_out"] if architecture is Architecture.per_layer_sae else ["mlp_in"]
    cfg = DecompositionConfig(
        architecture=architecture, reads=sites, writes=["mlp_out"], n_features=64, activation=activation, k=4
    )
    return build_dictionary(cfg, target.shape, 0, target.device, target.name).eval()


def test_what_can_be_pursued_is_measured_once_more_for_every_k(target: Target):
    named = {
        "sae": made(target, Architecture.per_layer_sae, Activation.topk),
        "transcoder": made(target, Architecture.per_layer_transcoder, Activation.topk),
    }
    settings = ["tokens.seq_len=32", "evaluation.n_seqs=4", "evaluation.patched=[all]", "evaluation.bootstrap=0"]
    rows = nndecomp.evaluate(target, named, "evaluation.pursuit=[4,8]", *settings)
    assert list(dict.fromkeys(rows.name)) == ["sae", "transcoder", "sae_pursuit4", "sae_pursuit8"]
    clean = rows[(rows.inputs == "clean") & (rows.site == "all")]
    fvu, l0 = (clean[clean.metric == metric].set_index("name").value for metric in ("fvu", "active_per_module"))
    assert fvu["sae_pursuit8"] < fvu["sae_pursuit4"] < fvu["sae"], "of one decoder"
    assert l0["sae_pursuit4"] <= 4 and l0["sae_pursuit8"] <= 8
    pursued = rows[rows.name == "sae_pursuit8"].iloc[0]
    assert (pursued.activation, pursued.k, pursued.architecture) == ("matching_pursuit", 8, "per_layer_sae")
    alone = nndecomp.evaluate(target, {"sae": named["sae"]}, *settings)
    before = alone[(alone.metric == "ce") & (alone.inputs == "live")].value.tolist()
    assert before == rows[(rows.name == "sae") & (rows.metric == "ce") & (rows.inputs == "live")].value.tolist()


@pytest.mark.parametrize(
    ("experiment", "overrides", "sentence"),
    [
        ("exp_001_train_transcoder_pile", ["evaluation.pursuit=[8]"], "none of .* is"),
        ("exp_000_quickstart", ["evaluation.pursuit=[8,8]"], "each once"),
        ("exp_000_quickstart", ["evaluation.pursuit=[0]"], "must be positive"),
        (
            "exp_000_quickstart",
            ["evaluation.pursuit=[5000]"],
            "more features than the [0-9]+ of a group of per_layer_sae_k4",
        ),
    ],
)
def test_what_cannot_be_pursued_is_refused_before_anything_is_trained(experiment, overrides, sentence):
    with pytest.raises(SettingError, match=f"evaluation.pursuit=.*{sentence}"):
        build.check(compose(experiment, ["+scale=tiny", *overrides]), trains=True)


def test_a_run_with_saes_among_others_may_pursue():
    build.check(compose("exp_000_quickstart", ["evaluation.pursuit=[4,8]"]), trains=True)


def test_known_features_are_found_by_a_pursuit_through_a_decoder_that_holds_them():
    """The encoder reads nothing; the rows of the decoder are the features that made the rows, and a pursuit finds which."""
    asked = compose("exp_019_ground_truth", ["ground_truth.worlds=[separated]", "evaluation.pursuit=[3]"])
    build.check(asked, trains=True, patches=False)
    cfg = build.world(asked, "separated", 0)
    target, member = build.target(cfg), build.trainable(cfg)["topk"]
    assert cfg.activations.synthetic is not None
    as_many = replace(member.config, n_features=cfg.activations.synthetic.n_features)
    dictionary = build_dictionary(as_many, target.shape, 0, target.device, target.name).eval()
    known = build.truth(cfg, target, dictionary, 2000)
    with torch.no_grad():
        dictionary.banks[0].W_enc.zero_()
        ((_, directions),) = known.directions.items()
        dictionary.banks[0].W_dec.copy_(directions)
    named = {"sae": dictionary} | build.pursuits(cfg, {"sae": dictionary})
    assert list(named) == ["sae", "sae_pursuit3"]
    found = build.recovered(cfg, target, named, 2000)
    rows = build.recovery_rows(cfg, target, named, found, "separated")
    f1 = rows[(rows.metric == "f1") & (rows.site == "all")].set_index("name").value
    assert f1["sae"] == 0 and f1["sae_pursuit3"] > 0.7, "of four that fire, three are asked for"


def test_topk_becomes_jumprelu_in_a_notebook_and_is_saved_as_such(target: Target, tmp_path: Path):
    clt = made(target, Architecture.cross_layer_transcoder, Activation.topk)
    x = nndecomp.read(target, clt, TEXTS)
    converted = nndecomp.to_jumprelu(clt, x)
    assert int(converted.encode(x).counts().sum()) == int(clt.encode(x).counts().sum())
    converted.save_pretrained(tmp_path / "jumprelu")
    loaded = nndecomp.load_decomposition(tmp_path / "jumprelu")
    assert loaded.spec.activation.kind is Activation.jumprelu
    assert torch.equal(loaded(x)[0], converted(x)[0])
    unit = nndecomp.with_unit_norm_decoder(loaded)
    torch.testing.assert_close(unit(x)[0], converted(x)[0], rtol=1e-4, atol=1e-4)


def test_a_pursuit_in_a_notebook_explains_more_with_more_features(target: Target):
    sae = made(target, Architecture.per_layer_sae, Activation.topk)
    x = nndecomp.read(target, sae, TEXTS)
    errors = [float((nndecomp.to_pursuit(sae, k)(x)[0] - x).detach().square().sum()) for k in (1, 4, 16)]
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(SettingError, match="this dictionary pursues already"):
        nndecomp.to_pursuit(nndecomp.to_pursuit(sae, 2), 3)
