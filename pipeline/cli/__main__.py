"""Where `maml` and `python -m pipeline.cli` start; jobs of a cluster start the latter."""

from pipeline.cli.name_clash import refuse_foreign_packages


def main() -> None:
    """Run the command, unless the packages on the path are not the project's own."""
    refuse_foreign_packages()
    # Only now: these imports already need the package `tasks`.
    from pipeline.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
