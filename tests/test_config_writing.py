"""Configs as TOML: what is written is read again."""

from __future__ import annotations

import math
import sys
from datetime import date, time, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimx import ConfigError
from optimx.config.writing import to_toml

# python 3.10 has none of its own
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

text = st.text() | st.text(st.sampled_from('"\\\n\t\r\x00\x1f\x7f\x85\u2028 .#=[]\U0001f600a'))
leaves = (
    st.booleans()
    | st.integers()
    | st.floats()
    | text
    | st.dates()
    | st.datetimes(timezones=st.none() | st.just(timezone.utc))
    | st.times()
)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, float):
        return type(other) is float and (one == other or (math.isnan(one) and math.isnan(other)))
    if isinstance(one, dict):
        return isinstance(other, dict) and [*one] == [*other] and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@given(st.dictionaries(text, values | st.none(), max_size=4))
def test_what_is_written_is_read(tree: dict[str, Any]) -> None:
    read = tomllib.loads(to_toml(tree).encode().decode())
    expected = {key: value for key, value in tree.items() if value is not None}
    # sections come last
    assert same({key: read[key] for key in expected}, expected)
    assert read.keys() == expected.keys()


def test_how_it_reads() -> None:
    tree = {
        "groups": {"rules": [{"match": "head.*", "lr_mult": 2.0}], "no decay": [], "layers": None},
        "preset": "gan",
        "optimizer": {"lr": 1e-5, "eps": math.inf, "nesterov": True, "betas": (0.9, 0.95), "at": date(2024, 2, 29)},
    }
    assert to_toml(tree) == (
        'preset = "gan"\n\n'
        '[groups]\nrules = [{ match = "head.*", lr_mult = 2.0 }]\n"no decay" = []\n\n'
        "[optimizer]\nlr = 1e-05\neps = inf\nnesterov = true\nbetas = [0.9, 0.95]\nat = 2024-02-29\n"
    )


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"optimizer": {"name": dict}}, "optimizer.name should be of a type that TOML has but is: <class 'dict'>"),
        ({"groups": {"layers": [1, None]}}, r"groups.layers\[1\] should be of a type that TOML has but is: None"),
        ({"groups": {"rules": [{1: 2}]}}, r"groups.rules\[0\] should have strings as keys but is: 1"),
        ({1: 2}, "cfg should have strings as keys but is: 1"),
        ({"preset": "\ud800"}, "preset should be text that UTF-8 has"),
        ({"at": time(1, tzinfo=timezone.utc)}, "at should be of a type that TOML has"),
        ({"at": {"then": {"x": 1j}}}, "at.then.x should be of a type that TOML has but is: 1j"),
    ],
)
def test_what_toml_cannot_say(tree: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_toml(tree)
