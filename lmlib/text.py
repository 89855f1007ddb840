"""Text as it is shown and compared."""

import unicodedata

_CONTROL = {"Cc", "Cs", "Zl", "Zp"}  # control characters, lone surrogates, separators
_DIRECTION = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def printable(text: str) -> str:
    """Make untrusted text safe for a terminal: show characters that would act on it (controls,
    escapes, lone surrogates, direction marks) as \\x and their number; keep newlines and tabs.
    """
    def acts(c: str) -> bool:
        return c not in "\n\t" and (unicodedata.category(c) in _CONTROL or c in _DIRECTION)

    return "".join(f"\\x{ord(c):02x}" if acts(c) else c for c in text)


def normalize(text: str) -> str:
    """Remove what does not make a document another one: case, spacing, Unicode's forms."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def format_duration(seconds: float) -> str:
    """Show seconds as h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"
