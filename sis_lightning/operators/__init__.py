"""The convolution operators of the paper, and the registry for further ones."""

from sis_lightning.operators import sis  # registers the paper's operators
from sis_lightning.operators.base import (
    SISOperator,
    create_operator,
    list_operators,
    operator_class,
    register_operator,
)
from sis_lightning.operators.replace import ReplacementReport, replace_convs

__all__ = [
    "ReplacementReport",
    "SISOperator",
    "create_operator",
    "list_operators",
    "operator_class",
    "register_operator",
    "replace_convs",
    "sis",
]
