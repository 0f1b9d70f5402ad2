"""Runs pytest with the CUDA binding, over emulated kernels, in the place of the C++ extension.

    python tests/emulator/run_ops_tests.py MODULE [pytest's arguments]

MODULE is the `emulated_ops.so` of the C++ build. What the tests then call "fused" and "library"
is the code that runs on a GPU: argument checks, strides, plans, workspace, and the kernels
themselves.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys


class EmulatedOps:
    """Finds the emulated module when `dgl_ext._C` is asked for."""

    def __init__(self, path: str) -> None:
        self.path = path

    def find_spec(self, name: str, path: object = None, target: object = None):
        if name != "dgl_ext._C":
            return None
        loader = importlib.machinery.ExtensionFileLoader(name, self.path)
        return importlib.util.spec_from_file_location(name, self.path, loader=loader)


if __name__ == "__main__":
    import pytest

    sys.meta_path.insert(0, EmulatedOps(sys.argv[1]))
    os.environ["DGL_EXT_EMULATED"] = "1"
    import dgl_ext.functional

    dgl_ext.functional.LIBRARY_DEVICES = frozenset({"cpu"})
    sys.exit(pytest.main(sys.argv[2:]))
