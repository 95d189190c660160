"""``python -m vlmkernels`` is the ``vlmkernels`` command."""

from vlmkernels.cli import main

if __name__ == "__main__":
    main()
