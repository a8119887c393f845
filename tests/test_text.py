"""Claims about reading messages: the canonical form, obfuscation, fingerprints, domains."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from redqueen.text import canonicalise, domains, hamming, obfuscation, read, simhash

_TRICKY = "aаeеfFlI013@$!|.-_* \n（.)[]dot%2fhxtps:/cомß"
_TRICKY += "\u200b\u200d\u202e\u0301\u0336\ufe0f\u20e3\U0001d41f\U000e0041"
_tricky = st.text(st.sampled_from(_TRICKY), max_size=40)
_pieces = st.lists(
    st.sampled_from(
        ["hxxps://", "http://", "evil", ".com", "[.]", " dot ", "%2565", "f r e e", "f.r.e.e", "n1tr0",
         "pa$$", "раy", "\u200b", " ", "  ", "\n", "0ffer", "fr33", "://", "?u=https%3A%2F%2F", "[x](", ")",
         "<", ">", "*", "aaa"]
    ),
    max_size=12,
).map("".join)  # fmt: skip

CLEAN = {
    "English": "Hey, are you coming to the match at 7pm? Channel 4, row b2b... (mp3 of it, U.S.A. only!)",
    "caps": "WOW THAT WAS GREAT!!!",
    "emoji": "I ❤️ this 👨‍👩‍👧 so much 😂😂😂 1️⃣ 🇫🇷 👍🏽 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "French": "Où est la bibliothèque ? C'est déjà l'été, garçon — voilà « ça »",
    "German": "Größe, Straße, Äpfel und Öl für fünf Übungen",
    "Turkish": "Işık ılık süt iç, çocuğun adı İbrahim",
    "Vietnamese": "Tiếng Việt được viết bằng chữ Quốc ngữ",
    "Polish": "Zażółć gęślą jaźń",
    "Russian": "Привет, как дела? Съешь ещё этих мягких французских булок, да выпей чаю. USBшка и СССР",
    "Ukrainian": "Її об'єднання — це ґанок і їжак",
    "Greek": "Γεια σου Κόσμε, τι κάνεις; Ωραία μέρα",
    "Hebrew": "שלום עולם, מה שלומך היום?",
    "Arabic": "مرحبا بالعالم كيف حالك اليوم",
    "Persian": "سلام، می‌خواهم به خانه‌ی شما بیایم",
    "Hindi": "नमस्ते दुनिया, आप कैसे हैं? क्षत्रिय",
    "Thai": "สวัสดีชาวโลก เป็นอย่างไรบ้าง",
    "Japanese": "こんにちは世界！ＡＢＣのＴシャツを３枚ください。「はい」",
    "Chinese": "你好，世界！我们明天见。",
    "Korean": "안녕하세요 세계! 오늘 어때요?",
    "Armenian": "Բարեւ աշխարհ, ինչպես ես",
    "Georgian": "გამარჯობა მსოფლიო",
}


@pytest.mark.parametrize("language", CLEAN)
def test_clean_text_of_any_language_is_left_as_it_is_but_for_case(language: str) -> None:
    text = CLEAN[language]
    letters = [c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalpha()]
    assert [c for c in canonicalise(text) if c.isalpha()] == [c for c in letters if c != "\u0307"]
    assert obfuscation(text) == 0


@pytest.mark.parametrize(
    "obscured",
    [
        "fr\u200bee nit\u00adro",
        "\U0001d41f\U0001d42b\U0001d41e\U0001d41e ⓝⓘⓣⓡⓞ",
        "ｆｒｅｅ ｎｉｔｒｏ",
        "ꜰʀᴇᴇ ɴɪᴛʀᴏ",
        "frее nіtrо",
        "f̶r̶e̶e̶ n̸i̸t̸r̸o̸",
        "fr33 n1tr0",
        "f r e e   n i t r o",
        "f.r.e.e n-i-t-r-o",
        "fr\u202eee ni\U000e0041tro",
        "FREEEEE NITRO".replace("EEEEE", "EE"),
        "".join(c + "\u0336\u0353\u033f" if c != " " else c for c in "free nitro"),
    ],
)
def test_obscured_words_are_read_as_a_person_reads_them(obscured: str) -> None:
    assert canonicalise(obscured) == "free nitro"
    assert obscured.isupper() or obfuscation(obscured) > 0.1


def test_obfuscation_grows_with_what_was_changed() -> None:
    plain = "claim your free nitro at the link below before it is gone"
    one, many = plain.replace("free", "fr\u200bee"), plain.replace("e", "е")
    assert 0 == obfuscation(plain) < obfuscation(one) < obfuscation(many) < 1 == obfuscation("ｆｒｅｅ")


@pytest.mark.parametrize(
    ("cloaked", "host"),
    [
        ("hxxps://evil[.]com/a", "evil.com"),
        ("get it at evil(dot)com now", "evil.com"),
        ("evil dot com", "evil.com"),
        ("[claim](https://evil.ru/x)", "evil.ru"),
        ("<https://www.evil.ru>", "evil.ru"),
        ("https://www.google.com/url?q=https%3A%2F%2Fevil.com%2Fa&x=1", "evil.com"),
        ("https://discord.com@evil.ru/login", "evil.ru"),
        ("http://%65vil.com/", "evil.com"),
        ("go to discоrd.gift/free", "discord.gift"),
        ("evil。com is up", "evil.com"),
    ],
)
def test_cloaked_links_lead_to_the_host_that_would_be_visited(cloaked: str, host: str) -> None:
    assert domains(cloaked) == [host]


def test_ordinary_sentences_name_no_domain() -> None:
    assert domains("ok.then we go, e.g. at 3.50 or so... see you.bye") == []
    assert domains("WWW.Example.com and example.com again, mail joe@example.com") == ["example.com"]


def test_whole_words_of_another_script_are_not_made_latin() -> None:
    assert canonicalise("сор и рак") == "сор и рак"
    assert canonicalise("pаypаl") == "paypal"


def test_terms_that_look_like_leet_are_kept() -> None:
    text = "mp3 b2b h2o k8s i18n covid19 windows10 4pm 1st 3d w3c python3 yes|no a+b 50% x*y"
    assert canonicalise(text) == text
    assert canonicalise("pa$$word c4sh cl!ck n1tro 0ffer") == "password cash click nitro offer"


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=60), _tricky, _pieces))
@example("\ud800hxxp://\udfff")
@example("http://[.]http://h t t p")
def test_canonical_form_is_idempotent_and_never_raises(text: str) -> None:
    once = read(text)
    assert canonicalise(once.canonical) == once.canonical
    assert 0 <= once.obfuscation <= 1
    once.canonical.encode()
    domains(text)
    assert -(2**63) <= simhash(once.canonical) < 2**63


@pytest.mark.parametrize(
    "unit", ["a.", "f r e e ", "%25", "e\u0316\u0301", "w1n", "http://", "[a](http://b) ", "е", "@a|"]
)
def test_time_grows_with_length_not_with_its_square(unit: str) -> None:
    def seconds(size: int) -> float:
        text = (unit * size)[:size]
        started = time.process_time()
        read(text)
        domains(text)
        return time.process_time() - started

    seconds(1_000)
    assert min(seconds(80_000) for _ in range(2)) < 40 * max(0.002, min(seconds(10_000) for _ in range(3)))


def test_near_duplicates_have_near_fingerprints() -> None:
    text = "claim your free nitro at discord-gift.com/abc before it is gone, only today"
    near = simhash(text.replace("abc", "xyz"))
    far = simhash("the meeting is moved to three, bring the notes from last week please")
    assert hamming(simhash(text), near) <= 12 < 20 <= hamming(simhash(text), far)
    assert simhash("") == 0
    assert hamming(-1, 0) == 64
    assert simhash("the same text everywhere") == 8044472143397608017
