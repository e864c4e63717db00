"""`python -m kvfsctl`."""

from kvfsctl.main import run

run()
