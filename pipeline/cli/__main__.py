"""`python -m pipeline.cli`: what jobs start."""

from pipeline.cli.main import main

main()
