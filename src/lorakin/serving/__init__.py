"""Files with which other programs run what was trained here."""
