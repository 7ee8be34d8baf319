"""Every value that cannot be read is a YAMLError, in one place of the text."""

import pytest
import yaml

from infini_ds.config.read_yaml import read_value, read_yaml, write_yaml


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
        ("a: 010", "'010' is octal to some and decimal to others"),
        ("a: -07", "'-07' is octal to some"),
        ("a: 08", "'08' is octal to some"),
        ("a: 1\n\tb: 2", "found character '\\t'"),
        ("a: 1\n---\na: 2", "expected a single document"),
        (r'a: "C:\data"', "unknown escape character 'd'"),
        ("a: b: c", "mapping values are not allowed here"),
        ("a: *b", "found undefined alias 'b'"),
        ("<<: 3", "expected a mapping or list of mappings for merging"),
        ("a: !new b", "could not determine a constructor for the tag '!new'"),
        (b"a: caf\xe9 b", "invalid continuation byte"),
        (b"\xff\xfea", "truncated data"),
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


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("1_000", 1000), ("0x10", 16), ("1e-4", 1e-4), ("1E6", 1e6), (".5", 0.5),
     ("-.5", -0.5), ("+.5e1", 5.0), ("1.", 1.0), ("+1", 1), ("-0", 0), ("0o17", 15), ("0b11", 3),
     ("1_000.5", 1000.5), ("6.02e23", 6.02e23)],
)  # fmt: skip
def test_numbers_are_numbers(text, value):
    assert read_yaml(text) == value
    assert type(read_yaml(text)) is type(value)


@pytest.mark.parametrize(
    "text",
    ["yes", "no", "on", "OFF", "y", "1:30", "12:30:45", "=", "<", "e5", "1e", "0o8", "inf", "1,000",
     "v1", "C:\\data\\new", "http://a/b?c=d#e", "key:value", "~/a", "~a", "a #", "a#b", "$HOME",
     "-a", "*"],
)  # fmt: skip
def test_text_stays_text(text):
    quotes = '"' if text in ("a #", "*") else ""
    assert read_yaml(f"{quotes}{text}{quotes}") == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("True", True), ("FALSE", False), ("~", None), ("null", None), ("", None),
     ("a:", {"a": None}), ("a: ~", {"a": None}), ("# nothing", None),
     ("---\na: 1\n...\n", {"a": 1}),
     ("a: 1\r\nb:\r\n  - 2\r\n", {"a": 1, "b": [2]}), ("a: [1,\n  2]  # two", {"a": [1, 2]}),
     ("a: [1, 2,]", {"a": [1, 2]}), ("a: |\n  b\n  c\n", {"a": "b\nc\n"}), ("'a b': 'it''s'",
     {"a b": "it's"}), ('"2"', "2"), (r'{"a": "\ud83d\ude42"}', {"a": "🙂"}),
     ("no: 1\non: 2", {"no": 1, "on": 2})],
)  # fmt: skip
def test_other_values_are_what_yaml_says(text, value):
    assert read_yaml(text) == value


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_bytes_are_read_in_the_encoding_that_they_say(encoding):
    assert read_yaml("a: Länge 🙂\r\n".encode(encoding)) == {"a": "Länge 🙂"}


BASE = "base: &base {a: 1, b: {c: 2}}\nother: &other {b: 3, d: 4}\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        pytest.param("<<: *base", {"a": 1, "b": {"c": 2}}, id="alone"),
        pytest.param("<<: *base\n  a: 5", {"a": 5, "b": {"c": 2}}, id="own_key_behind"),
        pytest.param("a: 5\n  <<: *base", {"a": 5, "b": {"c": 2}}, id="own_key_before"),
        pytest.param("<<: *base\n  e: 5", {"a": 1, "b": {"c": 2}, "e": 5}, id="another_key"),
        pytest.param(
            "<<: [*base, *other]", {"a": 1, "b": {"c": 2}, "d": 4}, id="first_of_a_list_wins"
        ),
        pytest.param("<<: [*other, *base]", {"a": 1, "b": 3, "d": 4}, id="list_the_other_way"),
        pytest.param("<<: [*other, *base]\n  b: 0", {"a": 1, "b": 0, "d": 4}, id="list_and_key"),
        pytest.param("{<<: *other, d: 0}", {"b": 3, "d": 0}, id="in_flow_form"),
        pytest.param("<<: {x: 1}\n  y: 2", {"x": 1, "y": 2}, id="without_an_anchor"),
        pytest.param(
            "in: {<<: *other, b: 0}", {"in": {"b": 0, "d": 4}}, id="deeper"
        ),
        pytest.param(
            "in: &in {<<: *other, b: 0}\n  on: {<<: *in, e: 5}",
            {"in": {"b": 0, "d": 4}, "on": {"b": 0, "d": 4, "e": 5}}, id="of_one_that_merges",
        ),
        pytest.param(
            "<<: *base\n  b: {<<: *other, c: 5}", {"a": 1, "b": {"b": 3, "d": 4, "c": 5}},
            id="inner_section_is_replaced",
        ),
        pytest.param('"<<": 1', {"<<": 1}, id="quoted_it_is_a_key"),
    ],
)  # fmt: skip
def test_merge_keys_are_understood(text, value):
    assert read_yaml(f"{BASE}it:\n  {text}\n")["it"] == value


@pytest.mark.parametrize(
    ("text", "key"),
    [("<<: *base\n  a: 5\n  a: 6", "a"), ("<<: *base\n  <<: *other", "<<"),
     ("{<<: *base, a: 1, a: 1}", "a"), ('a: 1\n  "a": 2', "a"), ("in: {b: 1, b: 2}", "b"),
     ("in: &in {<<: *base, a: 1, a: 2}\n  on: *in", "a"), ("<<: {x: 1, x: 2}", "x")],
)  # fmt: skip
def test_key_that_is_given_twice_is_refused_beside_what_is_merged(text, key):
    with pytest.raises(yaml.YAMLError, match=f"key '{key}' is given twice"):
        read_yaml(f"{BASE}it:\n  {text}\n")


@pytest.mark.parametrize(
    ("text", "value"),
    [("", None), ("~", None), ("5", 5), (" 5 ", 5), ("'a b'", "a b"), ("a b", "a b"),
     ("a#b", "a#b"), ("'#5'", "#5"), ('"a\\nb"', "a\nb"), ("a=b", "a=b"), ("=", "="),
     ("[a, b]", ["a", "b"]),
     ("[a, 'b c']", ["a", "b c"]), ("- a\n- b", ["a", "b"]), ("{a: 1}", {"a": 1}), ("''", ""),
     ("' a '", " a "), ("!!str 5", "5"), ("a*", "a*"), ("costs $HOME", "costs $HOME")],
)  # fmt: skip
def test_override_is_yaml(text, value):
    assert read_value(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Issue #5", "'#5' would be a comment; put the value in quotes"),
        ("#fff", "'#fff' would be a comment"),
        ("5 # steps", "'# steps' would be a comment"),
        ("[a] # b", "'# b' would be a comment"),
        (" a", "it would be read as 'a'; put the value in quotes"),
        ("a ", "it would be read as 'a'"),
        ("a\nb", "it would be read as 'a b'"),
        ("a\r", "it would be read as 'a'"),
        ("\n\n", "it would be read as None"),
        (" ", "it would be read as None"),
        ("*.txt", "put the value in quotes"),
        ("@a", "put the value in quotes"),
        ("`a`", "put the value in quotes"),
        ("!a", "put the value in quotes"),
        ("%a", "put the value in quotes"),
        ("[", "expected the node content"),
    ],
)
def test_override_that_yaml_would_shorten_is_refused(text, message):
    with pytest.raises(yaml.YAMLError) as caught:
        read_value(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "value",
    ["yes", "off", "~", "null", "", "1e6", "-.5", ".5", "08", "010", "0o17", "1:30", "<<", "=",
     "#a", "*a", "a: b", " a ", "a\nb", "2020-01-01", "Länge\u2028🙂", "C:\\a", "{a}", 1e-5, 5,
     True, None, [1, "2"], {"no": "on"}],
)  # fmt: skip
def test_what_is_written_is_read_as_it_was_by_either_version(value):
    text = write_yaml({"key": value})
    assert read_yaml(text) == yaml.safe_load(text) == {"key": value}
