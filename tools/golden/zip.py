"""Zip archives that the crate `zip` cannot write: crates/data/tests/golden/zip.json.

    python tools/golden/zip.py > crates/data/tests/golden/zip.json

Each holds a.png, a grey image of 30 x 20 whose value at (x, y) is (7 x + 5 y) % 256.
"""

import io
import json
import zipfile

from PIL import Image

image = Image.frombytes("L", (30, 20), bytes((7 * x + 5 * y) % 256 for y in range(20) for x in range(30)))
png = io.BytesIO()
image.save(png, "PNG")


def packed(streamed, method):
    out = io.BytesIO()

    class Stream(io.RawIOBase):
        """A pipe: sizes stand behind the entry, not before it."""

        def writable(self):
            return True

        def write(self, data):
            return out.write(data)

    with zipfile.ZipFile(Stream() if streamed else out, "w", method) as archive:
        archive.writestr(zipfile.ZipInfo("a.png", (2024, 1, 1, 0, 0, 0)), png.getvalue(), method)
    return out.getvalue().hex()


print(
    json.dumps(
        {
            "lzma": packed(False, zipfile.ZIP_LZMA),
            "streamed lzma": packed(True, zipfile.ZIP_LZMA),
            "streamed bzip2": packed(True, zipfile.ZIP_BZIP2),
            "streamed deflate": packed(True, zipfile.ZIP_DEFLATED),
        },
        indent=1,
    )
)
