"""Open array files (.npy) without pickle, and check their headers."""

from pathlib import Path
from tokenize import TokenError
from typing import Literal

import numpy as np

from common.reading import require_regular, shortened

# Exceptions that NumPy raises for damaged headers. SyntaxError to RecursionError come from its parser of the header.
DAMAGE = (ValueError, TypeError, OverflowError, EOFError, OSError, SyntaxError, TokenError, MemoryError, RecursionError)


def open_array(path: Path) -> np.ndarray:
    """Return the array of an .npy file, mapped into memory; its values are read when they are used.

    Pickles and archives are never opened. Raises OSError if the file cannot be read or is not a regular file. Raises
    ValueError if it is not a valid .npy file of numbers.
    """
    require_regular(path)
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(file)
            offset = file.tell()
    except DAMAGE as error:
        # NumPy's message may advise the user to load the file unsafely.
        why = "Its header is damaged" if "pickle" in str(error) else shortened(str(error)) or type(error).__name__
        raise ValueError(f"It is not an .npy file. {why}") from error
    if dtype.hasobject:
        raise ValueError("It contains pickled Python objects, which are never loaded")
    num_bytes = dtype.itemsize
    for length in shape:
        num_bytes *= length
    found = path.stat().st_size - offset
    if min(shape, default=0) < 0 or num_bytes != found:
        raise ValueError(f"An array of shape {shortened(str(shape))} and type {dtype} has {shortened(str(num_bytes))} "
                         f"bytes, but the file has {found} bytes after its header")
    order: Literal["F", "C"] = "F" if fortran_order else "C"
    if not num_bytes:  # an empty file cannot be mapped
        return np.empty(shape, dtype=dtype, order=order)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order=order)
