"""The rules in reading order: descent, momentum, adaptive, orthogonal, nested."""

from deepopt.rules.adaptive import AdamW as AdamW
from deepopt.rules.adaptive import Lion as Lion
from deepopt.rules.descent import SGD as SGD
from deepopt.rules.momentum import DeepMomentum as DeepMomentum
from deepopt.rules.momentum import DeltaMomentum as DeltaMomentum
from deepopt.rules.momentum import HeavyBall as HeavyBall
from deepopt.rules.nested import M3 as M3
from deepopt.rules.orthogonal import Muon as Muon

ALL = (SGD, HeavyBall, DeltaMomentum, DeepMomentum, AdamW, Lion, Muon, M3)
