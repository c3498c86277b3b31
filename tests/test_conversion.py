"""Conversions compute what they were made from."""

import pytest
import torch
from decomposition_parts import ACTIVATIONS, ARCHITECTURES, GLU, fits, inputs, settled

from nndecomp.config.schema import CodeNormalisation, Scope
from nndecomp.decompositions.conversion import to_jumprelu, to_pursuit, with_unit_norm_decoder
from nndecomp.errors import SettingError

PARTS = ("centred_sae", "skip_cross_layer_transcoder", "dedicated_feature_crosscoder", "skip_molt")


def folded(**settings):
    made = settled(**settings)
    s, m = (torch.linspace(*ends, made.b_dec.numel()).double() for ends in ((1, 3), (-1, 1)))
    reads = made.read_layout.width
    made.fold(s[:reads], s, m[:reads], m)
    return made


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("architecture", PARTS)
def test_batchtopk_becomes_jumprelu_exactly_folded_or_not(architecture, scope):
    settings = ARCHITECTURES[architecture] | ACTIVATIONS["batchtopk"]
    settings = settings | {"scope": scope, "code_normalisation": CodeNormalisation.crosscoder}
    for made in (settled(**settings), folded(**settings)):
        x = inputs(made)
        y_hat, codes = to_jumprelu(made)(x)
        torch.testing.assert_close(y_hat, made(x)[0])
        assert torch.equal(codes.counts(), made(x)[1].counts())


@pytest.mark.parametrize("scope", Scope)
def test_topk_becomes_jumprelu_with_as_many_active_features(scope):
    made = settled(**ARCHITECTURES["per_layer_sae"], **ACTIVATIONS["topk"], scope=scope)
    x = inputs(made, 200)
    assert int(to_jumprelu(made, x).encode(x).counts().sum()) == int(made.encode(x).counts().sum())


@pytest.mark.parametrize("encoder", [{}, GLU], ids=["linear", "glu"])
@pytest.mark.parametrize(
    ("architecture", "activation"), [(part, each) for part in PARTS for each in ACTIVATIONS if fits(part, each)]
)
def test_decoders_of_norm_1_leave_the_function_and_what_is_active(architecture, activation, encoder):
    """A peer divides the decoder alone, which is another function."""
    for kind in (CodeNormalisation.none, CodeNormalisation.sae):
        settings = ARCHITECTURES[architecture] | ACTIVATIONS[activation] | encoder | {"code_normalisation": kind}
        made = folded(**settings)
        unit, x = with_unit_norm_decoder(made), inputs(made)
        torch.testing.assert_close(unit(x)[0], made(x)[0])
        assert torch.equal(unit(x)[1].counts(), made(x)[1].counts())
        norms = torch.cat([bank.scale(CodeNormalisation.sae, (1.0, 0.0)) for bank in unit.banks])
        torch.testing.assert_close(norms.detach(), torch.ones_like(norms))


def test_a_pursuit_explains_more_than_the_encoder_with_as_many_features():
    made = settled(**ARCHITECTURES["per_layer_sae"], **ACTIVATIONS["topk"])
    x, pursued = inputs(made), to_pursuit(made, 3)
    assert (pursued.encode(x).counts() <= 3).all()
    error = lambda each: float((x - each(x)[0]).detach().square().sum())  # noqa: E731
    assert error(pursued) < error(made)
    assert error(to_pursuit(made, 6)) < error(pursued)


def test_conversions_that_cannot_be_are_refused():
    with pytest.raises(SettingError, match="activation=relu does not become jumprelu"):
        to_jumprelu(settled(**ARCHITECTURES["sae"], **ACTIVATIONS["relu"]))
    with pytest.raises(SettingError, match="write what they read"):
        to_pursuit(settled(**ARCHITECTURES["transcoder"]), 3)
    with pytest.raises(SettingError, match="share an encoder"):
        with_unit_norm_decoder(settled(**ARCHITECTURES["decoupled_crosscoder"]))
