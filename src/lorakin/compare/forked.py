"""Imported first in the process that trials are forked from: libraries stay quiet."""

from lorakin.library_logs import calm_libraries

calm_libraries()
