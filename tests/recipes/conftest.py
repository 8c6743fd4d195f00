"""What tests of recipes share; pytest's ``pythonpath`` lets recipes import their neighbours, as they do when run."""

import importlib

import pytest


@pytest.fixture(scope="module")
def recipe(request):
    """The recipe that the file of tests is named after."""
    return importlib.import_module(request.path.stem.removeprefix("test_"))
