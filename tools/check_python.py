"""Stops a set-up at once when the Python is too old or incomplete, saying what to install.

It has to run on any Python 3, so it uses nothing that is newer.
"""

import sys

NEEDED = (3, 11)


def main():
    """Returns the exit status; prints what is wrong."""
    if sys.version_info < NEEDED:
        have = ".".join(str(part) for part in sys.version_info[:3])
        need = ".".join(str(part) for part in NEEDED)
        print("OpenManager needs Python %s or later; %s is Python %s." % (need, sys.executable, have))
        print("Install one and say which: make run PYTHON=python%s" % need)
        return 1
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        print("This Python cannot make virtual environments: install the package python3-venv.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
