"""Text as it is shown and compared."""

import unicodedata


def printable(text: str) -> str:
    """Text from a model, corpus or file name, safe for a terminal: what would act on it is shown as its number instead
    (control characters and line separators, escape sequences, half surrogates, marks that turn the writing direction)."""
    hidden = {"Cc", "Cs", "Zl", "Zp"}
    turning = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

    def acts(c: str) -> bool:
        return c not in "\n\t" and (unicodedata.category(c) in hidden or c in turning)

    return "".join(f"\\x{ord(c):02x}" if acts(c) else c for c in text)


def format_duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def normalize(text: str) -> str:
    """A text without what does not count: case, spacing, Unicode's compatibility forms."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
