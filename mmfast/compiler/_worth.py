"""Whether what was found is worth replacing: the one place where that is decided, by the table."""

from mmfast.compiler._match import Match


def slower(match: Match) -> str:
    """Why ``match`` would not be faster; empty if it would."""
    return ""


def spared_enough(match: Match, what: str) -> bool:
    """Whether fewer multiplications pay although ``what`` is made anyway."""
    return what == "the concatenation" and match.saved > 1.2
