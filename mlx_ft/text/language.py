"""Guess the language of a text, or say that it is unknown.

By script, and by small words where the script is Latin. Tells about twenty languages apart, in
texts of a sentence or more.

Does not: guess. Code, names, numbers and mixtures have no language here.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

MIN_LETTERS = 12
MIN_SCRIPT_SHARE = 0.7
MIN_SMALL_WORDS = 3
MAX_CHARACTERS = 4_000

# The small words that make up a third of any text of a language; those that two languages share
# count for both and so decide nothing.
SMALL_WORDS = {
    "en": "the and of to is in that it for you are with this was on not be have as a an i at by or "
    "from your can will what how they we he she but do does if so there my me hello yes which",
    "de": "der die das und ist nicht ein eine ich sie es zu den mit von auf für dem im auch wie "
    "sich des werden haben wir oder wenn aber nur noch kann dass du sind war bei einen ja",
    "fr": "le la les et est un une des que qui dans pour pas je vous il elle nous sur avec ce "
    "cette au du en sont plus mais ou comme être avoir votre c'est",
    "es": "el la los las y es un una que de en por para con no se su lo como más pero o este esta "
    "son muy está hay usted del al mi",
    "it": "il la lo gli le e è un una che di in per con non si del della sono come più ma o questo "
    "questa nel anche dei alla",
    "pt": "o a os as e é um uma que de em por para com não se do da no na como mais mas ou este "
    "esta são você ao dos das seu",
    "nl": "de het een en van is dat niet in op te zijn met voor die ik je aan ook er maar als naar "
    "om dit wat bij kan wordt deze",
    "sv": "och att det som en är på för av med den till inte har de ett jag om vi kan men var du",
    "pl": "i w na z nie się że do to jest jak o ale po co tak za od czy dla są ten by",
    "tr": "ve bir bu da de için ile ne çok daha var gibi ama ben sen olarak mi en değil olan",
}
_SETS = {name: frozenset(words.split()) for name, words in SMALL_WORDS.items()}
_SCRIPTS = {
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "CJK": "zh",
    "CYRILLIC": "ru",
    "GREEK": "el",
    "ARABIC": "ar",
    "HEBREW": "he",
    "DEVANAGARI": "hi",
    "BENGALI": "bn",
    "TAMIL": "ta",
    "THAI": "th",
}
LANGUAGES = tuple(sorted({*_SETS, *_SCRIPTS.values()}))
# Somebody who names a language may want an answer in it.
NAMED_LANGUAGE = re.compile(
    r"(?i)\b(translat\w*|english|german|french|spanish|italian|portuguese|dutch|swedish|polish|"
    r"turkish|japanese|korean|chinese|mandarin|russian|greek|arabic|hebrew|hindi|bengali|tamil|"
    r"thai|latin|languages?)\b"
)


def language_of(text: str) -> str | None:
    """Return the two-letter code of a text's language, one of LANGUAGES, or None.

    At least 12 letters, 70 % of them of one script; in Latin script, three different small words of
    a language and more than of any other. Looks at the first 4,000 characters.
    """
    text = text[:MAX_CHARACTERS]
    scripts = Counter(
        unicodedata.name(character, "").split(" ")[0] for character in text if character.isalpha()
    )
    letters = sum(scripts.values())
    if letters < MIN_LETTERS:
        return None
    if scripts["HIRAGANA"] + scripts["KATAKANA"] > 0.1 * letters:
        return "ja"
    script, most = scripts.most_common(1)[0]
    if most < MIN_SCRIPT_SHARE * letters:
        return None
    if script != "LATIN":
        return _SCRIPTS.get(script)
    return _latin_language(text)


def _latin_language(text: str) -> str | None:
    words = set(re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower().replace("\u2019", "'")))
    found = Counter({name: len(words & small) for name, small in _SETS.items()})
    (best, most), (_, second) = found.most_common(2)
    return best if most >= MIN_SMALL_WORDS and most > second else None
