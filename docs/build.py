"""Makes the site in docs/_build/html: warnings are errors, and every link inside it must lead somewhere.

    pip install -e '.[docs]'
    python docs/build.py [--no-notebooks] [--external]

Notebooks run, those whose cells have not changed since they last ran come from docs/_build/.jupyter_cache.
`--no-notebooks` leaves them as they are written, without outputs. `--external` also asks for every address outside.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

DOCS = Path(__file__).resolve().parent
SITE = DOCS / "_build" / "html"


class _Page(HTMLParser):
    """The links of a page, and the names that links can lead to."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.names.update(value for name, value in values.items() if name in ("id", "name"))
        self.links.extend(value for name, value in values.items() if name in ("href", "src"))


def broken_links(site: Path) -> Iterator[str]:
    """Every link inside a site that leads to no file, or to no such place in it.

    Args:
        site: The folder of its pages.

    Yields:
        The page and the link.
    """
    pages = {path: _Page(path.read_text()) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts}
    for path, page in pages.items():
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                yield f"{path.relative_to(site)}: {link}"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].names:
                yield f"{path.relative_to(site)}: {link}"


def build(notebooks: bool = True, builder: str = "html") -> int:
    """Runs Sphinx; its exit code."""
    environment = {**os.environ, "MRLA_NOTEBOOKS": "cache" if notebooks else "off"}
    place = DOCS / "_build" / builder
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        builder,
        "-d",
        DOCS / "_build" / "read",
    ]
    return subprocess.run([*command, DOCS, place], env=environment, check=False).returncode


def main() -> int:
    """Builds the site and looks at its links."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-notebooks", action="store_true", help="leave notebooks without outputs")
    parser.add_argument("--external", action="store_true", help="also ask for addresses outside")
    options = parser.parse_args()
    code = build(notebooks=not options.no_notebooks)
    broken = list(broken_links(SITE))
    print("\n".join(f"broken link: {link}" for link in broken), file=sys.stderr)
    if options.external:
        code = build(notebooks=not options.no_notebooks, builder="linkcheck") or code
    print(f"{SITE}/index.html")
    return code or bool(broken)


if __name__ == "__main__":
    sys.exit(main())
