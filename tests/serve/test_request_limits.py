"""The limits of questions and of their rate."""

import pytest

from dpokit.serve.request_limits import (
    RateLimit,
    RefusedError,
    RequestLimits,
    SamplingSettings,
    find_client,
    read_question,
    read_sampling,
)

LIMITS = RequestLimits(prompt_characters=20, new_tokens=64)


@pytest.mark.parametrize("text", ["Why?", "  Why?\n", "\u00e4\u4f60\U0001f642", "a\tb\nc", "<script>", "x" * 20])
def test_a_text_is_accepted_as_a_question(text):
    assert read_question(text, LIMITS) == text.strip()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "is not a text"),
        (5, "is not a text"),
        (["Why?"], "is not a text"),
        ({"path": "/etc/passwd"}, "is not a text"),
        (b"Why?", "is not a text"),
        ("", "is empty"),
        (" \n\t ", "is empty"),
        ("x" * 21, "at most 20"),
        ("a\x00b", "control characters"),
        ("\x1b[31mred", "control characters"),
        ("\x7fELF", "control characters"),
        ("half \ud83d", "lone surrogates"),
    ],
)
def test_any_other_value_is_refused_as_a_question(value, message):
    with pytest.raises(RefusedError, match=message):
        read_question(value, LIMITS)


def test_numbers_within_their_limits_are_accepted():
    assert read_sampling(0, 1, 64, 7, limits=LIMITS) == SamplingSettings(0.0, 1.0, 64, 7)
    assert read_sampling(0.5, 0.9, 1.0, 0.0, limits=LIMITS) == SamplingSettings(0.5, 0.9, 1, 0)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(
    "value", [None, "1", True, [1], float("nan"), float("inf"), -1, 2**63, 1e308, 0.5j], ids=lambda value: repr(value)
)
def test_any_other_value_is_refused_as_a_setting(place, value):
    values = [0.7, 0.9, 32, 0]
    values[place] = value
    with pytest.raises(RefusedError):
        read_sampling(*values, limits=LIMITS)


def test_a_fraction_of_a_token_or_seed_is_refused():
    for values in ((0.7, 0.9, 3.5, 0), (0.7, 0.9, 3, 0.5)):
        with pytest.raises(RefusedError, match="whole number"):
            read_sampling(*values, limits=LIMITS)


def test_each_address_has_its_own_limit_in_any_minute():
    now = [100.0]
    rate = RateLimit(3, clock=lambda: now[0])
    assert [rate.allows("a") for _ in range(5)] == [True, True, True, False, False]
    assert rate.allows("b")
    now[0] += 59.9
    assert not rate.allows("a")
    now[0] += 0.2
    assert [rate.allows("a") for _ in range(4)] == [True, True, True, False]


def test_the_number_of_stored_addresses_is_limited():
    rate = RateLimit(1)
    for number in range(12_000):
        rate.allows(f"address {number}")
    assert len(rate._times) == 10_000


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("", ""),
        ("unknown" * 100, ("unknown" * 100)[:64]),
    ],
)
def test_addresses_of_one_network_count_as_one_client(address, client):
    assert find_client(address) == client
