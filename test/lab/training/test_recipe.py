"""Tests of recipes that take values from a base."""

import dataclasses
import hashlib
import json

import pytest
import yaml
from paths import ROOT
from runs import JOINT, recipe_file

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.training.recipe import Recipe

SHIPPED = {
    "ablation": "45de6bcf2b7d9527",
    "deer_3b_abc": "0dfe516e61400d1d",
    "deer_3b_abcd": "96634b4827dbd5a8",
    "deer_3b_d": "5115755cc61895af",
    "finetune_3b": "800f358b60c913b7",
    "static_12": "2f94ecb4eef3fd5a",
    "static_24": "06952ebad9f87a5f",
    "static_6": "b6c1ca9932ce2d2c",
    "tabletop": "3a73bc0aae0eeb77",
}
"""Hashes of the resolved recipes. Only an equal recipe can continue a training that began earlier."""


def test_the_shipped_recipes_are_those_that_earlier_trainings_began_with():
    found = {}
    for path in (ROOT / "config" / "training").glob("*.yaml"):
        values = json.dumps(dataclasses.asdict(Recipe.read(path)), sort_keys=True)
        found[path.stem] = hashlib.sha256(values.encode()).hexdigest()[:16]
    assert found == SHIPPED


def derived(folder, name="derived", base="recipe.yaml", **values):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"base": base, **values}))
    return path


def test_a_recipe_states_only_what_differs_from_its_base(tmp_path):
    base = Recipe.read(recipe_file(tmp_path, JOINT, {**JOINT, "turn": 0.5}))
    first = derived(
        tmp_path, name="first", network={"layers": 6}, steps={1: None, 2: {"train": {"turn": 0.2}}}
    )
    (tmp_path / "below").mkdir()
    found = Recipe.read(derived(tmp_path / "below", base=f"../{first.name}", save_every=7))
    assert found == dataclasses.replace(
        base,
        network=dataclasses.replace(base.network, layers=6),
        save_every=7,
        steps=(dataclasses.replace(base.steps[1], turn=0.2),),
    )
    replaced = Recipe.read(derived(tmp_path, steps=[{"train": {**JOINT, "steps": 3}}]))
    assert [step.steps for step in replaced.steps] == [3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": "none.yaml"}, r"derived.yaml: its base 'none.yaml' is no file: name a recipe, relative to"),
        ({"base": 3}, "its base 3 is no file"),
        ({"base": "derived.yaml"}, r"make a circle \(derived.yaml -> derived.yaml\): remove one `base:`"),
        ({"base": "other.yaml"}, r"make a circle \(derived.yaml -> other.yaml -> derived.yaml\)"),
        ({"colour": 1}, r"derived.yaml has unknown keys \['colour'\]"),
        ({"network": {"colour": 1}}, r"derived.yaml.network has unknown keys \['colour'\]"),
        ({"steps": {1: {"train": {"colour": 1}}}}, r"derived.yaml step 1 has unknown keys \['colour'\]"),
        ({"steps": {1: {"record": {}}}}, "give one of `record:` and `train:`"),
        (
            {"steps": {2: None}},
            "steps has 2: None: give the number of a step of the base, 1 to 1, and its changes",
        ),
        ({"steps": {1: 5}}, "steps has 1: 5: give the number of a step"),
        ({"steps": 5}, "derived.yaml: no list of steps"),
    ],
)
def test_a_base_or_a_change_that_makes_no_sense_is_refused_in_one_line(values, message, tmp_path):
    recipe_file(tmp_path, JOINT)
    derived(tmp_path, name="other", base="derived.yaml")
    with pytest.raises(UserError, match=message) as raised:
        Recipe.read(derived(tmp_path, **values))
    assert "\n" not in str(raised.value)
