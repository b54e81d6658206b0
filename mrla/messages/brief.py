"""Results as an interpreter and a notebook show them: what they say in a few words, not all that they hold."""

from collections.abc import Mapping
from html import escape

_LONGEST, _LONGEST_TEXT = 480, 160


class Brief:
    """A result whose `repr` is short and which a notebook shows as a small table.

    A dataclass of it is made with ``repr=False``.
    """

    def _brief(self) -> Mapping[str, object]:
        """What it says, by name, the most important first."""
        raise NotImplementedError

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={_shortened(repr(value), _LONGEST_TEXT)}" for name, value in self._brief().items())
        return f"{type(self).__name__}({_shortened(said, _LONGEST)})"

    def _repr_html_(self) -> str:
        left = 'style="text-align: left"'
        said = self._brief().items()
        rows = (f"<tr><th {left}>{escape(name)}</th><td {left}>{escape(str(value))}</td></tr>" for name, value in said)
        return f"<table><caption>{type(self).__name__}</caption>{''.join(rows)}</table>"


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
