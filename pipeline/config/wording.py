"""Words of messages for people."""


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun: '1 step', '3 steps'; `plural` where that is more than an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
