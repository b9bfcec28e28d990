"""`python -m patchssl` and `torchrun -m patchssl` are the console command."""

from patchssl.cli import main

main()
