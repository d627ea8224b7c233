"""Small models whose parameters and gradients are those of real ones, and contexts."""

import torch
from cases import contexts
from torch import nn
from torch.nn import functional as F

from deepopt.rule import hints
from torch_backend.values import host, instance


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, width = x.shape
        q, k, v = self.qkv(self.before(x)).view(b, t, 3, self.heads, -1).unbind(2)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, width))
        return x + self.down(F.gelu(self.up(self.after(x))))


class GPT(nn.Module):
    """A byte-level transformer; `tie` shares embedding and head as modules do, or as a function."""

    def __init__(self, width=256, layers=4, heads=4, length=64, tie="") -> None:
        super().__init__()
        self.tie = tie
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        if tie != "function":
            self.project = nn.Linear(width, 256, bias=False)
        if tie == "module":
            self.project.weight = self.tokens.weight

    def forward(self, x):
        x = self.tokens(x) + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x @ self.tokens.weight.T if self.tie == "function" else self.project(x)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(32, 10),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


def give_context(optimizer: torch.optim.Optimizer, step: int = 0) -> None:
    """Set what rules need beyond gradients, by shape and step; nothing for torch's optimizers."""
    known = getattr(optimizer, "rules", {})
    for group in optimizer.param_groups if known else ():
        cls = known[group["rule"]]
        rule = instance(cls, {k: host(group[k], k) for k in hints(cls)})
        for p in group["params"]:
            for name, x in contexts(rule, tuple(p.shape), step + 1)[step].items():
                optimizer.context[p][name] = torch.tensor(x)


def with_gradients(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> nn.Module:
    """The model after one backward pass of cross-entropy."""
    logits = model(inputs)
    F.cross_entropy(logits.flatten(0, -2), targets.flatten()).backward()
    return model


def gpt() -> nn.Module:
    """3.7M parameters and the gradients of two lines of random bytes."""
    data = torch.randint(256, (2, 33))
    return with_gradients(GPT(width=256, layers=4, length=256), data[:, :-1], data[:, 1:])


def convnet() -> nn.Module:
    return with_gradients(ConvNet(), torch.randn(8, 3, 12, 12), torch.randint(10, (8,)))
