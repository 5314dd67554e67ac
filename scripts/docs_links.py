"""mkdocs hook: links from docs/ to other files of the repository become their paths.

On the site there are only the pages. A link to a file that does not exist stops the build.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page, **_: object) -> str:
    def path_of(link: re.Match[str]) -> str:
        text, path = link[1], link[2]
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_uri} links to {path}, which does not exist")
        return f"`{path}`" if path.endswith(text.strip("`")) else f"{text} (`{path}`)"

    return LINK.sub(path_of, markdown)
