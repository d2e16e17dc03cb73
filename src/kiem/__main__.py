"""python -m kiem"""

from kiem.cli import script

script()
