"""Files as disks and disturbed writers leave them."""

from pathlib import Path


def flip(file: Path) -> None:
    """Turns over one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path, count: int = 1) -> None:
    """Takes so many bytes from the end of a file."""
    file.write_bytes(file.read_bytes()[:-count])
