"""Everything of ours that runs inside a sandbox: one tree, mounted read-only, for Python 3.9 and later.

In a sandbox the tree is the package `warmcell_guest`, which `init.py` and `enter.py` register without
touching `sys.path`, so that no module of ours can shadow one of the user's.

    init.py      the sandbox's first process; `supervisor/` is what it does
    enter.py     how an interpreter of the environment gets at the package
    kernel/      fork server and kernel launch
    magics/      `%%remote`
    values.py    variables sent between kernels
"""
