"""Configuration: YAML becomes arguments, the command line wins, and what cannot be right is refused."""

import dataclasses
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak.config import check_counts, check_positive, parse_config, to_yaml
from lmleak.errors import ConfigError


@dataclass
class Base:
    """Settings that every study has."""

    seed: int = 0
    """Seed of everything random."""


@dataclass
class Study(Base):
    """Settings of a study, in one line.

    More words that no help text needs.
    """

    name: str = "default"
    """Name of the study, 100% free."""
    noise_std: float = 1e-3
    """Standard deviation of the noise."""
    samples: int = 4
    """How many examples."""
    task: Literal["causal-lm", "masked-lm"] = "causal-lm"
    """The loss."""
    levels: list[float] = field(default_factory=lambda: [0.1, 1.0])
    """Noise levels."""
    texts: list[str] = field(default_factory=list)
    """Texts given inline."""
    use_gpu: bool = False
    """Whether to use one."""
    progress: bool = True
    """Whether to show progress."""
    limit: float | None = None
    """Largest risk allowed."""
    cut: int | None = 7
    """Where to cut, or null for nowhere."""


@dataclass
class Required:
    """Something must be given."""

    model: str
    """Which model."""
    steps: int = 3
    """How many."""

    def __post_init__(self):
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")


@pytest.fixture
def parse(tmp_path):
    """Parse YAML text together with arguments."""

    def run(text=None, argv=(), config_class=Study):
        path = tmp_path / "run.yaml"
        if text is None:
            return parse_config(config_class, list(argv))
        path.write_text(text, encoding="utf-8")
        return parse_config(config_class, ["--config", str(path), *argv])

    return run


def test_nothing_given_gives_the_defaults(parse):
    assert parse() == Study()
    assert parse("") == Study()
    assert parse("# only a comment\n") == Study()


def test_yaml_sets_what_it_names(parse):
    got = parse("name: abc\nnoise_std: 0.5\nsamples: 9\ntask: masked-lm\nlevels: [1, 2.5]\nuse_gpu: true\n")
    assert got == Study(name="abc", noise_std=0.5, samples=9, task="masked-lm", levels=[1.0, 2.5], use_gpu=True)
    assert all(isinstance(level, float) for level in got.levels)


def test_the_command_line_wins_wherever_it_stands(parse, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("samples: 9\nlevels: [1, 2, 3]\nuse_gpu: true\nprogress: false\n")
    for argv in (["--samples", "2", "--config", str(path)], [f"--config={path}", "--samples=2"]):
        assert parse_config(Study, argv).samples == 2
    got = parse_config(Study, ["--config", str(path), "--levels", "7", "--no-use-gpu", "--progress"])
    assert (got.levels, got.use_gpu, got.progress) == ([7.0], False, True)


@pytest.mark.parametrize("option", ["--noise-std", "--noise_std"])
def test_options_may_have_dashes_or_underscores(option, parse):
    assert parse(argv=[option, "0.25"]).noise_std == 0.25
    assert parse(argv=[f"{option}=0.25"]).noise_std == 0.25


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "'1e-5'", ".00001"])
def test_small_numbers_stay_numbers(text, parse):
    """YAML 1.1 reads 1e-5 as a word."""
    assert parse(f"noise_std: {text}").noise_std == 1e-5
    assert parse(f"levels: [{text}, 1e+2, 3]").levels == [1e-5, 100.0, 3.0]


def test_numbers_may_be_negative(parse):
    assert parse("noise_std: -1e-5\nlevels: [-1, -2.5, -1e-3]\nsamples: -3") == Study(
        noise_std=-1e-5, levels=[-1.0, -2.5, -1e-3], samples=-3
    )
    assert parse(argv=["--levels", "-1", "-2.5", "--samples", "-3"]).levels == [-1.0, -2.5]


@pytest.mark.parametrize(("text", "expected"), [("true", True), ("false", False), ("yes", True), ("off", False)])
def test_booleans_go_both_ways(text, expected, parse):
    got = parse(f"use_gpu: {text}\nprogress: {text}")
    assert (got.use_gpu, got.progress) == (expected, expected)
    assert parse(argv=["--use_gpu", "--no-progress"]) == Study(use_gpu=True, progress=False)
    assert parse(argv=["--no-use_gpu"]).use_gpu is False


def test_null_is_nothing_where_nothing_is_allowed_and_the_default_elsewhere(parse):
    assert parse("limit: null\ncut: null\nsamples: null\nname: ~\n") == Study(cut=None)
    assert parse("cut: null", ["--cut", "3"]).cut == 3


def test_one_value_makes_a_list_and_none_an_empty_one(parse):
    assert parse("levels: 0.5").levels == [0.5]
    assert parse("levels: []").levels == []
    assert parse("texts: one text").texts == ["one text"]
    assert parse(argv=["--texts", "a", "b c"]).texts == ["a", "b c"]


@pytest.mark.parametrize(
    "text", ["plain", "-dash", "--option", "--seed", "two words", "- item", "a=b", "#no comment", "ümlaut 字", "@file",
             "1", "--config", "100%", "line\nbreak", "true", "null"]
)  # fmt: skip
def test_any_text_survives_yaml(text, tmp_path):
    path = tmp_path / "run.yaml"
    expected = Study(name=text, texts=[text, "and", text])
    path.write_text(to_yaml(expected), encoding="utf-8")
    assert parse_config(Study, ["--config", str(path)]) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sampels: 3", "unknown key 'sampels'. Did you mean 'samples'"),
        ("3: 4", "unknown key 3"),
        ("noise-std: 1", "unknown key 'noise-std'. Did you mean 'noise_std'"),
        ("samples: 2.5", "samples.*invalid int value: '2.5'"),
        ("samples: many", "invalid int value: 'many'"),
        ("samples: 1e3", "invalid int value"),
        ("noise_std: large", "invalid float value: 'large'"),
        ("levels: [1, x]", "invalid float value: 'x'"),
        ("task: causal", "invalid choice: 'causal'.*masked-lm"),
        ("samples: true", "read as a truth value"),
        ("name: no", "quote it if a word is meant"),
        ("name: {a: 1}", "holds a mapping; settings are flat"),
        ("levels: [[1, 2]]", "flat list"),
        ("levels: [true]", "flat list"),
        ("texts: [{a: 1}]", "flat list"),
        ("texts: [a, null]", "flat list"),
        ("samples: [1, 2]", "samples takes one value, got a list of 2"),
        ("samples: [1]", "samples takes one value"),
        ("use_gpu: 1", "use-gpu"),
        ("use_gpu: [true]", "flat list|one value"),
        ("use_gpu: maybe", "use-gpu"),
        ("- a\n- b", "'key: value' lines, got a list"),
        ("just words", "got a str"),
        ("a: [", "is not valid YAML"),
        ("a: 1\n\tb: 2", "is not valid YAML"),
    ],
)
def test_what_cannot_be_right_is_refused(text, message, parse):
    with pytest.raises(ConfigError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sampels", "3"], "unknown argument '--sampels'. Did you mean 'samples'"),
        (["--noise-sdt=3"], "Did you mean 'noise_std'"),
        (["--samples", "2.5"], "invalid int value: '2.5'"),
        (["--samples"], "expected one argument"),
        (["--sample", "3"], "unknown argument '--sample'"),  # no abbreviations: a later option would change them
        (["--task", "causal"], "invalid choice"),
        (["words"], "unknown argument 'words'"),
        (["--config"], "needs a file name"),
        (["--config", "/no/such/file.yaml"], "cannot read the configuration"),
        (["--confg", "x.yaml"], "Did you mean 'config'"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(argv, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(Study, argv)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff\xfe\x00\x81" * 8)
    with pytest.raises(ConfigError, match=r"not valid YAML|cannot read"):
        parse_config(Study, ["--config", str(path)])
    with pytest.raises(ConfigError, match="cannot read"):
        parse_config(Study, ["--config", str(tmp_path)])


def test_the_first_word_of_an_error_is_where_it_is(parse, tmp_path):
    with pytest.raises(ConfigError, match=r"run\.yaml: unknown key"):
        parse("sampels: 3")


def test_required_settings_and_checks_of_the_class(parse):
    with pytest.raises(ConfigError, match="required: --model"):
        parse(config_class=Required)
    assert parse("model: x", config_class=Required) == Required("x")
    assert parse(argv=["--model", "y"], config_class=Required).model == "y"
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        parse("model: x\nsteps: 0", config_class=Required)


@dataclass
class Positional:
    """Some words need no option."""

    source: str
    """Where from."""
    count: int
    """How many."""
    texts: list[str] = field(default_factory=list)
    """Texts."""
    seed: int = 0
    """Seed."""


def positional(*argv):
    return parse_config(Positional, argv, positional=("source", "count"))


def test_words_fill_the_positional_fields_in_order(tmp_path):
    expected = Positional("a", 3, seed=1)
    for argv in (["a", "3", "--seed", "1"], ["--seed", "1", "a", "3"], ["a", "--seed", "1", "3"],
                 ["--count", "3", "a", "--seed=1"], ["--source=a", "--count=3", "--seed=1"]):  # fmt: skip
        assert positional(*argv) == expected, argv
    path = tmp_path / "run.yaml"
    path.write_text("source: b\ncount: 3\nseed: 1\n")
    assert positional("a", "--config", str(path)) == expected
    assert positional("--config", str(path)) == Positional("b", 3, seed=1)
    assert positional("a", "3", "--texts", "b", "c") == Positional("a", 3, ["b", "c"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a"], "required: COUNT"),
        ([], "required: SOURCE, COUNT"),
        (["a", "many"], "count: invalid int value: 'many'"),
        (["a", "3", "extra"], "unknown argument 'extra'"),
        (["a", "3", "--sed", "1"], "unknown argument '--sed'. Did you mean 'seed'"),
        (["a", "3", "--source", "b"], "source is given twice"),
    ],
)
def test_words_that_cannot_be_right_are_refused(argv, message):
    with pytest.raises(ConfigError, match=message):
        positional(*argv)


def test_help_shows_positional_words(capsys):
    with pytest.raises(SystemExit):
        parse_config(Positional, ["--help"], prog="lmleak p", positional=("source", "count"))
    assert "usage: lmleak p SOURCE COUNT [--key value ...]" in capsys.readouterr().out


def test_help_says_what_every_field_means(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_config(Study, ["--help"], prog="lmleak study")
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "lmleak study" in shown
    assert "Settings of a study, in one line." in shown
    assert "More words" not in shown
    for words in ("Seed of everything random.", "Name of the study, 100% free.", "Standard deviation of the noise.",
                  "(default: 0.001)", "(default: [0.1, 1.0])", "--no-use-gpu", "Where to cut", "YAML"):  # fmt: skip
        assert words in shown, words


def test_help_survives_a_percent_sign_in_a_default(capsys):
    @dataclass
    class Percent:
        """Percent."""

        pattern: str = "%d%s"
        """A pattern."""

    with pytest.raises(SystemExit):
        parse_config(Percent, ["--help"])
    assert "%d%s" in capsys.readouterr().out


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        Study,
        seed=st.integers(), name=st.text(st.characters(exclude_categories=["Cs", "Cc"])),
        noise_std=st.floats(allow_nan=False), samples=st.integers(),
        task=st.sampled_from(["causal-lm", "masked-lm"]), levels=st.lists(st.floats(allow_nan=False)),
        texts=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]))), use_gpu=st.booleans(),
        progress=st.booleans(), limit=st.none() | st.floats(allow_nan=False), cut=st.none() | st.integers(),
    )
)  # fmt: skip
def test_a_resolved_configuration_reads_back_to_an_equal_one(config):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        assert parse_config(Study, ["--config", str(path)]) == config


def test_a_resolved_configuration_keeps_the_order_of_the_fields():
    lines = [line.partition(":")[0] for line in to_yaml(Study(levels=[], texts=[])).splitlines()]
    assert lines == [f.name for f in dataclasses.fields(Study)]


def test_infinity_survives(parse):
    assert parse(to_yaml(Study(noise_std=math.inf, levels=[-math.inf]))) == Study(
        noise_std=math.inf, levels=[-math.inf]
    )


def test_counts_are_at_least_one_or_not_set():
    settings = dataclasses.make_dataclass("Settings", ["steps", "limit", "threads"])
    check_counts(settings(1, None, 0), "steps", "limit")
    with pytest.raises(ConfigError, match="threads must be at least 1, got 0"):
        check_counts(settings(1, 2, 0), "steps", "limit", "threads")


def test_positive_numbers_and_lists_of_them():
    settings = dataclasses.make_dataclass("Settings", ["value"])
    for good in (1e-300, 3, [0.5], (1, 2.0)):
        check_positive(settings(good), "value")
    for bad in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match=f"value must be positive, got {bad}"):
            check_positive(settings(bad), "value")
        with pytest.raises(ConfigError, match="value must be positive and not empty"):
            check_positive(settings([1.0, bad]), "value")
    with pytest.raises(ConfigError, match=r"not empty, got \[\]"):
        check_positive(settings([]), "value")
