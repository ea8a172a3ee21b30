"""Pages, charts and pictures, made of plain data."""
