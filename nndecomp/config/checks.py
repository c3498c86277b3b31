"""What all groups of settings share: how a value is refused, and the number formats."""

from enum import Enum

from nndecomp.errors import SettingError


def require(holds: bool, sentence: str) -> None:
    """Refuse a setting: `sentence` names it, its value, and what would be right."""
    if not holds:
        raise SettingError(sentence)


class DType(Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
