"""Small pictures and archives of them, as tests make them."""

import io
import tarfile

from PIL import Image


def png():
    stream = io.BytesIO()
    Image.new("RGB", (12, 8)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
