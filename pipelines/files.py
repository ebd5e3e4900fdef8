"""Files of any kind."""

import hashlib
from pathlib import Path

_BLOCK = 1 << 20  # bytes in memory at once


def file_digest(path: Path, algorithm: str = "blake2b") -> str:
    """Hex, of a file's content. algorithm: a name that hashlib knows; of blake2b the 128-bit variant."""
    digest = hashlib.blake2b(digest_size=16) if algorithm == "blake2b" else hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
