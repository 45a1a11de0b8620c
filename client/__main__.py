"""`python -m client`: the `openmanager` command."""

import sys

from client.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
