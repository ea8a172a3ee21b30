"""Makes pages, charts and pictures from plain data."""
