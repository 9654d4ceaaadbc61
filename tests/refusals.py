"""How the `hgpo-trl` command refuses: status 2 and one message."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import pytest


@contextmanager
def refused(pattern: str) -> Iterator[None]:
    """What is within ends with status 2 and a message `hgpo-trl STAGE: error: ...`, in which the pattern is found."""
    with redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit) as caught:
        yield
    assert caught.value.code == 2
    found = re.search(r"^hgpo-trl [\w ]+: error: (.*)\Z", errors.getvalue(), re.DOTALL | re.MULTILINE)
    assert found, errors.getvalue()
    assert "Traceback" not in errors.getvalue()
    assert re.search(pattern, found[1]), found[1]
