"""Real text that every Python carries: its documentation and the sources of its standard library."""

import sysconfig
from pathlib import Path
from pydoc_data.topics import topics


def corpus(limit: int = 8_000_000) -> str:
    """The documentation topics, then standard-library modules in the order of their names, up to `limit` characters."""
    parts = [topics[name] for name in sorted(topics)]
    size = sum(map(len, parts))
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if size >= limit:
            break
        parts.append(path.read_text(encoding="utf-8", errors="replace"))
        size += len(parts[-1])
    return "\n\n".join(parts)[:limit]
