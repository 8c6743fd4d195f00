import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmleak.defenses import (
    Bfloat16,
    Chain,
    Clip,
    GaussianNoise,
    HideLayers,
    NoDefense,
    Prune,
    Quantize,
    Sign,
    TopK,
    derived_seed,
    parse_defense,
)
from lmleak.errors import ConfigError


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("none", NoDefense()),
        (" none() ", NoDefense()),
        ("gaussian(std=0.1)", GaussianNoise(0.1)),
        ("gaussian(std=1e-3, unit=rms)", GaussianNoise(1e-3, "rms")),
        ("gaussian( unit = 'rms' ,std=1e+2,)", GaussianNoise(100, "rms")),
        ("prune(ratio=.9)", Prune(0.9)),
        ("topk(k=1_000)", TopK(k=1000)),
        ("topk(fraction=1)", TopK(fraction=1.0)),
        ("sign(scale=none)", Sign("none")),
        ("quantize", Quantize()),
        ("bf16(stochastic=true)", Bfloat16(True)),
        ("bf16(stochastic=False)", Bfloat16(False)),
        ("hide-layers(names=encoder.layer.0)", HideLayers("encoder.layer.0")),
        (r"hide-layers(names='\.(0|1)\.')", HideLayers(r"\.(0|1)\.")),
        (r'hide-layers(names="\bemb+, (x)")', HideLayers(r"\bemb+, (x)")),
    ],
)
def test_specifications(spec, expected):
    defense = parse_defense(spec)
    assert defense == expected
    assert parse_defense(defense.describe()) == defense


def test_descriptions_are_stable_public_text():
    assert GaussianNoise(std=1e-3).describe() == "gaussian(std=0.001, unit=absolute)"
    assert TopK(k=5).describe() == "topk(k=5)"
    assert Sign("none").describe() == "sign(scale=none)"
    assert HideLayers(r"\.0\.").describe() == r"hide-layers(names='\.0\.')"
    assert HideLayers("a'b").describe() == 'hide-layers(names="a\'b")'


def test_chain_seeds_are_derived_per_part():
    chain = parse_defense("clip(max_norm=1)+gaussian(std=0.01) + hide-layers(names='a+b')+gaussian(std=2)", seed=7)
    assert chain == Chain(
        (
            Clip(1.0),
            GaussianNoise(0.01, seed=derived_seed(7, 1)),
            HideLayers("a+b"),
            GaussianNoise(2.0, seed=derived_seed(7, 3)),
        )
    )
    assert chain == chain.with_seed(7)
    assert chain != chain.with_seed(8)
    assert parse_defense("gaussian(std=1)", seed=7).seed == 7


@settings(deadline=None)
@given(
    std=st.floats(0, allow_nan=False, allow_infinity=False),
    names=st.text(st.characters(codec="ascii", exclude_characters="\"'\\()[]{}*+?|"), min_size=1),
    quote=st.sampled_from(["", "'", '"']),
    seed=st.integers(0, 2**63 - 1),
)
def test_description_parses_back_to_the_same_defense(std, names, quote, seed):
    chain = Chain((HideLayers(names + quote), GaussianNoise(std))).with_seed(seed)
    assert parse_defense(chain.describe(), seed=seed) == chain


@settings(deadline=None)
@given(st.text(st.sampled_from("clipgausn-+(),='\"mx_ort1.0 "), max_size=40))
def test_any_text_is_parsed_or_refused(spec):
    try:
        defense = parse_defense(spec)
    except ConfigError:
        return
    assert parse_defense(defense.describe()) == defense


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gausian(std=1)", "unknown defense 'gausian'. Did you mean 'gaussian'"),
        ("gaussian", r"gaussian needs std=...; write for instance gaussian\(std"),
        ("hide-layers", "hide-layers needs names="),
        ("gaussian(sdt=1)", "gaussian has no argument 'sdt'. Did you mean 'std'"),
        ("none(std=1)", "none has no argument 'std'. It has none"),
        ("gaussian(std=1, std=2)", "gives 'std' twice"),
        ("gaussian(std=1, seed=3)", r"must not be; pass it beside the specification"),
        ("gaussian(std=-1)", "std must be a finite number >= 0, got -1"),
        ("gaussian(std=nan)", "got 'nan'"),
        ("gaussian(std=inf)", "got 'inf'"),
        ("gaussian(std=1e999)", "got inf"),
        ("gaussian(std=1j)", "got '1j'"),
        ("gaussian(std='1')", "got '1'"),
        ("gaussian(std=true)", "got True"),
        ("gaussian(0.1)", "expected key=value"),
        ("gaussian(std=)", "expected key=value"),
        ("gaussian(std=0.1 unit=rms)", "expected key=value"),
        ("gaussian(std=0.1", "cannot read the defense"),
        ("gaussian(std=0.1))", "cannot read the defense"),
        ("gaussian(std=(1))", "cannot read the defense"),
        ("gaussian(std=__import__('os').getpid())", "cannot read the defense"),
        ("gaussian(std=os.sep)", "got 'os.sep'"),
        ("gaussian(std=[1])", r"got '\[1\]'"),
        ("hide-layers(names=0)", "must be a regular expression over parameter names, got 0"),
        ("hide-layers(names='a", "cannot read the defense"),
        ("clip(max_norm=1)+", "cannot read the defense"),
        ("+clip(max_norm=1)", "cannot read the defense"),
        ("clip(max_norm=1)-clip(max_norm=1)", "cannot read the defense"),
        ("clip(max_norm=1) clip(max_norm=1)", "cannot read the defense"),
        ("prune(ratio=1)", r"ratio must be a number in \[0, 1\)"),
        ("topk(k=2, fraction=0.1)", "exactly one of k and fraction"),
        ("sign(scale=max)", "scale must be mean or none, got 'max'"),
        ("", "cannot read the defense"),
        (None, "given as text, got None"),
        ({"name": "clip"}, "given as text"),
    ],
)
def test_refusals_say_what_to_write(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse_defense(spec)


def test_seed_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="seed must be an integer"):
        parse_defense("gaussian(std=1)", seed="secret")
