"""What an interpreter and a notebook show of a result."""

from dataclasses import dataclass

from mrla.messages.brief import Brief


@dataclass(frozen=True, repr=False)
class Found(Brief):
    text: str
    rows: list

    def _brief(self):
        return {"text": self.text, "rows": len(self.rows), **{f"row {at}": row for at, row in enumerate(self.rows)}}


def test_it_is_short_whatever_a_result_holds():
    assert repr(Found("good", [])) == "Found(text='good', rows=0)"
    long = repr(Found("x" * 1000, ["y" * 100] * 100))
    assert len(long) < 500
    assert long.startswith("Found(text='xxx")


def test_a_notebook_gets_a_table_in_which_names_are_text():
    assert Found("<b>", [1])._repr_html_() == (
        '<table><caption>Found</caption><tr><th style="text-align: left">text</th>'
        '<td style="text-align: left">&lt;b&gt;</td></tr><tr><th style="text-align: left">rows</th>'
        '<td style="text-align: left">1</td></tr><tr><th style="text-align: left">row 0</th>'
        '<td style="text-align: left">1</td></tr></table>'
    )
