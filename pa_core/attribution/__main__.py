"""``python -m pa_core.attribution`` writes docs/methods.md."""

from pa_core.attribution import markdown
from pa_core.files import home

if __name__ == "__main__":
    (home() / "docs").mkdir(exist_ok=True)
    (home() / "docs" / "methods.md").write_text(markdown(), encoding="utf-8")
