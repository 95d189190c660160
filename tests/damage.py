"""Small pictures and shards for the tests of damaged data."""

import io
import tarfile

from PIL import Image

from vlmkernels.data import load_pairs


def encoded(colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def member(name, content=b"", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, content


def tar(path, entries, mode="w", **options):
    """A shard of members, or of names with contents, opened."""
    with tarfile.open(path, mode) as shard:
        for entry in entries:
            info, content = entry if isinstance(entry[0], tarfile.TarInfo) else member(*entry)
            shard.addfile(info, io.BytesIO(content))
    return load_pairs(str(path), **options)


GOOD = [("good.png", encoded()), ("good.txt", b"fine")]
