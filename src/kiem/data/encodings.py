"""Which of the single-byte encodings of European languages a text is in, by the letters that its bytes would be.

Nearly every byte is a letter in all of them, so whether a text decodes decides nothing: `très` and `trčs` are the same
bytes. Languages differ in which letters beyond ASCII they use, and how often.
"""

import math
import re
from collections import Counter

# Letters beyond ASCII of each language with their shares of all letters in percent (en.wikipedia.org, Letter frequency;
# rounded), and marks that only one language has.
LANGUAGES = {
    "cp1252": {
        "Danish, Norwegian": "å1.2 ø0.9 æ0.6 é0.02",
        "Dutch": "é0.05 ë0.05 ï0.03 ó0.01 ü0.01",
        "Finnish": "ä3.6 ö0.44 å0.01",
        "French": "é1.9 à0.49 è0.27 ê0.22 ç0.09 û0.06 ù0.06 î0.05 â0.05 ô0.02 œ0.02 ë0.01 ï0.01",
        "German": "ü1.0 ä0.58 ö0.44 ß0.31 é0.01",
        "Icelandic": "ð4.4 á1.8 í1.6 þ1.5 ó1.0 æ0.87 ö0.78 é0.65 ú0.61 ý0.23",
        "Italian": "à0.64 è0.26 ù0.17 é0.1 ò0.1 ì0.03",
        "Portuguese": "ã0.73 ç0.53 é0.45 á0.4 ê0.34 í0.3 ó0.3 õ0.2 ú0.2 à0.07 â0.1 ô0.06",
        "Spanish": "ó0.83 í0.73 á0.5 é0.43 ñ0.31 ú0.17 ¿0.05 ¡0.02 ü0.01",
        "Swedish": "ä1.8 å1.3 ö1.3 é0.03",
    },
    "cp1250": {
        "Croatian, Slovene": "č1.1 š1.0 ž0.6 ć0.5 đ0.25",
        "Czech": "á2.2 í1.6 ě1.2 é1.1 ý1.0 č0.94 ž0.72 š0.69 ř0.38 ů0.2 ú0.05 ó0.02 ď0.02 ň0.01 ť0.01",
        "Hungarian": "é3.9 á3.4 ő0.88 ö0.82 ó0.6 ü0.6 í0.47 ű0.2 ú0.1",
        "Polish": "ł2.1 ó1.1 ę1.0 ś0.81 ć0.74 ż0.71 ą0.7 ń0.36 ź0.08",
        "Romanian": "ă4.0 î1.4 ş1.0 ţ1.0 â0.9",
        "Slovak": "á1.7 č1.1 í1.0 ý1.0 š0.9 ž0.9 ú0.9 é0.8 ť0.6 ľ0.4 ď0.3 ň0.2 ô0.2 ó0.1 ä0.1",
    },
    "cp1254": {"Turkish": "ı5.1 ü1.9 ş1.8 ç1.2 ğ1.1 ö0.8 İ0.2 â0.05"},
}
BEFORE = {"cp1252": 0.8, "cp1250": 0.15, "cp1254": 0.05}  # how likely each is before a letter is seen
CLEAR = 0.02  # geometric mean of the letters' shares, from which on a text is surely of a language
UNUSUAL = 0.002  # share of a letter that a language does not have, among those beyond ASCII
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")


def likeliest(sample: bytes) -> str:
    """The encoding, one of LANGUAGES, of the language whose letters fit best."""
    return _best(sample)[0]


def clear(sample: bytes) -> str | None:
    """As `likeliest`; None where the bytes are not the letters of any of these languages."""
    encoding, fit = _best(sample)
    n = sum(_letters(sample, encoding).values())
    return encoding if n and fit / n > math.log(CLEAR) and not _CONTROL.search(sample) else None


def _best(sample: bytes) -> tuple[str, float]:
    """The encoding that fits best, and the logarithm of the probability of its letters."""
    counts = {encoding: _letters(sample, encoding) for encoding in LANGUAGES}
    fits = {
        (encoding, language): math.log(BEFORE[encoding]) + _fit(counts[encoding], shares)
        for encoding, languages in LANGUAGES.items()
        for language, shares in languages.items()
    }
    best = max(fits, key=lambda key: fits[key])
    return best[0], fits[best]


def _letters(sample: bytes, encoding: str) -> Counter[str]:
    """The characters of the bytes that are a letter in any of the encodings."""
    found: Counter[str] = Counter()
    for byte, count in Counter(byte for byte in sample if byte > 127).items():
        readings = [bytes([byte]).decode(name, "replace") for name in LANGUAGES]
        if any(reading.isalpha() or reading in "¿¡" for reading in readings):
            letter = bytes([byte]).decode(encoding, "replace")
            found[letter.lower() if len(letter.lower()) == 1 else letter] += count  # İ has no small letter of its own
    return found


def _fit(counts: Counter[str], shares: str) -> float:
    """The logarithm of the probability of the characters."""
    given = {word[0]: float(word[1:]) for word in shares.split()}
    total = sum(given.values())
    return sum(count * math.log(max(given.get(c, 0.0) / total, UNUSUAL)) for c, count in counts.items())
