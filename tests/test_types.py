"""Sites and layouts."""

import pytest

from nndecomp.errors import SettingError
from nndecomp.types import Layout, Point, Site

SITES = [
    Site(0, Point.embed),
    *(Site(layer, point) for layer in (0, 3, 11) for point in Point if point is not Point.embed),
    Site(3, Point.z, 0),
    Site(3, Point.z, 12),
]


@pytest.mark.parametrize("site", SITES, ids=str)
def test_a_site_is_read_back_from_what_it_prints(site: Site) -> None:
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("hook_embed", "embed"),
        ("embed.hook_out", "embed"),
        ("blocks.0.hook_resid_pre", "L0.resid_pre"),
        ("blocks.11.hook_in", "L11.resid_pre"),
        ("blocks.3.attn.hook_in", "L3.attn_in"),
        ("blocks.3.attn.hook_z", "L3.z"),
        ("blocks.3.hook_attn_out", "L3.attn_out"),
        ("blocks.3.hook_resid_mid", "L3.resid_mid"),
        ("blocks.3.mlp.hook_in", "L3.mlp_in"),
        ("blocks.3.mlp.hook_post", "L3.mlp_hidden"),
        ("blocks.3.hook_mlp_out", "L3.mlp_out"),
        ("blocks.3.hook_out", "L3.resid_post"),
    ],
)
def test_transformer_lens_names_are_understood(hook: str, site: str) -> None:
    assert str(Site.parse(hook)) == site


@pytest.mark.parametrize(
    "name",
    [
        "",
        "L3",
        "mlp_out",
        "L3.mlp",
        "l3.mlp_out",
        "L-1.mlp_out",
        "L3.mlp_out.h2",
        "L3.z.h",
        "L3.z.hx",
        "L1.embed",
        "L3.mlp_out ",
        "blocks.3",
        "blocks.x.hook_mlp_out",
        "blocks.3.ln2.hook_normalized",  # before the affine part: not what the MLP reads
        "blocks.3.hook_pattern",
    ],
)
def test_what_is_no_site_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(SettingError) as error:
        Site.parse(name)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


def test_sites_sort_in_the_order_in_which_the_model_computes_them() -> None:
    ordered = [
        "embed",
        "L0.resid_pre",
        "L0.attn_in",
        "L0.z",
        "L0.z.h0",
        "L0.z.h10",
        "L0.attn_out",
        "L0.resid_mid",
        "L0.mlp_in",
        "L0.mlp_hidden",
        "L0.mlp_out",
        "L0.resid_post",
        "L1.resid_pre",
        "L10.mlp_in",
    ]
    sites = [Site.parse(name) for name in ordered]
    assert [str(site) for site in sorted(reversed(sites))] == ordered
    assert all(a < b and b > a and a <= b for a, b in zip(sites, sites[1:], strict=False))


def test_heads_belong_to_z_alone_and_embed_to_no_layer() -> None:
    with pytest.raises(AssertionError, match="only z has heads"):
        Site(0, Point.mlp_out, 1)
    with pytest.raises(AssertionError, match="embed has no layer"):
        Site(1, Point.embed)
    with pytest.raises(AssertionError, match="negative"):
        Site(-1, Point.z)


IN, OUT = [Site(layer, Point.mlp_in) for layer in range(3)], [Site(layer, Point.mlp_out) for layer in range(3)]
LAYOUT = Layout.of({site: 4 for site in [OUT[2], IN[1], OUT[0], IN[0], OUT[1], IN[2]]})


def test_a_layout_stands_by_point_and_then_by_layer() -> None:
    assert LAYOUT.sites == (*IN, *OUT)
    assert LAYOUT.width == 24


def test_spans_tile_the_row() -> None:
    layout = Layout.of({IN[0]: 4, OUT[0]: 2, Site(1, Point.z, 3): 3})
    assert [layout.spans[site] for site in layout.sites] == [slice(0, 3), slice(3, 7), slice(7, 9)]


def test_a_stack_reads_one_span_and_writes_one_span() -> None:
    assert LAYOUT.span(IN) == slice(0, 12)
    assert LAYOUT.span(OUT[1:]) == slice(16, 24)
    assert LAYOUT.span([IN[2], OUT[0]]) == slice(8, 16)
    assert LAYOUT.span([OUT[1]]) == slice(16, 20)


def test_sites_that_are_apart_or_out_of_order_have_no_span() -> None:
    assert LAYOUT.span([IN[0], IN[2]]) is None
    assert LAYOUT.span([IN[1], IN[0]]) is None
    assert LAYOUT.span([IN[0], OUT[0]]) is None


def test_a_site_stands_in_a_layout_once() -> None:
    with pytest.raises(AssertionError, match="twice"):
        Layout((IN[0], IN[0]), (4, 4))
    with pytest.raises(AssertionError, match="2 sites, 1 widths"):
        Layout((IN[0], IN[1]), (4,))
