"""Hope under torch.compile: one graph for each mixer, equal to eager, made once for a shape."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from examples.hope.config import Config
from examples.hope.model import LanguageModel
from torch_backend import lift

# Two slow chunks, the second unfinished, and three chunks.
TINY = Config(
    **{"width": 8, "layers": 1, "heads": 2, "memory_width": 3, "cms_width": 8, "periods": (1,)},
    **{"chunk": 2, "slow_chunk": 4},
)
LENGTH = 6
EXACT = {"rtol": 0.0, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _afresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def found(model: torch.nn.Module, tokens: Tensor) -> list[Tensor]:
    """Logits, and the gradients of all parameters for a loss of them."""
    logits = model(tokens)
    loss = (logits.sin() * torch.arange(logits.shape[-1])).mean()
    return [logits.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("mixer", ["titans", "attention", "rotary", "delta", "segments"])
def test_compiled_is_eager(mixer: str) -> None:
    model = LanguageModel(replace(TINY, mixer=mixer)).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first, second = torch.randint(256, (2, 2, LENGTH))
    torch.testing.assert_close(found(compiled, first), found(model, first), **EXACT)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(found(compiled, second), found(model, second), **EXACT)


def test_a_lifted_function_in_a_graph() -> None:
    """Numbers beside tensors, an output that is an input, an input that is not read."""
    some = lift(lambda x, y, unread, *, power: (y, (x @ y + 1.0) ** power))

    def several(x: Tensor, y: Tensor) -> Tensor:
        same, new = some(x, y, 3.0, power=2)
        return same + new.sum() + some(x, y, 4.0, power=3)[1].sum()

    x, y = torch.randn(2, 3, 3, dtype=torch.float64)
    expected = y + ((x @ y + 1) ** 2).sum() + ((x @ y + 1) ** 3).sum()
    torch.testing.assert_close(several(x, y), expected, **EXACT)
    compiled = torch.compile(several, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), expected, **EXACT)
