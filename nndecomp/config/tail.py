"""How the least important components of a parameter decomposition are looked at."""

from dataclasses import dataclass

from nndecomp.config.checks import require


@dataclass(kw_only=True)
class TailConfig:
    kept: list[float]  # shares of a map's components that are kept while the rest is dropped
    thresholds: list[float]  # of the mean importance logit, above which components are counted
    n_bands: int  # of as many components each, by rank
    important: float  # a component is important on a token where its importance is above this

    def __post_init__(self) -> None:
        require(
            len(self.kept) > 0 and all(0 < share <= 1 for share in self.kept),
            f"tail.kept={self.kept} must be shares of the components, above 0 and at most 1",
        )
        require(len(self.thresholds) > 0, "tail.thresholds=[] counts nothing; write e.g. tail.thresholds=[-5,0,5]")
        require(self.n_bands > 0, f"tail.n_bands={self.n_bands} must be a positive number")
        require(0 <= self.important < 1, f"tail.important={self.important} must be an importance, from 0 up to 1")
