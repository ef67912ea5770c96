"""One argument, as the real one writes it."""


def add_cli_args(parser, prefix):
    parser.add_argument(
        f"--{prefix}policy",
        type=str,
    )
