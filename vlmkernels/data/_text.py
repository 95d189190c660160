"""Names and captions from untrusted sources: printable form, and validity as Unicode."""

from __future__ import annotations

import re

# C0, DEL, C1, line and paragraph separators, bidirectional formatting characters, surrogates.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """`str(text)` on one line, control characters and lone surrogates as escapes."""
    return _CONTROLS.sub(lambda found: found.group().encode("unicode_escape").decode(), str(text))


def is_unicode(text: str) -> bool:
    """False if `text` contains a lone surrogate: undecodable bytes of a name, or half a JSON escape."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
