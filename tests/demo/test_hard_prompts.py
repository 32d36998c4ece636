"""The hard prompt sets: held-out wordings stay out, typos grow, everything follows from the seed."""

from random import Random

import pytest

from mediator_peft.demo import phrasings
from mediator_peft.demo.hard_prompts import bare_items, calibration_prompts, hard_sets, with_typos
from mediator_peft.routing.background import BACKGROUND_PROMPTS


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    pytest.importorskip("cron_descriptor")
    pytest.importorskip("countryinfo")
    pytest.importorskip("codespell_lib")
    pytest.importorskip("reasoning_gym")
    return tmp_path_factory.mktemp("material")


def test_wordings_are_different_and_have_a_slot():
    for task in phrasings.SEEN:
        both = phrasings.SEEN[task] + phrasings.UNSEEN[task]
        assert len(set(both)) == len(both) == 8
        assert all("{x}" in wording for wording in both)


def test_typos_grow_and_leave_digits_alone():
    text = "Every 15 minutes, between 10:00 AM and 10:59 AM, Monday through Friday"
    assert with_typos(text, 0, Random(0)) == text
    changed = [sum(a != b for a, b in zip(with_typos(text, p, Random(0)), text, strict=False)) for p in (3, 50)]
    assert 0 < changed[0] < changed[1]
    assert "".join(filter(str.isdigit, with_typos(text, 100, Random(0)))) == "".join(filter(str.isdigit, text))


def test_calibration_and_test_sets_do_not_meet(material):
    calibration = calibration_prompts(12, 1, material)
    sets = hard_sets(8, 2, material)
    asked = {prompt.messages[-1]["content"] for prompt in calibration}
    for name, (kind, prompts) in sets.items():
        assert prompts, name
        assert kind in ("seen", "unseen", "shifted", "mixed", "near", "far")
        assert bool(prompts[0].experts) == (kind not in ("near", "far"))
        if kind in ("unseen", "near", "far"):
            assert not asked & {prompt.messages[-1]["content"] for prompt in prompts}, name
            assert not set(BACKGROUND_PROMPTS) & {prompt.messages[-1]["content"] for prompt in prompts}, name
    assert sets == hard_sets(8, 2, material)
    assert sum(kind in ("near", "far") for kind, _ in sets.values()) >= 4
    assert all(prompt.messages[-1]["role"] == "user" for _, prompts in sets.values() for prompt in prompts)
    assert len(sets["cron, multi-turn"].prompts[0].messages) > 1


def test_unseen_templates_stay_out_of_calibration(material):
    seen, unseen = (bare_items("maths", 1, material, unseen_templates=held_out) for held_out in (False, True))
    assert not {next(seen).template for _ in range(60)} & {next(unseen).template for _ in range(60)}
