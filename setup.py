"""What pyproject.toml cannot say: the README as a package index shows it, where a link to a file leads nowhere."""

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = "https://github.com/pedyra/pedyra"


def for_an_index(readme: str) -> str:
    """The same text, with links to files of the repository, and its images, by their addresses there."""
    readme = re.sub(r"(!\[[^\]]*\]\(|src=\")(?!https?:)([^)\s\"]+)", rf"\1{REPOSITORY}/raw/main/\2", readme)
    return re.sub(r"(\]\()(?!https?:|#)([^)\s]+)", rf"\1{REPOSITORY}/blob/main/\2", readme)


if __name__ == "__main__":
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    setup(long_description=for_an_index(text), long_description_content_type="text/markdown")
