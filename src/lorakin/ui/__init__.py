"""The page of `lorakin ui`: the functions of the command line in a browser.

Each part of the page is a file. What takes long is a process of its own, which works in a run's
directory as on the command line (`jobs.py`); the page reads those directories (`runs.py`).
"""
