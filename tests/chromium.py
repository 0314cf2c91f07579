"""The browser that tests drive, if this machine has one."""

from __future__ import annotations

import shutil


def find_chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
