"""A time instead of a length: the model and the tokens that fill it on this machine."""

import time

from kiem import runtime
from kiem.config.presets import depth_for, resolve
from kiem.config.run import RunConfig
from kiem.plan.count import flops_per_token
from kiem.plan.predict import tokens_for_minutes

MATMUL_SHARE = 0.5  # of the machine's matrix-product rate that training reaches, about
