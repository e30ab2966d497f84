"""Studies: a grid of notebooks, run to its end in one folder, resumed, reported.

`study.py` and `yaml12.py` read what is asked for, `resume.py` says what of it is left, `estimate.py` what that costs.
`batch.py` drives it: `launch.py` talks to `launcher.py`, a process that forks each run, and `board.py` shows them.
`report.py` makes the page, with `charts.py` and `thumbnails.py`.
"""
