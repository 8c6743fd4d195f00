"""Floor 4: runs one configuration over examples and processes."""

from lmleak.evaluation.audit import AuditConfig, AuditResult, run_audit
from lmleak.evaluation.example import ExampleEvaluator, ExampleSettings
from lmleak.evaluation.run import process_state, run_items
from lmleak.evaluation.shards import ResultFolder

__all__ = [
    "AuditConfig", "AuditResult", "ExampleEvaluator", "ExampleSettings", "ResultFolder", "process_state", "run_audit",
    "run_items",
]  # fmt: skip
