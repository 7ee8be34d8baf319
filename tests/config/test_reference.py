"""The reference of all settings, in Markdown."""

import typing

import pytest
from pydantic import BaseModel

from infini_ds.config import MixtureCorpus, RunConfig, reference


def sections(prefix: str, section: type[BaseModel]):
    for name, field in section.model_fields.items():
        kinds = (field.annotation, *typing.get_args(field.annotation))
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if inner == [MixtureCorpus]:  # the rest of it is told with `data`
            yield f"{prefix}{name}.NAME.weight", MixtureCorpus.model_fields["weight"]
        elif inner:
            yield from sections(f"{prefix}{name}.", inner[0])
        else:
            yield f"{prefix}{name}", field


FIELDS = dict(sections("", RunConfig))


@pytest.mark.parametrize("name", FIELDS)
def test_reference_has_a_row_for(name):
    rows = [line for line in reference().splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1
    description = FIELDS[name].description
    assert description
    assert description in rows[0]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("train.steps", "int, at least 1"),
        ("train.timeout", "float, above 0 seconds and at most 604800 (a week)"),
        ("train.curriculum.advance_at", "float, above 0 and at most 1"),
        ("optimizer.beta1", "float, in [0, 1)"),
        ("model.gate_init", "float, from -10000 to 10000"),
        ("data.mixture.NAME.weight", "float, from 1e-6 to 1e6"),
        ("parallel.pipeline_stages", r"int \| `auto`, at least 1"),
        ("seed", "int"),
    ],
)
def test_reference_has_the_range_of(name, kind):
    assert f"| `{name}` | {kind} |" in reference()


def test_reference_is_tables_of_four_columns():
    rows = [line for line in reference().splitlines() if line.startswith("|")]
    assert {row.replace("\\|", "").count("|") for row in rows} == {5}
