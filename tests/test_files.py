"""Digests of listings: what they depend on, and what they do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from sis_lightning.files import digest_listing


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """Two folders with a file of one name, more than are read, and names that sort differently by parts."""
    for name, size in {"a/x": 1, "b/x": 2, "a.b/x": 3, "a b/x": 4}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"." * size)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_listing_is_the_same_wherever_it_is_and_in_any_order(tree):
    whole = digest_listing(below(tree), tree)
    assert digest_listing(below(Path()), Path()) == whole
    assert digest_listing(below(tree)[::-1], tree) == whole
    assert digest_listing(map(str, below(tree)), tree) == whole
    moved = tree.rename(tree.with_name("moved"))
    assert digest_listing(below(moved), moved) == whole


@pytest.mark.parametrize("relative", [False, True])
def test_files_that_change_places_are_another_listing(tree, relative):
    root = Path() if relative else tree
    before = digest_listing(below(root), root)
    (tree / "a/x").rename(tree / "c")
    (tree / "b/x").rename(tree / "a/x")
    (tree / "c").rename(tree / "b/x")
    assert digest_listing(below(root), root) != before
