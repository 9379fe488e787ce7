"""The parts of `dpokit data check` by themselves: near duplicates, contradictions, texts."""

import json
import random

import numpy as np
import pytest

from dpokit.data.doctor import near
from dpokit.data.doctor.conflicts import find_conflicts
from dpokit.data.doctor.near import find_twins, sign_texts
from dpokit.data.doctor.shortcuts import begins_as_refusal, read_opening
from dpokit.data.doctor.texts import find_kinds, find_place, mask, mask_values, show_text

WORDS = random.Random(1)
VOCABULARY = ["".join(WORDS.choice("bcdfghjklmnprst") for _ in range(WORDS.randint(2, 9))) for _ in range(3000)]


def list_shingles(text: str) -> set[str]:
    return {text[place : place + 7] for place in range(len(text) - 6)}


def find_jaccard(first: str, second: str) -> float:
    a, b = list_shingles(first), list_shingles(second)
    return len(a & b) / len(a | b)


def change(text: str, rng: random.Random, similarity: float) -> str:
    """Replaces words until the Jaccard similarity of the shingles is just above a value."""
    words, best = text.split(), text
    while True:
        words[rng.randrange(len(words))] = f"x{rng.randrange(10**5)}"
        changed = " ".join(words)
        if find_jaccard(text, changed) < similarity:
            return best
        best = changed


def test_near_texts_are_found_with_recall_and_precision():
    """Planted: 200 copies with a similarity of 0.8 or little more, and 200 with one of 0.5 to 0.6, which are none."""
    rng = random.Random(0)
    texts = [" ".join(rng.choice(VOCABULARY) for _ in range(rng.randint(30, 90))) for _ in range(600)]
    copies = [change(text, rng, 0.8) for text in texts[:200]]
    far = [change(text, rng, rng.uniform(0.5, 0.58)) for text in texts[200:400]]
    assert np.mean([find_jaccard(a, b) for a, b in zip(texts, copies, strict=False)]) < 0.84
    twins = find_twins(sign_texts([[text] for text in (*texts, *copies, *far)]))
    hits = [twins[600 + number] == number for number in range(200)]
    reported = np.flatnonzero(twins >= 0)
    assert np.mean(hits) >= 0.95
    true = [row for row in reported if 600 <= row < 800 and twins[row] == row - 600]
    assert len(true) / len(reported) >= 0.9


@pytest.mark.parametrize("same", ["A  Text with  More\nspace in it", "a text with more space in it "])
def test_case_and_white_space_make_no_difference(same):
    twins = find_twins(sign_texts([["a text with more space in it"], [same]]))
    assert twins.tolist() == [-1, 0]


def test_swapped_answers_are_not_near():
    answers = ["the first answer", "the second answer"]
    twins = find_twins(sign_texts([answers, answers[::-1]]))
    assert twins.tolist() == [-1, -1]


def test_leaks_are_searched_across_the_splits_only():
    texts = ["what is the sky", "what is the sea", "what is the sky", "what is the sky", "a rare question"]
    twins = find_twins(sign_texts([[text] for text in texts]), others=3)
    assert twins[:3].tolist() == [-1, -1, -1]
    assert texts[twins[3]] == texts[3]
    assert twins[4] == -1


def test_signatures_are_the_same_in_every_process():
    assert sign_texts([["stable"]])[0, :4].tolist() == SIGNATURE


def test_long_texts_are_signed_in_parts(monkeypatch):
    rows = [[f"text {number} " * 20, "answer"] for number in range(30)]
    whole = sign_texts(rows)
    monkeypatch.setattr(near, "PART_LETTERS", 500)
    assert (sign_texts(rows) == whole).all()
    assert sign_texts([]).shape == (0, 256)


SIGNATURE = [218, 5, 198, 123]


@pytest.mark.parametrize(
    ("preferences", "opposites", "loops"),
    [
        ("", 0, 0),
        ("ab", 0, 0),
        ("ab ab ab", 0, 0),
        ("ab ba", 1, 0),
        ("ab ba ba", 2, 0),
        ("ab bc ac", 0, 0),
        ("ab bc ca", 0, 1),
        ("ab bc cd da ac", 0, 1),
        ("ab bc ca de ef fd", 0, 2),
        ("ab ba bc ca", 1, 1),
        ("aa ab", 0, 0),
    ],
)
def test_contradictions_of_one_prompt(preferences, opposites, loops):
    pairs = preferences.split()
    chosen, rejected = [ord(pair[0]) for pair in pairs], [ord(pair[1]) for pair in pairs]
    result = find_conflicts([7] * len(pairs), chosen, rejected)
    assert (len(result[0]), len(result[1])) == (opposites, loops)
    for rows in result[1]:  # each row's rejected answer is chosen in the next or the previous one
        assert {chosen[row] for row in rows} == {rejected[row] for row in rows}


def test_other_prompts_do_not_contradict():
    assert find_conflicts([1, 2], [5, 6], [6, 5]) == ([], [])


def test_many_answers_to_one_prompt_are_quick():
    number = 20_000
    assert find_conflicts([1] * number, list(range(number)), list(range(1, number + 1))) == ([], [])


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("plain text, tab\there, CRLF\r\n", []),
        ("caf\u00e9 na\u00efve \u201cquoted\u201d \u2013 dash\u2026\u00bb", []),
        ("arriv\u00e9\u2026\u00bb PRIV\u00c9\u00bb \u00abAPR\u00c8S\u00bb", []),
        ("\u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u4e2d\u6587 \u65e5\u672c\u8a9e \U0001f600\u200d\U0001f525", []),
        ("caf\u00c3\u00a9", ["damaged_text"]),
        ("it\u00e2\u20ac\u2122s", ["damaged_text"]),
        ("it\u00e2\u0080\u0099s", ["control_characters", "damaged_text"]),
        ("\u00d0\u0178\u00d1\u20ac", ["damaged_text"]),
        ("\u00e4\u00bd\u00a0\u00e5\u00a5\u00bd", ["damaged_text"]),
        ("\u00f0\u0178\u02dc\u20ac", ["damaged_text"]),
        ("lost \ufffd letter", ["damaged_text"]),
        ("bell \x07", ["control_characters"]),
        ("\ufeffmark", ["control_characters"]),
        ("half \ud800", ["control_characters"]),
        ("write to a.b@c.org, please", ["emails"]),
        ("@user and user@host are none", []),
        ("call +1 212-736-5000", ["phones"]),
        ("call (212) 736-5000 or 212-736-5000", ["phones"]),
        ("in 2026-11-29 12:30, 1,234,567 of 10.0.0.1 and ISBN 978-3-16-148410-0", []),
        ("token hf_" + "aB3" * 10, ["keys"]),
        ("-----BEGIN PRIVATE KEY-----", ["keys"]),
        ("xoxb-123456789012-abcdefghijkl", ["keys"]),
        ("AIzaSy" + "aB3" * 11, ["keys"]),
        ("xoxo-hugs and AIza, a name", []),
    ],
)
def test_the_kinds_of_a_text(text, kinds):
    assert find_kinds("prompt", text, "other") == kinds


def test_a_fault_far_into_a_text_has_its_place():
    text = "word " * 5000 + "a.b@c.org" + " word" * 5000
    assert find_place("emails", text) == 25_000
    assert "a.b@c.org" not in show_text(text, 25_000)
    assert "***" in show_text(text, 25_000)


@pytest.mark.parametrize("place", range(3780, 4220, 7))
def test_a_fault_at_the_end_of_a_part_is_found(place):
    assert find_place("emails", "x" * place + " a.b@c.org " + "x" * 5000) == place + 1


@pytest.mark.parametrize("length", [10, 599, 600, 601, 5000])
def test_a_shown_text_is_bounded(length):
    assert len(show_text("a" * length, length - 1)) <= 610


def test_no_part_of_a_private_key_is_shown():
    key = "-----BEGIN PRIVATE KEY-----\n" + "QUJD\n" * 600 + "-----END PRIVATE KEY-----"
    assert mask(f"a {key} b") == "a *** b"
    for place in range(0, 4000, 250):
        assert "QUJD" not in show_text("x" * 700 + key + "y" * 700, place)


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I\u2019m sorry, but I can\u2019t help with that.", True),
        ("I cannot assist with this request.", True),
        ("As an AI language model, I ...", True),
        ("Lo siento, no puedo ayudarte.", True),
        ("\u62b1\u6b49\uff0c\u6211\u4e0d\u80fd", True),
        ("Sure, here is a list.", False),
        ("You can say: it is a pity.", False),
        ("x" * 300 + " I cannot", False),
    ],
)
def test_a_refusal_is_recognised_at_the_start(text, refuses):
    assert begins_as_refusal(text) is refuses


SECRETS = [
    "hf_" + "aB3" * 10,
    "AKIAIOSFODNN7EXAMPLZ",
    "+49 30 1234567",
    "(212) 736-5000",
    "212-736-5000",
    "bob.smith@mail-server.org",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_row_is_masked_wherever_a_secret_is(secret):
    row = {secret: 1, "a": f"\n{secret}", "b": [{"c": (f"\t{secret}", None, 2.5)}], "d": json.dumps([f"\n{secret}"])}
    masked = mask_values(row)
    assert masked == {"***": 1, "a": "\n***", "b": [{"c": ["\t***", None, 2.5]}], "d": '["\\n***"]'}


@pytest.mark.parametrize("secret", SECRETS)
def test_an_opening_has_no_part_of_a_secret(secret):
    for text in (secret, f"Write {secret} down"):
        assert secret.lower()[:12] not in read_opening(text)


# Texts with a phone number (True), and numbers that are none.
PHONES = {
    "+49 30 1234567": True,
    "+4930 1234567": True,
    "+49 (0)30 123 45 67": True,
    "+4930123456": True,
    "+33 1 23 45 67 89": True,
    "+44 (0)20 7946 0958": True,
    "+91 98765 43210": True,
    "+1 (212) 736-5000": True,
    "+1(212)736-5000": True,
    "tel:+12127365000.": True,
    "00493012345678": True,
    "0049 30 1234567": True,
    "0800 123 4567": True,
    "030 1234567": True,
    "030/1234567, or later": True,
    "020 7946 0958": True,
    "07911 123456": True,
    "044 668 18 00": True,
    "01 23 45 67 89": True,
    "1-800-273-8255": True,
    "(555)123-4567": True,
    "call 555-123-4567.": True,
    "978-316-1484": True,
    "+15000 dollars": False,
    "x=+1000000": False,
    "+1000000000": False,
    "+25000000 people": False,
    "+12.3456789012 degrees": False,
    "+30123456789012345678": False,
    "2026-11-29 12:30:00": False,
    "29.11.2026 and 01/02/2026 12:30": False,
    "2026-11-29T12:30:00+0100": False,
    "01-02-2026": False,
    "09:00-17:00, 0900-1700": False,
    "192.168.100.1000": False,
    "10.0.0.1": False,
    "123-45-6789": False,
    "4111 1111 1111 1111": False,
    "DE89 3704 0044 0532 0130 00": False,
    "ISBN 978-3-16-148410-0": False,
    "1,234,567,890.12": False,
    "chmod 0755 0644": False,
    "0.0123456789": False,
    "1234567890": False,
    "3.14159265358979": False,
}


@pytest.mark.parametrize(("text", "is_phone"), PHONES.items())
def test_a_phone_number_is_told_from_other_numbers(text, is_phone):
    assert find_kinds("Why?", text, "No.") == ["phones"] * is_phone
    assert ("***" in mask(text)) is is_phone


@pytest.mark.parametrize("text", [text for text, is_phone in PHONES.items() if is_phone])
def test_a_masked_phone_number_leaves_no_digit(text):
    assert not any(letter.isdigit() for letter in mask(text))
