"""Tasks for sequence models: data to train on and scores, without any model."""

from examples.hope.tasks.base import IGNORED, Answer, Batch, Batches, Better, Stream, Task
from examples.hope.tasks.formal import Formal, counted, parity, repeated, shuffled
from examples.hope.tasks.intents import Intents
from examples.hope.tasks.languages import Languages
from examples.hope.tasks.mad import (
    Mad,
    compression,
    fuzzy_recall,
    in_context_recall,
    memorisation,
    noisy_recall,
    selective_copy,
)
from examples.hope.tasks.metrics import continual, forward_transfer, mean_interval, wilson
from examples.hope.tasks.needle import Needle
from examples.hope.tasks.recall import Recall
from examples.hope.tasks.text import Text

__all__ = [
    "IGNORED",
    "Answer",
    "Batch",
    "Batches",
    "Better",
    "Formal",
    "Intents",
    "Languages",
    "Mad",
    "Needle",
    "Recall",
    "Stream",
    "Task",
    "Text",
    "compression",
    "continual",
    "counted",
    "forward_transfer",
    "fuzzy_recall",
    "in_context_recall",
    "mean_interval",
    "memorisation",
    "noisy_recall",
    "parity",
    "repeated",
    "selective_copy",
    "shuffled",
    "wilson",
]
