"""Print which kernel backends serve on this machine: ``python -m pinet_fast.kernels``."""

from . import describe_status

print(describe_status())
