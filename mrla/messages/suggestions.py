"""What somebody who wrote a name wrongly may have meant."""

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str]) -> str:
    """The end of an error's sentence about an unknown name.

    Args:
        name: What was given.
        known: Names that would have been right.

    Returns:
        ``; did you mean 'light'?`` with the known name that is nearest, or nothing where none is near.

    Example:
        >>> nearest("lihgt", ["light", "base"])
        "; did you mean 'light'?"
        >>> nearest("zzz", ["light", "base"])
        ''
    """
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
