"""Rule 3 of the canonical form: links as they would be clicked, and the hosts they lead to.

Input is folded text (see `folding`): small letters, nothing invisible.
"""

from __future__ import annotations

import re

from redqueen.text.folding import ALPHABETIC

_COMMON_TLD = (
    "com|net|org|info|biz|io|gg|gift|gifts|ru|xyz|top|site|online|club|shop|store|app|dev|link|click|live|pro|vip|"
    "fun|win|icu|buzz|cyou|space|website|tech|cc|tv|ly|me|co|us|uk|de|fr|nl|eu|pl|ua|cn|br|in|ca|au|jp|kr|es|ch|se|"
    "tk|ml|ga|cf|gq|pw|ws|su|cz|lol|monster|world|today|life|news|one|page|cloud|games|game|money|finance|exchange|"
    "trade|bet|casino|loan|download|stream|chat|email|support|help|edu|gov|mil|int|example|test|invalid|ro|hu|gr|pt|"
    "dk|fi|no|ie|nz|za|mx|ar|cl|tr|ir|il|sg|hk|tw|vn|th|ph|id|my|to|ai|sh|st|la|bz|im|is|it|at|be|by|kz|ge|am|lt|lv|"
    "ee|рф"
)
_LABEL = rf"[a-z0-9{ALPHABETIC}]"
_TOP = rf"(?:{_COMMON_TLD}|xn--[a-z0-9-]{{2,59}})(?![a-z0-9_{ALPHABETIC}-]|\.[a-z0-9])"
_HOST = rf"(?:{_LABEL}[a-z0-9_{ALPHABETIC}-]{{0,62}}\.){{1,6}}{_TOP}"
_URL = re.compile(
    rf"(https?://[^\s<>\"]+|(?<![a-z0-9_.{ALPHABETIC}-]){_HOST}(?::\d{{1,5}})?(?:[/?#][^\s<>\"]*)?)"
)
_HINT = re.compile(rf"\.[a-z{ALPHABETIC}]|://")
_SPACE = re.compile(r"\s")

_SPELT_TLD = r"(?:com|net|org|info|ru|gg|gift|xyz|io|top|site|online|shop|app|dev|link|click|club)\b"
_LOOSE_TLD = r"(?:com|net|org|ru|gg|gift|xyz)\b"
_LINKISH = re.compile(
    r"hxxp|h\*\*p|[\[({<] ?(?:\.|d[o0]t) ?[\])}>]|\[:\]|\[/\]|%[0-9a-f]{2}|\]\(\s?http|<http"
    rf"|([ _-])d[o0]t\1{_SPELT_TLD}|[a-z0-9] \.\s?{_LOOSE_TLD}"
    r"|=https?://|https?:\s|https?\s{1,2}:\s?/|https?:/[^/]|https?:/{3}|https?:\\|\\[@/]|xn--[a-z0-9]"
    r"|\w slash [a-z0-9]"
    r"|https?://(?:\d{7,10}|0x[0-9a-f]{7,8}|0[0-7]{9,11})(?![\w.])|https?://[^\s/]*\b0[0-7x][0-9a-f]*\."
)
_SCHEME = re.compile(
    r"h(?:xx|\*\*|tt)p(s?)\s{0,2}(?:\[:\]|:)\s{0,2}(?:\[/\]|[/\\])\s?(?:\[/\]|[/\\]){0,3}\s?"
)
_DOT = re.compile(r"(?<=\w) ?[\[({<] ?(?:\.|d[o0]t) ?[\])}>] ?(?=\w)")
_SPELT_DOT = re.compile(rf"(?<=\w)(?:([ _-])d[o0]t\1(?={_SPELT_TLD})| \.\s?(?={_LOOSE_TLD}))")
_SLASH = re.compile(rf"(?<=\w)\[/\](?=\w)|(?<=\.)({_SPELT_TLD}) slash (?=[a-z0-9])")
_USER = re.compile(r"(https?://)([^\s/\\]{0,99})\\+@")
_BACKSLASH = re.compile(r"(https?://[^\s/\\]{0,99})\\+(?=/)")
_MARKDOWN = re.compile(r"\[([^\[\]\n]{0,200})\]\(\s?(https?://[^\s()<>]*)\s?\)")
_ANGLE = re.compile(r"<(https?://[^\s<>]*)>")
_REDIRECT = re.compile(
    r"https?://[^\s<>\"=]*(?:=(?!https?(?::|%3a))[^\s<>\"=]*)*=(?=https?(?::|%3a)(?:/|%2f){2})"
)
_ESCAPES = re.compile(r"%[%0-9a-f]+")
_ESCAPED = {
    code: chr(int(code, 16)).lower()
    for code in (f"{i:02x}" for i in range(256))
    if re.fullmatch("2[def]|3[0-9]|4[1-9a-f]|5[0-9af]|6[1-9a-f]|7[0-9ae]", code)
}
_ESCAPED_INNER = re.compile(r"(https?)(?::|%3a)(?:/|%2f){2}")
_PUNYCODE = re.compile(r"(?<![a-z0-9-])xn--([a-z0-9-]{2,59})(?![a-z0-9-])")
_NUMERIC = re.compile(r"://\d")
_NUMERIC_HOST = re.compile(
    r"(?<=://)(?:0x[0-9a-f]{1,8}|\d{1,11})(?:\.(?:0x[0-9a-f]{1,8}|\d{1,11})){0,3}(?![\w.-])"
)


def refang(text: str) -> tuple[str, int]:
    """Links as they would be clicked, and how many of their characters had been cloaked."""
    if not _LINKISH.search(text):
        return text, 0
    cloaked = 0
    if "ot" in text or "0t" in text or "." in text:
        text, spelt = _SPELT_DOT.subn(".", text)
        text, dots = _DOT.subn(".", text)
        cloaked += 3 * (spelt + dots)
    if "/" in text or "\\" in text:
        cloaked += 4 * sum(m[0][1] != "t" for m in _SCHEME.finditer(text))
        text = _SCHEME.sub(r"http\1://", text)
    if "slash" in text or "[/]" in text:
        text, slashes = _SLASH.subn(lambda m: (m[1] or "") + "/", text)
        cloaked += 3 * slashes
    if "http" in text and ("](" in text or "<" in text):
        text = _ANGLE.sub(r" \1 ", _MARKDOWN.sub(r"\1 \2 ", text))
    if "http" in text:
        text, more = _unescape(text)
        cloaked += more
    if "xn--" in text:
        text = _PUNYCODE.sub(_from_punycode, text)
    if "=http" in text:
        # Both are kept: who may send one on to where it likes may also not.
        text, redirects = _REDIRECT.subn(r"\g<0> ", text)
        cloaked += 8 * redirects
    return text, cloaked


def _unescape(text: str) -> tuple[str, int]:
    cloaked = 0
    if "%" in text:
        text, cloaked = _ESCAPES.subn(_decoded, text)[0], text.count("%")
        cloaked -= text.count("%")
        text = _ESCAPED_INNER.sub(r"\1://", text)
    if "\\" in text:
        # A browser goes to what stands before it, other clients to what stands behind.
        text = _BACKSLASH.sub(r"\1", _USER.sub(r"\1\2/ \1", text))
    plain = _NUMERIC_HOST.sub(_dotted, text) if _NUMERIC.search(text) else text
    return plain, cloaked + 4 * (plain != text)


def _decoded(match: re.Match[str]) -> str:
    """Escapes read, and what is an escape again when those within it are read; each character once."""
    read: list[str] = []
    for c in match.group():
        read.append(c)
        while len(read) > 2 and read[-3] == "%" and (plain := _escape(read[-2] + read[-1])):
            read[-3:] = plain
    return "".join(read)


def _escape(code: str) -> str:
    """What the two digits behind a percent sign stand for; nothing where they stay."""
    return "%" if code == "25" else _ESCAPED.get(code, "")


def _dotted(match: re.Match[str]) -> str:
    """The address that ``http://3232235777`` or ``http://0x7f.1`` would reach, as four numbers."""
    parts = []
    for part in match.group().split("."):
        octal = len(part) > 1 and part[0] == "0" and part[1] != "x"
        if octal and not set(part) <= set("01234567"):
            return match.group()
        parts.append(int(part, 16 if part[:2] == "0x" else 8 if octal else 10))
    *heads, last = parts
    if any(head > 255 for head in heads) or last >= 256 ** (4 - len(heads)):
        return match.group()
    return ".".join(map(str, [*heads, *last.to_bytes(4 - len(heads), "big")]))


def _from_punycode(match: re.Match[str]) -> str:
    """A label of a host as it is shown; what is not punycode stays."""
    try:
        shown = match.group(1).encode().decode("punycode")
        shown.encode()
    except ValueError:
        return match.group()
    # A label that would read as something else than one word is a trick on its reader: leave it cloaked.
    return shown if shown and all(c.isalnum() or c == "-" for c in shown) else match.group()


def spans(text: str) -> list[tuple[int, int]]:
    """Where the links are, in order."""
    found: list[tuple[int, int]] = []
    flat = text if text.isprintable() else _SPACE.sub(" ", text)
    done = 0
    # A link holds no blank: only words with a dot before a letter, or a scheme, are looked at, each once.
    while hint := _HINT.search(flat, done):
        start = flat.rfind(" ", done, hint.start()) + 1 or done
        done = flat.find(" ", hint.end())
        done = len(flat) if done < 0 else done
        found += (match.span() for match in _URL.finditer(flat, start, done))
    return found


def hosts(canonical: str) -> list[str]:
    """`domains` of text that is canonical already."""
    if "." not in canonical:
        return []
    found: dict[str, None] = {}
    for start, end in spans(canonical):
        rest = canonical[start:end].split("://", 1)[-1]
        host = re.split(r"[/?#\\]", rest, maxsplit=1)[0].rsplit("@", 1)[-1]
        host = host.split(":", 1)[0].strip(".,;!)('\"]")
        if host.startswith("www."):
            host = host[4:]
        if "." in host:
            found[host] = None
    return list(found)
