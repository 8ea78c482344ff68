"""Docstrings name classes as Sphinx does, with a role; Markdown would show it: take it away."""

import re

_ROLE = re.compile(r":(?:class|func|meth|mod):(<code>)~?")


def on_page_content(html: str, **kwargs) -> str:
    return _ROLE.sub(r"\1", html)
