"""The command line: lmleak audit | layers | report | capture | attack | score.

Exit status: 0 done; 2 refused (wrong input or setting, nothing written); 3 the audit's ``fail_above`` gate failed.
"""

import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.text import Text

from lmleak.errors import ConfigError, DataError, LmleakError
from lmleak.files import refused_writes
from lmleak.lookup import suggest

if TYPE_CHECKING:
    from lmleak.evaluation.layers_audit import LayersResult

REFUSED, GATE_FAILED = 2, 3

USAGE = """usage: lmleak COMMAND [options]

commands:
  audit    measure what a model's gradients leak of given texts, and write a report
  layers   measure which layer's gradient leaks what of labelled data, and which layers to hide first
  report   write the report again from the folder of an earlier audit
  capture  write the gradient of private texts or images to a file, as a client would send it
  attack   recover texts or images from a gradient file alone
  score    compare what was recovered with the private texts or images

'lmleak COMMAND --help' lists the options. Exit status: 0 done, 2 refused, 3 more leaked than --fail-above allows.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    try:
        for argument in argv:
            _refuse_other_encodings(argument)
        return _command(argv[0])(argv[1:])
    except LmleakError as error:
        Console(stderr=True, soft_wrap=True).print("[bold red]refused:[/] ", end="")
        print(error, file=sys.stderr)  # plainly: messages may hold square brackets
        return _leave(REFUSED)


def _leave(status: int) -> int:
    """Return a status; one of several processes ends with it."""
    if "torch" not in sys.modules:  # refused before anything was loaded: there is no group of processes
        return status
    from lmleak.evaluation.run import leave_group

    return leave_group(status)


def _command(name: str) -> Callable[[Sequence[str]], int]:
    commands = {
        "audit": audit,
        "layers": layers,
        "report": report,
        "capture": capture,
        "attack": attack,
        "score": score,
    }
    if name not in commands:
        raise ConfigError(f"unknown command {name!r}. {suggest(name, commands)}")
    return commands[name]


def _refuse_other_encodings(argument: str) -> None:
    """Refuse an argument whose bytes are not UTF-8: it could be neither printed nor written to a file."""
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"the argument {argument!a} is not UTF-8 text; convert it first") from error


def audit(argv: Sequence[str]) -> int:
    """Run an audit, write its report, print a table."""
    _quiet_libraries()  # before the libraries are imported, which is when they read their settings
    # Imported here, so that --help and a mistyped command answer at once.
    from lmleak.config import parse_config
    from lmleak.evaluation import AuditConfig, process_state, run_audit
    from lmleak.report.page import write_report
    from lmleak.report.tables import console_table

    config = parse_config(AuditConfig, argv, prog="lmleak audit")
    result = run_audit(config, command=shlex.join(["lmleak", "audit", *argv]))
    if process_state().is_main_process:
        page = write_report(result.rows, result.meta, result.folder)
        _show(console_table(result.rows, result.meta), f"report: {page}")
    if config.fail_above is None:
        return 0
    return _gate(result.worst_recall, config.fail_above)


def layers(argv: Sequence[str]) -> int:
    """Run a layer-wise audit, write its report, print tables."""
    _quiet_libraries()
    from lmleak.config import parse_config
    from lmleak.evaluation import process_state
    from lmleak.evaluation.layers_audit import LayersConfig, run_layers

    config = parse_config(LayersConfig, argv, prog="lmleak layers")
    result = run_layers(config, command=shlex.join(["lmleak", "layers", *argv]))
    if process_state().is_main_process:
        _report_layers(result)
    return 0


def _report_layers(result: "LayersResult") -> None:
    from lmleak.report.layers_page import console_report, write_layers_report

    page = write_layers_report(result)
    _show(*console_report(result), f"report: {page}")


def _gate(worst_recall: float | None, threshold: float) -> int:
    if worst_recall is None:
        raise ConfigError("fail_above cannot judge: no attack could run under the defenses asked for")
    failed = worst_recall > threshold
    verdict = "FAILED" if failed else "passed"
    _show(f"gate {verdict}: the strongest attack recovered {worst_recall:.1%} of tokens, allowed are {threshold:.1%}")
    return GATE_FAILED if failed else 0


def report(argv: Sequence[str]) -> int:
    """Write the report again from results.jsonl and summary.json of a folder."""
    from lmleak.report.page import write_report
    from lmleak.report.tables import console_table

    if len(argv) != 1 or argv[0].startswith("-"):
        raise ConfigError("usage: lmleak report FOLDER (the output folder of an audit)")
    folder = Path(argv[0])
    if (folder / "protection").is_dir():
        from lmleak.report.layers_page import read_layers_result

        _report_layers(read_layers_result(folder))
        return 0
    results, summary = folder / "results.jsonl", folder / "summary.json"
    for file in (results, summary):
        if not file.is_file():
            raise DataError(f"{file} does not exist; {folder} is no folder of a finished audit")
    try:
        rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
        meta = json.loads(summary.read_text(encoding="utf-8"))["meta"]
        if not rows or not all({"key", "example", "defense", "attacks", "texts"} <= row.keys() for row in rows):
            raise ValueError("rows are missing, or not rows of an audit")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder} holds damaged results: {error}") from error
    page = write_report(rows, meta, folder)
    _show(console_table(rows, meta), f"report: {page}")
    return 0


def capture(argv: Sequence[str]) -> int:
    """Write a gradient file and, apart from it, the private reference."""
    _quiet_libraries()
    from lmleak.config import parse_config
    from lmleak.evaluation import CaptureConfig, run_capture
    from lmleak.report.recovery import capture_lines

    config = parse_config(CaptureConfig, argv, prog="lmleak capture")
    _show(*capture_lines(run_capture(config)))
    return 0


def attack(argv: Sequence[str]) -> int:
    """Recover texts or images from a gradient file, write them, print a table."""
    _quiet_libraries()
    from lmleak.config import parse_config
    from lmleak.evaluation import AttackConfig, run_recovery
    from lmleak.report.image_recovery import recovered_images_table, write_recovered_picture
    from lmleak.report.recovery import recovery_lines, recovery_table

    config = parse_config(AttackConfig, argv, prog="lmleak attack", positional=("gradient",))
    with Console(stderr=True).status(Text(f"attacking {config.gradient}")):
        result = run_recovery(config)
    if result.normalization is None:
        _show(recovery_table(result), *recovery_lines(result))
    else:
        picture = write_recovered_picture(result)
        _show(recovered_images_table(result), *recovery_lines(result), f"picture: {picture}")
    return 0


def score(argv: Sequence[str]) -> int:
    """Compare recovered texts or images with the private ones, print a table; of images, draw them side by side."""
    _quiet_libraries()
    from lmleak.config import parse_config
    from lmleak.evaluation import ImageScoreResult, ScoreConfig, run_score
    from lmleak.report.image_recovery import image_score_notes, image_score_table, write_comparison_picture
    from lmleak.report.recovery import score_notes, score_table

    config = parse_config(ScoreConfig, argv, prog="lmleak score", positional=("recovered", "reference"))
    result = run_score(config)
    if isinstance(result, ImageScoreResult):
        picture = write_comparison_picture(result, config.picture_path)
        _show(image_score_table(result), *image_score_notes(result), f"picture: {picture} (holds the private images)")
    else:
        _show(score_table(result), *score_notes(result))
    return 0


def _show(*parts: RenderableType) -> None:
    """Print tables, and lines as they are; refuse if the output's disk is full."""
    with refused_writes("the standard output"):
        try:
            for part in parts:
                if isinstance(part, str):
                    print(part)  # plainly: private text may hold square brackets
                else:
                    Console().print(part)
            sys.stdout.flush()
        except OSError:
            # What is still buffered would fail again, with a traceback, when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise


def _quiet_libraries() -> None:
    """Keep progress bars and advice of the libraries out of the audit's own output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


if __name__ == "__main__":
    sys.exit(main())
