"""Codes as the LC-Rec family writes them: `<a_12><b_3>`, a letter for the level."""


def token(level: int, code: int) -> str:
    """`<a_12>`: the letter names the level, as in the LC-Rec family."""
    return f"<{letter(level)}_{code}>"


def letter(level: int) -> str:
    return (letter(level // 26 - 1) if level >= 26 else "") + chr(ord("a") + level % 26)
