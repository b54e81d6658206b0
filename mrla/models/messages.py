"""Errors of others in messages of ours."""


def one_line(error: BaseException, length: int | None = None) -> str:
    r"""An error's message in one line, or its kind where it has none.

    Args:
        error: The error.
        length: After how many characters it is cut off; None for never.

    Example:
        >>> one_line(ValueError("two\n  lines")), one_line(KeyError())
        ('two lines', 'KeyError')
    """
    return (" ".join(str(error).split()) or type(error).__name__)[:length]
