"""What a browser would fetch from another host: nothing may, so that the site reads the same without a network."""

import re
from typing import Final

_LOADED: Final = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|icon|preload|preconnect|dns-prefetch|modulepreload|manifest)\b)"
    r"[^>]*\bhref=[\"']?((?:https?:)?//[^\"'\s>]+)"
)
"""What a browser fetches by itself from another host."""
_LOADED_BY_STYLE: Final = re.compile(r"(?:url\(|@import\s+)[\"']?((?:https?:)?//[^\"')\s]+)")


def loaded(text: str) -> list[str]:
    """Addresses on other hosts that a browser fetches by itself for a page, a style or a picture."""
    by_page = [source or link for source, link in _LOADED.findall(text)]
    is_markup = "<" in text[:200]
    styles = re.findall(r"<style.*?</style>|style=\"[^\"]*\"", text, re.DOTALL) if is_markup else [text]
    return by_page + [address for style in styles for address in _LOADED_BY_STYLE.findall(style)]
