"""A conversion rule in one file: for attentions that it recognises by the name of their class."""

from typing import Any

from torch import Tensor, nn

from randbatch.conversion.adapters import AdapterRule, RandomBatches
from randbatch.conversion.rules import REGISTRY, Ancestors


class ToyMixer(nn.Module):
    """Softmax attention of `[B, N, C]` whose keys are its queries."""

    def __init__(self, channels: int, power: int = 1) -> None:
        super().__init__()
        self.query, self.value, self.power = nn.Linear(channels, channels), nn.Linear(channels, channels), power

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x)
        return (query @ query.mT).softmax(dim=-1).pow(self.power) @ self.value(x)


class ToyRule(AdapterRule):
    name = "toy attention"
    changes = "a token meets its random batch"

    def serves(self, cls: type[nn.Module]) -> bool:
        return cls.__name__ == "ToyMixer"

    def why_not(self, module: Any, ancestors: Ancestors) -> str | None:
        return None if module.power == 1 else "a power of the weights is no softmax"

    def adapter(self, module: Any, batches: RandomBatches, /, x: Tensor) -> Tensor:
        query, value = module.query(x).unsqueeze(2), module.value(x).unsqueeze(2)  # one head
        return batches.attend(query, query, value, scale=1.0).squeeze(2)


REGISTRY.add(ToyRule())
