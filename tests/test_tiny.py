"""Changes of the settings of tiny runs: sections are added to, and later changes win."""

from infini_ds.config import load
from tests import tiny


def test_sections_keep_what_is_not_changed():
    tree = tiny.run_tree(seed=1, train={"steps": 3}, parallel={"zero_stage": 0})
    assert (tree["seed"], tree["parallel"]) == (1, {"zero_stage": 0})
    assert tree["train"] == tiny.run_tree()["train"] | {"steps": 3}


def test_later_changes_win():
    tree = tiny.run_tree(train__steps=2, train={"steps": 3, "chunks": 2}, train__chunks=1)
    assert (tree["train"]["steps"], tree["train"]["chunks"]) == (3, 1)
    assert tiny.run_tree(optimizer__eps=1e-6)["optimizer"] == {"eps": 1e-6}


def test_a_tree_is_not_changed_by_another():
    first = tiny.run_tree(model__num_layers=5)
    assert tiny.run_tree(model={"num_layers": 3})["model"]["num_layers"] == 3
    assert first["model"]["num_layers"] == 5
    assert tiny.model_config().num_layers != 5


def test_the_file_holds_the_same_run(tmp_path):
    path = tiny.write_run(tmp_path / "run.yaml", output_dir="runs/é", train__steps=4)
    assert load(path) == tiny.run_config(output_dir="runs/é", train={"steps": 4})
