"""What of the site is made when it is built: a start page of the README, a recipe's keys of the schema, MathML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from recipe_page import recipe_page  # beside this file

from pedyra.app.recipe import recipe_schema


def on_files(files: Files, config: Any) -> Files:
    """Add index.md and recipe.md."""
    readme = (Path(config.config_file_path).parent / "README.md").read_text(encoding="utf-8")
    # The site holds no other file of the repository: of a link to one, its words alone are left.
    start = re.sub(r"\[([^\]]+)\]\((?!docs/|https?:|#)[^)]+\)", r"\1", readme).replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=start))
    files.append(File.generated(config, "recipe.md", content=recipe_page(recipe_schema())))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Equations as MathML, which browsers draw by themselves."""
    if page.file.src_uri != "paper.md":
        return markdown

    def displayed(match: re.Match[str]) -> str:
        formula, _, number = match[1].partition("\\tag{")
        number = f"<p align=right>({number.rstrip('} ')})</p>" if number else ""
        return f'<div class="formula">{convert(formula, display="block")}{number}</div>'

    markdown = re.sub(r"\$\$(.+?)\$\$", displayed, markdown, flags=re.DOTALL)
    return re.sub(r"\$([^$\n]+)\$", lambda match: convert(match[1]), markdown)
