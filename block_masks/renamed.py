"""Names of earlier releases: what reads them is told what they are now."""

from __future__ import annotations

import dis
import sys

IMPORT_FROM = dis.opmap["IMPORT_FROM"]


def renamed_error(message: str) -> Exception:
    """The error of a module's ``__getattr__`` for a name that is another one now; to be raised.

    Args:
        message: What it is now.

    Returns:
        AttributeError, as ``hasattr`` expects it; ImportError in ``from module import name``, which
        would put a text of its own in place of an AttributeError's.
    """
    # Who asks the __getattr__ that calls this.
    asking = sys._getframe(2)
    is_import = asking.f_code.co_code[max(asking.f_lasti, 0)] == IMPORT_FROM
    return ImportError(message) if is_import else AttributeError(message)
