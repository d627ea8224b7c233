"""deepopt's rules as drop-in `torch.optim.Optimizer` classes."""

from deepopt import rules
from torch_backend.algebra import lift as lift
from torch_backend.averages import averaged as averaged
from torch_backend.binding import bind as bind
from torch_backend.interchange import export_state as export_state
from torch_backend.interchange import import_state as import_state
from torch_backend.optimizer import Optimizer as Optimizer
from torch_backend.release import release_gradients as release_gradients
from torch_backend.routing import Routing as Routing

SGD = bind(rules.SGD)
SignSGD = bind(rules.SignSGD)
DGD = bind(rules.DGD)
GGD = bind(rules.GGD)
HeavyBall = bind(rules.HeavyBall)
Nesterov = bind(rules.Nesterov)
Signum = bind(rules.Signum)
PreconditionedMomentum = bind(rules.PreconditionedMomentum)
FeatureMomentum = bind(rules.FeatureMomentum)
DeltaMomentum = bind(rules.DeltaMomentum)
DeepMomentum = bind(rules.DeepMomentum)
AdaGrad = bind(rules.AdaGrad)
RMSProp = bind(rules.RMSProp)
Adam = bind(rules.Adam)
AdamW = bind(rules.AdamW)
NAdam = bind(rules.NAdam)
RAdam = bind(rules.RAdam)
AMSGrad = bind(rules.AMSGrad)
DiagonalMemory = bind(rules.DiagonalMemory)
Lion = bind(rules.Lion)
Muon = bind(rules.Muon)
AdaMuon = bind(rules.AdaMuon)
Shampoo = bind(rules.Shampoo)
SOAP = bind(rules.SOAP)
MultiFrequency = bind(rules.MultiFrequency)
M3 = bind(rules.M3)
AdEMAMix = bind(rules.AdEMAMix)
Nest = bind(rules.Nest)
