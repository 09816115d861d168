"""Where the native library asks for what it has to know of tensor subclasses.

``torch.distributed.tensor`` takes a second to import, so what is written for it (``_dtensor``)
waits for somebody else to import it.
"""

from __future__ import annotations

import sys
from types import ModuleType


def dtensor_rules() -> ModuleType | None:
    """The module ``_dtensor``, which makes its rules known; None while there are no DTensors."""
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from . import _dtensor

    return _dtensor
