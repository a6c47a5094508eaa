"""Pages of the site that are made when it is built: the start page from the README, a recipe's keys from the schema."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from pedyra.recipe import recipe_schema
from pedyra.recipe_page import recipe_page


def on_files(files: Files, config: Any) -> Files:
    """Add index.md and recipe.md."""
    readme = (Path(config.config_file_path).parent / "README.md").read_text(encoding="utf-8")
    pages = re.sub(r"\[([^]]+)\]\((?!docs/|http)[^)]+\)", r"\1", readme).replace(
        "](docs/", "]("
    )  # the site has docs/ alone
    files.append(File.generated(config, "index.md", content=pages))
    files.append(File.generated(config, "recipe.md", content=recipe_page(recipe_schema())))
    return files
