"""Prose out of wiki markup: templates, tables, notes and links go, sentences stay.

Not a full parser of the language: a few passes of regular expressions, innermost first, that leave clean paragraphs of
ordinary articles and drop what they don't understand.
"""

import bz2
import html
import re

from lineament._base.extras import folder

CARRIED = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SHORTEST_PARAGRAPH = 80  # characters; shorter lines are captions, list entries and leftovers of tables
SHORTEST_ARTICLE = 1500  # characters; shorter ones are lists and disambiguation pages

_PAGE = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.S)
_TEMPLATE = re.compile(r"\{\{((?:[^{}]|(?<!\{)\{(?!\{)|(?<!\})\}(?!\}))*)\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.S)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_GONE = re.compile(  # comments, notes, galleries and the like: nothing inside them is prose
    r"<!--.*?-->|<ref[^<>]*/\s*>|<(ref|gallery|timeline|imagemap|source|score|code|pre)\b[^<>]*>.*?</\1\s*>",
    re.S | re.I,
)
_LEFT_EMPTY = re.compile(r"\((?:[\s,;:/]|or|and)*\)")
_END_MATTER = re.compile(
    r"^=+\s*(?:see also|references|notes|footnotes|external links|further reading|bibliography|sources|citations)"
    r"\b.*?(?=^==[^=]|\Z)",
    re.S | re.M | re.I,
)
_FORMULA = re.compile(r"<math[^>]*>\s*(.*?)\s*</math>", re.S)
_SPACES = ("file", "image", "category", "media")
_UNITS = {"convert", "cvt"}
_KEEP_LAST = {"lang", "nowrap", "nobr", "transl", "abbr", "sup", "sub", "math", "mvar", "as of", "quote", "cquote"}


def _template(match: re.Match[str]) -> str:
    name, *arguments = match.group(1).split("|")
    name = name.strip().lower()
    plain = [a.strip() for a in arguments if "=" not in a]
    if name in _UNITS and len(plain) > 1:
        return f"{plain[0]} {plain[1]}"
    if name in ("quote", "cquote", "abbr") and plain:
        return plain[0]
    if (name in _KEEP_LAST or name.startswith("lang-")) and plain:
        return plain[-1]
    return "–" if name in ("ndash", "spaced ndash", "snd") else ""


def _link(match: re.Match[str]) -> str:
    target, _, shown = match.group(1).partition("|")
    space, colon, _ = target.partition(":")
    if colon and (space.strip().lower() in _SPACES or re.fullmatch("[a-z-]{2,12}", space)):  # or another language
        return ""
    return shown.rpartition("|")[2] or target


def _until_still(pattern: re.Pattern[str], by, text: str) -> str:
    count = 1
    while count:
        text, count = pattern.subn(by, text)
    return text


def clean(markup: str) -> str:
    """Turn the markup of one article into prose: paragraphs separated by an empty line.

    Args:
        markup: wikitext, entities already decoded.

    Returns:
        The paragraphs of at least 80 characters. Headings, lists of links, tables, notes, pictures and the sections
        after the article (references, see also) are dropped; emphasis, links and formulas lose their marks.

    Example:
        >>> clean("'''Tea''' is a [[drink|hot drink]]<ref>A book</ref> {{citation needed}}"
        ...       " made of leaves, poured {{convert|90|C|F}} hot over [[Camellia sinensis]] by people everywhere.")
        'Tea is a hot drink made of leaves, poured 90 C hot over Camellia sinensis by people everywhere.'
    """
    text = _GONE.sub("", markup)
    text = _END_MATTER.sub("", text)
    text = _FORMULA.sub(lambda m: re.sub("[{}]", " ", m.group(1)), text)
    text = _until_still(_TEMPLATE, _template, text)
    text = _until_still(_TABLE, "", text)
    text = _until_still(_LINK, _link, text)
    text = re.sub(r"\[(?:https?:)?//[^\s\]]*\s?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<br\s*/?>", " ", text)
    text = re.sub(r"'{2,5}|</?[a-zA-Z][^<>]*>|__[A-Z]+__", "", text)
    text = _LEFT_EMPTY.sub("", text.replace("\xa0", " "))
    text = re.sub(r"\((?:\s*[,;:])*\s+", "(", text)
    text = text.replace("[[", "").replace("]]", "")
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ([,.;:)])", r"\1", text)
    lines = (line.strip() for line in text.split("\n"))
    prose = (line for line in lines if len(line) >= SHORTEST_PARAGRAPH and line[0] not in "=|!*#:;{}")
    return "\n\n".join(prose)


def articles(dump: str) -> list[str]:
    """Return the prose of every article in an XML dump, in its order; redirects and stubs are left out."""
    found = (clean(html.unescape(html.unescape(body))) for _, body in _PAGE.findall(dump) if not _redirects(body))
    return [article for article in found if len(article) >= SHORTEST_ARTICLE]


def _redirects(body: str) -> bool:
    return body.lstrip()[:9].lower() == "#redirect"


def wiki_sample() -> list[str]:
    """Return about 100 articles of the English Wikipedia (2.5 million characters) that the package gensim carries.

    Raises:
        InputError: gensim is not installed; only its files are used, so `--no-deps` is enough.
    """
    path = folder("gensim", package="gensim") / "test" / "test_data" / CARRIED
    return articles(bz2.decompress(path.read_bytes()).decode("utf-8"))
