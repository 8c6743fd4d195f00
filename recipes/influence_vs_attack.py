"""Does the influence function predict what an attack recovers?

The language figure of Zhang et al. 2023 (arXiv:2309.13016). For every text and noise level: I_lb, I2F and the
expected I2F on one side, an attack's ROUGE, token scores and embedding error on the other; then rank correlations with
bootstrap intervals over texts.

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/influence_vs_attack.py
        --config configs/influence_vs_attack/reference-bert.yaml
    accelerate launch --config_file configs/accelerate/cpu2.yaml recipes/influence_vs_attack.py
        --config configs/influence_vs_attack/reference-gpt2.yaml --samples 8 --processes 2

(each command on one line). A killed run continues where it stopped. One process or several give the same rows.
"""

import os
import shlex
import sys
from dataclasses import dataclass

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from rich.console import Console

from lmleak.config import parse_config
from lmleak.errors import ConfigError
from lmleak.evaluation import AuditConfig, exit_status, finish, process_state, run_audit
from lmleak.report.correlation import correlation_table
from lmleak.report.page import write_report


@dataclass(frozen=True)
class StudyConfig(AuditConfig):
    """Compare risk numbers with what an attack recovers over noise levels."""

    output: str = "runs/influence_vs_attack"
    """Folder for rows, figures, report and the table of rank correlations."""

    def __post_init__(self):
        super().__post_init__()
        if not self.attacks or len(self.noise_levels) < 2:
            raise ConfigError("a comparison needs at least one attack and two noise levels")


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(StudyConfig, argv, prog="influence_vs_attack.py")
    result = run_audit(config, command=shlex.join(["influence_vs_attack.py", *argv]))
    if process_state().is_main_process:
        page = write_report(result.rows, result.meta, result.folder)
        width = None if sys.stdout.isatty() else 200  # in a log, one line per row
        Console(width=width).print(correlation_table(result.rows, result.meta))
        print(f"report: {page}")
    finish(process_state())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
