"""Pictures and videos that are none, that grow when they are read, or that are damaged."""

import io
import random
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image, features

LARGE = 14_000  # pixels of a side: the square has more than are read


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """One bit for each pixel, all black; ``chunks`` stand before them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    pack = zlib.compressobj(9)
    rows = (
        b"".join(pack.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + pack.flush()
    )
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(**more: tuple[int, int]) -> bytes:
    """Of 64 x 64 grey pixels that are not there; ``more`` tags, as t322=(count, value)."""
    tags = {256: (1, 64), 257: (1, 64), 258: (1, 8), 259: (1, 5), 262: (1, 1), 277: (1, 1)}
    tags |= {int(key[1:]): value for key, value in more.items()}
    file = b"II*\0" + struct.pack("<IH", 8, len(tags))
    for tag, (count, value) in sorted(tags.items()):
        file += struct.pack("<HHII", tag, 4, count, value)
    return file + bytes(104)


def of_many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is there again and again."""
    content = io.BytesIO()
    Image.new("L", (64, 64)).save(content, "JPEG", progressive=True)
    whole = content.getvalue()
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + count * last + b"\xff\xd9"


def growing_gif() -> bytes:
    """Of 8 x 8 pixels, with a first picture of 65535 x 65535."""
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x44\x01\0;"
    return b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6) + frame


def tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as file:
        file.addfile(tarfile.TarInfo("a.png"))
    return content.getvalue()


# No pictures that are decoded in this process, whatever their names say.
OTHERS = {
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 64\n{} loop\n%%EOF\n",
    "postscript_of_dos": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, 60) + bytes(20)
    + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 64\n{} loop\n",
    "pdf": b"%PDF-1.4\n1 0 obj<</OpenAction<</S/Launch>>>>endobj\n%%EOF",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "wmf": b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<hhhhH", 0, 0, 80, 64, 72) + bytes(100),
    "emf": b"\1\0\0\0" + bytes(36) + b" EMF" + bytes(100),
    "fits": b"SIMPLE  =                    T" + b" " * 50 + b"END".ljust(80),
    "grib": b"GRIB" + bytes(100), "bufr": b"BUFR" + bytes(100),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "ole": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(1000),  # MIC, FPX
    "tar": tar(), "zip": b"PK\3\4" + bytes(100), "icon": b"\0\0\1\0\1\0" + bytes(100),
    "web_page": b"<html>404</html>", "playlist": b"#EXTM3U\nfile:///etc/passwd\n",
    "zeros": bytes(5000), "nothing": b"",
    "xbm": b"#define a_width 8\n#define a_height 8\nstatic char a_bits[] = {0x00};",
}  # fmt: skip
# Pictures by their heads, of which reading takes time or memory without an end.
BOMBS = {
    "large_png": lambda: png(LARGE, LARGE),
    "sides_of_31_bits": lambda: png(8, 8).replace(
        struct.pack(">II", 8, 8), struct.pack(">II", 2**31 - 1, 2**31 - 1)),
    "text_of_png": lambda: png(8, 8, (b"zTXt", b"k\0\0" + zlib.compress(bytes(5 * 10**7)))),
    "texts_of_png": lambda: png(
        8, 8, *[(b"zTXt", b"k%d\0\0" % n + zlib.compress(bytes(900_000))) for n in range(100)]),
    "profile_of_png": lambda: png(8, 8, (b"iCCP", b"k\0\0" + zlib.compress(bytes(5 * 10**7)))),
    "tile_of_tiff": lambda: tiff(t322=(1, 60_000), t323=(1, 60_000), t324=(1, 100), t325=(1, 9)),
    "tags_of_tiff": lambda: tiff(t273=(2**30, 8), t279=(2**30, 8), t700=(2**31, 8)),
    "scans_of_jpeg": lambda: of_many_scans(1000),
    "growing_gif": growing_gif,
    "digits_of_ppm": lambda: b"P3\n" + b"1" * 10**6,
    "comment_of_ppm": lambda: b"P6\n8 #" + b"x" * 10**6,
    "lines_of_bmp": lambda: b"BM" + struct.pack(
        "<IHHIIiiHHIIiiII", 0, 0, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
}  # fmt: skip
FORMATS = [
    name for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI",
                      "TGA", "TIFF", "WEBP")
    if name not in ("AVIF", "WEBP", "JPEG2000")
    or features.check({"JPEG2000": "jpg_2000"}.get(name, name.lower()))
]  # fmt: skip


def damaged(rng: random.Random) -> tuple[str, bytes]:
    """A picture of any format, with flipped bits, cut off, or with a part written over."""
    name = rng.choice(FORMATS)
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 255, (24, 32, 3), np.uint8)
    content = io.BytesIO()
    many = {"save_all": True, "append_images": [Image.fromarray(pixels[::-1])]}
    options = many if name in ("GIF", "TIFF", "WEBP", "PNG") and rng.random() < 0.3 else {}
    Image.fromarray(pixels).save(content, name, **options)
    data = bytearray(content.getvalue())
    kind = rng.choice(("flips", "cut", "head", "numbers"))
    if kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "numbers":
        at = rng.randrange(max(len(data) - 4, 1))
        data[at : at + 4] = rng.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4), b"\0\1\0\0"))
    else:
        reach = len(data) if kind == "flips" else min(len(data), 60)
        for _ in range(rng.randrange(1, 12)):
            data[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return f"{name}, {kind}", bytes(data)
