"""The rules in reading order: descent, momentum, adaptive, orthogonal, preconditioned, nested."""

from deepopt.rules.adaptive import AdaGrad as AdaGrad
from deepopt.rules.adaptive import Adam as Adam
from deepopt.rules.adaptive import AdamW as AdamW
from deepopt.rules.adaptive import AMSGrad as AMSGrad
from deepopt.rules.adaptive import DiagonalMemory as DiagonalMemory
from deepopt.rules.adaptive import Lion as Lion
from deepopt.rules.adaptive import NAdam as NAdam
from deepopt.rules.adaptive import RAdam as RAdam
from deepopt.rules.adaptive import RMSProp as RMSProp
from deepopt.rules.descent import DGD as DGD
from deepopt.rules.descent import GGD as GGD
from deepopt.rules.descent import SGD as SGD
from deepopt.rules.descent import SignSGD as SignSGD
from deepopt.rules.momentum import DeepMomentum as DeepMomentum
from deepopt.rules.momentum import DeltaMomentum as DeltaMomentum
from deepopt.rules.momentum import FeatureMomentum as FeatureMomentum
from deepopt.rules.momentum import HeavyBall as HeavyBall
from deepopt.rules.momentum import Nesterov as Nesterov
from deepopt.rules.momentum import PreconditionedMomentum as PreconditionedMomentum
from deepopt.rules.momentum import Signum as Signum
from deepopt.rules.nested import M3 as M3
from deepopt.rules.nested import AdEMAMix as AdEMAMix
from deepopt.rules.nested import Nest as Nest
from deepopt.rules.orthogonal import AdaMuon as AdaMuon
from deepopt.rules.orthogonal import Muon as Muon
from deepopt.rules.preconditioned import SOAP as SOAP
from deepopt.rules.preconditioned import MultiFrequency as MultiFrequency
from deepopt.rules.preconditioned import Shampoo as Shampoo

DESCENT = (SGD, SignSGD, DGD, GGD)
MOMENTUM = (
    *(HeavyBall, Nesterov, Signum, PreconditionedMomentum, FeatureMomentum),
    *(DeltaMomentum, DeepMomentum),
)
ADAPTIVE = (AdaGrad, RMSProp, Adam, AdamW, NAdam, RAdam, AMSGrad, DiagonalMemory, Lion)
ORTHOGONAL = (Muon, AdaMuon)
PRECONDITIONED = (Shampoo, SOAP, MultiFrequency)
NESTED = (M3, AdEMAMix, Nest)
ALL = (*DESCENT, *MOMENTUM, *ADAPTIVE, *ORTHOGONAL, *PRECONDITIONED, *NESTED)
