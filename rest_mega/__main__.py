"""`python -m rest_mega VERB ...` and `torchrun ... -m rest_mega VERB ...`."""

from rest_mega.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
