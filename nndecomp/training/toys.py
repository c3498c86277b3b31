"""Training toys on what they are to put out, and toys as subjects of parameter decomposition.

loss = mean over rows and features of  (out - wanted(x))^2,    wanted(x) = x (tms), x + relu(x) (resid_mlp)
"""

from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.config.schema import TrainingConfig
from nndecomp.targets.toys import TMS, Toy


class ToyObjective(nn.Module):
    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.toy = toy

    def loss(self, batch: Float[Tensor, "row feature"], progress: float) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        loss = squared_error(self.toy(batch), self.toy.wanted(batch))
        return loss, {"squared_error": loss.detach()}

    def before_step(self) -> None:
        if isinstance(self.toy, TMS):
            self.toy.tie_gradients()

    def clipped_apart(self) -> list[tuple[list[nn.Parameter], float]]:
        return []

    def after_step(self) -> None:
        if isinstance(self.toy, TMS):
            self.toy.tie()

    def take_resets(self) -> list[tuple[nn.Parameter, Tensor]]:
        return []

    def own_training(self, cfg: TrainingConfig) -> TrainingConfig:
        return cfg

    def lr_shares(self) -> dict[str, float]:
        return {}


def squared_error(a: Float[Tensor, "row feature"], b: Float[Tensor, "row feature"]) -> Float[Tensor, ""]:
    return (a - b).square().mean()
