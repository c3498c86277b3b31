"""How good a decomposition is: reconstruction, what replacing does to the target's predictions, and what it costs."""

from nndecomp.evaluation.rows import Context, Measurement, join, read_rows, table, write_rows
from nndecomp.evaluation.suite import evaluate, evaluate_all

__all__ = ["Context", "Measurement", "evaluate", "evaluate_all", "join", "read_rows", "table", "write_rows"]
