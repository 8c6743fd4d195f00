"""Floor 4: runs one configuration over examples and processes."""

from lmleak.evaluation.audit import AuditConfig, AuditResult, run_audit
from lmleak.evaluation.capture import CaptureConfig, CaptureResult, run_capture
from lmleak.evaluation.example import ExampleEvaluator, ExampleSettings
from lmleak.evaluation.recover import AttackConfig, AttackResult, run_recovery
from lmleak.evaluation.run import exit_status, finish, process_state, run_items
from lmleak.evaluation.score import ImageScoreResult, ScoreConfig, ScoreResult, run_score
from lmleak.evaluation.shards import ResultFolder
from lmleak.evaluation.split import split_restarts, split_spectrum

__all__ = [
    "AttackConfig", "AttackResult", "AuditConfig", "AuditResult", "CaptureConfig", "CaptureResult", "ExampleEvaluator",
    "ExampleSettings", "ImageScoreResult", "ResultFolder", "ScoreConfig", "ScoreResult", "exit_status", "finish",
    "process_state", "run_audit", "run_capture", "run_items", "run_recovery", "run_score",
    "split_restarts", "split_spectrum",
]  # fmt: skip
