"""A reader of pages that knows nothing of the writer, and finds what no report may hold."""

import re
from html.parser import HTMLParser

import pytest

VOID = {"meta", "img", "br", "hr", "link", "input"}


class PageReader(HTMLParser):
    """Reads a page; ``problems`` says what is wrong with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self._open: list[str] = []
        self._style = ""
        self.feed(text)
        self.close()
        self._finish(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")

    def handle_data(self, data):
        if self._open and self._open[-1] == "style":
            self._style += data
        elif data.strip():
            self.texts.append(data)

    def _finish(self, text: str) -> None:
        self.problems += [f"<{tag}> is open" for tag in self._open]
        ids = [attrs["id"] for _, attrs in self.tags if "id" in attrs]
        self.problems += [
            f"id {name} twice" for name in sorted({i for i in ids if ids.count(i) > 1})
        ]
        for tag, attrs in self.tags:
            if tag in ("script", "iframe", "object", "embed", "link", "form", "base"):
                self.problems.append(f"<{tag}>")
            for key, value in attrs.items():
                target = value or ""
                if key.startswith("on"):
                    self.problems.append(f"{tag} has {key}")
                if key in ("href", "src") and not target.startswith(("#", "data:image/")):
                    self.problems.append(f"{tag} loads {target}")
                refs = re.findall(r"url\(#([^)]+)\)", target)
                refs += [target[1:]] if key == "href" and target.startswith("#") else []
                self.problems += [f"nothing is called {name}" for name in refs if name not in ids]
        if re.search(r"@import|url\(", self._style):
            self.problems.append("the style loads something")


@pytest.fixture(scope="session")
def read_page():
    return PageReader
