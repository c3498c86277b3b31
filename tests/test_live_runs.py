"""A pass through the model encodes what is asked for, once, and sums it in one order."""

import pytest
import torch
from decomposition_parts import ARCHITECTURES, inputs, settled
from torch import Tensor

from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.types import Site


def parts(made: SparseDictionary, x: Tensor) -> dict[Site, Tensor]:
    return {site: x[:, made.read_layout.spans[site]] for site in made.reads}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Numbers of the groups that have been encoded."""
    seen: list[tuple[int, ...]] = []
    encode = SparseDictionary.encode_groups

    def watched(self: SparseDictionary, read: list[Tensor], groups: tuple[int, ...]):
        seen.append(tuple(groups))
        return encode(self, read, groups)

    monkeypatch.setattr(SparseDictionary, "encode_groups", watched)
    return seen


@pytest.mark.parametrize(
    ("architecture", "first"),
    [("per_layer_transcoder", [(1,)]), ("cross_layer_transcoder", [(0,), (1,)])],
)
def test_only_groups_that_have_a_part_in_what_is_asked_for_are_encoded(architecture, first, encoded):
    made = settled(**ARCHITECTURES[architecture])
    run = made.live_run()
    for site, value in parts(made, inputs(made)).items():
        run.read(site, value)
        if site.layer == 1:
            assert encoded == [], "reading alone costs nothing"
            run.write(made.writes[1])
    run.write(made.writes[1])
    assert encoded == first
    run.active()
    assert sorted(encoded) == [(g,) for g in range(len(made.banks))], "each group once"


@pytest.mark.parametrize(
    "architecture", ["per_layer_transcoder", "cross_layer_transcoder", "skip_cross_layer_transcoder"]
)
def test_when_writes_are_asked_for_changes_no_bit(architecture):
    made = settled(**ARCHITECTURES[architecture]).float()
    x = parts(made, inputs(made))
    in_turn, at_the_end = made.live_run(), made.live_run()
    answers = {}
    for (site, value), write in zip(x.items(), made.writes, strict=True):
        in_turn.read(site, value)
        answers[write] = in_turn.write(write)
        at_the_end.read(site, value)
    for write in reversed(made.writes):
        assert torch.equal(at_the_end.write(write), answers[write])
    assert torch.equal(at_the_end.active().counts(), in_turn.active().counts())
