"""Personal data is found by its form, and decides who may be answered with an entry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.personal import Personal, iban, luhn, personal


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("Pay 4111 1111 1111 1111 now", {Personal.CARD}),
        ("card 378282246310005", {Personal.CARD}),
        ("５５５５ ５５５５ ５５５５ ４４４４", {Personal.CARD}),
        ("my IBAN is DE89 3704 0044 0532 0130 00 thanks", {Personal.ACCOUNT}),
        ("gb29nwbk60161331926819", {Personal.ACCOUNT}),
        ("What is the balance of account number 12345678?", {Personal.ACCOUNT}),
        ("Kontonummer: 0532013000", {Personal.ACCOUNT}),
        ("write to jane.doe+x@example.co.uk", {Personal.MAIL}),
        ("call +49 30 901820", {Personal.PHONE}),
        ("(415) 555-2671", {Personal.PHONE}),
        ("my phone number is 030 901820", {Personal.PHONE}),
        ("SSN 219-09-9999", {Personal.NATIONAL}),
        ("use sk-proj-abcdefGHIJKLmnop1234", {Personal.SECRET}),
        ("key AKIAIOSFODNN7EXAMPLE leaked", {Personal.SECRET}),
        ("ghp_0123456789abcdefghijABCDEFGHIJ012345", {Personal.SECRET}),
        ("password: Tr0ub4dor", {Personal.SECRET}),
        ("api_key=9f8e7d6c5b4a", {Personal.SECRET}),
        ("-----BEGIN RSA PRIVATE KEY-----", {Personal.SECRET}),
        ("postgres://admin:hunter2@db/x", {Personal.SECRET}),
        ("Hello, my name is Jane", {Personal.NAME}),
        ("I am John Smith and account 12345678 is mine", {Personal.NAME, Personal.ACCOUNT}),
        ("Ask Mrs. Hawkings", {Personal.NAME}),
        ("ich heiße Jürgen", {Personal.NAME}),
    ],
)
def test_what_is_found(text: str, kinds: set[Personal]) -> None:
    assert personal(text) == kinds


@pytest.mark.parametrize(
    "text",
    [
        "What is the capital of France?",
        "",
        "How many seconds are in 1000000000000000 years?",
        "4111 1111 1111 1112 fails the check",
        "DE89 3704 0044 0532 0130 01",
        "order 00123842 status",
        "What is a token in Python?",
        "How do I choose a password?",
        "Reset the password please",
        "1999-2024, 3.14159265358979, 127.0.0.1",
        "@property decorators",
        "I am learning Spanish",
        "0000 0000 0000 0000",
        "Solve 123456789 * 987654321",
    ],
)
def test_what_is_not(text: str) -> None:
    assert personal(text) == frozenset()


@given(st.text(max_size=300))
def test_any_text_is_read(text: str) -> None:
    assert personal(text) <= frozenset(Personal)


def test_lone_surrogates_and_long_texts_are_read() -> None:
    assert personal("\ud800 mail a@b.de \udfff") == {Personal.MAIL}
    assert personal("1 2 " * 25_000) == frozenset()
    assert personal("@" * 100_000) == frozenset()
    assert personal("a" * 100_000 + "@") == frozenset()


@given(st.integers(0, 10**15 - 1))
def test_luhn_finds_every_single_wrong_digit(number: int) -> None:
    body = f"{number:015d}"
    check = next(digit for digit in "0123456789" if luhn(body + digit))
    whole = body + check
    for place in range(16):
        other = str((int(whole[place]) + 1) % 10)
        assert not luhn(whole[:place] + other + whole[place + 1 :])


@given(st.from_regex(r"[A-Z]{2}[A-Z0-9]{11,26}", fullmatch=True))
def test_an_iban_has_one_right_pair_of_check_digits(text: str) -> None:
    country, body = text[:2], text[2:]
    right = [check for check in range(2, 99) if iban(f"{country}{check:02d}{body}")]
    assert len(right) == 1
