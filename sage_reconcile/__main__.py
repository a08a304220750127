"""`python -m sage_reconcile`, and the command `sage`."""

from sage_reconcile.cli.main import main

if __name__ == "__main__":
    main()
