"""Every value that cannot be read is a YAMLError, in one place of the text."""

import pytest
import yaml

from infini_ds.read_yaml import read_yaml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!int abc", "'abc' is not of type int"),
        ("a: !!float abc", "'abc' is not of type float"),
        ("a: !!bool abc", "'abc' is not of type bool"),
        ("a: !!timestamp 2020-13-45", "'2020-13-45' is not of type timestamp"),
        ("a: !!map [b]", "expected a mapping node"),
        ("a: 0b_", "'0b_' is not of type int"),
        ("a: 0x_", "'0x_' is not of type int"),
        pytest.param("a: " + "9" * 5000, "9999' is not of type int", id="digits"),
        pytest.param("a: 0x" + "f" * 5000, "ffff' is too large", id="hexadecimal"),
        pytest.param("a: " + "[" * 5000, "nested too deeply", id="nested"),
        (r'a: "x\0y"', r"'x\x00y' has a NUL"),
        (r'"x\0y": 1', r"'x\x00y' has a NUL"),
        (r'a: "\ud800"', r"'\ud800' has a NUL or half a character"),
        ("a: [", "while parsing"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(yaml.YAMLError) as caught:
        read_yaml(text)
    assert message in str(caught.value)


def test_a_value_that_is_refused_has_a_place():
    with pytest.raises(yaml.YAMLError, match="line 2, column 4"):
        read_yaml("a: 1\nb: 0x_\n")


def test_a_key_that_is_given_twice_is_where_it_is_given_again():
    with pytest.raises(yaml.YAMLError, match=r"'b' is given twice\s.*line 5, column 3"):
        read_yaml("a:\n  b: 1\n  c:\n    b: 2\n  b: 3\n")


@pytest.mark.parametrize("text", ["2020-13-45", "2020-01-01", "2020-01-01 10:00:00"])
def test_dates_stay_as_they_are_written(text):
    assert read_yaml(text) == text


@pytest.mark.parametrize(("text", "value"), [("3e-4", 3e-4), ("1_000", 1000), ("0x10", 16)])
def test_numbers_are_numbers(text, value):
    assert read_yaml(text) == value
