"""Images of every kind that is taken, and uploads of every kind that is not."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from tests.serving.server import FORM, form


def encode(image: Image.Image, form_: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form_, **options)
    return file.getvalue()


def photo(width: int = 150, height: int = 100) -> Image.Image:
    """A smooth picture with an upper left corner that tells its orientation."""
    y, x = np.mgrid[:height, :width]
    planes = [255 * x / width, 255 * y / height, 127 + 127 * np.sin(x / 9) * np.cos(y / 7)]
    pixels = np.stack(planes, 2).astype(np.uint8)
    pixels[: height // 3, : width // 3] = (250, 20, 20)
    return Image.fromarray(pixels)


def good() -> dict[str, bytes]:
    colour = photo()
    clear = colour.convert("RGBA")
    clear.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 150).astype(np.uint8), (100, 1))))
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray((np.mgrid[:40, :60][1] * 1000).astype(np.uint16))
    still, other = colour.quantize(64), photo(150, 100).rotate(180).quantize(64)
    return {
        "grey.png": encode(colour.convert("L"), "PNG"),
        "colour.jpg": encode(colour, "JPEG", quality=90),
        "large.jpg": encode(photo(1500, 1000), "JPEG"),  # decoded at a fraction of its size
        "turned.jpg": encode(colour, "JPEG", exif=turned),
        "cmyk.jpg": encode(colour.convert("CMYK"), "JPEG"),
        "palette.png": encode(still, "PNG"),
        "clear.png": encode(clear, "PNG"),
        "deep.png": encode(deep, "PNG"),
        "bits.png": encode(colour.convert("1"), "PNG"),
        "moving.gif": encode(still, "GIF", save_all=True, append_images=[other]),
        "moving.png": encode(colour, "PNG", save_all=True, append_images=[photo().rotate(180)]),
        "moving.webp": encode(colour, "WEBP", save_all=True, append_images=[photo().rotate(180)]),
        "pages.tif": encode(colour, "TIFF", save_all=True, append_images=[photo(20, 20)]),
        "plain.bmp": encode(colour, "BMP"),
        "plain.ppm": encode(colour, "PPM"),
        "plain.jp2": encode(colour, "JPEG2000"),
    }


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *more: bytes, data: bytes = b"", bits: int = 8) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def bad() -> dict[str, tuple[bytes, str, int, str]]:
    """Body, Content-Type, the status of the answer and a part of it, by a name."""
    jpeg, colour = good()["colour.jpg"], photo()
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(5_000_000), 9))  # 5 kB that unpack to 5 MB
    bomb = png(20_000, 10_000, data=bytes(2_501 * 10_000), bits=1)  # whole and correct, in 25 kB
    gif = bytearray(good()["moving.gif"])
    gif[6:10] = struct.pack("<HH", 20_000, 10_000)
    both = form(jpeg)[0].removesuffix(f"--{FORM}--\r\n".encode()) + form(jpeg, "more")[0]
    kind = form(b"")[1]
    image = "image/*"
    return {
        "empty": (b"", image, 400, "0 bytes"),
        "empty field": (*form(b""), 400, "0 bytes"),
        "text": (b"this is no image", image, 415, "not an image"),
        "text in a form": (*form(b"this is no image"), 415, "not an image"),
        "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image/svg+xml", 415, "not an image"),
        "ICO": (encode(colour, "ICO"), image, 415, "not an image"),
        "EPS": (encode(colour, "EPS"), image, 415, "not an image"),  # Pillow would start Ghostscript
        "AVIF": (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(99), image, 415, "not an image"),
        "cut JPEG": (jpeg[: len(jpeg) // 2], image, 422, "cannot be read"),
        "cut PNG": (encode(colour, "PNG")[:3000], image, 422, "cannot be read"),
        "cut header": (encode(colour, "PNG")[:20], image, 422, "header is damaged"),
        "damaged PNG": (png(100, 100, data=b"short"), image, 422, "cannot be read"),
        "floats": (encode(Image.new("F", (9, 9)), "TIFF"), image, 422, "floating-point"),
        "bomb of 200 megapixels": (bomb, image, 413, "20000 x 10000 = 200,000,000 pixels; the limit is 4,000,000"),
        "bomb in a form": (*form(bomb), 413, "200,000,000 pixels"),
        "bomb of a header": (png(60_000, 60_000), image, 413, "3,600,000,000 pixels"),
        "bomb of a GIF": (bytes(gif), image, 413, "200,000,000 pixels"),
        "bomb of text": (png(9, 9, text, data=bytes(90)), image, 422, "header is damaged"),
        "no field": (*form(jpeg, "photo"), 400, "'image' is missing"),
        "text field": (*form(b"a", filename=None), 400, "holds text"),
        "two files": (both, kind, 400, "Too many files"),
        "no boundary": (form(jpeg)[0], "multipart/form-data", 400, "boundary"),
        "no form": (b"abc", kind, 400, "Invalid multipart"),
        "cut form": (form(jpeg)[0][:500], kind, 400, "'image' is missing"),
        "no type": (jpeg, "", 415, "multipart/form-data"),
        "JSON": (b"{}", "application/json", 415, "multipart/form-data"),
        "as curl --data-binary": (jpeg, "application/x-www-form-urlencoded", 415, "Content-Type: image"),
        "too large": (jpeg + bytes(2_000_000), image, 413, "2 MB"),
    }
