"""Hooks of MkDocs: reports become pages of the site, and the site links to the repository that it is built from.

`examples/NAME/RESULTS.md` becomes `results/NAME/index.md`, and `examples/NAME/README.md` becomes
`results/NAME/running.md`, with their pictures. Every figure is therefore stored once. A new page needs a line in the
`nav` of `mkdocs.yml`.
"""

import os
import re
import subprocess
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = {"RESULTS.md": "index.md", "README.md": "running.md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Set the repository link: from GitHub's variables in a workflow, elsewhere from the remote `origin`."""
    server, name = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
    url = f"{server}/{name}" if server and name else _origin(Path(config.config_file_path).parent)
    if url and not config.repo_url:
        config.repo_url, config.repo_name = url, url.rsplit("/", 1)[-1]
    return config


def _origin(folder: Path) -> str | None:
    command = ["git", "-C", str(folder), "remote", "get-url", "origin"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return None
    return found.removesuffix(".git") if found.startswith("https://") and "@" not in found else None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and the pictures in their folders."""
    examples = Path(config.config_file_path).parent / "examples"
    for name, page in PAGES.items():
        for source in sorted(examples.glob(f"*/{name}")):
            folder = source.parent
            files.append(File.generated(config, f"results/{folder.name}/{page}", abs_src_path=str(source)))
            for picture in sorted([*folder.glob("results/**/*.png"), *folder.glob("figures/*.png")]):
                uri = f"results/{folder.name}/{picture.relative_to(folder).as_posix()}"
                if uri not in files.src_uris:
                    files.append(File.generated(config, uri, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links between reports, which name files of the repository, to the pages that these become."""
    if not page.file.src_uri.startswith("results/"):
        return markdown
    return re.sub(r"(?<=\]\()([\w./-]*)(RESULTS\.md|README\.md)", lambda m: m[1] + PAGES[m[2]], markdown)
