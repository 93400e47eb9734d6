"""The .beton file format (FFCV, version 2), read and laid out by hand.

A file is a header, one descriptor per field, one metadata record per sample, pages of image bytes, and at the end the
table of what was stored where. Nothing in a file is believed before it is checked against the file's size, so a
truncated or foreign file is refused by name, and counts in it never decide how much memory is taken.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.system.errors import UserError

VERSION = 2
IMAGE_TYPE, LABEL_TYPE = 2, 1
JPG, RAW = 0, 1
SMALLEST_PAGE, LARGEST_PAGE = 1 << 21, 1 << 31

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", (16,)), ("arguments", "<u1", (1024,))])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

MEND = "delete it to have it written again, or point data.betons at another folder"


def sample_type(names: tuple[str, ...]) -> np.dtype:
    """Metadata record of one sample, fields in the order of `names` ("image" and "label")."""
    kinds = {"image": IMAGE, "label": np.dtype("<i8")}
    return np.dtype([(name, kinds[name]) for name in names], align=True)


@dataclass(frozen=True)
class Header:
    """What the first bytes of a file say, checked against its size. `names` are the fields in file order."""

    path: Path
    size: int
    samples: int
    page_size: int
    table: int
    names: tuple[str, ...]

    @property
    def metadata_start(self) -> int:
        """Offset of the first metadata record."""
        return HEADER.itemsize + len(self.names) * FIELD.itemsize

    @property
    def data_start(self) -> int:
        """Offset of the first page of image bytes."""
        return page_aligned(self.metadata_start + self.samples * sample_type(self.names).itemsize, self.page_size)


def page_aligned(offset: int, page_size: int) -> int:
    """`offset` rounded up to a whole page."""
    return -(-offset // page_size) * page_size


def read_header(path: str | Path) -> Header:
    """Read and check header, fields and extents. Raises UserError naming `path` for anything FFCV could not read."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            head = handle.read(HEADER.itemsize)
            fields = handle.read(2 * FIELD.itemsize)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {MEND}") from error
    if len(head) < HEADER.itemsize:
        raise UserError(f"{path}: not a .beton file ({size} bytes); {MEND}")
    header = np.frombuffer(head, HEADER)[0]
    if header["version"] != VERSION or header["num_fields"] == 0:
        raise UserError(f"{path}: not a .beton file of format {VERSION}; {MEND}")
    names = _field_names(path, int(header["num_fields"]), fields)
    checked = Header(
        path, size, int(header["num_samples"]), int(header["page_size"]), int(header["alloc_table_ptr"]), names
    )
    _check_extents(checked)
    return checked


def _field_names(path: Path, count: int, blob: bytes) -> tuple[str, ...]:
    found: list[tuple[str, int]] = []
    if count == 2 and len(blob) == 2 * FIELD.itemsize:
        for field in np.frombuffer(blob, FIELD):
            found.append((bytes(field["name"]).split(b"\0")[0].decode("ascii", "replace"), int(field["type_id"])))
    if sorted(found) != [("image", IMAGE_TYPE), ("label", LABEL_TYPE)]:
        listed = ", ".join(name for name, _ in found) or f"{count} fields"
        raise UserError(f"{path}: holds other fields ({listed}) than an RGB `image` and an integer `label`; {MEND}")
    return tuple(name for name, _ in found)


def _check_extents(header: Header) -> None:
    page = header.page_size
    if page & (page - 1) or not SMALLEST_PAGE <= page <= LARGEST_PAGE:
        raise UserError(f"{header.path}: not a .beton file (page size {page}); {MEND}")
    if header.samples == 0 or header.table == 0:
        raise UserError(f"{header.path}: unfinished or empty (no samples or no table of contents); {MEND}")
    if header.data_start > header.table or header.table + header.samples * ALLOCATION.itemsize != header.size:
        what = f"{header.size} bytes do not hold its {header.samples} samples"
        raise UserError(f"{header.path}: truncated or damaged ({what}); {MEND}")


def read_metadata(header: Header) -> np.ndarray:
    """Records of all samples, fields "image" and "label"; the header's extents were checked, so this is bounded."""
    return np.fromfile(header.path, sample_type(header.names), header.samples, offset=header.metadata_start)


def image_table(header: Header, metadata: np.ndarray) -> np.ndarray:
    """Where every image lies and what it is: int64 [N, 5], columns offset, bytes, height, width, mode (JPG or RAW).

    Raises UserError unless each lies whole inside the file, on one page, where the table of contents says.
    """
    table = np.fromfile(header.path, ALLOCATION, header.samples, offset=header.table)
    table = table[np.argsort(table["ptr"], kind="stable")]
    images = metadata["image"]
    pointers = images["data_ptr"]
    places = np.minimum(np.searchsorted(table["ptr"], pointers), header.samples - 1)
    sizes = table["size"][places]
    pixels = 3 * images["height"].astype(np.uint64) * images["width"].astype(np.uint64)
    shift = np.uint64(header.page_size.bit_length() - 1)
    room = np.uint64(header.table)
    inside = (pointers >= header.data_start) & (pointers < room) & (sizes > 0) & (sizes <= room - pointers)
    whole = inside & (table["ptr"][places] == pointers) & (pixels > 0) & (images["mode"] <= RAW)
    whole &= (images["mode"] != RAW) | (sizes == pixels)
    whole &= (pointers >> shift) == ((pointers + sizes - np.uint64(1)) >> shift)
    if not whole.all():
        raise UserError(f"{header.path}: damaged (image {int(np.argmin(whole))} is not where the table says); {MEND}")
    columns = (pointers, sizes, images["height"], images["width"], images["mode"])
    return np.stack([column.astype(np.int64) for column in columns], axis=1)


def digest(header: Header, metadata: np.ndarray) -> str:
    """Hex digest of a file nobody hashed: its header, labels, image sizes, pointers and length, not its pixels."""
    text = f"{header.size} {header.samples} {header.page_size} {header.table} {header.names}"
    return hashlib.sha256(text.encode() + metadata.tobytes()).hexdigest()


def front(samples: int, page_size: int, table: int, metadata: np.ndarray) -> bytes:
    """Header, field descriptors and metadata of a new file whose fields are image, label."""
    header = np.zeros(1, HEADER)
    header[0] = (VERSION, 2, page_size, samples, table)
    fields = np.zeros(2, FIELD)
    for field, name, kind in zip(fields, (b"image", b"label"), (IMAGE_TYPE, LABEL_TYPE), strict=True):
        field["type_id"] = kind
        field["name"][: len(name)] = np.frombuffer(name, np.uint8)
    return header.tobytes() + fields.tobytes() + metadata.tobytes()
