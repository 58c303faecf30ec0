"""A tiny language with a skewed vocabulary, and hidden states of a model that speaks it."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from logitproc.heads import Calibration

D, V = 12, 61


def random_head(
    seed: int = 0, width: int = V, d: int = D, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(weight [V, d], states [600, d]): skewed probabilities, correlated states that are not centred."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(width, d, generator=random)
    mixing = torch.randn(d, d, generator=random) / d**0.5
    states = torch.randn(600, d, generator=random) @ mixing + 0.7
    weight += torch.linspace(2, -2, width)[:, None] * 0.5  # low ids are common
    return weight.to(dtype), states.to(dtype)


def calibration(seed: int = 0, bias: Tensor | None = None, **kwargs) -> Calibration:
    weight, states = random_head(seed, **kwargs)
    logits = torch.nn.functional.linear(states, weight, bias).float()
    labels = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    about = {"vocab_size": len(weight), "fingerprint": "tiny", "name": "tiny"}
    return Calibration(weight, bias, states, labels, about)


class Stub:
    """What `VQHead.fit` asks of a model when it is given a calibration."""

    config = PreTrainedConfig()

    def __init__(self, calibration: Calibration):
        self.head = torch.nn.Linear(1, 1)
        self.head.weight = torch.nn.Parameter(calibration.weight)

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head


@pytest.fixture(scope="session")
def cal() -> Calibration:
    return calibration()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
