"""Stops a set-up at once when the Python is too old or incomplete, saying what to install.

It has to run on any Python 3, so it uses nothing that is newer.
"""

import sys

NEEDED = (3, 11)


def main():  # type: ignore[no-untyped-def]  # no annotations: an old Python has to read this
    """Returns the exit status; prints what is wrong."""
    if sys.version_info < NEEDED:
        have = ".".join(str(part) for part in sys.version_info[:3])
        need = ".".join(str(part) for part in NEEDED)
        print("OpenManager needs Python " + need + " or later; " + sys.executable + " is Python " + have + ".")
        print("Install one and say which: make run PYTHON=python" + need)
        return 1
    try:
        import ensurepip  # noqa: F401, PLC0415
        import venv  # noqa: F401, PLC0415
    except ImportError:
        print("This Python cannot make virtual environments: install the package python3-venv.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())  # type: ignore[no-untyped-call]
