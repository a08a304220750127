"""Words of somebody else, made fit to be shown."""


def shown(words: str, longest: int) -> str:
    """The words without control characters and broken text, cut to a length."""
    return "".join(letter if letter.isprintable() else "?" for letter in words[:longest])
