"""Errors of others in messages of ours."""


def one_line(error: BaseException, length: int | None = None) -> str:
    r"""An error's message in one line, or its kind where it has none.

    Args:
        error: The error.
        length: How many characters it has at most; None for any number.

    Example:
        >>> one_line(ValueError("two\n  lines")), one_line(KeyError())
        ('two lines', 'KeyError')
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if length is None or len(text) <= length else f"{text[: length - 4].rsplit(' ', 1)[0]} ..."
