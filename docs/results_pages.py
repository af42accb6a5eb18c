"""Hook of MkDocs: the pages that lie beside what they report on become pages of the site, with their pictures.

`examples/NAME/RESULTS.md` is `results/NAME/index.md`, and `examples/NAME/README.md` is `results/NAME/running.md`, so
that every figure is there once. A new one needs a line in the `nav` of `mkdocs.yml`.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = {"RESULTS.md": "index.md", "README.md": "running.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and the pictures below their folders."""
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
