"""A language model that fits in a test, its data, a plain loop, and what a step leaves behind."""

from collections.abc import Callable, Iterator

import torch
from models import GPT
from torch import Tensor, nn
from torch.nn import functional as F

CLIP = 0.5


def make() -> nn.Module:
    """The same model every time."""
    torch.manual_seed(0)
    return GPT(width=16, layers=1, heads=2, length=8)


def lines(count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of four lines that count upwards, and what follows each token."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(16, (count, 4, 1), generator=generator)
    return [(x[:, :-1], x[:, 1:]) for x in starts + torch.arange(9)]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits = model(batch[0])
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[1].flatten())


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order of the groups, on which the last bit of a norm depends."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradient_norm(model: nn.Module) -> float:
    return float(nn.utils.get_total_norm(p.grad for p in model.parameters()))


def plain(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    batches: list[tuple[Tensor, Tensor]],
    *,
    accumulate: int = 1,
    bfloat16: bool = False,
    schedule: Callable[[int], float] = lambda t: 1.0,
) -> Iterator[nn.Module]:
    """The model after each step of a loop of torch alone, clipped at `CLIP`."""
    model = make()
    optimizer = make_optimizer(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for i, batch in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = loss_of(model, batch)
        (loss / accumulate).backward()
        if (i + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(parameters(optimizer), CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            yield model


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same parameters, bit for bit."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


def steps(optimizer: torch.optim.Optimizer) -> set[float]:
    """The step counts of all parameters; there is a state for each."""
    return {float(optimizer.state[p]["step"]) for p in parameters(optimizer)}
