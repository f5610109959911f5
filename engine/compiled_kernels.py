"""Where numba keeps the kernels that it compiled, so that only the first start on a machine waits for them."""

from __future__ import annotations

from pathlib import Path

import numba
import xxhash

from headrace import kernels
from headrace.models.gguf_folder import cache_folder


def keep_compiled() -> bool:
    """Call before the first kernel is compiled; returns whether there are compiled ones already.

    The folder's name changes with the kernels' sources: numba looks only at the file of the function that is called.
    Without a folder of its own numba would write beside the sources, and fail where it may not.
    """
    digest = xxhash.xxh3_64()
    for path in sorted(Path(kernels.__path__[0]).glob("*.py")):
        digest.update(path.read_bytes())
    folder = cache_folder() / ".kernels" / digest.hexdigest()
    numba.config.CACHE_DIR = str(folder)
    return folder.is_dir()
