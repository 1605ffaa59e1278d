"""What is known of images: a small file for each, so that a list needs neither an engine nor a walk over the disk."""

import dataclasses
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.images.image import Image
from warmcell.sandbox.models import ImageInfo
from warmcell.sandbox.paths import private_directory

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """An image that was built."""

    info: ImageInfo
    image: Image


class Records:
    """One file each, whose time is when the image was used last. `load`, `put`, `touch` and `unlink` block."""

    def __init__(self, directory: Path) -> None:
        """Know nothing yet; `load` reads."""
        self._directory = directory
        self._records: dict[tuple[str, str], Record] = {}
        self.unreadable = 0
        """Files that are there but broken, or of another version."""

    @property
    def all(self) -> Sequence[Record]:
        """The one that was used last first."""
        return sorted(self._records.values(), key=lambda record: record.info.last_used_at, reverse=True)

    def get(self, builder: str, digest: str) -> Record | None:
        """That of a builder's image."""
        return self._records.get((builder, digest))

    def find(self, ref: str, builder: str | None = None) -> Sequence[Record]:
        """Those that are called so: by name, by digest or its beginning, or as their backend calls them."""
        found = [record for record in self.all if builder in (None, record.info.builder)]
        for fits in (
            lambda info: ref in info.names or ref in (info.digest, info.reference),
            lambda info: len(ref) >= 6 and info.digest.removeprefix("sha256:").startswith(ref),
        ):
            if named := [record for record in found if fits(record.info)]:
                return named
        return ()

    def load(self) -> None:
        """Read them. What cannot be read is none: the image is found again when it is asked for."""
        private_directory(self._directory)
        self._records.clear()
        self.unreadable = 0
        for path in self._directory.iterdir():
            try:
                data = json.loads(path.read_bytes())
                if data["format"] != FORMAT:
                    self.unreadable += 1
                    continue
                info = ImageInfo.from_json(data["info"])
                record = Record(info=info, image=Image.from_json(data["image"]))
                used_at = path.stat().st_mtime
            except (OSError, ValueError, KeyError, TypeError, InvalidRequestError):
                if path.name.startswith("."):
                    path.unlink(missing_ok=True)
                else:
                    self.unreadable += 1
                continue
            self._keep(dataclasses.replace(record, info=dataclasses.replace(info, last_used_at=used_at)))

    def put(self, record: Record) -> None:
        """Write one, instead of what was known before."""
        path = self._path(record.info)
        new = path.with_name(f".{secrets.token_hex(6)}")
        data: dict[str, Any] = {"format": FORMAT, "info": record.info.to_json(), "image": record.image.to_json()}
        with open(new, "x") as file:
            json.dump(data, file)
            file.flush()
            os.fsync(file.fileno())
        os.utime(new, (record.info.last_used_at,) * 2)
        os.rename(new, path)
        self._keep(record)

    def touch(self, record: Record, when: float) -> None:
        """Write down when it was used last."""
        os.utime(self._path(record.info), (when, when))

    def used(self, builder: str, digest: str, when: float) -> None:
        """Know that, of what is known of it now."""
        if (record := self.get(builder, digest)) is not None:
            self._keep(dataclasses.replace(record, info=dataclasses.replace(record.info, last_used_at=when)))

    def unlink(self, record: Record) -> None:
        """Remove its file: the next keeper knows nothing of it."""
        self._path(record.info).unlink(missing_ok=True)

    def forget(self, record: Record) -> None:
        """Nor does this one."""
        self._records.pop((record.info.builder, record.info.digest), None)

    def _keep(self, record: Record) -> None:
        self._records[record.info.builder, record.info.digest] = record

    def _path(self, info: ImageInfo) -> Path:
        return self._directory / f"{info.digest.removeprefix('sha256:')[:32]}-{info.builder}.json"
