"""Stand-in."""

import sysconfig
from pathlib import Path


def domains(settings):
    lib = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(lib.glob("*.py"))
    import pydoc_data.topics as t

    return {
        "code": [f.read_text("utf-8", errors="ignore") for f in files],
        "prose": [t.topics[k] for k in sorted(t.topics)],
        "tables": [f.read_text("utf-8", errors="ignore") for f in sorted((lib / "encodings").glob("*.py"))],
    }
