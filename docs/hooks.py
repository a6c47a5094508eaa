"""What of the site is made when it is built: a start page of the README, and a recipe's keys of the schema."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from recipe_page import recipe_page  # beside this file

from pedyra.app.recipe import recipe_schema


def on_files(files: Files, config: Any) -> Files:
    """Add index.md and recipe.md."""
    readme = (Path(config.config_file_path).parent / "README.md").read_text(encoding="utf-8")
    start = re.sub(r"\]\((?!https?:|#)", "](../", readme).replace('src="docs/', 'src="')
    files.append(File.generated(config, "index.md", content=start))
    files.append(File.generated(config, "recipe.md", content=recipe_page(recipe_schema())))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The site holds the pages of docs: a link to another file of the repository leads to where that is kept."""
    up = "../" * (page.file.src_uri.count("/") + 1)  # from the page to the root of the repository
    return markdown.replace(f"]({up}docs/", "](").replace(f"]({up}", f"]({config.repo_url}/blob/main/")
