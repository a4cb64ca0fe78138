"""Personal data in a question or an answer: who may be answered with it, and whether it is kept at all.

Finds what has a form: addresses, numbers with a checksum, telephone numbers, secrets, and names where the text itself
says that they are names. What is found makes an entry private to its tenant, or keeps it out of the cache, by setting.
Detection is by form only: a name in passing is not found, and no promise is made that nothing else slips through.
"""

from __future__ import annotations

import re
import unicodedata
from enum import StrEnum


class Personal(StrEnum):
    """A kind of personal data; a metric label, never with the data itself."""

    ACCOUNT = "account"
    """An IBAN with a right checksum, or a number that the text calls an account."""
    CARD = "card"
    """A payment card number that passes Luhn's check."""
    MAIL = "mail"
    PHONE = "phone"
    SECRET = "secret"
    """An API key, token, password or private key."""
    NATIONAL = "national-id"
    NAME = "name"
    """Somebody introduces himself, or is spoken of with a title."""


class Handling(StrEnum):
    """What becomes of an answer when personal data is found in the question or in itself."""

    PRIVATE = "private"
    """Kept for the tenant that asked, and never shared."""
    NEVER = "never"
    """Not kept."""


def personal(text: str) -> frozenset[Personal]:
    """The kinds of personal data in a text. A plain question takes about ten microseconds."""
    if not text.isascii():
        # Full-width digits and letters are read like plain ones. Lone surrogates pass unharmed.
        text = unicodedata.normalize("NFKC", text)
    found: set[Personal] = set()
    if "@" in text and _MAIL.search(text):
        found.add(Personal.MAIL)
    if _DIGITS.search(text):
        found |= _numbers(text)
    if _secret(text):
        found.add(Personal.SECRET)
    if any(mark in text for mark in _NAME_MARKS) and any(form.search(text) for form in _NAMES):
        found.add(Personal.NAME)
    return frozenset(found)


def luhn(digits: str) -> bool:
    """Luhn's check of a string of ASCII digits (ISO/IEC 7812-1, annex B)."""
    doubled = (int(digit) * 2 for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(value - 9 if value > 9 else value for value in doubled)) % 10 == 0


def iban(text: str) -> bool:
    """Whether a string of capital letters and digits without spaces is an IBAN (ISO 13616: remainder 1 of 97)."""
    if not _IBAN_FORM.fullmatch(text):
        return False
    return int("".join(str(int(character, 36)) for character in text[4:] + text[:4])) % 97 == 1


_DIGITS = re.compile(r"[0-9]{3}")
_MAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
_IBAN_FORM = re.compile(r"[A-Z]{2}[0-9]{2}[A-Z0-9]{11,30}")
_IBAN = re.compile(r"\b[A-Za-z]{2}[0-9]{2}(?: ?[A-Za-z0-9]{4}){2,7}(?: ?[A-Za-z0-9]{1,4})?\b")
_RUN = re.compile(r"(?<![\w.,])[0-9](?:[ -]?[0-9]){12,18}(?![\w]|[.,][0-9])")
_CARD_LENGTHS = {"2": (16,), "3": (14, 15, 16), "4": (13, 16, 19), "5": (16,), "6": (16, 17, 18, 19)}
_ACCOUNT = re.compile(
    r"\b(?:account|acct|a/c|iban|routing|sort code|konto|kontonummer|customer|kundennummer|client|member|membership"
    r"|patient|policy|passport|licen[cs]e|compte|cuenta|conto)\b[ \w]{0,16}?\W{0,3}"
    r"(?:(?:no|nr|num|number|id|code)\b\.?)?\W{0,3}(?:is |are |ist )?#?"
    r"(?=[A-Z0-9-]*[0-9]{4})[A-Z0-9][A-Z0-9-]{5,33}\b",
    re.I,
)
_PHONE = re.compile(r"(?<![\w.,+-])(?<![0-9] )(?:\+|00)[1-9][0-9]{0,2}(?:[ ./-]?\(?[0-9]{1,4}\)?){2,6}(?![\w])")
_LOCAL_PHONE = re.compile(r"(?<![\w.,-])(?:\([0-9]{3}\) ?|[0-9]{3}[ .-])[0-9]{3}[ .-][0-9]{4}(?![\w-])")
_CALLED_PHONE = re.compile(
    r"\b(?:phone|telephone|tel|mobile|cell|call me|reach me|whatsapp|telefon|handy|téléphone|teléfono)\b\W{0,3}"
    r"(?:(?:number|no|nr|is|at|on)\b\W{0,3}){0,3}(?P<number>[0-9](?:[ ()./-]{0,2}[0-9]){6,13})",
    re.I,
)
_SSN = re.compile(r"(?<![\w-])(?!000|666|9)[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![\w-])")
_PHONE_DIGITS = range(8, 16)


def _numbers(text: str) -> set[Personal]:
    found: set[Personal] = set()
    if any(_card(re.sub(r"[ -]", "", run[0])) for run in _RUN.finditer(text)):
        found.add(Personal.CARD)
    if any(_has_iban(hit[0]) for hit in _IBAN.finditer(text)) or _ACCOUNT.search(text):
        found.add(Personal.ACCOUNT)
    if _LOCAL_PHONE.search(text) or _CALLED_PHONE.search(text) or any(map(_international, _PHONE.findall(text))):
        found.add(Personal.PHONE)
    if _SSN.search(text):
        found.add(Personal.NATIONAL)
    return found


def _card(digits: str) -> bool:
    return len(digits) in _CARD_LENGTHS.get(digits[0], ()) and len(set(digits)) > 1 and luhn(digits)


def _has_iban(run: str) -> bool:
    """Whether a run of groups begins with an IBAN: what follows it may look like one more group."""
    groups = run.upper().split(" ")
    return any(iban("".join(groups[:count])) for count in range(1, len(groups) + 1))


def _international(number: str) -> bool:
    digits = sum(character.isdigit() for character in number)
    # Without the plus sign, eight digits that begin with 00 are as likely an order's number.
    return digits in _PHONE_DIGITS and (number.startswith("+") or digits >= 10)


_KNOWN_SECRET = re.compile(
    r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----"
    r"|\b(?:sk|pk|rk)[-_](?:[A-Za-z]{2,12}[-_])?[A-Za-z0-9_-]{16,}\b"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{30,}\b|\bgithub_pat_\w{30,}\b|\bglpat-[\w-]{18,}\b"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bAIza[\w-]{30,}|\bhf_[A-Za-z0-9]{30,}\b|\bya29\.[\w-]{20,}"
    r"|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}|://[^\s/:@]{1,64}:[^\s/@]{3,128}@"
)
_NAMED_SECRET = re.compile(
    r"\b(?:api[ _-]?key|secret(?:[ _-]?key)?|access[ _-]?(?:key|token)|auth[ _-]?token|token|bearer|password|passwd"
    r"|passwort|pwd|passphrase|mot de passe|contraseña)\b[\"']?\s*(?:[:=]|\bis\b|\bist\b)?\s*[\"']?([^\s\"'<>]{6,200})",
    re.I,
)
_SECRET_MARKS = ("key", "token", "secret", "pass", "pwd", "bearer", "contrase")
_KEY_MARKS = ("sk", "pk", "rk", "AKIA", "ASIA", "gh", "glpat", "xox", "AIza", "hf_", "ya29", "eyJ", "://", "-----BEGIN")


def _secret(text: str) -> bool:
    lowered = text.lower()
    named = _NAMED_SECRET.finditer(text) if any(mark in lowered for mark in _SECRET_MARKS) else ()
    if any(_secret_value(hit[1]) for hit in named):
        return True
    return any(mark in text for mark in _KEY_MARKS) and _KNOWN_SECRET.search(text) is not None


def _secret_value(value: str) -> bool:
    """Whether a word that follows "password" could be one: letters and digits mixed, or signs inside."""
    kinds = (str.isdigit, str.islower, str.isupper)
    mixed = sum(any(kind(character) for character in value) for kind in kinds)
    return any(map(str.isdigit, value)) and (mixed >= 2 or len(value) >= 8)


_CAPITALISED = r"[A-ZÀ-ÖØ-Þ][\w'’-]+"
_INTRODUCTION = r"[Mm]y name is|[Ii]ch heiße|[Mm]ein Name ist|[Jj]e m'appelle|[Mm]e llamo|[Mm]i nombre es|[Mm]i chiamo"
_NAMES = (
    re.compile(rf"\b(?:{_INTRODUCTION})\s+{_CAPITALISED}"),
    re.compile(
        r"\b(?:[Cc]all me|[Tt]his is|I am|I'm|[Ss]igned,?|[Rr]egards,?|[Pp]atient|[Cc]ustomer|[Cc]lient|[Ee]mployee)\s+"
        rf"{_CAPITALISED}\s+(?:[A-Z]\.\s+)?{_CAPITALISED}"
    ),
    re.compile(rf"\b(?:Mr|Mrs|Ms|Miss|Herrn?|Frau|Mme|Sra?)\.?\s+{_CAPITALISED}"),
    re.compile(rf"\b(?:[Nn]ame|[Pp]atient|[Cc]ustomer|[Kk]unde)\s*:\s*{_CAPITALISED}"),
)
_NAME_MARKS = (
    *("name", "Name", "nombre", "heiße", "appelle", "llamo", "chiamo", "all me", "his is", "I am", "I'm", "igned"),
    *("egards", "atient", "ustomer", "lient", "mployee", "Kunde", "kunde", "M", "Herr", "Frau", "Sr"),
)
"""Without one of these no form above can match; looking for them costs less than trying."""
