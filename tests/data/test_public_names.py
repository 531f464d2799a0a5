from __future__ import annotations

import subprocess
import sys

import pinet_fast.data


def test_every_public_name_is_there():
    names = pinet_fast.data.__all__
    assert names == sorted(names)
    assert all(hasattr(pinet_fast.data, name) for name in names)


def test_no_heavy_package_is_imported():
    code = (
        "import sys, pinet_fast.data; "
        "print([m for m in ('triton', 'duckdb', 'typer', 'pandas', 'pinet_fast.models', "
        "'pinet_fast.training', 'pinet_fast.cli') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
