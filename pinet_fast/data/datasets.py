"""Downloads public logs: with a checksum where one is known, resumed, and under their licence."""

from __future__ import annotations

import hashlib
import http.client
import io
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from pinet_fast._atomic import replacing
from pinet_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_BLOCK = 1 << 20
_TIMEOUT_S = 60
_BROKEN = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)
_MOVIELENS = (
    "GroupLens: research use; cite Harper & Konstan 2015 (The MovieLens Datasets); no "
    "redistribution without permission, no commercial use"
)
_AMAZON = (
    "Amazon reviews collected by J. McAuley (UCSD), 1996-2014: research use; cite McAuley et al. "
    "2015 and He & McAuley 2016"
)
_LENS = "https://files.grouplens.org/datasets/movielens"
_HUB = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class Dataset:
    """A public log.

    Attributes:
        url: Where it is.
        sha256: Of the download; None where none is known that could be trusted. Then that of the
            first download is recorded beside it, and later ones must have it too.
        licence: What whoever downloads it agrees to.
        columns: Columns of its text file, in order.
        delimiter: Between them.
        member: File inside the ZIP; empty for a download that is the text file.
        has_header: Whether the first line is none of the data.
    """

    url: str
    sha256: str | None
    licence: str
    columns: tuple[str, ...] = ("user", "item")
    delimiter: str = " "
    member: str = ""
    has_header: bool = False


_RATINGS = ("user", "item", "rating", "timestamp")
DATASETS = {
    "ml-100k": Dataset(f"{_LENS}/ml-100k.zip", None, _MOVIELENS, _RATINGS, "\t", "ml-100k/u.data"),
    "ml-1m": Dataset(f"{_LENS}/ml-1m.zip", None, _MOVIELENS, _RATINGS, "::", "ml-1m/ratings.dat"),
    "ml-20m": Dataset(
        f"{_LENS}/ml-20m.zip", None, _MOVIELENS, _RATINGS, ",", "ml-20m/ratings.csv", True
    ),
    "ml-25m": Dataset(
        f"{_LENS}/ml-25m.zip", None, _MOVIELENS, _RATINGS, ",", "ml-25m/ratings.csv", True
    ),
    "amazon-beauty-sasrec": Dataset(
        f"{_HUB}/kang205/SASRec/master/data/Beauty.txt",
        "3cd3d56cee682f5118f22d0443d5d27116075c719ec83bfdfa3e45df33a95e12", _AMAZON,
    ),
    "amazon-beauty-bert4rec": Dataset(
        f"{_HUB}/FeiSun/BERT4Rec/master/data/beauty.txt",
        "f480b7a7403852342ffd8f9809bb30697dd669be31813d0e204b698fec86ef49", _AMAZON,
    ),
}  # fmt: skip
"""Public logs by name."""


@dataclass(frozen=True)
class Fetched:
    """A log that was downloaded.

    Attributes:
        log: The Parquet log, ready for ``prepare``.
        download: The file as it came.
        sha256: Its checksum.
        known: What it was compared with: ``"pinned"``, the one in ``DATASETS``; ``"recorded"``, the
            one of the first download; ``"first"``, nothing: it was recorded now.
    """

    log: Path
    download: Path
    sha256: str
    known: Literal["pinned", "recorded", "first"]

    @property
    def pinned(self) -> bool:
        """Return whether it is the checksum in ``DATASETS``."""
        return self.known == "pinned"


def fetch(
    name: str,
    folder: Path,
    *,
    accept_licence: bool,
    on_progress: Callable[[float, str], None] | None = None,
) -> Fetched:
    """Download a public log and write it as Parquet.

    A download that breaks off is kept as ``.part`` and goes on at the next call. One that is
    there, and whole, is not downloaded again. Where no checksum is pinned, the first download is
    trusted: its checksum is written beside it as ``.sha256``, and another content is refused later.

    Args:
        name: A key of ``DATASETS``.
        folder: Where to put it, made if need be.
        accept_licence: Must be True: read ``DATASETS[name].licence`` first.
        on_progress: Called with the share that is done and what is being done.

    Returns:
        Where the log is, and what is known of it.

    Raises:
        ConfigError: Unknown name, or the licence is not accepted.
        DataError: The download failed, is not the file expected, or cannot be written.
    """
    if name not in DATASETS:
        raise ConfigError(f"fetch {name}: expected one of {', '.join(DATASETS)}")
    wanted = DATASETS[name]
    if not accept_licence:
        trust = "" if wanted.sha256 else "; no checksum is pinned, the first download is trusted"
        raise ConfigError(
            f"fetch {name}: its licence is not accepted ({wanted.licence}){trust}; "
            "if you agree, add --accept-licence"
        )
    report = on_progress or (lambda share, text: None)
    download = folder / f"{name}-{wanted.url.rsplit('/', 1)[-1]}"
    log = folder / f"{name}.parquet"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record = download.with_name(download.name + ".sha256")
        expected = wanted.sha256 or _recorded(record)
        is_new = not download.is_file()
        if is_new:
            part = download.with_name(download.name + ".part")
            _download(name, wanted.url, part, report)
            _checked(name, wanted, part, record, expected)
            part.replace(download)
        digest = _checked(name, wanted, download, record, expected)
        if is_new or not log.is_file():
            report(1.0, "writing the log")
            _convert(wanted, download, log)
        if expected is None:
            with replacing(record) as file:  # in the format of sha256sum
                file.write(f"{digest}  {download.name}\n".encode())
    except (zipfile.BadZipFile, KeyError, pa.ArrowException) as error:
        download.unlink(missing_ok=True)
        raise DataError(
            f"fetch {name}: {wanted.url} is not the file expected ({error}); it was deleted: "
            "fetch it again"
        ) from error
    except OSError as error:
        raise DataError(
            f"fetch {name}: cannot write to {folder} ({error.strerror or error}); choose another "
            "folder with --dir"
        ) from error
    if wanted.sha256 is not None:
        return Fetched(log, download, digest, "pinned")
    return Fetched(log, download, digest, "first" if expected is None else "recorded")


def _download(name: str, url: str, part: Path, report: Callable[[float, str], None]) -> None:
    start = part.stat().st_size if part.is_file() else 0
    tag = part.with_name(part.name + ".etag")
    request = urllib.request.Request(url)
    if start:
        request.add_header("Range", f"bytes={start}-")
        if tag.is_file():  # another version of the file must not be appended to this one
            request.add_header("If-Range", tag.read_text())
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            # 200 is the whole file: the server cannot resume, or the file changed.
            start = start if answer.status == 206 else 0
            tag.unlink(missing_ok=True)
            if etag := answer.headers.get("ETag"):
                tag.write_text(etag)
            length = answer.headers.get("Content-Length")
            total = None if length is None else start + int(length)
            with part.open("ab" if start else "wb") as file:
                done = start
                while block := answer.read(_BLOCK):
                    file.write(block)
                    done += len(block)
                    report(done / total if total else 0.0, f"{name}: {done / 1e6:,.1f} MB")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:  # there is no more: whole, or to be refused below
            return
        raise DataError(
            f"fetch {name}: {url} answered {error.code} {error.reason}; try later, or download it "
            "by hand"
        ) from error
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        TimeoutError,
        ConnectionError,
    ) as error:
        raise _broken(name, url, part, str(error)) from error
    if total is not None and done < total:
        raise _broken(name, url, part, f"{done:,} of {total:,} bytes came")
    tag.unlink(missing_ok=True)


def _broken(name: str, url: str, part: Path, why: str) -> DataError:
    kept = part.stat().st_size if part.is_file() else 0
    return DataError(
        f"fetch {name}: {url} broke off ({why}); call it again to go on from byte {kept:,}"
    )


def _recorded(record: Path) -> str | None:
    if not record.is_file():
        return None
    words = record.read_text(errors="replace").split()
    return words[0] if words else ""


def _checked(name: str, wanted: Dataset, path: Path, record: Path, expected: str | None) -> str:
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if expected is None or got == expected:
        return got
    path.unlink()
    if wanted.sha256 is not None:
        raise DataError(
            f"fetch {name}: expected sha256 {expected}, got {got} from {wanted.url}; the file "
            "was deleted: fetch it again"
        )
    raise DataError(
        f"fetch {name}: expected sha256 {expected}, that of the first download, got {got} from "
        f"{wanted.url}; the file was deleted: fetch it again, or delete {record} to trust the "
        "new content"
    )


def _convert(wanted: Dataset, download: Path, log: Path) -> None:
    if wanted.member:
        with zipfile.ZipFile(download) as archive:
            text = archive.read(wanted.member)
    else:
        text = download.read_bytes()
    delimiter = wanted.delimiter
    if len(delimiter) > 1:  # Arrow splits at one character only
        text, delimiter = text.replace(delimiter.encode(), b"\t"), "\t"
    table = pyarrow.csv.read_csv(
        io.BytesIO(text),
        read_options=pyarrow.csv.ReadOptions(
            column_names=wanted.columns, skip_rows=int(wanted.has_header)
        ),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter),
    )
    with replacing(log) as file:
        pyarrow.parquet.write_table(table, file)
