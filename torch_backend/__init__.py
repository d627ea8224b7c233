"""deepopt's rules as drop-in `torch.optim.Optimizer` classes."""

from deepopt import rules
from torch_backend.algebra import lift as lift
from torch_backend.optimizer import Optimizer as Optimizer
from torch_backend.optimizer import bind as bind
from torch_backend.routing import Routing as Routing

SGD = bind(rules.SGD)
HeavyBall = bind(rules.HeavyBall)
DeltaMomentum = bind(rules.DeltaMomentum)
DeepMomentum = bind(rules.DeepMomentum)
AdamW = bind(rules.AdamW)
Lion = bind(rules.Lion)
Muon = bind(rules.Muon)
M3 = bind(rules.M3)
