"""Altered copies of calibration texts: what is altered, what is not, and who is fitted on them."""

from random import Random

import pytest
import torch
from character_tokenizer import character_tokenizer
from tokenizer import tiny_tokenizer

from mediator_peft.evaluation.fit_and_save import fit_and_save
from mediator_peft.evaluation.prompts import TaskItem
from mediator_peft.routing import translation
from mediator_peft.routing.augmentation import (
    AUGMENTATIONS,
    augment,
    leave_words_out,
    mistype,
    recombine,
    say_more,
    shared_words,
)
from mediator_peft.routing.calibration import calibrate, cross_fit
from mediator_peft.routing.routers import ROUTERS
from mediator_peft.routing.translation import LANGUAGES_OF_TABLE, in_other_words
from mediator_peft.tuner import fitting_rows
from mediator_peft.tuner.fitting_rows import augmented_rows, background_rows

TEXT = " ".join(f"word{number} costs {number} euros, at least;" for number in range(400))


def chats(tokenizer, *contents):
    texts = []
    for one in contents:
        turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(one)]
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return tokenizer(texts)["input_ids"]


def test_three_words_in_ten_are_missing_and_the_rest_stays_in_order():
    words, kept = TEXT.split(), leave_words_out(TEXT, Random(0)).split()
    assert len(kept) / len(words) == pytest.approx(0.7, abs=0.05)
    rest = iter(words)
    assert all(word in rest for word in kept)


def test_one_letter_in_ten_is_mistyped_and_nothing_else():
    typed = mistype(TEXT, Random(0))
    assert typed != TEXT
    strange = str.maketrans("", "", "abcdefghijklmnopqrstuvwxyz")

    def others(text):
        return "".join(letter for letter in text if not letter.isalpha())

    assert others(typed) == others(TEXT)
    assert set(typed) <= set(TEXT)
    changed = sum(one != two for one, two in zip(TEXT.split(), typed.split(), strict=True))
    letters_a_word = sum(letter.isalpha() for letter in TEXT) / len(TEXT.split())
    assert changed / len(TEXT.split()) == pytest.approx(1 - 0.9**letters_a_word, abs=0.1)
    assert TEXT.translate(strange) == typed.translate(strange)


def test_something_is_said_around_the_text_which_stays_whole():
    said = {say_more("Sum {1} and 2.", Random(number)) for number in range(100)}
    assert len(said) == 12
    assert all("Sum {1} and 2." in one and one != "Sum {1} and 2." for one in said)


@pytest.mark.parametrize("text", ["", " ", "a", "12 34", "だんらん", "é"])
def test_whatever_the_text_something_comes_out(text):
    for one in augment(text, 0):
        assert isinstance(one, str)
        assert bool(one.strip()) == bool(text.strip())


def test_what_comes_out_follows_from_text_and_seed():
    assert augment(TEXT, 1) == augment(TEXT, 1)
    assert augment(TEXT, 1) != augment(TEXT, 2)
    assert len(augment(TEXT, 1)) == len(AUGMENTATIONS)


def test_in_a_chat_only_the_users_words_are_altered(build, chat_tokenizer, monkeypatch):
    model = build()
    model.learn_turns(chat_tokenizer)
    user, answer = "w5 w6 w7 w8 w9 w10 w11 w12", "w40 w41 w42 w43 w44 w45 w46 w47"
    (row,) = chats(chat_tokenizer, (user, answer, user))
    mine, unknown = range(5, 13), chat_tokenizer.unk_token_id
    monkeypatch.setattr(fitting_rows, "COPIES", 4)
    monkeypatch.setattr(fitting_rows, "_readable_ways", lambda *_: [0, 1, 2, 3])
    copies = augmented_rows(model.active.config, chat_tokenizer, [row], 1000)
    frame = [token for token in row if token not in mine]
    assert len(copies) == 4
    for copy in copies:
        assert [token for token in copy if token not in mine and token != unknown] == frame
        assert copy != row
    assert sum(unknown in copy for copy in copies) == 3
    assert any(2 <= sum(token in mine for token in copy) < 16 for copy in copies if unknown not in copy)


def test_copies_of_unknown_words_are_left_out(build, monkeypatch):
    monkeypatch.setattr(fitting_rows, "COPIES", 4)
    rows = tiny_tokenizer()([f"w{number}" for number in range(5, 35)])["input_ids"]
    # With a sentence around one word, most words are unknown; a word of three letters is hardly ever mistyped.
    assert len(augmented_rows(build().active.config, tiny_tokenizer(), rows, 1000)) == 2 * len(rows)


def test_long_copies_are_cut(build, chat_tokenizer):
    model = build()
    model.learn_turns(chat_tokenizer)
    rows = chats(chat_tokenizer, (" ".join(f"w{5 + n % 80}" for n in range(60)),))
    assert all(len(row) <= 20 for row in augmented_rows(model.active.config, chat_tokenizer, rows, 20))


def test_plain_texts_are_altered_whole(build):
    tokenizer = tiny_tokenizer()
    model = build()
    rows = tokenizer([" ".join(f"w{n}" for n in range(5, 25))])["input_ids"]
    copies = augmented_rows(model.active.config, tokenizer, rows, 1000)
    assert copies
    for copy in copies:
        rest = iter(rows[0])
        assert all(token in rest for token in copy if token != tokenizer.unk_token_id)


def test_copies_share_their_texts_fold_and_are_never_judged():
    seen = []

    class Spy(ROUTERS["gaussian"]):
        def fit(self, features, labels, background=None, hard_negatives=None):
            # The first feature numbers the text, for copies too.
            self.texts = set(features[:, 0].tolist())
            self.count = len(features)
            super().fit(features, labels, background, hard_negatives)

        def scores(self, features):
            seen.append((self.texts & set(features[:, 0].tolist()), self.count, len(features)))
            return super().scores(features)

    features = torch.randn(60, 5)
    features[:, 0] = torch.arange(60)
    augmented = features.repeat(2, 1, 1) + torch.cat([torch.zeros(2, 60, 1), torch.randn(2, 60, 4)], dim=2)
    labels, folds = torch.arange(60) % 2, torch.arange(60) % 5
    held_out, _ = cross_fit(lambda: Spy(2, 5), features, labels, folds, augmented=augmented)
    assert not any(both for both, _, _ in seen)
    assert all(fitted == 3 * 48 for _, fitted, _ in seen)
    assert held_out.ood_score.shape == (60,)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "mlp" else name for name in ROUTERS]
)
def test_a_router_is_fitted_on_texts_and_copies_alike(name):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.randn(90, 6, generator=generator) + 4 * torch.nn.functional.one_hot(labels, 6)
    augmented = features + torch.randn(2, 90, 6, generator=generator)
    router, by_hand = ROUTERS[name](3, 6), ROUTERS[name](3, 6)
    keys = [str(number) for number in range(90)]
    report = calibrate(lambda: ROUTERS[name](3, 6), router, features, labels, keys, "abc", 0, 0.05, augmented=augmented)
    by_hand.fit(torch.cat([features, *augmented]), labels.repeat(3))
    torch.testing.assert_close(router.scores(features), by_hand.scores(features))
    assert len(router.known_novelty) == sum(report.num_texts.values()) == 90
    plain = ROUTERS[name](3, 6)
    plain.fit(features, labels)
    assert not torch.allclose(plain.scores(features), by_hand.scores(features))


def test_texts_with_less_in_them_are_known_to_a_router_that_saw_copies(build, topics, tokenizer):
    two = {name: topics[name] for name in ("math", "code")}
    shares = []
    for augmented in (False, True):
        model = build(folder=f"out-{augmented}")
        model.fit_router(two, tokenizer, augmented=augmented)
        short = tokenizer([text.split()[0] for text in two["math"]], return_tensors="pt")
        shares.append(float(model.route(**short).is_ood.float().mean()))
    assert shares[1] < shares[0]


def test_ordinary_prompts_of_unknown_words_stay_away_with_answers_too(build, topics, tokenizer, tmp_path):
    model = build(folder="answers")
    texts = {name: topics[name] for name in ("math", "code")}
    items = [TaskItem("w5 w6 w7", "w8"), TaskItem("w40 w41", "w42")]
    assert background_rows(0, tokenizer, None, 512) == {}
    fit_and_save(model, tokenizer, texts, tmp_path / "answers" / "mediator", answered=items)
    assert len(model.router.known_novelty) >= 80
    assert len(model.router.background_novelty) == 0


def test_a_recombined_request_keeps_its_subject_and_words_of_its_task():
    texts = [f"Correct the spelling of this word: {word}" for word in ("recieve", "adress", "wierd", "untill")]
    texts += [f"Write {number} in words." for number in (12, 345, 67)]
    labels = [0, 0, 0, 0, 1, 1, 1]
    shared = shared_words(texts, labels)
    assert shared[0] == {"correct", "the", "spelling", "of", "this", "word"}
    assert shared[1] == {"write", "in", "words"}
    for text, label in zip(texts, labels, strict=True):
        changed = recombine(text, shared[label], Random(0))
        subject = text.split()[-1] if label == 0 else text.split()[1]
        assert subject in changed
        assert changed != text
        assert any(word in changed.lower() for word in shared[label] if len(word) > 2)
    assert recombine("correct spelling", shared[0], Random(0)) == "correct spelling"


def test_copies_beyond_those_that_are_altered_are_the_prompts_themselves(build, monkeypatch):
    monkeypatch.setattr(fitting_rows, "_COPIED_PER_EXPERT", 4)
    tokenizer, model = tiny_tokenizer(), build()
    rows = tokenizer([" ".join(f"w{5 + (n + k) % 80}" for n in range(12)) for k in range(20)])["input_ids"]
    labels = [k % 2 for k in range(20)]
    copies = augmented_rows(model.active.config, tokenizer, rows, 1000, labels)
    assert len(copies) == 20
    same = [copy == row for copy, row in zip(copies, rows, strict=True)]
    assert sum(same) >= 12
    backwards = augmented_rows(model.active.config, tokenizer, rows[::-1], 1000, labels[::-1])
    assert backwards[::-1] == copies


def test_the_words_of_a_task_are_translated_and_its_subject_stays():
    shared = frozenset(("correct", "the", "spelling", "of", "this", "word"))
    text = "Correct the spelling of this word: recieve"
    spanish, russian = LANGUAGES_OF_TABLE.index("Spanish"), LANGUAGES_OF_TABLE.index("Russian")
    assert in_other_words(text, shared, spanish) == "Corrige la ortografía de esta palabra: recieve"
    assert in_other_words(text, shared, russian) == "Исправь орфографию это слово: recieve"
    found = {in_other_words(text, shared, number) for number in range(len(LANGUAGES_OF_TABLE))}
    assert len(found) == len(LANGUAGES_OF_TABLE)
    assert all(copy.endswith(" recieve") for copy in found)


def test_a_text_whose_words_are_not_in_the_table_has_no_translated_copy():
    assert in_other_words("Fettle the grommet: 12", frozenset(("fettle", "grommet", "the")), 0) is None
    assert in_other_words("Write 12 in Klingon.", frozenset(("write", "in", "klingon")), 0) == "Schreibe 12 in Klingon."
    assert in_other_words("12 34", frozenset(), 0) is None


def test_each_word_of_the_table_is_there_once_in_every_language():
    lines = translation._TABLE.strip().splitlines()
    assert {line.count("|") for line in lines} == {len(LANGUAGES_OF_TABLE)}
    assert len({line.split("|")[0] for line in lines}) == len(lines)


def test_every_fourth_altered_copy_is_translated(build, monkeypatch):
    monkeypatch.setattr(fitting_rows, "in_other_words", lambda text, words, language: f"{language}: {text}")
    tokenizer, model = character_tokenizer(), build()
    rows = tokenizer([f"write {number} in words." for number in range(100, 124)])["input_ids"]
    copies = [tokenizer.decode(row) for row in augmented_rows(model.active.config, tokenizer, rows, 1000, [0] * 24)]
    texts = [tokenizer.decode(row) for row in rows]
    translated = [
        copy for copy, text in zip(copies, texts, strict=True) if copy.endswith(f": {text}") and copy[1] == ":"
    ]
    assert sorted(copy[0] for copy in translated) == ["0", "1", "2", "3", "4", "5"]
