"""Files on the disk: the names in a folder, and damage."""

# What git leaves in the place of a large file that was not downloaded.
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5\n"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path, place=None, bit=3):
    """Change a bit of the byte at a place, in the middle by default."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1 << bit
    path.write_bytes(content)
