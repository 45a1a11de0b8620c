"""Takes out of a text what a learning set must not have: e-mail addresses, tokens and other secrets, IP numbers.

A text says who and what is meant in ways that no pattern knows, so this makes a leak rarer, not impossible. What is
taken for a token is rather too much than too little: a hash is lost, a key is not kept. What must stay true: the time
taken grows with the text and not faster, whatever is in it.
"""

import ipaddress
import re
from typing import Final

EMAIL: Final = "[email]"
TOKEN: Final = "[token]"  # noqa: S105  what stands for one
IP: Final = "[ip]"
MIN_KEY_CHARACTERS: Final = 32

# Quantifiers are possessive and begin where a run begins, so that nothing is tried twice.
_PRIVATE_KEY: Final = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[^-]*+(?:-----END [A-Z ]{0,40}PRIVATE KEY-----)?"
)
_IN_URL: Final = re.compile(r"(?<=://)[^\s/@:]*+:[^\s/@]++(?=@)")
_NAMED: Final = re.compile(
    r"(?i)((?:(?:api|access)[-_ ]?key|secret|token|password|passwd|pwd)[\"']?\s{0,8}+[:=]\s{0,8}+[\"']?)"
    r"[^\s\"',;&]{4,}+"
)
_SCHEME: Final = re.compile(r"(?i)(?<!\w)(bearer|basic)(\s++)[\w.~+/=-]{8,}+")
_KNOWN: Final = re.compile(
    r"(?<![\w-])(?:sk-[\w-]{16,}+|(?:gh[pousr]_|github_pat_|glpat-|hf_|xox[abeoprs]-)[\w-]{16,}+|AKIA[0-9A-Z]{16}"
    r"|AIza[\w-]{30,}+|eyJ[\w-]{8,}+\.[\w-]{4,}+(?:\.[\w-]*+)?)"
)
_RUN: Final = re.compile(rf"(?<![A-Za-z0-9_+/=-])[A-Za-z0-9_+/-]{{{MIN_KEY_CHARACTERS},}}+=*+")
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_ADDRESS: Final = re.compile(r"(?<![\w.%+-])[\w.%+-]++@(?:[\w-]++\.)+[\w-]{2,}+")
_IPV6: Final = re.compile(r"(?<![\w:.])(?=[0-9A-Fa-f]{0,4}+:)([0-9A-Fa-f:]{2,}+)((?:\.\d{1,3}){0,3}+)(?:%\w++)?")
_IPV4: Final = re.compile(r"(?<!\d)(?<!\d\.)\d{1,3}(?:\.\d{1,3}){3}(?!\d|\.\d)")


def redacted(text: str) -> str:
    """The text with placeholders instead."""
    text = _PRIVATE_KEY.sub(TOKEN, text)
    text = _IN_URL.sub(TOKEN, text)
    text = _NAMED.sub(rf"\1{TOKEN}", text)
    text = _SCHEME.sub(rf"\1\2{TOKEN}", text)
    text = _KNOWN.sub(TOKEN, text)
    text = _RUN.sub(_key, text)
    text = _ADDRESS.sub(EMAIL, text)
    text = _IPV6.sub(_ipv6, text)
    return _IPV4.sub(_ipv4, text)


def _key(found: re.Match[str]) -> str:
    """A long word of letters and digits mixed is a key, a hash or the like; a path or a UUID is not."""
    word = found[0]
    mixed = any(map(str.isdigit, word)) and any(map(str.isalpha, word))
    longest = max(map(len, word.split("/")))
    return TOKEN if mixed and longest >= MIN_KEY_CHARACTERS // 2 and not _UUID.fullmatch(word) else word


def _ipv6(found: re.Match[str]) -> str:
    word, run = found[0], found[1]
    for part in (run + found[2], run, run[:-1]):  # "fe80::1.", "fe80::1: no route"
        try:
            ipaddress.IPv6Address(part)
        except ValueError:
            continue
        return IP + word[len(part) :] if part.strip(":") else word
    return word


def _ipv4(found: re.Match[str]) -> str:
    return IP if all(int(number) <= 255 for number in found[0].split(".")) else found[0]
