"""A recording as one HTML page that needs no server and no network; `web/` holds its sources and its build."""

import base64
import json
import zlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

_PLACE = "{{recording}}"


def page(recording: Mapping[str, Any]) -> str:
    """The page that shows `recording`, as `graphopt.inspect.recording` makes it. Equal recordings give equal pages."""
    text = json.dumps(recording, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    packed = base64.b64encode(zlib.compress(text.encode())).decode()
    template = resources.files("graphopt.inspect").joinpath("web/page.html").read_text("utf-8")
    before, after = template.split(_PLACE)
    return before + packed + after
