"""The tasks that come with `examples.compare`, by name; the first line of each says what it is."""

from collections.abc import Callable

from examples.compare.problem import Problem
from examples.compare.tasks import language, streams, tables, toys

TASKS: dict[str, Callable[..., Problem]] = {
    "bytes": language.gpt,
    "hope": language.hope,
    "digits": tables.digits,
    "diabetes": tables.diabetes,
    "cancer": tables.cancer,
    "factorisation": toys.factorisation,
    "regression": toys.regression,
    "rotating": toys.rotating,
    "landscape": toys.landscape,
    "orthogonal": streams.orthogonal,
    "permuted-digits": streams.permuted_digits,
    "intents": streams.intents,
}
