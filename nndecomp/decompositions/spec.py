"""What a dictionary is, without its weights: plain data, and what config.json holds.

A dictionary is a list of groups. A group is a bank of features with one contiguous span of what is read and one of
what is written; see `nndecomp.decompositions.groups`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nndecomp.config.schema import Activation, CodeNormalisation, Encoder, JumpReluGradient, Scope
from nndecomp.types import Layout, Site


@dataclass(frozen=True)
class AttentionSpec:
    """Attention patterns of lorsa; the group's features are split evenly among them, adjacent ones together."""

    n_heads: int
    d_qk: int
    rotary: tuple[float, ...]  # as in `TargetShape`, of the group's layer


@dataclass(frozen=True)
class GroupSpec:
    name: str  # unique within the dictionary, e.g. "L3"
    reads: tuple[Site, ...]
    writes: tuple[Site, ...]
    n_features: int
    encoder: str | None = None  # the group before it whose encoder it uses; null: its own
    ranks: tuple[tuple[int, int], ...] = ()  # molt: (rank, how many transforms of it), in the order of the features
    attention: AttentionSpec | None = None  # lorsa


@dataclass(frozen=True)
class ActivationSpec:
    kind: Activation
    scope: Scope = Scope.group
    k: tuple[int, ...] = ()  # of what selects: one a group
    threshold_rate: float = 0.1  # batchtopk: of the moving average
    initial_threshold: float = 0.1  # jumprelu
    bandwidth: float = 0.1  # jumprelu
    gradient: JumpReluGradient = JumpReluGradient.exact
    log_threshold: bool = False  # jumprelu
    code_normalisation: CodeNormalisation = CodeNormalisation.none  # selection and thresholds see z c
    mixed_weights: tuple[float, float] = (1.0, 0.1)


@dataclass(frozen=True)
class DictionarySpec:
    architecture: str
    target: str  # name of the model the activations come from
    widths: Mapping[Site, int]
    groups: tuple[GroupSpec, ...]
    activation: ActivationSpec
    skip: bool = False
    centre_input: bool = False
    encoder: Encoder = Encoder.linear
    frozen_scales: bool = False  # c of each feature stands in a buffer, instead of following its decoder's norms

    @property
    def read_layout(self) -> Layout:
        return self._layout([site for group in self.groups for site in group.reads])

    @property
    def write_layout(self) -> Layout:
        return self._layout([site for group in self.groups for site in group.writes])

    def _layout(self, sites: Sequence[Site]) -> Layout:
        return Layout.of({site: self.widths[site] for site in sites})

    def to_json(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "target": self.target,
            "widths": {str(site): width for site, width in self.widths.items()},
            "groups": [
                {
                    "name": group.name,
                    "reads": [str(site) for site in group.reads],
                    "writes": [str(site) for site in group.writes],
                    "n_features": group.n_features,
                    "encoder": group.encoder,
                    "ranks": [list(pair) for pair in group.ranks],
                    "attention": None
                    if group.attention is None
                    else {**asdict(group.attention), "rotary": list(group.attention.rotary)},
                }
                for group in self.groups
            ],
            "activation": {
                **asdict(self.activation),
                "kind": self.activation.kind.value,
                "scope": self.activation.scope.value,
                "gradient": self.activation.gradient.value,
                "code_normalisation": self.activation.code_normalisation.value,
                "k": list(self.activation.k),
                "mixed_weights": list(self.activation.mixed_weights),
            },
            "skip": self.skip,
            "centre_input": self.centre_input,
            "encoder": self.encoder.value,
            "frozen_scales": self.frozen_scales,
        }

    @staticmethod
    def from_json(config: Mapping[str, Any]) -> "DictionarySpec":
        activation = config["activation"]
        return DictionarySpec(
            architecture=config["architecture"],
            target=config["target"],
            widths={Site.parse(name): width for name, width in config["widths"].items()},
            groups=tuple(
                GroupSpec(
                    name=group["name"],
                    reads=tuple(Site.parse(name) for name in group["reads"]),
                    writes=tuple(Site.parse(name) for name in group["writes"]),
                    n_features=group["n_features"],
                    encoder=group["encoder"],
                    ranks=tuple((rank, count) for rank, count in group["ranks"]),
                    attention=None
                    if group["attention"] is None
                    else AttentionSpec(**{**group["attention"], "rotary": tuple(group["attention"]["rotary"])}),
                )
                for group in config["groups"]
            ),
            activation=ActivationSpec(
                **{
                    **activation,
                    "kind": Activation(activation["kind"]),
                    "scope": Scope(activation["scope"]),
                    "gradient": JumpReluGradient(activation["gradient"]),
                    "code_normalisation": CodeNormalisation(activation["code_normalisation"]),
                    "k": tuple(activation["k"]),
                    "mixed_weights": tuple(activation["mixed_weights"]),
                }
            ),
            skip=config["skip"],
            centre_input=config["centre_input"],
            encoder=Encoder(config["encoder"]),
            frozen_scales=config["frozen_scales"],
        )
