"""mkdocs hook: adds the Markdown files that stand outside docs/, and adapts their links."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
CARD = "grape_jax/retrieval/assets/retriever/README.md"
# Address in the site -> file in the repository.
OUTSIDE = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "records/retriever.md": CARD,
} | {
    f"records/{path.name}": f"benchmarks/{path.name}"
    for kind in ("*.md", "*.png")
    for path in (ROOT / "benchmarks").glob(kind)
}
# In links only: what GitHub resolves from the file's own folder -> what the site resolves.
LINKS = (
    (r"\]\(\.\./benchmarks/", "](records/"),
    (r"\]\(\.\./" + re.escape(CARD), "](records/retriever.md"),
    (r"\]\(\.\./docs/", "](../"),
    (r"\]\(docs/", "]("),
    (r"\]\(CHANGELOG\.md", "](changelog.md"),
)


def on_files(files, config):
    for address, path in OUTSIDE.items():
        files.append(File.generated(config, address, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, **_):
    for pattern, replacement in LINKS:
        markdown = re.sub(pattern, replacement, markdown)
    return markdown
