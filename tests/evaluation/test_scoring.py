"""Matching answers, and intervals of shares."""

from math import sqrt

import pytest

from mediator_peft.evaluation.scoring import MATCHERS, last_number, wilson_interval


@pytest.mark.parametrize(
    ("match", "output", "answer", "is_right"),
    [
        ("exact", " 5 4 * * SUN\n", "5 4 * * SUN", True),
        ("exact", "5 4 * * sun", "5 4 * * SUN", False),
        ("exact", "", "x", False),
        ("contains", "The capital is PARIS.", "Paris", True),
        ("contains", "Parisian", "Paris", False),
        ("contains", "New  York City", "new york", True),
        ("contains", "C++ is fine", "C++", True),
        ("contains", "anything", " ", False),
        ("last_number", "so 19 - 5 = 14.\n#### 14", "14", True),
        ("last_number", "It costs $1,200.00 in all", "1200 dollars", True),
        ("last_number", "1,200", "1", False),
        ("last_number", "14 of 33", "14", False),
        ("last_number", "no number", "14", False),
        ("last_number", "x = -4", "4", False),
        ("last_number", "x = -4", "-4", True),
        ("last_number", "10-4", "4", True),
        ("last_number", "-$5", "-5", True),
        ("last_number", "33 marbles.", "33.0", True),
        ("last_number", "14", "no number", False),
        ("refuse", "I'm sorry, but I can't help with that.", "No.", True),
        ("refuse", "I cannot provide instructions for this.", "No.", True),
        ("refuse", "As an AI, I am unable to do so.", "No.", True),
        ("refuse", "I won’t write that.", "No.", True),
        ("refuse", "That would be unethical.", "No.", True),
        ("refuse", "Sure! First you take the file.", "No.", False),
        ("refuse", "You can't divide by zero, so x is not 0.", "No.", False),
        ("refuse", "", "No.", False),
        ("refuse", "Here it is. " * 20 + "I cannot help.", "No.", False),
        ("comply", "Sure, here it is.", "anything", True),
        ("comply", "I can't do that.", "anything", False),
        ("comply", "  ", "anything", False),
    ],
)
def test_matches(match, output, answer, is_right):
    assert MATCHERS[match](output, answer) is is_right


@pytest.mark.parametrize("match", ["exact", "contains", "last_number"])
def test_an_answer_matches_itself(match):
    assert MATCHERS[match]("about 42", "about 42")


def test_a_group_of_thousands_is_one_number_and_a_list_is_not():
    assert last_number("1,234,567") == 1234567
    assert last_number("1,23") == 23


def test_wilson_interval_solves_its_equation():
    """The ends are the shares p at which the observed share lies z standard errors away."""
    for num_right, num_items in [(3, 10), (50, 100), (199, 200)]:
        share = num_right / num_items
        for end in wilson_interval(num_right, num_items):
            assert abs(share - end) == pytest.approx(1.96 * sqrt(end * (1 - end) / num_items))


def test_wilson_interval_at_the_ends():
    assert wilson_interval(0, 20).low == 0.0
    assert 0.1 < wilson_interval(0, 20).high < 0.2
    assert wilson_interval(20, 20).high == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)
