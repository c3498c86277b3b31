"""Components of linear maps: what they sum to, what they leave over, and where they stand in for their map."""

import pytest
import torch
from spd_parts import chain, decomposed
from tiny_models import save_tiny_model, tiny_tokens
from torch import Tensor, nn
from torch.testing import assert_close

from nndecomp.config.spd import ImportanceConfig, ImportanceKind
from nndecomp.decompositions.spd.components import Components, masked
from nndecomp.decompositions.spd.masks import Mask
from nndecomp.errors import SettingError
from nndecomp.targets.hooks import Side, Tap, substituting
from nndecomp.targets.maps import LinearMap, MapKind, find_maps, kind_of, linear_map

ROWS = (3, 4)
C = 5


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(6, 4)
    nn.init.normal_(module.bias)
    return module


KINDS = {
    "linear": (lambda: nn.Linear(4, 6), MapKind.linear, (4, 6)),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), MapKind.linear, (4, 6)),
    "conv1d": (conv1d, MapKind.conv1d, (4, 6)),
    "embedding": (lambda: nn.Embedding(9, 6), MapKind.embedding, (9, 6)),
}


@pytest.fixture(params=KINDS)
def linear(request: pytest.FixtureRequest) -> LinearMap:
    make, kind, sizes = KINDS[request.param]
    found = linear_map("m", frozen(make()))
    assert (found.kind, found.d_in, found.d_out) == (kind, *sizes)
    return found


def made(linear: LinearMap, dtype: torch.dtype = torch.float32) -> Components:
    return Components(linear, C, torch.Generator().manual_seed(3)).to(dtype)


def input_of(linear: LinearMap) -> Tensor:
    return torch.randint(linear.d_in, ROWS) if linear.kind is MapKind.embedding else torch.randn(*ROWS, linear.d_in)


def dense(linear: LinearMap, x: Tensor) -> Tensor:
    """Rows that a matrix [d_in, ...] multiplies: an embedding's are one-hot."""
    return nn.functional.one_hot(x, linear.d_in).float() if linear.kind is MapKind.embedding else x


def test_the_matrix_of_every_kind_is_what_the_module_multiplies_by(linear: LinearMap):
    """The fault: a Conv1D or an embedding read as a Linear, [d_out, d_in] for [d_in, d_out]."""
    x = input_of(linear)
    bias = linear.bias()
    expected = dense(linear, x) @ linear.matrix() + (0 if bias is None else bias)
    assert_close(linear.module(x), expected)


def test_V_reads_and_U_writes_by_hand():
    """The fault: V as [C, d_in] or U as [d_out, C]; W is [d_out, d_in], V [d_in, C], U [C, d_out]."""
    module = nn.Linear(2, 3, bias=False)
    own = Components(linear_map("m", frozen(module)), 1, torch.Generator())
    assert own.V.shape == (2, 1) and own.U.shape == (1, 3)
    own.V.data, own.U.data = torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0, 20.0, 30.0]])
    x = torch.tensor([[3.0, 4.0]])
    assert own.read(x).tolist() == [[11.0]]
    z = masked(own, x, module(x), None, torch.full((1, 1), 0.5), None, None)
    assert z.tolist() == [[55.0, 110.0, 165.0]]
    assert own.product().tolist() == [[10.0, 20.0, 30.0], [20.0, 40.0, 60.0]]
    assert own.norms().item() == pytest.approx(5**0.5 * 1400**0.5)


def test_all_components_and_all_that_they_leave_over_are_the_map_bit_for_bit(linear: LinearMap):
    x = input_of(linear)
    y = linear.module(x)
    z = masked(made(linear), x, y, linear.bias(), torch.ones(*ROWS, C), torch.ones(ROWS), None)
    assert torch.equal(z, y)


def test_the_leftover_is_what_a_dense_difference_of_matrices_does_and_so_are_its_gradients(linear: LinearMap):
    """The fault: what is left over detached, so that V and U do not learn through it. Biases are never masked."""
    x, m, mu = input_of(linear), torch.rand(*ROWS, C), torch.rand(ROWS)
    bias = linear.bias()
    own, upstream = made(linear), torch.randn(*ROWS, linear.d_out)
    z = masked(own, x, linear.module(x), bias, m, mu, None)
    found = torch.autograd.grad((z * upstream).sum(), [own.V, own.U])

    rows, D = dense(linear, x), linear.matrix() - own.V @ own.U
    explicit = ((rows @ own.V) * m) @ own.U + mu.unsqueeze(-1) * (rows @ D) + (0 if bias is None else bias)
    assert_close(z, explicit)
    expected = torch.autograd.grad((explicit * upstream).sum(), [own.V, own.U])
    assert_close(found, expected)
    without = torch.autograd.grad(((rows @ own.V * m) @ own.U * upstream).sum(), [own.V, own.U])
    assert not torch.allclose(found[0], without[0]), "the leftover's gradient is missing"


def test_masks_and_inputs_have_the_explicit_forms_gradients(linear: LinearMap):
    m, mu = torch.rand(*ROWS, C, requires_grad=True), torch.rand(ROWS, requires_grad=True)
    x, own = input_of(linear), made(linear)
    x = x.requires_grad_() if x.is_floating_point() else x
    leaves = [each for each in (m, mu, x) if each.requires_grad]
    upstream, bias = torch.randn(*ROWS, linear.d_out), linear.bias()
    z = masked(own, x, linear.module(x), bias, m, mu, None)
    found = torch.autograd.grad((z * upstream).sum(), leaves)
    rows = dense(linear, x)
    D = linear.matrix() - own.product()
    explicit = ((rows @ own.V) * m) @ own.U + mu.unsqueeze(-1) * (rows @ D)
    assert_close(found, torch.autograd.grad((explicit * upstream).sum(), leaves))


def test_without_a_leftover_masked_components_and_the_whole_bias_are_all(linear: LinearMap):
    x, m, own, bias = input_of(linear), torch.rand(*ROWS, C), made(linear), linear.bias()
    z = masked(own, x, linear.module(x), bias, m, None, None)
    assert_close(z, (dense(linear, x) @ own.V * m) @ own.U + (0 if bias is None else bias))
    nothing = masked(own, x, linear.module(x), bias, torch.zeros(*ROWS, C), None, None)
    assert_close(nothing, torch.zeros(*ROWS, linear.d_out) + (0 if bias is None else bias))


def test_where_components_do_not_stand_in_the_maps_own_output_is(linear: LinearMap):
    x, m, own, route = input_of(linear), torch.rand(*ROWS, C), made(linear), torch.rand(ROWS) < 0.5
    y, bias = linear.module(x), linear.bias()
    routed = masked(own, x, y, bias, m, None, route)
    everywhere = masked(own, x, y, bias, m, None, None)
    assert 0 < route.sum() < route.numel()
    assert torch.equal(routed[~route], y[~route]) and torch.equal(routed[route], everywhere[route])


def test_bfloat16_models_get_the_leftover_to_their_own_precision():
    """a U and y nearly cancel in the leftover: the identity loses no more than one product in bfloat16 does."""
    linear = linear_map("m", frozen(nn.Linear(64, 64)))
    own = Components(linear, 64, torch.Generator().manual_seed(0))
    own.V.data, own.U.data = linear.matrix().clone(), torch.eye(64) + 1e-3 * torch.randn(64, 64)
    x, m, mu = torch.randn(*ROWS, 64), torch.rand(*ROWS, 64), torch.rand(ROWS)
    exact = masked(own, x, linear.module(x), linear.bias(), m, mu, None)
    with torch.autocast("cpu", torch.bfloat16):
        rough = masked(own, x, linear.module(x), linear.bias(), m, mu, None)
    rough, exact = rough.detach(), exact.detach()
    assert float((rough - exact).abs().max()) < 4 * 2**-8 * float(exact.abs().max())


def test_components_start_as_gaussians_of_the_right_size():
    own = Components(linear_map("m", frozen(nn.Linear(400, 50))), 100, torch.Generator().manual_seed(0))
    assert float(own.V.detach().std()) == pytest.approx(400**-0.5, rel=0.02)
    assert float(own.U.detach().std()) == pytest.approx(100**-0.5, rel=0.03)
    assert abs(float(own.V.detach().mean())) < 0.002 and abs(float(own.U.detach().mean())) < 0.01


# --- installed in a model ---


def everything(gates: dict[str, int], rows: tuple[int, ...], delta: bool) -> dict[str, Mask]:
    mu = torch.ones(rows) if delta else None
    return {name: Mask(torch.ones(*rows, n), mu, None) for name, n in gates.items()}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    from transformers import AutoModelForCausalLM

    directory = save_tiny_model("gpt2", tmp_path_factory.mktemp("gpt2"))
    return frozen(AutoModelForCausalLM.from_pretrained(directory))


def test_every_map_of_a_gpt2_replaced_by_all_its_components_leaves_its_logits_bit_for_bit(gpt2: nn.Module):
    patterns = {"transformer.wte": 7, "transformer.wpe": 3, "transformer.h.*.attn.c_*": 4, "transformer.h.*.mlp.c_*": 5}
    maps = find_maps(gpt2, patterns)
    assert {each.kind for each in maps} == {MapKind.embedding, MapKind.conv1d} and len(maps) == 2 + 3 * 4
    decomposition = decomposed(gpt2, patterns, ImportanceConfig(kind=ImportanceKind.mlp))
    tokens = tiny_tokens()
    clean = gpt2(tokens).logits
    sizes = {each.name: n for each, n in maps.items()}
    masks = everything(sizes, tuple(tokens.shape), delta=True)
    masks["transformer.wpe"] = Mask(torch.ones(1, tokens.shape[1], 3), torch.ones(1, tokens.shape[1]), None)
    with decomposition.installed(masks):
        assert torch.equal(gpt2(tokens).logits, clean)
    half = masks | {"transformer.h.1.mlp.c_fc": Mask(torch.full((*tokens.shape, 5), 0.5), None, None)}
    with decomposition.installed(half):
        assert not torch.allclose(gpt2(tokens).logits, clean, atol=1e-2)
    assert torch.equal(gpt2(tokens).logits, clean)


def test_components_that_are_exact_need_no_leftover():
    model = chain(4, 6, 3)
    decomposition = decomposed(model, {"0": 4, "2": 6})
    for linear, own in zip(decomposition.sizes, decomposition.components.values(), strict=True):
        own.V.data, own.U.data = torch.eye(linear.d_in), linear.matrix().clone()
    x = torch.randn(7, 4)
    with decomposition.installed(everything({"0": 4, "2": 6}, (7,), delta=False)):
        found = model(x)
    assert_close(found, model(x))
    assert not any(bool(D.any()) for D in decomposition.leftover().values())


def test_a_later_map_works_on_what_the_earlier_ones_changed_routed_or_not():
    """The fault: positions that no component stands in at restored to the undisturbed run, rather than W on what arrives."""
    model = chain(4, 6, 3)
    decomposition = decomposed(model, {"0": 5, "2": 5})
    own = decomposition.components
    x, m = torch.randn(8, 4), torch.rand(8, 5)
    nowhere, everywhere = torch.zeros(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)
    with decomposition.installed({"0": Mask(m, None, everywhere), "2": Mask(m, None, nowhere)}):
        found = model(x)
    first, last = model[0], model[2]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    arrives = torch.relu(((x @ own["0"].V) * m) @ own["0"].U + first.bias)
    assert_close(found, arrives @ last.weight.T + last.bias)
    assert not torch.allclose(found, model(x))


def test_inputs_and_outputs_are_recorded_as_they_are_and_hooks_are_gone():
    model = chain(4, 6, 3)
    decomposition = decomposed(model, {"0": 5, "2": 5})
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    x = torch.randn(8, 4)
    with decomposition.recording(inputs, outputs):
        y = model(x)
    assert torch.equal(inputs["0"], x) and torch.equal(inputs["2"], torch.relu(model[0](x)))
    assert torch.equal(outputs["0"], model[0](x)) and torch.equal(outputs["2"], y)
    with pytest.raises(ZeroDivisionError), decomposition.installed(everything({"0": 5}, (8,), delta=False)):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())


def test_a_map_that_never_runs_or_runs_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.spare = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x)))

    model = frozen(Twice())
    with (
        pytest.raises(SettingError, match="spd.maps names spare"),
        decomposed(model, {"b": 2, "spare": 2}).recording({}),
    ):
        model(torch.randn(2, 3))
    with pytest.raises(AssertionError, match="a runs more than once"), decomposed(model, {"a": 2}).recording({}):
        model(torch.randn(2, 3))


def test_a_substitute_of_another_shape_is_refused():
    model = chain(4, 6)
    with (
        pytest.raises(AssertionError, match=r"\(2, 1\) stands where \(2, 6\)"),
        substituting({Tap(model[0], Side.output): lambda x, y: y[:, :1]}),
    ):
        model(torch.randn(2, 4))


def test_a_model_that_is_trained_is_refused():
    """The fault: a target whose weights move with the components that should explain them."""
    model = chain(4, 6)
    model[0].requires_grad_(True)
    with pytest.raises(AssertionError, match="freeze the model"):
        decomposed(model, {"0": 3})


# --- which maps ---


def test_maps_come_in_the_order_of_the_patterns_then_of_the_model():
    found = find_maps(chain(2, 3, 4, 5), {"4": 7, "[02]": 9})
    assert [(each.name, n) for each, n in found.items()] == [("4", 7), ("0", 9), ("2", 9)]


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [
        ({"layers.*.mlp": 3}, "spd.maps: layers.*.mlp matches none of the target's linear maps: *"),
        ({"1": 3}, "spd.maps: 1 matches 1, a ReLU, which is no linear map (Linear, Conv1D or Embedding)"),
        ({"[02]": 3, "0": 4}, "spd.maps: 0 is matched by [02] and by 0"),
    ],
)
def test_patterns_that_cannot_work_are_refused_in_a_sentence(patterns: dict[str, int], sentence: str):
    with pytest.raises(SettingError) as refused:
        find_maps(chain(2, 3, 4), patterns)
    assert str(refused.value) == sentence


def test_a_module_that_computes_more_than_its_kind_is_no_linear_map():
    """The fault: Gemma's embedding, which scales its rows, decomposed as its bare weight."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    class Renamed(nn.Linear):
        pass

    assert kind_of(Gemma3TextScaledWordEmbedding(9, 4, 0, embed_scale=2.0)) is None
    assert kind_of(Renamed(2, 3)) is MapKind.linear


@pytest.mark.parametrize("kind", [each for each in ImportanceKind if each is not ImportanceKind.mlp])
def test_importances_of_tokens_see_what_components_read_alone(kind: ImportanceKind):
    model = frozen(nn.Sequential(nn.Embedding(9, 4)))
    with pytest.raises(SettingError, match=f"spd.importance.kind={kind.value} .* 0, whose input is a token; .*=mlp$"):
        decomposed(model, {"0": 3}, ImportanceConfig(kind=kind))
