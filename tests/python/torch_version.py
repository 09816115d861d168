"""What tests have to know of the torch at hand."""

from __future__ import annotations

import torch

#: The oldest one that is supported.
IS_2_11 = torch.__version__.startswith("2.11.")
