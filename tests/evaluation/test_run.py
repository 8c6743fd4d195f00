"""What all recipes share: a refusal is one line and an exit status, anything else is an error."""

import importlib

import pytest

from lmleak.errors import ConfigError, DataError
from lmleak.evaluation import exit_status


def test_a_refusal_is_said_in_one_line_and_returned_as_a_status(capsys):
    @exit_status
    def main(argv):
        """Do it."""
        raise {"config": ConfigError, "data": DataError}[argv[0]]("no such thing")

    assert [main([kind]) for kind in ("config", "data")] == [2, 2]
    printed = capsys.readouterr()
    assert printed.err == "refused: no such thing\n" * 2
    assert printed.out == ""
    assert (main.__name__, main.__doc__) == ("main", "Do it.")


def test_success_is_zero_and_mistakes_of_the_program_are_not_hidden(capsys):
    seen = []
    assert exit_status(seen.append)(["--a", "b"]) == 0
    assert seen == [["--a", "b"]]
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda argv: 1 / len(argv))([])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "entry"),
    [(name, "main") for name in (
        "attack_comparison", "attack_table", "defense_comparison", "influence_vs_attack", "predicted_recovery",
    )] + [("train_reference_models", "command")],
)  # fmt: skip
def test_every_recipe_refuses_so(name, entry, capsys):
    recipe = importlib.import_module(name)
    assert getattr(recipe, entry)(["--sed", "1"]) == 2
    assert capsys.readouterr().err.startswith("refused: unknown argument '--sed'. Did you mean 'seed'?")
