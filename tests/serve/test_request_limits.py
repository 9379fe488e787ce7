"""What one question may ask for, and how often."""

import pytest

from dpokit.serve.request_limits import Limits, Rate, RefusedError, Sampling, find_party, read_question, read_sampling

LIMITS = Limits(prompt_characters=20, new_tokens=64)


@pytest.mark.parametrize("text", ["Why?", "  Why?\n", "\u00e4\u4f60\U0001f642", "a\tb\nc", "<script>", "x" * 20])
def test_a_text_is_a_question(text):
    assert read_question(text, LIMITS) == text.strip()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "is a text"),
        (5, "is a text"),
        (["Why?"], "is a text"),
        ({"path": "/etc/passwd"}, "is a text"),
        (b"Why?", "is a text"),
        ("", "no question"),
        (" \n\t ", "no question"),
        ("x" * 21, "at most 20"),
        ("a\x00b", "control characters"),
        ("\x1b[31mred", "control characters"),
        ("\x7fELF", "control characters"),
        ("half \ud83d", "halves"),
    ],
)
def test_anything_else_is_refused_in_a_sentence(value, says):
    with pytest.raises(RefusedError, match=says):
        read_question(value, LIMITS)


def test_numbers_within_their_limits_are_taken():
    assert read_sampling(0, 1, 64, 7, limits=LIMITS) == Sampling(0.0, 1.0, 64, 7)
    assert read_sampling(0.5, 0.9, 1.0, 0.0, limits=LIMITS) == Sampling(0.5, 0.9, 1, 0)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(
    "value", [None, "1", True, [1], float("nan"), float("inf"), -1, 2**63, 1e308, 0.5j], ids=lambda value: repr(value)
)
def test_anything_but_a_number_within_its_limits_is_refused(place, value):
    values = [0.7, 0.9, 32, 0]
    values[place] = value
    with pytest.raises(RefusedError):
        read_sampling(*values, limits=LIMITS)


def test_a_part_of_a_token_or_of_a_seed_is_refused():
    for values in ((0.7, 0.9, 3.5, 0), (0.7, 0.9, 3, 0.5)):
        with pytest.raises(RefusedError, match="whole number"):
            read_sampling(*values, limits=LIMITS)


def test_an_address_may_come_so_often_in_any_minute_and_no_other_pays_for_it():
    now = [100.0]
    rate = Rate(3, clock=lambda: now[0])
    assert [rate.allows("a") for _ in range(5)] == [True, True, True, False, False]
    assert rate.allows("b")
    now[0] += 59.9
    assert not rate.allows("a")
    now[0] += 0.2
    assert [rate.allows("a") for _ in range(4)] == [True, True, True, False]


def test_the_memory_of_addresses_is_bounded():
    rate = Rate(1)
    for number in range(12_000):
        rate.allows(f"address {number}")
    assert len(rate._seen) == 10_000


@pytest.mark.parametrize(
    ("address", "party"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("", ""),
        ("unknown" * 100, ("unknown" * 100)[:64]),
    ],
)
def test_addresses_that_one_has_whole_count_as_one(address, party):
    assert find_party(address) == party
