"""The paper's three experiments, as METHODS B7 names them."""

from pathlib import Path

import pytest

from dinotrain.errors import UsageError
from dinotrain.study.plan import STUDIES, StudyRequest
from dinotrain.tasks import get_task


def request(name: str, **fields) -> StudyRequest:
    return StudyRequest(study=STUDIES[name], backbone="b", out=Path("out"), **fields)


def configs(name: str, **fields):
    made = request(name, **fields)
    return {variant: made.config(variant, 3, Path("eyes")) for variant in made.variants}


@pytest.mark.parametrize("name", STUDIES)
def test_every_variant_is_a_recipe_of_its_own(name):
    found = configs(name)
    assert len(found) == len({config.out for config in found.values()})
    recipes = [config.recipe() | {"name": ""} for config in found.values()]
    assert all(recipes.count(recipe) == 1 for recipe in recipes)
    for config in found.values():
        assert config.mode == "frozen"
        assert config.seed == 3
        assert config.loss == get_task(config.task).choose_loss(config)


@pytest.mark.parametrize("name", STUDIES)
def test_what_variants_are_compared_with_is_one_of_them(name):
    made = request(name)
    for variant in made.variants:
        assert made.reference(made.reference(variant)) == made.reference(variant)
        assert made.reference(variant) in made.variants


def test_the_papers_recipe():
    first = next(iter(configs("baseline").values()))
    assert (first.lr, first.optimizer, first.batch_size, first.epochs) == (1e-3, "adam", 4, 20)
    assert (first.encoding.kind, first.loss, first.head.kind) == ("scalar", "mse", "mlp")
    assert next(iter(configs("baseline", epochs=7).values())).epochs == 7


def test_an_ensemble_has_five_members_and_one_mlp_beside_it():
    for (_, name), config in configs("ensemble").items():
        assert config.head.count == (5 if name == "ensemble of 5" else 1)
    made = request("ensemble")
    assert {made.reference(variant).name for variant in made.variants} == {"MLP"}


def test_focal_loss_is_crossed_with_orthogonality():
    found = {(c.gamma, c.orthogonality) for c in configs("focal").values()}
    assert found == {(float(g), kind) for g in (0, 2, 4, 6) for kind in ("none", "task")}


@pytest.mark.parametrize("field", ["seeds", "count"])
def test_nothing_to_run_is_refused(field):
    with pytest.raises(UsageError, match=f"{field} is 0"):
        request("focal", **{field: 0})
