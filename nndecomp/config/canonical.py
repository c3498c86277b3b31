"""Whether the units of a decomposition are those of another: sizes, and what counts."""

from dataclasses import dataclass, field

from nndecomp.config.checks import require


@dataclass(kw_only=True)
class CanonicalConfig:
    times: list[int] = field(default_factory=lambda: [1, 2, 4])  # sizes, as multiples of each method's own
    min_tokens: int = 10  # of held-out text, on which a unit is active, to be compared
    n_null: int = 4000  # chances drawn for each comparison
    found: float = 0.7  # cosine or correlation above which a unit counts as found again
    linked: float = 0.3  # correlation above which two units have to do with each other

    def __post_init__(self) -> None:
        require(
            len(self.times) > 1 and self.times == sorted(set(self.times)) and self.times[0] > 0,
            f"canonical.times={self.times} must be at least two increasing multiples, e.g. [1, 2, 4]",
        )
        require(self.min_tokens > 0, f"canonical.min_tokens={self.min_tokens} must be a positive number of tokens")
        require(
            self.n_null >= 1000,
            f"canonical.n_null={self.n_null} must be 1000 or more, so that p can be as small as 0.001",
        )
        for name in ("found", "linked"):
            require(0 < getattr(self, name) < 1, f"canonical.{name}={getattr(self, name)} must lie between 0 and 1")
