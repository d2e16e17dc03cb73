"""python -m kiem"""

from kiem.cli.main import script

script()
