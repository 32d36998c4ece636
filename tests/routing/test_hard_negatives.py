"""Other requests about the subjects of calibration texts: what they are about, and what the router makes of them."""

import copy
from random import Random

import pytest
import torch
from character_tokenizer import CHAT_TEMPLATE, character_tokenizer
from tokenizer import tiny_tokenizer

from mediator_peft.routing.calibration import calibrate, cross_fit
from mediator_peft.routing.hard_negatives import HARD_NEGATIVE_FORMS, hard_negatives, own_words
from mediator_peft.routing.metrics import auroc
from mediator_peft.routing.routers import ROUTERS
from mediator_peft.routing.routers.gaussian import GaussianRouter
from mediator_peft.tuner.editing import extend_router
from mediator_peft.tuner.fitting_rows import hard_negative_rows

ANIMALS = ["ant", "bear", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "koi", "lynx"]
TEXTS = [f"Correct the spelling: {word}" for word in ANIMALS]


def test_a_text_is_about_the_words_it_does_not_share():
    assert own_words(TEXTS, [0] * 12) == [[word] for word in ANIMALS]
    assert own_words(["Add 12 and 30!", "Add 7 and 455!"], [0, 0]) == [["12", "30"], ["455"]]
    assert own_words(["An ant", "An ant", "An ant"], [0, 0, 1]) == [["An", "ant"]] * 3
    assert own_words(["to ant", "to bee", "to ant"], [0, 0, 1]) == [["ant"], ["bee"], ["to", "ant"]]
    assert own_words(["Hello there", "Hello there"], [0, 0]) == [["Hello", "there"]] * 2
    assert own_words(["", "?!"], [0, 0]) == [["this"]] * 2


def test_each_way_asks_something_about_each_text():
    asked, told = hard_negatives(TEXTS, [0] * 12, 0)
    for way, requests in zip(HARD_NEGATIVE_FORMS, (asked, told), strict=True):
        of_words = {template.format(word) for template in way[0] for word in ANIMALS}
        assert set(requests) <= of_words
        assert all(word in request for word, request in zip(ANIMALS, requests, strict=True))
    assert not set(asked) & set(told)


def test_numbers_are_asked_about_as_numbers():
    for way, requests in zip(HARD_NEGATIVE_FORMS, hard_negatives(["12 + 30", "455 - 78"], [0, 0], 3), strict=True):
        numbers = {template.format(a, b) for template in way[1] for a in (12, 30, 455, 78) for b in (12, 30, 455, 78)}
        assert set(requests) <= numbers


def test_requests_follow_from_text_and_seed_and_not_from_the_order():
    order = list(range(len(TEXTS)))
    Random(1).shuffle(order)
    labels = [place % 2 for place in range(12)]
    moved = hard_negatives([TEXTS[place] for place in order], [labels[place] for place in order], 0)
    for one, other in zip(hard_negatives(TEXTS, labels, 0), moved, strict=True):
        assert [one[place] for place in order] == other
    assert hard_negatives(TEXTS, labels, 0) != hard_negatives(TEXTS, labels, 1)


@pytest.mark.parametrize("text", ["", "{}", "{0} {x}", "だんらん", "é è", "a", "7"])
def test_whatever_the_text_something_is_asked(text):
    assert all(len(way) == 1 and way[0].strip() for way in hard_negatives([text], [0], 0))


def groups(seed=0, per_class=60, size=8):
    """Two experts, background prompts far from both, and hard negatives near each expert, far from the background."""
    generator = torch.Generator().manual_seed(seed)

    def around(*place, count=per_class):
        centre = torch.zeros(size)
        centre[: len(place)] = torch.tensor(place)
        return centre + torch.randn(count, size, generator=generator)

    features = torch.cat([around(6.0), around(-6.0)])
    near = torch.stack([torch.cat([around(6.0, 0.0, way), around(-6.0, 0.0, way)]) for way in (6.0, -6.0)])
    return features, torch.arange(2).repeat_interleave(per_class), around(0.0, 8.0), near


def test_a_router_that_saw_neighbours_tells_others_from_known_prompts():
    features, labels, ordinary, near = groups()
    fresh, _, _, other_near = groups(seed=1)
    found = []
    for some in (None, near):
        router = GaussianRouter(2, 8)
        router.fit(features, labels, ordinary, some)
        found.append(auroc(router.background_log_odds(fresh), router.background_log_odds(other_near.flatten(0, 1))))
    assert found[1] > 0.99 > 0.9 > found[0]


def test_the_means_are_those_nearest_to_each_expert_by_each_way():
    features, labels, ordinary, near = groups()
    near[1, 60:] = near[1, :60]  # of the second way, none is near the second expert
    router = GaussianRouter(2, 8)
    router.fit(features, labels, ordinary, near)
    everything = ordinary.mean(dim=0)
    side = router.scores(ordinary).argmax(dim=1)
    expected = [ordinary[side == 0].mean(dim=0), ordinary[side == 1].mean(dim=0)]
    expected += [near[0, :60].mean(dim=0), near[0, 60:].mean(dim=0), near[1].mean(dim=0), everything, everything]
    torch.testing.assert_close(router.background_means, torch.stack(expected))


def test_without_ordinary_prompts_neighbours_count_for_nothing():
    features, labels, _, near = groups()
    plain, router = GaussianRouter(2, 8), GaussianRouter(2, 8)
    plain.fit(features, labels)
    router.fit(features, labels, None, near)
    assert torch.equal(router.background_log_odds(features), plain.background_log_odds(features))


def test_the_mlp_takes_neighbours_for_ordinary_prompts():
    features, labels, ordinary, near = groups()
    one, other = ROUTERS["mlp"](2, 8), ROUTERS["mlp"](2, 8)
    one.fit(features, labels, ordinary, near)
    other.fit(features, labels, torch.cat([ordinary, near.flatten(0, 1)]))
    assert torch.equal(one.background_log_odds(features), other.background_log_odds(features))


def test_neighbours_share_their_texts_fold():
    seen = []

    class Spy(GaussianRouter):
        def fit(self, features, labels, background=None, hard_negatives=None):
            seen.append((set(features[:, 0].tolist()), [set(way[:, 0].tolist()) for way in hard_negatives]))
            super().fit(features, labels, background, hard_negatives)

    features = torch.randn(60, 5)
    features[:, 0] = torch.arange(60)  # the first feature numbers the text
    near = features + torch.cat([torch.zeros(2, 60, 1), torch.randn(2, 60, 4)], dim=2)
    labels, folds = torch.arange(60) % 2, torch.arange(60) % 5
    held_out, _ = cross_fit(
        lambda: Spy(2, 5), features, labels, folds, torch.randn(20, 5), torch.arange(20) % 5, hard_negatives=near
    )
    assert len(seen) == 5
    assert all(fitted == way for fitted, ways in seen for way in ways)
    assert held_out.ood_score.shape == (60,)
    router = Spy(2, 5)
    keys = [str(number) for number in range(60)]
    calibrate(lambda: Spy(2, 5), router, features, labels, keys, "ab", 0, 0.05, torch.randn(20, 5), hard_negatives=near)
    assert seen[-1][1] == [set(range(60))] * 2


def test_an_expert_that_is_added_brings_its_own_neighbours():
    features, labels, ordinary, near = groups()
    router = GaussianRouter(2, 8)
    calibrate(
        lambda: GaussianRouter(2, 8), router, features, labels, [str(n) for n in range(120)], "ab", 0, 0.05, ordinary,
        hard_negatives=near,
    )  # fmt: skip
    new = torch.randn(40, 8) + torch.tensor([0.0, 0, 0, 0, 9, 0, 0, 0])
    beside = torch.stack([new + 7 * torch.eye(8)[5], new + 7 * torch.eye(8)[6]])
    folds = torch.arange(40) % 5
    larger = extend_router(router, new, folds, new[None][:0], beside)
    before, after = router.background_means[:-1].view(3, 2, 8), larger.background_means[:-1].view(3, 3, 8)
    assert torch.equal(after[:, :2], before)
    assert torch.equal(larger.background_means[-1], router.background_means[-1])
    torch.testing.assert_close(after[1:, 2], beside.mean(dim=1))
    trial = copy.deepcopy(router)
    trial.add_class(new[folds != 2], beside[:, folds != 2])
    assert torch.equal(larger.known.ood_score[120:][folds == 2], trial.background_log_odds(new[folds == 2]))
    alone = extend_router(router, new, folds, new[None][:0], beside[:0])
    far, own = beside.flatten(0, 1) + 0.1, larger.background_log_odds(new)
    assert auroc(own, larger.background_log_odds(far)) > auroc(
        alone.background_log_odds(new), alone.background_log_odds(far)
    )
    larger.remove_class(2)
    assert torch.equal(larger.background_means, router.background_means)
    larger.remove_class(0)
    assert torch.equal(larger.background_means[:-1].view(3, 1, 8), before[:, 1:])


def test_a_router_without_ordinary_prompts_takes_no_neighbours_of_a_new_expert():
    features, labels, _, near = groups()
    router = GaussianRouter(2, 8)
    router.fit(features, labels)
    other = copy.deepcopy(router)
    router.add_class(near[0])
    other.add_class(near[0], near)
    assert torch.equal(router.background_means, other.background_means)


def test_chats_are_asked_about_in_chats_and_plain_texts_in_plain_ones(build):
    model = build()
    tokenizer = character_tokenizer(CHAT_TEMPLATE)
    model.learn_turns(tokenizer)
    config = model.active.config
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in TEXTS
    ]
    labels = [0] * 6 + [1] * 6
    rows = hard_negative_rows(config, tokenizer, tokenizer(chats)["input_ids"], labels, 1000)
    texts = [tokenizer.decode(row) for row in rows]
    assert len(texts) == 2 * len(TEXTS)
    plain = [
        tokenizer.decode(r) for r in hard_negative_rows(config, tokenizer, tokenizer(TEXTS)["input_ids"], labels, 1000)
    ]
    for number, (chat, request) in enumerate(zip(texts, plain, strict=True)):
        assert chat == f"<s>[user] {request}\n[assistant] "
        assert ANIMALS[number % 12] in request.replace("<unk>", "")
    assert all(len(row) <= 9 for row in hard_negative_rows(config, tokenizer, tokenizer(chats)["input_ids"], labels, 9))


def test_what_an_experts_texts_share_does_not_depend_on_the_others(build):
    config, tokenizer = build().active.config, character_tokenizer()
    # Both of these share two words, which few of all fourteen would.
    more = ["Please mend typing mistakes", "Please mend typing everywhere"]
    rows = tokenizer(TEXTS + more)["input_ids"]
    both = hard_negative_rows(config, tokenizer, rows, [0] * 12 + [1] * 2, 1000)
    alone = [hard_negative_rows(config, tokenizer, some, [0] * len(some), 1000) for some in (rows[:12], rows[12:])]
    assert both == alone[0][:12] + alone[1][:2] + alone[0][12:] + alone[1][2:]


def test_words_that_the_tokenizer_does_not_know_are_not_asked(build, topics):
    tokenizer = tiny_tokenizer()
    model = build()
    rows = tokenizer(topics["math"])["input_ids"]
    assert hard_negative_rows(model.active.config, tokenizer, rows, [0] * len(rows), 1000) == []


def test_fitting_a_model_uses_them_and_can_do_without(build):
    model, tokenizer = build(), character_tokenizer(CHAT_TEMPLATE)
    two = {"math": [f"{n} plus {n + 3} is?" for n in range(10, 40)], "code": [f"def {word}():" for word in ANIMALS]}
    detectors = []
    for some in (True, False):
        model.fit_router(two, tokenizer, hard_negatives=some)
        detectors.append(model.router.detector_weight.clone())
    assert not torch.equal(*detectors)
    model.fit_router(two, tokenizer, background=[])
    assert not model.router.has_background
    assert model.router.rule is None
