"""The documentation builds in strict mode, explains every public name, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import childtune_kernels

pytest.importorskip("mkdocstrings")

ROOT = Path(__file__).parent.parent
ELSEWHERE = {"__version__"}


def build(configuration: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(configuration)]
    return subprocess.run(
        [*command, "--site-dir", str(site)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    finished = build(ROOT / "mkdocs.yml", folder)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder


def test_every_public_name_and_member_is_in_the_reference(site: Path) -> None:
    pages = "".join(page.read_text("utf-8") for page in (site / "reference").glob("*.html"))
    for name in set(childtune_kernels.__all__) - ELSEWHERE:
        value = getattr(childtune_kernels, name)
        wanted = [f"childtune_kernels.{name}"]
        if isinstance(value, type):
            members = [member for member in vars(value) if not member.startswith("_")]
            wanted += [f"childtune_kernels.{name}.{member}" for member in members]
        for each in wanted:
            assert f'id="{each}"' in pages, each


def test_no_directive_is_left_and_tables_are_tables(site: Path) -> None:
    page = (site / "reference" / "optimizer.html").read_text("utf-8")
    assert ":::" not in page
    assert re.search(r"<td>\s*<code>reserve_p</code>", page)


def test_every_parameter_has_a_row_of_its_own(site: Path) -> None:
    first_cell = r'<tr class="doc-section-item">\s*<td>\s*<code>([^<]+)</code>'
    for path in (site / "reference").glob("*.html"):
        names = re.findall(first_cell, path.read_text("utf-8"))
        assert not [name for name in names if not re.fullmatch(r"\*{0,2}\w+", name)], path.name
    page = (site / "reference" / "optimizer.html").read_text("utf-8")
    own = page[page.index('id="childtune_kernels.ChildTuningAdamW"') :]
    row = re.search(r"<td>\s*<code>betas</code>.*?</tr>", own, re.DOTALL)
    assert row is not None
    assert "0.999" in row[0]  # found in the signature: a default, and not "required"


def test_links_out_of_the_folder_lead_to_pages(site: Path) -> None:
    guide = (site / "guide.html").read_text("utf-8")
    assert 'href="SPEC.html"' in guide
    assert 'href="index.html"' in guide
    home = (site / "index.html").read_text("utf-8")
    assert 'href="performance.html"' in home
    assert 'href="docs/' not in home


@pytest.mark.parametrize("broken", ["[there](nowhere.md)", "::: childtune_kernels.Nothing"])
def test_what_leads_nowhere_fails(tmp_path: Path, broken: str) -> None:
    """A site of one page with the project's own settings."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(f"# Page\n\n{broken}\n", "utf-8")
    settings = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[0]
    for own in (
        "hooks:\n  - docs/site_hooks.py\n",
        "paths: [.]",
        "extensions: [docs/parameter_rows.py]",
    ):
        settings = settings.replace(own, "")
    (tmp_path / "mkdocs.yml").write_text(settings, "utf-8")
    finished = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert finished.returncode != 0
    assert re.search(r"nowhere\.md|Nothing", finished.stdout + finished.stderr)
