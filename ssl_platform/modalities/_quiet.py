"""MP3 without the notes that libmpg123 writes to the error stream: libsndfile, which calls it, has no switch for them."""

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_NOTE = re.compile(rb"(\[[^\]]*libmpg123|Note: |Warning: |\s*$)")
_STDERR = 2


@contextmanager
def without_decoder_notes() -> Iterator[None]:
    """Holds back what this process writes to its error stream, and then writes all but the decoder's notes.

    The stream belongs to the whole process, so two threads cannot both turn it: in any but the main one, nothing is held
    back. Notes name no file; the error that is raised for a damaged one does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        held, real = tempfile.TemporaryFile(), os.dup(_STDERR)  # noqa: SIM115 (closed below)
    except OSError:  # no room, or no error stream, as in a daemon: no reason to leave a file out
        yield
        return
    with held:
        os.dup2(held.fileno(), _STDERR)
        try:
            yield
        finally:
            os.dup2(real, _STDERR)
            os.close(real)
            held.seek(0)
            if others := b"".join(line for line in held if not _NOTE.match(line)):
                os.write(_STDERR, others)
