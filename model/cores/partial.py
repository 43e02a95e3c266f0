"""What the cores that do not let every query meet every key have in common."""

from pydantic import Field

from model.attention.base import AttentionCore
from model.cores.full import Full


class PartialCore(AttentionCore):
    """A pattern that `full_every` mixes with full attention."""

    full_every: int | None = Field(None, ge=1)  # 4: every fourth layer attends in full

    def for_layer(self, layer: int) -> AttentionCore:
        return Full() if self.full_every and (layer + 1) % self.full_every == 0 else self
