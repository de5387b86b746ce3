"""Digests: recomputable by ten lines of anyone's code, and sensitive to every byte and name."""

import hashlib
import json
from pathlib import Path

import pytest

from finetune_trainer.digest import File, files_of, hash_tree, manifest_of, short, tree_digest


def test_a_digest_can_be_recomputed_by_hand(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/ä.bin").write_bytes(b"two")
    (tmp_path / "a.txt").write_bytes(b"one")
    (tmp_path / "manifest.json").write_bytes(b"not part of it")
    files = [
        {"path": path, "sha256": hashlib.sha256((tmp_path / path).read_bytes()).hexdigest(), "size": 3}
        for path in ("a.txt", "sub/ä.bin")
    ]
    by_hand = hashlib.sha256(json.dumps(files, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())
    assert tree_digest(hash_tree(tmp_path)) == f"sha256:{by_hand.hexdigest()}"


def test_order_does_not_matter_but_names_sizes_and_content_do() -> None:
    one, two = File("a", "00", 1), File("b", "11", 2)
    digest = tree_digest([one, two])
    assert tree_digest([two, one]) == digest
    for changed in (two._replace(path="c"), two._replace(sha256="12"), two._replace(size=3)):
        assert tree_digest([one, changed]) != digest


def test_a_manifest_that_does_not_hash_to_its_digest_is_refused() -> None:
    manifest = manifest_of([File("a", "00", 1)], rank=16)
    assert files_of(manifest) == [File("a", "00", 1)]
    manifest["files"][0]["sha256"] = "01"
    with pytest.raises(ValueError, match="its files hash to"):
        files_of(manifest)


@pytest.mark.parametrize("path", ["/etc/passwd", "../up", "a/../../b"])
def test_a_manifest_cannot_name_files_outside_its_folder(path: str) -> None:
    with pytest.raises(ValueError, match="outside its folder"):
        files_of(manifest_of([File(path, "00", 1)]))


def test_the_short_digest_is_twelve_digits() -> None:
    assert short("sha256:0123456789abcdef") == "0123456789ab"
