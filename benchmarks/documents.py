"""Files of results: a JSON document that says what kind of results it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Document = dict[str, Any]


def write(document: Document, path: Path | None) -> None:
    """Nothing, without a path."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
