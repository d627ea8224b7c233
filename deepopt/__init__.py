"""deepopt: optimizers as nested associative memories, each defined once as mathematics.

This package is the mathematics and imports nothing heavier than NumPy. `torch_backend` and
`jax_backend` bind its rules to `torch.optim` and `optax`.
"""

from importlib.metadata import PackageNotFoundError, version

from deepopt import around as around
from deepopt import rules as rules
from deepopt.describe import describe as describe
from deepopt.files import replacing as replacing
from deepopt.latex import latex as latex
from deepopt.memory import MLP as MLP
from deepopt.memory import Linear as Linear
from deepopt.memory import Table as Table
from deepopt.memory import average as average
from deepopt.memory import descent as descent
from deepopt.memory import dot as dot
from deepopt.memory import l2 as l2
from deepopt.memory import l2_of_moments as l2_of_moments
from deepopt.memory import read_along as read_along
from deepopt.memory import write as write
from deepopt.oracle import Oracle as Oracle
from deepopt.rule import Betas as Betas
from deepopt.rule import Memories as Memories
from deepopt.rule import Period as Period
from deepopt.rule import Periods as Periods
from deepopt.rule import Rate as Rate
from deepopt.rule import Retention as Retention
from deepopt.rule import Retentions as Retentions
from deepopt.rule import Rule as Rule
from deepopt.rule import Scalar as Scalar
from deepopt.rule import Scalars as Scalars
from deepopt.rule import Slot as Slot
from deepopt.rule import Symmetries as Symmetries
from deepopt.rule import Time as Time
from deepopt.rule import Update as Update
from deepopt.rule import symmetric as symmetric

try:
    __version__ = version("nested-deepopt")
except PackageNotFoundError:
    __version__ = "unknown"  # not installed: run from a bare checkout
